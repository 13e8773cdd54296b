"""What a live session says: sound from any number of senders, and texts, one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from audio.chunk import AudioChunk
from audio.decode import LiveResampler, PcmDecoder, PcmFormat
from audio.errors import AvatardError
from audio.live import LISTENER_RATE
from audio.opus import OpusDecoder
from audio.source import PushSource, SourceClosed
from service.commands import Refusal

if TYPE_CHECKING:
    from service.voice import Voice

Samples = NDArray[np.float32]
Bytes = bytes

TEXTS = 32
"""Texts of one session that may wait to be spoken."""

PIECE_S = 0.5
"""Sound that is resampled at once: about a millisecond of work."""

LATER = 64
"""Ends of utterances and pauses that may wait for their turn; more of them would say nothing new."""

QUIET_S = 0.2
"""After so long without sound from a sender, what its resampler has kept of it is given."""


class Speaking:
    """Brings sound into one PushSource, in the order it was asked to.

    Who brings sound has the turn: a piece of sound for as long as it has to wait for room, a text until all of it was
    spoken into the source. Who comes first is first.

    name: of the session, for errors. source: mono at 48 kHz. texts: how many are being spoken or wait for it.
    """

    def __init__(self, name: str, ahead_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock = name, clock
        self.source = PushSource(LISTENER_RATE, ahead_s)
        self.texts = 0
        self.used_at = clock()
        """When somebody last brought something."""
        self._turn = asyncio.Lock()
        self._bringing: set[asyncio.Task[None]] = set()
        """All that have the turn or wait for it."""
        self._later: set[asyncio.Task[None]] = set()
        self._feeds: weakref.WeakSet[Feed] = weakref.WeakSet()
        self._direct: tuple[int, Feed] | None = None
        self._over = False

    @property
    def busy(self) -> bool:
        """Something waits to be said."""
        return bool(self._bringing) or self.source.waiting_s > 0

    def feed(self, format: str) -> Feed:
        """Takes bytes of sound in a format: encoding:rate:channels, such as s16le:16000:1, or opus:48000:1.

        Raises: Refusal: there is no such format.
        """
        try:
            found = Feed(self, format)
        except AvatardError as error:
            raise Refusal("invalid", str(error)) from error
        self._feeds.add(found)
        return found

    async def push(self, samples: Samples, rate: int) -> None:
        """Say sound: float32 [n] mono, any n, at that rate in Hz; waits while too much waits to be said.

        What is not a number is silence; what is beyond full scale is at full scale. Interrupted meanwhile, the rest is
        forgotten. Raises: Refusal: not mono, a rate that is none, or the session is over.
        """
        if samples.ndim != 1:
            raise Refusal("invalid", f"sound: mono samples [n], not {list(samples.shape)}")
        if self._direct is None or self._direct[0] != rate:
            before, self._direct = self._direct, (rate, self.feed(f"f32le:{rate}:1"))
            if before is not None:
                await self.in_turn(partial(self.bring, before[1].take_rest()))
        await self._direct[1].bytes(np.ascontiguousarray(samples, "<f4").tobytes())

    async def say(self, speaker: Voice, text: str, voice: str | None) -> None:
        """Speak a text. Returns when all of it is sound that waits to be heard, or was interrupted.

        Raises: Refusal: too many texts wait, the speaker cannot speak this one, or the session is over.
        """
        if self.texts >= TEXTS:
            raise Refusal("full", f"session {self._name}: {TEXTS} texts wait to be spoken; interrupt it or wait", 2.0)
        self.texts += 1
        try:
            await self.in_turn(partial(self._speak, speaker, text, voice))
        finally:
            self.texts -= 1

    def utterance_ended(self) -> None:
        """What was said so far is whole: nothing of it need wait for more."""
        self.bring_later([feed.take_rest() for feed in self._feeds], whole=True)

    def forget(self) -> None:
        """What has the turn, or waits for it, will not be said. What is in the source already is not touched."""
        for task in self._bringing:
            task.cancel()
        for feed in self._feeds:
            feed.take_rest()

    def close(self) -> None:
        """Nothing more is said, and whoever waits is told."""
        self._over = True
        for task in [*self._bringing, *self._later]:
            task.cancel()
        self.source.abandon()

    async def in_turn(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Bring sound when all that came before has been brought. False: it was interrupted.

        Raises: Refusal: the session is over. Whatever `work` raises.
        """
        self.check_open()
        self.used_at = self._clock()
        task = asyncio.create_task(self._with_turn(work), name=f"sound for {self._name}")
        self._bringing.add(task)
        try:
            await asyncio.wait({task})
        finally:
            self._bringing.discard(task)
            task.cancel()
        if task.cancelled():
            self.check_open()
            return False
        try:
            task.result()
        except SourceClosed:
            raise self._is_over() from None
        return True

    async def bring(self, samples: Samples) -> None:
        """Sound at 48 kHz, from who has the turn."""
        if samples.size:
            await self.source.push(AudioChunk(samples, LISTENER_RATE))

    def bring_later(self, pieces: list[Samples], whole: bool = False) -> None:
        """Sound at 48 kHz in its turn, while nobody waits for it; whole: an utterance ends with it."""

        async def bring() -> None:
            for samples in pieces:
                await self.bring(samples)
            if whole:
                self.source.end_utterance()

        async def carry_out() -> None:
            with contextlib.suppress(Refusal):
                await self.in_turn(bring)

        if not self._over and len(self._later) < LATER:
            task = asyncio.create_task(carry_out(), name=f"last sound for {self._name}")
            self._later.add(task)
            task.add_done_callback(self._later.discard)

    async def _with_turn(self, work: Callable[[], Awaitable[None]]) -> None:
        async with self._turn:
            await work()

    async def _speak(self, speaker: Voice, text: str, voice: str | None) -> None:
        resampler: LiveResampler | None = None
        try:
            async with contextlib.aclosing(speaker.speak(text, voice)) as chunks:
                async for chunk in chunks:
                    if resampler is None:
                        resampler = LiveResampler(chunk.sample_rate, LISTENER_RATE)
                    await self.bring(resampler.push(chunk.samples[:, None])[:, 0])
        except asyncio.CancelledError:
            resampler = None
            raise
        finally:
            # Also where it broke off by itself: what there is of it is heard to its end.
            if resampler is not None:
                await self.bring(resampler.flush()[:, 0])
            self.source.end_utterance()

    def check_open(self) -> None:
        """Raises: Refusal: the session is over."""
        if self._over:
            raise self._is_over()

    def _is_over(self) -> Refusal:
        return Refusal("not found", f"session {self._name}: is over")


