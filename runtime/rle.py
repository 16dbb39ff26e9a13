"""COCO's compressed run-length encoding of masks, vectorised.

pycocotools does the same, but it would be one more compiled part of the base install, and it is
slower on large masks.

Runs alternate background, object, …, down the columns; each run is written as its difference to
the run two before, in 5-bit groups from the low end, as printable characters from "0" on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from dsgnn.runtime.errors import DataError


def encode(mask: np.ndarray) -> dict[str, Any]:
    """(h, w) bool mask to {"size": [h, w], "counts": str}, as pycocotools writes it."""
    h, w = mask.shape
    return {"size": [h, w], "counts": _characters(_runs(mask))}


def _runs(mask: np.ndarray) -> np.ndarray:
    """Lengths of the alternating runs down the columns, the first of background: (n,) int64."""
    h, w = mask.shape
    grey = mask.view(np.uint8)
    x, y, width, height = cv2.boundingRect(grey)  # only the box is scanned
    columns = np.zeros((width, height + 2), np.uint8)  # a background cell on both ends
    columns[:, 1:-1] = cv2.transpose(grey[y : y + height, x : x + width]) if width else 0
    flat = columns.ravel()
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), height + 2)
    edges = (column + x) * h + row + y  # starts and ends in turn, positions in the whole photo
    # A run that reaches the photo's last row goes on at the top of the next column.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    runs = np.diff(edges, prepend=0, append=h * w)
    return runs if runs[-1] or len(runs) == 1 else runs[:-1]  # no empty run at the end


def _characters(runs: np.ndarray) -> str:
    values = runs.astype(np.int64)
    values[3:] -= runs[1:-2]  # the first three are absolute
    groups, used = [], []
    more = np.ones(len(values), bool)
    while more.any():
        low = values & 0x1F
        values = values >> 5
        used.append(more)
        more = more & np.where(low & 0x10, values != -1, values != 0)
        groups.append(low + 0x20 * more + 48)
    table = np.stack(groups, axis=1).astype(np.uint8)  # (n, groups)
    return table[np.stack(used, axis=1)].tobytes().decode("ascii")


def decode(segmentation: Mapping[str, Any]) -> np.ndarray:
    """Decode a COCO run-length code to its mask, (h, w) bool.

    segmentation: {"size": [h, w], "counts": run lengths down the columns, the first outside the
    object, as a list of integers or as COCO's compressed text}. Raises DataError when fields are
    missing or the runs do not fill the image.
    """
    try:
        height, width = (int(side) for side in segmentation["size"])
        counts = segmentation["counts"]
        if isinstance(counts, str | bytes):
            counts = _decompress(counts.encode() if isinstance(counts, str) else counts)
        runs = np.asarray(counts, np.int64)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise DataError(
            "expected a run-length code {'size': [h, w], 'counts': …}, got "
            f"{repr(segmentation)[:80]}"
        ) from error
    out_of_range = (runs < 0) | (runs > height * width)  # sums of larger ones may wrap around
    if runs.ndim != 1 or out_of_range.any() or runs.sum() != height * width:
        raise DataError(
            f"the runs of a {height}x{width} run-length mask must add up to {height * width}, "
            f"got {runs.sum()}"
        )
    return np.ascontiguousarray(fill(runs).reshape(width, height).T)


def fill(runs: np.ndarray) -> np.ndarray:
    """Column-major pixels (h·w,) bool from run lengths, alternately outside and inside."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _decompress(text: bytes) -> list[int]:
    """COCO's text form of run lengths: 5 bits a character, differences from the fourth run on."""
    counts: list[int] = []
    position = 0
    while position < len(text):
        value, bits, more = 0, 0, True
        while more:
            character = text[position] - 48
            value |= (character & 31) << bits
            more = bool(character & 32)
            position += 1
            bits += 5
            if not more and character & 16:
                value -= 1 << bits  # the sign
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts
