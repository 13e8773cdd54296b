"""Sinks: the final name only ever holds a finished file, and what is playable is kept and named."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from contracts import check_sink
from mp4 import boxes, read_mp4

from avatar.model import FrameBlock
from streaming.encoder import SOUND_RATE, Encoder, EncoderSettings
from streaming.muxer import Muxer
from streaming.sinks import FileSink, NullSink, SinkError, open_sink


async def write(sink: FileSink, seconds: float) -> None:
    """Open a sink and write that much noise, which does not compress."""
    encoder = Encoder(128, 128, 25, 1, EncoderSettings(crf=1))
    await sink.open()
    await sink.start(encoder.streams, {"title": "noise"})
    rng = np.random.default_rng(0)
    for start in range(0, round(seconds * 25), 12):
        frames = rng.integers(0, 255, (12, 128, 128, 3), np.uint8)
        block = FrameBlock(frames, np.zeros(0, np.float32), start)
        await sink.write(encoder.encode(block, np.zeros((12 * SOUND_RATE // 25, 1), np.float32)))
    await sink.write(encoder.flush())
    encoder.close()


async def test_a_file_keeps_the_contract_of_sinks(tmp_path):
    def times(sink):
        assert sink.output == tmp_path / "a.mp4"
        return read_mp4(sink.output).times

    await check_sink(lambda: open_sink(str(tmp_path / "a.mp4")), times)
    assert os.listdir(tmp_path) == ["a.mp4"]


async def test_null_keeps_the_contract_of_sinks_and_counts():
    def times(sink):
        assert sink.packets > 48
        return [n / 25 for n in range(48)]

    await check_sink(lambda: open_sink("null://"), times)


async def test_the_final_name_appears_only_when_the_file_is_finished(tmp_path):
    sink = FileSink(tmp_path / "a.mp4")
    await write(sink, 2)
    assert os.listdir(tmp_path) == ["a.part.mp4"]
    await sink.close(complete=True)
    assert os.listdir(tmp_path) == ["a.mp4"]
    names = boxes(tmp_path / "a.mp4")
    assert names.index("moov") < names.index("mdat")


async def test_closed_early_the_part_stays_playable_and_is_named(tmp_path):
    sink = FileSink(tmp_path / "a.mp4")
    await write(sink, 2)
    await sink.close(complete=False)
    assert sink.output == tmp_path / "a.part.mp4"
    assert read_mp4(sink.output).frames == 60
    assert not (tmp_path / "a.mp4").exists()


async def test_an_older_part_is_not_overwritten(tmp_path):
    (tmp_path / "a.part.mp4").write_bytes(b"an hour of someone's work")
    sink = FileSink(tmp_path / "a.mp4")
    await write(sink, 1)
    await sink.close(complete=False)
    assert (tmp_path / "a.part.mp4").read_bytes() == b"an hour of someone's work"
    assert sink.output == tmp_path / "a.part-2.mp4"


async def test_a_file_that_exists_is_refused_unless_told_otherwise(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"mine")
    with pytest.raises(SinkError, match=r"exists already.*--overwrite"):
        await FileSink(path).open()
    sink = FileSink(path, overwrite=True)
    await write(sink, 1)
    assert path.read_bytes() == b"mine"
    await sink.close(complete=True)
    assert read_mp4(path).frames == 36


async def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    sink = FileSink(tmp_path / "a.mp4")
    await write(sink, 1)
    (tmp_path / "a.mp4").write_bytes(b"mine")
    with pytest.raises(SinkError, match=r"exists already.*the video is in .*a\.part\.mp4"):
        await sink.close(complete=True)
    assert (tmp_path / "a.mp4").read_bytes() == b"mine"
    assert read_mp4(tmp_path / "a.part.mp4").frames == 36


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{tmp}", "is a folder; name a file in it"),
        ("{tmp}/folder.mp4", "is a folder"),
        ("{tmp}/missing/a.mp4", "there is no folder .*missing; create it first"),
        ("{tmp}/a.avi", "file type '.avi' is not one we write"),
        ("{tmp}/a", "file without a type"),
        ("-", "file without a type"),
        ("rtsp://host/live/secret-key", r"rtsp://: no such output; there is a file \(.mp4"),
        ("s3://bucket/a.mp4", r"s3://: no such output"),
        ("{tmp}/" + "x" * 300 + ".mp4", "name too long"),
    ],
)
async def test_a_target_that_cannot_be_is_refused_in_one_line(tmp_path, target, message):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(SinkError, match=message) as caught:
        await open_sink(target.format(tmp=tmp_path)).open()
    assert "\n" not in str(caught.value)
    assert "secret-key" not in str(caught.value)
    assert os.listdir(tmp_path) == ["folder.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SinkError, match="permission denied"):
        await FileSink(tmp_path / "a.mp4").open()


async def test_a_name_with_a_colon_is_a_name_and_not_a_protocol(tmp_path):
    sink = FileSink(tmp_path / "at 12:30.mp4")
    await write(sink, 1)
    await sink.close(complete=True)
    assert read_mp4(tmp_path / "at 12:30.mp4").frames == 36


@pytest.mark.parametrize(
    "name", ["ein Gespräch.mp4", "会话.mp4", "%d.mp4", "a#b?c.mp4", "-.mp4", os.fsdecode(b"\xff.mp4")]
)
async def test_any_name_that_the_system_allows_will_do(tmp_path, name):
    sink = FileSink(tmp_path / name)
    await write(sink, 1)
    await sink.close(complete=True)
    assert os.listdir(tmp_path) == [name]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_disk_that_fills_half_way_leaves_a_playable_part(small_disk):
    sink = FileSink(small_disk / "a.mp4")
    with pytest.raises(SinkError, match="no space left on device"):
        await write(sink, 20)
    await sink.close(complete=False)
    assert os.listdir(small_disk) == ["a.part.mp4"]
    assert sink.output == small_disk / "a.part.mp4"
    assert read_mp4(sink.output, cut_off=True).frames > 25


async def test_a_disk_that_fills_while_finishing_keeps_the_whole_part(small_disk):
    sink = FileSink(small_disk / "a.mp4")
    await write(sink, 2)
    part = small_disk / "a.part.mp4"
    assert part.stat().st_size > 1_000_000, "the part must take more than half of the disk"
    with pytest.raises(SinkError, match=r"no space left on device; the video is in .*a\.part\.mp4"):
        await sink.close(complete=True)
    assert os.listdir(small_disk) == ["a.part.mp4"]
    assert read_mp4(part).frames == 60


async def test_a_file_size_limit_is_an_error_of_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sink = FileSink(tmp_path / "a.mp4")
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(SinkError, match=r"a\.mp4: file too large"):
            await write(sink, 20)
        await sink.close(complete=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_mp4(tmp_path / "a.part.mp4", cut_off=True).frames >= 6


async def test_nothing_is_left_where_nothing_was_written(tmp_path):
    sink = FileSink(tmp_path / "a.mp4")
    encoder = Encoder(64, 64, 25, 1, EncoderSettings())
    await sink.open()
    await sink.start(encoder.streams, {})
    await sink.close(complete=False)
    assert sink.output is None
    assert os.listdir(tmp_path) == []


async def test_a_write_that_was_cancelled_ends_before_the_close(tmp_path, monkeypatch):
    begun, mux = threading.Event(), Muxer.mux

    def slow_mux(self, packets):
        begun.set()
        mux(self, packets)

    monkeypatch.setattr(Muxer, "mux", slow_mux)
    sink = FileSink(tmp_path / "a.mp4")
    encoder = Encoder(64, 64, 25, 1, EncoderSettings())
    await sink.open()
    await sink.start(encoder.streams, {})
    frames = np.zeros((100, 64, 64, 3), np.uint8)
    packets = encoder.encode(
        FrameBlock(frames, np.zeros(0, np.float32), 0), np.zeros((100 * SOUND_RATE // 25, 1), np.float32)
    )
    writing = asyncio.ensure_future(sink.write(packets))
    assert await asyncio.to_thread(begun.wait, 5)
    writing.cancel()
    await sink.close(complete=False)
    assert read_mp4(tmp_path / "a.part.mp4").frames == sum(packet.stream.type == "video" for packet in packets)


def test_the_scheme_decides_what_a_target_is():
    assert isinstance(open_sink("null://"), NullSink)
    assert isinstance(open_sink("file:///tmp/a.mp4"), FileSink)
    assert open_sink("folder/a.MP4").name == str(Path("folder/a.MP4"))
