"""Photos of which it is known what people look at: what models are measured against.

Three forms of a folder are known, see `FORMS`. Each photo belongs to one split by its file name
alone (`dsgnn.data.gaze.gaze_split`, and `dsgnn.data.binary.binary_split` for photos with one mask),
except that photos which their file keeps for testing (`dev`, `human`) belong to "test".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsgnn.data.binary import BinaryPhoto, binary_split, read_binary
from dsgnn.data.coco import Photo, read_photos
from dsgnn.data.gaze import ANNOTATIONS, GazePhoto, gaze_split, read_gaze
from dsgnn.data.records import SPLITS, check_split
from dsgnn.runtime.errors import DataError

FORMS = """
  fixations    fixations.json, images/
  COCO format  instances.json, or such a file itself, with human_rank or fixations in annotations
  one mask     images/, masks/"""

MeasuredPhoto = GazePhoto | Photo | BinaryPhoto


def open_people(
    spec: Path | str, split: str, problems: list[str] | None = None
) -> Sequence[MeasuredPhoto]:
    """Open a split of a folder of one of the `FORMS`; pixels stay on disk.

    split: train, val, test, or all. problems: takes messages about entries that are wrong, which
    are left out, instead of the first being raised; a broken `fixations.json` is raised all the
    same. Raises OptionError for another split, FileNotFoundError where there is no folder, and
    DataError for one that is broken or of none of these forms.
    """
    check_split(split, (*SPLITS, "all"))
    root = Path(spec)
    if not root.exists():
        raise FileNotFoundError(f"no data at {root}; expected one of{FORMS}")
    photos: Sequence[MeasuredPhoto]
    if (root / ANNOTATIONS).is_file():
        photos = read_gaze(root)
    elif (root / "masks").is_dir():
        photos = read_binary(root, problems)
    elif root.is_file() or (root / "instances.json").is_file():
        photos = [photo for photo in read_photos(root, problems=problems) if photo.seen_by_people]
        if not photos:
            raise DataError(
                f"{root}: no annotation has human_rank or fixations, so nothing is known about "
                "what people look at"
            )
    else:
        raise DataError(f"{root} is of no known form; expected one of{FORMS}")
    return [photo for photo in photos if split in ("all", split_of(photo))]


def only_measures(spec: Path | str) -> bool:
    """Whether the folder has one of the forms without ranked objects, which are no samples."""
    return (Path(spec) / ANNOTATIONS).is_file() or (Path(spec) / "masks").is_dir()


def split_of(photo: MeasuredPhoto) -> str:
    """ "train", "val" or "test"."""
    if isinstance(photo, BinaryPhoto):
        return binary_split(photo.path.name)
    kept = photo.dev if isinstance(photo, GazePhoto) else photo.human
    return "test" if kept else gaze_split(photo.path.name)
