"""Encode pictures and write them, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.errors import InputError

JPEG_QUALITY = 92
JPEG_SIDE_PX = 65_500  # libjpeg's limit


def to_bgr(image: np.ndarray) -> np.ndarray:
    """RGB to OpenCV's channel order."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2BGR)


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write a grey, BGR or BGRA picture in the format of the suffix, whole or not at all. Raises
    OSError, and InputError as `encode_picture`."""
    write_whole(path, encode_picture(path.suffix, pixels))


def encode_picture(suffix: str, pixels: np.ndarray) -> bytes:
    """A grey, BGR or BGRA picture in the format of the suffix. Raises InputError for a size that
    the format cannot hold."""
    high, wide = pixels.shape[:2]
    if suffix == ".jpg" and max(high, wide) > JPEG_SIDE_PX:
        raise InputError(
            f"a JPEG, as the overlay is, has at most {JPEG_SIDE_PX:,} pixels a side, not "
            f"{wide}×{high}: ask for the map and json alone"
        )
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix == ".jpg" else []
    done, data = cv2.imencode(suffix, pixels, options)
    if not done:
        raise InputError(f"OpenCV cannot encode a {suffix} of {wide}×{high} pixels")
    return data.tobytes()
