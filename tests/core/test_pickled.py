"""Published files give their tensors, run no code, and are named for what they are."""

import functools
import io
import os
import pickle
import re
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dsgnn import cli
from dsgnn.model import build_model
from dsgnn.runtime.errors import CheckpointError
from dsgnn.weights.checkpoint import save_checkpoint
from dsgnn.weights.pickles import read_tensors

ZIP, STREAM = True, False


def saved(content, archive: bool, path: Path, **options) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=archive, **options)
    return path


@pytest.fixture
def tensors() -> "OrderedDict[str, torch.Tensor]":
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    state = OrderedDict(
        float=base,
        view=base[1:3, ::2],  # shares a storage, with strides and an offset
        transposed=base.T,
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 4),
        half=torch.randn(3).half(),
        bfloat=torch.randn(3).bfloat16(),
        double=torch.randn(2, 2, dtype=torch.float64),
        long=torch.arange(5),
        byte=torch.arange(3, dtype=torch.uint8),
        bool=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.randn(2)),
    )
    state._metadata = {"": {"version": 1}}  # as Module.state_dict leaves it
    return state


@pytest.mark.parametrize("archive", [ZIP, STREAM], ids=["zip", "stream"])
@pytest.mark.parametrize("form", ["with meta", "bare", "plain dict"])
def test_tensors_come_back_equal(tensors, archive, form, tmp_path):
    optimiser = {"state": {0: {"step": 3, "m": torch.randn(7)}}}  # passed over
    content = {
        "with meta": {"meta": {"epoch": 3}, "optimizer": optimiser, "state_dict": tensors},
        "bare": tensors,
        "plain dict": dict(tensors),
    }[form]
    found = read_tensors(saved(content, archive, tmp_path / "upstream.pth"))
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and not found[name].requires_grad
        assert torch.equal(found[name], value), name


@pytest.fixture
def foreign(monkeypatch):
    """Classes of a training framework that is installed where the file is written, not here."""
    module = types.ModuleType("framework")
    monkeypatch.setitem(sys.modules, "framework", module)

    def add(cls):
        cls.__module__, cls.__qualname__ = "framework", cls.__name__
        setattr(module, cls.__name__, cls)
        return cls

    @add
    class ConfigDict(dict):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.hidden = 1

    @add
    class History(list):
        pass

    @add
    class Buffer:
        def __init__(self):
            self.values = np.arange(3)

    @add
    class Slots:
        __slots__ = ("a",)

    @add
    class Reduced:
        def __reduce__(self):
            return Reduced, (), {"x": 1}, iter([1, 2]), iter([("k", "v")])

        def append(self, item): ...

        def __setitem__(self, key, value): ...

    slots = Slots()
    slots.a = 1
    return {
        "config": ConfigDict(model=ConfigDict(type="DSGNN")), "history": History([1, 2]),
        "buffer": Buffer(), "slots": slots, "reduced": Reduced(), "number": np.float64(3),
        "array": np.arange(4), "dtype": torch.float16, "device": torch.device("cpu"),
        "set": {1, 2}, "frozen": frozenset({3}), "bytes": b"ab", "path": Path("x"), "big": 1 << 80,
        "classes": (ConfigDict, int), "function": os.path.join, Slots: "a class as key",
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("archive", [ZIP, STREAM], ids=["zip", "stream"])
def test_metadata_of_unknown_classes_is_passed_over(
    tensors, foreign, archive, protocol, tmp_path, monkeypatch
):
    content = {"meta": foreign, "state_dict": tensors, "hooks": [foreign]}
    path = saved(content, archive, tmp_path / "upstream.pth", pickle_protocol=protocol)
    monkeypatch.delitem(sys.modules, "framework")
    found = read_tensors(path)
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert "framework" not in sys.modules


# --- hostile files ------------------------------------------------------------------------------


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def text(string: str) -> bytes:
    """Pickle opcode that pushes a string."""
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def raw(name: str, *args: str) -> bytes:
    """Opcodes that call module.attribute (a dotted path is allowed) with strings."""
    module, _, attribute = name.partition(":")
    parts = b"".join(text(a) for a in args)
    return text(module) + text(attribute) + b"\x93(" + parts + b"tR"


def hostile(marker: Path) -> dict[str, object]:
    """Objects (or opcodes) that make the file `marker` when they are unpickled trustingly."""
    touch = f"open({str(marker)!r}, 'w').close()"
    shell = f"touch '{marker}'"
    return {
        "os.system": Call(os.system, shell),
        "eval": Call(eval, touch),
        "exec": Call(exec, touch),
        "partial": Call(functools.partial(os.system, shell)),
        "open": Call(open, str(marker), "w"),
        "runpy": raw("runpy:_run_code", touch),
        "dotted torch": raw("torch:serialization.os.system", shell),
        "dotted storage": raw("torch:storage.os.system", shell),
        "getattr chain": b"cbuiltins\ngetattr\n(cos\n__dict__\n" + text("system") + b"tR"
        + b"(" + text(shell) + b"tR",
        "old instance": b"(" + text(shell) + b"ios\nsystem\n",
        "old object": b"(cos\nsystem\n" + text(shell) + b"o",
        "newobj": b"cos\nsystem\n(" + text(shell) + b"t\x81",
        "load_from_bytes": Call(torch.storage._load_from_bytes, pickle.dumps(Call(exec, touch))),
        "numpy": Call(np.load, str(marker)),
        "build on a class": b"ccollections\nOrderedDict\n(N}" + text("__init__")
        + b"cos\nsystem\nstb",
        "build on a known function": b"ctorch._utils\n_rebuild_tensor_v2\n(N}" + text("__code__")
        + b"cos\nsystem\nstb",
    }  # fmt: skip


def as_opcodes(item: object) -> bytes:
    """An object as opcodes that leave it on the stack."""
    return item if isinstance(item, bytes) else pickle.dumps(item, 3)[2:-1]


def system() -> dict:
    return {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}


def stream(content: bytes, keys: bytes = b"\x80\x02].") -> bytes:
    """The old format around the opcodes of its content."""
    head = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, system())]
    content = content.replace(b"K\x02tQ", b"K\x02NtQ")  # no view of a storage
    return b"".join(head) + b"\x80\x04" + content + b"." + keys


