"""The reader of SIFR on a small folder of the exact published form."""

import numpy as np
import pytest
from data_folders import HEIGHT, LEFT, RIGHT, WIDTH, box_mask, edit_json

from dsgnn.data.sifr import SifrReader
from dsgnn.runtime.errors import DataError


def test_sifr(published_sifr):
    data = SifrReader(published_sifr, "test")
    assert (len(data), data.palette) == (2, "irsr")
    sample = data[1]
    assert sample.name == "000000000061"
    np.testing.assert_array_equal(sample.masks, [box_mask(*LEFT), box_mask(*RIGHT)])
    assert sample.ranks.tolist() == [2, 1]
    assert [s.name for s in SifrReader(published_sifr, "val")] == ["000000000043"]
    assert len(SifrReader(published_sifr, "train")) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[0]["annotations"][1].pop("gt_rank"), r"annotations\[1\] has no 'gt_rank'"),
        (
            lambda e: e[0]["annotations"][1].update(gt_rank="first"),
            r"annotations\[1\].gt_rank must be a finite number, got 'first'",
        ),
        (lambda e: e[0].update(height=13), r"height and width are 13 and 16, but .* 12 and 16"),
        (lambda e: e[0].update(file_name="x.jpg"), r"no image .*x.jpg; is the folder complete"),
        (lambda e: e[0].update(file_name="../x.jpg"), r"\.file_name names a file outside of the"),
    ],
)
def test_sifr_mistakes_are_named(published_sifr, change, message):
    path = published_sifr / "test" / "test_annotations.json"
    edit_json(path, change)
    with pytest.raises(DataError, match=message) as caught:
        SifrReader(published_sifr, "test")[0]
    assert f"{path}: [0]" in str(caught.value)


def test_an_image_without_salient_objects(published_sifr):
    edit_json(
        published_sifr / "test" / "test_annotations.json", lambda e: e[0].update(annotations=[])
    )
    sample = SifrReader(published_sifr, "test")[0]
    assert sample.masks.shape == (0, HEIGHT, WIDTH) and sample.ranks.shape == (0,)
