"""The readers on small files of the exact published form, written here."""

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from dsgnn.cli import check
from dsgnn.data import open_data
from dsgnn.data.assr import AssrReader
from dsgnn.data.check import check_data
from dsgnn.data.irsr import IrsrReader, load_plain_pickle
from dsgnn.data.polygons import polygons_to_mask, segmentation_to_mask
from dsgnn.data.records import Joined, for_validation
from dsgnn.data.sifr import SifrReader
from dsgnn.runtime import rle
from dsgnn.runtime.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden"
HEIGHT, WIDTH = 12, 16
RED = (200, 10, 30)  # RGB


def box(x, y, w, h):
    """A rectangle as COCO polygons; it covers the pixels x…x+w-1, y…y+h-1."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def box_mask(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + h, x : x + w] = True
    return mask


LEFT, MIDDLE, RIGHT = (0, 0, 4, 4), (5, 2, 4, 6), (10, 3, 6, 9)
# MIDDLE as uncompressed run lengths, down the columns.
MIDDLE_RUNS = {"size": [HEIGHT, WIDTH], "counts": [62, 6, 6, 6, 6, 6, 6, 6, 88]}


def write_image(path, colour=RED, size=(HEIGHT, WIDTH)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), colour[::-1], np.uint8))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_pickle(path, content, protocol=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


def three_objects():
    return [
        {"bbox": [x, y, x + w, y + h], "segmentation": box(x, y, w, h)}
        for x, y, w, h in (LEFT, MIDDLE, RIGHT)
    ]


@pytest.fixture
def assr(tmp_path):
    root = tmp_path / "ASSR"
    for split, names in (("train", ("101", "102")), ("val", ("201",)), ("test", ("301",))):
        write_json(
            root / f"obj_seg_data_{split}.json",
            [{"img": name, "object_data": three_objects()} for name in names],
        )
        for name in names:
            write_image(root / "images" / split / f"{name}.jpg")
            write_json(
                root / "rank_order" / split / f"{name}.json", {"rank_order": [0.9, 0.5, 1.0]}
            )
    return root


@pytest.fixture
def irsr(tmp_path):
    root = tmp_path / "IRSR"
    for split, numbers in (("train", range(40, 50)), ("test", range(60, 62))):
        entries = []
        for number in numbers:
            name = f"{number:012d}.jpg"
            write_image(root / "Images" / split / "rgb" / name)
            entries.append(
                {
                    "file_name": f"/home/someone/IRSR/Images/{split}/rgb/{name}",
                    "rank": [2, 0, 1],
                    "annotations": [
                        {"bbox": list(LEFT), "bbox_mode": "xywh", "segmentation": box(*LEFT)},
                        {"bbox": list(MIDDLE), "bbox_mode": "xywh", "segmentation": MIDDLE_RUNS},
                        {"bbox": list(RIGHT), "bbox_mode": "xywh", "segmentation": box(*RIGHT)},
                    ],
                }
            )
        write_pickle(root / "Annotations" / f"{split}.pkl", entries)
    return root


@pytest.fixture
def sifr(tmp_path):
    root = tmp_path / "SIFR"
    for split, numbers in (("train", range(40, 50)), ("test", range(60, 62))):
        entries = []
        for number in numbers:
            name = f"{number:012d}.jpg"
            write_image(root / split / "rgb" / name)
            entries.append(
                {
                    "file_name": name,
                    "image_id": number,
                    "height": HEIGHT,
                    "width": WIDTH,
                    "annotations": [
                        {"bbox": list(LEFT), "segmentation": box(*LEFT), "gt_rank": 1},
                        {"bbox": list(RIGHT), "segmentation": box(*RIGHT), "gt_rank": 0},
                    ],
                }
            )
        write_json(root / split / f"{split}_annotations.json", entries)
    return root


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_pickle(path, change):
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))


# --- masks -------------------------------------------------------------------------------------


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


def even_looks(image):
    """Stands for a network: people look everywhere alike, so shares are visible areas."""
    return np.full((3, 4), 1 / 12, np.float32)


# --- ASSR --------------------------------------------------------------------------------------


def test_assr(assr):
    data = AssrReader(assr, "train")
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


def test_assr_splits_and_the_published_recipe(assr):
    assert [s.name for s in AssrReader(assr, "val")] == ["201"]
    assert [s.name for s in AssrReader(assr, "test")] == ["301"]
    joined = open_data(assr, "train+val")
    assert [joined[i].name for i in range(len(joined))] == ["101", "102", "201"]
    assert joined[-1].name == "201" and joined.palette == "assr"
    with pytest.raises(IndexError):
        joined[3]
    mixed = Joined([open_data("composite:2", "train", even_looks), AssrReader(assr, "val")])
    assert mixed[-1].name == "201" and mixed[-2].name == mixed[1].name
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'all'"):
        AssrReader(assr, "all")


def test_images_are_read_only_when_asked_for(assr):
    (assr / "images" / "train" / "101.jpg").unlink()
    data = AssrReader(assr, "train")
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
def test_assr_mistakes_are_named(assr, change, message):
    path = assr / "obj_seg_data_train.json"
    edit_json(path, change)
    with pytest.raises(DataError, match=message) as caught:
        AssrReader(assr, "train")[0]
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
def test_assr_rank_files(assr, content, message):
    (assr / "rank_order" / "train" / "101.json").write_text(content)
    with pytest.raises(DataError, match=message):
        AssrReader(assr, "train")[0]


def test_missing_and_broken_annotation_files(assr):
    path = assr / "obj_seg_data_val.json"
    path.write_text("[{")
    with pytest.raises(DataError, match="val.json: not JSON .* download it again"):
        AssrReader(assr, "val")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no .*val.json; is the folder complete"):
        AssrReader(assr, "val")


# --- IRSR --------------------------------------------------------------------------------------


def test_irsr(irsr):
    data = IrsrReader(irsr, "test")
    assert (len(data), data.palette) == (2, "irsr")
    sample = data[0]
    assert sample.name == "000000000060"
    np.testing.assert_array_equal(
        sample.masks, [box_mask(*LEFT), box_mask(*MIDDLE), box_mask(*RIGHT)]
    )
    assert sample.ranks.tolist() == [3, 1, 2]  # 0 = least salient in the file, 1 here


def test_held_out_images_are_fixed_by_their_names(irsr):
    assert [i for i in range(1, 80) if for_validation(f"{i:012d}.jpg")] == [43, 75]
    share = np.mean([for_validation(f"{i:012d}.jpg") for i in range(20000)])
    assert abs(share - 0.05) < 0.005
    train, val = IrsrReader(irsr, "train"), IrsrReader(irsr, "val")
    assert [s.name for s in val] == ["000000000043"]
    assert [int(s.name) for s in train] == [40, 41, 42, 44, 45, 46, 47, 48, 49]
    assert len(open_data(irsr, "train+val")) == 10


def test_irsr_copies_with_other_folders(irsr):
    (irsr / "Images" / "test" / "rgb").rename(irsr / "Images" / "test" / "image")
    edit_pickle(
        irsr / "Annotations" / "test.pkl",
        lambda e: e[0].update(file_name="D:\\IRSR\\Images\\test\\rgb\\000000000060.jpg"),
    )
    assert IrsrReader(irsr, "test")[0].name == "000000000060"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_pickles_load(tmp_path, protocol):
    path = tmp_path / "plain.pkl"
    content = {
        "rank": np.array([2, 0, 1]),
        "columns": np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(2, 3)),
        "text": np.array(["a", "bc"]),
        "scalar": np.float64(0.5),
        "small": np.int8(-3),
        "flag": np.bool_(True),
        "list": [1, 2.5, "é", b"\xff\x00", None, True, (1, 2), {3}],
        "ordered": OrderedDict(a=1),
    }
    write_pickle(path, content, protocol)
    loaded = load_plain_pickle(path)
    assert loaded.keys() == content.keys()
    for name, value in content.items():
        if isinstance(value, np.ndarray | np.generic):
            np.testing.assert_array_equal(loaded[name], value, strict=True)
        else:
            assert loaded[name] == value


def test_arrays_of_the_other_byte_order_load(tmp_path):
    path = tmp_path / "big.pkl"
    write_pickle(path, np.arange(6, dtype=">i4").reshape(2, 3))
    assert load_plain_pickle(path).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pickles_written_by_python_2_load(tmp_path):
    path = tmp_path / "python2.pkl"
    dtype = b"cnumpy\ndtype\n(S'i4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\nt" + dtype + b"I00\nS'\\x01\\x00\\x00\\x00\\xfe\\xff\\xff\\xff'\ntb"
    )
    scalar = b"cnumpy.core.multiarray\nscalar\n(" + dtype + b"S'\\x07\\x00\\x00\\x00'\ntR"
    path.write_bytes(b"(" + array + scalar + b"l.")
    numbers, one = load_plain_pickle(path)
    assert numbers.tolist() == [1, -2] and one == 7


def test_pickles_written_with_other_numpy_versions_load(tmp_path):
    path = tmp_path / "numpy.pkl"
    data = pickle.dumps(np.array([2, 0, 1]), 2)
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    assert (old in data) != (new in data)
    for one, other in ((old, new), (new, old)):
        path.write_bytes(data.replace(one, other))
        assert load_plain_pickle(path).tolist() == [2, 0, 1]


class Call:
    """Pickles as a call of any function: what a hostile file does."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def make_trace(path):
    """What a hostile pickle would do if it were run."""
    Path(path).write_text("executed")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (make_trace, None, "make_trace"),
        (exec, ("open({trace!r}, 'w').close()",), "exec"),
        (eval, ("open({trace!r}, 'w')",), "eval"),
        (open, ("{trace}", "w"), "open"),
        (getattr, ({}, "get"), "getattr"),
        (__import__, ("os",), "__import__"),
        (np.load, ("{trace}",), "load"),
        (bytearray, (10,), "bytearray"),
    ],
)
def test_a_malicious_pickle_does_not_execute(irsr, tmp_path, function, arguments, named, protocol):
    trace = tmp_path / "trace"
    arguments = tuple(
        a.format(trace=str(trace)) if isinstance(a, str) else a
        for a in (("{trace}",) if arguments is None else arguments)
    )
    path = irsr / "Annotations" / "test.pkl"
    write_pickle(path, [Call(function, *arguments)], protocol)
    if function is make_trace:
        pickle.loads(path.read_bytes())
        assert trace.exists()  # it would have
        trace.unlink()
    with pytest.raises(DataError, match=rf"test.pkl: not a pickle of plain values.*{named}"):
        IrsrReader(irsr, "test")
    assert not trace.exists()