def archive(content: bytes, packing: int = zipfile.ZIP_STORED, **others: bytes) -> bytes:
    """The zip format around the opcodes of its content."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as target:
        target.writestr("archive/data.pkl", b"\x80\x04" + content + b".")
        for name, data in others.items():
            target.writestr(f"archive/{name.replace('__', '/')}", data)
    return file.getvalue()


TENSOR = (  # two floats in storage "0": the opcodes of torch.tensor([1.0, 2.0])
    b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n"
    + text("0") + text("cpu") + b"K\x02tQK\x00K\x02\x85K\x01\x85\x89Nt" + b"R"
)  # fmt: skip
NUMBERS = struct.pack("<2f", 1.0, 2.0)


def test_hand_made_files_are_as_torch_writes_them(tmp_path):
    """Or else the hostile ones below would prove nothing."""
    state = b"}" + text("w") + TENSOR + b"s"
    keys = b"\x80\x02]" + text("0") + b"a." + struct.pack("<q", 2) + NUMBERS
    for content in (archive(state, data__0=NUMBERS), stream(state, keys)):
        path = tmp_path / "x.pth"
        path.write_bytes(content)
        assert read_tensors(path)["w"].tolist() == [1.0, 2.0]
    assert torch.load(io.BytesIO(content), weights_only=False)["w"].tolist() == [1.0, 2.0]


def test_a_small_file_cannot_claim_all_memory(tmp_path):
    """Compressed, a thousand times its size may lie in an archive."""
    path = tmp_path / "x.pth"
    state = b"}" + text("w") + TENSOR + b"s"
    path.write_bytes(archive(state, zipfile.ZIP_DEFLATED, data__0=NUMBERS))
    with pytest.raises(CheckpointError, match="data.pkl is compressed, which torch.save never"):
        read_tensors(path)


@pytest.mark.parametrize("kind", hostile(Path()))
@pytest.mark.parametrize("wrap", [archive, stream])
@pytest.mark.parametrize("place", ["metadata", "state", "file"])
def test_no_code_is_run(kind, wrap, place, tmp_path):
    marker = tmp_path / "executed"
    bad = as_opcodes(hostile(marker)[kind])
    state = b"}" + text("w") + TENSOR + b"s"
    content = {
        "metadata": b"}(" + text("meta") + bad + text("state_dict") + state + b"u",
        "state": b"}" + text("state_dict") + bad + b"s",
        "file": bad,
    }[place]
    keys = b"\x80\x02]" + text("0") + b"a." + struct.pack("<q", 2) + NUMBERS
    path = tmp_path / "hostile.pth"
    path.write_bytes(
        archive(content, data__0=NUMBERS) if wrap is archive else stream(content, keys)
    )
    try:
        found = read_tensors(path)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ")
        assert re.search("not a PyTorch checkpoint|holds no tensors", str(error))
    else:
        assert place == "metadata" and found["w"].tolist() == [1.0, 2.0]
    assert not marker.exists()


def test_the_hostile_files_are_hostile(tmp_path):
    """Unpickled trustingly, they do what they are meant to: the test above can fail."""
    for kind in (
        "os.system",
        "partial",
        "eval",
        "open",
        "dotted torch",
        "old instance",
        "old object",
    ):
        marker = tmp_path / kind
        pickle.loads(b"\x80\x04" + as_opcodes(hostile(marker)[kind]) + b".")
        assert marker.exists(), kind


def test_the_old_format_cannot_be_made_to_write_patches(tmp_path, monkeypatch):
    """torch.load compares a container's source with the file's and writes NAME.patch."""
    monkeypatch.chdir(tmp_path)
    function = b"ctorch._utils\n_rebuild_parameter\n"
    attributes = text("__name__") + text("written") + text("dump_patches") + b"\x88"
    renamed = function + b"(N}(" + attributes + b"utb0"
    container = b"(" + text("module") + function + text("a.py") + text("PAYLOAD") + b"tQ"
    Path("hostile.pth").write_bytes(stream(renamed + container))
    with pytest.raises(CheckpointError):
        read_tensors("hostile.pth")
    assert os.listdir() == ["hostile.pth"]


def test_torchscript_is_not_started(tmp_path):
    path = tmp_path / "program.pth"
    path.write_bytes(archive(b"N", **{"constants.pkl": b"N."}))
    with pytest.raises(CheckpointError, match="TorchScript archive, which is a program"):
        read_tensors(path)


@pytest.mark.parametrize(
    "tensor, why",
    [
        (TENSOR.replace(b"K\x00K\x02\x85", b"K\x01K\x02\x85"), "beyond its storage"),
        (
            TENSOR.replace(b"K\x00K\x02\x85", b"K\x00J\x00\x00\x00\x7f\x85"),
            "far beyond its storage",
        ),
        (TENSOR.replace(b"K\x02tQ", b"J\x00\x00\x00\x7fNtQ"), "a storage larger than the file"),
        (TENSOR.replace(b"FloatStorage", b"UntypedStorage"), "a storage without a type"),
        (TENSOR.replace(b"FloatStorage", b"QInt8Storage"), "quantised"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("wrap", [archive, stream])
def test_tensors_that_lie_about_themselves(tensor, why, wrap, tmp_path):
    assert tensor != TENSOR
    keys = b"\x80\x02]" + text("0") + b"a." + struct.pack("<q", 2) + NUMBERS
    state = b"}" + text("w") + tensor + b"s"
    path = tmp_path / "x.pth"
    path.write_bytes(archive(state, data__0=NUMBERS) if wrap is archive else stream(state, keys))
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint, or damaged or cut short"):
        read_tensors(path)


# --- files that are something else --------------------------------------------------------------


@pytest.mark.parametrize("archive", [ZIP, STREAM], ids=["zip", "stream"])
def test_a_truncated_file_says_so(tensors, archive, tmp_path):
    path = saved({"state_dict": tensors}, archive, tmp_path / "upstream.pth")
    whole = path.read_bytes()
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match="damaged or cut short; download it again"):
            read_tensors(path)


OTHERS = {
    "empty": (b"", "is empty; download it again"),
    "html": (b"\n<!DOCTYPE html><html>Sign in", "is a web page saved under this name"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    "text": (b"not found", r"is not a PyTorch checkpoint \(it starts with b'not foun'\)"),
    "pickle": (
        pickle.dumps({"state_dict": {}}, 2),
        "is a pickle, but was not written by torch.sav",
    ),
    "zip": (archive(b"N").replace(b"data.pkl", b"data.txt"), "is a zip archive but no PyTorch"),
    "big endian": (
        archive(b"}" + text("w") + TENSOR + b"s", data__0=NUMBERS, byteorder=b"big"),
        "was saved on a big-endian machine",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named_for_what_they_are(kind, tmp_path):
    content, message = OTHERS[kind]
    path = tmp_path / "upstream.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    target = tmp_path / "model.safetensors"
    done = CliRunner().invoke(cli.convert, [str(path), "-o", str(target)])
    assert done.exit_code == 1 and re.search(message, done.output) and not target.exists()
    assert sorted(os.listdir(tmp_path)) == ["upstream.pth"]


def test_a_file_of_ours_is_not_published(tmp_path):
    path = tmp_path / "model.pth"
    save_checkpoint(path, build_model("nano"))
    with pytest.raises(CheckpointError, match="is a safetensors file.*already: use it as it is"):
        read_tensors(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensors(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_tensors(tmp_path)


def test_contents_without_tensors(tensors, tmp_path):
    path = tmp_path / "upstream.pth"
    saved({"model": {"a": torch.ones(1)}, "epoch": 3}, ZIP, path)
    with pytest.raises(
        CheckpointError, match=r'no tensors under "state_dict" \(.*: model, epoch\)'
    ):
        read_tensors(path)
    saved([torch.ones(1)], ZIP, path)
    with pytest.raises(CheckpointError, match=r"names found: none"):
        read_tensors(path)
    saved({"state_dict": {**tensors, "extra": None, "more": [1]}}, ZIP, path)
    with pytest.raises(CheckpointError, match=r"2 of 14 entries are no plain tensors: extra, more"):
        read_tensors(path)
