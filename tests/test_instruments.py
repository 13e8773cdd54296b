"""What the tests measure with is right itself: every fault put in is found, at its size, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import procs
import pytest
import skew
from conftest import find_program
from live import Live
from mp4 import write_sound
from proxy import Proxy, Way, certificate, free_port, tls_server
from rtmp import RtmpServer
from speech import RATE, Speaker, Speech
from toy_model import flash
from waiting import until

FPS = 25
WITHIN_MS = 2.0

Span = tuple[float, float]


def inside(time_s: float, spans: Sequence[Span]) -> bool:
    return any(start <= time_s < end for start, end in spans)


def write_stream(
    path: Path,
    seconds: float = 10.0,
    late_ms: Callable[[float], float] = lambda at_s: 0.0,
    *,
    clicks: Sequence[float] | None = None,
    unseen: Sequence[float] = (),
    no_video: Sequence[Span] = (),
    no_audio: Sequence[Span] = (),
    black: Sequence[Span] = (),
    frozen: Sequence[Span] = (),
    silent: Sequence[Span] = (),
    size: int = 64,
) -> Path:
    """Stripes that wander, and flash `late_ms` after each click, and whatever else is wrong with it; by plain PyAV."""
    times = Speech().clicks(0, seconds) if clicks is None else list(clicks)
    sound = np.random.default_rng(0).normal(0, 0.02, round(seconds * 48_000)).astype(np.float32)
    for click in times:
        sound[round(click * 48_000) : round((click + 0.005) * 48_000)] = 0.9
    for start, end in silent:
        sound[round(start * 48_000) : round(end * 48_000)] = 0
    shown = sorted(click + late_ms(click) / 1000 for click in times if click not in unseen)
    stripes = (60 + 20 * np.sin(np.arange(size) * (8 * np.pi / size))).astype(np.uint8)
    picture = np.zeros((size, size, 3), np.uint8)
    with av.open(str(path), "w") as container:
        video = container.add_stream(
            "libx264", rate=FPS, options={"preset": "ultrafast", "crf": "30", "g": "50", "bf": "0"}
        )
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=48_000, layout="mono")
        audio.bit_rate = 80_000
        for number in range(round(seconds * FPS)):
            at_s = number / FPS
            if not inside(at_s, frozen):
                picture[:] = np.roll(stripes, 2 * number)[:, None]
                moments = [time for time in shown if at_s <= time < at_s + 1 / FPS]
                if moments:
                    heard = np.zeros(640, np.float32)
                    heard[round((moments[0] - at_s) * 16_000) :] = 0.9
                    flash(picture, heard, 640)
                if inside(at_s, black):
                    picture[:] = 0
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            for packet in video.encode(frame):
                if not inside(float(packet.pts * packet.time_base), no_video):
                    container.mux(packet)
            part = sound[number * 1920 : (number + 1) * 1920]
            chunk = av.AudioFrame.from_ndarray(part[None], format="fltp", layout="mono")
            chunk.sample_rate, chunk.pts, chunk.time_base = 48_000, number * 1920, Fraction(1, 48_000)
            for packet in audio.encode(chunk):
                if not inside(float(packet.pts * packet.time_base), no_audio):
                    container.mux(packet)
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return path


@pytest.mark.parametrize("late_ms", [0.0, 40.0, -80.0, 13.0])
@pytest.mark.parametrize("name", ["a.mp4", "a.flv", "a.m3u8"])
def test_skew_is_found_to_two_milliseconds(tmp_path, name, late_ms):
    reading = skew.read(write_stream(tmp_path / name, 6, late_ms=lambda at_s: late_ms))
    assert reading.ended == "end"
    assert reading.skew.pairs == len(Speech().clicks(0, 6)) > 4
    assert reading.skew.ms == pytest.approx(late_ms, abs=WITHIN_MS)
    assert reading.skew.p50 == pytest.approx(late_ms, abs=WITHIN_MS)
    assert reading.skew.p95 == pytest.approx(abs(late_ms), abs=WITHIN_MS)
    assert (reading.lone_flashes, reading.lone_clicks, reading.video.backward, reading.audio.backward) == (0, 0, 0, 0)


def test_nothing_is_found_where_nothing_is_wrong(tmp_path):
    reading = skew.read(write_stream(tmp_path / "a.mp4"))
    summary = reading.summary()
    assert (summary["frames"], summary["size"], summary["codecs"]) == (250, (64, 64), ("h264", "aac"))
    for name in ("black_frames", "freezes", "video_gaps", "audio_gaps", "backward_dts", "broken_packets"):
        assert summary[name] == 0, name
    assert summary["longest_silence_s"] == 0
    assert summary["video_s"] == pytest.approx(10, abs=0.001)
    assert summary["audio_s"] == pytest.approx(10, abs=0.05)
    assert summary["keyframe_distance_s"] == pytest.approx(2)


def test_drift_is_found(tmp_path):
    reading = skew.read(write_stream(tmp_path / "a.flv", 20, late_ms=lambda at_s: 2 * at_s))
    assert reading.skew.drift == pytest.approx(2 * 3600, rel=0.05)
    assert reading.skew.max == pytest.approx(2 * reading.clicks[-1], abs=WITHIN_MS)


def test_a_single_leap_is_in_the_maximum_and_not_in_the_median(tmp_path):
    reading = skew.read(write_stream(tmp_path / "a.mp4", 20, late_ms=lambda at_s: 90.0 if 5 < at_s < 6 else 0.0))
    assert abs(reading.skew.p50) < WITHIN_MS
    assert reading.skew.max == pytest.approx(90, abs=WITHIN_MS)


def test_a_flash_that_never_came_leaves_a_lone_click(tmp_path):
    clicks = [1.0, 2.0, 3.0]
    reading = skew.read(write_stream(tmp_path / "a.mp4", 5, clicks=clicks, unseen=[2.0]))
    assert (reading.skew.pairs, reading.lone_clicks, reading.lone_flashes) == (2, 1, 0)
    assert reading.clicks == pytest.approx(clicks, abs=0.002)


def test_gaps_of_timestamps_are_found_in_each_stream(tmp_path):
    reading = skew.read(write_stream(tmp_path / "a.flv", no_video=[(2.0, 2.12)], no_audio=[(5.0, 5.2)]))
    # FLV moves both streams by the encoder's delay, so that none begins below 0.
    ((at_s, length_s),) = reading.video.gaps.listed
    assert (at_s, length_s) == (pytest.approx(2.02, abs=0.005), pytest.approx(0.12, abs=0.002))
    ((at_s, length_s),) = reading.audio.gaps.listed
    assert (at_s, length_s) == (pytest.approx(5.02, abs=0.03), pytest.approx(0.2, abs=0.025))
    assert np.abs(reading.skew.ms).max() < WITHIN_MS


def test_black_frozen_and_silent_stretches_are_found(tmp_path):
    path = write_stream(tmp_path / "a.mp4", black=[(3.0, 3.2)], frozen=[(5.0, 5.6)], silent=[(7.8, 8.1)])
    reading = skew.read(path)
    assert reading.black == 5
    ((at_s, length_s),) = [stretch for stretch in reading.freezes.listed if stretch[0] > 4]
    assert (at_s, length_s) == (pytest.approx(4.96), pytest.approx(0.64))
    assert reading.silences.max_s == pytest.approx(0.3, abs=0.045)


def test_a_timestamp_that_goes_back_is_found(tmp_path):
    path = write_stream(tmp_path / "a.flv", 4)
    data = bytearray(path.read_bytes())
    tags = list(flv_tags(data))
    at, _, _ = [tag for tag in tags if tag[1] == 9][60]
    data[at + 4 : at + 7] = (500).to_bytes(3, "big")
    path.write_bytes(data)
    reading = skew.read(path)
    assert (reading.video.backward, reading.audio.backward) == (1, 0)


def flv_tags(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Offset, type and size of each tag of an FLV file."""
    at = 13
    while at + 11 <= len(data):
        size = int.from_bytes(data[at + 1 : at + 4], "big")
        yield at, data[at], size
        at += 11 + size + 4


