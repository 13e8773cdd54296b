"""Live sessions of the daemon: opened by any trigger, spoken to, watched and changed, by their id.

    sound, text -> (one after the other) -> PushSource -> LiveSession -> view, outputs

All of them share one engine and nothing else: whatever ends one leaves the others as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import secrets
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from audio.errors import AvatardError
from audio.live import LISTENER_RATE
from audio.urls import blanked, redacted
from avatar.model import Reference
from avatar.picture import cover
from service import isolated
from service.bench import example
from service.commands import ID, OpenSession, Refusal, Source
from service.config import Settings
from service.log import bound
from service.run import Stopped, metadata, or_stop
from service.speaking import Feed, Speaking
from streaming.encoder import EncoderSettings
from streaming.lane import Lane, LanePolicy, LaneStatus
from streaming.live import Interruption, LiveSession, LiveSettings, LiveStatus
from streaming.sinks import open_sink
from streaming.view import ViewSink

if TYPE_CHECKING:
    from service.hub import Hub
    from service.inputs import Inputs
    from service.turns import Turns
    from service.voice import Voice
    from streaming.engine import Engine, EngineSession

log = logging.getLogger(__name__)

State = Literal["opening", "on air", "closed", "failed"]

KEYFRAMES_S = 2.0
"""The most between two keyframes: a viewer who was too slow goes on at the next."""

REWIND_BLOCKS = 3
"""How far an interruption may have to go back: the block on the screen and those made ahead."""

OUTPUTS = 16

LOOK_S = 1.0
"""How often a session looks at its outputs, and whether anybody still needs it."""

FINISH_S = 60.0
"""What a file gets to be finished, where nobody waits for the daemon to end."""

CUT_OFF_S = 1.0

ENDS = 64
"""Sessions that are over, whose end is remembered."""

_NOT_YET = LiveStatus(
    on_air=False,
    speaking=False,
    frames=0,
    held=0,
    repeated=0,
    skipped=0,
    ahead_s=0.0,
    step_s=0.0,
    load=math.nan,
    skew_s=0.0,
    waiting_s=0.0,
    slips=0,
    half_rate=False,
    interruptions=0,
    outputs=(),
)


class Sessions:
    """Every live session there is.

    Args:
        engine: shared with the jobs; it need not be ready yet. turns: told when a session needs the engine next.
        voice: speaks texts; None where none can be spoken.
        clock: monotonic seconds, of the event loop.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        inputs: Inputs,
        turns: Turns,
        hub: Hub,
        voice: Voice | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._house = _House(settings, engine, inputs, turns, hub, voice, clock, self._who_sends_to)
        self._sessions: dict[str, Session] = {}
        self._reserved: set[str] = set()
        """Ids of sessions whose command is being looked into."""
        self._ends: OrderedDict[str, str] = OrderedDict()
        self._closing = False

    def use(self, settings: Settings) -> None:
        """Go on with these; sessions that are open keep theirs."""
        self._house = replace(self._house, settings=settings)

    async def open(self, command: OpenSession) -> Session:
        """Begin a session. It is opening when this returns; its status and the hub say what becomes of it.

        Raises: Refusal: full, conflict (the id is taken), unavailable (the daemon ends, or has no model any more), or
        what is wrong with picture or outputs.
        """
        id = command.id or f"live-{secrets.token_hex(5)}"
        self._check_room(id)
        self._reserved.add(id)
        try:
            image = await self._picture(command.image)
            model = self._house.settings.model
            prompt = model.prompt if command.prompt is None else command.prompt
            seed = model.seed if command.seed is None else command.seed
            session = Session(id, Reference(image, prompt, seed), self._house)
            for target in command.outputs:
                await session.add_output(target)
            if self._closing:
                raise _ending()
            self._sessions[id] = session
        finally:
            self._reserved.discard(id)
        session.start(self._forget)
        return session

    def get(self, id: str) -> Session:
        """Raises: Refusal: there is none of that id."""
        if id in self._sessions:
            return self._sessions[id]
        why = f"is over{self._ends[id]}" if id in self._ends else "there is none; GET /v1/sessions lists all"
        raise Refusal("not found", f"session {id}: {why}")

    def list(self) -> list[Session]:
        """Those that are open, the oldest first."""
        return list(self._sessions.values())

    async def close_all(self) -> None:
        """Close every session within daemon.shutdown_s, and open none any more."""
        self._closing = True
        limit_s = max(0.0, self._house.settings.daemon.shutdown_s - CUT_OFF_S)
        await asyncio.gather(*(session.close(limit_s) for session in self.list()))

    def _check_room(self, id: str) -> None:
        if self._closing:
            raise _ending()
        if id in self._sessions or id in self._reserved:
            raise Refusal("conflict", f"session {id}: there is one of this id; choose another, or none")
        limit = self._house.settings.sessions.limit
        if len(self._sessions) + len(self._reserved) >= limit:
            raise Refusal("full", f"{_count(limit, 'session')} on air, which is the limit; close one", 5.0)
        if self._house.engine.state == "ended":
            raise Refusal("unavailable", "the model's process has ended for good; see the log of the daemon")

    async def _picture(self, source: Source | None) -> NDArray[np.uint8]:
        house = self._house
        if source is not None:
            path = await house.inputs.fetch(source, "image")
        else:
            path = house.settings.daemon.image or example("presenter.png")
        return await _read(path, house.settings)

    def _who_sends_to(self, target: str) -> str | None:
        return next((session.id for session in self._sessions.values() if session.sends_to(target)), None)

    def _forget(self, session: Session) -> None:
        """It is over."""
        self._sessions.pop(session.id, None)
        error = session.error
        self._ends[session.id] = f": {error}" if error else ""
        while len(self._ends) > ENDS:
            self._ends.popitem(last=False)


