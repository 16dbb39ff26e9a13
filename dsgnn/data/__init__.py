"""Ranked images from data sets on disk or made up: `open_data(spec, split)[i]` is a `Sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsgnn.data.assr import AssrReader
from dsgnn.data.binary import BinaryReader
from dsgnn.data.coco import CocoReader
from dsgnn.data.gaze import ANNOTATIONS, GazeReader
from dsgnn.data.irsr import IrsrReader
from dsgnn.data.ranks import PredictLooks, needed
from dsgnn.data.records import Joined, Samples, Subset, for_validation
from dsgnn.data.sifr import SifrReader
from dsgnn.runtime.errors import DataError, OptionError

FORMS = """
  ASSR         obj_seg_data_{split}.json, images/, rank_order/
  IRSR         Annotations/{split}.pkl, Images/
  SIFR         {split}/{split}_annotations.json, {split}/rgb/
  COCO format  {split}.json or instances_{split}.json, here or in annotations/; or instances.json;
               or such a file itself; the photos in images/{split}/, {split}/ or images/
  fixations    fixations.json, images/: where people look, without objects
  one mask     images/, masks/: all that is salient as one region
  made up      composite:N or composite:N:FOLDER, N scenes (of cutouts/, backgrounds/, photos/)"""


def open_data(
    spec: Path | str,
    split: str,
    predict_looks: PredictLooks | None = None,
    problems: list[str] | None = None,
) -> Samples:
    """Open one split, or several joined as in "train+val", of the data set that spec names.

    spec: a folder or file of one of the `FORMS`, recognised by what is in it, or "composite:N…".
    Where the authors give no validation split, val is a fixed part of train, which train then lacks
    (see each reader). Images are read when asked for.
    predict_looks: gives COCO-format data, photos with one binary mask and made-up scenes their
    ranks, whatever the file says; other data sets keep theirs. Where nothing else tells the ranks,
    it is needed. problems: takes messages about wrong entries where the file is checked as it is
    opened, and these entries are left out; without it the first is raised.
    `palette` of the result, where it has one, is the palette its MAE is published with ("irsr"
    otherwise), and `ranks_from` says where the ranks come from.
    Raises OptionError for a split that there is not and where nothing ranks the objects,
    FileNotFoundError for files that are missing and DataError for a folder that is not recognised
    or is broken.
    """
    if not split or not all(split.split("+")):
        raise OptionError(f"split must be a name or names joined by +, got {split!r}")
    parts = [_open_one(str(spec), name, predict_looks, problems) for name in split.split("+")]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _open_one(
    spec: str, split: str, predict_looks: PredictLooks | None, problems: list[str] | None
) -> Samples:
    if spec.startswith("composite:"):
        return _open_composite(spec, split, predict_looks)
    root = Path(spec)
    if not root.exists():
        raise FileNotFoundError(f"no data at {root}; expected one of{FORMS}")
    if (root / ANNOTATIONS).is_file():
        return GazeReader(root, split)
    if (root / "masks").is_dir():
        return BinaryReader(root, split, predict_looks)
    if any(root.glob("obj_seg_data_*.json")):
        return AssrReader(root, split)
    if any(root.glob("Annotations/*.pkl")):
        return IrsrReader(root, split)
    if any(root.glob("*/*_annotations.json")):
        return SifrReader(root, split)
    return _open_coco(root, split, predict_looks, problems)


def _open_coco(
    root: Path, split: str, predict_looks: PredictLooks | None, problems: list[str] | None
) -> Samples:
    """A split is either a file of its own, or a part of the only file there is.

    Without a file for val, the photos of train are told apart by their names: some are for val,
    the rest for train. Photos that the file itself holds out are for val too, and those that it
    keeps for measuring against people are for neither.
    """

    def file_of(name: str) -> Path | None:
        stems = name, f"instances_{name}"
        paths = (root / folder / f"{x}.json" for folder in ("", "annotations") for x in stems)
        return next((path for path in paths if path.is_file()), None)

    held_out = split in ("train", "val") and file_of("val") is None
    name = "train" if held_out else split
    images = None
    if path := file_of(name):
        folders = [root / "images" / name, root / name, root / "images", root]
        images = next(f for f in folders if f.is_dir())
    elif not root.is_file() and not (root / "instances.json").is_file():
        raise DataError(f"{root} has no split {split!r} in a known form; expected one of{FORMS}")
    elif split not in ("train", "val", "all"):
        raise OptionError(f"{root} is one set: its splits are train, val and all, got {split!r}")
    reader = CocoReader(path or root, images, predict_looks, problems)
    if not held_out:
        return reader
    val = [photo.held_out or for_validation(photo.path.name) for photo in reader.photos]
    chosen = [
        index
        for index, photo in enumerate(reader.photos)
        if not photo.human and val[index] == (split == "val")
    ]
    return Subset(reader, chosen)


def _open_composite(spec: str, split: str, predict_looks: PredictLooks | None) -> Samples:
    """Scenes of the test split's material for test, and other ones of the same for val."""
    from dsgnn.scenes.composite import CompositeScenes

    _, count, *folder = spec.split(":", 2)
    if not count.isdigit() or not int(count):
        raise OptionError(f"expected composite:N or composite:N:FOLDER, N scenes, got {spec!r}")
    if split not in ("train", "val", "test"):
        raise OptionError(f"the splits of composite scenes are train, val, test, got {split!r}")
    material: dict[str, Any] = {}
    if folder:
        root = Path(folder[0])
        names = {"cutouts": "cutouts", "backgrounds": "backgrounds", "coco": "photos"}
        material = {key: root / name for key, name in names.items() if (root / name).is_dir()}
        if not material:
            raise DataError(f"{root} has none of {', '.join(names.values())}")
    return CompositeScenes(
        needed(predict_looks, spec),
        **material,
        split="train" if split == "train" else "test",
        size=320 if split == "train" else 256,
        seed=1 if split == "val" else 0,
        length=int(count),
    )
