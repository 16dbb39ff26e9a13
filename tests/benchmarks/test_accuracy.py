"""Accuracy and parity of real small files: hashes, differences to PyTorch, refusals, resuming."""

from pathlib import Path

import pytest

from dsgnn.benchmarks import accuracy as module
from dsgnn.benchmarks.accuracy import accuracy
from dsgnn.benchmarks.forms import Spec
from dsgnn.benchmarks.results import load
from dsgnn.runtime.artifact import sha256_of
from dsgnn.runtime.errors import DsgnnError, OptionError
from dsgnn.runtime.ranker import BUNDLED

BUNDLE = Spec("artifact", str(BUNDLED), backend="onnxruntime", threads=1)
DATA = "composite:2"


def test_scenes_without_a_teacher_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing in it says what people look at first"):
        accuracy([BUNDLE], DATA, "test", tmp_path)


def test_the_bundled_model_with_the_parity_of_its_sidecar(tmp_path: Path) -> None:
    found = accuracy([BUNDLE], DATA, "test", tmp_path, teacher=BUNDLED)
    (row,) = found["rows"]
    assert load(tmp_path / "accuracy.json") == found
    assert row["subject"]["sha256"] == sha256_of(BUNDLED)
    assert row["data"] == {"spec": DATA, "split": "test", "images": 2, "protocol": "dsgnn"}
    assert 0 <= row["figures"]["mae"] <= 1 and row["used"]["mae"] == 2
    assert row["parity_from"] == "sidecar" and all(check["passed"] for check in row["parity"])
    assert row["reference"] is None


def test_only_what_is_missing_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = accuracy([BUNDLE], DATA, "test", tmp_path, teacher=BUNDLED)
    with pytest.raises(DsgnnError, match="exists: resume it, or give another folder"):
        accuracy([BUNDLE], DATA, "test", tmp_path, teacher=BUNDLED)
    with pytest.raises(DsgnnError, match="about other data"):
        accuracy([BUNDLE], DATA, "val", tmp_path, teacher=BUNDLED, resume=True)
    monkeypatch.setattr(module, "measure", None)  # would fail if it were called
    again = accuracy([BUNDLE], DATA, "test", tmp_path, teacher=BUNDLED, resume=True)
    assert again["rows"] == first["rows"]


def test_an_artifact_of_other_weights_is_not_compared(tmp_path: Path) -> None:
    with pytest.raises(DsgnnError, match=r"was exported from .*, and the reference is"):
        accuracy(
            [BUNDLE],
            DATA,
            "test",
            tmp_path,
            teacher=BUNDLED,
            against=Spec("upstream", "nano", True),
        )
    assert not (tmp_path / "accuracy.json").exists()
