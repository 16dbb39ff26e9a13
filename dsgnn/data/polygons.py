"""Masks from annotations: polygons and run-length codes, pixel for pixel as COCO's tools draw them.

The published evaluations of ASSR, IRSR and SIFR draw their ground truth with COCO's mask code,
whose rule is not OpenCV's (`cv2.fillPoly` also fills every pixel that the outline touches, which
makes an object about half a pixel larger all round). Figures can only equal the published ones on
equal masks, so the rule is rewritten here with array operations; the tests compare with masks drawn
by COCO's code. That code itself, pycocotools, ends the process where a polygon has a coordinate
that is not a number or lies far outside, so it cannot read files that come from others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dsgnn.runtime import rle
from dsgnn.runtime.errors import DataError

UPSAMPLING = 5  # COCO walks each outline on a grid this many times finer than the pixels
FARTHEST = 100_000  # pixels; an outline that goes farther is a mistake, and would cost gigabytes


def segmentation_to_mask(segmentation: Sequence | Mapping, height: int, width: int) -> np.ndarray:
    """Draw a COCO `segmentation` field, whichever of its forms it has.

    segmentation: a list of polygons, or {"size": [h, w], "counts": …} for
    `dsgnn.runtime.rle.decode`, or a list of those, which are united.
    Returns (height, width) bool. Raises DataError for a broken segmentation or another size.
    """
    if not isinstance(segmentation, Mapping):
        runs = segmentation if isinstance(segmentation, list | tuple) else ()
        if runs and all(isinstance(run, Mapping) for run in runs):
            return np.logical_or.reduce([segmentation_to_mask(run, height, width) for run in runs])
        return polygons_to_mask(segmentation, height, width)
    size = segmentation.get("size")
    if isinstance(size, Sequence | np.ndarray) and tuple(size) != (height, width):
        raise DataError(  # before anything of the other size is made
            f"run-length mask of size {list(size)} (height, width) on an image of {[height, width]}"
        )
    return rle.decode(segmentation)


def polygons_to_mask(polygons: Sequence, height: int, width: int) -> np.ndarray:
    """Draw one object: the union of its polygons, each filled by the even-odd rule.

    polygons: list of [x1, y1, x2, y2, …] in pixels, where pixel i covers i…i+1; closed implicitly;
    parts outside the image are cut off. Returns (height, width) bool.
    Raises DataError when there is no polygon or one has fewer than 3 points, an odd number of
    values, or values that are no finite coordinates.
    """
    is_list = isinstance(polygons, Sequence | np.ndarray) and not isinstance(polygons, str | bytes)
    if not is_list or not len(polygons):
        raise DataError(
            "expected a list of polygons [[x1, y1, x2, y2, …], …] or a run-length code "
            f"{{'size', 'counts'}}, got {_brief(polygons)}"
        )
    mask = np.zeros(height * width, bool)
    for number, polygon in enumerate(polygons):
        crossings = _column_crossings(_points(polygon, number), height, width)
        # Going down the columns, each crossing toggles between outside and inside.
        mask |= rle.fill(np.diff(np.sort(crossings), prepend=0, append=height * width))
    return np.ascontiguousarray(mask.reshape(width, height).T)


def _points(polygon: Sequence, number: int) -> np.ndarray:
    """Check one polygon and return its corners, (K, 2) float64 xy."""
    try:
        values = np.asarray(polygon, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"polygon {number}: expected numbers, got {_brief(polygon)}") from error
    if values.ndim != 1 or len(values) < 6 or len(values) % 2:
        raise DataError(
            f"polygon {number}: expected x and y of at least 3 points (an even number of values, "
            f"6 or more), got {_brief(polygon)}"
        )
    if not (np.abs(values) <= FARTHEST).all():  # also true of NaN
        raise DataError(
            f"polygon {number}: a coordinate is not finite or beyond ±{FARTHEST} pixels: "
            f"{_brief(polygon)}"
        )
    return values.reshape(-1, 2)


def _column_crossings(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where the outline crosses the centre line of a pixel column, as x·height + y, (N,) int64.

    The rule of COCO's rleFrPoly: round the corners to the fine grid, walk each edge one step of its
    longer axis at a time, and keep the steps in x that pass a column's centre.
    """
    start = np.trunc(points * UPSAMPLING + 0.5).astype(np.int64)
    end = np.roll(start, -1, axis=0)
    steps = np.abs(end - start)
    along_x = steps[:, 0] >= steps[:, 1]
    # COCO walks every edge in the direction of growing main coordinate, then flips the order back.
    main = np.where(along_x, 0, 1)
    edge = np.arange(len(start))
    flip = start[edge, main] > end[edge, main]
    low, high = np.where(flip[:, None], end, start), np.where(flip[:, None], start, end)
    length = steps[edge, main]
    slope = (high - low)[edge, 1 - main] / np.maximum(length, 1)

    which = np.repeat(edge, length + 1)  # the edge of each step
    first = np.cumsum(length + 1) - (length + 1)
    step = np.arange(len(which)) - first[which]
    step = np.where(flip[which], length[which] - step, step)
    on_main = step + low[which, main[which]]
    on_other = np.trunc(low[which, 1 - main[which]] + slope[which] * step + 0.5).astype(np.int64)
    u = np.where(along_x[which], on_main, on_other)
    v = np.where(along_x[which], on_other, on_main)

    moved = np.flatnonzero(u[1:] != u[:-1]) + 1
    fine_x = np.where(u[moved] < u[moved - 1], u[moved], u[moved] - 1)
    x = (fine_x + 0.5) / UPSAMPLING - 0.5
    kept = (x == np.floor(x)) & (x >= 0) & (x <= width - 1)
    y = (np.minimum(v[moved], v[moved - 1])[kept] + 0.5) / UPSAMPLING - 0.5
    return x[kept].astype(np.int64) * height + np.ceil(np.clip(y, 0, height)).astype(np.int64)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
