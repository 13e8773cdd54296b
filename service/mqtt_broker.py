"""A connection to an MQTT broker that may be slow, frozen, killed or absent, and the next one, for ever.

What aiomqtt leaves to its users, and the few places where its insides have to be touched, are here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import random
import re
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from service.commands import ID
from service.config import ConfigError, MqttSection, Settings
from service.secrets import read_secret

ANSWER_S = 5.0
"""Seconds a broker has for each answer; then it counts as gone."""
LEAVE_S = 1.0
"""The same when the daemon goes: once for a goodbye, and once for the end of the connection."""
RETRY_S = (0.5, 30.0)
"""Seconds between two attempts to connect: the first, and the most."""
REFUSED_RETRY_S = 60.0
"""The same where a person has to change something first: a password, a right, a certificate."""
STEADY_S = 10.0
"""A connection that held for so many seconds was more than an attempt."""
WINDOW = 8
"""Messages that the broker sends before the first of them is acknowledged."""
FORBIDDEN_TOLD = 20
"""Kinds of topics of which it is told that they may not be published to; those that others name have no end."""
UNACKNOWLEDGED = 256
"""Messages of QoS 0, which the broker does not hold back, that wait at most; more are lost, as QoS 0 has it."""

# Reason codes of MQTT 5, into which paho turns those of 3.1.1, too.
NEEDS_A_PERSON = {132, 133, 134, 135, 138, 140}
"""Protocol version, client name, user or password, not authorised, banned, authentication method."""
NOT_ALLOWED = 135
NO_SHARING = 158
TAKEN_OVER = 142
LOST = 128

log = logging.getLogger(__name__)
wire_log = logging.getLogger(f"{__name__}.wire")
# paho calls every lost connection an error; at lower levels it tells topics and properties of every message.
wire_log.setLevel(logging.CRITICAL)

BrokerGone = aiomqtt.MqttError
"""The connection is over, whatever the reason. Raised by every call of Connection that waits."""


class CannotServe(aiomqtt.MqttError):
    """The broker answers, but it or this machine does not allow the work."""


class TooLong(bytes):
    """In place of a payload that is longer than is allowed, so that it is not kept; `size` bytes came."""

    size = 0


@dataclass(frozen=True)
class Login:
    """As whom the daemon comes, and where to."""

    settings: MqttSection
    client_id: str
    password: str = field(repr=False)
    tls: ssl.SSLContext | None = field(repr=False)

    @classmethod
    def read(cls, settings: Settings) -> Login:
        """Blocks; makes a client's name where there is none. Raises: ConfigError."""
        mqtt = settings.mqtt
        if not mqtt.host:
            raise ConfigError("mqtt.host: is empty; name the broker, or set mqtt.enabled to false")
        password = read_secret("mqtt.password", mqtt.password_file, mqtt.password_env)
        if password and not mqtt.user:
            raise ConfigError("mqtt.user: is needed where there is a password")
        folder = Path(os.path.expanduser(settings.daemon.state))
        return cls(mqtt, mqtt.client_id or _kept_name(folder / "mqtt_client_id"), password, _tls(mqtt))

    @property
    def address(self) -> str:
        return f"{self.settings.host}:{self.settings.port}"


def _kept_name(file: Path) -> str:
    """The name under which a broker keeps what this daemon has not taken yet."""
    with contextlib.suppress(OSError, ValueError):
        name = file.read_text(encoding="ascii").strip()
        if re.fullmatch(ID, name):
            return name
    name = f"avatard-{secrets.token_hex(6)}"
    try:
        with file.open("w", encoding="ascii") as opened:
            opened.write(f"{name}\n")
            opened.flush()
            # Under another name it would not get what was kept for it.
            os.fsync(opened.fileno())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({_reason(error)}); see daemon.state") from error
    return name


