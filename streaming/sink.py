"""What an output is: one file, or one connection."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from av.packet import Packet
from av.stream import Stream

from audio.errors import AvatardError


class SinkError(AvatardError):
    """An output cannot be opened, written or finished: one line that names it and says what is left."""


class TargetAbsent(SinkError):
    """Nobody answers at the other end: it may come up at any moment, and to look costs little."""


class TargetRefused(SinkError):
    """The other end answers, and does not take the stream: it will hardly do so a second later."""


class Sink(Protocol):
    """One output: open, start, write ..., close. Nothing here blocks the event loop.

    A file is waited for. A live sink (`live`) never is: it is one connection, and the next one is another sink.
    """

    name: str
    live: ClassVar[bool]

    @property
    def output(self) -> Path | None:
        """Where something playable is by now: the finished file, or the part of it; None when there is nothing."""
        ...

    @property
    def pending_s(self) -> float:
        """Seconds of what was written that have not left this machine yet; 0 for a file."""
        ...

    @property
    def failed(self) -> bool:
        """Whether it has ended by itself; the next write will say why. Never true of a file."""
        ...

    async def open(self) -> None:
        """Try the target, before any model works. Raises: SinkError."""
        ...

    async def start(self, streams: Sequence[Stream], metadata: Mapping[str, str]) -> None:
        """Say what the packets will be and what the stream says of itself. Raises: SinkError."""
        ...

    async def write(self, packets: Sequence[Packet]) -> None:
        """Take packets of all streams, in decoding order; they stay as they are. Raises: SinkError.

        The first picture is a keyframe, and it is at time 0 of what is written.
        """
        ...

    async def close(self, complete: bool) -> None:
        """End the output; `complete` says that nothing is missing. The second call does nothing. Raises: SinkError."""
        ...


def reason(error: BaseException) -> str:
    """What went wrong, in the system's words where it is an error of the system."""
    number = getattr(error, "errno", None)
    # FFmpeg's own errors have numbers far above those of the system.
    return os.strerror(number).lower() if isinstance(number, int) and 0 < number < 1000 else str(error)
