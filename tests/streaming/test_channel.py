"""Channel: every way a wait can end."""

from __future__ import annotations

import asyncio

import pytest

from streaming.channel import Channel, ChannelAbandoned, ChannelClosed


async def waiting(coroutine) -> asyncio.Task:
    """A task that has run until its first wait."""
    task = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_get_takes_the_item_that_is_there():
    channel = Channel[int](2)
    await channel.put(1)
    assert await channel.get() == 1


async def test_get_waits_for_the_item_that_comes_later():
    channel = Channel[int](2)
    getting = await waiting(channel.get())
    await channel.put(7)
    assert await getting == 7


async def test_get_ends_when_the_channel_is_closed_meanwhile():
    channel = Channel[int](2)
    getting = await waiting(channel.get())
    channel.close()
    with pytest.raises(ChannelClosed):
        await getting


async def test_get_cancelled_while_waiting_takes_nothing():
    channel = Channel[int](2)
    getting = await waiting(channel.get())
    getting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await getting
    await channel.put(3)
    assert await channel.get() == 3


async def test_get_ends_when_the_channel_is_abandoned_meanwhile():
    channel = Channel[int](2)
    getting = await waiting(channel.get())
    channel.abandon()
    with pytest.raises(ChannelAbandoned):
        await getting


async def test_put_waits_while_the_channel_is_full():
    channel = Channel[int](1)
    await channel.put(1)
    putting = await waiting(channel.put(2))
    assert await channel.get() == 1
    await putting
    assert await channel.get() == 2


async def test_put_ends_when_the_channel_is_abandoned_meanwhile():
    channel = Channel[int](1)
    await channel.put(1)
    putting = await waiting(channel.put(2))
    channel.abandon()
    with pytest.raises(ChannelAbandoned):
        await putting


async def test_put_ends_when_the_channel_is_closed_meanwhile():
    channel = Channel[int](1)
    await channel.put(1)
    putting = await waiting(channel.put(2))
    channel.close()
    with pytest.raises(ChannelClosed):
        await putting
    assert await channel.get() == 1


async def test_put_cancelled_while_waiting_adds_nothing():
    channel = Channel[int](1)
    await channel.put(1)
    putting = await waiting(channel.put(2))
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    channel.close()
    assert [item async for item in channel] == [1]


async def test_items_put_before_an_error_are_delivered_first():
    channel = Channel[int](3)
    await channel.put(1)
    await channel.put(2)
    channel.close(RuntimeError("the source broke"))
    got = []
    with pytest.raises(RuntimeError, match="the source broke"):  # noqa: PT012
        async for item in channel:
            got.append(item)
    assert got == [1, 2]


async def test_the_error_is_raised_on_every_later_get():
    channel = Channel[int](1)
    channel.close(RuntimeError("broken"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            await channel.get()


async def test_only_the_first_close_counts():
    channel = Channel[int](1)
    channel.close()
    channel.close(RuntimeError("late"))
    with pytest.raises(ChannelClosed):
        await channel.get()


async def test_put_newest_never_waits_and_counts_what_it_drops():
    channel = Channel[int](2)
    assert [channel.put_newest(i) for i in range(4)] == [0, 0, 1, 1]
    channel.close()
    assert [item async for item in channel] == [2, 3]


async def test_put_after_close_and_after_abandon_is_refused():
    closed, abandoned = Channel[int](1), Channel[int](1)
    closed.close()
    abandoned.abandon()
    with pytest.raises(ChannelClosed):
        await closed.put(1)
    with pytest.raises(ChannelAbandoned):
        await abandoned.put(1)
    with pytest.raises(ChannelAbandoned):
        abandoned.put_newest(1)


async def test_two_waiting_consumers_each_get_one_item():
    channel = Channel[int](2)
    first, second = await waiting(channel.get()), await waiting(channel.get())
    await channel.put(1)
    await channel.put(2)
    assert sorted([await first, await second]) == [1, 2]


def test_a_channel_without_room_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Channel[int](0)
