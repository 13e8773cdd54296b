"""`avatard doctor`: whether this machine can do what the settings ask of it, and what to do where it cannot.

Every check ends within its time, writes next to nothing, and leaves nothing behind. torch is asked in a process of its
own, so that one that crashes is a line and not the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from audio.errors import AvatardError
from service.config import Settings
from service.models import known_models, resolve_model
from streaming.engine_process import child_environment

Level = Literal["ok", "warning", "problem"]

OLDEST_PYTHON = (3, 11)
TORCH_S = 120.0
"""For a process to import torch and ask for the GPUs: a cold disk takes most of it."""
PROGRAM_S = 20.0
CONNECT_S = 3.0

WRITTEN_MB = 16
WRITE_S = 3.0
SLOW_MB_S = 20.0
"""A disk that writes less is a burden to a job: pieces, snapshots and the file, each flushed."""

LITTLE_MEMORY = 2e9
FEW_FILES = 1024

SLOW_LINK_GB_S = 10.0
"""A card in a narrow slot: what is streamed to it for want of memory then takes several times as long."""

SPEED_BLOCKS = 5
SPEED_S = 60.0
POCKET_BLOCK_MS = 480.0
LIVE_SHARE = 0.7
"""Of its length a block of the embedded model may take: on air its first frames are made apart, beside an encoder."""

ASK_TORCH = """
import json, time, torch
devices = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    free, total = torch.cuda.mem_get_info(i)
    here, took = torch.empty(1 << 27, dtype=torch.uint8, pin_memory=True), []
    there = torch.empty_like(here, device=f"cuda:{i}")
    for _ in range(4):
        torch.cuda.synchronize(i)
        began = time.perf_counter()
        there.copy_(here, non_blocking=True)
        torch.cuda.synchronize(i)
        took.append(time.perf_counter() - began)
    devices.append({"name": torch.cuda.get_device_name(i), "total": total, "link_gb_s": here.nbytes / min(took) / 1e9})
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
                  "available": torch.cuda.is_available(), "devices": devices, "threads": torch.get_num_threads()}))
"""


@dataclass(frozen=True)
class Finding:
    """What one check found. mend: what to do; empty where there is nothing to do."""

    check: str
    level: Level
    found: str
    mend: str = ""

    @property
    def line(self) -> str:
        return f"{self.level:8} {self.check:14} {self.found}" + (f"; {self.mend}" if self.mend else "")


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi tells it; memory in bytes."""

    name: str
    driver: str
    total: int
    free: int


Run = Callable[[Sequence[str], float], "tuple[int, str, str]"]
"""A program and its time to its status, output and errors. Raises: OSError; subprocess.TimeoutExpired."""


def run_program(command: Sequence[str], limit_s: float) -> tuple[int, str, str]:
    # As a model's process has it: how fast one is depends on that.
    own = child_environment()
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL, env=own)
    return done.returncode, done.stdout, done.stderr


def examine(load: Callable[[], Settings], run: Run = run_program) -> Iterator[Finding]:
    """Everything, one after the other. With settings that are wrong, what needs none."""
    yield _python()
    gpus = _gpus(run)
    yield from _gpu_findings(gpus)
    yield from _torch(gpus, run)
    yield from _memory()
    yield _open_files()
    try:
        settings = load()
    except AvatardError as error:
        yield Finding("settings", "problem", str(error), "nothing that depends on them was looked at")
        settings = None
    if settings is None:
        return
    yield from _secrets(settings)
    yield from _weights(settings)
    yield from _speed(settings, run)
    yield from _encoders(settings, isinstance(gpus, list) and bool(gpus))
    yield from _voice(settings, run)
    running = _running(settings)
    if running is not None:
        yield Finding("daemon", "ok", f"process {running} works on {_expanded(settings.daemon.state)}")
    for name, folder in (("state", settings.daemon.state), ("outputs", settings.daemon.outputs)):
        yield from _disk(name, _expanded(folder), settings)
    yield from _http_port(settings, running)
    yield from _broker(settings)


def worst(findings: Iterable[Finding]) -> Level:
    levels = {finding.level for finding in findings}
    return "problem" if "problem" in levels else "warning" if "warning" in levels else "ok"


# The machine


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return Finding("python", "problem", version, f"avatard needs {wanted} or newer")
    return Finding("python", "ok", version)


