"""Files that are read in processes of their own: the same as read here, and no harm whatever becomes of those."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
from PIL import Image
from waiting import until

from audio.decode import AudioError, open_sound
from avatar.picture import PictureError, read_picture
from service import isolated
from service.config import LimitsSection

LIMITS = LimitsSection()
RATE = 16_000


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Ten seconds in stereo, with a sample beyond full scale: more than fits into a socket unread."""
    path = tmp_path / "sound.wav"
    noise = np.random.default_rng(1).uniform(-1, 1, (441_000, 2)).astype(np.float32)
    noise[5] = 2.0
    soundfile.write(path, noise, 44_100, subtype="FLOAT")
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 40, 3), np.uint8)).save(path)
    return path


def reader() -> psutil.Process:
    """The one that forks."""
    assert isolated._READER._process is not None
    return psutil.Process(isolated._READER._process.pid)


def readers_of_files() -> list[psutil.Process]:
    return [process for process in reader().children() if process.status() != psutil.STATUS_ZOMBIE]


def gathered(chunks: Iterator) -> np.ndarray:
    return np.concatenate([chunk.samples for chunk in chunks])


# The same as here


def test_a_picture_is_the_same_as_read_here(picture):
    np.testing.assert_array_equal(isolated.picture(picture, LIMITS), read_picture(picture))


def test_a_sound_is_the_same_as_read_here_and_so_is_what_is_told_of_it(sound):
    here, apart = open_sound(sound), isolated.sound(sound, LIMITS)
    assert vars(apart) == vars(here)
    np.testing.assert_array_equal(gathered(apart.chunks(RATE)), gathered(here.chunks(RATE)))
    assert apart.report == here.report
    assert apart.report.clamped == 2
    mine, theirs = here.original(), apart.original()
    for samples in (1, 100_000, 10_000_000, 1):
        np.testing.assert_array_equal(theirs.read(samples), mine.read(samples))
    mono = apart.original(24_000, max_channels=1)
    assert mono.read(24_000).shape == (24_000, 1)
    mono.close()


def test_a_path_is_taken_from_where_we_stand(sound, picture, monkeypatch):
    monkeypatch.chdir(sound.parent)
    assert isolated.sound(Path("sound.wav"), LIMITS).channels == 2
    monkeypatch.chdir("/")
    with pytest.raises(PictureError, match=r"^picture.png: no such file"):
        isolated.picture(Path("picture.png"), LIMITS)


def test_what_cannot_be_used_is_told_as_here(tmp_path, picture, sound):
    for read_here, read_apart, path in (
        (read_picture, isolated.picture, sound),
        (open_sound, isolated.sound, picture),
        (open_sound, isolated.sound, tmp_path / "surrogate\udcff.wav"),
    ):
        with pytest.raises((PictureError, AudioError)) as here:
            read_here(path)
        with pytest.raises(here.type) as apart:
            read_apart(path, LIMITS)
        assert str(apart.value) == str(here.value)
    with pytest.raises(PictureError, match="scale it down"):
        isolated.picture(picture, LimitsSection(picture_megapixels=0.001))
    with pytest.raises(AudioError, match="the limit is"):
        isolated.sound(sound, LimitsSection(audio_hours=0.001))


def test_a_sound_that_breaks_off_has_given_what_came_before_and_says_so(sound):
    apart, came = replace(isolated.sound(sound, LIMITS), max_duration_s=2.0), []
    with pytest.raises(AudioError, match="more than"):
        came.extend(chunk.samples.size for chunk in apart.chunks(RATE))
    assert 1.5 * RATE < sum(came) <= 2.25 * RATE
    assert apart.report.decoded_s > 2.0


def test_what_a_process_does_not_expect_is_a_bug_with_its_trace(sound):
    with pytest.raises(RuntimeError, match="TypeError") as told:
        list(isolated.sound(sound, LIMITS).chunks("fast"))
    assert "service/isolated.py" in told.value.__notes__[0]


# Whatever becomes of those that read


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_file_that_ends_who_reads_it_is_an_error_of_one_line_and_others_go_on(sound, how):
    bad, good = (isolated.sound(sound, LIMITS).chunks(RATE) for _ in range(2))
    next(bad)
    (victim,) = readers_of_files()
    next(good)
    victim.send_signal(how)
    with pytest.raises(AudioError, match=r"^.*sound\.wav: is damaged so that it ends whatever reads it") as told:
        list(bad)
    assert "\n" not in str(told.value)
    assert gathered(good).size > 9 * RATE


def test_a_reader_that_was_killed_is_started_again(sound, picture):
    isolated.picture(picture, LIMITS)
    before, under_way = reader(), isolated.sound(sound, LIMITS).chunks(RATE)
    next(under_way)
    before.kill()
    before.wait(5)
    assert isolated.picture(picture, LIMITS).shape == (60, 40, 3)
    assert reader().pid != before.pid
    assert gathered(under_way).size > 9 * RATE, "what was forked goes on without it"


