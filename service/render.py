"""One finished file from a picture and a sound, made in pieces, so that it survives whatever ends its process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from service.run import Stopped
from streaming.sink import SinkError

if TYPE_CHECKING:
    from service.config import Settings
    from streaming.engine import Engine

__all__ = ["DiskFull", "RenderRequest", "RenderResult", "Stopped", "discard", "render"]

Turn = Callable[[float], AbstractAsyncContextManager[None]]
"""Leave to use the model for about so many seconds."""


class DiskFull(SinkError):
    """There was no room for what was made; what had been saved before is there, and the next call goes on from it."""


@dataclass(frozen=True)
class RenderRequest:
    """What to make.

    target: the finished file; folder: of the work in progress, of this render alone; prompt, seed: of the session;
    title: in the file's metadata; overwrite: whether a file that is there already is replaced.
    """

    image: Path
    audio: Path
    target: Path
    folder: Path
    prompt: str = ""
    seed: int = 0
    title: str = ""
    overwrite: bool = True


@dataclass(frozen=True)
class RenderResult:
    """What was made: frames, seconds of video, pixels, frames per second of video, bytes.

    resumed_from: frames that were there from an earlier call; model_s, encode_s: seconds that this call spent
    generating, and encoding the picture.
    """

    path: Path
    frames: int
    seconds: float
    width: int
    height: int
    fps: int
    sha256: str
    bytes: int
    warnings: tuple[str, ...]
    resumed_from: int
    model_s: float
    encode_s: float


@contextlib.asynccontextmanager
async def at_once(expected_s: float) -> AsyncIterator[None]:
    """The model is ours alone."""
    yield


async def render(
    request: RenderRequest,
    engine: Engine,
    settings: Settings,
    *,
    turn: Turn = at_once,
    on_progress: Callable[[int, int | None], None] = lambda frames, total: None,
    stop: asyncio.Event | None = None,
    segment_s: float = 12.0,
    clock: Callable[[], float] = time.monotonic,
) -> RenderResult:
    """Make the file, or go on where an earlier call for the same one was ended, be it by kill -9.

    The file is the same, bit for bit, as if that had not been, as far as the model resumes exactly. While it is made,
    `folder` holds what a later call goes on from; it is made when there is something to keep, so never for a sound
    shorter than segment_s. After the end it holds a record of the result at most, from which a second call answers at
    once: the caller removes it (`discard`) when the result is noted elsewhere.

    Args:
        turn: entered around each use of the model, with the seconds that this will take, as far as is known.
        on_progress: frames that are encoded, and of how many (None: the sound does not say how long it is).
        stop: when set, the render ends at once, and the folder stays; but not when all frames are there.
        segment_s: of video, from one point to resume from to the next.
    Raises: AvatardError: a picture, sound, target or model that cannot be used; DiskFull; Stopped; a bug as it comes.
        A render whose task is cancelled can be gone on with as well.
    """
    raise NotImplementedError


def discard(request: RenderRequest) -> None:
    """Remove what a render left behind that is not to be gone on with, or whose result is noted. Blocking."""
    raise NotImplementedError