def _gpus(run: Run) -> list[Gpu] | str:
    """Those that nvidia-smi tells of; or why there are none to be seen."""
    fields = "name,driver_version,memory.total,memory.free"
    try:
        status, out, errors = run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], PROGRAM_S)
    except OSError:
        return "no nvidia-smi" if not Path("/proc/driver/nvidia/version").exists() else "a driver, but no nvidia-smi"
    except subprocess.TimeoutExpired:
        return f"nvidia-smi did not answer in {PROGRAM_S:g} s"
    if status:
        return f"nvidia-smi fails: {_last_line(out + errors)}"
    found = []
    for line in out.strip().splitlines():
        name, driver, total, free = (part.strip() for part in line.split(","))
        # A card without memory of its own tells [N/A].
        sizes = [int(size) * 2**20 if size.isdecimal() else 0 for size in (total, free)]
        found.append(Gpu(name, driver, *sizes))
    return found


def _gpu_findings(gpus: list[Gpu] | str) -> Iterator[Finding]:
    if isinstance(gpus, str):
        if gpus == "no nvidia-smi":
            yield Finding("gpu", "ok", "no NVIDIA GPU; the embedded model needs none")
        else:
            yield Finding("gpu", "problem", gpus, "mend the NVIDIA driver, or take the card out")
        return
    for gpu in gpus:
        found = f"{gpu.name}, driver {gpu.driver}, {_gb(gpu.free)} of {_gb(gpu.total)} free"
        if gpu.total and gpu.free < 0.1 * gpu.total:
            yield Finding("gpu", "warning", found, "somebody else uses it; see nvidia-smi")
        else:
            yield Finding("gpu", "ok", found)


def _torch(gpus: list[Gpu] | str, run: Run) -> Iterator[Finding]:
    try:
        status, out, errors = run([sys.executable, "-P", "-c", ASK_TORCH], TORCH_S)
        told: dict[str, Any] | None = json.loads(out) if status == 0 else None
    except subprocess.TimeoutExpired:
        yield Finding("torch", "problem", f"could not be asked in {TORCH_S:g} s", "is the disk or the driver stuck?")
        return
    except (OSError, ValueError) as error:
        yield Finding("torch", "problem", f"could not be asked ({error})", "install it again")
        return
    if told is None:
        how = f"ends by signal {-status}" if status < 0 else _last_line(errors)
        yield Finding("torch", "problem", how, "install it again: pip install --force-reinstall torch")
        return
    build = f"cuda {told['cuda']}" if told["cuda"] else f"hip {told['hip']}" if told["hip"] else "for CPUs only"
    found = f"{told['version']}, {build}"
    if isinstance(gpus, list) and gpus and not told["cuda"]:
        yield Finding(
            "torch",
            "problem",
            f"{found}, beside an NVIDIA GPU that it cannot use",
            "pip install --force-reinstall torch, with the --index-url that pytorch.org/get-started names for CUDA",
        )
    elif isinstance(gpus, list) and gpus and not told["available"]:
        driver = gpus[0].driver
        yield Finding(
            "torch",
            "problem",
            f"{found}, and finds no GPU with driver {driver}",
            "install a newer driver, or a torch for an older CUDA; in a container give it the GPU",
        )
    else:
        used = ", ".join(f"{device['name']} ({_gb(device['total'])})" for device in told["devices"])
        yield Finding("torch", "ok", f"{found}; " + (used or f"{told['threads']} threads"))
        yield from _links(told["devices"])


def _links(devices: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    if not devices:
        return
    found = ", ".join(f"{device['link_gb_s']:.1f} GB/s to {device['name']}" for device in devices)
    if min(device["link_gb_s"] for device in devices) < SLOW_LINK_GB_S:
        yield Finding(
            "link", "warning", found, "a full slot (16 lanes, PCIe 4 or 5) streams weights several times faster"
        )
    else:
        yield Finding("link", "ok", found)


def _memory() -> Iterator[Finding]:
    sizes: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) * 1024
    if "MemAvailable" not in sizes:
        return
    found = f"{_gb(sizes['MemAvailable'])} of {_gb(sizes['MemTotal'])} free"
    if sizes["MemAvailable"] < LITTLE_MEMORY:
        yield Finding("memory", "warning", found, f"the embedded model and the daemon want {_gb(LITTLE_MEMORY)}")
    else:
        yield Finding("memory", "ok", found)


def _open_files() -> Finding:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        return Finding("open files", "warning", f"at most {soft}", f"raise it: ulimit -n {FEW_FILES}, or LimitNOFILE=")
    return Finding("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")


# What the settings ask for


def _secrets(settings: Settings) -> Iterator[Finding]:
    from service.auth import Keys
    from service.secrets import check_certificate, read_secret

    http, mqtt, voice = settings.http, settings.mqtt, settings.voice
    try:
        Keys.load(settings)
        if mqtt.enabled:
            read_secret("mqtt.password", mqtt.password_file, mqtt.password_env)
        if voice.url:
            read_secret("voice.key", voice.key_file, voice.key_env)
        if http.enabled and http.tls_cert is not None:
            check_certificate(http.tls_cert, http.tls_key)
    except AvatardError as error:
        yield Finding("settings", "problem", str(error))
        return
    tokens = len(settings.auth.tokens)
    yield Finding("settings", "ok", f"all known and valid; {tokens} tokens" if tokens else "all known and valid")


