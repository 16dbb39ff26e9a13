"""The result types: what they refuse, and what they can be made into."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dsgnn.runtime import RankedObject, Ranking


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
