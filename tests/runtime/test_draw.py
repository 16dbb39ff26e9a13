"""The overlay: what it must show, at sizes from a dot to a poster."""

import numpy as np
import pytest

from dsgnn.runtime import RankedObject, Ranking
from dsgnn.runtime.draw import DIM, RANK_COLOURS, TINT


def scene(h: int, w: int, boxes: list[tuple[float, float, float, float]]) -> Ranking:
    """Objects with boxes (x0, y0, x1, y1) as shares of the photo, most salient first."""
    objects = []
    for index, shares in enumerate(boxes):
        x0, y0, x1, y1 = (round(s * side) for s, side in zip(shares, (w, h, w, h), strict=True))
        mask = np.zeros((h, w), bool)
        mask[y0:y1, x0:x1] = True
        area = float(mask.mean())
        box = (x0, y0, x1, y1) if area else (0, 0, 0, 0)
        objects.append(RankedObject(index + 1, -index, 0.9, box, mask, area, index))
    return Ranking(h, w, tuple(objects))


def tinted(level: int, rank: int) -> np.ndarray:
    return np.array(RANK_COLOURS[rank - 1]) * TINT + level * (1 - TINT)


def test_dims_the_rest_and_tints_the_objects() -> None:
    ranking = scene(400, 600, [(0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 1.0, 1.0)])
    image = np.full((400, 600, 3), 200, np.uint8)
    drawn = ranking.draw(image)
    assert drawn.dtype == np.uint8 and drawn.shape == image.shape
    assert (image == 200).all()
    np.testing.assert_allclose(drawn[200, 300], 200 * DIM, atol=1)
    np.testing.assert_allclose(drawn[30, 30], tinted(200, 1), atol=1)
    np.testing.assert_allclose(drawn[30, 560], tinted(200, 2), atol=1)


def test_the_more_salient_object_is_on_top() -> None:
    ranking = scene(400, 600, [(0.3, 0.3, 0.7, 0.7), (0.0, 0.0, 1.0, 1.0)])
    drawn = ranking.draw(np.full((400, 600, 3), 100, np.uint8))
    np.testing.assert_allclose(drawn[140, 200], tinted(100, 1), atol=1)
    np.testing.assert_allclose(drawn[60, 60], tinted(100, 2), atol=1)


def test_the_number_lies_in_the_part_that_can_be_seen() -> None:
    """Object 2 is covered by 1 on its left half: its disc must be in the right half."""
    ranking = scene(400, 600, [(0.0, 0.0, 0.5, 1.0), (0.3, 0.2, 1.0, 0.8)])
    drawn = ranking.draw(np.full((400, 600, 3), 100, np.uint8))
    rows, columns = np.nonzero((drawn == RANK_COLOURS[1]).all(2))
    near = (abs(rows - 200) < 20) & (abs(columns - 450) < 60)
    assert near.sum() > 200


def test_different_numbers_are_drawn() -> None:
    """Two pictures that differ in the rank only, ranks that share a colour, differ in the ink."""
    boxes = [(0.0, 0.0, 0.0, 0.0)] * 8 + [(0.2, 0.2, 0.8, 0.8)]
    image = np.full((400, 600, 3), 100, np.uint8)
    eighth, ninth = scene(400, 600, boxes[1:]).draw(image), scene(400, 600, boxes).draw(image)
    changed = np.argwhere((eighth != ninth).any(2))
    assert 10 < len(changed) < 1000
    assert np.abs(changed.mean(0) - (200, 300)).max() < 10


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (8, 8), (37, 60), (60, 37)])
def test_small_photos(shape: tuple[int, int]) -> None:
    """Nothing is written where there is no room, but the objects are coloured."""
    ranking = scene(*shape, [(0.0, 0.0, 1.0, 1.0)])
    drawn = ranking.draw(np.full((*shape, 3), 100, np.uint8))
    assert drawn.shape == (*shape, 3)
    assert not (drawn == 255).all(2).any()  # no white ring
    assert (drawn[..., 0] > drawn[..., 2]).all()  # rank 1 is red


@pytest.mark.parametrize("shape", [(40, 40), (90, 60), (480, 640), (3000, 2000)])
def test_numbers_scale_with_the_photo(shape: tuple[int, int]) -> None:
    ranking = scene(*shape, [(0.1, 0.1, 0.9, 0.9)])
    drawn = ranking.draw(np.zeros((*shape, 3), np.uint8))
    disc = (drawn == RANK_COLOURS[0]).all(2)[shape[0] // 4 : -shape[0] // 4, shape[1] // 4 :]
    rows, columns = np.nonzero((drawn == 255).all(2))
    size = max(np.ptp(rows), np.ptp(columns)) + 1
    assert disc.any() and 0.04 < size / (shape[0] * shape[1]) ** 0.5 < 0.4


def test_a_number_at_the_edge_stays_inside() -> None:
    ranking = scene(300, 300, [(0.97, 0.97, 1.0, 1.0)])
    drawn = ranking.draw(np.zeros((300, 300, 3), np.uint8))
    rows, columns = np.nonzero((drawn == 255).all(2))
    ring = (rows.min(), columns.min(), rows.max(), columns.max())
    assert ring[2] - ring[0] == pytest.approx(ring[3] - ring[1], abs=1)  # not cut off


def test_refuses_a_photo_of_another_size() -> None:
    ranking = scene(20, 30, [])
    with pytest.raises(ValueError, match=r"= \(20, 30\), got an image of \(30, 20\)"):
        ranking.draw(np.zeros((30, 20, 3), np.uint8))
    with pytest.raises(ValueError, match="expected a non-empty uint8 RGB image"):
        ranking.draw(np.zeros((20, 30), np.uint8))
