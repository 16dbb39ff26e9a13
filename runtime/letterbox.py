"""Fit a photo into the network's input: resize, then pad right and bottom with grey.

Letters used in this package: B batch, Q queries, (h, w) a photo's own size, (H, W) the padded
size the network sees. Mean and standard deviation are applied inside the exported graph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import cv2
import numpy as np

from dsgnn.runtime.errors import InputError, OptionError

PAD = 128  # grey level of the padding, upstream's
MULTIPLE = 32  # of the padded sides, as the networks' strides need


@dataclass(frozen=True)
class Geometry:
    """Where a photo lies in the network's input. Every field is (height, width) in pixels."""

    original: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]


@dataclass(frozen=True)
class LongestSide:
    """Upstream's rule: scale the longest side to `size`, pad both to a multiple of `multiple`.

    All in pixels. Raises OptionError for a value below 1.
    """

    size: int
    multiple: int = MULTIPLE

    def __post_init__(self) -> None:
        _require_positive(size=self.size, multiple=self.multiple)

    def geometry(self, h: int, w: int) -> Geometry:
        resized = _scaled(h, w, self.size / max(h, w))
        height, width = (-(-side // self.multiple) * self.multiple for side in resized)
        return Geometry((h, w), resized, (height, width))


@dataclass(frozen=True)
class Fixed:
    """The rule of static artifacts: the largest scale that fits, pad to `height` × `width` pixels.

    Raises OptionError for a value below 1.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        _require_positive(height=self.height, width=self.width)

    def geometry(self, h: int, w: int) -> Geometry:
        resized = _scaled(h, w, min(self.height / h, self.width / w))
        return Geometry((h, w), resized, (self.height, self.width))


Rule = LongestSide | Fixed


def parse_size(text: str) -> tuple[int, int]:
    """ "448x576" to (448, 576): height and width of a padded photo. Raises OptionError."""
    sides = re.fullmatch("([0-9]{1,6})[xX×]([0-9]{1,6})", text)
    height, width = (int(side) for side in sides.groups()) if sides else (0, 0)
    if not height or not width or height % MULTIPLE or width % MULTIPLE:
        raise OptionError(
            f"expected HxW such as 448x576, in pixels and multiples of {MULTIPLE}, got {text}"
        )
    return height, width


def letterbox(image: np.ndarray, rule: Rule) -> tuple[np.ndarray, Geometry]:
    """Resize (OpenCV bilinear on uint8) and pad a photo.

    image: (h, w, 3) uint8, any channel order. Returns the padded image, (H, W, 3) uint8, and its
    Geometry. Raises InputError for another dtype or shape, or an empty image.
    """
    check_photo(image)
    geometry = rule.geometry(*image.shape[:2])
    height, width = geometry.resized
    padded = np.full((*geometry.padded, 3), PAD, np.uint8)  # (H, W, 3)
    padded[:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return padded, geometry


def shrunk(h: int, w: int, longest: int) -> tuple[int, int]:
    """Height and width of a picture whose longest side is made `longest` pixels if it has more."""
    scale = min(1.0, longest / max(h, w))
    return max(1, round(h * scale)), max(1, round(w * scale))


def check_photo(image: np.ndarray) -> None:
    """Raise InputError unless `image` is a non-empty (h, w, 3) uint8 array."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        remedy = "give a path or encoded bytes to have it converted"
        if np.issubdtype(image.dtype, np.floating):
            remedy = "convert values from 0 to 1 by (255 * image).round().astype(np.uint8)"
        raise InputError(
            f"expected a non-empty uint8 RGB image of shape (h, w, 3), got {image.dtype} of shape "
            f"{image.shape}; {remedy}"
        )


def _scaled(h: int, w: int, scale: float) -> tuple[int, int]:
    """Sides rounded as upstream does, but at least one pixel, for photos of extreme shapes."""
    return max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5))


def _require_positive(**sides: int) -> None:
    for name, value in sides.items():
        if value < 1:
            raise OptionError(f"letterbox {name} must be at least 1 pixel, got {value}")