def _weights(settings: Settings) -> Iterator[Finding]:
    name = settings.model.name
    try:
        place = resolve_model(name, settings)
    except AvatardError as error:
        yield Finding("model", "problem", str(error))
        return
    if place in known_models():
        from importlib import resources

        folder = Path(str(resources.files("avatar").joinpath(place)))
    elif Path(place).is_dir():
        folder = Path(place)
    else:
        yield Finding("model", "ok", f"{name}: a function of one's own, not looked into")
        return
    broken = _broken_weights(folder)
    if broken:
        again = f"avatard fetch {name}" if folder == Path(place) else "install avatard again"
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        yield Finding("model", "problem", f"{name}: {broken[0]}{more}", again)
    else:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        yield Finding("model", "ok", f"{name}: {_gb(size)} in {folder}")


def _broken_weights(folder: Path) -> list[str]:
    """Files that are missing or not whole, as far as their sizes tell; what `fetch --verify` reads takes minutes."""
    broken = [f"{file.name} is half downloaded" for file in sorted(folder.rglob("*.part"))]
    lock = folder / "avatard.lock.json"
    if lock.exists():
        try:
            repos = json.loads(lock.read_text(encoding="utf-8"))["repos"]
            wanted = {
                folder / repo.rpartition("/")[2] / file: facts["size"]
                for repo, entry in repos.items()
                for file, facts in entry["files"].items()
            }
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return [*broken, f"{lock.name} cannot be read"]
        for file, size in wanted.items():
            if not file.is_file():
                broken.append(f"{file.relative_to(folder)} is missing")
            elif file.stat().st_size != size:
                broken.append(f"{file.relative_to(folder)} has {file.stat().st_size} bytes of {size}")
    tensors = sorted(folder.rglob("*.safetensors"))
    if not tensors:
        broken.append(f"there are no weights in {folder}")
    return broken + [f"{file.name} is cut off or damaged" for file in tensors if not _is_whole(file)]


