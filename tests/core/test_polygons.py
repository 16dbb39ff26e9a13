"""Masks from the segmentations of annotations."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_folders import HEIGHT, LEFT, MIDDLE, MIDDLE_RUNS, RIGHT, WIDTH, box, box_mask

from dsgnn.data.polygons import polygons_to_mask, segmentation_to_mask
from dsgnn.runtime import rle

GOLDEN = Path(__file__).parents[1] / "golden"


def test_masks_are_those_of_cocos_tools():
    """The file's masks and run lengths were made by pycocotools 2.0.11 from the same polygons."""
    cases = json.loads((GOLDEN / "coco_masks.json").read_text())
    assert len(cases) == 48
    for case in cases:
        height, width = case["height"], case["width"]
        packed = np.frombuffer(bytes.fromhex(case["mask"]), np.uint8)
        expected = np.unpackbits(packed)[: height * width].reshape(height, width).astype(bool)
        drawn = polygons_to_mask(case["polygons"], height, width)
        assert drawn.dtype == bool
        np.testing.assert_array_equal(drawn, expected)
        for counts in (case["counts"], case["counts"].encode()):
            code = {"size": [height, width], "counts": counts}
            np.testing.assert_array_equal(rle.decode(code), expected)


def test_integer_boxes_cover_whole_pixels():
    np.testing.assert_array_equal(polygons_to_mask(box(*MIDDLE), HEIGHT, WIDTH), box_mask(*MIDDLE))
    np.testing.assert_array_equal(
        segmentation_to_mask(MIDDLE_RUNS, HEIGHT, WIDTH), box_mask(*MIDDLE)
    )
    both = polygons_to_mask(box(*LEFT) + box(*RIGHT), HEIGHT, WIDTH)
    np.testing.assert_array_equal(both, box_mask(*LEFT) | box_mask(*RIGHT))
    overlapping = polygons_to_mask(box(0, 0, 6, 6) + box(3, 3, 6, 6), HEIGHT, WIDTH)
    np.testing.assert_array_equal(overlapping, box_mask(0, 0, 6, 6) | box_mask(3, 3, 6, 6))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], r"expected a list of polygons .* got \[\]"),
        ("0,0", "expected a list of polygons"),
        ([[0, 0, 4, 4]], "polygon 0: expected x and y of at least 3 points"),
        ([[0, 0, 4, 4, 8, 0], [1, 1, 2, 2, 3, 3, 4]], "polygon 1: .*an even number"),
        ([0, 0, 4, 0, 4, 4], "polygon 0: expected x and y"),
        ([[0, 0, 4, "a", 4, 4]], "polygon 0: expected numbers"),
        ([[0, 0, float("nan"), 0, 4, 4]], "polygon 0: a coordinate is not finite"),
        ([[0, 0, 1e9, 0, 4, 4]], "polygon 0: a coordinate is not finite or beyond"),
        ({"size": [HEIGHT, WIDTH]}, "expected a run-length code"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 7]}, "must add up to 192, got 12"),
        ({"size": [HEIGHT, WIDTH], "counts": "`"}, "expected a run-length code"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**70]}, "expected a run-length code"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**63 - 1, 2**63 - 1, 194]}, "must add up to 192"),
        ({"size": [4, 4], "counts": [16]}, r"size \[4, 4\] .* image of \[12, 16\]"),
    ],
)
def test_broken_segmentations(segmentation, message):
    with pytest.raises(ValueError, match=message):
        segmentation_to_mask(segmentation, HEIGHT, WIDTH)
