"""What a TIFF file holds: its pages, how they are compressed, and whether it is a camera's raw.

Sources: TIFF 6.0, the specification of DNG, and libtiff's list of compressions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from dsgnn.runtime.disk.signatures import RAWS

# Compressions that OpenCV's libtiff does not undo.
COMPRESSIONS = {
    34712: "JPEG 2000",
    34887: "LERC",
    34925: "LZMA",
    50000: "ZSTD",
    50001: "WebP",
    50002: "JPEG XL",
}
SENSOR = (32803, 34892)  # photometric interpretations of a sensor's values
TIFF = (b"II*\0", b"MM\0*")  # how a file begins
BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # of one value, by its type
MOST_TAGS = 100_000  # of a file, that are looked at

Tags = dict[int, tuple[int, int]]  # of a page: where the values of each start, and their bytes


def is_camera_raw(data: bytes) -> bool:
    """Whether a file holds what a camera's sensor saw (DNG, NEF, CR2, CR3, ARW, ORF, RAF...).

    Such a file begins with a small preview, which would be taken for the photo.
    """
    if data.startswith(RAWS) or data[4:12] == b"ftypcrx ":
        return True
    if data[:4] in TIFF and data[8:10] == b"CR":  # Canon's mark
        return True
    first = _first(data)
    if 50706 in first or _number(data, first, 262) in SENSOR:  # the version of DNG
        return True
    return bool(_number(data, first, 254) & 1) and 330 in first  # a preview, and others inside


def compression(data: bytes) -> str:
    """The name of a compression that cannot be read, or an empty text."""
    return COMPRESSIONS.get(_number(data, _first(data), 259), "")


def pages(data: bytes) -> int:
    """How many pages a TIFF file has, previews aside; 1 for anything else."""
    if data[:4] not in TIFF:
        return 1
    try:
        return sum(1 for page in _directories(data) if not _number(data, page, 254) & 1)
    except (struct.error, ValueError, IndexError):
        return 1


def as_grey(data: bytes) -> tuple[bytes, bool] | None:
    """A grey TIFF with transparency as one of twice the width without, grey and alpha in turns.

    OpenCV leaves the alpha out. Gives the file, and whether each number is the difference from the
    one two before it; None for anything else, and for files in tiles or planes.
    """
    tags = _first(data)
    width, samples, predictor = (_number(data, tags, tag) for tag in (256, 277, 317))
    plain = [(262, (1,)), (274, (0, 1)), (284, (0, 1)), (322, (0,)), (317, (0, 1, 2))]
    if samples != 2 or any(_number(data, tags, tag) not in wanted for tag, wanted in plain):
        return None
    order, patched = "<" if data[:2] == b"II" else ">", bytearray(data)
    try:
        for tag, value in ((256, 2 * width), (277, 1), (317, 1), (338, 1)):
            if tag in tags:
                at, size = tags[tag]
                struct.pack_into(order + ("H" if size == 2 else "I"), patched, at, value)
        struct.pack_into(order + "I", patched, tags[258][0] - 4, 1)  # the bits of one sample
        if 338 in tags:  # the meaning of more samples becomes the kind of the one
            struct.pack_into(order + "H", patched, tags[338][0] - 8, 339)
    except (struct.error, ValueError, IndexError, KeyError):
        return None
    return bytes(patched), predictor == 2


def profile_in(data: bytes) -> bytes:
    """The colour profile of the first page; empty if it has none, or for anything else."""
    at, size = _first(data).get(34675, (0, 0))
    return data[at : at + size]


def _first(data: bytes) -> Tags:
    """The tags of the first page; none if the file is damaged or no TIFF."""
    try:
        return next(_directories(data), {}) if data[:4] in TIFF else {}
    except (struct.error, ValueError, IndexError):
        return {}


def _number(data: bytes, tags: Tags, tag: int) -> int:
    """The first value of a tag of whole numbers; 0 if the page does not have it."""
    at, size = tags.get(tag, (0, 0))
    value = data[at : at + min(size, 2 if size == 2 else 4)]
    return int.from_bytes(value, "little" if data[:2] == b"II" else "big")


def _directories(data: bytes) -> Iterator[Tags]:
    """The tags of one page after the other."""
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    seen = 0
    while at and seen < MOST_TAGS:
        (entries,) = struct.unpack_from(order + "H", data, at)
        seen += entries + 1
        found = {}
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", data, entry)
            size = count * (BYTES[kind] if kind < len(BYTES) else 1)
            start = entry + 8
            if size > 4:
                (start,) = struct.unpack_from(order + "I", data, start)
            found[tag] = start, size
        yield found
        (at,) = struct.unpack_from(order + "I", data, at + 2 + 12 * entries)