def _is_whole(file: Path) -> bool:
    """Whether a .safetensors file is as long as its own header says."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > 100_000_000:
                return False
            header = json.loads(opened.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(file.stat().st_size == 8 + length + max(ends, default=0))
    except (OSError, ValueError, struct.error, KeyError, TypeError, IndexError):
        return False


def _speed(settings: Settings, run: Run) -> Iterator[Finding]:
    """Of the embedded model, which is small enough to be tried; `avatard plan` answers for the other."""
    if settings.model.name != "pocket":
        return
    steps = [] if settings.model.steps is None else [f"--steps={settings.model.steps}"]
    command = [sys.executable, "-P", "-m", "avatar.pocket.stages", f"--blocks={SPEED_BLOCKS}", *steps]
    try:
        status, out, errors = run(command, SPEED_S)
        taken = sum(json.loads(out).values()) if status == 0 else None
    except subprocess.TimeoutExpired:
        yield Finding(
            "speed", "warning", f"{SPEED_BLOCKS} blocks were not made in {SPEED_S:g} s", "is the machine busy?"
        )
        return
    except (OSError, ValueError, TypeError, AttributeError) as error:
        yield Finding("speed", "warning", f"could not be measured ({error})")
        return
    refused = _last_line(errors).partition("PocketError: ")[2]
    if taken is None and refused:
        yield Finding("speed", "problem", f"pocket cannot be had so: {refused}")
        return
    if taken is None:
        yield Finding("speed", "warning", f"could not be measured ({_last_line(errors)})")
        return
    found = f"pocket takes {taken:.0f} ms for a block of {POCKET_BLOCK_MS:.0f} ms"
    if taken > LIVE_SHARE * POCKET_BLOCK_MS:
        mend = (
            "files are made all the same; on air every other picture is made, and some are held: more cores, or a "
            "processor with AVX512-BF16"
        )
        yield Finding("speed", "warning", found, mend)
    else:
        yield Finding("speed", "ok", found)


def _encoders(settings: Settings, gpu: bool) -> Iterator[Finding]:
    """Each is made to encode: that it was compiled in says nothing of the driver and the chip."""
    import av

    failures = {}
    for codec in ("libx264", "h264_nvenc"):
        try:
            failures[codec] = _encodes(codec)
        except (av.error.FFmpegError, ValueError) as error:
            failures[codec] = str(error)
    version = ".".join(map(str, av.ffmpeg_version_info.split(".")[:3]))
    if failures["libx264"]:
        yield Finding("libx264", "problem", failures["libx264"], "install PyAV from its wheel: pip install av")
    else:
        yield Finding("libx264", "ok", f"encodes (PyAV {av.__version__}, FFmpeg {version})")
    if not failures["h264_nvenc"]:
        yield Finding("h264_nvenc", "ok", "encodes")
    elif settings.live.codec == "h264_nvenc":
        mend = "libx264 takes its place; set live.codec to it, or mend the driver"
        yield Finding("h264_nvenc", "warning", failures["h264_nvenc"], mend)
    elif gpu:
        yield Finding("h264_nvenc", "ok", f"is not here ({failures['h264_nvenc']}), and not asked for")


def _encodes(codec: str) -> str:
    """Empty, or why it does not. Raises: av.error.FFmpegError, ValueError."""
    import av
    from av.video.stream import VideoStream

    with av.open(os.devnull, "w", format="null") as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 256, 256, "yuv420p"
        frame = av.VideoFrame(256, 256, "yuv420p")
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        return "" if stream.encode(frame) + stream.encode(None) else "gives no packet"


def _voice(settings: Settings, run: Run) -> Iterator[Finding]:
    if settings.voice.url:
        from audio.urls import redacted

        yield Finding("voice", "ok", f"{redacted(settings.voice.url)}, not asked")
        return
    try:
        status, out, errors = run(["espeak-ng", "--version"], PROGRAM_S)
    except OSError:
        yield Finding("voice", "warning", "no espeak-ng: no text can be spoken", "apt install espeak-ng, or voice.url")
        return
    except subprocess.TimeoutExpired:
        yield Finding("voice", "warning", f"espeak-ng did not answer in {PROGRAM_S:g} s")
        return
    said = " ".join((out or errors).split())
    if status:
        yield Finding("voice", "warning", f"espeak-ng fails: {_last_line(errors or out)}", "install it again")
    else:
        yield Finding("voice", "ok", said.partition("Data at")[0].strip() or "espeak-ng")


def _running(settings: Settings) -> str | None:
    """The process of the daemon that works on the state folder; None: there is none."""
    with contextlib.suppress(OSError):
        descriptor = os.open(_expanded(settings.daemon.state) / "lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        finally:
            os.close(descriptor)
    return None


def _disk(name: str, folder: Path, settings: Settings) -> Iterator[Finding]:
    check = f"{name} folder"
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        yield Finding(check, "problem", f"{there}: is no folder", f"set daemon.{name} to another place")
        return
    free = shutil.disk_usage(there).free
    found = f"{folder}: {_gb(free)} free"
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding(check, "problem", f"{there}: cannot be written", f"chown it, or set daemon.{name}")
        return
    if free < settings.jobs.min_free_gb * 1e9:
        mend = f"jobs are taken from {settings.jobs.min_free_gb:g} GB on (jobs.min_free_gb); make room"
        yield Finding(check, "problem", found, mend)
        return
    try:
        rate = _write_rate(there)
    except OSError as error:
        yield Finding(check, "problem", f"{there}: cannot be written ({(error.strerror or str(error)).lower()})")
        return
    found = f"{found}, writes {rate:.0f} MB/s"
    if rate < SLOW_MB_S:
        yield Finding(check, "warning", found, f"less than {SLOW_MB_S:g} MB/s slows jobs down; use a faster disk")
    else:
        yield Finding(check, "ok", found)


def _write_rate(folder: Path) -> float:
    """Megabytes a second that reach the disk: a small file that is gone at once."""
    piece = os.urandom(1_000_000)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.monotonic()
        written = 0
        while written < WRITTEN_MB:
            file.write(piece)
            file.flush()
            written += 1
            if time.monotonic() - began > WRITE_S:
                break
        os.fsync(file.fileno())
        return written / max(time.monotonic() - began, 1e-6)


def _http_port(settings: Settings, running: str | None) -> Iterator[Finding]:
    http = settings.http
    if not http.enabled or not http.port:
        return
    place = f"{http.host}:{http.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        if running is not None:
            yield Finding("http port", "ok", f"{place}: taken, and a daemon runs")
            return
        why = (error.strerror or str(error)).lower()
        yield Finding("http port", "problem", f"{place}: cannot be listened on ({why})", "set another http.port")
        return
    yield Finding("http port", "ok", f"{place} is free")


def _broker(settings: Settings) -> Iterator[Finding]:
    mqtt = settings.mqtt
    if not mqtt.enabled:
        return
    place = f"{mqtt.host}:{mqtt.port}"
    try:
        socket.create_connection((mqtt.host, mqtt.port), CONNECT_S).close()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        yield Finding("mqtt broker", "warning", f"{place}: {why}", "the daemon goes on asking; is the broker up?")
    else:
        yield Finding("mqtt broker", "ok", f"{place} is there")


def _expanded(path: Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[:200] if lines else "says nothing"
