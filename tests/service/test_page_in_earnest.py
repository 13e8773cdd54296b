"""The page with the daemon behind it: from a click to a picture that moves with the voice."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import HEAR, Visit, Watched, chromium, visit, watch, watched
from live import FLASHING, TOY
from mp4 import write_sound
from playwright.sync_api import Page, expect
from proxy import free_port
from rtmp import RtmpServer
from waiting import until

pytestmark = pytest.mark.needs("chromium")

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
MOST_DELAY_S = 2.0
"""From a sound at the microphone to its picture on the screen."""


@contextlib.contextmanager
def daemon(folder: Path, model: str, **settings: object) -> Iterator[str]:
    """`avatard serve` with that model, all of it in that folder; its address, once the model is warm."""
    port = free_port()
    given = {
        "model.name": model,
        "daemon.state": folder / "state",
        "daemon.outputs": folder / "results",
        "jobs.min_free_gb": 0,
        "http.port": port,
        **settings,
    }
    assignments = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "service.cli", "serve", *assignments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stderr=log, cwd=folder, env=environment)
    address = f"http://127.0.0.1:{port}/"
    try:
        until(lambda: process.poll() is not None or is_ready(address), 120, f"{address}readyz")
        assert process.poll() is None, (folder / "log").read_text()
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, (folder / "log").read_text()
    finally:
        process.kill()
        process.wait(10)
        log.close()


def is_ready(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}readyz", timeout=5) as answer:
        return answer.status == 200
    return False


def make_clip(page: Page, image: Path, audio: Path, limit_s: float, rate: float = 1.0) -> Watched:
    """Through the form to the video, and what that shows while it is played at that rate.

    A browser without time for it leaves frames out; at a slow rate it has time for each.
    """
    page.locator("#clip-image input").set_input_files(image)
    page.locator("#clip-audio input").set_input_files(audio)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#clip-done")).to_be_visible(timeout=limit_s * 1000)
    video = page.locator("#clip-video")
    watch(page, "#clip-video")
    video.evaluate(f"(video) => {{ video.playbackRate = {rate}; return video.play(); }}")
    page.wait_for_function("() => document.getElementById('clip-video').ended", timeout=limit_s * 1000)
    return watched(page)


def go_live(page: Page) -> None:
    page.get_by_role("link", name="Live").click()
    page.get_by_role("button", name="Go on air").click()
    page.wait_for_function("() => document.getElementById('live-video').currentTime > 0.5", timeout=60_000)


def speak_live(page: Page, seconds: float) -> Watched:
    """Go on air, open the microphone, and watch. Skips where the model does not keep up, as the page itself says."""
    go_live(page)
    watch(page, "#live-video")
    page.get_by_role("button", name="Microphone").click()
    page.wait_for_timeout(1000 * seconds)
    found = watched(page)
    load = page.locator("[data-figure=load]").inner_text()
    page.get_by_role("button", name="End").click()
    expect(page.get_by_text("The session has ended.")).to_be_visible()
    if int(load.rstrip(" %").replace(",", "")) > 100:
        pytest.skip(f"a block takes the model {load} of the time that it lasts: too slow for live, now and here")
    return found


def onsets(at: np.ndarray, high: np.ndarray, apart_s: float) -> np.ndarray:
    """When something begins that was not there for so long."""
    times = at[high]
    return times[np.diff(times, prepend=-np.inf) > apart_s]


def delays(loud: np.ndarray, bright: np.ndarray) -> np.ndarray:
    """Seconds from each sound to the first picture of it, as far as both were seen."""
    return np.array([later[0] - at for at in loud if len(later := bright[bright > at])])


def beeps(path: Path, every_s: float, seconds: float) -> Path:
    """Loud tones of 0.2 s, so often."""
    at = np.arange(round(seconds * 48_000)) / 48_000
    return write_sound(path, 0.95 * np.sin(2 * np.pi * 800 * at) * (at % every_s < 0.2), 48_000)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """A page before a daemon with the toy model, and a microphone that beeps."""
    folder = tmp_path_factory.mktemp("daemon")
    microphone = beeps(folder / "beeps.wav", 2.5, 10.0)
    with daemon(folder, TOY) as address, chromium(microphone) as browser, visit(browser, address, script=HEAR) as seen:
        yield seen


def test_a_clip_flashes_when_its_sound_does(seen: Visit, place: Any) -> None:
    shown = make_clip(seen.page, place.image, place.audio, 30, rate=0.25)
    brightness = shown.pictures.mean((1, 2))
    assert brightness.max() > 180
    assert shown.media_s[brightness.argmax()] == pytest.approx(1.0, abs=0.1)
    assert np.median(brightness) < 120


def test_live_the_picture_follows_the_microphone_within_two_seconds(seen: Visit) -> None:
    found = speak_live(seen.page, 7.0)
    loud = onsets(found.heard_at, found.loudness > 0.5, 1.0)
    bright = onsets(found.seen_at, found.pictures.mean((1, 2)) > 160, 1.0)
    took = delays(loud, bright)
    print(f"microphone to picture: {np.round(took, 2)} s")
    assert len(took) >= 2
    assert np.median(took) < MOST_DELAY_S


@pytest.mark.slow
@pytest.mark.needs("nginx")
def test_an_output_given_on_the_page_reaches_the_server_until_it_is_taken_away(tmp_path: Path) -> None:
    """About ten seconds."""
    allowed = {"sessions.private_targets": True}
    with (
        RtmpServer(tmp_path / "rtmp") as server,
        daemon(tmp_path, TOY, **allowed) as address,
        chromium() as browser,
        visit(browser, address) as seen,
    ):
        page = seen.page
        go_live(page)
        page.get_by_label("RTMP server").fill(server.url("").rstrip("/"))
        page.get_by_label("Stream key").fill("k3y-of-mine")
        page.get_by_role("button", name="Add output").click()
        lanes = page.locator("#live-lanes")
        expect(lanes).to_contain_text("sending", timeout=20_000)
        assert len(server.publishings("k3y-of-mine")) == 1
        assert "k3y-of-mine" not in page.content()
        page.get_by_role("button", name="Remove rtmp").click()
        expect(lanes.locator("li")).to_have_count(0)
        until(lambda: [event for event in server.events if event.event == "publish_done"], 20)
        assert "k3y-of-mine" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.needs("espeak-ng")
def test_with_a_token_a_text_becomes_a_clip_and_is_said_live(tmp_path: Path) -> None:
    """About fifteen seconds. The token reaches the video, the events and the sockets."""
    token = tmp_path / "token"
    token.write_text("0123456789-s3cr3t-abcdef")
    token.chmod(0o600)
    tokens = {"auth.tokens": f"[{{name: me, scopes: [read, jobs, live], file: {token}}}]"}
    with daemon(tmp_path, TOY, **tokens) as address, chromium() as browser, visit(browser, address) as seen:
        seen.forgiven.append("401")
        page = seen.page
        page.get_by_text("Text", exact=True).first.click()
        page.locator("#clip-text").fill("Good morning.")
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("dialog").get_by_label("Token").fill(token.read_text())
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#clip-done")).to_be_visible(timeout=30_000)
        page.locator("#clip-video").evaluate("(video) => video.play()")
        page.wait_for_function("() => document.getElementById('clip-video').currentTime > 0.3")
        go_live(page)
        page.get_by_label("Text to say").fill("Good morning. " * 20)
        page.get_by_role("button", name="Say").click()
        expect(page.locator("#live-badge")).to_have_text("Speaking")
        page.keyboard.press("Escape")
        expect(page.locator("#live-note")).to_have_text(re.compile(r"Interrupted; \d+\.\d s left out\."))
        expect(page.locator("#live-badge")).to_have_text("On air")
        assert "s3cr3t" not in (tmp_path / "log").read_text()


# The embedded model: does the mouth move when there is speech?

MOUTH = np.s_[18:22, 12:19]
"""Where the mouth of examples/presenter.png is in a picture of 32 x 32, wherever the head sways."""


def speech_and_silence(path: Path, folder: Path, silence_s: float) -> tuple[Path, list[tuple[float, float]]]:
    """Two sentences of espeak-ng, silence around each. Gives the file and when there is speech, in seconds."""
    import soundfile

    pieces, spans, at = [np.zeros(round(silence_s * 48_000))], [], silence_s
    for number, text in enumerate(
        ("Hello, and welcome to a wonderful morning.", "Maybe we will open all the windows now.")
    ):
        spoken = folder / f"{number}.wav"
        subprocess.run(["espeak-ng", "-w", spoken, "-s", "150", text], check=True, timeout=30)
        sound, rate = soundfile.read(spoken)
        sound = np.interp(np.arange(0, len(sound), rate / 48_000), np.arange(len(sound)), sound)
        pieces += [sound / np.abs(sound).max() * 0.8, np.zeros(round(silence_s * 48_000))]
        spans.append((at, at + len(sound) / 48_000))
        at = spans[-1][1] + silence_s
    return write_sound(path, np.concatenate(pieces), 48_000), spans


def movement(pictures: np.ndarray) -> np.ndarray:
    """How much the mouth's part of each picture differs from that of the one before."""
    mouth = pictures[(slice(None), *MOUTH)]
    return np.abs(np.diff(mouth, axis=0, prepend=mouth[:1])).mean((1, 2))


