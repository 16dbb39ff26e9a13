"""Bring the colours of a photo to sRGB, as its file describes them.

Every iPhone's photos are in Display P3 and many cameras' in Adobe RGB: taken for sRGB they look
pale. A profile (ICC) is read from JPEG, PNG, WebP, TIFF, AVIF and JPEG 2000, and the numbers that
stand for one (CICP) from AVIF and PNG. Profiles of three primaries and three curves are converted,
which those of screens and cameras are. Those with tables, as of printers, are left alone; so are
CMYK and grey, which were converted when they were decoded.

Sources: ICC.1:2022, IEC 61966-2-1 (sRGB), ITU-T H.273 (CICP).
"""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress

import cv2
import numpy as np

from dsgnn.runtime.photo.boxes import boxes_in, properties
from dsgnn.runtime.photo.headers import Damaged, png_chunks, riff_chunks
from dsgnn.runtime.photo.tiff import TIFF, profile_in

LARGEST = 4 << 20  # bytes of a profile; usual ones have under 4 kB
SPACE = slice(16, 20)  # of a profile: what it is a profile of (7.2)
ROWS = 512  # of a photo at a time
LEVELS = 65_535  # linear light is counted in so many steps
# Linear sRGB to XYZ as seen in the light of ICC's profiles (D50).
SRGB_D50 = np.array(
    [
        [0.4360747, 0.3850649, 0.1430804],
        [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733],
    ]
)
# x and y of red, green and blue, by H.273's number.
PRIMARIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),  # those of sRGB
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),  # BT.2020
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}
WHITE = (0.3127, 0.3290)  # D65, which these have
SCREENS = (1, 6, 13, 14, 15)  # transfer curves of screens, all of which are shown alike

Conversion = tuple[np.ndarray, np.ndarray]  # curves (256, 3) to linear light; matrix to linear sRGB


def colours_of(data: bytes) -> bytes | tuple[int, int]:
    """What the file of a photo says of its colours: a profile, or else the numbers of primaries and
    transfer curve (CICP), which are 2 where nothing is known."""
    return colour_profile(data) or _numbers(data)


def to_srgb(rgb: np.ndarray, colours: bytes | tuple[int, int]) -> np.ndarray:
    """The pixels (h, w, 3) uint8 of a photo, in sRGB. colours: see `colours_of`.

    Colours that sRGB does not have become the nearest that it has, channel by channel. Pixels
    without a description, or with one that is damaged or of another kind, stay as they are.
    """
    try:
        found = _of_profile(colours) if isinstance(colours, bytes) else _of_numbers(*colours)
    except (struct.error, ValueError, IndexError, KeyError, ArithmeticError):
        return rgb
    if found is None:
        return rgb
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    probe = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    if np.abs(_converted(probe, *found).astype(int) - probe).max() <= 1:  # it is sRGB
        return rgb
    out = np.empty_like(rgb)
    for row in range(0, len(rgb), ROWS):
        out[row : row + ROWS] = _converted(rgb[row : row + ROWS], *found)
    return out


