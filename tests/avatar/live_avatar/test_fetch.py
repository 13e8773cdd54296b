"""Downloading, from a hub that runs in this process: resume, checks, the lock file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from avatar.live_avatar.fetch import LOCK_NAME, SOURCES, FetchError, fetch
from avatar.live_avatar.weights import find_files

WAN, LORA = (source.repo for source in SOURCES)


def make_repos():
    shards = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": os.urandom(300_000) for i in (1, 2)}
    speech = "wav2vec2-large-xlsr-53-english/"
    return {
        WAN: {
            **shards,
            "config.json": b'{"model_type": "s2v"}',
            "diffusion_pytorch_model.safetensors.index.json": b'{"weight_map": {}}',
            "models_t5_umt5-xxl-enc-bf16.pth": os.urandom(200_000),
            "Wan2.1_VAE.pth": os.urandom(50_000),
            "google/umt5-xxl/tokenizer.json": b"{}",
            "google/umt5-xxl/spiece.model": os.urandom(1_000),
            f"{speech}config.json": b"{}",
            f"{speech}preprocessor_config.json": b"{}",
            f"{speech}model.safetensors": os.urandom(30_000),
            f"{speech}pytorch_model.bin": os.urandom(30_000),
            f"{speech}flax_model.msgpack": os.urandom(30_000),
            "assets/teaser.mp4": os.urandom(10_000),
            "LICENSE.txt": b"Apache",
        },
        LORA: {"liveavatar.safetensors": os.urandom(60_000), "README.md": b"hello"},
    }


class Hub:
    """A stand-in for the hub: the two endpoints huggingface_hub asks for metadata, and the files with ranges.

    Files over 10 kB are kept as LFS, which gives them a sha256. `cut` breaks each answer off after so many bytes while
    it is above zero; `spoil` files arrive with one wrong byte so many times.
    """

    def __init__(self):
        self.repos = make_repos()
        self.commits = {repo: hashlib.sha1(repo.encode()).hexdigest() for repo in self.repos}
        self.requests = []
        self.cut = {}
        self.spoil = {}
        self.ignore_ranges = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler):
        path = handler.path.partition("?")[0]
        self.requests.append((handler.command, path, handler.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self.info(handler, match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(handler, match[1], match[2], match[3])
        else:
            self.send(handler, 404, b"{}")

    def info(self, handler, repo, revision):
        if repo not in self.repos or revision not in ("main", "v2", self.commits[repo]):
            code = "RepoNotFound" if repo not in self.repos else "RevisionNotFound"
            self.send(handler, 404, b"{}", {"X-Error-Code": code})
            return
        siblings = []
        for name, data in self.repos[repo].items():
            entry = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
            if len(data) > 10_000:
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        body = {"id": repo, "modelId": repo, "sha": self.commits[repo], "siblings": siblings, "private": False}
        body |= {"downloads": 0, "likes": 0, "tags": [], "disabled": False, "gated": False}
        self.send(handler, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def file(self, handler, repo, commit, name):
        data = self.repos.get(repo, {}).get(name)
        if data is None or commit != self.commits[repo]:
            self.send(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.spoil.get(name, 0) > 0:
            self.spoil[name] -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
        status = 200
        if wanted and not self.ignore_ranges:
            first = int(wanted[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data, status = data[first:], 206
        cut = self.cut.get(name, [])
        self.send(handler, status, data, headers, cut.pop(0) if cut else None)

    def send(self, handler, status, body, headers=None, cut=None):
        handler.send_response(status)
        for key, value in (headers or {}).items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body[:cut])
        if cut is not None:
            handler.close_connection = True

    def ranges(self, name):
        return [wanted for _, path, wanted in self.requests if path.endswith(name)]

    def downloads(self):
        return [path.partition("/resolve/")[2].partition("/")[2] for _, path, _ in self.requests if "/resolve/" in path]


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


def get(hub, folder, **options):
    fetch(folder, endpoint=hub.url, retry_wait_s=0, **options)


def test_only_the_needed_files_come_and_make_a_model_folder(hub, tmp_path):
    get(hub, tmp_path)
    assert (tmp_path / "Wan2.2-S2V-14B" / "Wan2.1_VAE.pth").read_bytes() == hub.repos[WAN]["Wan2.1_VAE.pth"]
    assert find_files(tmp_path).lora == tmp_path / "Live-Avatar" / "liveavatar.safetensors"
    names = hub.downloads()
    assert len(names) == len(set(names)) == 13
    assert not [name for name in names if name.endswith((".mp4", ".msgpack", ".bin", ".md"))]
    assert not list(tmp_path.rglob("*.part"))


def test_the_lock_file_holds_commit_size_and_hash(hub, tmp_path):
    get(hub, tmp_path)
    repos = json.loads((tmp_path / LOCK_NAME).read_text())["repos"]
    assert repos[WAN]["commit"] == hub.commits[WAN]
    assert repos[WAN]["revision"] == "main"
    data = hub.repos[LORA]["liveavatar.safetensors"]
    facts = repos[LORA]["files"]["liveavatar.safetensors"]
    assert (facts["size"], facts["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_second_call_asks_the_hub_nothing(hub, tmp_path):
    get(hub, tmp_path)
    hub.requests.clear()
    get(hub, tmp_path)
    assert hub.requests == []


def test_a_moved_branch_does_not_change_a_locked_folder(hub, tmp_path):
    get(hub, tmp_path)
    hub.commits[WAN] = "f" * 40
    hub.repos[WAN]["Wan2.1_VAE.pth"] = b"new"
    get(hub, tmp_path)
    get(hub, tmp_path, revision="main")
    assert len((tmp_path / "Wan2.2-S2V-14B" / "Wan2.1_VAE.pth").read_bytes()) == 50_000
    get(hub, tmp_path, revision=f"{WAN}=v2")
    assert (tmp_path / "Wan2.2-S2V-14B" / "Wan2.1_VAE.pth").read_bytes() == b"new"


def test_a_broken_connection_is_taken_up_where_it_broke(hub, tmp_path):
    name = "models_t5_umt5-xxl-enc-bf16.pth"
    hub.cut[name] = [70_000, 20_000]
    get(hub, tmp_path)
    assert hub.ranges(name) == [None, "bytes=70000-", "bytes=90000-"]
    assert (tmp_path / "Wan2.2-S2V-14B" / name).read_bytes() == hub.repos[WAN][name]


def test_an_interrupted_fetch_goes_on_in_the_next_process(hub, tmp_path):
    name = "models_t5_umt5-xxl-enc-bf16.pth"
    hub.cut[name] = [70_000] + [0] * 20
    with pytest.raises(FetchError, match="call again to go on"):
        get(hub, tmp_path)
    assert (tmp_path / "Wan2.2-S2V-14B" / f"{name}.part").stat().st_size == 70_000
    hub.cut.clear()
    hub.requests.clear()
    get(hub, tmp_path)
    assert hub.ranges(name) == ["bytes=70000-"]
    assert "Wan2.1_VAE.pth" not in hub.downloads()  # it was whole
    assert find_files(tmp_path).text.read_bytes() == hub.repos[WAN][name]


def test_a_server_without_ranges_sends_all_of_it_again(hub, tmp_path):
    hub.cut["liveavatar.safetensors"] = [20_000]
    hub.ignore_ranges = True
    get(hub, tmp_path)
    path = tmp_path / "Live-Avatar" / "liveavatar.safetensors"
    assert path.read_bytes() == hub.repos[LORA]["liveavatar.safetensors"]


@pytest.mark.parametrize("name", ["liveavatar.safetensors", "config.json"])
def test_a_file_that_arrives_damaged_is_fetched_again_and_then_given_up(hub, tmp_path, name):
    hub.spoil[name] = 1
    get(hub, tmp_path)
    hub.spoil[name] = 9
    for path in tmp_path.rglob(name):
        path.unlink()
    with pytest.raises(FetchError, match=rf"{name}: arrived damaged twice"):
        get(hub, tmp_path)


def test_a_file_changed_on_disk_is_found_and_replaced(hub, tmp_path):
    get(hub, tmp_path)
    path = tmp_path / "Wan2.2-S2V-14B" / "Wan2.1_VAE.pth"
    path.write_bytes(b"x" * 50_000)
    get(hub, tmp_path)
    assert path.read_bytes() == hub.repos[WAN]["Wan2.1_VAE.pth"]


def test_verify_reads_every_file_again(hub, tmp_path):
    get(hub, tmp_path)
    path = tmp_path / "Wan2.2-S2V-14B" / "Wan2.1_VAE.pth"
    stat = path.stat()
    path.write_bytes(b"x" * 50_000)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    get(hub, tmp_path)
    assert path.read_bytes() == b"x" * 50_000
    get(hub, tmp_path, verify=True)
    assert path.read_bytes() == hub.repos[WAN]["Wan2.1_VAE.pth"]


def test_too_little_disk_space_is_said_before_the_first_byte(hub, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr("avatar.live_avatar.fetch.shutil.disk_usage", lambda path: usage)
    with pytest.raises(FetchError, match="GB are still to come"):
        get(hub, tmp_path)
    assert hub.downloads() == []


@pytest.mark.parametrize("revision", ["nothing", f"{WAN}=nothing"])
def test_an_unknown_revision_is_named(hub, tmp_path, revision):
    with pytest.raises(FetchError, match=f"{WAN} at nothing: not found"):
        get(hub, tmp_path, revision=revision)


def test_an_unknown_repository_in_a_revision_is_named(hub, tmp_path):
    with pytest.raises(FetchError, match="no repository someone/else"):
        get(hub, tmp_path, revision="someone/else=main")


def test_a_repository_without_a_needed_file_is_refused(hub, tmp_path):
    del hub.repos[WAN]["Wan2.1_VAE.pth"]
    with pytest.raises(FetchError, match=r"has no Wan2\.1_VAE\.pth"):
        get(hub, tmp_path)


def test_no_connection_is_one_line(tmp_path):
    with pytest.raises(FetchError, match="no connection") as error:
        fetch(tmp_path, endpoint="http://127.0.0.1:9", retry_wait_s=0)
    assert "\n" not in str(error.value)


def test_two_fetches_in_one_folder_do_not_mix(hub, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".fetch.lock"), pytest.raises(FetchError, match="another fetch is at work"):
        get(hub, tmp_path)


def test_hf_endpoint_is_honoured(hub, tmp_path):
    program = "import sys, pathlib; from avatar.live_avatar.fetch import fetch; fetch(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert find_files(tmp_path).lora is not None


def test_bars_are_drawn_on_stderr_when_asked_for(hub, tmp_path, capsys):
    get(hub, tmp_path, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Wan2.1_VAE.pth" in captured.err
