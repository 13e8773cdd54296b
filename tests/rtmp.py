"""nginx with its RTMP module as the server at the far side: it can be killed, frozen, told to refuse, and it records.

Use only in tests marked `needs("nginx")`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

from conftest import find_program
from proxy import free_port
from waiting import until

MODULES = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules")

CONFIG = """
daemon off; master_process off; pid {folder}/nginx.pid;
load_module {module};
events {{ worker_connections 512; }}
rtmp {{
  server {{
    listen 127.0.0.1:{port};
    application live {{
      live on; wait_key on; wait_video on; publish_notify on;
      record all; record_path {folder}/recording; record_suffix .flv; record_unique off; record_append off;
      notify_method get;
      on_publish http://127.0.0.1:{asked}/publish;
      on_publish_done http://127.0.0.1:{asked}/publish_done;
    }}
  }}
}}
http {{
  access_log off;
  client_body_temp_path {folder}/temp/body; proxy_temp_path {folder}/temp/proxy;
  fastcgi_temp_path {folder}/temp/fastcgi; uwsgi_temp_path {folder}/temp/uwsgi; scgi_temp_path {folder}/temp/scgi;
  types {{ application/vnd.apple.mpegurl m3u8; video/mp4 mp4 m4s; video/mp2t ts; }}
  server {{
    listen 127.0.0.1:{http};
    location /stat {{ rtmp_stat all; }}
    location /control {{ rtmp_control all; }}
    location / {{ root {folder}/www; add_header Cache-Control no-cache; }}
  }}
}}
"""


@dataclass(frozen=True)
class Publishing:
    """Somebody asked to publish, or stopped: the stream's key, what was answered, and when (monotonic seconds)."""

    event: str
    key: str
    at_s: float
    accepted: bool
    recording: Path | None
    fields: dict[str, str] = field(default_factory=dict)


