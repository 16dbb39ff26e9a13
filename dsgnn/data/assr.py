"""ASSR (Siris et al., CVPR 2020): up to five ranked objects of an image, from attention shifts.

    images/{split}/{img}.jpg
    obj_seg_data_{split}.json      [{"img", "object_data": [{"bbox", "segmentation"}, …]}, …]
    rank_order/{split}/{img}.json  {"rank_order": [one number per object of object_data]}

An object is salient if its number exceeds 0.5; larger = more salient.
"""

from __future__ import annotations

from itertools import compress
from pathlib import Path
from typing import Any

from dsgnn.data.records import (
    RankedImages,
    Record,
    check_split,
    field,
    inside,
    numbers,
    objects,
    read_json,
)
from dsgnn.runtime.errors import DataError

PUBLISHED_IMAGES = {"train": 7646, "val": 1436, "test": 2418}
SALIENT_ABOVE = 0.5


class AssrReader(RankedImages):
    """One split of ASSR: train, val or test.

    root: the folder with the files above. Raises OptionError for another split, FileNotFoundError
    when the split's annotations are not there, DataError when they are broken.
    """

    palette = "assr"

    def __init__(self, root: Path | str, split: str) -> None:
        check_split(split, PUBLISHED_IMAGES)
        self.root = Path(root)
        self.published_images = PUBLISHED_IMAGES[split]
        path = self.root / f"obj_seg_data_{split}.json"
        super().__init__(split, path, read_json(path, list), with_val=True)

    def _record(self, entry: Any, where: str) -> Record:
        name = inside(field(entry, "img", str, where), f"{where}.img")
        found = objects(entry, "object_data", where)
        rank_path = self.root / "rank_order" / self.split / f"{name}.json"
        try:
            content = read_json(rank_path, dict)
        except FileNotFoundError as error:
            raise DataError(f"{where}: {error}") from None
        at = f"{rank_path}: rank_order"
        order = numbers(field(content, "rank_order", list, f"{rank_path}"), at)
        if len(order) != len(found):
            raise DataError(
                f"{at} has {len(order)} numbers, {where}.object_data {len(found)} objects; "
                "they must be one to one"
            )
        salient = [value > SALIENT_ABOVE for value in order]
        return Record(
            image=self.root / "images" / self.split / f"{name}.jpg",
            where=where,
            objects=dict(compress(found.items(), salient)),
            saliency=list(compress(order, salient)),
            step=0.1,
        )
