"""The overlay: what it must show, at sizes from a dot to a poster."""

import numpy as np
import pytest

from dsgnn.runtime import RankedObject, Ranking, draw
from dsgnn.runtime.attention import percent
from dsgnn.runtime.draw import DIM, RANK_COLOURS, TINT

Box = tuple[float, float, float, float]


def scene(
    h: int, w: int, boxes: list[Box], shares: tuple[float, ...] = (), identity: int | None = None
) -> Ranking:
    """Objects with boxes (x0, y0, x1, y1) as shares of the photo, most salient first. shares: of
    looks."""
    objects = []
    for index, ends in enumerate(boxes):
        x0, y0, x1, y1 = (round(e * side) for e, side in zip(ends, (w, h, w, h), strict=True))
        mask = np.zeros((h, w), bool)
        mask[y0:y1, x0:x1] = True
        area = float(mask.mean())
        box = (x0, y0, x1, y1) if area else (0, 0, 0, 0)
        looks = shares[index] if shares else None
        objects.append(
            RankedObject(index + 1, -index, 0.9, box, mask, area, index, identity, looks)
        )
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


ALONE: list[Box] = [(0.3, 0.4, 0.5, 0.6)]
TWO: list[Box] = [(0.1, 0.1, 0.3, 0.3), (0.1, 0.7, 0.3, 0.9)]


def written(h: int, w: int, boxes: list[Box], shares: tuple[float, ...]) -> np.ndarray:
    """Where the shares of looks change the picture: (h, w) bool."""
    image = np.full((h, w, 3), 100, np.uint8)
    bare, told = scene(h, w, boxes).draw(image), scene(h, w, boxes, shares).draw(image)
    return (bare != told).any(2)


def test_the_share_of_looks_stands_beside_the_number() -> None:
    """In one line with it; a longer text takes more room, and the first says what it is of."""
    first, second = (written(480, 640, TWO, (0.38, 0.21))[half] for half in np.s_[:240, 240:])
    for place, (middle, width) in ((first, (96, 128)), (second, (144, 128))):
        rows, columns = np.nonzero(place)
        assert abs(rows.mean() - middle) < 8 and columns.min() > width and np.ptp(rows) < 40
    assert np.ptp(np.nonzero(first)[1]) > np.ptp(np.nonzero(second)[1]) + 60
    short, long = (written(480, 640, ALONE, (share,)).sum() for share in (0.05, 0.55))
    assert 0 < short < long


def test_a_share_that_rounds_to_nothing_is_not_told_as_nothing() -> None:
    image = np.full((480, 640, 3), 100, np.uint8)
    pictures = [scene(480, 640, ALONE, (share,)).draw(image) for share in (0.0, 0.004, 0.006)]
    assert (pictures[0] == pictures[1]).all() and (pictures[1] != pictures[2]).any()
    assert [percent(share) for share in (0.0, 0.004, 0.006, 0.384, 1.0)] == [
        "<1%", "<1%", "1%", "38%", "100%"
    ]  # fmt: skip


def test_a_share_at_the_edge_stands_on_the_other_side_or_is_shortened_or_left_out() -> None:
    for boxes, least, most in (
        ([(0.8, 0.4, 1.0, 0.6)], 0, 560),  # whole, to the left
        ([(0.0, 0.4, 0.2, 0.6)], 64, 640),
    ):
        rows, columns = np.nonzero(written(480, 640, list(boxes), (0.38,)))
        assert least < columns.min() + 1 and columns.max() < most and np.ptp(columns) > 120
    narrow = written(300, 150, [(0.3, 0.4, 0.7, 0.6)], (0.38,))
    assert 0 < np.ptp(np.nonzero(narrow)[1]) < 80
    assert not written(300, 60, [(0.3, 0.4, 0.7, 0.6)], (0.38,)).any()


def test_a_share_hides_no_other_number() -> None:
    """Ten objects in a row: every disc is as it is without shares."""
    row: list[Box] = [(0.1 * i, 0.4, 0.1 * i + 0.08, 0.6) for i in range(10)]
    changed = written(480, 640, row, tuple(0.1 for _ in row))
    for i in range(10):
        y, x = 240, round((0.1 * i + 0.04) * 640)
        assert not changed[y - 18 : y + 18, x - 18 : x + 18].any()


def test_objects_of_a_video_have_no_share_on_them() -> None:
    image = np.full((480, 640, 3), 100, np.uint8)
    told = scene(480, 640, ALONE, (0.38,), identity=1).draw(image)
    assert (told == scene(480, 640, ALONE).draw(image)).all()


def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is painted band by band is what is painted at once."""
    image = np.random.default_rng(0).integers(0, 256, (120, 90, 3), np.uint8)
    objects = scene(120, 90, [(0.1, 0.06, 0.9, 0.85), (0.5, 0.5, 1, 1)]).objects
    edges = np.linspace(0, 120, 5), np.linspace(0, 90, 4)
    pictures = []
    for pixels in (1 << 20, 90 * 11, 1):
        monkeypatch.setattr(draw, "BAND_PX", pixels)
        heat = draw.draw_heat(image, np.arange(12.0).reshape(4, 3) / 66, *edges)
        pictures.append((draw.draw_objects(image, objects), heat))
    for drawn, heat in pictures[1:]:
        np.testing.assert_array_equal(drawn, pictures[0][0])
        np.testing.assert_array_equal(heat, pictures[0][1])


def test_refuses_a_photo_of_another_size() -> None:
    ranking = scene(20, 30, [])
    with pytest.raises(ValueError, match=r"= \(20, 30\), got an image of \(30, 20\)"):
        ranking.draw(np.zeros((30, 20, 3), np.uint8))
    with pytest.raises(ValueError, match="expected a non-empty uint8 RGB image"):
        ranking.draw(np.zeros((20, 30), np.uint8))
