"""Files that are made to do harm: pickles are refused by what they would build, before anything is
built, and photos of a data set are decoded apart, as those of a run are.

The bytes are made here. Peaks of memory are measured in a process of its own.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import dsgnn.runtime.photo.decoder as decoder_module
from dsgnn.cli import check
from dsgnn.data.coco import read_photos
from dsgnn.data.irsr import load_plain_pickle
from dsgnn.data.records import _decoders, number
from dsgnn.data.sample import Sample
from dsgnn.evaluation.rankers import predictions_ranker
from dsgnn.export.parity.comparison import folder_photos
from dsgnn.pickled import DEPTH, check_pickle
from dsgnn.runtime.disk.outputs import RESULTS_SCHEMA
from dsgnn.runtime.errors import CheckpointError, DataError
from dsgnn.weights.checkpoint import convert
from dsgnn.weights.pickles import read_tensors

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
PUT_FAR = b"\x80\x02K\x00r" + struct.pack("<I", 0x1FFFFFFF) + b"."  # a memo of 4 GB
DEEP_KEY = b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s."
DOUBLING = b"\x80\x02}K\x00" + b"".join(b"2\x86" for _ in range(60)) + b"K\x01s."
HOSTILE = {
    "memo": (PUT_FAR, "a memo of 536,870,911 places"),
    "text memo": (b"I0\np99999999\n.", "a memo of 99,999,999 places"),
    "deep key": (DEEP_KEY, f"more than {DEPTH} deep"),
    "deep list": (b"]" * 5000 + b"a" * 4999 + b".", f"more than {DEPTH} deep"),
    "doubling": (DOUBLING, "again and again"),
    "cut": (b"\x80\x02}X\xff\xff\xff\x7fabc", "no whole pickle"),
    "no end": (b"\x80\x02}", "no whole pickle"),
    "unknown": (b"\x80\x02\xff.", "unknown instruction 0xff"),
}


def archive(pickled: bytes) -> bytes:
    """A checkpoint with this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    return out.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused(name: str, tmp_path: Path) -> None:
    pickled, message = HOSTILE[name]
    with pytest.raises(pickle.UnpicklingError, match=message):
        check_pickle(pickled)
    path = tmp_path / "test.pkl"
    path.write_bytes(pickled)
    with pytest.raises(DataError, match=message):
        load_plain_pickle(path)
    path = tmp_path / "weights.pth"
    path.write_bytes(archive(pickled))
    with pytest.raises(CheckpointError, match=message):
        read_tensors(path)


def test_every_pickle_of_the_stream_is_checked(tmp_path: Path) -> None:
    """The old form of checkpoints is five pickles after one another."""
    whole = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(3)}}, whole, _use_new_zipfile_serialization=False)
    data, ends, at = whole.getvalue(), [], 0
    for _ in range(5):
        at = check_pickle(data, at)
        ends.append(at)
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    assert read_tensors(path)["a"].tolist() == [1, 1, 1]
    for start in (0, *ends[:4]):
        path.write_bytes(data[:start] + PUT_FAR + data[start:])
        with pytest.raises(CheckpointError, match="a memo of 536,870,911 places"):
            read_tensors(path)


@LINUX
@pytest.mark.parametrize("name", ["memo", "deep key", "doubling"])
def test_it_costs_little(name: str, tmp_path: Path) -> None:
    """Neither a crash of the interpreter nor gigabytes nor minutes."""
    (tmp_path / "test.pkl").write_bytes(HOSTILE[name][0])
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from dsgnn.data.irsr import load_plain_pickle\n"
        "def peak():\n"
        "    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "try: load_plain_pickle(Path(sys.argv[1]))\n"
        "except ValueError: print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "test.pkl"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 10  # kilobytes


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_honest_pickles_pass(protocol: int) -> None:
    """What checkpoints and annotations hold, in every form that Python has written it."""
    shared = (1, 2.5, "text", b"bytes")
    value = {
        "list": [{"bbox": [1.0, 2.0], "n": n, "shared": shared} for n in range(2500)],
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "set": {1, 2, 3},
        "frozen": frozenset({4}),
        "large": 10**30,
        "none": [None, True, False, bytearray(b"x"), ()],
    }
    data = pickle.dumps(value, protocol)
    assert check_pickle(b"before" + data + b"after", 6) == 6 + len(data)


