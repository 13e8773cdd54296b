"""A customer-service bot: says a text by MQTT, waits for the clip, and prints where it is.

python -m examples.mqtt_bot "Your parcel is on its way." [--host BROKER] [--port 1883] [--prefix avatar]

It does what a bot should: it names its job, so that asking twice is asking once, and asks again when it hears nothing
or its broker was away.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import uuid
from typing import Any

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

ASK_AGAIN_S = 30.0


async def clip(host: str, port: int, prefix: str, question: dict[str, Any]) -> dict[str, Any]:
    """What has become of a job: its last state, with its result. Asks for as long as it takes."""
    replies = f"bots/{uuid.uuid4()}"
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic = replies
    while True:
        with contextlib.suppress(aiomqtt.MqttError, TimeoutError):
            async with aiomqtt.Client(host, port, protocol=aiomqtt.ProtocolVersion.V5) as client:
                await client.subscribe(replies, qos=1)
                await client.publish(f"{prefix}/jobs/submit", json.dumps(question), qos=1, properties=properties)
                messages = aiter(client.messages)
                while True:
                    async with asyncio.timeout(ASK_AGAIN_S):
                        message = await anext(messages)
                    answer: dict[str, Any] = json.loads(message.payload)
                    print(answer["state"], file=sys.stderr)
                    if "retry_s" in answer:
                        await asyncio.sleep(answer["retry_s"])
                        break
                    if answer["state"] in ("completed", "failed", "cancelled", "refused"):
                        return answer
        await asyncio.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Have a text said, and print where the clip is.")
    parser.add_argument("text")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=1883)
    parser.add_argument("--prefix", default="avatar")
    given = parser.parse_args()
    question = {"id": f"bot-{uuid.uuid4()}", "text": given.text}
    answer = asyncio.run(clip(given.host, given.port, given.prefix, question))
    if answer["state"] != "completed":
        print(answer.get("error", answer["state"]), file=sys.stderr)
        return 1
    print(answer["result"].get("url") or answer["result"].get("path"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
