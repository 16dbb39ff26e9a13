"""Postprocessing against what upstream gave its users, and the scenes it never met."""

import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.letterbox import Fixed, LongestSide
from dsgnn.runtime.postprocess import postprocess, without_specks

GOLDEN = Path(__file__).parents[1] / "golden"
GEOMETRY = Fixed(32, 32).geometry(32, 32)
BLOB = np.pad(np.full((4, 4), 5.0, np.float32), 2, constant_values=-5.0)  # (8, 8)


def rank(saliency, score, masks=None, geometry=GEOMETRY, threshold=0.5, if_none="none"):
    masks = np.stack([BLOB] * len(saliency)) if masks is None else masks
    return postprocess(np.float32(saliency), np.float32(score), masks, geometry, threshold, if_none)


@pytest.mark.parametrize(
    ("name", "size", "threshold", "kept"),
    [("r50_assr_4", 576, 0.4, 3), ("r50_assr_7", 576, 0.4, 5), ("r50_irsr_5", 640, 0.75, 8)],
)
def test_equals_upstream(name: str, size: int, threshold: float, kept: int) -> None:
    golden = np.load(GOLDEN / f"forward_{name}.npz")
    exponents = np.exp(golden["cls_pred"])
    score = (exponents / exponents.sum(1, keepdims=True))[:, 0]
    geometry = LongestSide(size).geometry(*golden["image"].shape[:2])
    ranking = postprocess(
        golden["rank_pred"], score, golden["shape_mask_9"], geometry, threshold, "all"
    )
    by_query = sorted(ranking.objects, key=lambda item: item.query)
    assert len(by_query) == kept
    assert [item.saliency for item in by_query] == golden["final_scores"].tolist()
    upstream_ranks = [kept + 1 - item.rank for item in by_query]  # they count up
    assert upstream_ranks == golden["final_ranks"].tolist()
    shape = golden["final_mask_shape"]
    masks = np.unpackbits(golden["final_masks"])[: shape.prod()].reshape(shape).astype(bool)
    for item, mask in zip(by_query, masks, strict=True):
        assert np.count_nonzero(item.mask != mask) <= 2  # a logit within rounding of 0
        rows, columns = np.flatnonzero(item.mask.any(1)), np.flatnonzero(item.mask.any(0))
        assert item.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert item.area == pytest.approx(item.mask.mean())


def test_keeps_strictly_above_the_threshold_and_orders_by_saliency() -> None:
    ranking = rank([1.0, 3.0, -2.0, 9.0], [0.75, 0.9, 0.6, 0.5], threshold=0.5)
    assert [(item.rank, item.query) for item in ranking.objects] == [(1, 1), (2, 0), (3, 2)]
    assert ranking.objects[0].score == pytest.approx(0.9)


def test_equal_saliencies_keep_the_query_order() -> None:
    ranking = rank([1.0, 2.0, 1.0, 2.0], [0.9] * 4)
    assert [item.query for item in ranking.objects] == [1, 3, 0, 2]


def test_nothing_passes() -> None:
    assert rank([1.0, 2.0], [0.1, 0.2]).objects == ()
    assert [item.query for item in rank([1.0, 2.0], [0.1, 0.2], if_none="all").objects] == [1, 0]
    # "all" is for empty scenes only
    assert len(rank([1.0, 2.0], [0.1, 0.9], if_none="all").objects) == 1


def test_an_empty_mask_stays_in_the_list() -> None:
    masks = np.stack([BLOB, np.full_like(BLOB, -1.0)])
    first, second = rank([2.0, 1.0], [0.9, 0.9], masks).objects
    assert first.box == (8, 8, 24, 24) and first.area == first.mask.mean() > 0.2
    assert second.box == (0, 0, 0, 0) and second.area == 0 and not second.mask.any()


