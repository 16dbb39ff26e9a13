"""Where a window of another aspect lies in each frame of a video, as a camera operator would move.

The window rests, and moves when that is worth it: at a bounded speed, with a soft start and a soft
end. It turns round only after a rest, and jumps at cuts alone. All of it is in true time, so the
rate of the frames does not matter, nor whether it varies.

The path of a shot is found in two steps. On a grid of times and places the cheapest path of rests
and moves is found exactly, by dynamic programming (Viterbi): what is looked at and not shown has a
price, and so have an object that is cut, a start and a move. Then the path is averaged over
`EASE_S`, which bounds the acceleration. A mean of speeds is no larger than the largest, and a mean
over a rest is a rest, so the bounds of the first step hold after the second. The object must be in
the window throughout the time that is averaged, so that it is in the averaged window.

The idea to let a path of rests and moves be the optimum of a price is that of Grundmann et al.,
Auto-Directed Video Stabilization with Robust L1 Optimal Camera Paths (CVPR 2011).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, inf

import numpy as np

from dsgnn.runtime.framing import Aspect
from dsgnn.runtime.ranking import Ranking

SPEED = 0.6  # sides of the frame per second, at most
EASE_S = 0.7  # the acceleration is at most 2 × SPEED / EASE_S = 1.7 sides per second, per second
PAUSE_S = 0.5  # how long it rests at least before it turns round
LOOKAHEAD_S = 1.0  # how far a path looks ahead where the source cannot be read twice
PLACES = 97  # of the window on the grid
BLOCK_S = 0.1  # steps of the grid in time
FINE_S = 0.005  # steps in which the path is averaged

# Prices, in seconds during which everything that is looked at is outside.
START = 0.3  # of starting to move
MOVING = 0.3  # of a second of moving
DISTANCE = 0.2  # of moving by a side of the frame
OUTSIDE = 1.0  # of a second with the object not whole in the window
CUT = 8.0  # of a second, for each side of the frame by which the object sticks out of the window
AIR = 0.02  # room around the object, in sides of the frame, where there is any


@dataclass(frozen=True, eq=False)
class View:
    """What is known of one frame.

    time_s: when it is shown. kept: (PLACES,), the share of looks that the window keeps at each of
    its places, from one end of the frame to the other. low, high: the places between which it holds
    the object that must not be cut, in sides of the frame; low is above high where it cannot.
    cut: whether a shot begins with this frame.
    """

    time_s: float
    kept: np.ndarray
    low: float = 0.0
    high: float = 1.0
    cut: bool = False


def view_of(ranking: Ranking, aspect: Aspect, time_s: float, cut: bool = False) -> View:
    """What a ranked frame says of the window of an aspect. cut: whether a shot begins with it."""
    axis, size, side = free_side(ranking.height, ranking.width, aspect)
    sums = ranking.looks.along(axis)
    starts = np.linspace(0, side - size, PLACES)
    pixels = np.arange(side + 1)
    kept = np.interp(starts + size, pixels, sums) - np.interp(starts, pixels, sums)
    low, high = 0.0, 1.0
    if ranking.objects and ranking.objects[0].area > 0:
        box = ranking.objects[0].box
        start, end = box[axis] / side, box[axis + 2] / side
        spare = size / side - (end - start)
        if spare >= 0:  # else what is looked at most counts, as everywhere
            air = min(AIR, spare / 2)
            low = min(end + air - size / side, 1 - size / side)
            high = max(start - air, 0.0)
    return View(time_s, kept.astype(np.float32), low, high, cut)


def free_side(height: int, width: int, aspect: Aspect) -> tuple[int, int, int]:
    """Along which side a window can move (0 = the width), its length there, and the side's.

    Videos have even sides, so the length is even where the window is not the whole frame.
    """
    high, wide = aspect.window(height, width)
    axis, size, side = (0, wide, width) if wide < width else (1, high, height)
    return axis, size if size == side else max(size - size % 2, 1), side


class Operator:
    """Tells where the window begins in each frame, as the frames come in, in the order of their
    times. It is at 0…room, in sides of the frame."""

    def __init__(self, room: float, lookahead_s: float = inf) -> None:
        """room: 1 − window ÷ frame. lookahead_s: a place is told as soon as frames so much later
        (and `EASE_S` / 2) are known, or their shot has ended."""
        self._room, self._lookahead_s = room, lookahead_s
        self._shot: _Shot | None = None

    def add(self, view: View) -> list[float]:
        """Take the next frame; gives the places, in sides of the frame, of the next frames of
        which they are known now."""
        told: list[float] = []
        if self._shot is None or view.cut:
            told += self.end()
            self._shot = _Shot(self._room, self._lookahead_s)
        return told + list(self._shot.add(view))

    def end(self) -> list[float]:
        """Give the places of the frames that are left."""
        return [] if self._shot is None else list(self._shot.end())


class _Shot:
    """The path of one shot, as far as it is decided.

    The grid begins with the first frame; the path is at `places[b]` when block b begins.
    """

    def __init__(self, room: float, lookahead_s: float) -> None:
        self.room, self.lookahead_s = room, lookahead_s
        self.views: list[View] = []  # those that may still count
        self.told = 0  # how many of the views have been told their places
        self.start_s = 0.0  # when the grid begins
        self.state: _State | None = None  # at the end of the decided path
        self.places: list[int] = []

    def add(self, view: View) -> Iterator[float]:
        if not self.views:
            self.start_s = view.time_s
        self.views.append(view)
        if self.lookahead_s == inf:
            return
        known_s = view.time_s - self.start_s
        due = int((known_s - self.lookahead_s) / BLOCK_S)
        if due > max(0, len(self.places) - 1):
            self._decide(due)
            yield from self._tell(self.start_s + due * BLOCK_S - EASE_S / 2)

    def end(self) -> Iterator[float]:
        self._decide(None)
        yield from self._tell(inf)

    def _decide(self, until: int | None) -> None:
        """Decide the path up to a block, None = to the end of the shot."""
        done = max(0, len(self.places) - 1)
        costs = _block_costs(self.views, self.room, self.start_s, done)
        path = cheapest(costs, self.room, self.state)
        if not self.places:
            self.places.append(path[0].place)
        taken = path[1:] if until is None else path[1 : until - done + 1]
        self.places += [state.place for state in taken]
        self.state = taken[-1] if taken else path[0]

    def _tell(self, until_s: float) -> Iterator[float]:
        times = []
        for view in self.views[self.told :]:
            if view.time_s > until_s:
                break
            times.append(view.time_s - self.start_s)
        self.told += len(times)
        if not times:
            return
        first = max(0, int((times[0] - EASE_S) / BLOCK_S) - 1)
        places, since = self.places[first:], np.array(times) - first * BLOCK_S
        yield from _averaged(places, self.room, since).tolist()
        # What lies further back than is averaged cannot count any more.
        past_s = self.start_s + max(0, len(self.places) - 1) * BLOCK_S - EASE_S - BLOCK_S
        while self.told and self.views[0].time_s < past_s and len(self.views) > 1:
            self.views.pop(0)
            self.told -= 1


@dataclass(frozen=True)
class _State:
    """Where a path is. place: on the grid. side: +1 or −1, the way of the last move. age: how many
    blocks ago that was, up to `_PAUSE`."""

    place: int
    side: int
    age: int


_PAUSE = ceil((EASE_S + PAUSE_S) / BLOCK_S) + 1


def cheapest(costs: np.ndarray, room: float, state: _State | None) -> list[_State]:
    """The cheapest path over the blocks: its states at the beginning, and after each block.

    costs: (B, PLACES), of being at each place at the end of each block. state: where the path
    begins; None = anywhere, after a long rest.
    """
    step = room / (PLACES - 1)
    most = max(1, min(PLACES - 1, int(SPEED * BLOCK_S / step + 1e-9))) if step else 0
    total = np.full((2, _PAUSE + 1, PLACES), inf)  # by side (up, down), age and place
    if state is None:
        total[:, _PAUSE] = 0
    else:
        total[0 if state.side > 0 else 1, state.age, state.place] = 0
    prices = MOVING * BLOCK_S + DISTANCE * step * np.arange(1, most + 1)
    starts = np.where(np.arange(_PAUSE + 1) > 0, START, 0.0)[:, None]
    memory = []
    for cost in costs:
        rested = np.empty_like(total)
        rested[:, 1:] = total[:, :-1]
        longest = total[:, _PAUSE] < total[:, _PAUSE - 1]  # whether it had rested long before
        rested[:, _PAUSE] = np.minimum(total[:, _PAUSE], total[:, _PAUSE - 1])
        rested[:, 0] = inf
        origins, leaps = [], []
        for side in (0, 1):
            options = np.concatenate([total[side] + starts, total[1 - side][-1:] + START])
            origin = options.argmin(0)  # an age, or that the other way ended long ago
            source = np.take_along_axis(options, origin[None], 0)[0]
            moved = np.full((max(most, 1), PLACES), inf)
            for leap in range(1, most + 1):
                if side == 0:
                    moved[leap - 1, leap:] = source[:-leap] + prices[leap - 1]
                else:
                    moved[leap - 1, :-leap] = source[leap:] + prices[leap - 1]
            best = moved.argmin(0)
            rested[side, 0] = np.take_along_axis(moved, best[None], 0)[0]
            origins.append(origin)
            leaps.append(best + 1)
        memory.append((longest, origins, leaps))
        total = rested + cost
    side, age, place = (int(i) for i in np.unravel_index(total.argmin(), total.shape))
    path = [_State(place, 1 - 2 * side, age)]
    for longest, origins, leaps in reversed(memory):
        if age == 0:
            place += (-1 if side == 0 else 1) * int(leaps[side][place])
            age = int(origins[side][place])
            if age > _PAUSE:
                side, age = 1 - side, _PAUSE
        elif age == _PAUSE:
            age = _PAUSE if longest[side][place] else _PAUSE - 1
        else:
            age -= 1
        path.append(_State(place, 1 - 2 * side, age))
    return path[::-1]


def _block_costs(views: Sequence[View], room: float, start_s: float, first: int) -> np.ndarray:
    """The price of each place in the blocks from `first` to the last frame: (B, PLACES)."""
    times = np.array([view.time_s for view in views]) - start_s
    # A block ends at a place: frames count from half a block before that to half a block after.
    blocks = np.maximum(np.rint(times / BLOCK_S).astype(int), 1) - 1 - first
    low, high = _held_throughout(times, [view.low for view in views], [view.high for view in views])
    places = np.linspace(0, room, PLACES)
    short = np.maximum(low[:, None] - places, 0) + np.maximum(places - high[:, None], 0)
    kept = np.stack([view.kept for view in views])
    each = kept.max(1, keepdims=True) - kept + CUT * short + OUTSIDE * (short > room / PLACES / 2)
    costs, counts = np.zeros((max(1, blocks.max() + 1), PLACES)), np.zeros(max(1, blocks.max() + 1))
    wanted = blocks >= 0
    np.add.at(costs, blocks[wanted], each[wanted])
    np.add.at(counts, blocks[wanted], 1)
    return BLOCK_S * costs / np.maximum(counts, 1)[:, None]


def _held_throughout(
    times: np.ndarray, low: Sequence[float], high: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """For each frame, the places that hold the object in all frames that are averaged with it.
    Where no place does, they are those that hold it in that frame."""
    reach = (EASE_S + BLOCK_S) / 2
    first = np.searchsorted(times, times - reach)
    last = np.searchsorted(times, times + reach, "right")
    lows = np.array([max(low[a:b]) for a, b in zip(first, last, strict=True)])
    highs = np.array([min(high[a:b]) for a, b in zip(first, last, strict=True)])
    apart = lows > highs
    return np.where(apart, low, lows), np.where(apart, high, highs)


def _averaged(places: Sequence[int], room: float, times: np.ndarray) -> np.ndarray:
    """The path at these times, averaged over `EASE_S` with soft ends (a Hann window).

    places: of the window on the grid at the edges of the blocks; before and after them it rests.
    times: at least one, in seconds from the first edge.
    """
    half = round(EASE_S / FINE_S / 2)
    weights = np.hanning(2 * half + 3)[1:-1]
    first = int(times[0] / FINE_S) - 1
    fine = np.arange(first - half, int(times[-1] / FINE_S) + half + 3) * FINE_S
    edges = np.arange(len(places)) * BLOCK_S
    path = np.interp(fine, edges, np.array(places) * (room / (PLACES - 1)))
    smooth = np.convolve(path, weights / weights.sum(), "valid")
    return np.clip(np.interp(times, fine[half : len(fine) - half], smooth), 0, room)