def test_arrays_of_objects_are_not_admitted(tmp_path):
    path = tmp_path / "objects.pkl"
    for content in (np.array([{}, []], object), np.zeros(2, [("a", "O")]), np.zeros(2, "V8")):
        write_pickle(path, content)
        with pytest.raises(DataError, match="is not admitted"):
            load_plain_pickle(path)


def test_the_names_that_are_admitted_cannot_be_called_for_more(tmp_path):
    """np.ndarray can be made to read any memory; here it is only a name."""
    path = tmp_path / "ndarray.pkl"
    path.write_bytes(b"cnumpy\nndarray\n((I4\ntS'O'\ntR.")
    with pytest.raises(DataError, match="not a pickle of plain values"):
        load_plain_pickle(path)
    path.write_bytes(b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.")
    with pytest.raises(DataError, match="encoding 'zip' is not admitted"):
        load_plain_pickle(path)


def test_damaged_pickles(tmp_path):
    path = tmp_path / "cut.pkl"
    for data in (b"", b"\x80\x04]", pickle.dumps([{"rank": np.arange(3)}])[:-20], b"<html>"):
        path.write_bytes(data)
        with pytest.raises(DataError, match="cut.pkl: not a pickle of plain values"):
            load_plain_pickle(path)
    with pytest.raises(FileNotFoundError, match=r"no .*none.pkl; is the folder complete"):
        load_plain_pickle(tmp_path / "none.pkl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[0].pop("file_name"), r"\[0\] has no 'file_name'"),
        (lambda e: e[0].update(rank=[0, 1]), r"\[0\]: rank has 2 numbers, annotations 3 objects"),
        (lambda e: e[0].update(rank=[0, 1, "2"]), r"\[0\].rank\[2\] must be a finite number"),
        (
            lambda e: e[0]["annotations"][1].update(segmentation=None),
            r"\[0\].annotations\[1\].segmentation must be a list or a tuple or a dict",
        ),
        (
            lambda e: e[0].update(height=9, width=9),
            r"height and width are 9 and 9, but .* 12 and 16",
        ),
    ],
)
def test_irsr_mistakes_are_named(irsr, change, message):
    path = irsr / "Annotations" / "test.pkl"
    edit_pickle(path, change)
    with pytest.raises(DataError, match=message) as caught:
        IrsrReader(irsr, "test")[0]
    assert str(path) in str(caught.value)


