"""The written rule: each term does what its description says, and no more."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from dsgnn.data.saliency import (
    MAX_OBJECTS,
    MIN_AREA,
    POINTS,
    SPAN,
    THRESHOLD,
    kind_weight,
    saliency_scores,
    salient_objects,
)

H, W = 120, 160


def _disc(area: float, centre: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    y, x = np.mgrid[:H, :W]
    radius = (area * H * W / np.pi) ** 0.5
    return (x - centre[0] * W) ** 2 + (y - centre[1] * H) ** 2 < radius**2


def _photo(*masks: np.ndarray, colour: tuple[int, int, int] = (200, 60, 60)) -> np.ndarray:
    """Grey noise of one strength everywhere, objects tinted: only what a test varies differs."""
    noise = np.random.default_rng(0).integers(-20, 21, (H, W, 1))
    image = np.full((H, W, 3), 120) + noise
    for mask in masks:
        image[mask] += np.array(colour) - 120
    return image.clip(0, 255).astype(np.uint8)


def _score(mask: np.ndarray, kind: str = "person", image: np.ndarray | None = None) -> float:
    return float(saliency_scores(_photo(mask) if image is None else image, mask[None], [kind])[0])


def test_size_gains_as_the_square_root_up_to_a_quarter_of_the_frame_and_nothing_beyond():
    small, quarter, large = (_score(_disc(area)) for area in (0.0625, 0.25, 0.4))
    assert quarter - small == pytest.approx(POINTS["size"] / 2, abs=0.15)
    assert large == pytest.approx(quarter, abs=0.15)


def test_contrast_to_the_ring_counts_and_saturates():
    mask = _disc(0.1)
    none, some, full, more = (
        _score(mask, image=_photo(mask, colour=c))
        for c in ((120, 120, 120), (140, 115, 115), (200, 60, 60), (230, 40, 40))
    )
    assert none < some < full
    assert full - none == pytest.approx(POINTS["contrast"], abs=0.1)
    assert more == pytest.approx(full, abs=0.05)


def test_contrast_is_to_the_ring_and_not_to_far_away_parts():
    mask, far = _disc(0.03, (0.25, 0.5)), _disc(0.06, (0.85, 0.5))
    alone = _score(mask, image=_photo(mask))
    assert _score(mask, image=_photo(mask, far)) == pytest.approx(alone, abs=0.02)


def test_the_centre_is_looked_at_first():
    scores = [_score(_disc(0.05, (x, 0.5))) for x in (0.5, 0.65, 0.8)]
    assert scores[0] > scores[1] > scores[2]
    assert scores[0] - scores[2] == pytest.approx(
        POINTS["centre"] * (1 - np.exp(-(0.3**2) / (2 * 0.25**2))), abs=0.1
    )


def test_a_sharp_object_scores_above_a_blurred_one():
    mask = _disc(0.1)
    sharp = _photo(mask)
    blurred = sharp.copy()
    blurred[mask] = cv2.GaussianBlur(sharp, (0, 0), 2)[mask]
    assert _score(mask, image=sharp) > _score(mask, image=blurred) + 0.2


def test_being_cut_by_the_frame_costs_unless_the_object_fills_it():
    inside = np.zeros((H, W), bool)
    inside[40:80, 1:41] = True
    cut = np.roll(inside, -1, axis=1)
    assert _score(inside) - _score(cut) == pytest.approx(1.5 * (1 - 0.577) * 0.5, abs=0.12)
    filling = np.ones((H, W), bool)
    assert _score(filling) == pytest.approx(
        POINTS["kind"] + POINTS["size"] + POINTS["contrast"] / 2 + POINTS["centre"]
        + POINTS["sharpness"] / 2,
        abs=0.1,
    )  # fmt: skip


def test_people_before_animals_before_vehicles_before_furniture():
    mask = _disc(0.1)
    scores = [_score(mask, kind) for kind in ("person", "dog", "car", "cup", "chair")]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[1] == pytest.approx(0.15 * POINTS["kind"])


def test_ranks_are_not_size():
    large, small = _disc(0.15, (0.3, 0.5)), _disc(0.05, (0.75, 0.5))
    scores = saliency_scores(_photo(large, small), np.stack([large, small]), ["bench", "person"])
    assert scores[1] > scores[0]


def test_a_table_is_clutter_however_large_and_central():
    assert _score(_disc(0.4), "dining table") < THRESHOLD < _score(_disc(0.4), "cake")


def test_a_tiny_person_is_not_yet_recognised_as_one():
    tiny = _disc(0.005)
    assert _score(tiny) - _score(tiny, "chair") == pytest.approx(
        (1 - 0.15) * POINTS["kind"] * 0.5 + POINTS["size"] * (0.02**0.5) * (1 - 0.15 / 0.4),
        abs=0.1,
    )


def test_kinds_are_found_by_the_deepest_part_of_a_path_that_is_known():
    assert kind_weight("animals/birds") == kind_weight("bird") == 0.85
    assert kind_weight("plants/flowers") > kind_weight("plants")
    assert kind_weight("Dining Table") == 0.05
    assert kind_weight("animals/unheard_of") == kind_weight("animals")
    assert kind_weight("unheard_of") == kind_weight("object")


def test_scores_stay_between_0_and_10_and_an_empty_mask_scores_0():
    rng = np.random.default_rng(3)
    masks = rng.random((8, H, W)) < np.linspace(0, 1, 8)[:, None, None]
    image = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
    scores = saliency_scores(image, masks, ["person"] * 8)
    assert scores[0] == 0
    assert (scores[1:] > 0).all() and (scores <= 10).all()


def test_scores_do_not_depend_on_the_resolution():
    mask = _disc(0.1, (0.4, 0.6))
    image = _photo(mask)
    large = cv2.resize(image, (4 * W, 4 * H), interpolation=cv2.INTER_CUBIC)
    assert _score(mask.repeat(4, 0).repeat(4, 1), image=large) == pytest.approx(
        _score(mask, image=image), abs=0.15
    )


def test_no_objects_give_no_scores():
    assert saliency_scores(_photo(), np.zeros((0, H, W), bool), []).shape == (0,)


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"masks must be \(2, 120, 160\) for 2 kinds.*\(1, 120"):
        saliency_scores(_photo(), np.zeros((1, H, W), bool), ["cat", "dog"])


def test_salient_objects_are_the_few_that_pass_in_order():
    scores = np.array([6.0, 9.0, THRESHOLD - 0.01, 9.0 - SPAN - 0.01, 7.0, 8.0])
    areas = np.array([0.1, 0.1, 0.1, 0.1, MIN_AREA - 1e-6, MIN_AREA])
    assert salient_objects(scores, areas).tolist() == [1, 5, 0]
    many = salient_objects(np.linspace(7, 8, 9), np.full(9, 0.1))
    assert many.tolist() == [8, 7, 6, 5, 4] and len(many) == MAX_OBJECTS
    assert salient_objects(np.array([THRESHOLD - 1]), np.array([0.5])).size == 0
    assert salient_objects(np.zeros(0), np.zeros(0)).size == 0
