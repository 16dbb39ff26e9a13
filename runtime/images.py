"""Read what people have into one form: (h, w, 3) uint8 RGB.

A path, encoded bytes or an array. The picture is turned as its EXIF block (JPEG, PNG, WebP), TIFF
tag or AVIF boxes say. Grey and CMYK become RGB, more bits become 8, and the colours become those of
sRGB where the file describes them (dsgnn.runtime.photo.profile). Transparent parts are laid
on white, as a page shows them; but AVIF and JPEG 2000 of more than 8 bits lose their alpha. Of an
animation or a file of several pages the first picture is taken, with a FirstPictureWarning.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np

from dsgnn.runtime.disk import signatures
from dsgnn.runtime.errors import FirstPictureWarning, InputError
from dsgnn.runtime.letterbox import check_photo
from dsgnn.runtime.photo.headers import MAX_PIXELS, VIDEO, damaged, format_of, pnm_head, walk
from dsgnn.runtime.photo.orientation import exif_orientation, oriented, turned
from dsgnn.runtime.photo.profile import colours_of, to_srgb
from dsgnn.runtime.photo.tiff import as_grey, compression, pages

# And the pictures of Pillow, which is not imported here.
ImageSource = str | os.PathLike[str] | bytes | BinaryIO | np.ndarray

# OpenCV hands over more than 8 bits as uint16. In these files (PNG, TIFF, PNM) white is 65535, or
# what the header says. AVIF and JPEG 2000 may hold 10 or 12 bits. OpenCV does not tell how
# many, so it has to make the 8 bits itself.
FULL_SCALE = (b"\x89PNG", b"II", b"MM", b"P")


def read_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read one photo: (h, w, 3) uint8 RGB.

    source: a path, the bytes of an encoded image or a file opened to read them, a picture of
    Pillow, or an array that already has this form (returned as it is). max_pixels: width × height
    of the largest photo that is decoded. Raises OSError if the path cannot be opened, InputError if
    its bytes are no readable image, for an array of another form and for anything else.
    """
    found = picture_or_bytes(source)
    return found if isinstance(found, np.ndarray) else decode(found, max_pixels)