def test_what_a_reader_took_with_it_is_asked_of_the_next(picture):
    isolated.start()
    frozen, shapes = reader(), []
    frozen.suspend()
    asking = threading.Thread(target=lambda: shapes.append(isolated.picture(picture, LIMITS).shape))
    asking.start()
    time.sleep(0.2)  # for the socket to lie before it; without that it comes out well too
    frozen.kill()
    asking.join(10)
    assert shapes == [(60, 40, 3)]


def test_a_reader_that_stands_still_is_replaced(picture, monkeypatch):
    monkeypatch.setattr(isolated, "BEGIN_S", 3.0)
    isolated.picture(picture, LIMITS)
    frozen = reader()
    frozen.suspend()
    assert isolated.picture(picture, LIMITS).shape == (60, 40, 3)
    assert not frozen.is_running()


def test_a_reader_before_which_hundreds_lie_holds_nobody_up_for_ever(picture, monkeypatch):
    monkeypatch.setattr(isolated, "TAKE_S", 0.1)
    monkeypatch.setattr(isolated, "BEGIN_S", 3.0)
    isolated._READER.replace(isolated._READER._started())
    isolated.picture(picture, LIMITS)
    frozen = reader()
    frozen.suspend()
    for _ in range(400):
        ours, theirs = socket.socketpair()
        with ours, theirs, contextlib.suppress(TimeoutError):
            isolated._READER._socket.settimeout(0.001)
            socket.send_fds(isolated._READER._socket, [b"f"], [theirs.fileno()])
    assert isolated.picture(picture, LIMITS).shape == (60, 40, 3)
    assert not frozen.is_running()


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_one_that_stops_in_the_middle_of_an_answer_is_an_error_of_its_file(sound, how, monkeypatch):
    file = isolated.sound(sound, LIMITS)
    monkeypatch.setattr(isolated, "PATIENCE_S", 0.3)
    original = file.original()
    original.read(1)
    (victim,) = readers_of_files()
    time.sleep(0.2)  # until the socket is full, and it stands within a piece of 96 kB
    (victim.suspend if how == "frozen" else victim.kill)()
    with pytest.raises(AudioError, match=r"cannot be read in 0\.3 s" if how == "frozen" else "ends whatever reads it"):
        original.read(10_000_000)
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()


def test_one_that_says_more_than_it_was_asked_is_not_heard(picture, monkeypatch):
    monkeypatch.setattr(isolated, "MOST_HEADER_BYTES", 10)
    with pytest.raises(PictureError, match="takes too much"):
        isolated.picture(picture, LIMITS)


def test_without_a_descriptor_it_is_an_error_that_passes(picture):
    isolated.picture(picture, LIMITS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        os.close(taken.pop())
        with pytest.raises(PictureError, match=r"cannot be read \(Too many open files\); try again later"):
            isolated.picture(picture, LIMITS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)
    isolated.picture(picture, LIMITS)


def test_where_we_stand_may_be_gone(picture, tmp_path, monkeypatch):
    folder = tmp_path / "release"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert isolated.picture(picture, LIMITS).shape == (60, 40, 3)
    monkeypatch.chdir(tmp_path)


def test_a_sound_that_is_left_in_the_middle_leaves_no_process(sound):
    file = isolated.sound(sound, LIMITS)
    chunks, original = file.chunks(RATE), file.original()
    next(chunks)
    original.read(100)
    assert len(readers_of_files()) == 2
    chunks.close()
    original.close()
    until(lambda: not readers_of_files(), 5)


def test_many_threads_read_at_once(sound, picture):
    failures = []

    def read() -> None:
        try:
            for _ in range(3):
                assert isolated.picture(picture, LIMITS).shape == (60, 40, 3)
                assert gathered(isolated.sound(sound, LIMITS).chunks(RATE)).size == 160_000
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    until(lambda: not readers_of_files(), 5)


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("while True: pass", -signal.SIGXCPU, ""),
        ("import numpy; numpy.ones(1 << 29)", 1, "MemoryError"),
        (
            "import os; os.write(1, b'fine'); os.write(os.open(FILE, os.O_WRONLY | os.O_CREAT), b'x')",
            1,
            "File too large",
        ),
    ],
    ids=["time", "memory", "files"],
)
def test_a_process_that_takes_too_much_is_ended_or_refused(what, status, said, tmp_path):
    confined = "from service import isolated; isolated.CPU_S = 1; isolated._confine()"
    code = f"FILE = {str(tmp_path / 'written')!r}\n{confined}\n{what}"
    folder = Path(isolated.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert said in done.stderr


def test_a_secret_of_the_environment_is_not_where_files_are_read(picture, monkeypatch):
    isolated.picture(picture, LIMITS)
    isolated._READER.replace(isolated._READER._started())
    monkeypatch.setenv("AVATARD_SECRET", "swordfish")
    isolated.picture(picture, LIMITS)
    assert "swordfish" not in reader().environ().values()


def test_the_reader_ends_with_who_started_it():
    code = "import time; from service import isolated; isolated.start(); print(isolated._READER._process.pid, flush=1)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}; time.sleep(60)"],
        cwd=Path(isolated.__file__).parents[1],
        stdout=subprocess.PIPE,
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert psutil.pid_exists(pid)
        starter.kill()
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10)