def test_what_can_not_be_read_is_told_with_what_was_read_up_to_there(tmp_path):
    assert "No such file" in str(skew.read(tmp_path / "missing.mp4").ended)
    path = write_stream(tmp_path / "a.flv", 4)
    path.write_bytes(path.read_bytes()[:-20_000])
    assert 40 < skew.read(path).frames < 100
    port = free_port()
    assert "refused" in str(skew.read(f"rtmp://127.0.0.1:{port}/live/key").ended)


def test_reading_ends_when_it_is_enough_or_told_to_stop(tmp_path):
    path = write_stream(tmp_path / "a.mp4")
    reading = skew.read(path, seconds=2)
    assert reading.ended == "enough"
    assert 50 <= reading.frames < 60
    looked: list[float] = []
    reading = skew.read(path, stop=lambda: len(looked) > 10, look=lambda picture: looked.append(picture.luma.mean()))
    assert reading.ended == "stopped"
    assert len(looked) == reading.frames < 20


def test_of_a_growing_file_it_is_known_when_each_flash_arrived(tmp_path):
    whole = write_stream(tmp_path / "whole.flv", 4, clicks=[1.0, 2.0, 3.0]).read_bytes()
    growing = tmp_path / "growing.flv"
    growing.touch()
    written: list[tuple[int, float]] = []
    with skew.Watch(growing, growing=True) as watch, growing.open("ab", buffering=0) as file:
        for at in range(0, len(whole), 2000):
            file.write(whole[at : at + 2000])
            written.append((at + 2000, time.monotonic()))
            time.sleep(0.005)
        until(lambda: len(watch.reading.flashes) == 3, 5)
    packets = [packet for packet in av.open(str(growing)).demux(video=0) if packet.pts is not None]
    for number, arrived_s in enumerate(watch.reading.arrivals):
        packet = packets[(number + 1) * FPS]
        # The file had the packet with the write that reached its end.
        expected = next(at_s for size, at_s in written if size >= packet.pos + packet.size)
        assert -0.001 <= arrived_s - expected < 0.1
    assert watch.reading.ended == "end"


