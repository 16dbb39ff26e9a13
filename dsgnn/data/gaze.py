"""Where people looked: the reader of `fixations.json`, and one split for all.

A folder holds `images/` and `fixations.json`: `{"images": [{"file_name", "width", "height",
"source", "dev", …}]}`. Each photo has either `viewers`, one list per person of fixations
`[x, y, ms]` in time order, or `points`, the fixations `[x, y]` of all people together. The first
fixation of each viewer started at the centre of the screen before the photo appeared, so it says
nothing about the photo and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dsgnn.data.ranks import inside
from dsgnn.data.records import (
    SPLITS,
    check_split,
    field,
    file_name,
    number,
    place_of,
    read_json,
    read_photo,
)
from dsgnn.data.sample import Sample, without_objects
from dsgnn.runtime.errors import DataError, OptionError

ANNOTATIONS = "fixations.json"
# Of 100 photos the first 65 are for training, the next 15 for choices, the last 20 for the report.
TRAIN_PERCENT, VAL_PERCENT = 65, 15
CELL_PX = 8  # pixels of a cell of a training photo's map of looks
# About one degree of visual angle, as a share of the photo's longest side: how far apart two people
# look who look at the same thing.
BLUR = 0.032
COCO_HOLDOUT = 5  # COCO photos whose id is divisible by this are never trained on


@dataclass(frozen=True)
class GazePhoto:
    """Where people looked on one photo; its pixels are not read yet.

    path: the file. width, height: in pixels. source: the data set that the photo comes from.
    points: (N, 2) float64, x and y in pixels of all fixations that count. viewers: the same
    fixations, one (n, 2) array per person in time order, or empty where persons are not told
    apart. dev: the photo belongs to a test set of another kind. coco_id: its number in COCO, where
    it is one of COCO's photos.
    """

    path: Path
    width: int
    height: int
    source: str
    points: np.ndarray
    viewers: tuple[np.ndarray, ...] = ()
    dev: bool = False
    coco_id: int | None = None

    @property
    def split(self) -> str:
        """ "train", "val" or "test", by the file's name alone: `gaze_split`."""
        return gaze_split(self.path.name)

    @property
    def may_train(self) -> bool:
        """Whether a network may learn from this photo.

        Only photos of the training split may be learnt from, and of these none that is marked
        `dev` and none that the COCO set holds out.
        """
        held_out = self.coco_id is not None and self.coco_id % COCO_HOLDOUT == 0
        return self.split == "train" and not self.dev and not held_out

    @property
    def points_inside(self) -> np.ndarray:
        """The fixations that lie on the photo: (M, 2)."""
        return self.points[((self.points >= 0) & (self.points < (self.width, self.height))).all(1)]

    def read(self) -> np.ndarray:
        """(height, width, 3) uint8 RGB.

        Raises DataError if the file is missing, broken, or of another size than stated.
        """
        return read_photo(self.path, size=(self.height, self.width))


def gaze_split(name: str) -> str:
    """ "train" (65%), "val" (15%) or "test" (20%), by a hash of the file's name.

    The folder does not count, and neither does anything else, so a photo stays where it is when
    others come or go.
    """
    place = place_of(file_name({"file_name": name}), 100)
    if place < TRAIN_PERCENT:
        return "train"
    return "val" if place < TRAIN_PERCENT + VAL_PERCENT else "test"


def read_gaze(folder: Path) -> list[GazePhoto]:
    """All photos of a folder with `fixations.json`, in the file's order.

    Raises FileNotFoundError when that file is missing, and DataError, which names the entry
    and the field, when it is not of the form above or two entries have the same name.
    """
    path = folder / ANNOTATIONS
    entries = field(read_json(path, dict), "images", list, str(path))
    photos = [_photo(entry, folder, f"{path}: images[{i}]") for i, entry in enumerate(entries)]
    places: dict[str, int] = {}
    for i, photo in enumerate(photos):
        if photo.path.name in places:
            raise DataError(
                f"{path}: images[{i}] and images[{places[photo.path.name]}] are both named "
                f"{photo.path.name!r}; each photo must have one entry"
            )
        places[photo.path.name] = i
    return photos


