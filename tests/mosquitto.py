"""mosquitto as the broker at the far side: with passwords and certificates; it can be killed, frozen and come back.

Use only in tests marked `needs("mosquitto")`; with TLS also "openssl", with passwords also "mosquitto_passwd".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiomqtt
from conftest import find_program
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from proxy import free_port
from waiting import until, until_async

CONFIG = """
listener {port} 127.0.0.1
user root
persistence true
persistence_location {folder}/
persistence_file broker.db
autosave_on_changes true
autosave_interval 1
set_tcp_nodelay true
max_queued_messages 0
max_inflight_messages 200
log_dest file {folder}/broker.log
log_type all
log_timestamp true
"""


class Mosquitto:
    """A broker on a free port of 127.0.0.1, with all it writes in one folder. Use as a context manager.

    port: stays the same from one start to the next. users: passwords by user; without any, everybody may come.
    tls: with a certificate of its own authority (`ca`); with `client_certificates` it wants one of that from whoever
    comes (`client_cert`, `client_key`). lines: more of its configuration.
    """

    def __init__(
        self,
        folder: Path,
        users: Mapping[str, str] | None = None,
        tls: bool = False,
        client_certificates: bool = False,
        lines: str = "",
    ) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.ca, self.client_cert, self.client_key = (folder / name for name in ("ca.pem", "client.pem", "client.key"))
        config = CONFIG.format(port=self.port, folder=folder)
        if users is None:
            config += "allow_anonymous true\n"
        else:
            passwords = folder / "passwords"
            passwords.write_text("".join(f"{user}:{password}\n" for user, password in users.items()))
            _run("mosquitto_passwd", "-U", passwords)
            config += f"allow_anonymous false\npassword_file {passwords}\n"
        if tls:
            _certificates(folder)
            config += f"cafile {self.ca}\ncertfile {folder}/server.pem\nkeyfile {folder}/server.key\n"
            config += f"require_certificate {str(client_certificates).lower()}\n"
        (folder / "broker.conf").write_text(config + lines)

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.thaw()
            self.stop()

    def start(self) -> float:
        """Start it, on the port it had; when it listened (monotonic seconds). Raises: TimeoutError."""
        assert self._process is None, "it runs already"
        program = find_program("mosquitto")
        assert program is not None
        self._process = subprocess.Popen(
            [program, "-c", self.folder / "broker.conf"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self._answers, 10, f"mosquitto did not start, see {self.folder / 'broker.log'}")
        return time.monotonic()

    def kill(self) -> None:
        """kill -9: its connections are reset by the kernel, and it has what it last wrote down."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to go; it writes everything down."""
        self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP: the kernel goes on accepting and acknowledging for it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @property
    def log(self) -> str:
        path = self.folder / "broker.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"mosquitto ended with {self._process.returncode}:\n{self.log[-2000:]}")
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(10)
        self._process = None


class Heard:
    """A message as a client of MQTT 5 got it: `head` is the JSON of its first line, `chunk` what follows that line."""

    def __init__(self, message: aiomqtt.Message) -> None:
        self.topic = message.topic.value
        self.payload = bytes(message.payload)
        self.retain = message.retain
        self.correlation: bytes = getattr(message.properties, "CorrelationData", b"")
        self.expires_s: int | None = getattr(message.properties, "MessageExpiryInterval", None)
        self.at_s = time.monotonic()
        line, _, self.chunk = self.payload.partition(b"\n")
        try:
            self.head: dict[str, Any] = dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            self.head = {}

    def __repr__(self) -> str:
        return f"{self.topic}: {self.payload[:300]!r}"


class Caller:
    """Somebody at the other end of the broker: says things, and keeps all that was heard. Use as a context manager."""

    def __init__(self, broker: Mosquitto, *topics: str, version: int = 5, **options: Any) -> None:
        self._options = {
            "hostname": "127.0.0.1",
            "port": broker.port,
            "protocol": aiomqtt.ProtocolVersion.V5 if version == 5 else aiomqtt.ProtocolVersion.V311,
            "socket_options": [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
            **options,
        }
        self._topics = topics
        self.heard: list[Heard] = []

    async def __aenter__(self) -> Caller:
        self._client = aiomqtt.Client(**self._options)
        self._client._disconnected.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await self._client.__aenter__()
        if self._topics:
            await self._client.subscribe([(topic, 1) for topic in self._topics])
        self._task = asyncio.create_task(self._listen(), name="caller")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(aiomqtt.MqttError):
            await self._client.__aexit__(None, None, None)

    async def _listen(self) -> None:
        async for message in self._client.messages:
            self.heard.append(Heard(message))

    async def say(
        self,
        topic: str,
        payload: object = b"",
        reply: str = "",
        correlation: bytes = b"",
        retain: bool = False,
        qos: int = 1,
    ) -> None:
        """A dict goes as JSON. reply, correlation: the properties of MQTT 5."""
        data = json.dumps(payload).encode() if isinstance(payload, dict) else payload
        properties = None
        if reply or correlation:
            properties = Properties(PacketTypes.PUBLISH)
            if reply:
                properties.ResponseTopic = reply
            if correlation:
                properties.CorrelationData = correlation
        await self._client.publish(topic, data, qos, retain, properties)

    def on(self, topic: str) -> list[Heard]:
        return [heard for heard in self.heard if heard.topic == topic]

    async def hears(
        self, topic: str, what: Callable[[Heard], object] = lambda heard: True, limit_s: float = 10.0
    ) -> Heard:
        """The first message on a topic of which that is so. Raises: TimeoutError."""

        def found() -> Heard | None:
            return next((heard for heard in self.on(topic) if what(heard)), None)

        heard = await until_async(found, limit_s, f"a message on {topic}; heard {self.heard[-5:]}")
        assert heard is not None
        return heard

    async def hears_state(self, topic: str, state: str, limit_s: float = 10.0) -> Heard:
        return await self.hears(topic, lambda heard: heard.head.get("state") == state, limit_s)


def _certificates(folder: Path) -> None:
    """An authority, and a certificate of it for the server and for a client (needs openssl)."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    subject = ("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
    _run("openssl", "req", "-x509", *key, "-keyout", folder / "ca.key", "-out", folder / "ca.pem", "-subj", "/CN=test")
    for name in ("server", "client"):
        own = ("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem", "-subj", f"/CN={name}")
        signed = ("-CA", folder / "ca.pem", "-CAkey", folder / "ca.key", "-addext", "basicConstraints=CA:FALSE")
        _run("openssl", "req", "-x509", *key, *own, *signed, *subject)


def _run(program: str, *arguments: object) -> None:
    found = find_program(program)
    assert found is not None
    subprocess.run([found, *map(str, arguments)], check=True, capture_output=True, timeout=30)
