"""A bounded queue between two tasks that can end: by its producer, by its consumer, or by an error."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ChannelClosed(Exception):
    """The producer has closed the channel: there is nothing more to get, or nothing more may be put."""


class ChannelAbandoned(Exception):
    """The consumer has left: nobody reads any more, so the producer can stop."""


class Channel(Generic[T]):
    """At most `capacity` items on their way from producer to consumer, tasks of one event loop.

    An error travels in band: after `close(error)` the items put before are still delivered, then `get` raises it.
    Every wait ends when the other side ends. `close` and `abandon` never wait, so they are safe in a `finally`.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a channel holds at least one item, not {capacity}")
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._closed = False
        self._abandoned = False
        self._error: BaseException | None = None
        self._waiters: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: T) -> None:
        """Add one item, waiting while the channel is full.

        Raises: ChannelAbandoned, ChannelClosed: at once or during the wait; the item was not taken then.
        """
        while self._open() and len(self._items) >= self._capacity:
            await self._change()
        self._add(item)

    def put_newest(self, item: T) -> int:
        """Add one item without waiting; the oldest make room for it. Returns how many were dropped."""
        dropped = 0
        while self._open() and len(self._items) >= self._capacity:
            self._items.popleft()
            dropped += 1
        self._add(item)
        return dropped

    async def get(self) -> T:
        """Take the oldest item, waiting for one.

        Raises: ChannelClosed at the end, or the error that the producer closed with, on this and every later call.
        """
        while not self._items and not self._closed and not self._abandoned:
            await self._change()
        if self._items:
            item = self._items.popleft()
            self._wake()
            return item
        if self._abandoned:
            raise ChannelAbandoned
        if self._error is not None:
            raise self._error
        raise ChannelClosed

    async def __aiter__(self) -> AsyncIterator[T]:
        """Every item until the end; raises the error that the producer closed with."""
        while True:
            try:
                item = await self.get()
            except ChannelClosed:
                return
            yield item

    def close(self, error: BaseException | None = None) -> None:
        """The producer's end: what was put is still delivered. Only the first close counts."""
        if not self._closed:
            self._closed = True
            self._error = error
            self._wake()

    def abandon(self) -> None:
        """The consumer's end: what is queued is dropped, and whoever waits is told."""
        self._abandoned = True
        self._items.clear()
        self._wake()

    def _open(self) -> bool:
        return not self._closed and not self._abandoned

    def _add(self, item: T) -> None:
        if self._abandoned:
            raise ChannelAbandoned
        if self._closed:
            raise ChannelClosed
        self._items.append(item)
        self._wake()

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        # All of them: each looks again for itself, so a waiter that was cancelled meanwhile loses nothing for the rest.
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
