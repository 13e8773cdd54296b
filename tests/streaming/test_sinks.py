"""Sinks: the final name only ever holds a finished file, and what is playable is kept and named."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import av
import numpy as np
import pytest
from contracts import check_sink
from mp4 import boxes, clicks_at, read_mp4

from avatar.model import FrameBlock
from streaming.encoder import SOUND_RATE, Encoder, EncoderSettings
from streaming.muxer import Muxer
from streaming.sinks import FileSink, HlsSink, NullSink, SegmentSink, Sink, SinkError, open_sink


async def write(sink: Sink, seconds: float) -> None:
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
        ("segment:ten:{tmp}/a.mp4", "write segment:SECONDS:FILE.mp4"),
        ("segment:0:{tmp}/a.mp4", "at least 1 second"),
        ("segment:10:{tmp}/a.avi", "file type '.avi' is not one we write"),
        ("segment:10:{tmp}/missing/a.mp4", "there is no folder .*missing"),
        ("{tmp}/missing/live.m3u8", "there is no folder .*missing"),
        ("event:{tmp}/a.mp4", "there is no folder|file type"),
        ("rtmp://host:port/live/secret-key", r"rtmp://host:port/live/\*\*\*: its port is not a number"),
        ("rtmp:///secret-key", "names no server; write rtmp://HOST/APPLICATION/KEY"),
        ("rtmps://host", "names no stream; write rtmps://HOST/APPLICATION/KEY"),
        ("rtmp://host/live/secret-key\n", "names no server"),
        ("srt://host:9000?streamid=secret-key", "the FFmpeg in this PyAV was built without it"),
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


def show(seconds: float, clicks: list[float]) -> tuple[Encoder, list]:
    """A live stream with a flash and a click at these times, as an encoder and its packets."""
    encoder = Encoder(64, 64, 25, 1, EncoderSettings(live=True, preset="ultrafast"))
    sound = clicks_at(clicks, seconds, SOUND_RATE)[:, None]
    packets = []
    for number in range(round(seconds * 25)):
        bright = any(abs(number / 25 - click) < 0.01 for click in clicks)
        frames = np.full((1, 64, 64, 3), 250 if bright else 60, np.uint8)
        block = FrameBlock(frames, np.zeros(0, np.float32), number)
        packets += encoder.encode(block, sound[number * 1920 : (number + 1) * 1920])
    return encoder, packets + encoder.flush()


async def record(sink: Sink, seconds: float, clicks: list[float] | None = None, complete: bool = True) -> list:
    """Write a show packet by packet, as it comes; gives the packets."""
    encoder, packets = show(seconds, clicks or [])
    await sink.open()
    await sink.start(encoder.streams, {"title": "a show"})
    for packet in packets:
        await sink.write([packet])
    await sink.close(complete)
    encoder.close()
    return packets


async def test_a_recording_in_segments_keeps_the_contract_of_sinks(tmp_path):
    def times(sink):
        return read_mp4(tmp_path / "a-0001.mp4").times

    await check_sink(lambda: open_sink(f"segment:60:{tmp_path}/a.mp4"), times)
    assert os.listdir(tmp_path) == ["a-0001.mp4"]


async def test_a_segment_that_cannot_be_begun_is_an_error_of_its_output_and_the_one_before_is_finished(
    tmp_path, monkeypatch
):
    sink, start = open_sink(f"segment:2:{tmp_path}/show.mp4"), FileSink.start

    async def refuse_the_second(file, *arguments):
        if "0002" in file.name:
            raise SinkError(f"{file.name}: too many open files")
        await start(file, *arguments)

    monkeypatch.setattr(FileSink, "start", refuse_the_second)
    with pytest.raises(SinkError, match="too many open files"):
        await record(sink, 6)
    await sink.close(complete=False)
    assert read_mp4(tmp_path / "show-0001.mp4").frames == 50


async def test_segments_hold_every_frame_and_packet_once_and_each_plays_by_itself(tmp_path):
    sink = open_sink(f"segment:3:{tmp_path}/show.mp4")
    packets = await record(sink, 13, clicks=[1.0, 5.0, 7.0, 9.0, 11.4])
    names = sorted(os.listdir(tmp_path))
    assert names == [f"show-000{n}.mp4" for n in (1, 2, 3, 4)]  # 3 s end at the next keyframe: after 4 s
    assert sink.output == tmp_path / names[-1]
    files = [read_mp4(tmp_path / name) for name in names]
    assert [file.frames for file in files] == [100, 100, 100, 25]
    for file in files:
        assert file.times == pytest.approx([n / 25 for n in range(file.frames)])
        assert file.sound_start < 0.022
        assert "moof" not in boxes(tmp_path / names[0])
        for flash, click in zip(file.flashes(), file.clicks(), strict=True):
            assert click == pytest.approx(flash, abs=0.001)
    begins = [0, 4, 8, 12]
    flashes = [begin + flash for begin, file in zip(begins, files) for flash in file.flashes()]
    assert flashes == pytest.approx([1.0, 5.0, 7.0, 9.0, 11.4])
    written = 0
    for name in names:
        with av.open(str(tmp_path / name)) as container:
            written += sum(packet.size > 0 for packet in container.demux())
    assert written == len(packets)


async def test_segments_go_on_counting_and_overwrite_nothing(tmp_path):
    await record(open_sink(f"segment:2:{tmp_path}/a.mp4"), 3)
    (tmp_path / "a-0007.part.mp4").write_bytes(b"what a kill left")
    await record(open_sink(f"segment:2:{tmp_path}/a.mp4", overwrite=True), 1)
    assert sorted(os.listdir(tmp_path)) == ["a-0001.mp4", "a-0002.mp4", "a-0007.part.mp4", "a-0008.mp4"]


async def test_segments_may_be_named_by_the_time_they_begin(tmp_path):
    now = datetime(2026, 3, 29, 1, 59, 0)
    times = iter([now, now + timedelta(seconds=2), now + timedelta(seconds=2)])
    sink = SegmentSink(tmp_path / "show %Y-%m-%d %H.%M.%S.mp4", 2, now=lambda: next(times))
    await record(sink, 5)
    assert sorted(os.listdir(tmp_path)) == [
        "show 2026-03-29 01.59.00.mp4",
        "show 2026-03-29 01.59.02-0002.mp4",  # the clock was put back
        "show 2026-03-29 01.59.02.mp4",
    ]


async def test_a_kill_leaves_finished_segments_and_a_playable_part(tmp_path):
    encoder, packets = show(9, [])
    sink = open_sink(f"segment:2:{tmp_path}/a.mp4")
    await sink.open()
    await sink.start(encoder.streams, {})
    for packet in packets:
        await sink.write([packet])
    await asyncio.sleep(0.2)  # the segment before is finished beside the stream
    copies = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    await sink.close(complete=False)
    frames = []
    for name in sorted(copies):
        (tmp_path / "copy.mp4").write_bytes(copies[name])
        frames.append(read_mp4(tmp_path / "copy.mp4", cut_off=True).frames)
    assert frames[:4] == [50, 50, 50, 50]
    assert frames[4] >= 12
    assert sorted(copies)[4] == "a-0005.part.mp4"


async def test_a_full_disk_ends_a_recording_and_keeps_what_there_is(small_disk):
    sink = open_sink(f"segment:2:{small_disk}/a.mp4")
    with pytest.raises(SinkError, match="no space left on device"):
        await write(sink, 20)
    await sink.close(complete=False)
    assert sink.output is not None
    assert read_mp4(sink.output, cut_off=True).frames > 0


async def test_hls_keeps_the_contract_of_sinks(tmp_path):
    def times(sink):
        assert sink.output == tmp_path / "live.m3u8"
        file = read_mp4(sink.output)
        return [time - file.times[0] for time in file.times]

    await check_sink(lambda: open_sink(f"{tmp_path}/live.m3u8"), times)


def playlist(path: Path) -> tuple[list[str], list[str]]:
    """The tags and the segments of a playlist."""
    lines = path.read_text().splitlines()
    return [line for line in lines if line.startswith("#")], [line for line in lines if not line.startswith("#")]


async def test_a_rolling_playlist_names_the_last_segments_and_older_ones_go(tmp_path):
    folder = tmp_path / "12:30 会 %d"
    folder.mkdir()
    await record(open_sink(f"{folder}/live.m3u8"), 42)
    tags, segments = playlist(folder / "live.m3u8")
    assert len(segments) == 6
    assert tags[:3] == ["#EXTM3U", "#EXT-X-VERSION:7", "#EXT-X-TARGETDURATION:2"]
    assert "#EXT-X-INDEPENDENT-SEGMENTS" in tags
    assert '#EXT-X-MAP:URI="live-init.mp4"' in tags
    assert tags[-1] == "#EXT-X-ENDLIST"
    assert sum(tag.startswith("#EXT-X-PROGRAM-DATE-TIME:") for tag in tags) == 6
    left = sorted(os.listdir(folder))
    assert set(segments) < set(left)
    assert len(left) == 2 + 6 + 6
    # Without the playlist, as a browser does it: the first segment of it and the header are enough.
    (folder / "one.mp4").write_bytes(b"".join((folder / name).read_bytes() for name in ("live-init.mp4", segments[0])))
    assert read_mp4(folder / "one.mp4").frames == 50


async def test_an_event_playlist_keeps_all_and_stays_in_time(tmp_path):
    await record(open_sink(f"event:{tmp_path}/live.m3u8"), 21, clicks=[1.0, 7.0, 13.0, 19.0])
    tags, segments = playlist(tmp_path / "live.m3u8")
    assert "#EXT-X-PLAYLIST-TYPE:EVENT" in tags
    assert len(segments) == 11
    file = read_mp4(tmp_path / "live.m3u8")
    assert file.frames == 525
    assert np.subtract(file.flashes(), file.clicks()) == pytest.approx(0, abs=0.001)


async def test_a_player_never_sees_half_a_file(tmp_path):
    encoder, packets = show(12, [])
    sink = open_sink(f"{tmp_path}/live.m3u8")
    await sink.open()
    await sink.start(encoder.streams, {})
    seen: dict[str, bytes] = {}
    for packet in packets:
        await sink.write([packet])
        if not (tmp_path / "live.m3u8").exists():
            continue
        tags, segments = playlist(tmp_path / "live.m3u8")
        assert tags[0] == "#EXTM3U"
        for name in ["live-init.mp4", *segments]:
            data = (tmp_path / name).read_bytes()
            assert data
            assert seen.setdefault(name, data) == data
    assert len(seen) == 6
    await sink.close(complete=False)
    assert playlist(tmp_path / "live.m3u8")[0][-1] == "#EXT-X-ENDLIST"


async def test_a_playlist_that_exists_is_replaced_only_when_told_and_with_other_names(tmp_path):
    path = f"{tmp_path}/live.m3u8"
    await record(open_sink(path), 5)
    before = set(playlist(tmp_path / "live.m3u8")[1])
    with pytest.raises(SinkError, match=r"exists already.*--overwrite"):
        await open_sink(path).open()
    later = datetime.now(UTC) + timedelta(seconds=5)
    await record(HlsSink(Path(path), overwrite=True, now=lambda: later), 3)
    after = set(playlist(tmp_path / "live.m3u8")[1])
    assert not before & after
    assert {name for name in os.listdir(tmp_path) if name.endswith(".m4s")} == after


async def test_a_full_disk_ends_hls(small_disk):
    sink = open_sink(f"event:{small_disk}/live.m3u8")
    with pytest.raises(SinkError, match="no space left on device"):
        await write(sink, 20)
    await sink.close(complete=False)
