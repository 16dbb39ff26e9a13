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
        if self.image.shape != (h, w, 3) or self.image.dtype != np.uint8:
            raise DataError(
                f"{self.name}: image must be (h, w, 3) uint8, got "
                f"{self.image.shape} {self.image.dtype}"
            )
        if self.masks.shape != (g, h, w) or self.masks.dtype != bool:
            raise DataError(
                f"{self.name}: masks must be ({g}, {h}, {w}) bool, got "
                f"{self.masks.shape} {self.masks.dtype}"
            )
        if self.foreground is not None and (
            self.foreground.shape != (h, w) or self.foreground.dtype != np.int8
        ):
            raise DataError(
                f"{self.name}: foreground must be ({h}, {w}) int8, got "
                f"{self.foreground.shape} {self.foreground.dtype}"
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
