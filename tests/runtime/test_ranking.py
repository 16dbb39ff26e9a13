"""The result types: what they refuse, and what they can be made into."""

import json
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgnn.runtime import RankedObject, Ranking
from dsgnn.runtime.errors import DataError, InputError, OptionError


def found(rank: int, y0: int, x0: int, y1: int, x1: int, h: int = 20, w: int = 30) -> RankedObject:
    mask = np.zeros((h, w), bool)
    mask[y0:y1, x0:x1] = True
    return RankedObject(
        rank, 10.0 - rank, 0.9, (x0, y0, x1, y1), mask, float(mask.mean()), query=rank - 1
    )


def ranking(count: int) -> Ranking:
    """`count` squares of 4 × 4, each overlapping the one before."""
    return Ranking(20, 30, tuple(found(i + 1, 2, 3 * i, 6, 3 * i + 4) for i in range(count)))


@pytest.mark.parametrize(
    ("palette", "count", "greys"),
    [
        ("assr", 7, [255, 229, 204, 178, 153, 153, 153]),
        ("assr", 2, [255, 229]),
        ("irsr", 4, [255, 191, 128, 64]),
        ("irsr", 1, [255]),
    ],
)
def test_rank_map(palette: str, count: int, greys: list[int]) -> None:
    grey = ranking(count).rank_map(palette)
    assert grey.shape == (20, 30) and grey.dtype == np.uint8
    # Column 3 i belongs to object i and to the one before: the more salient is on top.
    assert grey[4, [3 * i + 2 for i in range(count)]].tolist() == greys
    assert grey[4, [3 * i for i in range(1, count)]].tolist() == greys[:-1]
    assert not grey[:2].any() and not grey[6:].any()


def test_empty_scene() -> None:
    empty = Ranking(20, 30, ())
    assert not empty.rank_map().any() and not empty.rank_map("irsr").any()
    assert empty.to_dict() == {"width": 30, "height": 20, "objects": []}
    assert empty.draw(np.full((20, 30, 3), 200, np.uint8)).shape == (20, 30, 3)


def test_to_dict() -> None:
    facts = ranking(2).to_dict()
    assert facts == json.loads(json.dumps(facts))
    assert facts["objects"][1] == {
        "rank": 2,
        "saliency": 8.0,
        "score": 0.9,
        "bbox": [3, 2, 4, 4],
        "area": pytest.approx(16 / 600),
        "query": 1,
        "segmentation": {"size": [20, 30], "counts": "n14`000000Z>"},
    }


def test_unknown_palette() -> None:
    with pytest.raises(ValueError, match="palette must be one of assr, irsr, got 'grey'"):
        ranking(1).rank_map("grey")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.zeros((20, 30), np.uint8)}, r"mask must be \(h, w\) bool, got .* uint8"),
        ({"mask": np.zeros((1, 20, 30), bool)}, r"mask must be .* got \(1, 20, 30\) bool"),
        ({"box": (0, 0, 31, 4)}, r"box must be .* inside a 30×20 photo, got \(0, 0, 31, 4\)"),
        ({"box": (5, 0, 4, 4)}, r"box must be .* got \(5, 0, 4, 4\)"),
        ({"rank": 0}, "rank ≥ 1, query ≥ 0 and area within 0…1, got rank 0"),
        ({"query": -1}, "got rank 1, query -1"),
        ({"area": 1.5}, "area 1.5"),
    ],
)
def test_objects_refuse_what_does_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(found(1, 2, 2, 6, 6), **change)


def test_rankings_refuse_what_does_not_fit() -> None:
    first, second = found(1, 2, 2, 6, 6), found(2, 2, 2, 6, 6)
    with pytest.raises(ValueError, match=r"ranks 1…2 in order, got \[2, 1\]"):
        Ranking(20, 30, (second, first))
    with pytest.raises(ValueError, match=r"photo's size \(10, 30\), got \(20, 30\) for rank 1"):
        Ranking(10, 30, (first,))


