"""Which reader a folder gets, and its splits."""

import numpy as np
import pytest
from data_folders import (
    LEFT,
    box_mask,
    coco_json,
    even_looks,
    write_image,
    write_json,
)

from dsgnn.data import open_data
from dsgnn.data.assr import AssrReader
from dsgnn.data.irsr import IrsrReader
from dsgnn.data.sifr import SifrReader


def test_folders_are_recognised(published_assr, published_irsr, published_sifr):
    assert type(open_data(published_assr, "test")) is AssrReader
    assert type(open_data(str(published_irsr), "test")) is IrsrReader
    assert type(open_data(published_sifr, "test")) is SifrReader


def test_coco_folders(tmp_path):
    for number in range(40, 50):
        write_image(tmp_path / "one" / "images" / f"{number:012d}.jpg")
        write_image(tmp_path / "two" / "images" / "train" / f"{number:012d}.jpg")
    write_json(tmp_path / "one" / "instances.json", coco_json(range(40, 50)))
    for spec in (tmp_path / "one", tmp_path / "one" / "instances.json"):
        assert [int(s.name) for s in open_data(spec, "val")] == [43]
        assert len(open_data(spec, "train")) == 9
        assert len(open_data(spec, "all")) == 10
        with pytest.raises(ValueError, match="one set: its splits are train, val and all"):
            open_data(spec, "test")
    np.testing.assert_array_equal(open_data(tmp_path / "one", "all")[0].masks, [box_mask(*LEFT)])
    write_json(tmp_path / "two" / "annotations" / "instances_train.json", coco_json([40, 43]))
    for split, names in (("train", [40]), ("val", [43]), ("train+val", [40, 43])):
        assert [int(s.name) for s in open_data(tmp_path / "two", split)] == names
    write_json(tmp_path / "two" / "annotations" / "instances_val.json", coco_json([41]))
    assert [int(s.name) for s in open_data(tmp_path / "two", "train")] == [40, 43]
    assert [photo.id for photo in open_data(tmp_path / "two", "val").photos] == [41]
    with pytest.raises(ValueError, match="no split 'test' in a known form"):
        open_data(tmp_path / "two", "test")


def test_composite_scenes():
    train, val, test = (
        open_data("composite:3", split, even_looks) for split in ("train", "val", "test")
    )
    assert len(train) == len(val) == len(test) == 3
    assert (val.split, test.split, train.split) == ("test", "test", "train")
    assert not np.array_equal(val[0].image, test[0].image)  # other scenes of the same material
    for spec in ("composite:", "composite:0", "composite:many"):
        with pytest.raises(ValueError, match="expected composite:N"):
            open_data(spec, "train", even_looks)
    with pytest.raises(ValueError, match="nothing in it says what people look at first"):
        open_data("composite:3", "train")
    with pytest.raises(ValueError, match="splits of composite scenes are train, val, test"):
        open_data("composite:3", "all")


def test_composite_scenes_of_a_folder(tmp_path):
    for number in range(30):
        colour = (number * 8, 255 - number * 8, 40)
        write_image(tmp_path / "backgrounds" / f"{number}.png", colour, size=(300, 400))
    data = open_data(f"composite:4:{tmp_path}", "train", even_looks)
    assert data.library.background_files
    with pytest.raises(ValueError, match="has none of cutouts, backgrounds, photos"):
        open_data(f"composite:4:{tmp_path / 'backgrounds'}", "train")


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data at .*nowhere; expected one of\n  ASSR"):
        open_data(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="no split 'train' in a known form; expected one of"):
        open_data(tmp_path, "train")
    with pytest.raises(ValueError, match=r"names joined by \+, got 'train\+'"):
        open_data(tmp_path, "train+")