def follows_after(at: np.ndarray, moved: np.ndarray, heard_at: np.ndarray, loudness: np.ndarray) -> tuple[float, float]:
    """By how many seconds the mouth follows the voice, and how well: the best correlation of the two within 3 s."""
    clock = np.arange(max(at[0], heard_at[0]) + 3.0, min(at[-1], heard_at[-1]), 0.02)
    smooth = np.ones(25) / 25
    mouth = np.convolve(np.interp(clock, at, moved), smooth, "same")
    lags = np.arange(0, 3.0, 0.02)
    voice = [np.convolve(np.interp(clock - lag, heard_at, loudness), smooth, "same") for lag in lags]
    fits = [float(np.corrcoef(mouth, one)[0, 1]) for one in voice]
    best = int(np.argmax(fits))
    return float(lags[best]), fits[best]


@pytest.mark.slow
@pytest.mark.needs("espeak-ng")
def test_a_clip_of_the_embedded_model_moves_its_mouth_when_it_speaks(tmp_path: Path) -> None:
    """About half a minute on two quiet cores."""
    audio, spans = speech_and_silence(tmp_path / "speech.wav", tmp_path, 2.0)
    with daemon(tmp_path, "pocket") as address, chromium() as browser, visit(browser, address) as seen:
        shown = make_clip(seen.page, EXAMPLES / "presenter.png", audio, 300)
    moved = movement(shown.pictures)
    speaking = np.any([(shown.media_s > start) & (shown.media_s < end) for start, end in spans], axis=0)
    silent = ~np.any([(shown.media_s > start - 0.3) & (shown.media_s < end + 0.5) for start, end in spans], axis=0)
    silent &= shown.media_s > 0.5
    print(f"clip: the mouth moves {moved[speaking].mean():.2f} while speaking, {moved[silent].mean():.2f} while silent")
    assert moved[speaking].mean() > 1.5 * moved[silent].mean()


