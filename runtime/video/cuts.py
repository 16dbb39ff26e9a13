"""Find the cuts of a video: the frames with which another shot begins.

Two frames are compared small, pixel by pixel and by their colours. A cut changes both at once, and
much more than the frames before it changed: a camera that turns changes the pixels of every frame,
and hardly the colours; a light that is switched on is taken for a cut.
"""

from __future__ import annotations

from collections import deque

import cv2
import numpy as np

SMALL = (48, 27)  # width and height that frames are compared at
PIXELS = 12.0  # mean difference of the levels 0…255 from which a frame may be a cut
COLOURS = 0.18  # the part of the pixels that changed their colour from which it may be one
SUDDEN = 2.5  # a cut changes so many times as much as any of the frames before it
BEFORE = 8  # how many frames before it are compared
LARGER = 1.1  # soon after a cut, another one must change so many times as much
LEVELS = 6  # of each channel, for the colours


class CutFinder:
    """Tells frame by frame whether a shot begins."""

    def __init__(self) -> None:
        self._small: np.ndarray | None = None
        self._colours = np.zeros(0)
        self._changes: deque[float] = deque(maxlen=BEFORE)

    def __call__(self, image: np.ndarray) -> bool:
        """image: the next frame, (h, w, 3) uint8, of any size. The first one is no cut."""
        small = cv2.resize(image, SMALL, interpolation=cv2.INTER_AREA)
        binned = small.reshape(-1, 3).astype(int) * LEVELS // 256
        counts = np.bincount(binned @ (1, LEVELS, LEVELS**2), minlength=LEVELS**3)
        colours = _spread(counts / len(binned))
        before, self._small = self._small, small
        known, self._colours = self._colours, colours
        if before is None:
            return False
        change = float(cv2.absdiff(small, before).mean())
        usual = max(self._changes, default=0.0)
        recoloured = float(np.abs(colours - known).sum() / 2)
        if change > PIXELS and recoloured > COLOURS and change > SUDDEN * usual:
            self._changes.clear()
            self._changes.append(LARGER * change / SUDDEN)
            return True
        self._changes.append(change)
        return False


def _spread(counts: np.ndarray) -> np.ndarray:
    """Counts by colour, shared with neighbouring levels, so that a small shift counts little."""
    cube = counts.reshape((LEVELS,) * 3)
    for axis in range(3):
        padded = np.pad(cube, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        first, last = (np.take(padded, range(s, s + LEVELS), axis) for s in (0, 2))
        cube = (first + 2 * cube + last) / 4
    return cube