@dataclass(frozen=True)
class _House:
    """What all sessions share. who_sends_to: the id of the session that has an output of this target."""

    settings: Settings
    engine: Engine
    inputs: Inputs
    turns: Turns
    hub: Hub
    voice: Voice | None
    clock: Callable[[], float]
    who_sends_to: Callable[[str], str | None]


@dataclass
class _Output:
    """One place a session is sent to.

    target: with its secrets, as it is opened. for_viewers: a playlist that is of no use once it grows no more.
    """

    name: str
    target: str
    lane: Lane
    for_viewers: bool
    told: tuple[str, str | None] = ("waiting", None)
    """State and error that the hub was told last."""

    @property
    def path(self) -> Path | None:
        """Of a file or a playlist."""
        return _path(self.target)

    async def clear(self) -> None:
        """Delete what nobody can use any more, after its end."""
        if self.for_viewers and self.path is not None:
            await asyncio.to_thread(_delete_playlist, self.path)


class Session:
    """One person on air, from a picture of any size; made by `Sessions.open`.

    error: why it failed, in one line.
    """

    def __init__(self, id: str, reference: Reference, house: _House) -> None:
        self.id = id
        self.error: str | None = None
        self._reference = reference
        self._settings, self._engine, self._inputs = house.settings, house.engine, house.inputs
        self._turns, self._hub, self._voice, self._clock = house.turns, house.hub, house.voice, house.clock
        self._who_sends_to = house.who_sends_to
        self._state: State = "opening"
        self._why_closed: str | None = None
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_end: Callable[[Session], None] = lambda session: None
        self._live: LiveSession | None = None
        self._models: weakref.WeakSet[EngineSession] = weakref.WeakSet()
        self._view = ViewSink(self._want_keyframe, self._clock)
        self._outputs: dict[str, _Output] = {}
        self._last_status: dict[str, Any] | None = None
        self._speaking = Speaking(id, self._settings.live.waiting_s, self._clock)
        self._changing = False
        self._used_at = self._clock()

    # Its life

    def start(self, on_end: Callable[[Session], None]) -> None:
        """Go on air. on_end: called once it is over, just before the hub is told."""
        self._on_end = on_end
        self._tell("opening")
        self._task = asyncio.create_task(self._run(), name=f"session {self.id}")

    async def close(self, limit_s: float = FINISH_S) -> dict[str, Any]:
        """End the session, finish its files, and tell how it stood in the end. What takes longer is cut off."""
        assert self._task is not None, "close() before start()"
        self._stop.set()
        await asyncio.wait({self._task}, timeout=limit_s)
        if not self._task.done():
            log.warning("session %s: was not finished in %g s, and is cut off", self.id, limit_s)
        # The first ends the broadcast, the second the wait for what does not close.
        for _ in range(2):
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=CUT_OFF_S / 2)
        return self.status()

    def status(self) -> dict[str, Any]:
        """How it stands, as JSON: `state`, viewers, outputs, and what `LiveStatus` has."""
        if self._last_status is not None:
            return self._last_status
        live = self._live.status if self._live is not None else _NOT_YET
        figures = {key: _plain(value) for key, value in vars(live).items() if key != "outputs"}
        return {
            "id": self.id,
            "state": self._state,
            "error": self.error,
            **figures,
            "texts": self._speaking.texts,
            "viewers": self._view.viewers,
            "view_type": self.view_type,
            "outputs": [self._output_status(output) for output in self._outputs.values()],
            "engine": self._engine.state,
            "engine_restarts": self._engine.restarts,
        }

    async def _run(self) -> None:
        """From the model's start to the last file closed. Whatever goes wrong is told, and stays here."""
        with bound(session=self.id):
            try:
                await self._broadcast()
            except Stopped:
                pass
            except AvatardError as error:
                self.error = str(error)
                log.error("session %s: %s", self.id, error)
            except Exception as error:
                self.error = f"a bug ended it ({type(error).__name__}); the daemon's log has more"
                log.exception("session %s: a bug ended it", self.id)
            finally:
                await self._end()

    async def _broadcast(self) -> None:
        with self._turns.live(self._quiet_s):
            spec = await or_stop(self._stop, self._engine.ready())
            # Of what may have been 80 megapixels nothing else is needed.
            self._reference = await asyncio.to_thread(_covering, self._reference, spec.width, spec.height)
            self._live = LiveSession(
                self._speaking.source,
                self._open_model,
                self._reference,
                [self._lane_of_view()],
                encoder_settings=self._encoder_settings(),
                metadata=metadata(self._settings, f"{self.id}, live"),
                settings=LiveSettings(stay=True),
                clock=self._clock,
                on_change=self._on_change,
            )
            watching = asyncio.create_task(self._watch(), name=f"watch {self.id}")
            try:
                await self._live.run(self._stop)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def _end(self) -> None:
        """Let go of everything. How it stood is told last."""
        self._stop.set()
        self._speaking.close()
        lanes = [output.lane for output in self._outputs.values()]
        for lane in lanes:
            lane.close(complete=False)
        try:
            async with asyncio.timeout(CUT_OFF_S):
                await asyncio.gather(
                    self._view.close(complete=False),
                    *(lane.wait_closed() for lane in lanes),
                    *(model.close() for model in list(self._models)),
                    return_exceptions=True,
                )
                for output in self._outputs.values():
                    await output.clear()
        except TimeoutError:
            log.warning("session %s: an output does not close, and is left", self.id)
        finally:
            self._state = "closed" if self.error is None else "failed"
            self._last_status = self.status()
            self._on_end(self)
            self._tell(self._state, reason=self._why_closed, **self._last_status)

    async def _open_model(self, reference: Reference) -> EngineSession:
        model = await self._engine.open(
            reference, rewind_blocks=REWIND_BLOCKS, snapshot_every_s=self._settings.live.snapshot_every_s
        )
        self._models.add(model)
        return model

    def _encoder_settings(self) -> EncoderSettings:
        live, encoder = self._settings.live, self._settings.encoder
        return EncoderSettings(
            **{
                **encoder.model_dump(),
                "keyframe_interval_s": min(encoder.keyframe_interval_s, KEYFRAMES_S),
            },
            live=True,
            codec=live.codec,
            width=live.width,
            height=live.height,
            fps=live.fps,
            channels=live.channels,
            bitrate_kbps=live.bitrate_kbps,
        )

    def _quiet_s(self) -> float:
        """0 until it is on air, since somebody waits for it; for ever while its files are finished."""
        if self._stop.is_set():
            return math.inf
        return self._live.quiet_s if self._live is not None else 0.0

    def _want_keyframe(self) -> None:
        if self._live is not None:
            self._live.want_keyframe()

    def _on_change(self, what: str) -> None:
        if what == "on air":
            self._state = "on air"
            assert self._live is not None
            for output in self._outputs.values():
                self._live.add_output(output.lane)
        self._tell(what)

    async def _watch(self) -> None:
        """Tell what becomes of the outputs, and end a session that nobody needs."""
        idle_s = self._settings.sessions.idle_s
        while True:
            await asyncio.sleep(min(LOOK_S, idle_s / 4))
            self._tell_outputs()
            if self._in_use():
                self._used_at = self._clock()
            elif self._clock() - max(self._used_at, self._speaking.used_at) >= idle_s:
                self._why_closed = f"no sound, viewer or output for {idle_s:g} s"
                log.info("session %s: %s", self.id, self._why_closed)
                self._stop.set()

    def _in_use(self) -> bool:
        assert self._live is not None
        sent = any(output.lane.status.state not in ("failed", "ended") for output in self._outputs.values())
        return sent or self._speaking.busy or self._live.status.speaking or self._view.viewers > 0

    def _tell(self, what: str, **more: Any) -> None:
        more.pop("id", None)
        self._hub.tell("session", self.id, what, **{"state": self._state, **more})

    def _check_open(self) -> None:
        """Raises: Refusal: it is over, or about to be."""
        if self._stop.is_set():
            raise Refusal("not found", f"session {self.id}: is over{f': {self.error}' if self.error else ''}")

    # What it says

    async def push(self, samples: NDArray[np.float32], rate: int) -> None:
        """As `Speaking.push`."""
        await self._speaking.push(samples, rate)

    def feed(self, format: str) -> Feed:
        """As `Speaking.feed`."""
        self._check_open()
        return self._speaking.feed(format)

    async def say(self, text: str, voice: str | None = None) -> None:
        """Speak a text after what is being said. Returns when all of it is sound that waits to be heard, or was
        interrupted.

        Raises: Refusal: no text can be spoken here, too many wait, this one cannot be, or the session is over.
        """
        self._check_open()
        if self._voice is None:
            raise Refusal("unavailable", "no text can be spoken here; install espeak-ng, or set voice.url")
        await self._speaking.say(self._voice, text, voice)

    def utterance_ended(self) -> None:
        """What was said so far is whole: nothing of it need wait for more."""
        self._speaking.utterance_ended()

    def interrupt(self) -> dict[str, float]:
        """Be silent at once: forget what is not heard yet, and all that was to be said.

        Returns: played_s, seconds heard since the voice began; dropped_s, seconds that never will be.
        """
        self._speaking.forget()
        if self._live is not None:
            told = self._live.interrupt()
        else:
            told = Interruption(0.0, self._speaking.source.drop() / LISTENER_RATE)
        figures = {"played_s": round(told.played_s, 3), "dropped_s": round(told.dropped_s, 3)}
        if not self._stop.is_set():
            self._tell("interrupted", **figures)
        return figures

    # Who it is

    async def set(self, image: Source | None, prompt: str | None) -> None:
        """Another picture, another prompt, or both, from the next block on; all else stays as it is.

        The hub is told "changed" once the model has made a block of it, and "not changed" where it could not.
        Raises: Refusal: not on air yet, changing already, or what is wrong with the picture. AvatardError: the model
        refuses it. The session goes on as it was, then.
        """
        self._check_open()
        if self._state != "on air" or self._live is None:
            raise Refusal("conflict", f"session {self.id}: is opening; try again when it is on air", 2.0)
        if self._changing:
            raise Refusal("conflict", f"session {self.id}: is being changed already; try again then", 1.0)
        self._changing = True
        try:
            reference = self._live.reference
            if image is not None:
                height, width, _ = reference.image.shape
                picture = await _read(await self._inputs.fetch(image, "image"), self._settings)
                reference = await asyncio.to_thread(_covering, replace(reference, image=picture), width, height)
            if prompt is not None:
                reference = replace(reference, prompt=prompt)
            self._check_open()
            await or_stop(self._stop, self._live.set(reference))
        except Stopped:
            self._check_open()
        finally:
            self._changing = False

    # Where it goes

    def view(self) -> AsyncIterator[bytes]:
        """Watch: the beginning of a fragmented MP4, then its fragments from a keyframe on, until the session ends.

        Who is too slow misses fragments, and goes on at one with a keyframe. Raises: Refusal: full, or over.
        """
        self._check_open()
        limit = self._settings.sessions.viewers
        if self._view.viewers >= limit:
            raise Refusal("full", f"session {self.id}: {_count(limit, 'viewer')}, which is the limit", 5.0)
        return self._view.view()

    @property
    def view_type(self) -> str:
        """The media type of `view`. Before it is on air: one that it will not go beyond."""
        return self._view.type

    @property
    def hls_folder(self) -> Path | None:
        """Where the files of its HLS output are."""
        for output in reversed(self._outputs.values()):
            if output.path is not None and output.path.suffix == ".m3u8":
                return output.path.parent
        return None

    def sends_to(self, target: str) -> bool:
        """Whether it has this output. target: as `Inputs.check_target` gives it."""
        return any(output.target == target for output in self._outputs.values())

    async def add_output(self, target: str) -> str:
        """Send it to one more place: as after `--to`, or hls:NAME for a playlist in a folder of its own.

        Returns: what it is called from now on, without secrets. Raises: Refusal.
        """
        self._check_open()
        playlist = target.removeprefix("hls:") if target.startswith("hls:") else None
        if playlist is not None:
            if not re.fullmatch(ID, playlist):
                raise Refusal("invalid", "hls: give it a name of letters and digits, such as hls:main")
            target = f"live/{self.id}/{playlist}/index.m3u8"
        checked = await self._inputs.check_target(target)
        if (path := _path(checked)) is not None:
            with contextlib.suppress(OSError):  # the output will say it
                await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        self._check_open()
        if len(self._outputs) >= OUTPUTS:
            raise Refusal("full", f"session {self.id}: has {OUTPUTS} outputs, which is the limit; remove one")
        if (other := self.id if self.sends_to(checked) else self._who_sends_to(checked)) is not None:
            raise Refusal("conflict", f"{redacted(target)}: session {other} is sent there already")
        name = self._name(target)
        try:
            output = _Output(name, checked, self._lane(checked, playlist is not None), playlist is not None)
        except AvatardError as error:
            raise Refusal("invalid", str(error)) from error
        output.lane.name = name
        self._outputs[name] = output
        if self._state == "on air":
            assert self._live is not None
            self._live.add_output(output.lane)
        if self._task is not None:
            self._tell("output", **self._output_status(output))
        return name

    async def remove_output(self, name: str) -> None:
        """Send it there no more, and finish what was written. Raises: Refusal: there is no output of that name."""
        self._check_open()
        if name not in self._outputs:
            raise Refusal("not found", f"session {self.id}: has no output {name}; its status lists them")
        output = self._outputs.pop(name)
        # One that was added just now begins first: what is closed before it begins cannot be begun.
        await asyncio.sleep(0)
        if self._live is not None:
            with contextlib.suppress(KeyError):  # it was not on air yet
                self._live.remove_output(name)
        output.lane.close(complete=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINISH_S):
                await output.lane.wait_closed()
        await output.clear()
        self._tell("output", **self._output_status(output))

    def _name(self, target: str) -> str:
        """Of an output, unlike that of any other."""
        scheme, separator, rest = target.partition("://")
        shown = rest if separator and scheme == "file" else redacted(target)
        names = (shown if number == 1 else f"{shown} ({number})" for number in range(1, OUTPUTS + 2))
        return next(name for name in names if name not in self._outputs)

    def _lane_of_view(self) -> Lane:
        return Lane(lambda: self._view, policy=LanePolicy.LIVE, want_keyframe=self._want_keyframe, clock=self._clock)

    def _lane(self, target: str, overwrite: bool) -> Lane:
        live = open_sink(target, overwrite).live
        return Lane(
            # The address is judged again at each connection, and the connection made to that very one.
            lambda: open_sink(target, overwrite, self._inputs.target_addresses),
            policy=LanePolicy.LIVE if live else LanePolicy.FILE_IN_LIVE,
            want_keyframe=self._want_keyframe,
            clock=self._clock,
        )

    def _output_status(self, output: _Output) -> dict[str, Any]:
        status: LaneStatus = output.lane.status
        error = status.last_error
        if error is not None and output.path is not None:
            # Where the folder of results lies is nobody's business.
            error = error.replace(f"{output.path.parent}/", "")
        elif error is not None:
            error = blanked(error, output.target)
        return {key: _plain(value) for key, value in vars(status).items()} | {"last_error": error}

    def _tell_outputs(self) -> None:
        for output in self._outputs.values():
            status = self._output_status(output)
            now = status["state"], status["last_error"]
            if now != output.told:
                output.told = now
                self._tell("output", **status)


def _delete_playlist(path: Path) -> None:
    """It, its segments, and its folder where nothing else is in there."""
    with contextlib.suppress(OSError):
        for file in [path, *path.parent.glob(f"{path.stem}-*")]:
            file.unlink(missing_ok=True)
        path.parent.rmdir()
        path.parent.parent.rmdir()


def _path(target: str) -> Path | None:
    """Of a file or a playlist; None for an address."""
    return None if "://" in target else Path(re.sub(r"^(segment:[^:/]*:|event:)", "", target))


async def _read(path: Path, settings: Settings) -> NDArray[np.uint8]:
    try:
        return await asyncio.to_thread(lambda: isolated.picture(path.expanduser(), settings.limits))
    except AvatardError as error:
        raise Refusal("invalid", str(error)) from error


def _covering(reference: Reference, width: int, height: int) -> Reference:
    """Its picture in the model's size."""
    return replace(reference, image=cover(reference.image, width, height))


def _plain(value: Any) -> Any:
    """As JSON has it, which knows nothing that is not a number."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _ending() -> Refusal:
    return Refusal("unavailable", "the daemon is ending; no session is opened any more")