class Feed:
    """The sound of one sender in one format, as it comes; made by `Speaking.feed`."""

    def __init__(self, speaking: Speaking, format: str) -> None:
        """Raises: AudioError: there is no such format."""
        self._speaking = speaking
        self._decoder: PcmDecoder | OpusDecoder
        if format.strip().lower().partition(":")[0] == "opus":
            self._decoder, self._piece = OpusDecoder(LISTENER_RATE), 0
        else:
            pcm = PcmFormat.parse(format)
            self._decoder = PcmDecoder(pcm, LISTENER_RATE, live=True)
            self._piece = max(1, round(pcm.sample_rate * PIECE_S)) * pcm.bytes_per_frame
        self._timer: asyncio.TimerHandle | None = None

    async def bytes(self, data: Bytes) -> None:
        """Say these bytes, cut anywhere; of Opus one packet. Waits while too much waits to be said.

        Interrupted meanwhile, the rest is forgotten. Raises: Refusal: not Opus, or the session is over.
        """
        self._speaking.check_open()
        self._wake()
        going_on = True
        piece = self._piece or max(1, len(data))
        for begin in range(0, len(data), piece):
            # Also what is forgotten: its last sample may end in the next bytes.
            samples = self._decoded(data[begin : begin + piece])
            if going_on and samples.size:
                going_on = await self._speaking.in_turn(partial(self._speaking.bring, samples))
        if not going_on:
            self.take_rest()
        self._timer = asyncio.get_running_loop().call_later(QUIET_S, self._pause)

    def take_rest(self) -> Samples:
        """What the resampler holds back, as if silence followed, for the caller to say or forget."""
        self._wake()
        return self._decoder.pause().samples

    def _decoded(self, data: Bytes) -> Samples:
        try:
            return self._decoder.feed(data).samples
        except AvatardError as error:
            raise Refusal("invalid", str(error)) from error

    def _pause(self) -> None:
        if (rest := self.take_rest()).size:
            self._speaking.bring_later([rest])

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
