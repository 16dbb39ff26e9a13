"""Material for composite scenes: what a folder of cut-outs, of backgrounds or of photos gives.

Any folder of RGBA images is a folder of cut-outs, any folder of images one of backgrounds. Every
file is held out for testing or not by its name alone (`held_out`), so that a split never changes
when files are added.

`dsgnn.scenes.collect` makes both out of installed packages.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dsgnn.data.binary import parts_of
from dsgnn.data.coco import Instance, Photo, read_photos
from dsgnn.data.records import for_validation
from dsgnn.runtime.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
CUTOUT_PX = 384  # longest side kept
BACKGROUND_PX = 768
MIN_COPY_PX = 64  # √area from which an object is copied out of a photo
# What furnishes a room is not copied out of it.
FURNITURE = {"bed", "bench", "chair", "couch", "dining table", "oven", "refrigerator", "sink"}


def held_out(name: str) -> bool:
    """Whether the file of this name (no folder, no suffix) belongs to the test split: one in five.

    COCO photo ids use `id % 5 == 0` instead.
    """
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


@dataclass(frozen=True)
class Cutout:
    """One object with alpha. rgba: (h, w, 4) uint8, colours multiplied by alpha, so that it can be
    resized and blurred as it is. kind: what its annotation calls it, "" without one. cut: which of
    the left, top, right and bottom edges cut the object in its photo, so must lie on the frame's
    edge.
    """

    rgba: np.ndarray
    kind: str = ""
    cut: tuple[bool, bool, bool, bool] = (False, False, False, False)


def image_files(folder: Path | str) -> list[Path]:
    """Every image below a folder, sorted. Raises FileNotFoundError when there is none."""
    files = sorted(
        Path(root) / name
        for root, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )
    if not files:
        raise FileNotFoundError(f"{folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def read_cutout(path: Path) -> Cutout:
    """Read an RGBA image at most `CUTOUT_PX` long, cropped to where it is not transparent.

    Raises DataError when the file is not an image with an alpha channel or is all transparent.
    """
    bgra = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if bgra is None or bgra.dtype != np.uint8 or bgra.ndim != 3 or bgra.shape[2] != 4:
        raise DataError(f"{path}: a cut-out must be an 8-bit RGBA image")
    x, y, w, h = cv2.boundingRect((bgra[..., 3] > 127).view(np.uint8))
    if w == 0:
        raise DataError(f"{path}: the image is transparent everywhere")
    rgba = cv2.cvtColor(bgra[y : y + h, x : x + w], cv2.COLOR_BGRA2RGBA)
    return Cutout(shrink(premultiplied(rgba), CUTOUT_PX))


def premultiplied(rgba: np.ndarray) -> np.ndarray:
    """Multiply the colours of (h, w, 4) uint8 by its alpha."""
    alpha = rgba[..., 3:]
    colours = rgba[..., :3].astype(np.uint16) * alpha // 255
    return np.dstack([colours.astype(np.uint8), alpha])


def straight(rgba: np.ndarray) -> np.ndarray:
    """The inverse of `premultiplied`: (h, w, 4) of 0…255 → uint8, for image files."""
    alpha = np.maximum(rgba[..., 3:] / np.float32(255), 1e-3)
    colours = np.clip(rgba[..., :3] / alpha, 0, 255)
    return np.rint(np.dstack([colours, rgba[..., 3]])).astype(np.uint8)


def read_background(path: Path) -> np.ndarray:
    """Read an image as (h, w, 3) uint8 RGB, at most `BACKGROUND_PX` long."""
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise DataError(f"{path}: not a readable image")
    return cv2.cvtColor(shrink(bgr, BACKGROUND_PX), cv2.COLOR_BGR2RGB)


def photo_cutouts(photo: Photo, image: np.ndarray) -> Iterator[Cutout]:
    """The well visible objects of a photo, feathered: `_copyable`, not touched by others along
    more than 15% of their outline, cut by at most one edge of the photo.
    """
    h, w = image.shape[:2]
    masks = [instance.draw((h, w)).view(np.uint8) for instance in photo.instances]
    count = sum(masks, np.zeros((h, w), np.uint8))
    for i, instance in enumerate(photo.instances):
        if not _copyable(instance):
            continue
        x, y, bw, bh = cv2.boundingRect(masks[i])
        cut = (x <= 2, y <= 2, x + bw >= w - 2, y + bh >= h - 2)
        ring = cv2.dilate(masks[i], np.ones((9, 9), np.uint8)) - masks[i]
        covered = cv2.countNonZero(ring * (count - masks[i]))
        if sum(cut) > 1 or covered > 0.15 * cv2.countNonZero(ring):
            continue
        yield Cutout(_cut_out(image, masks[i]), instance.kind, cut)


def mask_cutout(image: np.ndarray, mask: np.ndarray) -> Cutout | None:
    """The object of a photo whose mask is one part that no edge of the photo cuts, or None.

    image: (h, w, 3) uint8 RGB. mask: (h, w) bool, everything salient in the photo.
    """
    parts, specks = parts_of(mask)
    if len(parts) != 1 or specks.any():
        return None
    x, y, w, h = cv2.boundingRect(parts[0].view(np.uint8))
    inside = x > 2 and y > 2 and x + w < mask.shape[1] - 2 and y + h < mask.shape[0] - 2
    if not inside or cv2.countNonZero(parts[0].view(np.uint8)) < MIN_COPY_PX**2:
        return None
    return Cutout(_cut_out(image, parts[0].view(np.uint8)))


def _cut_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What a mask (h, w) uint8 of 0 and 1 shows of a photo: RGBA as in `Cutout`, feathered."""
    # The outline is drawn a little too wide: go in a pixel, then soften, but not at a cut.
    inner = cv2.erode(mask, np.ones((3, 3), np.uint8))
    alpha = cv2.GaussianBlur(inner * np.float32(255), (0, 0), 1.0, None, 0, cv2.BORDER_REPLICATE)
    x, y, w, h = cv2.boundingRect(mask)
    window = slice(y, y + h), slice(x, x + w)
    rgba = np.dstack([image[window], alpha[window].astype(np.uint8)])
    return shrink(premultiplied(rgba), CUTOUT_PX)