PHOTO = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def seen(tmp_path: Path) -> Ranking:
    """A ranking that knows its photo, whose file is there too."""
    path = tmp_path / "in" / "street.png"
    path.parent.mkdir()
    cv2.imwrite(str(path), PHOTO[..., ::-1])
    return replace(ranking(3), image=PHOTO, file=str(path))


def test_it_draws_what_the_ranker_was_given(seen: Ranking) -> None:
    drawn = seen.draw()
    assert seen.file is not None and not (drawn == PHOTO).all()
    for source in (PHOTO, seen.file, Path(seen.file), Path(seen.file).read_bytes()):
        np.testing.assert_array_equal(seen.draw(source), drawn)
    with pytest.raises(OptionError, match="does not hold its photo: give the photo"):
        ranking(1).draw()
    with pytest.raises(OptionError, match=r"\(20, 30\), got an image of \(9, 9\)"):
        seen.draw(np.zeros((9, 9, 3), np.uint8))


def test_it_is_a_sequence_of_its_objects(seen: Ranking) -> None:
    assert [item.rank for item in seen] == [1, 2, 3] and len(seen) == 3
    assert seen[0].rank == 1 and seen[-1].rank == 3 and [x.rank for x in seen[1:]] == [2, 3]
    assert not len(Ranking(20, 30, ()))


def test_its_repr_has_no_arrays(seen: Ranking) -> None:
    text = repr(seen)
    assert "rank=3" in text and "box=(6, 2, 10, 6)" in text and "street.png" in text
    assert "array(" not in text and len(text) < 700


def test_it_is_printed_for_a_person(seen: Ranking) -> None:
    looked = replace(seen, objects=tuple(replace(x, attention=0.25) for x in seen.objects[:1]))
    first = looked.objects[0]
    assert str(looked).splitlines() == [
        "Ranking of 30×20 pixels, 1 objects",
        f"1. 25% of looks, {first.area:.0%} of the photo, box {first.box}",
    ]
    assert str(seen).splitlines()[3].startswith("3. ") and "looks" not in str(seen)
    assert str(Ranking(20, 30, ())) == "Ranking of 30×20 pixels, 0 objects"


def test_it_is_saved_and_read_again(seen: Ranking, tmp_path: Path) -> None:
    files = seen.save(tmp_path / "out", ["overlay", "map", "masks", "crops", "json"])
    masks = [f"street.{kind}{rank}.png" for kind in ("mask", "crop") for rank in (1, 2, 3)]
    names = {"street.overlay.jpg", "street.map.png", "street.json", *masks}
    assert {path.name for path in files} == names == set(os.listdir(tmp_path / "out"))
    read = Ranking.from_dict(json.loads((tmp_path / "out" / "street.json").read_text()))
    assert read.to_dict() == seen.to_dict() and read.file == seen.file
    for one, other in zip(read, seen, strict=True):
        np.testing.assert_array_equal(one.mask, other.mask)
    mask = cv2.imread(str(tmp_path / "out" / "street.mask2.png"), cv2.IMREAD_GRAYSCALE)
    np.testing.assert_array_equal(mask, seen[1].mask * np.uint8(255))


