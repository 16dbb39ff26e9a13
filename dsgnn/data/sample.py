"""The one sample type every reader returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsgnn.runtime.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One photo with its ranked salient objects.

    image: (h, w, 3) uint8 RGB. masks: (G, h, w) bool. ranks: (G,) int64, a permutation of 1…G
    with 1 = least and G = most salient. name: unique within its data set, used in reports.
    foreground: (h, w) int8, 1 = part of something salient, 0 = of nothing, -1 = not known; None =
    what no mask covers is nothing. attention: (gh, gw) float32, the share of looks that falls on
    each cell of a grid over the photo, with sum 1; None = not known.
    Raises DataError when these do not fit together.
    """

    image: np.ndarray
    masks: np.ndarray
    ranks: np.ndarray
    name: str
    foreground: np.ndarray | None = None
    attention: np.ndarray | None = None

    def __post_init__(self) -> None:
        h, w = self.image.shape[:2]
        g = len(self.ranks)
        for part, values, shape, dtype in (
            ("image", self.image, (h, w, 3), np.uint8),
            ("masks", self.masks, (g, h, w), np.bool),
            ("foreground", self.foreground, (h, w), np.int8),
        ):
            if values is not None and (values.shape != shape or values.dtype != dtype):
                raise DataError(
                    f"{self.name}: {part} must be {shape} {dtype.__name__}, got {values.shape} "
                    f"{values.dtype}"
                )
        if sorted(self.ranks.tolist()) != list(range(1, g + 1)):
            raise DataError(
                f"{self.name}: ranks must be a permutation of 1…{g}, got {self.ranks.tolist()}"
            )


def without_objects(
    image: np.ndarray,
    name: str,
    foreground: np.ndarray | None = None,
    attention: np.ndarray | None = None,
) -> Sample:
    """A photo with no object in it, or with none that is known. Arguments are as in `Sample`."""
    masks = np.zeros((0, *image.shape[:2]), bool)
    return Sample(image, masks, np.zeros(0, np.int64), name, foreground, attention)