def empty_region(
    photo: Photo, image: np.ndarray, rng: np.random.Generator, min_px: int = 128
) -> np.ndarray | None:
    """A random part of a photo with no annotated object in it, at least min_px square, or None."""
    h, w = image.shape[:2]
    taken = np.zeros((h, w), bool)
    for instance in photo.instances:
        taken |= instance.draw((h, w))
    sums = cv2.integral(taken.view(np.uint8))
    best = None
    for _ in range(60):
        ch, cw = (int(rng.integers(min_px, side + 1)) if side > min_px else side for side in (h, w))
        y, x = int(rng.integers(0, h - ch + 1)), int(rng.integers(0, w - cw + 1))
        objects = sums[y + ch, x + cw] - sums[y, x + cw] - sums[y + ch, x] + sums[y, x]
        if objects == 0 and min(ch, cw) >= min_px and (best is None or ch * cw > best.size // 3):
            best = image[y : y + ch, x : x + cw]
    return best


class Library:
    """The files of one split, decoded on first use and then kept.

    cutouts, backgrounds: folders; coco: folder or JSON file; any may be None. A fifth of the files
    by name (`held_out`) and the COCO photos whose id is divisible by 5 belong to split "test", the
    rest to "train"; photos of which not all objects are annotated belong to none. Raises DataError
    when nothing of a given folder falls into the split.
    """

    def __init__(
        self,
        cutouts: Path | str | None,
        backgrounds: Path | str | None,
        coco: Path | str | None,
        split: str,
    ) -> None:
        test = split == "test"
        self.cutout_files = _files_of_split(cutouts, test)
        self.background_files = _files_of_split(backgrounds, test)
        photos = read_photos(coco) if coco else []
        # Photos that are kept for measuring against people are neither trained nor chosen on, those
        # that models are chosen on are not trained on, and where not every object is annotated,
        # nobody knows what is empty or salient.
        self.photos = [
            photo
            for photo in photos
            if photo.complete
            and not photo.human
            and (photo.id % 5 == 0 if test else not _kept_from_training(photo))
        ]
        for folder, files in (
            (cutouts, self.cutout_files),
            (backgrounds, self.background_files),
            (coco, self.photos),
        ):
            if folder is not None and not files:
                raise DataError(f"{folder}: no file falls into the {split} split; add files")
        # Photos with objects that may be copied, judged by outlines alone.
        self.sources = [i for i, p in enumerate(self.photos) if any(map(_copyable, p.instances))]
        self._cache: dict[tuple[str, int], Any] = {}

    def cutout(self, i: int) -> Cutout:
        return self._cached("cutout", i, lambda: read_cutout(self.cutout_files[i]))

    def background(self, i: int) -> np.ndarray:
        return self._cached("background", i, lambda: read_background(self.background_files[i]))

    def photo(self, i: int) -> np.ndarray:
        """Photo i, (h, w, 3) uint8 RGB."""
        return self._cached("photo", i, self.photos[i].read)

    def copies(self, i: int) -> list[Cutout]:
        """The objects of photo i that are good to copy, see `photo_cutouts`."""
        return self._cached("copies", i, lambda: list(photo_cutouts(self.photos[i], self.photo(i))))

    def empty(self, i: int) -> np.ndarray | None:
        """A part of photo i with no annotated object in it, always the same one, or None."""
        rng = np.random.default_rng(self.photos[i].id)
        return self._cached("empty", i, lambda: empty_region(self.photos[i], self.photo(i), rng))

    def _cached(self, name: str, i: int, make: Callable[[], Any]) -> Any:
        if (name, i) not in self._cache:
            self._cache[name, i] = make()
        return self._cache[name, i]


def _kept_from_training(photo: Photo) -> bool:
    return photo.id % 5 == 0 or photo.held_out or for_validation(photo.path.name)


def _files_of_split(folder: Path | str | None, test: bool) -> list[Path]:
    return [p for p in (image_files(folder) if folder else []) if held_out(p.stem) == test]


def _copyable(instance: Instance) -> bool:
    """In one piece, large enough, and something that can stand by itself."""
    return (
        len(instance.parts) == 1
        and instance.area >= MIN_COPY_PX**2
        and instance.kind not in FURNITURE
    )


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    h, w = (max(1, round(side * scale)) for side in image.shape[:2])
    return resized(image, (h, w), shrinks=True)


def resized(image: np.ndarray, size: tuple[int, int], shrinks: bool) -> np.ndarray:
    """To size (h, w), by the mean of what falls on a pixel where the image shrinks."""
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, size[::-1], interpolation=interpolation)