def test_what_repeats_an_object_of_a_higher_score_is_dropped() -> None:
    """Masks of 10, 9, 8 and 1 columns: neighbours have an IoU of .9 and .89, the first and the
    third .8; the fourth lies apart and the fifth is empty."""
    masks = np.full((6, 24, 24), -1, np.float32)
    for query, columns in enumerate((10, 9, 8)):
        masks[query, :, :columns] = 1
    masks[3, :, 20] = 1
    masks[5] = masks[0]
    score = np.array([0.9, 0.8, 0.95, 0.6, 0.7, 0.4], np.float32)

    def kept(nms_iou: float, threshold: float = 0.5) -> list[int]:
        geometry = LongestSide(96).geometry(96, 96)
        ranking = postprocess(score, score, masks, geometry, threshold, nms_iou=nms_iou)
        return sorted(item.query for item in ranking)

    assert kept(1.0) == [0, 1, 2, 3, 4]
    assert kept(0.895) == [0, 2, 3, 4]  # 1 repeats 0, which does not repeat 2
    assert kept(0.85) == [0, 2, 3, 4]  # by 2 it goes already
    assert kept(0.75) == [2, 3, 4]
    assert kept(0.75, 0.3) == [2, 3, 4]
    assert kept(0.75, 0.99) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (37, 91), (480, 640)])