# The voice.


def test_speech_is_the_same_however_it_is_cut_and_clicks_where_it_says():
    speech = Speech(noise=0.0)
    whole = speech.samples(0, 5 * RATE)
    parts = np.concatenate([speech.samples(start, 777) for start in range(0, 5 * RATE, 777)])
    np.testing.assert_array_equal(parts[: len(whole)], whole)
    loud = np.flatnonzero(np.abs(whole) > 0.5) / RATE
    firsts = loud[np.r_[True, np.diff(loud) > 0.1]]
    assert firsts == pytest.approx(speech.clicks(0, 5), abs=1 / RATE)
    assert len(firsts) == 5
    voice = Speech(click_every_s=None).samples(0, 5 * RATE)
    assert 0.2 < np.abs(voice).max() <= 0.25


def test_speech_is_silent_where_nobody_speaks():
    sound = Speech(click_every_s=None, voice=[(1.0, 2.0)]).samples(0, 3 * RATE)
    assert np.abs(sound[:RATE]).max() == np.abs(sound[2 * RATE :]).max() == 0
    assert np.abs(sound[RATE : 2 * RATE]).max() > 0.2


def spoken(
    seconds: float, act: Callable[[Speaker], None] = lambda speaker: None, **how
) -> tuple[bytes, float, Speaker]:
    """What comes out of the pipe, how long it took, and the speaker."""
    out, into = os.pipe()
    began = time.monotonic()
    with open(out, "rb") as pipe, Speaker(into, Speech(), seconds, **how) as speaker:
        act(speaker)
        heard = pipe.read()
    return heard, time.monotonic() - began, speaker


