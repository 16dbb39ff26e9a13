"""The reader of IRSR on a small folder of the exact published form, and its pickles."""

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from data_folders import LEFT, MIDDLE, RIGHT, box_mask, edit_pickle, write_pickle

from dsgnn.data import open_data
from dsgnn.data.irsr import IrsrReader, load_plain_pickle
from dsgnn.data.records import for_validation
from dsgnn.runtime.errors import DataError


def test_irsr(published_irsr):
    data = IrsrReader(published_irsr, "test")
    assert (len(data), data.palette) == (2, "irsr")
    sample = data[0]
    assert sample.name == "000000000060"
    np.testing.assert_array_equal(
        sample.masks, [box_mask(*LEFT), box_mask(*MIDDLE), box_mask(*RIGHT)]
    )
    assert sample.ranks.tolist() == [3, 1, 2]  # 0 = least salient in the file, 1 here


def test_held_out_images_are_fixed_by_their_names(published_irsr):
    assert [i for i in range(1, 80) if for_validation(f"{i:012d}.jpg")] == [43, 75]
    share = np.mean([for_validation(f"{i:012d}.jpg") for i in range(20000)])
    assert abs(share - 0.05) < 0.005
    train, val = IrsrReader(published_irsr, "train"), IrsrReader(published_irsr, "val")
    assert [s.name for s in val] == ["000000000043"]
    assert [int(s.name) for s in train] == [40, 41, 42, 44, 45, 46, 47, 48, 49]
    assert len(open_data(published_irsr, "train+val")) == 10


def test_irsr_copies_with_other_folders(published_irsr):
    (published_irsr / "Images" / "test" / "rgb").rename(
        published_irsr / "Images" / "test" / "image"
    )
    edit_pickle(
        published_irsr / "Annotations" / "test.pkl",
        lambda e: e[0].update(file_name="D:\\IRSR\\Images\\test\\rgb\\000000000060.jpg"),
    )
    assert IrsrReader(published_irsr, "test")[0].name == "000000000060"


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
def test_a_malicious_pickle_does_not_execute(
    published_irsr, tmp_path, function, arguments, named, protocol
):
    trace = tmp_path / "trace"
    arguments = tuple(
        a.format(trace=str(trace)) if isinstance(a, str) else a
        for a in (("{trace}",) if arguments is None else arguments)
    )
    path = published_irsr / "Annotations" / "test.pkl"
    write_pickle(path, [Call(function, *arguments)], protocol)
    if function is make_trace:
        pickle.loads(path.read_bytes())
        assert trace.exists()  # it would have
        trace.unlink()
    with pytest.raises(DataError, match=rf"test.pkl: not a pickle of plain values.*{named}"):
        IrsrReader(published_irsr, "test")
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
def test_irsr_mistakes_are_named(published_irsr, change, message):
    path = published_irsr / "Annotations" / "test.pkl"
    edit_pickle(path, change)
    with pytest.raises(DataError, match=message) as caught:
        IrsrReader(published_irsr, "test")[0]
    assert str(path) in str(caught.value)


def test_irsr_must_be_a_list(published_irsr):
    write_pickle(published_irsr / "Annotations" / "test.pkl", {"a": 1})
    with pytest.raises(DataError, match=r"test.pkl must hold a list, got a dict"):
        IrsrReader(published_irsr, "test")
