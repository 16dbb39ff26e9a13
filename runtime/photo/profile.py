"""The colour profile (ICC) in a photo's file, so that a part cut out of it has the same colours.

Pixels of a photo of another colour space than sRGB, such as every iPhone's Display P3, look pale
without it. Read from JPEG, PNG and WebP, and only where it is one of RGB: pixels of CMYK and grey
were converted when they were decoded.
"""

from __future__ import annotations

import struct
import zlib

LARGEST = 4 << 20  # bytes of a profile; usual ones have under 4 kB
PARTS = 10_000  # segments or chunks of a file that are looked at
SPACE = slice(16, 20)  # of a profile: what it is a profile of (ICC.1:2022, 7.2)


def colour_profile(data: bytes) -> bytes | None:
    """The profile of the RGB pixels of an encoded photo, or None if it has none that we know.

    Damaged files give None, or what could be read: whoever decodes the photo says what is wrong.
    """
    try:
        profile = _find(data)
    except (struct.error, ValueError, IndexError, zlib.error):
        return None
    return profile if profile[SPACE] == b"RGB " and len(profile) <= LARGEST else None


def with_profile(jpeg: bytes, profile: bytes | None) -> bytes:
    """A JPEG with a colour profile, if there is one, after its first segment (ICC.1:2022, B.4)."""
    if profile is None:
        return jpeg
    part = 65_519  # bytes of a profile that a segment has room for
    parts = [profile[i : i + part] for i in range(0, len(profile), part)]
    segments = b"".join(
        b"\xff\xe2"
        + struct.pack(">H", 16 + len(piece))
        + b"ICC_PROFILE\0"
        + bytes([number, len(parts)])
        + piece
        for number, piece in enumerate(parts, start=1)
    )
    after = 2
    if jpeg[2:4] == b"\xff\xe0":  # JFIF comes first
        after = 4 + struct.unpack_from(">H", jpeg, 4)[0]
    return jpeg[:after] + segments + jpeg[after:]


def _find(data: bytes) -> bytes:
    if data.startswith(b"\xff\xd8"):
        return _in_jpeg(data)
    if data.startswith(b"\x89PNG"):
        return _in_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _in_webp(data)
    return b""


def _in_jpeg(data: bytes) -> bytes:
    parts: dict[int, bytes] = {}
    at = 2
    for _ in range(PARTS):
        if data[at] != 0xFF or data[at + 1] in (0xDA, 0xD9):  # the picture begins
            break
        (size,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + size]
        if data[at + 1] == 0xE2 and body.startswith(b"ICC_PROFILE\0"):
            parts[body[12]] = body[14:]
        at += 2 + size
    return b"".join(parts[number] for number in sorted(parts))


def _in_png(data: bytes) -> bytes:
    at = 8
    for _ in range(PARTS):
        if (kind := data[at + 4 : at + 8]) in (b"IDAT", b""):
            break
        (size,) = struct.unpack_from(">I", data, at)
        if kind == b"iCCP":
            packed = data[at + 8 : at + 8 + size].partition(b"\0")[2][1:]
            return zlib.decompressobj().decompress(packed, LARGEST + 1)
        at += 12 + size
    return b""


def _in_webp(data: bytes) -> bytes:
    at = 12
    for _ in range(PARTS):
        if not (kind := data[at : at + 4]):
            break
        (size,) = struct.unpack_from("<I", data, at + 4)
        if kind == b"ICCP":
            return data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    return b""
