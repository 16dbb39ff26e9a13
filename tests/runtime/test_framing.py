"""Crops, focus and shares of looks: against pixels counted one by one, for any photo and aspect."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dsgnn.runtime import RankedObject, Ranking
from dsgnn.runtime.errors import InputError, OptionError
from dsgnn.runtime.framing import PRICE, Aspect, crop_to, parse_aspects

Box = tuple[int, int, int, int]


def ranking(
    height: int,
    width: int,
    boxes: list[Box],
    attention: np.ndarray | None = None,
    cell_px: tuple[float, float] | None = None,
) -> Ranking:
    """Rectangles in the order of their ranks; an empty one has no pixel."""
    objects = []
    for rank, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        mask = np.zeros((height, width), bool)
        mask[y0:y1, x0:x1] = True
        box = (x0, y0, x1, y1) if mask.any() else (0, 0, 0, 0)
        objects.append(RankedObject(rank, 1 / rank, 0.9, box, mask, float(mask.mean()), rank - 1))
    if attention is not None:
        attention = (attention / attention.sum(dtype=np.float64)).astype(np.float32)
    return Ranking(height, width, tuple(objects), attention=attention, attention_cell_px=cell_px)


def pixels(result: Ranking) -> np.ndarray:
    """The naive way: what falls on each pixel, by sampling every pixel 8 × 8 times."""
    assert result.attention is not None
    gh, gw = result.attention.shape
    cells = result.attention_cell_px or (result.height / gh, result.width / gw)
    fine = 8
    indices, parts = [], []
    for count, cell, side in zip((gh, gw), cells, (result.height, result.width), strict=True):
        places = (np.arange(side * fine) + 0.5) / fine
        index = np.minimum((places / cell).astype(int), count - 1)
        indices.append(index)
        parts.append(1 / np.bincount(index, minlength=count)[index])
    looks = result.attention[np.ix_(*indices)] * np.outer(*parts)
    return looks.reshape(result.height, fine, result.width, fine).sum((1, 3))


def best(looks: np.ndarray, size: tuple[int, int]) -> float:
    """The most looks that any window of a size (height, width) keeps, tried one by one."""
    h, w = size
    return max(
        looks[y : y + h, x : x + w].sum()
        for y in range(looks.shape[0] - h + 1)
        for x in range(looks.shape[1] - w + 1)
    )


sides = st.integers(1, 90)
aspects = st.sampled_from(["1:1", "4:5", "9:16", "16:9", "3:2", "1.91:1", "100:1", "1:100", (7, 5)])


@st.composite
def scenes(draw: st.DrawFn) -> Ranking:
    """Photos of any size with up to three objects anywhere, with an attention map or without."""
    h, w = draw(sides), draw(sides)
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        x0, y0 = draw(st.integers(0, w - 1)), draw(st.integers(0, h - 1))
        boxes.append((x0, y0, draw(st.integers(x0, w)), draw(st.integers(y0, h))))
    grid = None
    if draw(st.booleans()):
        shape = draw(st.tuples(st.integers(1, min(h, 6)), st.integers(1, min(w, 6))))
        grid = draw(arrays(np.float64, shape, elements=st.floats(0, 1))) + 1e-6
    return ranking(h, w, boxes, grid)


def fits(box: Box, inside: Box) -> bool:
    """Whether a window of this size has room for a box."""
    wide, high = inside[2] - inside[0], inside[3] - inside[1]
    return box[2] - box[0] <= wide and box[3] - box[1] <= high


def holds(window: Box, box: Box) -> bool:
    return all(window[:2] <= np.array(box[:2])) and all(np.array(box[2:]) <= window[2:])


@given(scenes(), aspects, st.sampled_from([None, 1, (), (1, 2), (2, 1, 9)]))
def test_the_window_is_the_largest_of_its_aspect_inside_the_photo(
    scene: Ranking, aspect: str | tuple[float, float], keep: object
) -> None:
    x0, y0, x1, y1 = scene.crop_box(aspect, keep)  # type: ignore[arg-type]
    assert all(type(side) is int for side in (x0, y0, x1, y1))
    assert 0 <= x0 < x1 <= scene.width and 0 <= y0 < y1 <= scene.height
    shape = Aspect.of(aspect)
    ratio = shape.width / shape.height
    if x1 - x0 == scene.width:
        assert abs((y1 - y0) - scene.width / ratio) <= 0.5 or y1 - y0 in (1, scene.height)
    else:
        assert y1 - y0 == scene.height
    if y1 - y0 == scene.height:
        assert abs((x1 - x0) - scene.height * ratio) <= 0.5 or x1 - x0 in (1, scene.width)


@given(scenes(), aspects)
def test_what_must_not_be_cut_is_kept_where_it_fits(
    scene: Ranking, aspect: str | tuple[float, float]
) -> None:
    """By order, whatever the attention says; without a map also unasked."""
    for keep in (1, (1,)) if scene.attention is not None else (1, (1,), None):
        window = scene.crop_box(aspect, keep)
        if scene.objects and scene.objects[0].area and fits(scene.objects[0].box, window):
            assert holds(window, scene.objects[0].box)
    window = scene.crop_box(aspect, (1, 2))
    boxes = [item.box for item in scene.objects[:2] if item.area]
    if len(boxes) == 2:
        both = *np.minimum(*boxes)[:2].tolist(), *np.maximum(*boxes)[2:].tolist()
        if fits(both, window):
            assert holds(window, boxes[0]) and holds(window, boxes[1])


@given(scenes(), aspects)
def test_unasked_the_first_object_is_kept_where_that_costs_little(
    scene: Ranking, aspect: str | tuple[float, float]
) -> None:
    free, whole, usual = (scene.crop_box(aspect, keep) for keep in ((), 1, None))
    cost = scene.attention_in(free) - scene.attention_in(whole)
    assert cost >= -1e-9
    if scene.attention is not None and abs(cost - PRICE) > 1e-6:
        assert usual == (whole if cost < PRICE else free)


@given(scenes(), aspects)
def test_no_window_keeps_more_looks(scene: Ranking, aspect: str | tuple[float, float]) -> None:
    if scene.attention is None or scene.height * scene.width > 2500:
        return
    x0, y0, x1, y1 = scene.crop_box(aspect, ())
    looks = pixels(scene)
    kept = looks[y0:y1, x0:x1].sum()
    # Samples of a pixel know the edge of a cell only to an eighth of it.
    assert kept >= best(looks, (y1 - y0, x1 - x0)) - 0.05
    if scene.height % scene.attention.shape[0] == scene.width % scene.attention.shape[1] == 0:
        assert kept == pytest.approx(best(looks, (y1 - y0, x1 - x0)), abs=1e-6)
        assert scene.attention_in((x0, y0, x1, y1)) == pytest.approx(kept, abs=1e-6)


def test_shares_of_boxes_and_masks_are_those_of_the_pixels() -> None:
    """Of a grid that reaches beyond the photo: 7 cells of 13.25 pixels cover 87 columns."""
    rng = np.random.default_rng(3)
    scene = ranking(66, 87, [], rng.random((5, 7)), (13.25, 13.25))
    looks = pixels(scene)
    assert looks.sum() == pytest.approx(1)
    assert scene.attention_in((0, 0, 87, 66)) == pytest.approx(1)
    assert scene.attention_in((-50, -9, 300, 400)) == pytest.approx(1)
    assert scene.attention_in((5, 5, 5, 60)) == 0
    for x0, y0, x1, y1 in [(0, 0, 10, 10), (3, 9, 80, 61), (53, 0, 87, 66), (30, 53, 31, 54)]:
        box = looks[y0:y1, x0:x1].sum()
        assert scene.attention_in((x0, y0, x1, y1)) == pytest.approx(box, rel=0.02)
        mask = np.zeros((66, 87), bool)
        mask[y0:y1, x0:x1] = True
        assert scene.attention_in(mask) == pytest.approx(scene.attention_in((x0, y0, x1, y1)))
    mask = rng.random((66, 87)) > 0.5
    assert scene.attention_in(mask) == pytest.approx(looks[mask].sum(), rel=0.01)
    assert scene.attention_in(~mask) + scene.attention_in(mask) == pytest.approx(1)
    assert scene.attention_in(np.zeros((66, 87), bool)) == 0


def test_what_is_too_large_keeps_the_part_that_is_looked_at_most() -> None:
    """A person who lies across the photo: the face, at its right end, and not the legs."""
    grid = np.full((6, 10), 0.5)
    grid[2:4, :8] = 1
    grid[2:4, 8] = 4
    grid[0, 0] = 12  # a clock, that is looked at even more
    person = (10, 20, 98, 40)
    scene = ranking(60, 100, [person], grid, (10, 10))
    x0, _, x1, _ = scene.crop_box("9:16", keep=1)
    assert x0 <= 80 and x1 >= 90
    assert scene.crop_box("9:16", keep=())[0] == 0


def test_objects_give_way_in_the_order_in_which_they_are_named() -> None:
    scene = ranking(50, 200, [(0, 10, 40, 40), (160, 10, 190, 40)])
    for keep, kept, cut in (((1, 2), 0, 1), ((2, 1), 1, 0)):
        window = scene.crop_box("1:1", keep)
        assert holds(window, scene.objects[kept].box) and not holds(window, scene.objects[cut].box)


def test_a_small_object_is_kept_whole_without_filling() -> None:
    """With pad, what fits is never cut, and the frame is a plain crop."""
    grid = np.full((4, 10), 0.01)
    grid[:, 0] = 5
    scene = ranking(40, 100, [(70, 5, 90, 30)], grid)
    crop = crop_to(scene.looks, Aspect(1, 1), scene.objects, "pad")
    assert crop.fit == "crop" and crop.box[0] <= 70 and crop.box[2] >= 90
    cut = crop_to(scene.looks, Aspect(1, 1), scene.objects, "crop")
    assert cut.box == (0, 0, 40, 40)


def test_a_fit_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="crop, pad, blur"):
        crop_to(ranking(4, 4, []).looks, Aspect(1, 1), (), "stretch")


def test_an_empty_scene_is_cropped_to_its_middle() -> None:
    assert ranking(100, 200, []).crop_box("1:1") == (50, 0, 150, 100)
    assert ranking(201, 100, []).crop_box("1:1") == (0, 50, 100, 150)
    assert ranking(100, 200, [], np.ones((5, 10))).crop_box((1, 1)) == (50, 0, 150, 100)
    assert ranking(100, 200, []).focus == pytest.approx((0.5, 0.5), abs=0.02)
    assert ranking(1, 1, []).crop_box("9:16") == (0, 0, 1, 1)


def test_the_focus_is_where_people_look() -> None:
    grid = np.full((6, 10), 0.01)
    grid[1, 7] = 1
    x, y = ranking(60, 100, [], grid).focus
    assert (x, y) == pytest.approx((0.75, 0.25), abs=0.11)
    # Two things side by side share it, and one far away does not pull at it.
    grid[:] = 0.01
    grid[3, [1, 2]] = grid[3, 9] = 1
    x, y = ranking(60, 100, [], grid).focus
    assert 0.1 < x < 0.35 and 0.4 < y < 0.7
    # Without a map the first object draws it.
    x, _ = ranking(60, 100, [(75, 20, 99, 45), (0, 20, 25, 45)]).focus
    assert x > 0.5


def test_objects_stand_in_for_a_map() -> None:
    scene = ranking(60, 100, [(70, 10, 90, 50), (5, 10, 25, 50)])
    assert scene.attention_in((50, 0, 100, 60)) > scene.attention_in((0, 0, 50, 60))
    assert scene.attention_in((0, 0, 100, 60)) == pytest.approx(1)
    assert holds(scene.crop_box("1:1"), scene.objects[0].box)


def test_attention_is_counted_the_same_at_any_size() -> None:
    """A photo of 12 megapixels keeps what its small copy keeps, to the rounding of its window."""
    rng = np.random.default_rng(5)
    grid = rng.random((30, 40))
    small, large = ranking(300, 400, [], grid), ranking(3000, 4000, [], grid)
    for aspect in ("1:1", "9:16"):
        box = np.array(small.crop_box(aspect, ()))
        kept = large.attention_in(large.crop_box(aspect, ()))
        assert kept == pytest.approx(large.attention_in(10 * box), abs=2e-3)
    assert small.focus == large.focus


@pytest.mark.parametrize(
    "aspect", ["9", "0:1", "a:b", "9:16:1", "-1:2", "1:0", (1, 2, 3), (1, -1), None, "101:1", ""]
)
def test_an_aspect_that_is_none_is_refused(aspect: object) -> None:
    with pytest.raises(OptionError, match="aspect"):
        ranking(10, 10, []).crop_box(aspect)  # type: ignore[arg-type]


def test_aspects_are_read_and_named() -> None:
    assert [one.name for one in parse_aspects("1:1, 16:9,9x16,1:1")] == ["1x1", "16x9", "9x16"]
    assert str(Aspect.of((1.91, 1))) == "1.91:1" and Aspect.of("1.91:1").name == "1.91x1"
    with pytest.raises(OptionError, match="WIDTH:HEIGHT"):
        parse_aspects("1:1,wide")


@pytest.mark.parametrize(
    "region", [(1, 2, 3), (0, 0, np.nan, 5), np.zeros((3, 3), bool), np.ones((10, 20))]
)
def test_a_region_of_another_form_is_refused(region: object) -> None:
    with pytest.raises(OptionError, match="mask"):
        ranking(10, 20, []).attention_in(region)  # type: ignore[arg-type]


def test_the_heat_map_is_brightest_where_people_look_most() -> None:
    grid = np.full((6, 10), 0.02)
    grid[1, 7] = 1
    scene = ranking(300, 500, [], grid)
    photo = np.full((300, 500, 3), (40, 90, 60), np.uint8)
    before = photo.copy()
    heat = scene.heat_map(photo)
    assert heat.shape == photo.shape and heat.dtype == np.uint8 and np.array_equal(photo, before)
    brightness = cv2.cvtColor(heat, cv2.COLOR_RGB2GRAY)
    y, x = np.unravel_index(brightness[:250].argmax(), (250, 500))
    assert 50 <= y < 100 and 350 <= x < 400
    legend = brightness[270:, :150]
    assert legend.max() > 200  # letters
    small = replace(scene, height=30, width=50).heat_map(photo[:30, :50])
    assert small.shape == (30, 50, 3)


def test_a_heat_map_needs_a_map_and_its_photo() -> None:
    photo = np.zeros((60, 100, 3), np.uint8)
    with pytest.raises(OptionError, match="attention map"):
        ranking(60, 100, []).heat_map(photo)
    with pytest.raises(OptionError, match="of a photo of"):
        ranking(60, 90, [], np.ones((2, 3))).heat_map(photo)
    with pytest.raises(InputError):
        ranking(60, 100, [], np.ones((2, 3))).heat_map(photo[..., 0])


def test_supervision_takes_the_objects() -> None:
    sv = pytest.importorskip("supervision")
    scene = ranking(60, 100, [(70, 10, 90, 50), (5, 10, 25, 50)])
    found = scene.to_supervision()
    assert isinstance(found, sv.Detections) and len(found) == 2
    assert found.xyxy.tolist() == [[70, 10, 90, 50], [5, 10, 25, 50]]
    assert found.data["rank"].tolist() == [1, 2] and np.isnan(found.data["attention"]).all()
    assert np.array_equal(found.mask[0], scene.objects[0].mask)
    assert sv.MaskAnnotator().annotate(np.zeros((60, 100, 3), np.uint8), found).any()
    assert len(ranking(60, 100, []).to_supervision()) == 0
