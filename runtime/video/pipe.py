"""A video on standard input, which may be a file or a pipe."""

from __future__ import annotations

import struct
import tempfile
from typing import BinaryIO, Protocol

from dsgnn.runtime.disk.sources import standard_input

FRONT_BYTES = 1 << 20  # what may stand before the index of an MP4 that is read from a pipe


class Readable(Protocol):
    """What PyAV reads from. Some of these can be seeked too."""

    def read(self, size: int) -> bytes: ...


class _Pipe:
    """A pipe of which the first bytes can be looked at. It is read without Python's buffer: a
    thread that waits inside the buffer when Python exits would crash it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream: BinaryIO = getattr(stream, "raw", stream)
        # What the buffer has read already.
        self._front = stream.read(len(stream.peek())) if hasattr(stream, "peek") else b""

    def front(self, size: int) -> bytes:
        """The next `size` bytes, which stay in the pipe; fewer at its end."""
        while len(self._front) < size and (part := self._stream.read(size - len(self._front))):
            self._front += part
        return self._front[:size]

    def read(self, size: int) -> bytes:
        part = self._front[:size] or self._stream.read(size) or b""
        self._front = self._front[size:]
        return part


def standard_video() -> Readable:
    """Standard input as PyAV can read it.

    An MP4 whose index stands behind its pictures is copied from a pipe to a temporary file first.
    Raises InputError where there is no standard input, and OSError.
    """
    stream = standard_input()
    if stream.seekable():
        return stream
    pipe = _Pipe(stream)
    if not _index_comes_last(pipe):
        return pipe
    copy = tempfile.TemporaryFile(prefix="dsgnn-")  # noqa: SIM115 PyAV reads it to its end
    while part := pipe.read(1 << 20):
        copy.write(part)
    copy.seek(0)
    return copy


def _index_comes_last(pipe: _Pipe) -> bool:
    """Whether it is an MP4 or MOV with its pictures before its index. Source: ISO/IEC 14496-12."""
    if pipe.front(8)[4:] != b"ftyp":
        return False
    at = 0
    while at < FRONT_BYTES and len(head := pipe.front(at + 8)[at:]) == 8:
        size, name = struct.unpack(">I4s", head)
        if name in (b"moov", b"moof"):
            return False
        if name == b"mdat" or size < 8:
            return True
        at += size
    return False