def _tls(mqtt: MqttSection) -> ssl.SSLContext | None:
    ca, cert, key = (
        None if path is None else os.path.expanduser(path) for path in (mqtt.ca_file, mqtt.cert_file, mqtt.key_file)
    )
    if not mqtt.tls:
        for name, path in (("ca_file", ca), ("cert_file", cert), ("key_file", key)):
            if path is not None:
                raise ConfigError(f"mqtt.{name}: means nothing while mqtt.tls is false; set it to true")
        return None
    if key is not None and cert is None:
        raise ConfigError("mqtt.key_file: needs mqtt.cert_file beside it")
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ConfigError(f"mqtt.ca_file: {ca}: cannot be used ({_reason(error)})") from error
    if cert is not None:
        try:
            # Without a password here, a key that has one would ask for it on the terminal.
            context.load_cert_chain(cert, key, password="")
        except OSError as error:
            raise ConfigError(f"mqtt.cert_file, mqtt.key_file: {cert}: cannot be used ({_reason(error)})") from error
    return context


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


class Inbox(asyncio.Queue[aiomqtt.Message]):
    """What the broker sent and nobody has looked at yet.

    What it must not lose it does not send without end (WINDOW); the rest is bounded here. Too long payloads are let go.
    """

    def __init__(self, most_bytes: int, maxsize: int = 0) -> None:
        super().__init__(maxsize)
        self._most_bytes = most_bytes
        self._bytes = 0
        self.lost = 0

    def put_nowait(self, message: aiomqtt.Message) -> None:
        size = len(message.payload)
        if size > self._most_bytes:
            message.payload = TooLong()
            message.payload.size = size
        if message.qos == 0 and (self.qsize() >= UNACKNOWLEDGED or self._bytes > self._most_bytes):
            self.lost += 1
            if self.lost & (self.lost - 1) == 0:
                log.warning("mqtt: messages of QoS 0 come too fast: %d are lost; QoS 1 would make them wait", self.lost)
            return
        super().put_nowait(message)

    def _put(self, message: aiomqtt.Message) -> None:
        self._bytes += len(message.payload)
        super()._put(message)

    def _get(self) -> aiomqtt.Message:
        message: aiomqtt.Message = super()._get()
        self._bytes -= len(message.payload)
        return message


class Connection:
    """A broker that answers. Every call that waits raises BrokerGone when it does so no more, after ANSWER_S."""

    def __init__(self, client: aiomqtt.Client, five: bool) -> None:
        self._client = client
        self.five = five
        """Whether it speaks MQTT 5: properties of messages, and an end to what is retained."""

    def messages(self) -> AsyncIterator[aiomqtt.Message]:
        return self._client.messages

    def acknowledge(self, message: aiomqtt.Message) -> None:
        """Now the broker may forget it. Those that wait are acknowledged in the order in which they came."""
        if message.qos:
            # aiomqtt has no word for it; see new_client.
            self._client._client.ack(message.mid, message.qos)

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expires_s: int | None = None,
        correlation: bytes = b"",
        content_type: str = "application/json",
        **user: str,
    ) -> None:
        """With QoS 1: returns when the broker has it. What follows `qos` and `retain` is told to who speaks MQTT 5."""
        properties = None
        if self.five:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ContentType = content_type
            if correlation:
                properties.CorrelationData = correlation
            if expires_s is not None:
                properties.MessageExpiryInterval = expires_s
            if user:
                properties.UserProperty = list(user.items())
        await self._client.publish(topic, payload, qos, retain, properties)
        _check_cancelled()

    async def subscribe(self, topics: Sequence[str]) -> None:
        """With QoS 1, and without what is retained there. Raises: CannotServe."""
        options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
        wanted: Any = [(topic, options if self.five else 1) for topic in topics]
        codes = await self._client.subscribe(wanted)
        _check_cancelled()
        for topic, code in zip(topics, codes):
            number = _number(code) or 0
            if number == NO_SHARING and topic.startswith("$share/"):
                log.warning("mqtt: the broker shares no subscriptions: every daemon there takes every job (mqtt.group)")
                await self.subscribe([topic.split("/", 2)[2]])
            elif number >= 128:
                raise CannotServe(f"the broker does not let this daemon subscribe to {topic} ({code})")

    async def unsubscribe(self, topics: Sequence[str]) -> None:
        await self._client.unsubscribe(list(topics))
        _check_cancelled()


