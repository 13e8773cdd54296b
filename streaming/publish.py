"""The process that owns one connection to a server: bytes of a container on its input, reports on its output.

Started by `streaming.network` as `python -m streaming.publish`. FFmpeg holds Python's lock while it connects and while
it says goodbye, and a server that is silent then freezes the whole process: so it is this one, which can be killed.

    on the input                                on the output, a line of JSON each
    one line: url, container options, limits    ready      imported, nothing done yet
    the bytes, from when it is connected        connected
    the end: say goodbye                        progress   at_s, taken, and of the socket acked, unsent, window
                                                failed     kind, why, log, trace; the last line

The URL comes in on a pipe, since command lines and environments can be read by every process of the machine.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
import traceback
from typing import Any

import av

from streaming.sink import reason

REPORT_S = 0.1

TCP_INFO_FIELDS = {"acked": ("Q", 120), "unsent": ("I", 144), "window": ("I", 228)}
"""Where Linux's struct tcp_info has: bytes that the other end has acknowledged; bytes not sent for the first time yet;
bytes that the other end would still take (linux/tcp.h: tcpi_bytes_acked, tcpi_notsent_bytes, tcpi_snd_wnd)."""


def main() -> None:
    report("ready")
    request = json.loads(_first_line())
    # Killed by the kernel, with or without Python's lock, if the one who should do it is gone.
    signal.setitimer(signal.ITIMER_REAL, request["open_s"])
    av.logging.set_level(av.logging.ERROR)
    with av.logging.Capture() as log:
        try:
            publish(request)
        except Exception as error:
            said = [message.strip() for _, _, message in log]
            # Through the pipe, where the key can be blanked, and never as a traceback on the terminal.
            trace = "" if isinstance(error, OSError) else traceback.format_exc()
            report("failed", kind=type(error).__name__, why=reason(error), log=said, trace=trace)
            os._exit(1)  # not close(), which would talk to a server that is gone
    os._exit(0)


def publish(request: dict[str, Any]) -> None:
    """Connect, pass on the input to its end, and say goodbye. Raises: what FFmpeg says."""
    # A container of bytes as they are: FFmpeg's RTMP protocol takes a stream of FLV. And through "tee", since it alone
    # hands options on to the protocol below; PyAV opens outputs without any, so a certificate would not be looked at.
    options = ":".join(f"{key}={_quoted(value)}" for key, value in {"f": "data", **request["options"]}.items())
    container = av.open(f"[{_quoted(options)}]{_quoted(request['url'])}", "w", format="tee")
    stream = container.add_data_stream()
    container.start_encoding()
    signal.setitimer(signal.ITIMER_REAL, 0)
    connection = _own_socket()
    progress = Progress(connection)
    report("connected")
    threading.Thread(target=progress.run, daemon=True).start()
    # Killed, it takes with it what it still holds, and the server hears at once that the name of the stream is free.
    _linger(connection, False)
    number = 0
    while part := os.read(0, 1 << 16):
        packet = av.Packet(part)
        packet.stream = stream
        packet.pts = packet.dts = number
        number += 1
        container.mux(packet)
        progress.taken += len(part)
    signal.setitimer(signal.ITIMER_REAL, request["close_s"])
    _linger(connection, True)
    container.close()


class Progress:
    """Says again and again how far the bytes have come, from a thread: FFmpeg waits for the server without the lock."""

    def __init__(self, connection: socket.socket | None) -> None:
        self.taken = 0
        self._socket = connection

    def run(self) -> None:
        while True:
            try:
                report("progress", at_s=time.monotonic(), taken=self.taken, **self._wire())
            except OSError:
                os._exit(1)  # nobody listens any more
            time.sleep(REPORT_S)

    def _wire(self) -> dict[str, int]:
        if self._socket is None or not hasattr(socket, "TCP_INFO"):
            return {}
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            return {}
        return {
            name: struct.unpack_from(kind, info, offset)[0]
            for name, (kind, offset) in TCP_INFO_FIELDS.items()
            if offset + struct.calcsize(kind) <= len(info)
        }


def report(event: str, **values: Any) -> None:
    """One line, in one piece, from whichever thread."""
    os.write(1, json.dumps({"event": event, **values}).encode() + b"\n")


def _own_socket() -> socket.socket | None:
    """The connection that FFmpeg has opened: the only one of this process that has another end elsewhere."""
    for descriptor in range(3, 64):
        try:
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
            return connection
        connection.close()
    return None


def _linger(connection: socket.socket | None, patient: bool) -> None:
    """Whether a connection that ends still delivers what it holds, or is reset."""
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", not patient, 0))


def _quoted(text: str) -> str:
    return "".join(f"\\{character}" if character in "\\'|:=[] \t\n" else character for character in str(text))


def _first_line() -> bytes:
    """Byte by byte: what follows the line is not ours to read yet."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            os._exit(0)  # the other end has changed its mind
        line += byte
    return line


if __name__ == "__main__":
    main()
