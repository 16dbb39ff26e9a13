"""Photos with one binary mask each: every salient object of a photo as one region, without ranks.

    images/   the photos, of any kind that the runtime reads
    masks/    one mask for each photo, of the same name but for the suffix; salient is what is
              brighter than 127

This is the form of DUTS, ECSSD and their kind, which background removers are measured on. To train
on, each separate part of the mask is one object, where the parts are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dsgnn.data.ranks import PREDICTED, PredictLooks, needed, shares_under
from dsgnn.data.records import SPLITS, check_split, place_of, read_photo
from dsgnn.data.sample import Sample
from dsgnn.runtime.errors import DataError

PART_AREA = 0.004  # share of the photo below which a part of the mask is a speck
MOST_PARTS = 4  # a mask in more parts than this does not tell its objects apart


@dataclass(frozen=True)
class BinaryPhoto:
    """One photo and its mask, not read yet. path, mask: the two files."""

    path: Path
    mask: Path

    def read(self) -> np.ndarray:
        """Read the photo: (h, w, 3) uint8 RGB. Raises DataError if that fails."""
        return read_photo(self.path)

    def read_mask(self, size: tuple[int, int]) -> np.ndarray:
        """Read the mask: (h, w) bool. size: (h, w) of the photo.

        Raises DataError if it cannot be read or has another size.
        """
        grey = read_photo(self.mask)[..., 0]
        if grey.shape != size:
            raise DataError(
                f"{self.mask} has {grey.shape[1]}×{grey.shape[0]} pixels, but {self.path} has "
                f"{size[1]}×{size[0]}; a mask must have its photo's size"
            )
        return grey > 127


def read_binary(folder: Path, problems: list[str] | None = None) -> list[BinaryPhoto]:
    """All photos of a folder with `images/` and `masks/`, sorted by name; pixels stay on disk.

    problems: takes a message for each photo without a mask, for each mask without a photo and for
    each name that occurs twice, instead of the first being raised as DataError.
    """
    found: list[str] = []
    images, masks = (_by_stem(folder / name, found) for name in ("images", "masks"))
    for files, others, lacks in (
        (images, masks, "mask in masks"),
        (masks, images, "photo in images"),
    ):
        found += [f"{files[stem]} has no {lacks}/" for stem in files.keys() - others.keys()]
    if problems is None and found:
        raise DataError(min(found))
    if problems is not None:
        problems += sorted(found)
    return [BinaryPhoto(images[stem], masks[stem]) for stem in sorted(images.keys() & masks)]


def _by_stem(folder: Path, problems: list[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            if path.stem in files:
                problems.append(f"{path} and {files[path.stem]} have the same name")
            files.setdefault(path.stem, path)
    return files


def binary_split(name: str) -> str:
    """ "val" for one photo of 20, "test" for another, else "train": by a hash of the name."""
    return {0: "val", 1: "test"}.get(place_of(name, 20), "train")


class BinaryReader:
    """The photos of one split as samples whose objects are the parts of the mask.

    predict_looks: ranks the parts. Raises OptionError for another split and where nothing ranks
    them, besides what `read_binary` raises.
    """

    ranks_from = PREDICTED

    def __init__(self, folder: Path, split: str, predict_looks: PredictLooks | None) -> None:
        check_split(split, SPLITS)
        self.predict_looks = needed(predict_looks, folder)
        photos = read_binary(folder)
        self.photos = [photo for photo in photos if binary_split(photo.path.name) == split]

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Sample:
        photo = self.photos[index]
        image = photo.read()
        mask = photo.read_mask(image.shape[:2])
        looks = self.predict_looks(image)
        masks, specks = parts_of(mask)
        foreground = mask.astype(np.int8)
        if len(masks):
            foreground[specks] = -1
        order = np.argsort(-shares_under(looks, masks), kind="stable")
        ranks = np.arange(len(masks), 0, -1)
        return Sample(image, masks[order], ranks, photo.path.stem, foreground, looks)


def parts_of(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The separate parts of a mask (h, w) bool → (G, h, w) bool, and its specks, (h, w) bool.

    There are none where they are more than `MOST_PARTS`, as several of them may be one object.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    large = [k for k in range(1, count) if stats[k, cv2.CC_STAT_AREA] >= PART_AREA * mask.size]
    specks = mask & ~np.isin(labels, large)
    if not 1 <= len(large) <= MOST_PARTS:
        return np.zeros((0, *mask.shape), bool), specks
    return np.stack([labels == k for k in large]), specks