def new_client(login: Login, will_topic: str) -> aiomqtt.Client:
    """One for each connection: what an old one still had to send is not sent again behind our back."""
    mqtt = login.settings
    five = mqtt.version == "5"
    most_bytes = round(mqtt.max_payload_mb * 1e6)
    properties = None
    if five:
        properties = Properties(PacketTypes.CONNECT)
        # Without it, clean_start=False alone loses everything as soon as the connection is lost.
        properties.SessionExpiryInterval = mqtt.session_expiry_s
        properties.ReceiveMaximum = WINDOW
        # What is a little too long is taken and answered; beyond that the broker does not pass it on.
        properties.MaximumPacketSize = min(2 * most_bytes + 65_536, 2**28 + 4)
    client = aiomqtt.Client(
        mqtt.host,
        mqtt.port,
        username=mqtt.user or None,
        password=login.password or None,
        logger=wire_log,
        identifier=login.client_id,
        queue_type=functools.partial(Inbox, most_bytes),  # type: ignore[arg-type]
        protocol=aiomqtt.ProtocolVersion.V5 if five else aiomqtt.ProtocolVersion.V311,
        will=aiomqtt.Will(will_topic, b"offline", 1, True),
        clean_session=None if five else False,
        clean_start=False if five else 3,
        timeout=ANSWER_S,
        keepalive=mqtt.keepalive_s,
        properties=properties,
        tls_context=login.tls,
        # Both ends have to: with Nagle's algorithm a question and its answer take 88 ms in place of 0.5.
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
    )
    client.pending_calls_threshold = 1000
    # How a connection ended is told to whoever waits for something then; else asyncio complains that nobody asked.
    client._disconnected.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    # aiomqtt acknowledges what it receives, so whoever dies with a message has lost it. paho can leave that to us, and
    # has public methods for it, but aiomqtt shows them to nobody. Before connecting: a broker that kept messages for
    # us sends them at once. test_mqtt.py fails when an aiomqtt comes that has this no more.
    client._client.manual_ack_set(True)
    return client


