"""What an ONNX file says outside its graph, read without the onnx package.

An ONNX file is one protobuf message. Its graph, nearly all of the bytes, is one length-delimited
field and is skipped.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from dsgnn.runtime.disk.documents import SMALL
from dsgnn.runtime.errors import ArtifactError

MAX_FIELDS = 10_000  # of one message: a model has some ten
# Names that only ONNX files have whose weights, or whose engines, lie in other files.
ELSEWHERE = {b"location": "weights", b"EPContext": "an engine"}


def onnx_metadata(path: Path) -> dict[str, str]:
    """`metadata_props` of an ONNX file. Raises ArtifactError if it is no whole protobuf message."""
    broken = ArtifactError(f"{path.name} is not an ONNX file, or it is damaged or cut short")
    if path.stat().st_size == 0:
        raise broken
    metadata = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for number, start, end in _fields(data, 0, len(data)):
                if number == 14 and end - start <= SMALL:  # ModelProto.metadata_props
                    entry = {n: data[a:b].decode() for n, a, b in _fields(data, start, end)}
                    metadata[entry[1]] = entry[2]  # key = 1, value = 2
        except (IndexError, KeyError, UnicodeDecodeError):
            raise broken from None
    return metadata


def check_whole(path: Path) -> None:
    """Raise ArtifactError if an ONNX file says that parts of it lie in other files.

    No hash covers those. Tensors name them by an entry with the key "location", engines inside a
    graph are nodes of the type EPContext. Both are texts, which stand in the file as they are.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name, what in ELSEWHERE.items():
            at = -1
            while (at := data.find(name, at + 1)) >= 0:
                if _ends_with_number(data[max(0, at - 10) : at], len(name)):
                    raise ArtifactError(
                        f"{path.name} has {what} in another file, which nothing vouches for: "
                        "export the checkpoint again with `dsgnn-export onnx`"
                    )


def _ends_with_number(data: bytes, number: int) -> bool:
    """Whether the last bytes are this number as protobuf may write it, such as a text's length."""
    if not data or data[-1] >= 0x80:  # more of the number would follow
        return False
    return any(_varint(data, start) == (number, len(data)) for start in range(len(data)))


def _fields(data: mmap.mmap, position: int, end: int) -> list[tuple[int, int, int]]:
    """(field number, start, end) of each field of one message. Raises IndexError if it is damaged
    or has more of them than ours have."""
    fields: list[tuple[int, int, int]] = []
    while position < end:
        if len(fields) == MAX_FIELDS:
            raise IndexError
        tag, start = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(data, start)
        elif kind == 2:
            size, start = _varint(data, start)
            position = start + size
        elif kind in (1, 5):
            position = start + (8 if kind == 1 else 4)
        else:
            raise IndexError
        if position > end or tag < 8:
            raise IndexError
        fields.append((tag >> 3, start, position))
    return fields


def _varint(data: mmap.mmap | bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError
