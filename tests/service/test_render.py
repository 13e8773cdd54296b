"""render(): one finished file, however often it was ended on the way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from mp4 import boxes, clicks_at, read_mp4, write_sound
from PIL import Image

from audio.errors import AvatardError
from service.config import Settings, load_settings
from service.render import DiskFull, RenderRequest, RenderResult, Stopped, discard, render, withdraw
from service.run import engine_settings
from streaming.engine import Engine
from streaming.sink import SinkError

TOY = str(Path(__file__).parent.parent / "toy_model.py") + ":load"
SEGMENT_S = 0.96
"""Two blocks, so that little sound has many segments."""


def toy(**options: Any) -> Settings:
    assignments = [f"model.options.{name}={value}" for name, value in options.items()]
    return load_settings(None, ["encoder.preset=ultrafast", *assignments], model__name=TOY)


@pytest.fixture
def request_(tmp_path: Path) -> RenderRequest:
    """Four and a half seconds of a picture that flashes when its sound clicks."""
    Image.new("RGB", (300, 400), (90, 120, 140)).save(tmp_path / "face.png")
    write_sound(tmp_path / "speech.wav", clicks_at([1.0, 3.5], 4.5), 16_000)
    (tmp_path / "out").mkdir()
    return RenderRequest(
        tmp_path / "face.png", tmp_path / "speech.wav", tmp_path / "out" / "a.mp4", tmp_path / "work", seed=5
    )


async def made(request: RenderRequest, settings: Settings | None = None, **options: Any) -> RenderResult:
    settings = settings or toy()
    async with await Engine.launch(engine_settings(settings)) as engine:
        return await render(request, engine, settings, segment_s=SEGMENT_S, **options)


async def whole(request: RenderRequest, settings: Settings | None = None) -> bytes:
    """The file as it is when nothing happens."""
    at = request.target.with_name("whole")
    undisturbed = replace(request, target=at / request.target.name, folder=at / "work")
    await made(undisturbed, settings)
    return undisturbed.target.read_bytes()


def stopping_at(frames: int) -> dict[str, Any]:
    """Options with which a render is stopped when it has that many frames."""
    stop = asyncio.Event()
    return {"stop": stop, "on_progress": lambda done, total: done >= frames and stop.set()}


# The file.


async def test_picture_and_sound_are_together_and_whole(request_):
    result = await made(request_)
    file = read_mp4(request_.target)
    assert (result.frames, result.seconds, result.width, result.height, result.fps) == (113, 4.52, 64, 64, 25)
    assert file.times == pytest.approx([i / 25 for i in range(113)])
    assert file.flashes() == pytest.approx(file.clicks(), abs=0.04)
    assert file.flashes() == [1.0, 3.48]
    assert file.sound_start == pytest.approx(0, abs=1e-6)
    assert file.sound_s == pytest.approx(4.5, abs=1024 / 48_000)
    assert boxes(request_.target).index("moov") == 1
    assert result.bytes == request_.target.stat().st_size


async def test_it_is_the_file_that_a_run_makes_but_for_more_keyframes(request_, place):
    shutil.copy(request_.audio, place.audio)
    assert place.run("--set=encoder.preset=ultrafast", to=place.folder / "a.mp4", seed=5).returncode == 0
    await made(replace(request_, image=place.image))
    ran, rendered = read_mp4(place.folder / "a.mp4"), read_mp4(request_.target)
    assert rendered.times == ran.times
    assert rendered.metadata == ran.metadata
    assert (rendered.sound_start, rendered.duration_s) == (ran.sound_start, ran.duration_s)
    assert (rendered.codecs, rendered.pix_fmt, rendered.colours) == (ran.codecs, ran.pix_fmt, ran.colours)
    np.testing.assert_array_equal(rendered.sound, ran.sound)
    assert np.abs(rendered.brightness - ran.brightness).max() < 1


async def test_each_segment_begins_with_a_keyframe_and_the_index_says_so(request_):
    await made(request_)
    with av.open(str(request_.target)) as file:
        keyframes = [float(packet.pts * packet.time_base) for packet in file.demux(video=0) if packet.is_keyframe]
    assert {0.0, 0.96, 1.92, 2.88, 3.84} <= set(keyframes)


async def test_stereo_stays_stereo(request_):
    sound = clicks_at([1.0], 2.0)
    write_sound(request_.audio, np.stack([sound, 0 * sound], 1), 16_000)
    await made(request_)
    file = read_mp4(request_.target)
    assert file.sound.shape[1] == 2
    assert np.abs(file.sound[:, 1]).max() < 0.05 < np.abs(file.sound[:, 0]).max()


async def test_the_file_says_what_it_is(request_):
    await made(replace(request_, title="Dr. No. 7"))
    metadata = read_mp4(request_.target).metadata
    assert metadata["title"] == "Dr. No. 7"
    assert metadata["comment"].startswith("AI-generated: ")


async def test_a_sound_of_one_segment_leaves_nothing_beside_its_file(request_):
    async with await Engine.launch(engine_settings(toy())) as engine:
        await render(request_, engine, toy())
    assert not request_.folder.exists()
    assert os.listdir(request_.target.parent) == ["a.mp4"]


async def test_folders_of_the_target_are_made(request_):
    target = request_.target.parent / "b" / "c" / "a.mp4"
    await made(replace(request_, target=target))
    assert target.exists()


async def test_progress_is_told_from_the_first_block_to_the_last(request_):
    seen: list[tuple[int, int | None]] = []
    await made(request_, on_progress=lambda frames, total: seen.append((frames, total)))
    assert [frames for frames, _ in seen] == [*range(12, 113, 12), 113]
    assert {total for _, total in seen} == {112}


async def test_warnings_come_with_the_result(request_):
    write_sound(request_.audio, np.zeros(16_000), 16_000)
    assert (await made(request_)).warnings == (f"{request_.audio}: all silence",)


# Ended on the way.


@pytest.mark.parametrize("delay", [0, 3])
async def test_stopped_again_and_again_it_is_the_same_file(request_, delay):
    settings = toy(delay=delay)
    resumed = []
    for frames in (12, 36, 60, 108):
        with pytest.raises(Stopped):
            await made(request_, settings, **stopping_at(frames))
        assert not request_.target.exists()
    result = await made(request_, settings, on_progress=lambda frames, total: resumed.append(frames))
    assert resumed[0] == result.resumed_from >= 60
    assert request_.target.read_bytes() == await whole(request_, settings)


class Disk:
    """Copies of a folder, each as it was before something in it was made sure of, moved or removed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, copies: Path) -> None:
        self._folder, self._copies = folder, copies
        self.copies: list[Path] = []
        for module, name in ((os, "fsync"), (os, "replace"), (os, "link"), (Path, "unlink")):
            monkeypatch.setattr(module, name, self._before(getattr(module, name)))

    def _before(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def copy_and_work(*arguments: Any, **options: Any) -> Any:
            self.copies.append(self._copies / str(len(self.copies)))
            shutil.copytree(self._folder, self.copies[-1])
            return work(*arguments, **options)

        return copy_and_work

    def put_back(self, copy: Path) -> None:
        shutil.rmtree(self._folder)
        shutil.copytree(copy, self._folder)


async def test_killed_at_any_moment_it_is_the_same_file(request_, tmp_path):
    """A kill leaves the disk as it was before some step of writing; from each of these it is gone on with."""
    request = replace(request_, folder=request_.target.parent / "work")
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch, request.target.parent, tmp_path / "copies")
        await made(request)
    finished = request.target.read_bytes()
    assert len(disk.copies) > 20
    resumed_from = []
    async with await Engine.launch(engine_settings(toy())) as engine:
        for copy in disk.copies:
            disk.put_back(copy)
            result = await render(request, engine, toy(), segment_s=SEGMENT_S)
            resumed_from.append(result.resumed_from)
            assert request.target.read_bytes() == finished
            discard(request)
            assert os.listdir(request.target.parent) == ["a.mp4"]
    # The last ones find the file finished, and their answer is that of the call that finished it.
    assert sorted(set(resumed_from)) == [0, 24, 48, 72, 96]


