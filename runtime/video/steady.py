"""Hold a video's ranking steady: objects keep their identity, and ranks do not flicker.

A network ranks every frame on its own. Noise in its saliencies makes neighbours swap ranks back and
forth. An object that is missed in one frame moves all those below it up, and down again in the next
frame. And nothing says which object of one frame is which object of the next. `Steadier` therefore
keeps a track for each object:

- Objects and tracks are paired by the overlap of their masks. The mask of a track is first moved by
  the track's motion.
- Saliencies are smoothed. Two neighbours swap ranks only when they differ by more than their own
  noise. The noise is estimated from how they change from frame to frame, because saliencies have no
  fixed scale.
- A new object takes a rank when it has been there for APPEAR_S.
- An object that is missed keeps its last mask and its rank for HOLD_S, and its identity for
  REMEMBER_S.

There are two exceptions, in which new objects take their ranks without waiting:

- At a cut, which is a frame where no object overlaps any track. The old tracks end there.
- In the first frame, and in a frame that comes REMEMBER_S or more after the one before it. An
  object that is seen in a single one of such distant frames is not a flicker.

An empty scene is not treated as a cut: an object that appears in it for a single frame may well be
noise.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import exp

import cv2
import numpy as np

from dsgnn.runtime.letterbox import shrunk
from dsgnn.runtime.ranking import RankedObject, Ranking

# Chosen on the generated clips of tests/runtime/steadiness.py.
CELLS = 128  # masks are compared on a grid whose longest side has this many cells
OVERLAP = 0.25  # intersection over union from which an object continues a track
SMOOTH_S = 0.3  # time constant of the saliency
NOISE_S = 2.0  # time constant of its noise
HYSTERESIS = 1.0  # in standard deviations of the noise of one frame
MOTION_S = 0.15  # time constant of the velocity
APPEAR_S = 0.1
HOLD_S = 0.12
REMEMBER_S = 1.0
EPSILON_S = 1e-6  # times are sums of fractions


class _Track:
    """One object over time.

    cells: its last mask on the grid, (ch, cw) float32, see `_cells`. centre: the centre of gravity
    (x, y) of that mask, in cells. velocity: (x, y), in cells per second. saliency: the smoothed
    one. noise: the standard deviation of the saliency in one frame. frames: in how many frames the
    object was seen. first_s, last_s: when it was first and last seen. shown: whether it has taken a
    rank.
    """

    def __init__(
        self, identity: int, item: RankedObject, cells: np.ndarray, time_s: float, shown: bool
    ) -> None:
        """Begin with the frame of this time."""
        self.identity, self.item, self.cells, self.shown = identity, item, cells, shown
        self.centre, self.velocity = _centre(cells), np.zeros(2)
        self.saliency, self.noise, self.frames = item.saliency, 0.0, 1
        self.first_s = self.last_s = time_s

    def moved(self, time_s: float) -> np.ndarray:
        """The mask where it is expected at this time: (ch, cw) float32."""
        x, y = self.velocity * (time_s - self.last_s)
        h, w = self.cells.shape
        shift = np.array([[1, 0, x], [0, 1, y]], np.float32)
        return np.asarray(cv2.warpAffine(self.cells, shift, (w, h)))

    def follow(self, item: RankedObject, cells: np.ndarray, time_s: float) -> None:
        """Continue the track with the object of a new frame."""
        step = max(time_s - self.last_s, EPSILON_S)
        centre = _centre(cells)
        share = _share(step, MOTION_S, self.frames)
        self.velocity = self.velocity + share * ((centre - self.centre) / step - self.velocity)
        # The mean difference of two normally distributed values is 2/√π times their deviation.
        change = abs(item.saliency - self.item.saliency) / 1.128
        self.noise += _share(step, NOISE_S, self.frames) * (change - self.noise)
        self.frames += 1
        self.saliency += _share(step, SMOOTH_S, self.frames) * (item.saliency - self.saliency)
        self.item, self.cells, self.centre, self.last_s = item, cells, centre, time_s


class Steadier:
    """Steady the rankings of one video, frame by frame. It must be called from one thread only."""

    def __init__(self) -> None:
        self._tracks: list[_Track] = []
        self._order: list[_Track] = []  # those with a rank, most salient first
        self._size = (0, 0)
        self._count = 0
        self._last_s = float("-inf")  # time of the previous frame

    def __call__(self, ranking: Ranking, time_s: float) -> Ranking:
        """Steady the ranking of the next frame.

        time_s: the time of the frame in seconds; it must grow from call to call. Every object of
        the result has an `identity`. Its `saliency` is the smoothed one, and for a moment its
        `rank` may differ from the order of the saliencies. An object that the network missed is
        present with its last mask. A frame of another size starts anew, with new identities.
        """
        size = (ranking.height, ranking.width)
        if size != self._size:
            self._tracks, self._order, self._size = [], [], size
            self._last_s = float("-inf")
        objects = [item for item in ranking.objects if item.area > 0]
        cells = [_cells(item.mask) for item in objects]
        pairs = self._pair(cells, time_s)
        for number, track in pairs.items():
            track.follow(objects[number], cells[number], time_s)
        cut = bool(objects and self._order) and not pairs
        if cut:
            self._tracks, self._order = [], []
        for number, item in enumerate(objects):
            if number not in pairs:
                self._count += 1
                self._tracks.append(_Track(self._count, item, cells[number], time_s, cut))
        self._retire(time_s)
        self._sort(time_s)
        self._last_s = time_s
        steadied = tuple(
            replace(track.item, rank=rank, saliency=track.saliency, identity=track.identity)
            for rank, track in enumerate(self._order, start=1)
        )
        return replace(ranking, objects=steadied)

    def _pair(self, cells: list[np.ndarray], time_s: float) -> dict[int, _Track]:
        """Find the track of each object; gives tracks by the number of the object.

        The largest overlaps are paired first, and each object and track is paired once.
        """
        if not cells or not self._tracks:
            return {}
        now = np.stack([one.ravel() for one in cells])  # (P, cells)
        then = np.stack([track.moved(time_s).ravel() for track in self._tracks])  # (T, cells)
        shared = now @ then.T  # (P, T)
        union = now.sum(1)[:, None] + then.sum(1) - shared
        overlap = shared / np.maximum(union, EPSILON_S)
        pairs: dict[int, _Track] = {}
        while overlap.max() >= OVERLAP:
            number, index = divmod(int(overlap.argmax()), len(self._tracks))
            pairs[number] = self._tracks[index]
            overlap[number], overlap[:, index] = 0, 0
        return pairs

    def _retire(self, time_s: float) -> None:
        """Forget tracks that were not seen for long. One that never had a rank goes at once."""

        def lives(track: _Track) -> bool:
            kept_s = REMEMBER_S if track.shown else 0.0
            return time_s - track.last_s <= kept_s + EPSILON_S

        self._tracks = [track for track in self._tracks if lives(track)]
        self._order = [t for t in self._order if time_s - t.last_s <= HOLD_S + EPSILON_S]

    def _sort(self, time_s: float) -> None:
        """Give new objects their places, then swap neighbours whose order has clearly changed."""
        far_apart = time_s - self._last_s >= REMEMBER_S - EPSILON_S
        for track in self._tracks:
            there = track.last_s == time_s and track not in self._order
            stays = far_apart or time_s - track.first_s >= APPEAR_S - EPSILON_S
            if there and (track.shown or stays):
                track.shown = True
                above = sum(other.saliency >= track.saliency for other in self._order)
                self._order.insert(above, track)
        swapped = True
        while swapped:  # this ends, because each swap leaves fewer pairs in the wrong order
            swapped = False
            for place, (upper, lower) in enumerate(pairwise(self._order)):
                margin = HYSTERESIS * (upper.noise**2 + lower.noise**2) ** 0.5
                if lower.saliency > upper.saliency + margin:
                    self._order[place : place + 2] = lower, upper
                    swapped = True
                    break


def _cells(mask: np.ndarray) -> np.ndarray:
    """A mask on the grid: (h, w) bool to (ch, cw) float32, 1 where most of a cell is object."""
    h, w = mask.shape
    ch, cw = shrunk(h, w, CELLS)
    grey = mask.view(np.uint8)
    return cv2.resize(grey, (cw, ch), interpolation=cv2.INTER_AREA).astype(np.float32)


def _centre(cells: np.ndarray) -> np.ndarray:
    """The centre of gravity (x, y) of a mask, in cells. That of an empty mask is its corner."""
    total = max(float(cells.sum()), EPSILON_S)
    x = cells.sum(0) @ np.arange(cells.shape[1])
    y = cells.sum(1) @ np.arange(cells.shape[0])
    return np.array([x, y]) / total


def _share(step_s: float, constant_s: float, frames: int) -> float:
    """The weight of a new value in a running mean of `frames` values.

    It is set by the time constant, but in the beginning all values count alike.
    """
    return max(1 - exp(-step_s / constant_s), 1 / frames)
