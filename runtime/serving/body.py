"""Take the photo from a request: its body, or the one file of a multipart form.

Everything stays in memory, and no more of it than is allowed. Nothing is decoded by a codec that
the client names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from dsgnn.runtime.serving.worker import Refused

if TYPE_CHECKING:
    from starlette.requests import Request

UNNAMED = "photo"  # `file` of a photo that came without a name


async def take_photo(request: Request, max_bytes: int) -> tuple[bytes, str]:
    """The encoded photo of a request and its file name. Raises Refused, and ClientDisconnect."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise Refused(415, f"expected a photo without Content-Encoding, got {coding[:40]!r}")
    declared = request.headers.get("content-length", "").lstrip("0")
    if len(declared) > 15 or (declared.isdecimal() and int(declared) > max_bytes):
        raise _too_large(max_bytes, f"a Content-Length of {declared[:15]}")
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        name, data = UNNAMED, bytearray()
        async for part in _bounded(request, max_bytes):
            data += part
    else:
        form = _Form(kind)
        async for part in _bounded(request, max_bytes):
            form.feed(part)
        name, data = form.file()
    if not data:
        raise Refused(400, "expected a photo in the request's body, got 0 bytes")
    return bytes(data), name


def _too_large(max_bytes: int, got: str) -> Refused:
    return Refused(413, f"expected at most {max_bytes:,} bytes, got {got}")


async def _bounded(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The body in parts. Raises Refused as soon as it is too large."""
    received = 0
    async for part in request.stream():
        received += len(part)
        if received > max_bytes:
            raise _too_large(max_bytes, f"{received:,} and more")
        yield part


class _Form:
    """A multipart form with one field, which is a file. Another field is refused as it comes."""

    def __init__(self, content_type: str) -> None:
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartParser, parse_options_header

        self._wrong, self._options = FormParserError, parse_options_header
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not boundary:
            raise Refused(400, "expected the boundary of the form in Content-Type, got none")
        self._header, self._headers = [bytearray(), bytearray()], dict[bytes, bytes]()
        self._data, self._name = bytearray(), ""
        self._found = self._whole = False
        callbacks: Mapping[str, Callable[..., None]] = {
            "on_part_begin": self._part_begins,
            "on_header_field": lambda data, start, end: self._add(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add(1, data[start:end]),
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._part_data,
            "on_end": self._end,
        }
        try:
            self._parser: Any = MultipartParser(boundary, dict(callbacks))  # type: ignore[arg-type]
        except FormParserError as error:
            raise Refused(400, f"the form cannot be read: {error}") from error

    def feed(self, data: bytes) -> None:
        """Take the next part of the body. Raises Refused."""
        try:
            self._parser.write(data)
        except self._wrong as error:
            raise Refused(400, f"the form cannot be read: {error}") from error

    def file(self) -> tuple[str, bytearray]:
        """The file's name and content. Raises Refused if the form has none or broke off."""
        if not self._found:
            raise Refused(400, "expected one file in the form, got no field")
        if not self._whole:
            raise Refused(400, "the form cannot be read: it ends before its last boundary")
        return self._name, self._data

    def _part_begins(self) -> None:
        if self._found:
            raise Refused(400, "expected one file in the form, got a second field")
        self._headers.clear()

    def _add(self, which: int, data: bytes) -> None:
        self._header[which] += data

    def _header_ends(self) -> None:
        field, value = map(bytes, self._header)
        self._headers[field.lower()] = value
        self._header = [bytearray(), bytearray()]

    def _headers_end(self) -> None:
        options = self._options(self._headers.get(b"content-disposition", b""))[1]
        if b"filename" not in options:
            field = options.get(b"name", b"").decode("utf-8", "replace")[:80]
            raise Refused(400, f"expected one file in the form, got the field {field!r}")
        self._name = options[b"filename"].decode("utf-8", "replace") or UNNAMED
        self._found = True

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _end(self) -> None:
        self._whole = True
