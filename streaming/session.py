"""One session from sound to packets: cut -> generate -> deliver -> one lane for each sink, side by side."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from av.packet import Packet
from numpy.typing import NDArray

from audio.blocks import BlockCutter
from audio.chunk import AudioBlock, AudioChunk
from audio.errors import AvatardError
from avatar.model import FrameBlock, StreamSpec
from streaming.channel import Channel, ChannelAbandoned, ChannelClosed
from streaming.encoder import SOUND_RATE, Encoder, EncoderSettings
from streaming.lane import Lane

log = logging.getLogger(__name__)

BLOCKS_AHEAD = 2
"""Blocks of sound cut but not generated yet."""


class SpeechModel(Protocol):
    """What generates: an `EngineSession`, or anything else with its two calls."""

    spec: StreamSpec

    async def step(self, audio: AudioBlock) -> list[FrameBlock]: ...

    async def finish(self) -> list[FrameBlock]: ...


class Original(Protocol):
    """The sound as the listener gets it, read along with the frames (`audio.decode.SoundReader`).

    channels: 1 or 2; its samples are at 48 kHz and cover the time of the chunks that the model hears.
    """

    channels: int

    def read(self, samples: int) -> NDArray[np.float32]:
        """The next samples, float32 [n, channels], fewer at the end only. Blocking."""
        ...


@dataclass
class Progress:
    """How far a session is: frames delivered so far; first_frame_at: on the session's clock, in seconds."""

    frames: int = 0
    first_frame_at: float | None = None


@dataclass
class SessionResult(Progress):
    """How a session ended: `stopped` early or by itself; encode_s: seconds spent in the encoder's thread."""

    stopped: bool = False
    encode_s: float = 0.0


