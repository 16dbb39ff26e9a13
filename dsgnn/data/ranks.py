"""Which objects of a photo are salient, and in which order, by the share of looks that each draws.

`PredictLooks` is whatever can tell where people look: a network, for example. Data that has masks
but no ranks takes one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsgnn.data.sample import Sample
from dsgnn.data.shares import owners, shares_under

# From a photo (h, w, 3) uint8 RGB to where people look: (gh, gw) float32, a grid over the photo
# whose sum is 1.
PredictLooks = Callable[[np.ndarray], np.ndarray]

# Where the ranks of a data set come from, as its `ranks_from` says.
ANNOTATIONS, PEOPLE, RULE = "annotations", "people", "written rule"
PREDICTED = "predicted looks"

CLEAR = 0.02  # shares that differ by less are no order that people agree on
MIN_SHARE = 0.03  # an object with less is not ranked
NOTICED = 0.012  # an object with less is nothing; what lies between the two is left open
MIN_FIXATIONS = 5  # and neither is one with fewer fixations, where these are counted
MIN_AREA = 0.003  # share of the photo below which an object is not salient
MAX_OBJECTS = 8


def most_looked_at(shares: np.ndarray, areas: np.ndarray, most: int = MAX_OBJECTS) -> np.ndarray:
    """Indices (int64) of the salient objects, most looked at first, at most `most`.

    shares: (G,) of looks. areas: (G,) visible share of the photo, 0…1. Empty when none is.
    """
    order = np.argsort(-shares, kind="stable")
    return order[(shares[order] >= MIN_SHARE) & (areas[order] >= MIN_AREA)][:most]


def taught(
    image: np.ndarray,
    masks: np.ndarray,
    looks: np.ndarray,
    name: str,
    known: np.ndarray | None = None,
) -> Sample:
    """A photo whose objects are ranked by predicted looks.

    masks: (G, h, w) bool, its annotated objects. looks: as from `PredictLooks`. known: (h, w) bool,
    where an object would have been annotated; None = everywhere. An object with a share between
    `NOTICED` and `MIN_SHARE` is neither an object nor background: a network may find it or not.
    """
    shares = shares_under(looks, masks) if len(masks) else np.zeros(0)
    order = most_looked_at(shares, masks.mean((1, 2)) if len(masks) else shares)
    foreground = np.zeros(image.shape[:2], np.int8)
    if known is not None:
        foreground[~known] = -1
    owner = owners(masks) if len(masks) else np.full(image.shape[:2], -1)
    for index, share in enumerate(shares):
        foreground[owner == index] = 1 if index in order else -1 if share >= NOTICED else 0
    chosen = masks[order] if len(order) else np.zeros((0, *image.shape[:2]), bool)
    foreground[chosen.any(0)] = 1
    ranks = np.arange(len(order), 0, -1)
    return Sample(image, chosen, ranks, name, foreground, looks.astype(np.float32))
