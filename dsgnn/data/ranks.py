"""Which objects of a photo are salient, and in which order, by the share of looks that each draws.

The share of looks of an object is the part of all looks that falls on its visible mask:
`share_of_looks` counts people's fixations, `shares_under` sums a predicted map. Where two objects
share a pixel, the smaller one takes it. `PredictLooks` is whatever can tell where people look: a
network, for example. Data that has masks but no ranks needs one.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from dsgnn.data.sample import Sample
from dsgnn.runtime.errors import OptionError

# From a photo (h, w, 3) uint8 RGB to where people look: (gh, gw) float32, a grid over the photo
# whose sum is 1.
PredictLooks = Callable[[np.ndarray], np.ndarray]

# Where the ranks of a data set come from, as its `ranks_from` says.
ANNOTATIONS, PEOPLE, PREDICTED = "annotations", "people", "predicted looks"

CLEAR = 0.02  # shares that differ by less are no order that people agree on
MIN_SHARE = 0.03  # an object with less is not ranked
NOTICED = 0.012  # an object with less is nothing; what lies between the two is left open
MIN_FIXATIONS = 5  # and neither is one with fewer fixations, where these are counted
MIN_AREA = 0.003  # share of the photo below which an object is not salient
MAX_OBJECTS = 8


def needed(predict_looks: PredictLooks | None, what: object) -> PredictLooks:
    """What predicts looks; where there is none, OptionError, which names what lacks ranks."""
    if predict_looks is None:
        raise OptionError(
            f"{what}: nothing in it says what people look at first, so a network that predicts "
            "where people look has to rank its objects; the bundled model is one",
            "predict_looks",
        )
    return predict_looks


def owners(masks: np.ndarray) -> np.ndarray:
    """Which object each pixel belongs to: (h, w) int64, -1 for none.

    masks: (G, h, w) bool. Where masks overlap, the object with the fewest pixels takes the pixel;
    of two that are equally large, the first. Raises OptionError for another form.
    """
    if masks.ndim != 3 or masks.dtype != bool:
        raise OptionError(f"masks must be (G, h, w) bool, got {masks.shape} {masks.dtype}")
    owner = np.full(masks.shape[1:], -1)
    # Largest first, and of equally large ones the last, so that whoever takes a pixel overwrites.
    for g in np.argsort(masks.sum((1, 2)), kind="stable")[::-1]:
        owner[masks[g]] = g
    return owner


def inside(points: np.ndarray, w: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the points, (N, 2) of x and y, that lie in a frame of w × h."""
    x, y = np.floor(points).astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < w) & (y < h)
    return y[inside], x[inside]


def share_of_looks(points: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The part of people's fixations that fall on each object: (G,) float64 in 0…1.

    points: (N, 2), x and y in pixels of the masks' frame; those outside the frame count among all
    looks and fall on no object. masks: (G, h, w) bool; the smaller object takes what two share.
    The shares sum to 1 at most. Raises OptionError when there is no point, or on another form.
    """
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise OptionError(f"points must be (N, 2) with N from 1, got {points.shape}")
    owner = owners(masks)
    found = owner[inside(points, owner.shape[1], owner.shape[0])]
    return np.bincount(found[found >= 0], minlength=len(masks)) / len(points)


def shares_under(attention: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The part of predicted looks that falls on each object: (G,) float64 in 0…1.

    attention: (gh, gw), not negative, the looks in each cell of a grid over the photo without
    padding; it is brought to the masks' size by linear interpolation. masks: (G, h, w) bool; the
    smaller object takes what two share. The ranks are the order of the shares, largest first.
    Raises OptionError on another form, or when the map holds nothing.
    """
    if attention.ndim != 2 or not np.isfinite(attention).all() or (attention < 0).any():
        raise OptionError(f"attention must be (gh, gw) from 0 up, got {attention.shape}")
    if not attention.any():
        raise OptionError("attention must hold something, got zeros only")
    owner = owners(masks)
    h, w = owner.shape
    spread = cv2.resize(attention.astype(np.float64), (w, h), interpolation=cv2.INTER_LINEAR)
    found = owner >= 0
    sums = np.bincount(owner[found], weights=spread[found], minlength=len(masks))
    return sums / spread.sum()


def most_looked_at(shares: np.ndarray, areas: np.ndarray, most: int = MAX_OBJECTS) -> np.ndarray:
    """Indices (int64) of the salient objects, most looked at first, at most `most`.

    shares: (G,) of looks. areas: (G,) visible share of the photo, 0…1. Empty when none is.
    """
    order = np.argsort(-shares, kind="stable")
    return order[(shares[order] >= MIN_SHARE) & (areas[order] >= MIN_AREA)][:most]


def taught(
    image: np.ndarray, masks: np.ndarray, looks: np.ndarray, name: str, known: np.ndarray
) -> Sample:
    """A photo whose objects are ranked by predicted looks.

    masks: (G, h, w) bool, its annotated objects. looks: as from `PredictLooks`. known: (h, w) bool,
    where an object would have been annotated. An object with a share between `NOTICED` and
    `MIN_SHARE` is neither an object nor background: a network may find it or not.
    """
    shares = shares_under(looks, masks)
    order = most_looked_at(shares, masks.mean((1, 2)))
    foreground = np.where(known, 0, -1).astype(np.int8)
    owner, chosen = owners(masks), masks[order]
    for index, share in enumerate(shares):
        foreground[owner == index] = -1 if share >= NOTICED else 0
    foreground[chosen.any(0)] = 1
    ranks = np.arange(len(order), 0, -1)
    return Sample(image, chosen, ranks, name, foreground, looks.astype(np.float32))