class RtmpServer:
    """nginx on free ports of 127.0.0.1, with all it writes in one folder. Use as a context manager, or start and stop.

    port, http_port: stay the same from one start to the next; www: what is laid here is served by `http_url`.
    events: all askings to publish and their ends, in order.
    accept: asked with a stream's key; False refuses it. answer_delay_s: how long the answer takes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.www = self.folder / "www"
        for name in ("recording", "www", "temp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.port, self.http_port = free_port(), free_port()
        self.events: list[Publishing] = []
        self.accept: Callable[[str], bool] = lambda key: True
        self.answer_delay_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._recordings: dict[str, list[Path]] = {}
        self._asked = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._asked.serve_forever, args=(0.05,), name="on_publish", daemon=True).start()
        (self.folder / "nginx.conf").write_text(
            CONFIG.format(
                folder=self.folder,
                module=next(path for path in _modules() if path.exists()),
                port=self.port,
                http=self.http_port,
                asked=self._asked.server_address[1],
            )
        )

    def __enter__(self) -> RtmpServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def url(self, key: str = "key") -> str:
        return f"rtmp://127.0.0.1:{self.port}/live/{key}"

    def http_url(self, name: str = "") -> str:
        return f"http://127.0.0.1:{self.http_port}/{name}"

    # What can happen to a server.

    def start(self) -> float:
        """Start it, on the ports it had; when it listened (monotonic seconds). Raises: TimeoutError."""
        assert self._process is None, "it runs already"
        nginx = find_program("nginx")
        assert nginx is not None
        self._process = subprocess.Popen(
            [nginx, "-p", self.folder, "-c", self.folder / "nginx.conf", "-e", self.folder / "error.log"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Its ports are opened together; a connection to this one leaves no trace in the RTMP log.
        until(self._answers, 10, f"nginx did not start, see {self.folder / 'error.log'}")
        return time.monotonic()

    def kill(self) -> None:
        """kill -9: its connections are reset by the kernel, and its recordings end where they were."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to go; it closes its connections."""
        self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP: the kernel goes on accepting and acknowledging for it, until its buffers are full."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def drop(self, key: str = "key") -> None:
        """Throw out who publishes that stream, as an operator does; the server stays."""
        with urllib.request.urlopen(self.http_url(f"control/drop/publisher?app=live&name={key}"), timeout=5):
            pass

    def close(self) -> None:
        if self._process is not None:
            self.stop()
        self._asked.shutdown()
        self._asked.server_close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    # What it saw.

    def recordings(self, key: str = "key") -> list[Path]:
        """A file for each connection that published this stream, in order; the last may be growing.

        nginx lets the timestamps of each begin at 0. A connection that never sent a frame left none.
        """
        return [path for path in self._recordings.get(key, []) if path.exists()]

    def publishings(self, key: str = "key", accepted: bool = True) -> list[Publishing]:
        """The times this stream was begun, or refused."""
        return [
            event
            for event in self.events
            if event.event == "publish" and (event.key, event.accepted) == (key, accepted)
        ]

    def stat(self) -> dict[str, StreamStat]:
        """What is being published now, by key, from the server's page of statistics."""
        with urllib.request.urlopen(self.http_url("stat"), timeout=5) as answer:
            page = ElementTree.fromstring(answer.read())
        return {stat.key: stat for stat in map(_stat, page.iter("stream"))}

    def log(self) -> str:
        path = self.folder / "error.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"nginx ended with {self._process.returncode}:\n{self.log()[-2000:]}")
        with contextlib.suppress(OSError):
            self.stat()
            return True
        return False

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)  # a frozen one does not hear anything but SIGKILL
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)

    def _asked_for(self, event: str, fields: dict[str, str]) -> bool:
        """nginx asks whether this stream may be published, or tells that it is over."""
        key = fields.get("name", "")
        asked_s = time.monotonic()
        if self.answer_delay_s and event == "publish":
            time.sleep(self.answer_delay_s)
        accepted = event != "publish" or self.accept(key)
        recording = self._new_recording(key) if event == "publish" and accepted else None
        self.events.append(Publishing(event, key, asked_s, accepted, recording, fields))
        return accepted

    def _new_recording(self, key: str) -> Path:
        """Have nginx record the connection that it is about to accept into a file of its own.

        It opens KEY.flv for each connection anew, once it has our answer, and follows a link there.
        """
        numbered = self._recordings.setdefault(key, [])
        path = self.folder / "recording" / f"{key}.{len(numbered):04}.flv"
        numbered.append(path)
        link, next_link = path.with_name(f"{key}.flv"), path.with_name(f"{key}.link")
        os.symlink(path.name, next_link)
        os.replace(next_link, link)
        return path


@dataclass(frozen=True)
class StreamStat:
    """One stream on the page of statistics. bits_in: a second, as nginx averages them."""

    key: str
    publishing: bool
    clients: int
    time_s: float
    bits_in: int
    width: int
    height: int
    frame_rate: float
    video: str
    audio: str
    sample_rate: int
    dropped: int


def _stat(stream: ElementTree.Element) -> StreamStat:
    def text(path: str, default: Any) -> Any:
        found = stream.findtext(path)
        return type(default)(found) if found else default

    return StreamStat(
        key=text("name", ""),
        publishing=stream.find("publishing") is not None,
        clients=text("nclients", 0),
        time_s=text("time", 0) / 1000,
        bits_in=text("bw_in", 0),
        width=text("meta/video/width", 0),
        height=text("meta/video/height", 0),
        frame_rate=text("meta/video/frame_rate", 0.0),
        video=text("meta/video/codec", ""),
        audio=text("meta/audio/codec", ""),
        sample_rate=text("meta/audio/sample_rate", 0),
        dropped=sum(int(client.findtext("dropped") or 0) for client in stream.iter("client")),
    )


def _modules() -> Iterator[Path]:
    return (Path(folder) / "ngx_rtmp_module.so" for folder in MODULES)


def _handler(server: RtmpServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            fields = {name: values[0] for name, values in parse_qs(parts.query).items()}
            accepted = server._asked_for(parts.path.strip("/"), fields)
            with contextlib.suppress(OSError):
                self.send_response(200 if accepted else 403)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
