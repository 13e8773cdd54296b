"""Files that strangers sent, read where they can do no harm.

FFmpeg and Pillow are made for speed: a damaged file can have them crash, hang or swell, and the daemon has others'
broadcasts to lose. So each file is read in a process of its own, forked from one that has imported what that takes;
what is found comes back through a socket:

    here --(one end of a new pair of sockets)--> reader --fork--> one file: JSON, pixels or samples, ... --> here

A process ends with its file, when nobody listens any more, or by what it may not do: see `_confine`. The reader ends
with the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from audio.chunk import AudioChunk
from audio.decode import AudioError, SoundFile, SoundReader, SoundReport, open_sound
from audio.errors import AvatardError
from avatar.picture import PictureError, read_picture
from streaming.engine_child import HEAD, pack

if TYPE_CHECKING:
    from service.config import LimitsSection

PIECE_S = 0.25
"""Of sound at once."""

CPU_S = 60
"""Of a processor's time that a file may take from one answer to the next; 80 million pixels took 3 to 20 s."""

TRIES = 3
"""So often a reader is asked, where it ends or stands still before it has begun with the file."""

BEGIN_S = 20.0
"""It has to import for half a second at the most, and to fork."""

TAKE_S = 1.0
"""That others wait behind one whose file a reader does not take: hundreds lie before it then."""

PATIENCE_S = 180.0
"""That is waited for an answer: the process may have to share its processor, or wait for a disk."""

INHERITED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONUTF8")
"""Of the environment, in which there may be secrets."""

MOST_HEADER_BYTES = 1 << 20
MOST_SOUND_BYTES = 64 << 20
"""In one answer: far more than there is, and no more than can be borne."""

MEMORY_BYTES = 4 << 30
"""Of addresses, which is a little more than it uses; 80 million pixels took 0.6 to 1.1 GB."""


def start() -> None:
    """Start the reader, so that the first file need not wait for it: it imports for half a second. Never waits."""
    _READER.start()


def picture(path: Path, limits: LimitsSection) -> NDArray[np.uint8]:
    """As `avatar.picture.read_picture`. Blocking. Raises: PictureError, also where the file ends who reads it."""
    most = round(limits.picture_megapixels * 1e6)
    with _Reading(path, PictureError, 3 * most, {"op": "picture", "max_pixels": most}) as answers:
        answer, pixels = answers.next()
        return np.frombuffer(pixels, np.uint8).reshape(answer["shape"])


def sound(path: Path, limits: LimitsSection) -> SoundFile:
    """As `audio.decode.open_sound`; what it gives is read in the same way. Blocking.

    Raises: AudioError, also where the file ends who reads it.
    """
    asked = {"op": "sound", "max_duration_s": limits.audio_hours * 3600}
    with _Reading(path, AudioError, MOST_SOUND_BYTES, asked) as answers:
        answer, _ = answers.next()
        return _IsolatedSound(path=path, **answer["sound"])


@dataclass
class _IsolatedSound(SoundFile):
    """A sound of which each pass is made in a process of its own, which begins when the first of it is asked for."""

    def chunks(self, sample_rate: int) -> Iterator[AudioChunk]:
        self.report = SoundReport()
        for samples in self._pass({"op": "chunks", "sample_rate": sample_rate}):
            yield AudioChunk(samples, sample_rate)

    def original(self, sample_rate: int = 48_000, max_channels: int = 2) -> SoundReader:
        channels = min(self.channels, max_channels, 2)
        asked = {"op": "original", "sample_rate": sample_rate, "max_channels": max_channels}
        pieces = (samples.reshape(-1, channels) for samples in self._pass(asked))
        return SoundReader(pieces, sample_rate, channels)

    def _pass(self, asked: dict[str, Any]) -> Iterator[NDArray[np.float32]]:
        with _Reading(self.path, AudioError, MOST_SOUND_BYTES, {**asked, "sound": _facts(self)}) as answers:
            while True:
                answer, samples = answers.next()
                if samples:
                    yield np.frombuffer(samples, np.float32)
                    continue
                if "report" in answer:
                    self.report = SoundReport(**answer["report"])
                if answer["broke_off"]:
                    raise AudioError(answer["broke_off"])
                return


def _facts(sound: SoundFile) -> dict[str, Any]:
    """What `SoundFile` is made of, as JSON has it."""
    names = [field.name for field in fields(SoundFile) if field.name not in ("path", "report")]
    return {name: getattr(sound, name) for name in names}