def _tell_what_is_forbidden(client: aiomqtt.Client, login: Login, told: set[str]) -> None:
    """Log what the broker throws away because we have no right to it; of a kind in `told`, which grows, nothing more.

    Only MQTT 5 has a word for that, and aiomqtt keeps neither it nor what it was said of. Some brokers hang up, too
    (mosquitto 2.0.11).
    """
    paho: Any = client._client
    topics: dict[int, str] = {}
    publish, on_publish = paho.publish, paho.on_publish

    def noting(topic: str, payload: Any, qos: int, *more: Any, **options: Any) -> Any:
        sent = publish(topic, payload, qos, *more, **options)
        if qos:
            topics[sent.mid] = topic
        return sent

    def acknowledged(paho: Any, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        topic = topics.pop(mid, "")
        kind = topic.rpartition("/")[2]
        if _number(reason) == NOT_ALLOWED and kind not in told and len(told) < FORBIDDEN_TOLD:
            told.add(kind)
            log.warning("mqtt: the broker does not let %s publish %s; give it the right to", _who(login), topic)
        on_publish(paho, userdata, mid, reason, properties)

    paho.publish, paho.on_publish = noting, acknowledged


async def stay_connected(
    login: Login,
    will_topic: str,
    serve: Callable[[Connection], Awaitable[None]],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Connect, let `serve` work until it raises BrokerGone, and connect again; until cancelled.

    The broker tells `will_topic` (retained) "offline" when the connection is lost; it is told so here when we leave.
    """
    wait_s, gone_since, told = RETRY_S[0], clock(), ""
    forbidden: set[str] = set()
    while True:
        client = new_client(login, will_topic)
        _tell_what_is_forbidden(client, login, forbidden)
        began: float | None = None
        error = aiomqtt.MqttError("nothing left to do")
        try:
            async with client:
                _check_cancelled()
                began = clock()
                log.info("mqtt: connected to %s as %s, %s", login.address, login.client_id, _after(began - gone_since))
                try:
                    await serve(Connection(client, login.settings.version == "5"))
                finally:
                    await _say_goodbye(client, will_topic)
        except* aiomqtt.MqttError as group:
            error = _first(group)
        # What failed while we were leaving has taken the place of the cancellation.
        _check_cancelled()
        if began is not None:
            gone_since = clock()
            if gone_since - began > STEADY_S:
                wait_s, told = RETRY_S[0], ""
        said = _explain(error, login, soon=began is not None and gone_since - began <= STEADY_S)
        if said != told:
            log.warning("mqtt: %s: %s; trying again for as long as it takes", login.address, said)
            told = said
        needs_a_person = isinstance(error, CannotServe) or _code(error) in NEEDS_A_PERSON
        # A fleet of daemons does not come back all at once.
        await asyncio.sleep((REFUSED_RETRY_S if needs_a_person else wait_s) * random.uniform(0.75, 1.0))
        wait_s = min(RETRY_S[1], wait_s * 2)


def _check_cancelled() -> None:
    """After each wait of aiomqtt: by asyncio.wait_for, which in Python 3.11 forgets that it was cancelled when what it
    waits for comes at that moment."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _say_goodbye(client: aiomqtt.Client, will_topic: str) -> None:
    """Where there is still somebody to say it to; the will says it otherwise."""
    client.timeout = LEAVE_S
    with contextlib.suppress(aiomqtt.MqttError):
        await client.publish(will_topic, b"offline", 1, True)


def _after(gone_s: float) -> str:
    return f"after {gone_s:.0f} s without" if gone_s >= 1 else "at once"


def _first(group: BaseExceptionGroup[aiomqtt.MqttError]) -> aiomqtt.MqttError:
    """When a connection goes, everybody who uses it says so: one reason is enough, and our own the best."""
    found: list[aiomqtt.MqttError] = []

    def collect(error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup):
            for part in error.exceptions:
                collect(part)
        elif isinstance(error, aiomqtt.MqttError):
            found.append(error)

    collect(group)
    return min(found, key=lambda error: not isinstance(error, CannotServe))


def _code(error: aiomqtt.MqttError) -> int | None:
    return _number(getattr(error, "rc", None))


def _number(code: Any) -> int | None:
    """Of paho's reason codes and plain numbers alike."""
    return getattr(code, "value", code)


def _who(login: Login) -> str:
    return f"user {login.settings.user!r}" if login.settings.user else "a client without a user"


def _explain(error: aiomqtt.MqttError, login: Login, soon: bool) -> str:
    """In one line, with what a person could do. soon: it had hardly begun."""
    cause = error.__cause__ if isinstance(error.__cause__, aiomqtt.MqttError) else error
    code = _code(cause)
    if code in (134, 135):
        return f"refuses {_who(login)}; see mqtt.user, mqtt.password_file and mqtt.cert_file"
    if code == LOST:
        # Not every broker says which of these it was.
        why = (
            f"; when this goes on, another client may come as {login.client_id}, too (mqtt.client_id), or the broker "
            f"may not let {_who(login)} publish below {login.settings.prefix}/"
        )
        return f"the connection was lost{why if soon else ''}"
    if code == TAKEN_OVER:
        return f"another client came as {login.client_id}; give each daemon a mqtt.client_id of its own"
    if login.tls is not None and not login.settings.cert_file and "timed out" in str(cause):
        # A broker that wants one and gets none leaves without a word.
        return f"does not answer ({cause}); does it want a client certificate (mqtt.cert_file)?"
    if "CERTIFICATE_VERIFY_FAILED" in str(cause):
        return f"has a certificate that is not trusted ({cause}); see mqtt.ca_file and mqtt.host"
    return str(cause).strip() or type(cause).__name__
