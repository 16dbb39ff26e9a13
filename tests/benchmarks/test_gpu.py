"""The table of one GPU: what is run, floors and reasons, time limits, and answers compared."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsgnn.benchmarks import gpu, results
from dsgnn.benchmarks.forms import Spec
from dsgnn.benchmarks.report.page import report
from dsgnn.benchmarks.report.tables import gpu_table, never_measured
from dsgnn.benchmarks.report.words import answers_text
from dsgnn.runtime.artifact import Sidecar, open_artifact, sha256_of, write_sidecar
from dsgnn.runtime.disk.files import claimed
from dsgnn.runtime.errors import DsgnnError, FolderBusyError
from dsgnn.runtime.ranker import BUNDLED

from .fakes import Clockwork, FakeBench, save_again


def gpu_run(out: Path, slow: str = "", fails: str = "") -> Any:
    """The table of fakes: forms run in 8 ms, `fails` cannot be opened, `slow` takes an hour."""
    clock = Clockwork()

    def call(function: Any, spec: Spec) -> Any:
        if function is gpu.gpu_rates:
            return {"tflops": {"fp32": 50, "fp16": 500, "bf16": 500}, "gb_per_s": 1000}
        return {"operations": 1e11, "bytes_io": 1e6, "weights": 4e7}

    def open_bench(spec: Spec, until: float = 0) -> FakeBench:
        if spec.form == fails:
            raise DsgnnError(f"{spec.form} does\nnot work here")
        ms = 3.6e6 if spec.form == slow else 8.0
        kind = {"form": spec.form, "precision": spec.precision}
        name = f"{spec.form} {spec.precision}"
        return FakeBench(clock, name, ms, backend="pytorch", device="cuda", **kind)

    source = Spec("deploy", "nano", True, device="cuda")
    return gpu.fill(source, [], out, (1, 4), clock=clock, call=call, open_bench=open_bench)


def test_the_gpu_table_holds_floors_and_reasons(tmp_path: Path) -> None:
    found = gpu_run(tmp_path, fails="cuda-graph")
    assert results.load(tmp_path / "gpu.json") == found
    rows = gpu_table(found["rows"], found["missing"])[1:]
    table = {(row[0], row[1]): row[2:] for row in rows}
    # 1e11 operations at 50 TFLOP/s take 2 ms, 4e7 weights of 4 bytes at 1 TB/s take 0.16 ms
    assert re.fullmatch(r"8\.\d* ÷ 2", table["PyTorch deploy graph", "fp32"][0])
    assert table["PyTorch deploy graph", "fp32"][1] == "never measured"  # batch 2
    assert re.fullmatch(r"32\.\d* ÷ 8", table["PyTorch deploy graph", "fp32"][2])
    said = never_measured([[], *rows], found["missing"])
    assert ("TensorRT", "fp16") not in table and "; TensorRT (fp32, fp16, bf16)" in said
    assert ("PyTorch CUDA graph", "bf16") not in table
    assert "PyTorch CUDA graph (fp32, fp16, bf16: cuda-graph does not work here); " in said


def test_every_gpu_has_a_table_that_names_it_and_its_warnings(tmp_path: Path) -> None:
    files = []
    for name in ("NVIDIA L4", "NVIDIA H200"):
        found = gpu_run(tmp_path / name, fails="cuda-graph")
        found["environment"]["gpus"] = [{"name": name}]
        for row in found["rows"]:
            row["subject"]["status"] = "unverified"
        files.append(tmp_path / name / "gpu.json")
        save_again(files[-1], found)
    text = report(files, tmp_path / "r.html", None)
    assert re.findall(r"^\*\*(.*)\.\*\* Inference p50", text, re.M) == [
        "nano on NVIDIA L4",
        "nano on NVIDIA H200",
    ]
    assert (
        len(re.findall(r"^\| PyTorch deploy graph \| fp16 .* \| UNVERIFIED \|$", text, re.M)) == 2
    )
    assert (
        "never been" not in text and "nano on NVIDIA H200</h2>" in (tmp_path / "r.html").read_text()
    )


def test_a_precision_beyond_the_table_gets_a_row(tmp_path: Path) -> None:
    found = gpu_run(tmp_path)
    (first, *_) = found["rows"]
    first["subject"] |= {"form": "artifact", "backend": "onnxruntime", "precision": "w16"}
    rows = gpu_table(found["rows"], found["missing"])[1:]
    table = {(row[0], row[1]): row[2:] for row in rows}
    assert len(table) == 13 and " ÷ " in table["ONNX Runtime CUDA", "w16"][0]


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(FolderBusyError, match="another run is writing into"):
        gpu_run(tmp_path)
    assert gpu_run(tmp_path)["rows"]


def test_the_gpu_table_stops_in_time(tmp_path: Path) -> None:
    found = gpu_run(tmp_path, slow="deploy")
    assert found["rows"] == [] or {row["batch"] for row in found["rows"]} == {1}
    whys = {missing["why"] for missing in found["missing"]}
    assert "not reached within 540 s" in whys


def test_compilers_start_when_nothing_else_is_to_be_timed(tmp_path: Path) -> None:
    """And what they are too slow for does not cost the other rows."""
    found = gpu_run(tmp_path, slow="compiled")
    forms = [row["subject"]["form"] for row in found["rows"]]
    assert len(forms) >= 18 and "compiled" not in forms[:18]  # three others, in three precisions
    assert {row["name"] for row in found["missing"]} == {"PyTorch compiled"}


def test_answers_are_compared_on_the_gpu_and_told() -> None:
    """One form agrees, one has another order, and one cannot answer."""
    about = open_artifact(BUNDLED).description

    def answers(images: np.ndarray, sign: int = 1) -> dict[str, np.ndarray]:
        B, Q = len(images), about.queries
        masks = np.ones((B, Q, 60, 80), np.float32)
        saliency = np.tile(sign * np.arange(Q, dtype=np.float32), (B, 1))
        score = np.full((B, Q), 0.9, np.float32)
        return {"saliency": saliency, "score": score, "masks": masks}

    def broken(images: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("out of memory")

    asked: list[int] = []

    def reference(images: np.ndarray) -> dict[str, np.ndarray]:
        asked.append(len(images))
        return answers(images)

    forms = {"good": answers, "upside down": lambda images: answers(images, -1), "full": broken}
    benches = {
        name: SimpleNamespace(facts={"name": name, "precision": "fp32"}, answers=form)
        for name, form in forms.items()
    }
    photos = [np.full((480, 640, 3), level, np.uint8) for level in (10, 200)]
    remembered = gpu.Remembered(reference)
    found = [
        one
        for bench in benches.values()
        for one in gpu.check_answers(bench, remembered, about, photos)
    ]
    assert [(one["name"], one["passed"]) for one in found] == [
        ("good", True),
        ("good", True),
        ("upside down", False),
        ("upside down", False),
        ("full", False),
    ]
    assert asked == [1, 1, 3]  # not once more for each form
    text = answers_text(found)
    assert "upside down: saliency differs" in text and "full: out of memory" in text
    assert "good" not in text and answers_text(found[:2]).endswith("all agree.")


def test_artifacts_run_on_the_engines_that_take_them(tmp_path: Path) -> None:
    """By the kind of file, in the precision of the file."""
    inside = open_artifact(BUNDLED).description

    def engine(flavour: str, precision: str) -> Path:
        path = tmp_path / f"{flavour}-{precision}.engine"
        path.write_bytes(flavour.encode())
        facts = replace(inside, precision=precision)
        about = Sidecar(
            path.name, sha256_of(path), True, build={"flavour": flavour}, description=facts
        )
        write_sidecar(path, about)
        return path

    def found(path: Path) -> list[tuple[str, str]]:
        specs = gpu.gpu_specs(Spec("deploy", "nano", True, device="cuda"), [path])
        return [(s.backend, s.precision) for s in specs if s.form == "artifact"]

    kept = inside.precision
    assert found(BUNDLED) == [("onnxruntime", kept), ("onnxruntime-tensorrt", kept)]
    assert found(engine("tensorrt", "fp16")) == [
        ("tensorrt", "fp16"),
        ("tensorrt-cuda-graph", "fp16"),
    ]
    assert found(engine("tensorrt-rtx", "bf16")) == [
        ("tensorrt-rtx", "bf16"),
        ("tensorrt-rtx-cuda-graph", "bf16"),
    ]
    with pytest.raises(DsgnnError, match=r"-int8.engine is int8, expected one of fp32, w16"):
        found(engine("tensorrt", "int8"))
