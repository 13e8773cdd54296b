"""Chromium as a person's browser: what it shows, what it hears, and what it must never do.

Use only in tests marked `needs("chromium")`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from conftest import find_program
from playwright.sync_api import Browser, Error, Page, Request, sync_playwright

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)


@contextlib.contextmanager
def chromium(microphone: Path | None = None) -> Iterator[Browser]:
    """A browser whose microphone hears that WAV file again and again; without one, a beep every second."""
    heard = () if microphone is None else (f"--use-file-for-fake-audio-capture={microphone}",)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_program("chromium"), args=[*ARGUMENTS, *heard])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """One page at `address`, with all that it asked for and complained about.

    errors: of its scripts, and what the content security policy refused. strangers: addresses of other servers that
    it asked for. forgiven: parts of errors that the test provokes.
    """

    page: Page
    address: str
    errors: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    forgiven: list[str] = field(default_factory=list)

    @property
    def strangers(self) -> list[str]:
        home = urlsplit(self.address).netloc
        called = [request.url for request in self.requests]
        return [
            url
            for url in called
            if urlsplit(url).scheme in ("http", "https", "ws", "wss") and urlsplit(url).netloc != home
        ]

    def complaints(self) -> list[str]:
        return [error for error in self.errors if not any(part in error for part in self.forgiven)]

    def leave(self) -> None:
        """Go away from the page, and forget all of it."""
        self.page.evaluate("localStorage.clear(); sessionStorage.clear()")
        self.page.goto("about:blank")
        for noted in (self.errors, self.requests, self.forgiven):
            noted.clear()

    def check(self) -> None:
        """The page has asked nobody but its server, and neither its scripts nor its policy have complained."""
        assert not self.strangers, self.strangers
        assert not self.complaints(), self.complaints()


@contextlib.contextmanager
def visit(browser: Browser, address: str, *, script: str = "", **options: Any) -> Iterator[Visit]:
    """A person with a browser of their own at a page; options as for `Browser.new_context`.

    script: runs before those of the page; see HEAR. At the end the visit is checked.
    """
    options = {"permissions": ["microphone"], "locale": "en-GB", **options}
    context = browser.new_context(**options)
    context.set_default_timeout(8_000)
    context.add_init_script(script)
    page = context.new_page()
    seen = Visit(page, address)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda line: seen.errors.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: seen.requests.append(request))
    try:
        page.goto(address)
        yield seen
    finally:
        with contextlib.suppress(Error):
            context.close()
    seen.check()


PIXELS = """(video) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(video, 0, 0);
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    let sum = 0;
    for (let at = 0; at < data.length; at += 4) sum += data[at] + data[at + 1] + data[at + 2];
    return sum / (data.length / 4) / 3;
}"""
"""Mean brightness of a video element's picture, 0 to 255."""

HEAR = """(() => {
    const heard = (window.heard = []);
    const send = WebSocket.prototype.send;
    WebSocket.prototype.send = function (data) {
        if (data instanceof ArrayBuffer) {
            const peak = new Int16Array(data).reduce((most, value) => Math.max(most, Math.abs(value)), 0);
            heard.push([performance.now() / 1000, peak / 32768]);
        }
        return send.call(this, data);
    };
})()"""
"""A script for `visit`: write down when the page sends sound, and how loud."""

SEE = """(video) => {
    const seen = (window.seen = []);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = %d;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const look = (now, { expectedDisplayTime, mediaTime }) => {
        context.drawImage(video, 0, 0, canvas.width, canvas.height);
        const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
        const grey = [];
        for (let at = 0; at < data.length; at += 4) grey.push(Math.round((data[at] + data[at + 1] + data[at + 2]) / 3));
        seen.push([expectedDisplayTime / 1000, mediaTime, grey]);
        video.requestVideoFrameCallback(look);
    };
    video.requestVideoFrameCallback(look);
}"""

GRID = 32


@dataclass(frozen=True)
class Watched:
    """What a page did, on its own clock in seconds.

    heard_at, loudness: pieces of sound that it sent, and their peaks. seen_at, media_s, pictures [n, GRID, GRID]:
    frames that were shown, their place in the stream, and what was on them, in grey.
    """

    heard_at: np.ndarray
    loudness: np.ndarray
    seen_at: np.ndarray
    media_s: np.ndarray
    pictures: np.ndarray


def watch(page: Page, selector: str) -> None:
    """Begin to write down what a video element shows."""
    page.locator(selector).evaluate(SEE % GRID)


def watched(page: Page) -> Watched:
    """What was written down. What was heard is there if the page was visited with HEAR."""
    heard, seen = page.evaluate("[window.heard ?? [], window.seen ?? []]")
    sounds = np.array(heard, float).reshape(-1, 2)
    return Watched(
        sounds[:, 0],
        sounds[:, 1],
        np.array([at for at, _, _ in seen]),
        np.array([media for _, media, _ in seen]),
        np.array([grey for _, _, grey in seen], float).reshape(-1, GRID, GRID),
    )
