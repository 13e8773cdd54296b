"""What happens in the daemon, told to whoever listens."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["job", "session", "engine", "daemon"]


@dataclass(frozen=True)
class News:
    """One thing that happened.

    at: seconds since 1970; missed: so many before it were forgotten, since this listener was too slow.
    """

    kind: Kind
    id: str
    what: str
    body: Mapping[str, Any] = field(default_factory=dict)
    at: float = 0.0
    missed: int = 0


class Hub:
    """Telling never waits: a listener that is too slow loses what is oldest, and is told how much."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._listeners: set[_Listener] = set()

    def tell(self, kind: Kind, id: str, what: str, **body: Any) -> None:
        """From the event loop's thread."""
        news = News(kind, id, what, body, self._clock())
        for listener in self._listeners:
            listener.put(news)

    @contextlib.contextmanager
    def listen(self, limit: int = 256) -> Iterator[AsyncIterator[News]]:
        """What is told from now on, for one reader; no more than `limit` wait for it."""
        listener = _Listener(limit)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)


class _Listener:
    def __init__(self, limit: int) -> None:
        self._waiting: deque[News] = deque()
        self._limit = limit
        self._missed = 0
        self._news = asyncio.Event()

    def put(self, news: News) -> None:
        if len(self._waiting) == self._limit:
            self._waiting.popleft()
            self._missed += 1
        self._waiting.append(news)
        self._news.set()

    def __aiter__(self) -> _Listener:
        return self

    async def __anext__(self) -> News:
        while not self._waiting:
            self._news.clear()
            await self._news.wait()
        news, missed = self._waiting.popleft(), self._missed
        self._missed = 0
        return News(news.kind, news.id, news.what, news.body, news.at, missed) if missed else news