def picture_or_bytes(source: ImageSource) -> np.ndarray | bytes:
    """A photo as it is, or the bytes of its file. Errors as of `read_image`.

    Warns with FirstPictureWarning of a file that holds more than one picture.
    """
    if isinstance(source, np.ndarray):
        check_photo(source)
        return source
    if isinstance(source, (str, os.PathLike)):
        try:
            file = Path(source).open("rb")  # noqa: SIM115
        except ValueError as error:  # a zero byte, or half of a surrogate pair
            raise InputError(f"no file can have such a name: {error}") from error
        with file:
            if file.seekable() and signatures.kind(file) == "video":
                raise InputError(VIDEO)
            return _first_of(file.read(), str(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _first_of(bytes(source))
    if hasattr(source, "getexif") and hasattr(source, "convert"):
        return _of_pillow(source)
    if hasattr(source, "read") and isinstance(data := source.read(), bytes):
        return _first_of(data)
    kind = f"{type(source).__module__}.{type(source).__name__}".removeprefix("builtins.")
    remedy = ""
    if hasattr(source, "shape"):
        remedy = (
            ": convert a tensor of (3, h, w) with values from 0 to 1 by "
            "(255 * tensor).byte().permute(1, 2, 0).cpu().numpy()"
        )
    elif hasattr(source, "read"):
        remedy = ": open the file in binary mode"
    raise InputError(
        "expected a path, encoded bytes, a picture of Pillow or a uint8 RGB array of shape "
        f"(h, w, 3), got {kind}{remedy}"
    )


def left_out(data: bytes) -> str:
    """What of an image file is not read, in words: the other pages of a TIFF, or the other pictures
    of an animation. Empty if it holds one picture."""
    if (count := pages(data)) > 1:
        return f"it has {count} pages, of which the first was taken"
    if signatures.kind(io.BytesIO(data)) == "animation":
        return "it is an animation, of which the first picture was taken"
    return ""


def _first_of(data: bytes, name: str = "") -> bytes:
    """A file's bytes, with a warning if it holds more than its first picture."""
    if left := left_out(data):
        remedy = ": Ranker.stream ranks all of them" if "animation" in left else ""
        text = f"{name}: {left}{remedy}" if name else f"{left}{remedy}"
        warnings.warn(text, FirstPictureWarning, stacklevel=4)
    return data


def _of_pillow(picture: Any) -> np.ndarray:
    """A picture of Pillow: upright, in sRGB and on white, as the same file would be read."""
    if picture.mode.startswith(("I", "F")):
        raise InputError(
            f"expected a picture of 8 bits per channel, got Pillow's mode {picture.mode}: scale it "
            "to 0…255, and convert it to RGB"
        )
    rgba = np.asarray(picture.convert("RGBA"))
    rgb = np.ascontiguousarray(rgba[:, :, :3])
    profile = picture.info.get("icc_profile")
    if profile and picture.mode in ("RGB", "RGBA", "P"):
        rgb = to_srgb(rgb, profile)
    turn = picture.getexif().get(0x0112, 1)
    return np.ascontiguousarray(oriented(on_white(rgb, rgba[:, :, 3]), turn))


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file's bytes: (h, w, 3) uint8 RGB. Raises InputError and MemoryError."""
    if not data:
        raise InputError("the file is empty (0 bytes)")
    data = walk(data, max_pixels)
    with memory_errors():
        return _decoded(data)


def _decoded(data: bytes) -> np.ndarray:
    """The photo of a file whose headers are as they should be."""
    grey_alpha = as_grey(data)
    pixels, exif = _opened(grey_alpha[0] if grey_alpha else data, cv2.IMREAD_UNCHANGED)
    if grey_alpha:
        pixels = pixels.reshape(len(pixels), -1, 2)
        if grey_alpha[1]:
            pixels = np.cumsum(pixels, axis=1, dtype=pixels.dtype)
    if pixels.dtype == np.uint16 and not data.startswith(FULL_SCALE):
        pixels, exif = _opened(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"expected 8 or 16 bits per channel, got {pixels.dtype} pixels: "
            "tone-map the image and save it as 8 bit"
        )
    if (white := _white(data, pixels.dtype)) != 255:
        pixels = cv2.convertScaleAbs(pixels, alpha=255 / white)
    rgb = to_rgb(pixels, data)
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


def keep_quiet() -> None:
    """Keep warnings about files off the terminal, for commands that say it in their own words:
    OpenCV's about damaged ones, and FirstPictureWarning."""
    warnings.simplefilter("ignore", FirstPictureWarning)
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
        if name := compression(data):
            raise InputError(
                f"a TIFF compressed by {name} cannot be read: save it with LZW or Deflate"
            )
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


def to_rgb(pixels: np.ndarray, data: bytes = b"") -> np.ndarray:
    """uint8 grey (h, w), grey and alpha, BGR or BGRA (h, w, 2, 3 or 4) to sRGB (h, w, 3).

    data: the photo's file, which may describe its colours. Transparent parts become white.
    """
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 3:
        return to_srgb(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), colours_of(data))
    if pixels.shape[2] == 2:
        grey, alpha = cv2.split(pixels)
        return on_white(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), alpha)
    if pixels.shape[2] != 4:
        raise InputError(f"expected 1 to 4 channels, got {pixels.shape[2]}")
    rgb = to_srgb(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB), colours_of(data))
    return on_white(rgb, pixels[:, :, 3])


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Pixels (h, w, 3) uint8 laid on white. alpha: (h, w) uint8, 255 = opaque."""
    if alpha.min() == 255:
        return rgb
    laid, share = np.empty_like(rgb), alpha.astype(np.uint16)
    for channel in range(3):  # one at a time: 48-megapixel photos
        blend = rgb[:, :, channel] * share + 255 * (255 - share)
        laid[:, :, channel] = (blend + 127) // 255
    return laid
