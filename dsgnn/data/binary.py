"""Photos with one binary mask each: every salient object of a photo as one region, without ranks.

    images/   the photos, of any kind that the runtime reads
    masks/    one mask for each photo, of the same name but for the suffix; salient is what is
              brighter than 127

This is the form of DUTS, ECSSD and their kind, which background removers are measured on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsgnn.runtime.errors import DataError, InputError
from dsgnn.runtime.images import read_image


@dataclass(frozen=True)
class BinaryPhoto:
    """One photo and its mask, not read yet. path, mask: the two files."""

    path: Path
    mask: Path

    def read(self) -> np.ndarray:
        """Read the photo: (h, w, 3) uint8 RGB. Raises DataError if that fails."""
        return _read(self.path)

    def read_mask(self, size: tuple[int, int]) -> np.ndarray:
        """Read the mask: (h, w) bool. size: (h, w) of the photo.

        Raises DataError if it cannot be read or has another size.
        """
        grey = _read(self.mask)[..., 0]
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


def _read(path: Path) -> np.ndarray:
    try:
        return read_image(path)
    except (OSError, InputError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