class _Reading:
    """One file being read elsewhere. Leaving it ends that, at the next thing it has to say.

    error: what is raised for whatever goes wrong with the file; most_bytes: of pixels or samples in one answer.
    """

    def __init__(self, path: Path, error: type[AvatardError], most_bytes: int, asked: dict[str, Any]) -> None:
        self._path, self._error, self._most_bytes = path, error, most_bytes
        # Where we stand may have been deleted, and matters to few.
        folder = None if path.is_absolute() else os.getcwd()
        self._asked = pack({**asked, "path": os.fspath(path), "folder": folder})
        self._socket: socket.socket | None = None

    def __enter__(self) -> _Reading:
        try:
            self._ask()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):  # no descriptor or process is to be had
                raise self._error(f"{self._path}: cannot be read ({error.strerror}); try again later") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def next(self) -> tuple[dict[str, Any], bytes]:
        """The next answer, and what came with it. Raises: the error that this was made with."""
        try:
            answer, content = self._receive()
        except TimeoutError:
            raise self._error(f"{self._path}: cannot be read in {PATIENCE_S:g} s; copy it to a faster disk") from None
        except (EOFError, OSError):
            raise self._error(
                f"{self._path}: is damaged so that it ends whatever reads it, or takes too much of time or memory; "
                "save it anew in another format"
            ) from None
        if "error" in answer:
            raise self._error(answer["error"])
        if "bug" in answer:
            bug = RuntimeError(answer["bug"])
            bug.add_note("In the process that read the file:\n" + answer["trace"])
            raise bug
        return answer, content

    def _ask(self) -> None:
        """Have a process begin with the file. Raises: OSError; the error that this was made with."""
        for _ in range(TRIES):
            self._socket, theirs = socket.socketpair()
            self._answers = self._socket.makefile("rb")
            self._socket.settimeout(BEGIN_S)
            with theirs:
                reader = _READER.hand_over(theirs)
            # Nothing of the file was looked at before it says that it begins: if it does not, it is the reader.
            with contextlib.suppress(EOFError, OSError):
                self._socket.sendall(self._asked)
                self._receive()
                self._socket.settimeout(PATIENCE_S)
                return
            self._close()
            _READER.replace(reader)
        raise self._error(f"{self._path}: cannot be read: the process that is to do so ends again and again")

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        """One message. Raises: EOFError; OSError: TimeoutError, or it is none."""
        header_bytes, content_bytes = HEAD.unpack(self._exactly(HEAD.size))
        if header_bytes > MOST_HEADER_BYTES or content_bytes > self._most_bytes:
            raise OSError("it says more than it was asked")
        return json.loads(self._exactly(header_bytes)), self._exactly(content_bytes)

    def _exactly(self, size: int) -> bytes:
        content = self._answers.read(size)
        if len(content) < size:
            raise EOFError
        return content

    def _close(self) -> None:
        if self._socket is not None:
            self._answers.close()
            self._socket.close()


class _Reader:
    """The process that forks for each file; started when it is first needed, and again where it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket

    def start(self) -> None:
        with self._lock:
            self._started()

    def hand_over(self, file: socket.socket) -> subprocess.Popen[bytes]:
        """Give it the end of a pair of sockets on which it is asked for one file; the process that has it."""
        with self._lock:
            process = self._started()
            # One that does not take it has ended, or stands still: who waits in vain sees to that.
            with contextlib.suppress(ConnectionError, TimeoutError):
                socket.send_fds(self._socket, [b"f"], [file.fileno()])
            return process

    def replace(self, process: subprocess.Popen[bytes]) -> None:
        """That one has ended, or does nothing: end it. The next file has another."""
        with self._lock:
            process.kill()
            process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        from streaming.engine_process import child_environment  # here: the reader itself has no use for it

        if self._process is not None:
            if self._process.poll() is None:
                return self._process
            self._socket.close()
        self._process = None
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(TAKE_S)
        # No secrets; and one thread of algebra: there is none to do, and what was forked could not use it.
        known = child_environment()
        inherited = {name: known[name] for name in INHERITED if name in known}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "service.isolated", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**inherited, "OPENBLAS_NUM_THREADS": "1"},
                # Ctrl-C is for us.
                start_new_session=True,
            )
        return self._process


_READER = _Reader()
"""One for this process: there is nothing about it that its users would want to be different."""


# In the reader's process, and in those it forks


def main() -> None:
    """Fork for each socket that comes, until who started us is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        while True:
            what, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
            if not what:
                return
            if os.fork() == 0:
                requests.close()
                _read(socket.socket(fileno=descriptors[0]))
                os._exit(0)
            for descriptor in descriptors:
                os.close(descriptor)


def _confine() -> None:
    """Take from this process what reading a file needs none of, or not much."""
    for what, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    _allow_time()


def _allow_time() -> None:
    """CPU_S of a processor from now on; then the system ends this process, wherever it hangs."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most = math.ceil(time.process_time()) + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _read(connection: socket.socket) -> None:
    """Answer the one request of this process."""

    def send(content: NDArray[Any] | None = None, **answer: Any) -> None:
        raw = memoryview(b"" if content is None else np.ascontiguousarray(content).data.cast("B"))
        connection.sendall(pack(answer, raw))
        _allow_time()

    with contextlib.suppress(ConnectionError):  # nobody listens any more
        try:
            _confine()
            asked = _request(connection)
            if asked["folder"] is not None:
                os.chdir(asked["folder"])
            send()
            path = Path(asked["path"])
            match asked["op"]:
                case "picture":
                    pixels = read_picture(path, max_pixels=asked["max_pixels"])
                    send(pixels, shape=pixels.shape)
                case "sound":
                    send(sound=_facts(open_sound(path, asked["max_duration_s"])))
                case "chunks":
                    file, broke_off = SoundFile(path=path, **asked["sound"]), ""
                    try:
                        for chunk in file.chunks(asked["sample_rate"]):
                            send(chunk.samples)
                    except AvatardError as error:
                        broke_off = str(error)
                    send(broke_off=broke_off, report=asdict(file.report))
                case "original":
                    file = SoundFile(path=path, **asked["sound"])
                    reader = file.original(asked["sample_rate"], asked["max_channels"])
                    while len(samples := reader.read(round(PIECE_S * asked["sample_rate"]))):
                        send(samples)
                    send(broke_off="")
        except AvatardError as error:
            send(error=str(error))
        except ConnectionError:
            raise
        except Exception as error:
            send(bug=f"{type(error).__name__}: {error}", trace="".join(traceback.format_exception(error)))


def _request(connection: socket.socket) -> dict[str, Any]:
    with connection.makefile("rb") as requests:
        size, _ = HEAD.unpack(requests.read(HEAD.size))
        asked: dict[str, Any] = json.loads(requests.read(size))
        return asked


if __name__ == "__main__":
    main()
