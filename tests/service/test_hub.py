import asyncio

from service.hub import Hub


async def test_a_listener_hears_what_is_told_from_then_on():
    hub = Hub(clock=lambda: 7.0)
    hub.tell("job", "a", "queued")
    with hub.listen() as news:
        hub.tell("job", "b", "progress", frames=12)
        told = await anext(news)
    assert (told.kind, told.id, told.what, told.body, told.at, told.missed) == (
        "job",
        "b",
        "progress",
        {"frames": 12},
        7.0,
        0,
    )


async def test_a_slow_listener_loses_the_oldest_and_is_told_how_much():
    hub = Hub()
    with hub.listen(limit=3) as slow, hub.listen() as fast:
        for number in range(10):
            hub.tell("session", str(number), "idle")
        first = await anext(slow)
        assert (first.id, first.missed) == ("7", 7)
        assert (await anext(slow)).missed == 0
        assert [(await anext(fast)).id for _ in range(10)] == [str(number) for number in range(10)]


async def test_who_left_is_told_no_more_and_a_wait_ends_with_the_next_news():
    hub = Hub()
    with hub.listen() as news:
        waiting = asyncio.create_task(anext(news))
        await asyncio.sleep(0)
        assert not waiting.done()
        hub.tell("engine", "", "ready")
        assert (await waiting).what == "ready"
    hub.tell("engine", "", "ended")
    assert not news._waiting