def test_irsr_must_be_a_list(irsr):
    write_pickle(irsr / "Annotations" / "test.pkl", {"a": 1})
    with pytest.raises(DataError, match=r"test.pkl must hold a list, got a dict"):
        IrsrReader(irsr, "test")


# --- SIFR --------------------------------------------------------------------------------------


def test_sifr(sifr):
    data = SifrReader(sifr, "test")
    assert (len(data), data.palette) == (2, "irsr")
    sample = data[1]
    assert sample.name == "000000000061"
    np.testing.assert_array_equal(sample.masks, [box_mask(*LEFT), box_mask(*RIGHT)])
    assert sample.ranks.tolist() == [2, 1]
    assert [s.name for s in SifrReader(sifr, "val")] == ["000000000043"]
    assert len(SifrReader(sifr, "train")) == 9


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
def test_sifr_mistakes_are_named(sifr, change, message):
    path = sifr / "test" / "test_annotations.json"
    edit_json(path, change)
    with pytest.raises(DataError, match=message) as caught:
        SifrReader(sifr, "test")[0]
    assert f"{path}: [0]" in str(caught.value)


def test_an_image_without_salient_objects(sifr):
    edit_json(sifr / "test" / "test_annotations.json", lambda e: e[0].update(annotations=[]))
    sample = SifrReader(sifr, "test")[0]
    assert sample.masks.shape == (0, HEIGHT, WIDTH) and sample.ranks.shape == (0,)