def _photo(entry: Any, folder: Path, where: str) -> GazePhoto:
    name = field(entry, "file_name", str, where)
    if not file_name(entry) or file_name(entry) != name:
        raise DataError(f"{where}.file_name must be a name without a folder, got {name!r}")
    width, height = (_positive(entry, side, where) for side in ("width", "height"))
    dev = field(entry, "dev", bool, where) if "dev" in entry else False
    coco_id = _positive(entry, "coco_id", where) if "coco_id" in entry else None
    if ("viewers" in entry) == ("points" in entry):
        raise DataError(f"{where} must have either 'viewers' or 'points'")
    viewers: tuple[np.ndarray, ...] = ()
    if "viewers" in entry:
        viewers = tuple(
            _fixations(viewer, 3, f"{where}.viewers[{i}]")[1:]
            for i, viewer in enumerate(field(entry, "viewers", list, where))
        )
        points = np.concatenate([np.empty((0, 2)), *viewers])
    else:
        points = _fixations(entry["points"], 2, f"{where}.points")
    return GazePhoto(
        folder / "images" / name,
        width,
        height,
        field(entry, "source", str, where),
        points,
        viewers,
        dev,
        coco_id,
    )


def _positive(entry: Mapping, name: str, where: str) -> int:
    value = number(field(entry, name, (int, float), where), f"{where}.{name}")
    if value != int(value) or value < 1:
        raise DataError(f"{where}.{name} must be a whole number from 1, got {value!r}")
    return int(value)


def _fixations(rows: Any, columns: int, where: str) -> np.ndarray:
    """(n, 2) float64: x and y of rows that hold `columns` finite numbers each."""
    form = "[x, y, ms]" if columns == 3 else "[x, y]"
    if not isinstance(rows, list):
        raise DataError(f"{where} must be a list of {form}, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != columns:
            raise DataError(f"{where}[{i}] must be {form}, got {row!r}")
        for value in row:
            number(value, f"{where}[{i}]")
    return np.array([row[:2] for row in rows], np.float64).reshape(-1, 2)


def density(photo: GazePhoto, grid: tuple[int, int], sigma: float) -> np.ndarray:
    """How densely people looked: (gh, gw) float32 that sums to 1.

    grid: (gh, gw), the number of cells down and across the photo. sigma: the standard deviation in
    cells of the Gaussian that blurs the counts; what it carries over the edge is left out.
    Fixations outside the photo are left out. Raises OptionError when none is left.
    """
    gh, gw = grid
    cells = inside(photo.points * (gw / photo.width, gh / photo.height), gw, gh)
    counts = np.zeros(grid)
    np.add.at(counts, cells, 1)
    if not counts.any():
        raise OptionError(f"{photo.path.name} has no fixation inside its frame")
    blurred = cv2.GaussianBlur(counts, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)
    return (blurred / blurred.sum()).astype(np.float32)


class GazeReader:
    """Photos with people's fixations as samples for training: attention, and no object at all.

    split: "train" has the photos that may be learnt from (`GazePhoto.may_train`), "val" and "test"
    the others of that split that are not marked `dev`. Raises OptionError for another split, and
    what `read_gaze` raises.
    """

    ranks_from = "people"

    def __init__(self, folder: Path, split: str) -> None:
        check_split(split, SPLITS)
        self.photos = [
            photo
            for photo in read_gaze(folder)
            if (photo.may_train if split == "train" else photo.split == split and not photo.dev)
        ]

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Sample:
        photo = self.photos[index]
        size = photo.height, photo.width
        rows, columns = (-(-side // CELL_PX) for side in size)
        looks = density(photo, (rows, columns), BLUR * max(rows, columns))
        unknown = np.full(size, -1, np.int8)
        return without_objects(photo.read(), photo.path.stem, unknown, looks)