@pytest.mark.parametrize(
    ("segment_s", "links"), [(SEGMENT_S, True), (60.0, True), (60.0, False)], ids=["long", "short", "no links"]
)
async def test_killed_at_any_moment_it_knows_its_own_file_and_takes_no_others(request_, tmp_path, segment_s, links):
    """Without checkpoints as well; with other settings in its next life; and when it is not wanted any more."""
    write_sound(request_.audio, clicks_at([1.0], 1.5), 16_000)
    request = replace(request_, folder=request_.target.parent / "jobs" / "a" / "work", overwrite=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not links:
            monkeypatch.setattr(os, "link", no_links)
        async with await Engine.launch(engine_settings(toy())) as engine:
            with pytest.MonkeyPatch.context() as patch:
                disk = Disk(patch, request.target.parent, tmp_path / "copies")
                await render(request, engine, toy(), segment_s=segment_s)
            finished = request.target.read_bytes()
            others = load_settings(None, ["encoder.preset=ultrafast", "encoder.crf=30"], model__name=TOY)
            was_there = []
            for copy in disk.copies:
                disk.put_back(copy)
                was_there.append(request.target.exists())
                await render(request, engine, toy(), segment_s=segment_s)
                assert request.target.read_bytes() == finished
                discard(request)
                assert files_in(request.target.parent) == ["a.mp4"]

                disk.put_back(copy)
                await render(request, engine, others, segment_s=segment_s)
                assert request.target.read_bytes() != finished
                assert len(files_in(request.target.parent)) == 2  # and the record of it

                disk.put_back(copy)
                withdraw(request)
                discard(request)
                assert files_in(request.target.parent) == []

                disk.put_back(copy)
                request.target.unlink(missing_ok=True)
                request.target.write_bytes(b"mine")
                with pytest.raises(SinkError, match="exists already"):
                    await render(request, engine, toy(), segment_s=segment_s)
                withdraw(request)
                discard(request)
                assert files_in(request.target.parent) == ["a.mp4"]
                assert request.target.read_bytes() == b"mine"
    assert {False, True} == set(was_there)


def no_links(source: Any, target: Any) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


async def test_what_is_done_is_not_done_again(request_):
    first = await made(request_)
    assert [path.name for path in request_.folder.iterdir()] == ["result.json"]
    async with await Engine.launch(engine_settings(toy(fail_at=0))) as engine:
        # The identity is of the settings: an engine that would fail at its first block is never asked.
        again = await render(request_, engine, toy(), segment_s=SEGMENT_S)
    assert again == first
    discard(request_)
    assert not request_.folder.exists()
    assert request_.target.exists()


async def test_what_is_done_is_known_also_where_nothing_is_to_be_replaced(request_):
    first = await made(replace(request_, overwrite=False))
    assert await made(replace(request_, overwrite=False)) == first
    request_.target.write_bytes(b"something else")
    with pytest.raises(SinkError, match="exists already"):
        await made(replace(request_, overwrite=False))


async def test_a_result_that_was_changed_since_is_made_again(request_):
    await made(request_)
    content = request_.target.read_bytes()
    request_.target.write_bytes(b"something else")
    await made(request_)
    assert request_.target.read_bytes() == content


async def test_a_task_that_is_cancelled_can_be_gone_on_with(request_):
    reached = asyncio.Event()
    task = asyncio.ensure_future(made(request_, on_progress=lambda done, total: done > 60 and reached.set()))
    await reached.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (await made(request_)).resumed_from >= 48
    assert request_.target.read_bytes() == await whole(request_)


async def test_the_death_of_the_models_process_is_not_noticed(request_):
    settings = toy()
    async with await Engine.launch(engine_settings(settings)) as engine:
        deaths = iter([24, 72])
        next_death = next(deaths)

        def kill(frames: int, total: int | None) -> None:
            nonlocal next_death
            if frames >= next_death:
                os.kill(engine.pid, signal.SIGKILL)
                next_death = next(deaths, 10_000)

        await render(request_, engine, settings, segment_s=SEGMENT_S, on_progress=kill)
        assert engine.restarts == 2
    assert request_.target.read_bytes() == await whole(request_)


@contextlib.contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """A disk that takes so much, and then nothing."""
    left = iter(range(after))
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        yield


@pytest.mark.parametrize("after", range(0, 22, 3))
async def test_a_full_disk_is_one_line_and_loses_nothing(request_, monkeypatch, after):
    with full_disk(monkeypatch, after), pytest.raises(DiskFull, match=r"no space left on device; make room") as caught:
        await made(request_)
    assert "\n" not in str(caught.value)
    assert not request_.target.exists()
    result = await made(request_)
    assert result.resumed_from == (0 if after < 5 else pytest.approx(24 * (after // 5), abs=24))
    assert request_.target.read_bytes() == await whole(request_)


# What is not to be gone on with.


@pytest.mark.parametrize(
    "change",
    [
        lambda request: replace(request, seed=6),
        lambda request: replace(request, prompt="smile"),
        lambda request: Image.new("RGB", (300, 400), (200, 20, 20)).save(request.image),
        lambda request: write_sound(request.audio, clicks_at([2.0], 4.5), 16_000),
        lambda request: (request.folder / "checkpoint.json").write_text("{}"),
        lambda request: (request.folder / "checkpoint.json").write_text("no"),
        lambda request: os.truncate(request.folder / "video.packets", 10),
        lambda request: [os.truncate(state, 10) for state in request.folder.glob("state-*")],
    ],
    ids=["seed", "prompt", "picture", "sound", "no checkpoint", "no JSON", "lost packets", "lost state"],
)
async def test_what_is_of_another_render_is_not_gone_on_with(request_, change):
    with pytest.raises(Stopped):
        await made(request_, **stopping_at(60))
    changed = change(request_)
    request = changed if isinstance(changed, RenderRequest) else request_
    assert (await made(request)).resumed_from == 0
    assert request.target.read_bytes() == await whole(request)


async def test_other_settings_begin_anew(request_):
    with pytest.raises(Stopped):
        await made(request_, **stopping_at(60))
    settings = load_settings(None, ["encoder.preset=ultrafast", "encoder.crf=30"], model__name=TOY)
    assert (await made(request_, settings)).resumed_from == 0


async def test_a_state_of_another_make_begins_anew_and_says_so(request_, caplog):
    with pytest.raises(Stopped):
        await made(request_, **stopping_at(60))
    for state in request_.folder.glob("state-*"):
        state.write_bytes(state.read_bytes().replace(b"ToyState", b"ToyStage"))
    assert (await made(request_)).resumed_from == 0
    assert "cannot be gone on with" in caplog.text


ODD = """
class Odd(ToyModel):
    def step(self, state, audio):
        state.waiting = []
        blocks = super().step(state, audio)
        state.waiting = {1, 2}
        return blocks

    def finish(self, state):
        return []

def load(size, steps, options):
    return Odd((64, 64))
"""


@pytest.fixture
def odd(tmp_path: Path) -> Settings:
    """Of a model whose state cannot be saved."""
    (tmp_path / "odd.py").write_text(Path(TOY.removesuffix(":load")).read_text() + ODD)
    return load_settings(None, ["encoder.preset=ultrafast"], model__name=f"{tmp_path}/odd.py:load")


async def test_a_model_that_cannot_be_saved_is_rendered_all_the_same(request_, odd, caplog):
    await made(request_, odd)
    assert caplog.text.count("cannot be gone on with after a kill") == 1
    assert request_.target.read_bytes() == await whole(request_, odd)


# Errors.


async def test_a_target_that_exists_is_not_replaced_where_that_is_not_wanted(request_):
    request_.target.write_bytes(b"mine")
    with pytest.raises(SinkError, match="exists already"):
        await made(replace(request_, overwrite=False))
    assert request_.target.read_bytes() == b"mine"


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
async def test_a_target_that_came_up_meanwhile_is_not_replaced_either(request_, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)

    def come_up(frames: int, total: int | None) -> None:
        request_.target.write_bytes(b"mine")

    with pytest.raises(SinkError, match="exists already"):
        await made(replace(request_, overwrite=False), on_progress=come_up)
    assert request_.target.read_bytes() == b"mine"


@pytest.mark.parametrize("which", ["image", "audio"])
async def test_a_file_that_is_none_is_one_line(request_, which, tmp_path):
    (tmp_path / "text").write_text("I am a text\n" * 100)
    with pytest.raises(AvatardError, match="/text: "):
        await made(replace(request_, **{which: tmp_path / "text"}))
    assert not request_.folder.exists()
    assert not request_.target.exists()


async def test_what_the_model_complains_of_comes_as_it_is(request_):
    with pytest.raises(AvatardError, match=r"^toy: this block is not to my taste; give me another$"):
        await made(request_, toy(fail_at=3, how="user"))


async def test_a_folder_or_another_type_of_file_is_refused_at_once(request_):
    for target, message in ((request_.target.parent, "is a folder"), (request_.target.with_suffix(".avi"), "'.avi'")):
        with pytest.raises(SinkError, match=message):
            await made(replace(request_, target=target))


# Beside others.


async def test_the_model_is_used_in_turns_only(request_):
    inside, expected = 0, []

    @contextlib.asynccontextmanager
    async def turn(expected_s: float) -> AsyncIterator[None]:
        nonlocal inside
        inside += 1
        assert inside == 1
        expected.append(expected_s)
        yield
        inside -= 1

    settings = toy(step_s=0.02)
    async with await Engine.launch(engine_settings(settings)) as engine:
        await render(request_, engine, settings, segment_s=SEGMENT_S, turn=turn)
        begin, first, *others, finish = expected
        assert len(others) == 9
        assert (begin, first, finish) == (0.0, 0.0, 0.0)
        assert all(0.02 <= seconds < 0.3 for seconds in others)
        await render(replace(request_, seed=9), engine, settings, segment_s=SEGMENT_S, turn=turn)
        # What is known of this engine is known to the next one too.
        assert 0.02 <= expected[13] < 0.3


async def test_two_renders_at_once_are_as_each_alone(request_, tmp_path):
    other = replace(request_, seed=6, target=tmp_path / "out" / "b.mp4", folder=tmp_path / "work-b")
    async with await Engine.launch(engine_settings(toy())) as engine:
        await asyncio.gather(
            *(render(request, engine, toy(), segment_s=SEGMENT_S) for request in (request_, other)),
        )
    assert request_.target.read_bytes() == await whole(request_)
    assert other.target.read_bytes() == await whole(other)


async def test_a_stop_while_the_turn_is_waited_for_ends_it(request_):
    stop = asyncio.Event()

    @contextlib.asynccontextmanager
    async def never(expected_s: float) -> AsyncIterator[None]:
        stop.set()
        await asyncio.Event().wait()
        yield

    with pytest.raises(Stopped):
        await asyncio.wait_for(made(request_, turn=never, stop=stop), 10)
