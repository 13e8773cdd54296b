"""A multipart form, read part by part while it comes: nothing of it is held but what its reader keeps."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

PARTS = 32
"""Of one form: about twice as many as any client is known to send."""


class Part:
    """A field of a form and its bytes, as they come. filename: None where it is no file."""

    def __init__(self, form: _Form, name: str, filename: str | None) -> None:
        self._form, self.name, self.filename = form, name, filename
        self._over = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._over:
            piece = await self._form.next()
            if isinstance(piece, bytes):
                return piece
            self._over = True
        raise StopAsyncIteration


async def form_parts(request: Request) -> AsyncGenerator[Part, None]:
    """The parts of a form, each to be read before the next; what is not read of it is passed over.

    A body of another type has none.
    Raises: HTTPException, also where a part is read: it is no form, is broken off, or has more than PARTS parts.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        return
    form = _Form(options.get(b"boundary", b""), request.stream())
    while isinstance(part := await form.next(), Part):
        yield part
        async for _ in part:
            pass


class _Form:
    """What has been parsed and not been taken yet: a part, its bytes, None for its end."""

    def __init__(self, boundary: bytes, stream: AsyncIterator[bytes]) -> None:
        self._stream = stream
        self._come: deque[Part | bytes | None] = deque()
        self._parts = 0
        self._inside = False
        self._data = bytearray()
        self._field, self._value, self._disposition = b"", b"", b""
        if not boundary:
            raise HTTPException(400, "the form cannot be read: its Content-Type names no boundary")
        try:
            # It bounds the headers of a part itself.
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_part_end": self._end,
                },
            )
        except FormParserError as error:
            raise HTTPException(400, "the form cannot be read: its boundary is too long") from error

    async def next(self) -> Part | bytes | None:
        """None as well when there is nothing more."""
        while not self._come:
            try:
                chunk = await anext(self._stream)
            except StopAsyncIteration:
                if self._inside:
                    raise HTTPException(400, "the form cannot be read: it is broken off") from None
                return None
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise HTTPException(400, "the form cannot be read: it is no multipart/form-data") from error
            self._flush()
        return self._come.popleft()

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > PARTS:
            raise HTTPException(400, f"the form has more than {PARTS} parts")
        self._inside, self._disposition = True, b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise HTTPException(400, "the form cannot be read: one of its parts has no name")
        filename = options.get(b"filename")
        self._come.append(Part(self, text_of(options[b"name"]), None if filename is None else text_of(filename)))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        # Gathered: a parser that looks for boundaries may tell of each byte by itself.
        self._data += data[start:end]

    def _end(self) -> None:
        self._flush()
        self._inside = False
        self._come.append(None)

    def _flush(self) -> None:
        if self._data:
            self._come.append(bytes(self._data))
            self._data.clear()


def text_of(data: bytes) -> str:
    """As it was most likely meant."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
