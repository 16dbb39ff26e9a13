"""Which way up a photo is: what its file says, and the turn that it asks for."""

from __future__ import annotations

import struct
from contextlib import suppress

import numpy as np

from dsgnn.runtime.photo.boxes import properties


def exif_orientation(block: bytes) -> int:
    """The orientation tag (0x0112) of a TIFF-style EXIF block, 1…8; 1 when absent or damaged."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, start)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", block, start + 2 + 12 * entry)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # the tag lies beyond the end
        pass
    return 1


def oriented(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's rotation: transpose, flip rows, flip columns, as the EXIF value asks."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def turned(image: np.ndarray, data: bytes) -> np.ndarray:
    """Turn and mirror as the boxes `irot` and `imir` of an AVIF's primary item ask, in their order.

    OpenCV does neither. Source: ISO/IEC 23008-12, 6.5.10 and 6.5.12.
    """
    # There may be no such box, or it lies beyond the end.
    with suppress(KeyError, IndexError, struct.error):
        for kind, start in properties(data):
            if kind == b"irot":
                image = np.rot90(image, data[start] & 3)
            elif kind == b"imir":
                image = image[:, ::-1] if data[start] & 1 else image[::-1]
    return image