def test_masks_have_the_photos_size(shape: tuple[int, int]) -> None:
    geometry = LongestSide(64).geometry(*shape)
    h, w = (side // 4 for side in geometry.padded)
    (item,) = rank([1.0], [0.9], np.ones((1, h, w), np.float32), geometry).objects
    assert item.mask.shape == shape and item.mask.all()
    assert item.box == (0, 0, shape[1], shape[0]) and item.area == 1


def test_padding_does_not_leak_into_the_photo() -> None:
    geometry = Fixed(64, 64).geometry(32, 64)  # the lower half is padding
    masks = np.full((1, 16, 16), -1.0, np.float32)
    masks[:, 9:] = 50.0
    assert rank([1.0], [0.9], masks, geometry).objects[0].area == 0


def test_one_mask_at_a_time() -> None:
    """Beside the masks themselves, the peak is about one float image."""
    h, w = 1500, 2000
    geometry = Fixed(96, 128).geometry(h, w)
    masks = np.random.default_rng(0).standard_normal((5, 24, 32)).astype(np.float32)
    warm = rank([1.0], [0.9], masks[:1], geometry)
    tracemalloc.start()
    ranking = rank([5.0, 4.0, 3.0, 2.0, 1.0], [0.9] * 5, masks, geometry)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(warm.objects) == 1 and len(ranking.objects) == 5
    assert 5 * h * w < peak < (5 + 4 + 1) * h * w


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"if_none": "some"}, 'if_none must be "none" or "all", got \'some\''),
        ({"saliency": np.zeros(3, np.float32)}, r"expected saliency \(3,\), score \(3,\)"),
        ({"score": np.zeros((2, 1), np.float32)}, r"got \(2,\), \(2, 1\) and \(2, 8, 8\)"),
        ({"masks": np.zeros((2, 9, 8), np.float32)}, r"masks \(2, 8, 8\), got .*\(2, 9, 8\)"),
        ({"saliency": np.float32([1, np.nan])}, "not finite: the artifact is damaged"),
        ({"score": np.float32([1, np.inf])}, "export it again in fp32"),
        ({"score": np.float32([1, 0]), "masks": np.full((2, 8, 8), np.nan)}, "masks .* not finite"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict, message: str) -> None:
    arguments = {
        "saliency": np.zeros(2, np.float32),
        "score": np.zeros(2, np.float32),
        "masks": np.stack([BLOB] * 2),
        "geometry": GEOMETRY,
        "threshold": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        postprocess(**{**arguments, **changes})


def test_half_precision_logits() -> None:
    full = rank([1.0], [0.9], BLOB[None])
    half = rank([1.0], [0.9], BLOB[None].astype(np.float16))
    np.testing.assert_array_equal(half.objects[0].mask, full.objects[0].mask)


def test_upsampling_is_bilinear_at_half_pixel_centres() -> None:
    """Against the definition: sample a row of logits at (x + 0.5) / 4 - 0.5."""
    logits = np.random.default_rng(1).standard_normal(8).astype(np.float32)
    positions = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    expected = np.interp(positions, np.arange(8), logits) > 0
    (item,) = rank([1.0], [0.9], np.tile(logits, (8, 1))[None]).objects
    np.testing.assert_array_equal(item.mask, np.tile(expected, (32, 1)))
    assert cv2.countNonZero(item.mask.view(np.uint8)) == item.area * 32 * 32


def parts(*sides: int) -> np.ndarray:
    """Logits of squares of these sides, apart from each other: (96, 96) float32."""
    logits = np.full((96, 96), -2.0, np.float32)
    for number, side in enumerate(sides):
        row, column = divmod(number, 3)
        logits[32 * row : 32 * row + side, 32 * column : 32 * column + side] = 3.0
    return logits


@pytest.mark.parametrize(
    ("sides", "kept"),
    [
        ((30, 4), {30}),  # 16 of 900 pixels is below 2%
        ((30, 5), {30, 5}),  # 25 of 900 is above
        ((30, 4, 29, 1), {30, 29}),
        ((20,), {20}),
        ((), set()),
    ],
)
def test_specks_are_what_is_far_smaller_than_the_largest_part(
    sides: tuple[int, ...], kept: set[int]
) -> None:
    logits = parts(*sides)
    before = logits.copy()
    expected = parts(*(side if side in kept else 0 for side in sides)) > 0
    np.testing.assert_array_equal(without_specks(logits) > 0, expected)
    np.testing.assert_array_equal(logits, before)


def test_more_specks_than_16_bits_count() -> None:
    logits = np.full((600, 600), -1.0, np.float32)
    logits[::2, ::2] = 1.0
    logits[:99, :99] = 1.0
    cleaned = without_specks(logits)
    assert (cleaned[:99, :99] > 0).all() and np.count_nonzero(cleaned > 0) == 99 * 99


def test_parts_that_touch_at_a_corner_are_one() -> None:
    logits = np.full((64, 64), -1.0, np.float32)
    logits[:40, :40] = logits[40:42, 40:42] = 1.0
    np.testing.assert_array_equal(without_specks(logits), logits)


def test_a_speck_inflates_the_box_only_where_it_is_kept() -> None:
    """The photo is twice as large as the network's input."""
    masks = np.full((1, 24, 24), -4.0, np.float32)
    masks[0, 2:18, 2:18] = 4.0
    masks[0, 22, 22] = 4.0
    geometry = Fixed(96, 96).geometry(192, 192)
    arguments = np.float32([1]), np.float32([0.9]), masks, geometry, 0.5

    def box(**how: str) -> tuple[int, ...]:
        return postprocess(*arguments, **how).objects[0].box

    assert box() == box(specks="keep") and box()[2] > 170
    assert box(specks="drop")[2] < 150 and box(specks="drop")[:2] == box()[:2]
    with pytest.raises(OptionError, match='specks must be "drop" or "keep", got \'some\''):
        box(specks="some")


@pytest.mark.parametrize("size", [(480, 640), (301, 77), (40, 900), (96, 96), (1500, 2000)])
def test_masks_boxes_and_areas_of_photos_of_any_size(size: tuple[int, int]) -> None:
    """Against resizing the whole of each mask: only what lies near an object is looked at."""
    geometry = LongestSide(96).geometry(*size)
    high, wide = geometry.padded
    rng = np.random.default_rng(3)
    logits = cv2.GaussianBlur(rng.standard_normal((high, wide)), (0, 0), 5)[::4, ::4]
    logits = np.float32([logits - 0.1, logits - 0.02, -np.abs(logits) - 1])
    logits[0, :, : wide // 8] = -1
    ranking = postprocess(
        np.float32([3, 2, 1]), np.float32([0.9] * 3), logits, geometry, 0.5, specks="keep"
    )
    for item, coarse in zip(ranking, logits, strict=True):
        up = cv2.resize(coarse, (wide, high))[: geometry.resized[0], : geometry.resized[1]]
        expected = cv2.resize(up, size[::-1]) > 0
        np.testing.assert_array_equal(item.mask, expected)
        rows, columns = (np.flatnonzero(expected.any(axis)) for axis in (1, 0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)
        assert item.box == box and item.area == expected.mean() and type(item.area) is float
    assert ranking[1].area > 0 and ranking[2].area == 0
