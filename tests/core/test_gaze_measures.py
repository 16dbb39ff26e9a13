"""Measures against people, on cases worked out by hand and against other implementations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from dsgnn.gaze_measures import (
    ANNOTATED,
    AREA,
    CENTRAL,
    CENTRE_MAP,
    HALF,
    LARGER,
    MIDDLE_BOX,
    MODEL,
    auc,
    looks_figures,
    nss,
    ranked_figures,
    summarise_gaze,
    union_figures,
)

H, W = 20, 40


def box(x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def at(x: float, y: float, count: int) -> np.ndarray:
    return np.tile([float(x), float(y)], (count, 1))


# Three objects: a large one at the left, a small one in the middle, one at the right edge.
LEFT, MIDDLE, RIGHT = box(0, 0, 12, 20), box(18, 8, 4, 4), box(34, 5, 6, 10)
MASKS = np.stack([LEFT, MIDDLE, RIGHT])


def test_pairs_and_the_first_object_worked_out_by_hand() -> None:
    """Ten looks: three on the left, five on the middle, one on the right, one on nothing."""
    points = np.concatenate([at(5, 5, 3), at(20, 10, 5), at(36, 8, 1), at(28, 1, 1)])
    # The model says: middle, right, left. Of the three pairs only right before left is wrong.
    figures = looks_figures(points, (), MASKS, np.array([0.1, 0.9, 0.5]))
    assert figures["pairs"] == {MODEL: (2.0, 3), LARGER: (1.0, 3), CENTRAL: (3.0, 3)}
    # Larger first is left, right, middle: right is only left before right.
    # Distances to the centre are 14 for left, 0 for middle, 17 for right: all three are right.
    assert figures["first"] == {MODEL: (1.0, 1), LARGER: (0.0, 1), CENTRAL: (1.0, 1)}
    assert figures["fixations"][MODEL] == (pytest.approx(0.9), 1)
    assert figures["fixations"][AREA] == (pytest.approx((240 + 16 + 60) / (H * W)), 1)
    assert figures.keys() == {"pairs", "first", "fixations"}  # no map, so none of its measures


def test_pairs_closer_than_the_limit_and_ties() -> None:
    points = np.concatenate([at(5, 5, 50), at(20, 10, 49), at(36, 8, 1)])  # .50, .49, .01
    figures = looks_figures(points, (), MASKS, np.array([0.0, 0.0, 0.0]))
    assert figures["pairs"][MODEL] == (1.0, 2)  # two clear pairs, both tied
    assert figures["first"][MODEL] == (pytest.approx(1 / 3), 1)
    points = np.concatenate([at(5, 5, 6), at(20, 10, 4), at(28, 1, 90)])  # .06 and .04: clear
    figures = looks_figures(points, (), MASKS[:2], np.array([1.0, 0.0]))
    assert figures["pairs"][MODEL] == (1.0, 1)


def test_the_smaller_object_takes_what_two_share() -> None:
    masks = np.stack([box(0, 0, 40, 20), MIDDLE])
    figures = looks_figures(
        np.concatenate([at(20, 10, 6), at(1, 1, 4)]), (), masks, np.array([0.0, 1.0])
    )
    assert figures["pairs"][MODEL] == (1.0, 1) and figures["pairs"][LARGER] == (0.0, 1)


def test_one_half_of_the_viewers_is_held_against_the_other() -> None:
    """Even viewers: left .75, middle .25. Odd ones: left .25, middle .5, right .25."""
    viewers = [
        at(5, 5, 3),
        np.concatenate([at(5, 5, 1), at(20, 10, 2), at(36, 8, 1)]),
        at(20, 10, 1),
    ]
    figures = looks_figures(np.concatenate(viewers), viewers, MASKS, np.array([3.0, 2.0, 1.0]))
    # Truth of the even ones: left > middle > right, three pairs. The odd ones say middle before
    # left, left and right alike, middle before right: 0 + .5 + 1. Truth of the odd ones: two clear
    # pairs with middle first, of which the even ones have middle before right alone.
    assert figures["pairs"][HALF] == (2.5, 5)
    assert figures["first"][HALF] == (0.0, 1)


def test_photos_that_say_nothing_are_left_out() -> None:
    assert looks_figures(np.empty((0, 2)), (), MASKS, np.arange(3.0)) == {}
    nothing = looks_figures(at(5, 5, 4), (), MASKS[:0], np.zeros(0))
    assert nothing["pairs"][MODEL] == (0.0, 0) and nothing["first"][MODEL] == (0.0, 0)
    assert nothing["fixations"] == {MODEL: (0.0, 1), AREA: (0.0, 1)}
    unseen = looks_figures(at(28, 1, 4), (), MASKS, np.arange(3.0))
    assert unseen["first"][MODEL] == (0.0, 0)


def test_auc_and_nss_are_those_of_other_implementations() -> None:
    rng = np.random.default_rng(3)
    grid = np.round(rng.random((13, 17)), 1)  # with many ties
    points = rng.uniform(-1, 18, (60, 2))
    inside = [(int(x // 1), int(y // 1)) for x, y in points if 0 <= x < 17 and 0 <= y < 13]
    assert 10 < len(inside) < 60
    values = np.array([grid[y, x] for x, y in inside])
    statistic = mannwhitneyu(values, grid.ravel()).statistic
    assert auc(grid, points)[0] == pytest.approx(statistic / (len(values) * grid.size), abs=1e-12)
    naive = 0.0
    for value in values:
        naive += sum((value > pixel) + 0.5 * (value == pixel) for pixel in grid.ravel())
    assert auc(grid, points)[0] == pytest.approx(naive / len(values) / grid.size, abs=1e-12)
    mean = sum(grid.ravel()) / grid.size
    deviation = (sum((pixel - mean) ** 2 for pixel in grid.ravel()) / grid.size) ** 0.5
    naive = sum((value - mean) / deviation for value in values) / len(values)
    assert nss(grid, points)[0] == pytest.approx(naive, abs=1e-12)
    assert nss(np.ones((3, 3)), at(1, 1, 2)) == (0.0, 0)
    assert auc(grid, at(-5, 3, 2)) == (0.0, 0)


def test_a_map_is_measured_beside_the_centre_and_beside_the_viewers() -> None:
    """Everybody looks at the right; the map says so too, in a grid of its own size."""
    viewers = [at(36, 8, 3), at(35, 9, 3)]
    attention = np.zeros((5, 10))
    attention[2, 8] = 1.0
    points = np.concatenate(viewers)
    figures = looks_figures(points, viewers, MASKS, np.arange(3.0), attention)
    assert set(figures["nss"]) == set(figures["auc"]) == {MODEL, CENTRE_MAP, HALF}
    assert figures["nss"][MODEL][0] > 2 > 0 > figures["nss"][CENTRE_MAP][0]
    assert figures["auc"][MODEL][0] > 0.95 > 0.5 > figures["auc"][CENTRE_MAP][0]
    assert figures["auc"][HALF][0] > 0.95 and figures["nss"][HALF][1] == 1
    alone = looks_figures(points, (), MASKS, np.arange(3.0), attention)
    assert set(alone["nss"]) == {MODEL, CENTRE_MAP}


def test_objects_that_people_ranked() -> None:
    """Three annotated objects, of which people ranked the middle one first and the left second."""
    ranks, shares = np.array([2, 1, 0]), np.array([0.2, 0.5, 0.02])
    found = np.stack([LEFT, MIDDLE])
    figures = ranked_figures(MASKS, ranks, shares, found, np.array([0.1, 0.9]))
    assert figures["sa_sor"][MODEL] == (pytest.approx(1), 1)
    assert figures["sor"][MODEL] == (pytest.approx(1), 1)
    assert figures["sa_sor"][LARGER] == (pytest.approx(-1), 1)
    assert figures["sor"][LARGER] == (pytest.approx(0), 1)
    assert figures["first"] == {MODEL: (1.0, 1), LARGER: (0.0, 1), CENTRAL: (1.0, 1)}
    assert figures["pairs"] == {MODEL: (1.0, 1), LARGER: (0.0, 1), CENTRAL: (1.0, 1)}
    assert figures["recall"] == {MODEL: (2, 2), ANNOTATED: (2, 3)}
    # Without fixations all pairs of ranked objects are clear; one that was not ranked has no pair.
    figures = ranked_figures(MASKS, ranks, None, MASKS, np.array([0.1, 0.9, 0.5]))
    assert figures["pairs"][MODEL] == (1.0, 1) and figures["recall"][MODEL] == (2, 2)


def test_a_found_object_without_a_pixel_comes_last_in_every_order() -> None:
    found = np.stack([np.zeros_like(LEFT), LEFT, MIDDLE])
    figures = ranked_figures(MASKS, np.array([2, 1, 0]), None, found, np.array([-1.0, 0.1, 0.9]))
    assert figures["sa_sor"][MODEL] == figures["sa_sor"][CENTRAL] == (pytest.approx(1), 1)


def test_nothing_found_is_wrong_where_people_ranked() -> None:
    none = ranked_figures(MASKS, np.array([2, 1, 3]), None, MASKS[:0], np.zeros(0))
    assert none["sa_sor"][MODEL] == (0.0, 1) and none["first"][MODEL] == (0.0, 1)
    assert none["pairs"][MODEL] == (0.0, 0) and none["recall"][MODEL] == (0, 3)
    one = ranked_figures(MASKS, np.array([0, 1, 0]), None, MASKS[:0], np.zeros(0))
    assert one["first"] == {} and one["sa_sor"] == {}


def test_the_union_against_one_mask() -> None:
    truth = box(0, 0, 20, 20)  # the left half
    figures = union_figures(truth, np.stack([box(0, 0, 10, 20), box(5, 0, 10, 20)]))
    precision, recall = 1.0, 300 / 400
    f = 1.3 * precision * recall / (0.3 * precision + recall)
    assert figures["f_measure"][MODEL] == (pytest.approx(f), 1)
    assert figures["mae"][MODEL] == (pytest.approx(100 / 800), 1)
    assert figures["iou"][MODEL] == (pytest.approx(300 / 400), 1)
    assert figures["nothing_found"][MODEL] == (0.0, 1)
    # The box covers columns 10 to 29 and rows 5 to 14: 200 pixels, half of them in the truth.
    assert figures["iou"][MIDDLE_BOX] == (pytest.approx(100 / 500), 1)
    nothing = union_figures(truth, MASKS[:0])
    assert [nothing[name][MODEL][0] for name in ("f_measure", "iou", "mae")] == [0, 0, 0.5]
    assert nothing["nothing_found"][MODEL] == (1.0, 1)


def test_figures_of_a_set_and_their_intervals() -> None:
    """A share of things over all photos, with the interval that many draws of photos give."""
    photos = [{"pairs": {MODEL: (float(i % 2 * 2), 2), LARGER: (1.0, 2)}} for i in range(40)]
    photos.append({"pairs": {MODEL: (0.0, 0)}})
    row = summarise_gaze(photos)["pairs"][MODEL]
    assert (row["value"], row["count"]) == (0.5, 80)
    # A mean of 40 fair coins has a standard deviation of .079.
    assert row["interval"] == pytest.approx([0.5 - 1.96 * 0.079, 0.5 + 1.96 * 0.079], abs=0.03)
    assert summarise_gaze(photos)["pairs"][LARGER]["interval"] == [0.5, 0.5]
    assert list(summarise_gaze(photos)["pairs"]) == [MODEL, LARGER]


def test_a_figure_without_a_baseline_is_left_out() -> None:
    assert summarise_gaze([{"pairs": {MODEL: (1.0, 1)}}]) == {}
    assert summarise_gaze([{"pairs": {MODEL: (1.0, 1), HALF: (0.0, 0)}}]) == {}
    assert summarise_gaze([]) == {}