# --- opening -----------------------------------------------------------------------------------


def coco_json(numbers):
    return {
        "images": [
            {"id": n, "file_name": f"{n:012d}.jpg", "height": HEIGHT, "width": WIDTH}
            for n in numbers
        ],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {
                "id": n,
                "image_id": n,
                "category_id": 1,
                "segmentation": box(*LEFT),
                "visiting_order": 1,
            }
            for n in numbers
        ],
    }


def test_folders_are_recognised(assr, irsr, sifr):
    assert type(open_data(assr, "test")) is AssrReader
    assert type(open_data(str(irsr), "test")) is IrsrReader
    assert type(open_data(sifr, "test")) is SifrReader


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


# --- checking ----------------------------------------------------------------------------------


def problems(data):
    return check_data(data).problems


def test_nothing_wrong(assr, irsr, sifr):
    for root in (assr, irsr, sifr):
        for split in ("train", "val", "test"):
            assert problems(open_data(root, split)) == []


def test_a_number_of_images_other_than_the_published_one_is_a_remark(assr, irsr, sifr):
    """A folder of one's own in a published form is as good as any."""
    counts = {"train": (2, 7646), "val": (1, 1436), "test": (1, 2418)}
    for split, (images, published) in counts.items():
        report = check_data(open_data(assr, split))
        assert report.problems == [] and report.images == images
        text = f"ASSR: {images} images in the split {split}, {published} were published"
        assert report.remarks[0].startswith(text)
    remarks = check_data(open_data(assr, "train+val")).remarks
    assert ["train" in remarks[0], "val" in remarks[1]] == [True, True]
    remarks = check_data(open_data(irsr, "test")).remarks
    assert remarks[0].startswith("IRSR: 2 images in the split test, 2929")
    for root, split in ((irsr, "train"), (sifr, "test")):
        assert check_data(open_data(root, split)).remarks == ["ranks come from annotations"]


def test_the_command_lists_problems_and_says_what_a_trainer_needs(assr, sifr):
    done = CliRunner().invoke(check, [str(assr), "--split", "train"])
    assert done.exit_code == 0 and done.stdout == ""
    assert "2 images in the split train, 7646 were published" in done.stderr
    assert "objects per image: 2.00 on average (objects: images) 2: 2" in done.stderr
    assert "width×height in pixels: 16×12: 2" in done.stderr
    assert "images of each split: train 2, val 1, test 1" in done.stderr
    assert "2 images, 0 problems" in done.stderr
    (sifr / "test" / "rgb" / "000000000060.jpg").unlink()
    done = CliRunner().invoke(check, [str(sifr), "--split", "test"])
    assert done.exit_code == 1 and "no image" in done.stdout
    done = CliRunner().invoke(check, [str(assr / "nowhere")])
    assert done.exit_code == 2 and "no data at" in done.output


def test_all_problems_are_listed(assr):
    path = assr / "obj_seg_data_train.json"

    def spoil(entries):
        objects = entries[0]["object_data"]
        objects[0]["segmentation"] = [[1, 2]]
        objects[2]["segmentation"] = box(100, 100, 5, 5)
        entries.append({"img": "103", "object_data": three_objects()})
        entries.append({"img": "104"})
        entries.append(entries[1])

    edit_json(path, spoil)
    (assr / "images" / "train" / "102.jpg").unlink()
    write_json(assr / "rank_order" / "train" / "102.json", {"rank_order": [0.8, 0.8, 1.0]})
    write_json(assr / "rank_order" / "train" / "103.json", {"rank_order": [0.7, 0.8, 1.0]})
    (assr / "images" / "train" / "103.jpg").write_bytes(b"not an image")
    found = problems(open_data(assr, "train"))
    expected = [
        "[0].object_data[0].segmentation: polygon 0: expected x and y",
        "[0].object_data[2].segmentation: covers no pixel of the 16x12 image",
        "[1]: tied ranks [0.8, 0.8, 1.0]",
        f"[1]: no image {assr / 'images' / 'train' / '102.jpg'}",
        "[2]: gaps in the ranks [0.7, 0.8, 1.0], expected steps of 0.1",
        f"[2]: cannot read {assr / 'images' / 'train' / '103.jpg'}",
        "[3] has no 'object_data'",
        f"[4]: the image 102 occurs twice, first at {path}: [1]",
    ]
    for problem, text in zip(found, expected, strict=False):
        assert problem.startswith(f"{path}: {text}")
    assert len(found) == len(expected) + 2  # and entry 4 has the mistakes of entry 1


