"""SIFR (Deng et al., CVPR 2024): objects ranked by human fixations.

    {split}/{split}_annotations.json  [{"file_name", "image_id", "height", "width",
                                        "annotations": [{"bbox", "segmentation", "gt_rank"}, …]}, …]
    {split}/rgb/{file_name}

for train and test. A larger gt_rank is more salient. There is no published validation split: one
training image in 20 is held out by its file name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsgnn.data.records import (
    SPLITS,
    RankedImages,
    Record,
    check_split,
    field,
    inside,
    number,
    objects,
    read_json,
    stated_size,
)


class SifrReader(RankedImages):
    """One split of SIFR: train (without the images held out), val (those) or test.

    root: the folder with the files above. Raises OptionError for another split, FileNotFoundError
    when the split's annotations are not there, DataError when they are broken.
    """

    def __init__(self, root: Path | str, split: str) -> None:
        check_split(split, SPLITS)
        folder = "test" if split == "test" else "train"
        self._folder = Path(root) / folder
        path = self._folder / f"{folder}_annotations.json"
        super().__init__(split, path, read_json(path, list), with_val=False)

    def _record(self, entry: Any, where: str) -> Record:
        found = objects(entry, "annotations", where)
        name = inside(field(entry, "file_name", str, where), f"{where}.file_name")
        return Record(
            image=self._folder / "rgb" / name,
            where=where,
            objects=found,
            saliency=[
                number(field(annotation, "gt_rank", object, at), f"{at}.gt_rank")
                for at, annotation in found.items()
            ],
            size=stated_size(entry, where),
        )
