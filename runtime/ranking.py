"""What a user gets: ranked objects with their masks, and what can be made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsgnn.runtime import rle
from dsgnn.runtime.draw import draw_objects
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.letterbox import check_photo

ASSR_GREYS = (255, 229, 204, 178, 153)  # rank 1, 2, … of the ASSR ground-truth maps
PALETTES = ("assr", "irsr")


@dataclass(frozen=True, eq=False)
class RankedObject:
    """One salient object.

    rank: 1 = most salient. saliency: the score that orders objects of one photo (any range, not
    comparable across models). score: object probability, 0…1. box: (x0, y0, x1, y1) pixels,
    x1 and y1 exclusive; zeros when the mask is empty. mask: (h, w) bool. area: the mask's share
    of the photo, 0…1. query: the network's query that found it (evaluation follows its order).
    identity: in video, the number the object keeps from frame to frame, from 1 in the order of
    appearance; None in photos. attention: the share of people's looks that fall on the visible part
    of the mask, 0…1, where the smaller object takes what two share; None where the artifact does
    not tell.
    Raises ValueError when these do not fit together: a mistake of the program that makes it, not of
    a photo.
    """

    rank: int
    saliency: float
    score: float
    box: tuple[int, int, int, int]
    mask: np.ndarray
    area: float
    query: int
    identity: int | None = None
    attention: float | None = None

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != bool:
            raise ValueError(f"mask must be (h, w) bool, got {self.mask.shape} {self.mask.dtype}")
        h, w = self.mask.shape
        x0, y0, x1, y1 = self.box
        if not (0 <= x0 <= x1 <= w and 0 <= y0 <= y1 <= h):
            raise ValueError(f"box must be (x0, y0, x1, y1) inside a {w}×{h} photo, got {self.box}")
        if self.rank < 1 or self.query < 0 or not 0 <= self.area <= 1:
            raise ValueError(
                "expected rank ≥ 1, query ≥ 0 and area within 0…1, got "
                f"rank {self.rank}, query {self.query}, area {self.area}"
            )
        if self.attention is not None and not 0 <= self.attention <= 1:
            raise ValueError(f"attention must be within 0…1, got {self.attention}")


@dataclass(frozen=True, eq=False)
class Ranking:
    """The salient objects of one photo, most salient first; none is a valid answer.

    height, width: the photo's size, pixels. objects: ranks 1, 2, …, N in this order.
    timings_ms: milliseconds per stage ("decode", "preprocess", "inference", "postprocess"), as far
    as they were measured. attention: where people look, (gh, gw) float32 of a coarse grid over the
    photo, sum 1; None where the artifact has no such output. The grid begins at the photo's top
    left corner; its last row and column may reach beyond the photo.
    Raises ValueError when the objects are not of one photo or are out of order: like those of
    RankedObject, a mistake of the program that makes it.
    """

    height: int
    width: int
    objects: tuple[RankedObject, ...]
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    attention: np.ndarray | None = None

    def __post_init__(self) -> None:
        ranks = [item.rank for item in self.objects]
        if ranks != list(range(1, len(ranks) + 1)):
            raise ValueError(f"objects must have ranks 1…{len(ranks)} in order, got {ranks}")
        for item in self.objects:
            if item.mask.shape != (self.height, self.width):
                raise ValueError(
                    f"every mask must have the photo's size ({self.height}, {self.width}), got "
                    f"{item.mask.shape} for rank {item.rank}"
                )

    def rank_map(self, palette: str = "assr") -> np.ndarray:
        """Paint the ranks as greys: (h, w) uint8, 0 = background, brighter = more salient.

        palette "assr": 255 229 204 178 153 for ranks 1…5, 153 beyond (the ASSR ground truth);
        "irsr": (N + 1 − rank) / N of 255. Where masks overlap the more salient object is on top.
        Raises OptionError for another palette.
        """
        if palette not in PALETTES:
            raise OptionError(f"palette must be one of {', '.join(PALETTES)}, got {palette!r}")
        grey = np.zeros((self.height, self.width), np.uint8)
        total = len(self.objects)
        for item in reversed(self.objects):
            if palette == "assr":
                level = ASSR_GREYS[min(item.rank, len(ASSR_GREYS)) - 1]
            else:
                level = round(255 * (total + 1 - item.rank) / total)
            grey[item.mask] = level
        return grey

    def draw(self, image: np.ndarray) -> np.ndarray:
        """The photo with its objects tinted, outlined and numbered by rank.

        image: (h, w, 3) uint8 RGB of this ranking's size; left unchanged. Returns the same form.
        Raises InputError for another form, OptionError for another size.
        """
        check_photo(image)
        if image.shape[:2] != (self.height, self.width):
            raise OptionError(
                f"the ranking is of a photo of (height, width) = ({self.height}, {self.width}), "
                f"got an image of {image.shape[:2]}"
            )
        return draw_objects(image, self.objects)

    def to_dict(self) -> dict[str, Any]:
        """One image of `results.json` (schema dsgnn.results/1) without its file name.

        "bbox" is [x, y, width, height] in pixels, "area" the mask's share of the photo, and
        "segmentation" a COCO run-length encoding that pycocotools reads. "query" lets an evaluation
        count overlapping objects in the network's order. Objects of a video also have "identity",
        and those of an artifact that knows people's attention have "attention".
        """
        return {
            "width": self.width,
            "height": self.height,
            "objects": [
                {
                    "rank": item.rank,
                    **({} if item.identity is None else {"identity": item.identity}),
                    "saliency": item.saliency,
                    "score": item.score,
                    **({} if item.attention is None else {"attention": item.attention}),
                    "bbox": _xywh(item.box),
                    "area": item.area,
                    "query": item.query,
                    "segmentation": rle.encode(item.mask),
                }
                for item in self.objects
            ],
        }


def _xywh(box: tuple[int, int, int, int]) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