@LINUX
def test_one_number_for_many(tmp_path: Path) -> None:
    """A tensor of which every number is the same one of the file is not copied out."""
    name = "panoptic_head.rank_head.hf_rank_gnn_enc.global_layer.gfe1.weight"
    tensors = {
        "panoptic_head.structure_query_feat.weight": torch.ones(5, 256),
        "backbone.conv1.weight": torch.ones(64, 3, 7, 7),
        name: torch.ones(20_000, 1).expand(45_000, 20_000, 2),  # 7.2 GB
    }
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": tensors}, path)
    assert path.stat().st_size < 200_000
    with pytest.raises(CheckpointError, match="mis-shaped"):
        convert(path, tmp_path / "out.safetensors", "r50-assr")
    peak = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    assert peak < 4_000_000  # kilobytes, with everything that this process has loaded


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "."])
def test_a_photo_of_an_impossible_name(tmp_path: Path, name: str) -> None:
    """Such a name of a COCO-format file crashed OpenCV."""
    data = {
        "images": [{"id": 7, "file_name": name, "width": 8, "height": 6}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [],
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    with pytest.raises(DataError):
        read_photos(tmp_path / "instances.json", tmp_path)[0].read()


def test_numbers_beyond_all_floats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="x must be a finite number, got 1000"):
        number(10**400, "x")
    item = {"saliency": 10**400, "segmentation": {"size": [6, 8], "counts": [0, 48]}}
    image = {"file": "a.jpg", "width": 8, "height": 6, "objects": [item]}
    results = {"schema": RESULTS_SCHEMA, "images": [image]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    rank, _ = predictions_ranker(path)
    sample = Sample(
        np.zeros((6, 8, 3), np.uint8), np.zeros((0, 6, 8), bool), np.zeros(0, np.int64), "a"
    )
    with pytest.raises(DataError, match="too large to convert"):
        rank(sample)
    path.write_text(json.dumps({**results, "images": [{**image, "file": "."}]}))
    with pytest.raises(DataError, match="is not a results.json of dsgnn"):
        predictions_ranker(path)


def test_predictions_of_many_levels(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        predictions_ranker(path)
    os.remove(path)
    os.mkfifo(path)
    with pytest.raises(DataError, match="it is no file"):
        predictions_ranker(path)


def test_a_crash_fails_one_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In dsgnn-check, and where the exporter reads a folder: a decoder that b.bmp crashes."""
    crashing = """
import ctypes
import dsgnn.runtime.photo.decoder as decoder
read = decoder.read_image
decoder.read_image = lambda data, *more: (
    ctypes.string_at(0) if b"CRASH" in data else read(data, *more)
)
decoder.main()
"""
    monkeypatch.setattr(decoder_module, "CHILD", crashing)
    photo = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for folder, suffix in (("images", ".bmp"), ("masks", ".png")):
        (tmp_path / folder).mkdir()
        for name in "abc":
            tail = b"CRASH" if name + suffix == "b.bmp" else b""
            data = cv2.imencode(suffix, photo)[1].tobytes()
            (tmp_path / folder / f"{name}{suffix}").write_bytes(data + tail)
    _decoders.cache_clear()
    result = CliRunner().invoke(check, [str(tmp_path), "--split", "all"])
    _decoders.cache_clear()
    assert result.exit_code == 1, result.output
    assert result.output.count("its decoder crashed on it") == 1, result.output
    assert len(folder_photos(tmp_path / "images")) == 2