async def run_session(
    chunks: AsyncIterable[AudioChunk],
    original: Original,
    model: SpeechModel,
    lanes: Sequence[Lane],
    *,
    encoder_settings: EncoderSettings | None = None,
    metadata: Mapping[str, str] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: asyncio.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> SessionResult:
    """Speak `chunks` to their end into all outputs, which are open already, and close them.

    Args:
        chunks: mono sound at the model's sample rate.
        original: the same sound for the listener, read in the encoder's thread.
        stop: when set, the session ends early: what is made so far is written, and the outputs are told that it is
            not complete.
        clock: monotonic, in seconds.

    Generation of a block overlaps the encoding of the one before. Every queue is bounded, so memory does not grow with
    the length. An error travels behind the blocks made before it, so they still reach the file.

    Raises: AvatardError or a bug's exception: what ended the sound, the model or the encoder, or all of the outputs.
    An output that fails while others go on is a warning.
    """
    session = _Session(
        chunks, original, model, lanes, encoder_settings or EncoderSettings(), metadata or {}, on_progress, clock
    )
    return await session.run(stop or asyncio.Event())


class _Session:
    def __init__(
        self,
        chunks: AsyncIterable[AudioChunk],
        original: Original,
        model: SpeechModel,
        lanes: Sequence[Lane],
        encoder_settings: EncoderSettings,
        metadata: Mapping[str, str],
        on_progress: Callable[[Progress], None],
        clock: Callable[[], float],
    ) -> None:
        self._chunks, self._original, self._model, self._metadata = chunks, original, model, metadata
        self._on_progress, self._clock = on_progress, clock
        spec = model.spec
        self._encoder = Encoder(spec.width, spec.height, spec.fps, original.channels, encoder_settings)
        self._samples_per_frame = SOUND_RATE // spec.fps
        self._blocks = Channel[AudioBlock](BLOCKS_AHEAD)
        self._rendered = Channel[FrameBlock](1)
        self._lanes = list(lanes)
        self._failures: list[Exception] = []
        self._result = SessionResult()
        self._error: Exception | None = None
        self._delivered = False

    async def run(self, stop: asyncio.Event) -> SessionResult:
        # One thread: what a cancelled task leaves running there still ends before the encoder is closed.
        with ThreadPoolExecutor(1, thread_name_prefix="encoder") as self._encoder_thread:
            try:
                await self._run_tasks(stop)
            finally:
                for lane in self._lanes:
                    lane.close(complete=False)
                # It may be the second failure of an output, which says no more than the first.
                await asyncio.gather(*(lane.wait_closed() for lane in self._lanes), return_exceptions=True)
                self._encoder_thread.submit(self._encoder.close)
        self._raise_errors()
        return self._result

    async def _run_tasks(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            makers = [
                tasks.create_task(self._cut(), name="cut"),
                tasks.create_task(self._generate(), name="generate"),
            ]
            watcher = tasks.create_task(self._watch(stop, makers), name="stop")
            lanes = [tasks.create_task(self._write(lane), name=f"lane {lane.name}") for lane in self._lanes]
            await tasks.create_task(self._deliver(), name="deliver")
            for task in makers:
                task.cancel()  # after a failure a source may still be waited for, one that never speaks again
            await asyncio.gather(*lanes)
            watcher.cancel()

    async def _watch(self, stop: asyncio.Event, makers: Sequence[asyncio.Task[None]]) -> None:
        await stop.wait()
        if self._delivered:
            return  # all is made; the file is being finished, which is sooner done than undone
        self._result.stopped = True
        self._rendered.close()
        for task in makers:
            task.cancel()

    async def _cut(self) -> None:
        """Sound in chunks of any length -> blocks."""
        spec = self._model.spec
        cutter = BlockCutter(spec.samples_per_block, spec.lookahead_samples)
        try:
            async for chunk in self._chunks:
                for block in cutter.push(chunk):
                    await self._blocks.put(block)
            for block in cutter.flush():
                await self._blocks.put(block)
        except ChannelAbandoned:
            pass
        except Exception as error:
            self._blocks.close(error)
        self._blocks.close()

    async def _generate(self) -> None:
        """Blocks of sound -> blocks of frames."""
        try:
            async for block in self._blocks:
                for rendered in await self._model.step(block):
                    await self._rendered.put(rendered)
            for rendered in await self._model.finish():
                await self._rendered.put(rendered)
        except (ChannelAbandoned, ChannelClosed):
            pass
        except Exception as error:
            self._rendered.close(error)
        self._blocks.abandon()
        self._rendered.close()

    async def _deliver(self) -> None:
        """Blocks of frames -> packets, for every lane."""
        try:
            async for block in self._rendered:
                assert block.start == self._result.frames, f"block at {block.start}, expected {self._result.frames}"
                await self._hand_out(await self._in_encoder(self._encode, block))
                self._result.frames += len(block.frames)
                self._result.first_frame_at = self._result.first_frame_at or self._clock()
                self._on_progress(self._result)
        except ChannelAbandoned:
            pass
        except Exception as error:
            self._error = error
        # Whatever happened: what the encoder still holds belongs to frames that were made.
        self._rendered.abandon()
        self._delivered = True
        if self._result.frames:
            try:
                await self._hand_out(await self._in_encoder(self._encoder.flush))
            except ChannelAbandoned:
                pass
            except Exception as error:
                self._error = self._error or error
        complete = self._error is None and not self._result.stopped and self._result.frames > 0
        for lane in self._lanes:
            lane.close(complete)

    def _encode(self, block: FrameBlock) -> list[Packet]:
        began = self._clock()
        sound = self._original.read(len(block.frames) * self._samples_per_frame)
        packets = self._encoder.encode(block, sound)
        self._result.encode_s += self._clock() - began
        return packets

    async def _hand_out(self, packets: list[Packet]) -> None:
        """Give packets to every lane that still runs. Raises: ChannelAbandoned when none does."""
        for lane in self._lanes:
            await lane.put(packets)
        if all(lane.status.failed for lane in self._lanes):
            raise ChannelAbandoned

    async def _write(self, lane: Lane) -> None:
        """One output, in its own time. Its failure ends this lane alone."""
        try:
            await lane.run(self._encoder.streams, self._metadata)
        except Exception as error:
            self._failures.append(error)

    def _raise_errors(self) -> None:
        failed = self._failures
        if self._error is not None:
            raise self._error
        if failed and len(failed) == len(self._lanes):
            raise failed[0]
        for error in failed:
            log.warning("%s; %d of %d outputs are complete", error, len(self._lanes) - len(failed), len(self._lanes))
        if not self._result.frames and not self._result.stopped:
            raise AvatardError("the sound is empty: there is nothing to speak")

    async def _in_encoder(self, work: Callable[..., list[Packet]], *arguments: object) -> list[Packet]:
        return await asyncio.get_running_loop().run_in_executor(self._encoder_thread, work, *arguments)
