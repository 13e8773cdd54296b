"""The page with the daemon behind it: from a click to a picture that moves with the voice."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Watched, chromium, visit, watch, watched
from live import TOY
from mp4 import write_sound
from playwright.sync_api import Page, expect
from proxy import free_port
from waiting import until

pytestmark = pytest.mark.needs("chromium")

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MOST_DELAY_S = 2.0
"""From a sound at the microphone to its picture on the screen."""


@contextlib.contextmanager
def daemon(place: Any, model: str, **settings: object) -> Iterator[str]:
    """`avatard serve` with that model; its address, once the model is warm."""
    port = free_port()
    given = {
        "model.name": model,
        "daemon.state": place.folder / "state",
        "daemon.outputs": place.folder / "results",
        "jobs.min_free_gb": 0,
        "http.port": port,
        **settings,
    }
    assignments = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    log = (place.folder / "log").open("w")
    process = subprocess.Popen(
        place.command("serve", *assignments), stderr=log, cwd=place.folder, env=place.environment()
    )
    address = f"http://127.0.0.1:{port}/"
    try:
        until(lambda: process.poll() is not None or is_ready(address), 120, f"{address}readyz")
        assert process.poll() is None, (place.folder / "log").read_text()
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, (place.folder / "log").read_text()
    finally:
        process.kill()
        process.wait(10)
        log.close()


def is_ready(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}readyz", timeout=5) as answer:
        return answer.status == 200
    return False


def make_clip(page: Page, image: Path, audio: Path, limit_s: float) -> Watched:
    """Through the form to the video, and what that shows while it is played."""
    page.locator("#clip-image input").set_input_files(image)
    page.locator("#clip-audio input").set_input_files(audio)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#clip-done")).to_be_visible(timeout=limit_s * 1000)
    video = page.locator("#clip-video")
    watch(page, "#clip-video")
    video.evaluate("(video) => video.play()")
    page.wait_for_function("() => document.getElementById('clip-video').ended", timeout=limit_s * 1000)
    return watched(page)


def speak_live(page: Page, seconds: float) -> Watched:
    """Go on air, open the microphone, and watch."""
    page.get_by_role("link", name="Live").click()
    page.get_by_role("button", name="Go on air").click()
    page.wait_for_function("() => document.getElementById('live-video').currentTime > 0.5", timeout=60_000)
    watch(page, "#live-video")
    page.get_by_role("button", name="Microphone").click()
    page.wait_for_timeout(1000 * seconds)
    found = watched(page)
    page.get_by_role("button", name="End").click()
    expect(page.get_by_text("The session has ended.")).to_be_visible()
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


def test_a_clip_flashes_when_its_sound_does(place: Any) -> None:
    with daemon(place, TOY) as address, chromium() as browser, visit(browser, address) as seen:
        shown = make_clip(seen.page, place.image, place.audio, 30)
        brightness = shown.pictures.mean((1, 2))
        assert brightness.max() > 180
        assert shown.media_s[brightness.argmax()] == pytest.approx(1.0, abs=0.1)
        assert np.median(brightness) < 120


def test_live_the_picture_follows_the_microphone_within_two_seconds(place: Any, tmp_path: Path) -> None:
    microphone = beeps(tmp_path / "beeps.wav", 2.5, 10.0)
    with (
        daemon(place, TOY) as address,
        chromium(microphone) as browser,
        visit(browser, address, listening=True) as seen,
    ):
        found = speak_live(seen.page, 8.0)
    loud = onsets(found.heard_at, found.loudness > 0.5, 1.0)
    bright = onsets(found.seen_at, found.pictures.mean((1, 2)) > 160, 1.0)
    took = delays(loud, bright)
    print(f"microphone to picture: {np.round(took, 2)} s")
    assert len(took) >= 2
    assert np.median(took) < MOST_DELAY_S
