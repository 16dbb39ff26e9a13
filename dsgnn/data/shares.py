"""The share of looks of each object: the part of all looks that falls on its visible mask.

`share_of_looks` counts people's fixations, `shares_under` sums a predicted map. Where two objects
share a pixel, the smaller one takes it.
"""

from __future__ import annotations

import cv2
import numpy as np

from dsgnn.runtime.errors import OptionError


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