@pytest.mark.slow
@pytest.mark.needs("espeak-ng")
def test_live_the_mouth_of_the_embedded_model_moves_with_the_microphone(tmp_path: Path) -> None:
    """About a minute."""
    audio, _ = speech_and_silence(tmp_path / "speech.wav", tmp_path, 2.5)
    with (
        daemon(tmp_path, "pocket") as address,
        chromium(audio) as browser,
        visit(browser, address, script=HEAR) as seen,
    ):
        found = speak_live(seen.page, 30.0)
    moved = movement(found.pictures)
    after_s, fit = follows_after(found.seen_at, moved, found.heard_at, found.loudness)
    loud = np.convolve(found.loudness, np.ones(15) / 15, "same")
    voice = np.interp(found.seen_at - after_s, found.heard_at, loud)
    speaking, silent = moved[voice > 0.2 * loud.max()].mean(), moved[voice < 0.02 * loud.max()].mean()
    print(f"live: the mouth moves {speaking:.2f} while speaking, {silent:.2f} while silent; {after_s:.2f} s, {fit:.2f}")
    assert speaking > 1.5 * silent


@pytest.mark.slow
def test_live_the_embedded_model_shows_a_sound_within_two_seconds(tmp_path: Path) -> None:
    """About half a minute."""
    microphone = beeps(tmp_path / "beeps.wav", 2.5, 10.0)
    with (
        daemon(tmp_path, FLASHING) as address,
        chromium(microphone) as browser,
        visit(browser, address, script=HEAR) as seen,
    ):
        found = speak_live(seen.page, 15.0)
    loud = onsets(found.heard_at, found.loudness > 0.5, 1.0)
    brightness = found.pictures.mean((1, 2))
    bright = onsets(found.seen_at, brightness > (np.median(brightness) + 255) / 2, 1.0)
    took = delays(loud, bright)
    print(f"microphone to picture of the embedded model: {np.round(took, 2)} s")
    assert np.median(took) < MOST_DELAY_S