def test_resized_images_and_masks_of_another_size(sifr):
    write_image(sifr / "test" / "rgb" / "000000000060.jpg", size=(24, 32))
    edit_json(
        sifr / "test" / "test_annotations.json",
        lambda e: e[1]["annotations"][0].update(
            segmentation={"size": [24, 32], "counts": [768]}, gt_rank=5
        ),
    )
    found = problems(open_data(sifr, "test"))
    assert "[0]: height and width are 12 and 16, but" in found[0]
    assert "[1]: gaps in the ranks [0.0, 5.0]" in found[1]
    assert "[1].annotations[0].segmentation: run-length mask of size [24, 32]" in found[2]
    assert len(found) == 3


def test_ties_and_gaps_are_closed_up(sifr):
    def spoil(entries):
        objects = entries[0]["annotations"]
        objects.append({"bbox": [0] * 4, "segmentation": box(*MIDDLE), "gt_rank": 7})
        objects[0]["gt_rank"] = objects[1]["gt_rank"] = 2

    edit_json(sifr / "test" / "test_annotations.json", spoil)
    assert SifrReader(sifr, "test")[0].ranks.tolist() == [1, 2, 3]


def test_coco_and_composite_sets_are_checked_too(tmp_path):
    write_image(tmp_path / "images" / f"{40:012d}.jpg")
    write_json(tmp_path / "instances.json", coco_json([40, 41]))
    found = problems(open_data(tmp_path, "all"))
    assert len(found) == 1 and "000000000041.jpg" in found[0]
    report = check_data(open_data("composite:3", "train", even_looks))
    assert report.problems == [] and sum(report.objects.values()) == 3


def test_what_has_no_ranks_is_checked_without_them(tmp_path):
    """All but the ranks; with a teacher these too."""
    write_image(tmp_path / "images" / f"{40:012d}.jpg")
    content = coco_json([40, 41])
    for annotation in content["annotations"]:
        del annotation["visiting_order"]
    write_json(tmp_path / "instances.json", content)
    done = CliRunner().invoke(check, [str(tmp_path), "--split", "all"])
    assert done.exit_code == 1 and len(done.stdout.splitlines()) == 1
    assert "there are no ranks: " in done.stderr and "objects per image" not in done.stderr
    assert "width×height in pixels: 16×12: 1" in done.stderr
    assert "--teacher nano predicts them" in done.stderr
    done = CliRunner().invoke(check, [str(tmp_path), "--split", "all", "--teacher", "nano"])
    assert done.exit_code == 1 and "ranks come from predicted looks" in done.stderr
    assert "--teacher nano" not in done.stderr
    assert "objects per image: " in done.stderr


def test_coco_images_of_one_name_and_empty_splits_are_told(tmp_path):
    """Predictions are matched by the name, which has its folder where several have it."""
    content = coco_json([40, 41])
    for photo, folder in zip(content["images"], "ab", strict=True):
        photo["file_name"] = f"{folder}/1.jpg"
        (tmp_path / "images" / folder).mkdir(parents=True)
        write_image(tmp_path / "images" / folder / "1.jpg")
    write_json(tmp_path / "instances.json", content)
    assert problems(open_data(tmp_path, "all")) == []
    content["images"][1]["file_name"] = "a/1.jpg"
    write_json(tmp_path / "instances.json", content)
    (found,) = problems(open_data(tmp_path, "all"))
    assert "occurs twice, first at image 0" in found
    write_json(tmp_path / "instances.json", {**content, "images": [], "annotations": []})
    assert problems(open_data(tmp_path, "all")) == ["COCO: there are no images in this split"]


def test_progress_sees_every_image(assr):
    seen = []

    def progress(numbers):
        for number in numbers:
            seen.append(number)
            yield number

    check_data(open_data(assr, "train+val"), progress)
    assert seen == [0, 1, 2]
