"""The boxes that AVIF, HEIC and JPEG 2000 files consist of."""

from __future__ import annotations

import struct
from collections.abc import Iterator


def boxes_in(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The boxes in data[start:end]: kind, and where the content starts and ends.

    Source: ISO/IEC 14496-12, 4.2.
    """
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1:
            head, (size,) = 16, struct.unpack_from(">Q", data, start + 8)
        if 0 < size < head:
            return
        yield kind, (start + head, min(end, start + size) if size else end)
        start += size or end


def properties(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The properties of an ISO image file's primary item: kind, and where the content starts."""
    start, end = dict(boxes_in(data, 0, len(data)))[b"meta"]
    meta = dict(boxes_in(data, start + 4, end))
    at = meta[b"pitm"][0]
    (primary,) = struct.unpack_from(">I" if data[at] else ">H", data, at + 4)
    inside = list(boxes_in(data, *meta[b"iprp"]))
    properties = list(boxes_in(data, *dict(inside)[b"ipco"]))
    for at in (start for kind, (start, _) in inside if kind == b"ipma"):
        item_id = ">I" if data[at] else ">H"
        wide, mask = (1, 0x7FFF) if data[at + 3] & 1 else (0, 0x7F)  # without the essential bit
        (items,) = struct.unpack_from(">I", data, at + 4)
        at += 8
        for _ in range(items):
            (item,) = struct.unpack_from(item_id, data, at)
            at += struct.calcsize(item_id)
            numbers = struct.unpack_from(f">{data[at]}{'H' if wide else 'B'}", data, at + 1)
            at += 1 + len(numbers) * (1 + wide)
            for number in numbers if item == primary else ():
                if number & mask:  # 0: none
                    kind, (start, _) = properties[(number & mask) - 1]
                    yield kind, start