def _converted(rgb: np.ndarray, curves: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    table = np.rint(curves * LEVELS).astype(np.uint16).reshape(1, 256, 3)
    linear = cv2.transform(cv2.LUT(np.ascontiguousarray(rgb), table), matrix)
    return FROM_LINEAR[linear]


def srgb_curve(value: np.ndarray) -> np.ndarray:
    """sRGB values (0…1) to linear light (0…1)."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _from_linear() -> np.ndarray:
    """(65536,) uint8: the sRGB value of each level of linear light."""
    light = np.arange(LEVELS + 1) / LEVELS
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * shown).astype(np.uint8)


FROM_LINEAR = _from_linear()


def _of_numbers(primaries: int, transfer: int) -> Conversion | None:
    """By primaries and a curve of H.273, or None for those that are unknown or not of a screen."""
    if primaries not in PRIMARIES or transfer not in SCREENS:
        return None
    curves = np.repeat(srgb_curve(np.arange(256) / 255)[:, None], 3, axis=1)
    return curves, np.linalg.inv(_to_xyz(1)) @ _to_xyz(primaries)


def _of_profile(profile: bytes) -> Conversion | None:
    """By the primaries and curves of an ICC profile, or None if it has none."""
    (count,) = struct.unpack_from(">I", profile, 128)
    entries = (struct.unpack_from(">4sII", profile, 132 + 12 * n) for n in range(min(count, 100)))
    tags = {name: profile[at : at + size] for name, at, size in entries}
    if not {b"rXYZ", b"rTRC"} <= tags.keys():
        return None
    columns = [_fixed(tags[name], 8, 3) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    curves = [_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")]
    return np.stack(curves, axis=1), np.linalg.inv(SRGB_D50) @ np.stack(columns, axis=1)


def _fixed(tag: bytes, at: int, count: int) -> np.ndarray:
    """Numbers of 16 bits before the point and 16 behind it."""
    return np.array(struct.unpack_from(f">{count}i", tag, at)) / 65536


def _curve(tag: bytes) -> np.ndarray:
    """(256,): the linear light (0…1) of each 8-bit value, by a curve's tag (10.6, 10.18)."""
    value = np.arange(256) / 255
    if tag[:4] == b"para":
        (kind,) = struct.unpack_from(">H", tag, 8)
        g, a, b, c, d, e, f = (*_fixed(tag, 12, (1, 3, 4, 5, 7)[kind]), *[0.0] * 6)[:7]
        if kind == 0:
            return value**g
        if kind < 3:  # c is added everywhere, and below -b/a nothing else
            return np.clip(
                np.where(value >= -b / a, np.maximum(a * value + b, 0) ** g, 0) + c, 0, 1
            )
        power = np.maximum(a * value + b, 0) ** g + e
        return np.clip(np.where(value >= d, power, c * value + f), 0, 1)
    if tag[:4] != b"curv":
        raise ValueError
    (count,) = struct.unpack_from(">I", tag, 8)
    points = np.array(struct.unpack_from(f">{count}H", tag, 12))
    if count < 2:
        return value ** (points[0] / 256 if count else 1.0)
    return np.interp(value, np.linspace(0, 1, count), points / 65535)


def _to_xyz(primaries: int) -> np.ndarray:
    """(3, 3): linear RGB of these primaries to XYZ."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in (*PRIMARIES[primaries], WHITE)]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


def colour_profile(data: bytes) -> bytes | None:
    """The profile of the RGB pixels of an encoded photo, or None if it has none that we know.

    Damaged files give None, or what could be read: whoever decodes the photo says what is wrong.
    """
    try:
        profile = _find(data)
    except (Damaged, struct.error, ValueError, IndexError, KeyError, zlib.error):
        return None
    return profile if profile[SPACE] == b"RGB " and len(profile) <= LARGEST else None


def _numbers(data: bytes) -> tuple[int, int]:
    if data.startswith(b"\x89PNG"):
        at = data.find(b"cICP", 0, data.find(b"IDAT"))
        return (data[at + 4], data[at + 5]) if at > 0 else (2, 2)
    if data[4:8] == b"ftyp":
        with suppress(struct.error, IndexError, KeyError):
            for kind, start in properties(data):
                if kind == b"colr" and data[start : start + 4] == b"nclx":
                    return struct.unpack_from(">HH", data, start + 4)
    return 2, 2


def _find(data: bytes) -> bytes:
    if data.startswith(b"\xff\xd8"):
        return _in_jpeg(data)
    if data.startswith(b"\x89PNG"):
        return _in_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        chunks = riff_chunks(data, len(data))
        return next((data[start:end] for kind, start, end, _ in chunks if kind == b"ICCP"), b"")
    if data[:4] in TIFF:
        return profile_in(data)
    if data[4:8] == b"ftyp":
        for kind, start in properties(data):
            if kind == b"colr" and data[start : start + 4] in (b"prof", b"rICC"):
                return data[start + 4 : start - 8 + struct.unpack_from(">I", data, start - 8)[0]]
    if data[4:8] == b"jP  ":
        inside = dict(boxes_in(data, *dict(boxes_in(data, 0, len(data)))[b"jp2h"]))
        start, end = inside[b"colr"]
        return data[start + 3 : end] if data[start] == 2 else b""
    return b""


def _in_jpeg(data: bytes) -> bytes:
    parts: dict[int, bytes] = {}
    at = 2
    while data[at] == 0xFF and data[at + 1] not in (0xDA, 0xD9):  # until the picture begins
        (size,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + size]
        if data[at + 1] == 0xE2 and body.startswith(b"ICC_PROFILE\0"):
            parts[body[12]] = body[14:]
        at += 2 + size
    return b"".join(parts[number] for number in sorted(parts))


def _in_png(data: bytes) -> bytes:
    for kind, start, end in png_chunks(data):
        if kind == b"IDAT":
            break
        if kind == b"iCCP":
            packed = data[start + 8 : end - 4].partition(b"\0")[2][1:]
            return zlib.decompressobj().decompress(packed, LARGEST + 1)
    return b""
