"""The reader of fixations on files written here, the split, and shares worked out by hand."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgnn.data.gaze import GazePhoto, density, gaze_split, read_gaze
from dsgnn.data.ranks import owners, share_of_looks, shares_under
from dsgnn.runtime.errors import DataError

VIEWERS = [
    [[8.0, 6.0, 250], [3.5, 2.0, 100], [12.0, 9.25, 180]],
    [[8.0, 6.0, 300]],
    [[8.0, 6.5, 200], [1.0, 1.0, 90]],
]


def entry(name="osie_1002.webp", **changes):
    made = {"file_name": name, "width": 16, "height": 12, "source": "OSIE", "dev": False}
    return made | ({} if "points" in changes else {"viewers": VIEWERS}) | changes


def write(folder: Path, *entries) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "fixations.json").write_text(json.dumps({"images": list(entries)}))
    return folder


def photo(name: str, **changes) -> GazePhoto:
    values = {"width": 16, "height": 12, "source": "X", "points": np.zeros((1, 2))} | changes
    return GazePhoto(Path("images") / name, **values)


def test_the_first_fixation_of_each_viewer_is_left_out(tmp_path):
    [found] = read_gaze(write(tmp_path, entry()))
    assert found.path == tmp_path / "images" / "osie_1002.webp"
    assert (found.width, found.height, found.source) == (16, 12, "OSIE")
    assert (found.dev, found.coco_id) == (False, None)
    assert [viewer.tolist() for viewer in found.viewers] == [
        [[3.5, 2.0], [12.0, 9.25]], [], [[1.0, 1.0]],
    ]  # fmt: skip
    assert found.points.tolist() == [[3.5, 2.0], [12.0, 9.25], [1.0, 1.0]]


def test_merged_points_all_count(tmp_path):
    points = [[1, 2], [3.5, 4]]
    [found] = read_gaze(write(tmp_path, entry(points=points, coco_id=716, dev=True)))
    assert found.viewers == () and found.points.tolist() == points
    assert found.dev and found.coco_id == 716


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (entry(width=0), r"images\[0\].width must be a whole number from 1, got 0"),
        (entry(height=2.5), r"height must be a whole number from 1, got 2.5"),
        (entry(width=True), r"width must be a finite number, got True"),
        (entry(file_name="a/b.webp"), r"file_name must be a name without a folder, got 'a/b.webp'"),
        (entry(file_name=""), r"file_name must be a name without a folder"),
        (entry(source=3), r"source must be a str, got a int"),
        (entry(dev="no"), r"dev must be a bool, got a str"),
        (entry(coco_id=-4), r"coco_id must be a whole number from 1"),
        (entry() | {"points": []}, r"must have either 'viewers' or 'points'"),
        ({"file_name": "a.webp"}, r"images\[0\] has no 'width'"),
        (entry(viewers=[[[1, 2]]]), r"viewers\[0\]\[0\] must be \[x, y, ms\], got \[1, 2\]"),
        (entry(viewers=[3]), r"viewers\[0\] must be a list of \[x, y, ms\], got int"),
        (entry(points=[[1, 2], [1, "x"]]), r"points\[1\] must be a finite number, got 'x'"),
        (entry(points=[[1, float("nan")]]), r"points\[0\] must be a finite number, got nan"),
    ],
)
def test_a_broken_entry_is_named(tmp_path, broken, complaint):
    with pytest.raises(DataError, match=complaint):
        read_gaze(write(tmp_path, broken))


def test_a_name_may_come_once(tmp_path):
    with pytest.raises(DataError, match=r"images\[2\] and images\[0\] are both named"):
        read_gaze(write(tmp_path, entry(), entry("osie_1003.webp"), entry()))


def test_a_missing_file_and_a_list_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is the folder complete"):
        read_gaze(tmp_path)
    (tmp_path / "fixations.json").write_text("[]")
    with pytest.raises(DataError, match="must hold a dict, got a list"):
        read_gaze(tmp_path)


def test_pixels_are_read_when_asked_for(tmp_path):
    names = "good.png", "gone.png", "broken.png", "other.png"
    good, gone, broken, other = read_gaze(write(tmp_path, *(entry(name) for name in names)))
    cv2.imwrite(str(good.path), np.full((12, 16, 3), (30, 20, 10), np.uint8))
    cv2.imwrite(str(other.path), np.zeros((16, 12, 3), np.uint8))
    broken.path.write_bytes(b"nothing")
    assert good.read().tolist() == np.full((12, 16, 3), (10, 20, 30)).tolist()
    with pytest.raises(DataError, match=r"no image .*gone.png; is the folder complete"):
        gone.read()
    with pytest.raises(DataError, match=r"cannot read .*broken.png"):
        broken.read()
    with pytest.raises(
        DataError, match=r"height and width are 12 and 16, but .*other.png has 16 and 12; give"
    ):
        other.read()


def test_the_split_is_what_it_always_was():
    """A photo that changed sides would leak from one model's training into another's test."""
    golden = {
        "osie_1001.webp": "test",
        "osie_1002.webp": "train",
        "osie_1003.webp": "train",
        "eyecrowd_001.webp": "train",
        "eyecrowd_500.webp": "train",
        "salicon_000000000716.webp": "val",
        "photo.jpg": "train",
        "Ünï.png": "train",
    }  # fmt: skip
    assert {name: gaze_split(name) for name in golden} == golden
    assert gaze_split("images/osie_1001.webp") == gaze_split(r"C:\x\osie_1001.webp") == "test"


def test_the_split_has_its_shares():
    counts = np.unique([gaze_split(f"photo{i}.jpg") for i in range(20_000)], return_counts=True)
    shares = dict(zip(counts[0].tolist(), counts[1] / 20_000, strict=True))
    assert shares == pytest.approx({"train": 0.65, "val": 0.15, "test": 0.20}, abs=0.01)


def test_what_may_be_learnt_from():
    assert photo("eyecrowd_001.webp").may_train
    assert photo("eyecrowd_001.webp", coco_id=716).may_train
    assert not photo("eyecrowd_001.webp", coco_id=715).may_train
    assert not photo("eyecrowd_001.webp", dev=True).may_train
    assert not photo("osie_1001.webp").may_train


def rectangles(*boxes):
    """(G, 12, 16) bool of (x, y, w, h)."""
    masks = np.zeros((len(boxes), 12, 16), bool)
    for mask, (x, y, w, h) in zip(masks, boxes, strict=True):
        mask[y : y + h, x : x + w] = True
    return masks


def test_the_smaller_object_owns_what_two_share():
    masks = rectangles((0, 0, 8, 12), (4, 4, 2, 2), (4, 4, 2, 2))
    expected = np.full((12, 16), -1)
    expected[:, :8] = 0
    expected[4:6, 4:6] = 1  # two are equally large: the first
    assert owners(masks).tolist() == expected.tolist()
    assert owners(masks[::-1])[5, 5] == 0
    assert (owners(np.zeros((0, 12, 16), bool)) == -1).all()
    with pytest.raises(ValueError, match=r"masks must be \(G, h, w\) bool"):
        owners(masks.astype(np.uint8))


def test_shares_of_looks_by_hand():
    masks = rectangles((0, 0, 8, 12), (4, 4, 4, 4), (12, 0, 4, 4))
    points = np.array([
        [0, 0], [3.99, 11.99],  # on the large one alone
        [4, 4], [7.99, 7.99], [5, 5],  # on both: the smaller one's
        [8, 5], [-0.01, 3], [16, 2],  # on none, and two outside the frame
    ])  # fmt: skip
    assert share_of_looks(points, masks).tolist() == [2 / 8, 3 / 8, 0]
    assert share_of_looks(points, masks[[1, 0, 2]]).tolist() == [3 / 8, 2 / 8, 0]
    assert share_of_looks(points, masks[:0]).tolist() == []
    with pytest.raises(ValueError, match=r"points must be \(N, 2\) with N from 1"):
        share_of_looks(np.zeros((0, 2)), masks)


def test_shares_under_a_map_by_hand():
    masks = rectangles((0, 0, 8, 12), (4, 4, 4, 4), (12, 0, 4, 4))
    attention = np.ones((12, 16), np.float32)
    attention[:, 8:] = 3
    total = 8 * 12 + 3 * 8 * 12
    expected = np.array([96 - 16, 16, 3 * 16]) / total
    assert shares_under(attention, masks) == pytest.approx(expected, abs=1e-12)
    assert shares_under(attention * 7, masks) == pytest.approx(expected, abs=1e-12)
    assert shares_under(attention, masks[[2, 1, 0]]) == pytest.approx(expected[::-1], abs=1e-12)
    # A flat map of another size gives every object its area.
    flat = np.full((3, 5), 1 / 15)
    assert shares_under(flat, masks) == pytest.approx(np.array([80, 16, 16]) / 192, abs=1e-12)


@pytest.mark.parametrize(
    ("attention", "complaint"),
    [
        (np.zeros((3, 4)), "zeros only"),
        (np.full((3, 4), -1.0), "from 0 up"),
        (np.full((3, 4), np.nan), "from 0 up"),
        (np.ones((3, 4, 1)), "from 0 up"),
    ],
)
def test_a_map_that_is_none_is_refused(attention, complaint):
    with pytest.raises(ValueError, match=complaint):
        shares_under(attention, rectangles((0, 0, 8, 12)))


def test_the_density_sums_to_one_and_lies_where_people_looked():
    looked = photo("a.webp", points=np.array([[4.2, 3.1], [4.9, 3.9], [15.9, 11.9], [16.0, 5.0]]))
    sharp = density(looked, (6, 8), 0.01)
    assert sharp[1, 2] == pytest.approx(2 / 3) and sharp[5, 7] == pytest.approx(1 / 3)
    blurred = density(looked, (6, 8), 1.0)
    assert blurred.dtype == np.float32 and blurred.sum() == pytest.approx(1, abs=1e-6)
    assert np.unravel_index(blurred.argmax(), (6, 8)) == (1, 2)
    # One cell away, a Gaussian of one cell's width has fallen to exp(-1/2).
    assert blurred[1, 1] == pytest.approx(blurred[0, 2], rel=1e-3)
    assert blurred[1, 1] / blurred[1, 2] == pytest.approx(np.exp(-0.5), rel=1e-2)
    with pytest.raises(ValueError, match="no fixation inside"):
        density(photo("a.webp", points=np.array([[16.0, 3.0]])), (6, 8), 1.0)
