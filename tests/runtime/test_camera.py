"""The path of a window through a video: objects of known places, and the bounds of its motion."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsgnn.runtime import RankedObject, Ranking
from dsgnn.runtime.framing import Aspect
from dsgnn.runtime.video.camera import (
    AIR,
    EASE_S,
    LOOKAHEAD_S,
    PAUSE_S,
    PLACES,
    SPEED,
    Operator,
    View,
    view_of,
)

WINDOW = 0.316  # of 9:16 in 16:9, in widths of the frame
ROOM = 1 - WINDOW
Track = Callable[[float], tuple[float, float]]  # seconds to where an object begins and ends
LIVE = pytest.mark.parametrize("lookahead_s", [inf, LOOKAHEAD_S])


def view(time_s: float, start: float, end: float, cut: bool = False) -> View:
    """A frame of which the object draws most looks, and the rest some."""
    places = np.linspace(0, 1, 401)
    density = 0.15 + np.exp(-((places - (start + end) / 2) ** 2) / (2 * 0.06**2))
    sums = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    starts = np.linspace(0, ROOM, PLACES)
    kept = np.interp(starts + WINDOW, places, sums) - np.interp(starts, places, sums)
    spare = WINDOW - (end - start)
    if spare < 0:
        return View(time_s, kept / sums[-1], cut=cut)
    air = min(AIR, spare / 2)
    low, high = min(end + air - WINDOW, ROOM), max(start - air, 0)
    return View(time_s, kept / sums[-1], low, high, cut)


def plan_path(views: Iterable[View], room: float, lookahead_s: float = inf) -> Iterator[float]:
    """Where the window begins in each frame, as soon as it is known."""
    operator = Operator(room, lookahead_s)
    for one in views:
        yield from operator.add(one)
    yield from operator.end()


def film(times: Sequence[float], track: Track, cuts: Sequence[int] = ()) -> list[View]:
    return [view(t, *track(t), cut=i in cuts) for i, t in enumerate(times)]


def path(views: list[View], lookahead_s: float = inf) -> np.ndarray:
    found = np.array(list(plan_path(views, ROOM, lookahead_s)))
    assert len(found) == len(views)
    assert ((found >= 0) & (found <= ROOM)).all()
    return found


def held(places: np.ndarray, times: Sequence[float], track: Track) -> float:
    """The part of the frames in which the window holds the object, where it fits."""
    boxes = [track(t) for t in times]
    fits = [(u, a, b) for u, (a, b) in zip(places, boxes, strict=True) if b - a <= WINDOW]
    return float(np.mean([u - 1e-6 <= a and b <= u + WINDOW + 1e-6 for u, a, b in fits]))


def check_motion(views: list[View], places: np.ndarray) -> None:
    """Within a shot: bounded speed and acceleration, and no turning round without a rest."""
    starts = [0, *(i for i, one in enumerate(views) if i and one.cut), len(views)]
    for first, end in zip(starts[:-1], starts[1:], strict=True):
        times = np.array([one.time_s for one in views[first:end]])
        gaps, steps = np.diff(times), np.diff(places[first:end])
        assert (np.abs(steps) <= SPEED * gaps + 1e-9).all()
        speeds, middles = steps / gaps, (times[1:] + times[:-1]) / 2
        assert (np.abs(np.diff(speeds)) <= 2 * SPEED / EASE_S * np.diff(middles) + 1e-6).all()
        moving = np.flatnonzero(np.abs(steps) > 1e-5)
        for one, other in zip(moving[:-1], moving[1:], strict=True):
            if steps[one] * steps[other] < 0:
                assert middles[other] - middles[one] >= PAUSE_S


def rate(count: int, fps: float = 30) -> list[float]:
    return [i / fps for i in range(count)]


VARIABLE = np.cumsum(np.random.default_rng(1).choice([1 / 60, 1 / 30, 1 / 24, 0.25], 250)).tolist()

TRACKS: dict[str, tuple[list[float], Track]] = {
    "still at the edge": (rate(200), lambda t: (0.0, 0.2)),
    "slow pan": (rate(450), lambda t: (0.1 + 0.05 * t, 0.25 + 0.05 * t)),
    "fast pan": (rate(120), lambda t: (0.05 + 0.25 * min(t, 3), 0.2 + 0.25 * min(t, 3))),
    "sudden": (rate(150), lambda t: (0.1 + 0.45 * min(max(t - 2, 0), 1.4),) * 2),
    "to and fro": (rate(500), lambda t: (0.4 + 0.3 * np.sin(t), 0.5 + 0.3 * np.sin(t))),
    "variable frame rate": (VARIABLE, lambda t: (0.1 + 0.01 * t, 0.25 + 0.01 * t)),
    "slow pictures": (rate(20, 1), lambda t: (0.1, 0.25) if t < 10 else (0.7, 0.85)),
    "too large at times": (rate(300), lambda t: (0.3, 0.4 + 0.3 * (3 < t < 6))),
}


@LIVE
@pytest.mark.parametrize("name", TRACKS)
def test_an_object_is_kept_by_a_calm_window(name: str, lookahead_s: float) -> None:
    times, track = TRACKS[name]
    views = film(times, track)
    places = path(views, lookahead_s)
    assert held(places, times, track) == 1
    check_motion(views, places)


@LIVE
def test_noise_does_not_move_it(lookahead_s: float) -> None:
    rng = np.random.default_rng(0)
    noisy = [
        view(t, *(np.array([0.4, 0.68]) + rng.normal(0, 0.01, 2)).clip(0, 1)) for t in rate(300)
    ]
    assert np.ptp(path(noisy, lookahead_s)) == 0


@LIVE
def test_cuts_are_jumped_at_and_nowhere_else(lookahead_s: float) -> None:
    def track(t: float) -> tuple[float, float]:
        return (0.1, 0.25) if t < 3 else (0.7, 0.85) if t < 6 else (0.35, 0.5)

    times, cuts = rate(270), (90, 180)
    views = film(times, track, cuts)
    places = path(views, lookahead_s)
    assert held(places, times, track) == 1
    check_motion(views, places)
    assert np.flatnonzero(np.diff(places)).tolist() == [89, 179]


@LIVE
def test_an_object_that_leaves_gives_way_to_the_other(lookahead_s: float) -> None:
    """For a moment away it is waited for; for good, the window goes where the looks are."""

    def seen(t: float, gone: float) -> View:
        first = view(t, 0.1, 0.25)
        second = view(t, 0.7, 0.85)
        return second if 3 < t < 3 + gone else first

    blink = path([seen(t, 0.15) for t in rate(250)], lookahead_s)
    assert np.ptp(blink) == 0
    views = [seen(t, inf) for t in rate(250)]
    places = path(views, lookahead_s)
    check_motion(views, places)
    assert places[60] <= 0.1 and places[-1] + WINDOW >= 0.85
    assert (np.diff(places) >= 0).all()


@LIVE
def test_what_swings_too_fast_is_not_chased(lookahead_s: float) -> None:
    def track(t: float) -> tuple[float, float]:
        return 0.4 + 0.35 * np.sin(4 * t), 0.5 + 0.35 * np.sin(4 * t)

    views = film(rate(400), track)
    check_motion(views, path(views, lookahead_s))


def test_a_live_path_is_told_with_a_bounded_delay() -> None:
    """While frames come in: no place waits longer than the look-ahead, half of the mean, a block
    and a frame."""
    given_s: list[float] = []

    def frames():  # type: ignore[no-untyped-def]
        for one in film(rate(300), TRACKS["slow pan"][1]):
            given_s.append(one.time_s)
            yield one

    for index, _ in enumerate(plan_path(frames(), ROOM, LOOKAHEAD_S)):
        assert given_s[-1] - index / 30 <= LOOKAHEAD_S + EASE_S / 2 + 0.1 + 2 / 30


def test_the_same_film_at_another_rate_has_the_same_path() -> None:
    track = TRACKS["fast pan"][1]
    slow, fast = (path(film(rate(4 * fps, fps), track)) for fps in (25, 50))
    assert slow == pytest.approx(fast[::2], abs=0.02)


@st.composite
def films(draw: st.DrawFn) -> list[View]:
    gaps = draw(st.lists(st.sampled_from([0.01, 0.033, 0.04, 0.3]), min_size=1, max_size=60))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    views = []
    for time_s in np.cumsum(gaps):
        start, width = rng.uniform(0, 0.7), rng.uniform(0.01, 0.3)
        views.append(view(float(time_s), start, start + width, bool(rng.random() < 0.05)))
    return views


@settings(max_examples=40, deadline=None)
@given(films(), st.sampled_from([inf, LOOKAHEAD_S, 0.3]))
def test_the_motion_is_bounded_whatever_happens(views: list[View], lookahead_s: float) -> None:
    check_motion(views, path(views, lookahead_s))


def test_a_window_as_large_as_the_frame_stays() -> None:
    views = [View(t, np.ones(PLACES), 0.0, 0.0) for t in rate(20)]
    assert list(plan_path(views, 0.0)) == [0.0] * 20
    assert list(plan_path([], ROOM)) == []


def test_a_ranked_frame_says_what_must_be_kept() -> None:
    mask = np.zeros((90, 160), bool)
    mask[20:60, 80:96] = True
    item = RankedObject(1, 1.0, 0.9, (80, 20, 96, 60), mask, float(mask.mean()), 0)
    seen = view_of(Ranking(90, 160, (item,)), Aspect(9, 16), 1.5, cut=True)
    window = 50 / 160  # 90 × 9/16 = 50.6, and even
    assert seen.time_s == 1.5 and seen.cut
    assert seen.high == pytest.approx(80 / 160 - AIR)
    assert seen.low == pytest.approx(96 / 160 + AIR - window)
    best = np.linspace(0, 1 - window, PLACES)[seen.kept.argmax()]
    assert best < 0.5 < best + window
    empty = view_of(Ranking(90, 160, ()), Aspect(9, 16), 0.0)
    assert (empty.low, empty.high, empty.cut) == (0, 1, False)
    wide = np.ones((90, 160), bool)
    large = RankedObject(1, 1.0, 0.9, (0, 0, 160, 90), wide, 1.0, 0)
    assert view_of(Ranking(90, 160, (large,)), Aspect(9, 16), 0.0).high == 1
