"""Read what people have into one form: (h, w, 3) uint8 RGB.

A path, encoded bytes or an array. Rotated by EXIF (JPEG, PNG, WebP) or the TIFF tag; grey and CMYK
become RGB; 16 bits become 8; transparency is laid on white, as a page shows it; the first picture
of an animation or a multi-page file is taken.
"""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np

from dsgnn.runtime.letterbox import check_photo

ImageSource = str | Path | bytes | np.ndarray

SIGNATURES = {  # first bytes → name, for telling a damaged photo from something else
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"RIFF": "WebP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"GIF8": "GIF",
    b"BM": "BMP",
}
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
READABLE = "JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000 or PNM"


class ImageError(ValueError):
    """An image that cannot be read; the message says why and what to do."""


def read_image(source: ImageSource) -> np.ndarray:
    """Read one photo: (h, w, 3) uint8 RGB.

    source: a path, the bytes of an encoded image, or an array that already has this form (returned
    as it is). Raises OSError if the path cannot be opened, ImageError if its bytes are no readable
    image, ValueError for an array of another form, TypeError for anything else.
    """
    if isinstance(source, np.ndarray):
        check_photo(source)
        return source
    if isinstance(source, (str, Path)):
        return decode(Path(source).read_bytes())
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode(bytes(source))
    raise TypeError(
        "expected a path, encoded bytes or a uint8 RGB array of shape (h, w, 3), got "
        f"{type(source).__name__}"
    )


def decode(data: bytes) -> np.ndarray:
    """Decode an image file's bytes: (h, w, 3) uint8 RGB. Raises ImageError."""
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    try:
        pixels, kinds, blocks = cv2.imdecodeWithMetadata(
            np.frombuffer(data, np.uint8), flags=cv2.IMREAD_UNCHANGED
        )
    except cv2.error as error:  # for example more pixels than OpenCV's limit
        raise ImageError(f"OpenCV refuses the image: {error.err or error}") from error
    if pixels is None:
        raise ImageError(_why_unreadable(data))
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ImageError(
            f"expected 8 or 16 bits per channel, got {pixels.dtype} pixels: "
            "tone-map the image and save it as 8 bit"
        )
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=255 / 65535)
    exif = {int(kind): block for kind, block in zip(kinds, blocks, strict=True)}.get(
        cv2.IMAGE_METADATA_EXIF
    )
    orientation = 1 if exif is None else exif_orientation(np.asarray(exif).tobytes())
    return np.ascontiguousarray(_oriented(_to_rgb(pixels), orientation))


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


def _oriented(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's rotation; EXIF's values as (transpose, flip rows, flip columns)."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 grey (h, w), BGR or BGRA (h, w, 3 or 4) to RGB (h, w, 3)."""
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    if pixels.shape[2] != 4:
        raise ImageError(f"expected 1, 3 or 4 channels, got {pixels.shape[2]}")
    rgb = cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB)
    alpha = pixels[:, :, 3].astype(np.uint16)
    if alpha.min() < 255:
        for channel in range(3):  # one at a time: 48-megapixel photos
            blend = rgb[:, :, channel] * alpha + 255 * (255 - alpha)
            rgb[:, :, channel] = (blend + 127) // 255
    return rgb


def _why_unreadable(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        return "HEIC photos cannot be read (OpenCV has no decoder): convert it to JPEG or PNG"
    for signature, name in SIGNATURES.items():
        if data.startswith(signature):
            return f"the {name} data is damaged or cut short ({len(data)} bytes)"
    return f"it is not an image ({READABLE} is expected)"
