"""The reader of ASSR on a small folder of the exact published form."""

import numpy as np
import pytest
from data_folders import (
    HEIGHT,
    LEFT,
    RED,
    RIGHT,
    WIDTH,
    box_mask,
    edit_json,
    even_looks,
)

from dsgnn.data import open_data
from dsgnn.data.assr import AssrReader
from dsgnn.data.records import Joined
from dsgnn.runtime.errors import DataError


def test_assr(published_assr):
    data = AssrReader(published_assr, "train")
    assert (len(data), data.palette) == (2, "assr")
    sample = data[1]
    assert sample.name == "102"
    assert sample.image.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(sample.image.astype(int) - RED).max() < 6  # RGB; JPEG is not exact
    # The object at exactly 0.5 is not salient; the others' 0.9 and 1.0 become ranks 1 and 2.
    np.testing.assert_array_equal(sample.masks, [box_mask(*LEFT), box_mask(*RIGHT)])
    assert sample.ranks.tolist() == [1, 2]
    assert data[-1].name == "102" and [s.name for s in data] == ["101", "102"]
    with pytest.raises(IndexError):
        data[2]


def test_assr_splits_and_the_published_recipe(published_assr):
    assert [s.name for s in AssrReader(published_assr, "val")] == ["201"]
    assert [s.name for s in AssrReader(published_assr, "test")] == ["301"]
    joined = open_data(published_assr, "train+val")
    assert [joined[i].name for i in range(len(joined))] == ["101", "102", "201"]
    assert joined[-1].name == "201" and joined.palette == "assr"
    with pytest.raises(IndexError):
        joined[3]
    mixed = Joined(
        [open_data("composite:2", "train", even_looks), AssrReader(published_assr, "val")]
    )
    assert mixed[-1].name == "201" and mixed[-2].name == mixed[1].name
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'all'"):
        AssrReader(published_assr, "all")


def test_images_are_read_only_when_asked_for(published_assr):
    (published_assr / "images" / "train" / "101.jpg").unlink()
    data = AssrReader(published_assr, "train")
    assert data[1].name == "102"
    with pytest.raises(DataError, match=r"train.json: \[0\]: no image .*101.jpg"):
        data[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[0].pop("img"), r"\[0\] has no 'img', only 'object_data'"),
        (lambda e: e[0].update(img=7), r"\[0\].img must be a str, got a int"),
        (lambda e: e.__setitem__(0, "x"), r"\[0\] must be a dict with 'img', got a str"),
        (lambda e: e[0].update(object_data={}), r"\[0\].object_data must be a list, got a dict"),
        (
            lambda e: e[0]["object_data"].pop(),
            r"rank_order has 3 numbers, .*\[0\].object_data 2 obj",
        ),
        (
            lambda e: e[0]["object_data"][2].pop("segmentation"),
            r"\[0\].object_data\[2\] has no 'segmentation'",
        ),
        (
            lambda e: e[0]["object_data"][2].update(segmentation=[[1, 2]]),
            r"\[0\].object_data\[2\].segmentation: polygon 0: expected x and y",
        ),
        (lambda e: e[0].update(img="9"), r"\[0\]: no .*rank_order.train.9.json"),
        (lambda e: e[0].update(img="../../9"), r"\[0\]\.img names a file outside of the data set"),
    ],
)
def test_assr_mistakes_are_named(published_assr, change, message):
    path = published_assr / "obj_seg_data_train.json"
    edit_json(path, change)
    with pytest.raises(DataError, match=message) as caught:
        AssrReader(published_assr, "train")[0]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"rank_order": [1.0, 0.9, null]}', r"101.json: rank_order\[2\] must be a finite number"),
        ('{"rank": []}', r"101.json has no 'rank_order'"),
        ("[1.0]", r"101.json must hold a dict, got a list"),
        ('{"rank', r"101.json: not JSON"),
    ],
)
def test_assr_rank_files(published_assr, content, message):
    (published_assr / "rank_order" / "train" / "101.json").write_text(content)
    with pytest.raises(DataError, match=message):
        AssrReader(published_assr, "train")[0]


def test_missing_and_broken_annotation_files(published_assr):
    path = published_assr / "obj_seg_data_val.json"
    path.write_text("[{")
    with pytest.raises(DataError, match="val.json: not JSON .* download it again"):
        AssrReader(published_assr, "val")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no .*val.json; is the folder complete"):
        AssrReader(published_assr, "val")