def test_a_speaker_keeps_time_and_knows_when_it_said_what():
    heard, took_s, speaker = spoken(1.0, speed=2.0)
    assert heard == Speech().s16le(0, RATE)
    assert 0.5 <= took_s < 1.0
    assert speaker.written_at(0.8) - speaker.written_at(0.2) == pytest.approx(0.3, abs=0.1)
    with pytest.raises(LookupError):
        speaker.written_at(1.5)


def test_a_speaker_without_a_pace_is_as_fast_as_the_reader():
    heard, took_s, _ = spoken(30.0, speed=None)
    assert len(heard) == 30 * RATE * 2
    assert took_s < 10


def test_after_a_burst_there_is_a_pause_and_after_a_pause_the_rest():
    _, took_s, speaker = spoken(0.6, lambda speaker: speaker.burst(0.5))
    assert 0.6 <= took_s < 1.0
    assert speaker.written_at(0.49) - speaker.written_at(0.0) < 0.1

    def pausing(speaker: Speaker) -> None:
        until(lambda: speaker.said_s >= 0.1)
        speaker.pause()
        time.sleep(0.3)
        speaker.resume()

    heard, took_s, _ = spoken(0.3, pausing)
    assert heard == Speech().s16le(0, round(0.3 * RATE))
    assert 0.55 <= took_s < 1.2


def test_a_speaker_outlives_a_reader_that_does_not_read_and_one_that_is_gone():
    out, into = os.pipe()
    with Speaker(into, Speech(), speed=None) as speaker:
        until(lambda: speaker.said_s > 1)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert speaker.ended
    os.close(out)

    out, into = os.pipe()
    os.close(out)
    speaker = Speaker(into, Speech()).start()
    speaker.join(5)
    assert speaker.broken


# The line.


