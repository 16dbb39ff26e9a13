"""Identities and ranks from frame to frame."""

from dataclasses import replace

import numpy as np
import pytest
from steadiness import H, W, measure

from dsgnn.runtime import RankedObject, Ranking
from dsgnn.runtime.video.steady import APPEAR_S, HOLD_S, REMEMBER_S, Steadier

STEP = 0.04


def frame(*boxes: tuple[float, int, int], size: int = 20) -> Ranking:
    """Boxes of `size` pixels as (saliency, y, x)."""
    objects = []
    for rank, (saliency, y, x) in enumerate(sorted(boxes, reverse=True), start=1):
        mask = np.zeros((H, W), bool)
        mask[y : y + size, x : x + size] = True
        box = (x, y, min(x + size, W), min(y + size, H))
        objects.append(RankedObject(rank, saliency, 0.9, box, mask, mask.mean(), rank - 1))
    return Ranking(H, W, tuple(objects))


A, B, C = (3.0, 10, 10), (2.0, 10, 60), (1.0, 10, 110)


def identities(ranking: Ranking) -> list[int | None]:
    return [item.identity for item in ranking.objects]


def follow(*rankings: Ranking) -> list[list[int | None]]:
    steadier = Steadier()
    return [identities(steadier(one, i * STEP)) for i, one in enumerate(rankings)]


def test_steadier_than_raw_and_not_less_accurate() -> None:
    """`python tests/runtime/steadiness.py` prints these figures."""
    raw, steady = measure(clips=3)
    assert raw["identity switches per second"] > 5 and raw["rank changes per second"] > 20
    assert steady["identity switches per second"] < 0.3
    assert steady["rank changes per second"] < 2 * steady["true rank changes per second"]
    assert steady["SA-SOR"] >= raw["SA-SOR"] and steady["F1"] >= raw["F1"]


def test_without_noise_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steadiness.MISSED", 0)
    monkeypatch.setattr("steadiness.BLIPS", 0)
    raw, steady = measure(clips=1, jitter=0)
    assert steady["SA-SOR"] > raw["SA-SOR"] - 0.03 and steady["F1"] > raw["F1"] - 0.02


def test_a_moving_object_keeps_its_identity() -> None:
    frames = [frame((1.0, 10, 4 * i), (2.0, 60, 120 - 4 * i), size=16) for i in range(30)]
    assert follow(*frames) == [[1, 2]] * 30


def test_objects_that_pass_each_other_keep_theirs() -> None:
    """Where the faster one is next is known by its motion, not by its last mask alone."""
    frames = [frame((1.0, 20, 4 * i), (2.0, 34, 116 - 4 * i)) for i in range(30)]
    assert follow(*frames) == [[1, 2]] * 30


def test_the_result_is_the_frames_own_but_for_rank_and_saliency() -> None:
    before = frame(A, B)
    before = replace(before, timings_ms={"inference": 3.0})
    after = Steadier()(before, 0.0)
    assert after.timings_ms == before.timings_ms
    for one, other in zip(before.objects, after.objects, strict=True):
        assert other.mask is one.mask and other.query == one.query
        assert (other.rank, other.saliency, other.box) == (one.rank, one.saliency, one.box)


def test_noise_does_not_swap_neighbours_but_a_change_does() -> None:
    random = np.random.default_rng(0)
    steadier = Steadier()
    orders, raw = [], []
    for i in range(200):
        lead = 0.3 if i < 100 else -3.0
        one, other = random.normal(lead, 0.5), random.normal(0, 0.5)
        orders.append(identities(steadier(frame((one, *A[1:]), (other, *B[1:])), i * STEP)))
        raw.append(one > other)
    assert np.count_nonzero(np.diff(raw[:100])) > 20
    first = orders[0]
    changes = [i for i in range(1, 200) if orders[i] != orders[i - 1]]
    settled = [i for i in changes if i > 25]
    assert orders[99] != orders[130] and orders[130] == orders[199]
    assert len(settled) <= 2 and sorted(first) == [1, 2]


def test_a_missed_object_keeps_its_rank_for_a_moment() -> None:
    rounds = [frame(A, B, C)] * 5
    missed = int(HOLD_S / STEP)
    assert follow(*rounds, *[frame(B, C)] * missed, frame(A, B, C)) == [[1, 2, 3]] * (6 + missed)
    seen = follow(*rounds, *[frame(B, C)] * (missed + 1))
    assert seen[-1] == [2, 3]


def test_a_vanished_object_comes_back_as_itself_or_anew() -> None:
    shortly, long = int(0.5 * REMEMBER_S / STEP), int(REMEMBER_S / STEP) + 1
    start = [frame(A, B)] * 3
    assert follow(*start, *[frame(B)] * shortly, frame(A, B))[-1] == [1, 2]
    late = follow(*start, *[frame(B)] * long, *[frame(A, B)] * 5)
    assert late[-1] == [3, 2]


def test_a_new_object_takes_a_rank_once_it_stays() -> None:
    wait = int(round(APPEAR_S / STEP + 0.49))
    seen = follow(*[frame(B)] * 3, *[frame(A, B)] * (wait + 1))
    assert seen[-2:] == [[1], [2, 1]]
    blip = follow(*[frame(B)] * 3, frame(A, B), *[frame(B)] * 5)
    assert blip == [[1]] * 9


def test_frames_far_apart_are_taken_as_they_are() -> None:
    """With --every 25 an object that is in one frame alone is no flicker."""
    rankings = [frame(B), frame(A, B), frame(B), frame(A, B)]
    for step, expected in ((REMEMBER_S, [[1], [2, 1], [1], [2, 1]]), (2 * STEP, [[1]] * 4)):
        steadier = Steadier()
        assert [identities(steadier(one, i * step)) for i, one in enumerate(rankings)] == expected


def test_a_cut_takes_effect_at_once() -> None:
    other = frame((5.0, 60, 30), (4.0, 60, 90))
    assert follow(frame(A, B), frame(A, B), other) == [[1, 2], [1, 2], [3, 4]]


def test_an_empty_scene_does_not_flicker() -> None:
    """What is in one frame alone is no object; what stays is, after the same wait as elsewhere."""
    empty, wait = Ranking(H, W, ()), int(round(APPEAR_S / STEP + 0.49))
    assert follow(empty, frame(A), empty, frame(B), frame(C), empty) == [[]] * 6
    assert follow(empty, *[frame(A)] * (wait + 1)) == [[]] * (wait + 1) + [[1]]
    gone = int(HOLD_S / STEP) + 1  # an object that left: another place is no cut
    assert follow(frame(A), *[empty] * gone, frame(B), frame(A))[-2:] == [[], [1]]
    assert follow(frame(A), empty, frame(B)) == [[1], [1], [2]]  # but while it is held, it is


def test_empty_masks() -> None:
    nothing = RankedObject(1, 1.0, 0.9, (0, 0, 0, 0), np.zeros((H, W), bool), 0.0, 0)
    assert follow(Ranking(H, W, (nothing,))) == [[]]


def test_another_size_starts_anew() -> None:
    small = Ranking(4, 6, (RankedObject(1, 1.0, 1.0, (0, 0, 6, 4), np.ones((4, 6), bool), 1.0, 0),))
    assert follow(frame(A), small, frame(A)) == [[1], [2], [3]]


def test_an_identity_is_in_the_record() -> None:
    steadied = Steadier()(frame(A), 0.0)
    assert steadied.to_dict()["objects"][0]["identity"] == 1
    assert "identity" not in frame(A).to_dict()["objects"][0]
