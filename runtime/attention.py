"""Where people look: the network's attention on the photo alone, and each object's share of it.

Attention is a coarse grid over the letterboxed photo. What lies on the padding is left out: a cell
at its border counts by the part of it that lies on the photo, and the rest sums to 1 again. Inside
a cell attention is even.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dsgnn.runtime.errors import ArtifactError
from dsgnn.runtime.letterbox import Geometry


def crop_attention(attention: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The network's attention without the padding.

    attention: (GH, GW) float ≥ 0, cells of equal size over the padded photo, any sum. geometry:
    what `letterbox` returned for the photo. Returns (gh, gw) float32, sum 1: the cells that lie on
    the photo at least in part. Raises ArtifactError for another shape, values that are negative or
    not finite, and if nothing is left.
    """
    rows, columns = attention.shape if attention.ndim == 2 else (0, 0)
    if not (0 < rows <= geometry.padded[0] and 0 < columns <= geometry.padded[1]):
        raise ArtifactError(
            f"expected attention of at least one cell and at most {geometry.padded}, got "
            f"{attention.shape}"
        )
    on_photo = [
        _parts_on_photo(cells, padded, resized)
        for cells, padded, resized in zip(
            attention.shape, geometry.padded, geometry.resized, strict=True
        )
    ]
    grid = attention[: len(on_photo[0]), : len(on_photo[1])] * np.outer(*on_photo)  # float64
    total = grid.sum()
    if not (np.isfinite(total) and total > 0 and grid.min() >= 0):
        raise ArtifactError(
            "the network returned an attention that is negative, not finite or nowhere on the "
            "photo: the artifact is damaged or its precision overflows; export it again in fp32"
        )
    return (grid / total).astype(np.float32)


def cell_size(cells: tuple[int, int], geometry: Geometry) -> tuple[float, float]:
    """Height and width of one cell of the attention, in pixels of the photo.

    cells: (GH, GW), before `crop_attention`. geometry: of the photo.
    """
    high, wide = (
        padded / count * original / resized
        for count, padded, resized, original in zip(
            cells, geometry.padded, geometry.resized, geometry.original, strict=True
        )
    )
    return high, wide


def attention_shares(
    grid: np.ndarray,
    cells: tuple[int, int],
    masks: Sequence[np.ndarray],
    geometry: Geometry,
    boxes: Sequence[tuple[int, int, int, int]] | None = None,
) -> np.ndarray:
    """The share of attention on the visible part of each mask: (N,) float64 in 0…1.

    grid: what `crop_attention` returned. cells: (GH, GW) before it cropped. masks: N of (h, w)
    bool. Where masks overlap the smaller object is the visible one, and of equal ones the first.
    boxes: (x0, y0, x1, y1) of each mask, outside of which nothing is looked at; None = the photo.
    """
    rows, columns = (
        _edges(count, kept, *sides)
        for count, kept, *sides in zip(
            cells, grid.shape, geometry.padded, geometry.resized, geometry.original, strict=True
        )
    )
    density = grid / np.outer(np.diff(rows), np.diff(columns))  # (gh, gw): attention per pixel
    taken = np.zeros(geometry.original, bool)
    shares = np.zeros(len(masks))
    h, w = geometry.original
    corners = [(0, 0, w, h)] * len(masks) if boxes is None else boxes
    parts = [np.s_[y0:y1, x0:x1] for x0, y0, x1, y1 in corners]
    sizes = [np.count_nonzero(mask[part]) for mask, part in zip(masks, parts, strict=True)]
    for index in np.argsort(sizes, kind="stable").tolist():
        if sizes[index]:
            (x, y, *_), part = corners[index], parts[index]
            visible = masks[index][part] & ~taken[part]
            taken[part] |= visible
            pixels = pixels_per_cell(visible, rows - y, columns - x)
            shares[index] = (density * pixels).sum()
    return np.clip(shares, 0, 1)


def _parts_on_photo(cells: int, padded: int, resized: int) -> np.ndarray:
    """The part of each cell of one side that lies on the photo, without cells of none."""
    ends = np.arange(1, cells + 1) * (padded / cells)
    parts = np.clip(1 - (ends - resized) * (cells / padded), 0, 1)
    return parts[parts > 0]


def _edges(cells: int, kept: int, padded: int, resized: int, original: int) -> np.ndarray:
    """Where the cells of one side begin and end, in the photo's pixels: (kept + 1,) float64."""
    return np.minimum(np.arange(kept + 1) * (padded / cells), resized) * (original / resized)


def pixels_per_cell(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """How much of a mask lies in each cell, in pixels and parts of them: (gh, gw) float64.

    mask: (height, width) bool. rows, columns: edges of the cells, also outside the mask. The sums
    over all rectangles from the corner change evenly inside a pixel, so those at the edges are
    interpolated.
    """
    sums = cv2.integral(mask.view(np.uint8))  # (height + 1, width + 1)
    (top, low, down), (left, right, across) = (
        _between(edges, side) for edges, side in zip((rows, columns), mask.shape, strict=True)
    )
    down = down[:, None]
    at_left, at_right = (
        sums[top[:, None], side] * (1 - down) + sums[low[:, None], side] * down
        for side in (left, right)
    )  # (gh + 1, gw + 1)
    corners = at_left * (1 - across) + at_right * across
    return np.diff(np.diff(corners, axis=0), axis=1)


def _between(edges: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For edges of cells, cut to 0…side: the whole pixels before and behind each, and how far it
    lies between them, 0…1."""
    edges = np.clip(edges, 0, side)
    before = np.floor(edges).astype(int)
    return before, np.minimum(before + 1, side), edges - before


def percent(share: float) -> str:
    """A share of looks, 0…1, for people: "38%", and "<1%" for what would round to nothing."""
    return f"{share:.0%}" if share >= 0.005 else "<1%"