class Echo:
    """A server that gives back what it gets, and remembers how connections ended."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.endings: list[str] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
                self.endings.append("closed")
            except OSError as error:
                self.endings.append(type(error).__name__)


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.listener.close()


@pytest.fixture
def line(echo: Echo) -> Iterator[Proxy]:
    echo.endings.clear()
    with Proxy(echo.port) as proxy:
        yield proxy


def connect(proxy: Proxy, timeout_s: float = 5.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout_s)


def exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (part := connection.recv(count - len(data))):
        data += part
    return data


def sent_and_back(connection: socket.socket, data: bytes) -> float:
    """Send bytes, get the same ones back, and say how long it took."""
    began = time.monotonic()
    writer = threading.Thread(target=connection.sendall, args=(data,))
    writer.start()
    assert exactly(connection, len(data)) == data
    writer.join()
    return time.monotonic() - began


def test_a_line_without_faults_passes_everything_on(line, echo):
    data = os.urandom(3_000_000)
    with connect(line) as connection:
        sent_and_back(connection, data)
        assert len(line.open) == 1
    until(lambda: line.connections[0].ended == "closed", 5)
    until(lambda: echo.endings == ["closed"], 5)
    assert (line.connections[0].up_bytes, line.connections[0].down_bytes) == (len(data), len(data))


def test_a_delayed_line_is_late_and_not_slow(line):
    line.delay(0.15, Way.UP)
    with connect(line) as connection:
        assert 0.15 <= sent_and_back(connection, b"x") < 0.6
        assert 0.15 <= sent_and_back(connection, os.urandom(1_000_000)) < 2.0
        line.delay(0)
        assert sent_and_back(connection, b"x") < 0.1


def test_a_capped_line_takes_its_time(line):
    line.cap(100_000)
    with connect(line) as connection:
        assert 0.5 <= sent_and_back(connection, os.urandom(60_000)) < 1.5
        line.cap(None)
        assert sent_and_back(connection, os.urandom(60_000)) < 0.5


def test_a_stalled_line_takes_no_more_than_buffers_hold_and_loses_nothing(line):
    with connect(line) as connection:
        sent_and_back(connection, b"before")
        line.stall()
        data = os.urandom(20_000_000)
        connection.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < len(data):
                sent += connection.send(data[sent : sent + 65536])
        assert sent < 8_000_000
        connection.settimeout(5)
        line.resume()
        rest = threading.Thread(target=connection.sendall, args=(data[sent : sent + 100_000],))
        rest.start()
        assert exactly(connection, sent + 100_000) == data[: sent + 100_000]
        rest.join()


def test_a_close_goes_through_a_stalled_line_only_when_it_moves_again(line, echo):
    with connect(line) as connection:
        sent_and_back(connection, b"before")
        line.stall(Way.UP)
    time.sleep(0.2)
    assert echo.endings == []
    line.resume()
    until(lambda: echo.endings == ["closed"], 5)


def test_a_reset_reaches_both_ends(line, echo):
    with connect(line) as connection:
        sent_and_back(connection, b"before")
        assert line.reset() == 1
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        assert line.connections[0].ended == "reset"
        until(lambda: echo.endings == ["ConnectionResetError"], 5)
    with connect(line) as connection:
        sent_and_back(connection, b"after")


def test_a_flapping_line_resets_so_many_connections_each_after_so_many_bytes(line):
    line.reset_each(3, after_bytes=1000)
    with connect(line) as connection:
        sent_and_back(connection, b"too short to be counted")
    for _ in range(3):
        with connect(line) as connection, pytest.raises(ConnectionError):
            list(map(connection.sendall, itertools.repeat(bytes(100))))
    with connect(line) as connection:
        sent_and_back(connection, bytes(10_000))
    assert [connection.up_bytes for connection in line.connections[1:]] == [1000, 1000, 1000, 10_000]
    assert [connection.ended for connection in line.connections[1:4]] == ["reset"] * 3
    assert line.resets_left == 0


def test_a_line_refuses_takes_without_an_answer_or_is_deaf_until_it_is_mended(line, echo):
    with connect(line) as old:
        sent_and_back(old, b"x")
        line.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(line)
        line.tarpit()
        with connect(line, 0.2) as connection:
            connection.sendall(b"hello?")
            with pytest.raises(TimeoutError):
                connection.recv(1)
        assert line.tarpitted == 1
        line.deaf()
        with pytest.raises(TimeoutError):
            connect(line, 0.3)
        sent_and_back(old, b"all that time")
        line.mend()
        with connect(line) as connection:
            sent_and_back(connection, b"x")


def test_where_the_server_behind_is_gone_a_connection_is_reset():
    with Proxy(free_port()) as line:
        with pytest.raises(ConnectionResetError), connect(line) as connection:
            connection.recv(1)
        assert line.connections[0].ended == "refused"


@pytest.mark.needs("openssl")
def test_tls_ends_at_the_line_with_its_faults(tmp_path, echo):
    pem = certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=str(pem))
    with Proxy(echo.port, tls=tls_server(pem)) as line:
        with (
            connect(line) as connection,
            trusting.wrap_socket(connection, server_hostname="127.0.0.1") as secure,
        ):
            for _ in range(30):
                data = os.urandom(10_000)
                secure.sendall(data)  # and no thread beside it: a TLS socket may not be read while it is written to
                assert exactly(secure, len(data)) == data
            line.reset()
            # Python's TLS shows its reader an end; the socket knows better.
            until(lambda: secure.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET, 5)
        with connect(line) as connection, pytest.raises(ssl.SSLCertVerificationError):
            ssl.create_default_context().wrap_socket(connection, server_hostname="127.0.0.1")
        assert line.url("rtmp://127.0.0.1:1/live/key") == f"rtmps://127.0.0.1:{line.port}/live/key"


# The server.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RtmpServer]:
    with RtmpServer(tmp_path_factory.mktemp("nginx")) as nginx:
        yield nginx


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("film") / "film.flv", 4, late_ms=lambda at_s: 25.0)


def publisher(film: Path, url: str, *options: str, real_time: bool = True) -> subprocess.Popen[bytes]:
    ffmpeg = find_program("ffmpeg")
    assert ffmpeg is not None
    pace = ["-re"] if real_time else []
    return subprocess.Popen(
        [ffmpeg, "-v", "error", *pace, "-i", film, "-c", "copy", *options, "-f", "flv", url],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def ended(process: subprocess.Popen[bytes], limit_s: float = 20.0) -> int:
    try:
        return process.wait(limit_s)
    finally:
        process.kill()
        process.wait()


@pytest.mark.needs("nginx", "ffmpeg")
def test_the_server_records_each_connection_of_a_stream(server, film):
    for _ in range(2):
        assert ended(publisher(film, server.url("twice"), real_time=False)) == 0
        until(lambda: "twice" not in server.stat(), 5)
    recordings = server.recordings("twice")
    assert len(recordings) == len(server.publishings("twice")) == 2
    for recording in recordings:
        reading = skew.read(recording)
        assert reading.frames >= 98
        assert reading.skew.pairs >= 3
        assert reading.skew.ms == pytest.approx(25, abs=WITHIN_MS)


@pytest.mark.needs("nginx", "ffmpeg")
def test_a_stream_is_watched_while_it_is_sent(server, film):
    process = publisher(film, server.url("watched"))
    until(lambda: server.recordings("watched"), 10)
    with (
        skew.Watch(server.recordings("watched")[0], growing=True) as recorded,
        skew.Watch(server.url("watched")) as pulled,
    ):
        until(lambda: server.stat()["watched"].video == "H264", 5)
        assert server.stat()["watched"].publishing
        assert ended(process) == 0
        until(lambda: pulled.reading.ended, 15)
    (begun,) = server.publishings("watched")
    assert 0 <= recorded.reading.first_arrival_s - begun.at_s < 1.0
    assert recorded.reading.skew.ms == pytest.approx(25, abs=WITHIN_MS)
    # Sent in real time: flashes arrive as far apart as they are in the stream.
    arrived, shown = np.array(recorded.reading.arrivals), np.array(recorded.reading.flashes)
    assert np.diff(arrived) == pytest.approx(np.diff(shown), abs=0.2)
    assert pulled.reading.skew.pairs >= 1
    assert pulled.reading.skew.ms == pytest.approx(25, abs=WITHIN_MS)


@pytest.mark.needs("nginx", "ffmpeg")
def test_a_server_that_is_killed_comes_back_on_its_port_and_one_that_is_frozen_goes_on(server, film):
    process = publisher(film, server.url("killed"))
    until(lambda: server.recordings("killed"), 10)
    server.kill()
    assert ended(process) != 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), 1)
    server.start()
    process = publisher(film, server.url("killed"))
    until(lambda: len(server.recordings("killed")) == 2, 10)
    size = lambda: server.recordings("killed")[1].stat().st_size
    server.freeze()
    time.sleep(0.1)
    before = size()
    time.sleep(0.4)
    assert size() == before
    server.thaw()
    until(lambda: size() > before, 5)
    server.drop("killed")
    assert ended(process) != 0


@pytest.mark.needs("nginx", "ffmpeg")
def test_a_stream_can_be_refused_by_its_key(server, film):
    server.accept = lambda key: key != "wrong"
    try:
        assert ended(publisher(film, server.url("wrong"))) != 0
    finally:
        server.accept = lambda key: True
    assert len(server.publishings("wrong", accepted=False)) == 1
    assert server.recordings("wrong") == []


@pytest.mark.needs("nginx", "ffmpeg", "openssl")
def test_with_a_line_before_it_the_server_speaks_rtmps(server, film, tmp_path):
    with Proxy(server.port, tls=tls_server(certificate(tmp_path))) as line:
        assert ended(publisher(film, line.url(server.url("secure")), real_time=False)) == 0
    assert skew.read(server.recordings("secure")[0]).frames >= 98


@pytest.mark.needs("nginx")
def test_two_servers_get_along(server, tmp_path):
    with RtmpServer(tmp_path) as other:
        assert other.port != server.port
        (other.www / "a.txt").write_text("hello")
        assert other.stat() == {}
        pid = other.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# Processes.

GROWING = """
import os, subprocess, sys, threading, time
# Ends with its input, and so with us.
child = subprocess.Popen([sys.executable, "-m", "json.tool"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
kept = []
while True:
    if sys.argv[1] == "leak":
        kept += [bytearray(os.urandom(1) * 300_000), open(os.devnull)]
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    time.sleep(0.03)
"""


@pytest.fixture
def growing() -> Iterator[Callable[[str], int]]:
    started = []

    def start(how: str) -> int:
        started.append(subprocess.Popen([sys.executable, "-c", GROWING, how], env={**os.environ, "SECRET": "hunter2"}))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait(5)


def test_what_leaks_is_seen_and_what_does_not_is_flat(growing):
    leak, flat = growing("leak"), growing("flat")
    until(lambda: procs.children(leak, "json.tool") and procs.children(flat, "json.tool"), 10)
    time.sleep(0.3)
    with procs.ProcessWatch(leak, 0.1) as leaking, procs.ProcessWatch(flat, 0.1) as still:
        time.sleep(1.5)
    seconds = 1.5 / 3600
    assert leaking.slope("rss") * seconds > 4e6
    assert leaking.slope("descriptors") * seconds > 15
    assert leaking.slope("threads") * seconds > 15
    assert abs(still.slope("rss")) * seconds < 1e6
    assert still.slope("descriptors") == still.slope("threads") == 0
    summary = still.summary()
    assert summary["processes"]["most"] == 2
    assert summary["peak_rss_mib"]["json.tool"] > 5
    assert 0 <= summary["cores"] < 1
    assert any("SECRET=hunter2" in line for line in procs.command_lines(flat))


def test_samples_are_thinned_and_the_watch_ends_with_its_process(growing, monkeypatch):
    monkeypatch.setattr(procs, "MOST_SAMPLES", 10)
    pid = growing("flat")
    with procs.ProcessWatch(pid, 100) as watch:
        for _ in range(15):
            watch.sample()
        assert 4 <= len(watch.samples) <= 11
        os.kill(pid, signal.SIGKILL)
        until(lambda: watch.sample() is None, 5)


def test_the_command_is_run_with_its_events_and_its_processes(tmp_path):
    wav = write_sound(tmp_path / "speech.wav", Speech().samples(0, 20 * RATE), RATE)
    out = tmp_path / "out.mp4"
    with Live(tmp_path / "place", [out], audio=str(wav), format=None) as live:
        assert os.path.exists(f"/proc/{live.engine()}")
        assert live.end() == 0
        assert live.events[-1]["frames"] == 500
        with pytest.raises(EOFError, match="ended with 0 without 'never'"):
            live.wait_for("never")
    reading = skew.read(out)
    assert (reading.lone_flashes, reading.lone_clicks, reading.skew.pairs) == (0, 0, 20)
    assert reading.skew.max < WITHIN_MS


def test_of_a_command_that_is_left_nothing_stays(tmp_path):
    options = "--set=model.options.step_s=1"
    wav = write_sound(tmp_path / "speech.wav", Speech().samples(0, 20 * RATE), RATE)
    with Live(tmp_path / "place", [tmp_path / "out.mp4"], options, audio=str(wav), format=None) as live:
        pids = [live.pid, live.engine()]
    for pid in pids:
        until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), 5)


async def test_the_heartbeat_tells_how_long_the_loop_was_blocked():
    async with procs.LoopWatch() as watch:
        await asyncio.sleep(0.05)
        time.sleep(0.2)  # noqa: ASYNC251
        await asyncio.sleep(0.05)
    assert 0.15 < watch.worst_s < 1.0