def test_what_is_saved_by_default_and_under_which_name(seen: Ranking, tmp_path: Path) -> None:
    assert {path.name for path in seen.save(tmp_path, name="x")} == {"x.overlay.jpg", "x.json"}
    (path,) = ranking(1).save(tmp_path, "map")
    assert path.name == "photo.map.png"
    with pytest.raises(
        OptionError, match="some of overlay, map, heat, masks, crops, json, got sheet"
    ):
        seen.save(tmp_path, ["map", "sheet"])
    with pytest.raises(OptionError, match="give the photo"):
        ranking(1).save(tmp_path / "new", ["crops"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"error": "it is empty"}, InputError, "not ranked: it is empty"),
        ({"width": 31}, DataError, r"a mask has size \[20, 30\], its photo \[20, 31\]"),
        ({"objects": [{"rank": 1}]}, DataError, "KeyError"),
        ({"objects": None}, DataError, "TypeError"),
    ],
)
def test_what_cannot_be_read_again(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Ranking.from_dict({**ranking(2).to_dict(), **changes})


def test_a_row_of_nulls_is_read() -> None:
    """Parquet has every field, with null where JSON has none."""
    facts = ranking(2).to_dict()
    for entry in facts["objects"]:
        entry.update(identity=None, attention=None)
    assert Ranking.from_dict({**facts, "error": None}).to_dict() == ranking(2).to_dict()


def disc(h: int = 60, w: int = 80, x: int = 40, y: int = 30, radius: int = 20) -> RankedObject:
    yy, xx = np.mgrid[:h, :w]
    mask = (xx - x) ** 2 + (yy - y) ** 2 <= radius**2
    x0, y0, bw, bh = cv2.boundingRect(mask.view(np.uint8))
    return RankedObject(1, 1.0, 0.9, (x0, y0, x0 + bw, y0 + bh), mask, float(mask.mean()), query=0)


@pytest.mark.parametrize("soft_px", [None, 0, 1, 3])
def test_a_crop_has_its_edge_inside_the_mask(soft_px: float | None) -> None:
    item = disc()
    photo = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    cut = item.crop(photo, soft_px)
    x0, y0, x1, y1 = item.box
    inside = item.mask[y0:y1, x0:x1]
    assert cut.shape == (y1 - y0, x1 - x0, 4) and cut.dtype == np.uint8
    np.testing.assert_array_equal(cut[..., :3], photo[y0:y1, x0:x1])
    alpha = cut[..., 3]
    assert not alpha[~inside].any() and alpha[20, 20] == 255
    row = alpha[20]  # through the middle: it rises once and falls once
    assert (np.diff(row[:20].astype(int)) >= 0).all() and (np.diff(row[20:].astype(int)) <= 0).all()
    between = np.count_nonzero((row > 0) & (row < 255))
    assert between == 0 if soft_px == 0 else 0 < between <= 4 * (soft_px or 1) + 2


def test_a_crop_is_whole_where_the_photo_cuts_the_object() -> None:
    alpha = disc(x=5).crop(np.zeros((60, 80, 3), np.uint8))[..., 3]
    assert (alpha[15:25, 0] == 255).all() and alpha[20, -1] < 255


def test_a_crop_of_nothing_and_what_is_refused() -> None:
    nothing = RankedObject(1, 1.0, 0.9, (0, 0, 0, 0), np.zeros((60, 80), bool), 0.0, query=0)
    assert nothing.crop(np.zeros((60, 80, 3), np.uint8)).shape == (0, 0, 4)
    with pytest.raises(OptionError, match="soft_px must be at least 0, got -1"):
        disc().crop(np.zeros((60, 80, 3), np.uint8), -1)
    with pytest.raises(OptionError, match="got an image of"):
        disc().crop(np.zeros((60, 81, 3), np.uint8))


def test_a_notebook_shows_the_photo_or_the_ranks(seen: Ranking) -> None:
    shown = cv2.imdecode(np.frombuffer(seen._repr_png_(), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(shown[..., ::-1], seen.draw())
    unknown = cv2.imdecode(np.frombuffer(ranking(2)._repr_png_(), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(unknown, ranking(2).rank_map())
    large = Ranking(100, 4000, ())
    assert cv2.imdecode(np.frombuffer(large._repr_png_(), np.uint8), 0).shape == (24, 960)


def test_a_heat_map_is_saved_where_attention_is_known(seen: Ranking, tmp_path: Path) -> None:
    grid = np.full((2, 3), 1 / 6, np.float32)
    known = replace(seen, attention=grid, attention_cell_px=(10.0, 10.0))
    (path,) = known.save(tmp_path, ["heat"])
    drawn = cv2.imread(str(path))[..., ::-1].astype(int)
    assert path.name == "street.heat.jpg"
    assert np.abs(drawn - known.heat_map()).mean() < 12  # JPEG
    with pytest.raises(OptionError, match="an artifact with an attention map"):
        seen.save(tmp_path / "none", ["heat"])
