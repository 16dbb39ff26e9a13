"""Read what people have into one form: (h, w, 3) uint8 RGB.

A path, encoded bytes or an array. The picture is turned as its EXIF block (JPEG, PNG, WebP), TIFF
tag or AVIF boxes say. Grey and CMYK become RGB, and more bits become 8. Transparent parts are laid
on white, as a page shows them; but AVIF and JPEG 2000 of more than 8 bits lose their alpha. Of an
animation or a file of several pages the first picture is taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from dsgnn.runtime.errors import InputError
from dsgnn.runtime.letterbox import check_photo
from dsgnn.runtime.photo.headers import MAX_PIXELS, damaged, format_of, pnm_head, walk
from dsgnn.runtime.photo.orientation import exif_orientation, oriented, turned

ImageSource = str | Path | bytes | np.ndarray

# OpenCV hands over more than 8 bits as uint16. In these files (PNG, TIFF, PNM) white is 65535, or
# what the header says. AVIF and JPEG 2000 may hold 10 or 12 bits. OpenCV does not tell how
# many, so it has to make the 8 bits itself.
FULL_SCALE = (b"\x89PNG", b"II", b"MM", b"P")


def read_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read one photo: (h, w, 3) uint8 RGB.

    source: a path, the bytes of an encoded image, or an array that already has this form (returned
    as it is). max_pixels: width × height of the largest photo that is decoded. Raises OSError if
    the path cannot be opened, InputError if its bytes are no readable image, for an array of
    another form and for anything else.
    """
    found = picture_or_bytes(source)
    return found if isinstance(found, np.ndarray) else decode(found, max_pixels)


def picture_or_bytes(source: ImageSource) -> np.ndarray | bytes:
    """A photo as it is, or the bytes of its file. Errors as of `read_image`."""
    if isinstance(source, np.ndarray):
        check_photo(source)
        return source
    if isinstance(source, (str, Path)):
        try:
            return Path(source).read_bytes()
        except ValueError as error:  # a zero byte, or half of a surrogate pair
            raise InputError(f"no file can have such a name: {error}") from error
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    raise InputError(
        "expected a path, encoded bytes or a uint8 RGB array of shape (h, w, 3), got "
        f"{type(source).__name__}"
    )


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file's bytes: (h, w, 3) uint8 RGB. Raises InputError and MemoryError."""
    if not data:
        raise InputError("the file is empty (0 bytes)")
    data = walk(data, max_pixels)
    with memory_errors():
        return _decoded(data)


def _decoded(data: bytes) -> np.ndarray:
    """The photo of a file whose headers are as they should be."""
    pixels, exif = _opened(data, cv2.IMREAD_UNCHANGED)
    if pixels.dtype == np.uint16 and not data.startswith(FULL_SCALE):
        pixels, exif = _opened(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"expected 8 or 16 bits per channel, got {pixels.dtype} pixels: "
            "tone-map the image and save it as 8 bit"
        )
    if (white := _white(data, pixels.dtype)) != 255:
        pixels = cv2.convertScaleAbs(pixels, alpha=255 / white)
    rgb = _to_rgb(pixels)
    if data[4:8] == b"ftyp":  # AVIF, where EXIF's orientation counts for nothing
        return np.ascontiguousarray(turned(rgb, data))
    return np.ascontiguousarray(oriented(rgb, exif_orientation(exif)))


@contextmanager
def memory_errors() -> Iterator[None]:
    """Make OpenCV's error for too little memory a MemoryError. Its other errors are bugs."""
    try:
        yield
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from error
        raise


def silence_opencv() -> None:
    """Keep OpenCV's messages about damaged files off the terminal: ours say what is wrong."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if hasattr(cv2, "setLogLevel"):  # OpenCV 4
        cv2.setLogLevel(0)
    else:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _opened(data: bytes, flags: int) -> tuple[np.ndarray, bytes]:
    """OpenCV's pixels and the EXIF block, which is empty if there is none. Raises InputError."""
    try:
        pixels, kinds, blocks = cv2.imdecodeWithMetadata(np.frombuffer(data, np.uint8), flags=flags)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise
        raise InputError(f"OpenCV refuses the image: {error.err or error}") from error
    if pixels is None:
        raise damaged(format_of(data), data)
    found = {int(kind): block for kind, block in zip(kinds, blocks, strict=True)}
    return pixels, np.asarray(found.get(cv2.IMAGE_METADATA_EXIF, ()), np.uint8).tobytes()


def _white(data: bytes, dtype: np.dtype) -> int:
    """The value of white in OpenCV's pixels: the largest of their type, except in PNM files.

    Those name it in their header. OpenCV scales by it only for plain text (P2, P3) of 8 bits, and
    makes white of the bits of P1 and P4.
    """
    if format_of(data) != "PNM" or data[1:2] in b"14":
        return int(np.iinfo(dtype).max)
    scaled = dtype == np.uint8 and data[1:2] in b"23"
    return 255 if scaled else pnm_head(data)[2]


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 grey (h, w), BGR or BGRA (h, w, 3 or 4) to RGB (h, w, 3)."""
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    if pixels.shape[2] != 4:
        raise InputError(f"expected 1, 3 or 4 channels, got {pixels.shape[2]}")
    rgb = cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB)
    alpha = pixels[:, :, 3].astype(np.uint16)
    if alpha.min() < 255:
        for channel in range(3):  # one at a time: 48-megapixel photos
            blend = rgb[:, :, channel] * alpha + 255 * (255 - alpha)
            rgb[:, :, channel] = (blend + 127) // 255
    return rgb
