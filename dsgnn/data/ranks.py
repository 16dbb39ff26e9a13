"""Which objects of a photo are salient, and in which order, by the share of looks that each draws.

`RankMasks` is whatever can tell these shares: a network that predicts where people look, for
example. Data that has masks but no ranks takes one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# From a photo (h, w, 3) uint8 RGB and the visible masks (G, h, w) bool of its objects to the share
# of looks of each, (G,) in 0…1.
RankMasks = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Where the ranks of a data set come from, as its `ranks_from` says.
ANNOTATIONS, PEOPLE, RULE = "annotations", "people", "written rule"
PREDICTED = "predicted looks"

CLEAR = 0.02  # shares that differ by less are no order that people agree on
MIN_SHARE = 0.03  # an object with less is not ranked
MIN_FIXATIONS = 5  # and neither is one with fewer fixations, where these are counted
MIN_AREA = 0.003  # share of the photo below which an object is not salient
MAX_OBJECTS = 8


def most_looked_at(shares: np.ndarray, areas: np.ndarray, most: int = MAX_OBJECTS) -> np.ndarray:
    """Indices (int64) of the salient objects, most looked at first, at most `most`.

    shares: (G,) of looks. areas: (G,) visible share of the photo, 0…1. Empty when none is.
    """
    order = np.argsort(-shares, kind="stable")
    return order[(shares[order] >= MIN_SHARE) & (areas[order] >= MIN_AREA)][:most]
