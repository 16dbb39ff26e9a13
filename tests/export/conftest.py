"""Graphs that several modules start from: tracing them is what costs time. Copy before a change."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock

from dsgnn.export.cli import main
from dsgnn.export.deploy.network import DeployGraph
from dsgnn.export.onnx import ExportSource, build_onnx
from dsgnn.model import build_model
from dsgnn.weights.checkpoint import save_checkpoint

from .test_deploy import shake, small

SIZE = (64, 96)


@pytest.fixture(scope="session")
def made_once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder by its name, filled by the first process of this run that asks for it."""
    root = tmp_path_factory.getbasetemp()
    if worker_id != "master":  # each process has a folder of its own inside the run's
        root = root.parent

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        done = root / name
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                part = root / f"{name}.part"
                shutil.rmtree(part, ignore_errors=True)  # of a process whose attempt failed
                part.mkdir()
                fill(part)
                part.rename(done)
        return done

    return folder


@pytest.fixture(scope="session")
def small_source() -> ExportSource:
    """r50-assr in every part but with small widths."""
    torch.manual_seed(1)
    return ExportSource(shake(build_model(small("r50-assr"))), "synthetic", "0" * 64)


@pytest.fixture(scope="session")
def small_graph(small_source: ExportSource, made_once: Callable[..., Path]) -> onnx.ModelProto:
    def fill(folder: Path) -> None:
        graph = DeployGraph(small_source.model, SIZE).eval()
        proto = build_onnx(graph, small_source.model.config.outputs, SIZE, SIZE)
        onnx.save(proto, folder / "small.onnx")

    return onnx.load(made_once("small-graph", fill) / "small.onnx")


@pytest.fixture(scope="session")
def nano_source() -> ExportSource:
    """Random weights whose attention is not the same everywhere."""
    torch.manual_seed(5)
    model = build_model("nano").eval()
    with torch.no_grad():
        model.attention.prior.normal_(0, 2)
    return ExportSource(model, "synthetic", "0" * 64)


@pytest.fixture(scope="session")
def nano_exported(nano_source: ExportSource, made_once: Callable[..., Path]) -> Path:
    """What `dsgnn-export onnx` makes of it: a folder with nano.safetensors, from which it was made,
    nano.onnx and its sidecar. output.txt is what the command said."""

    def fill(folder: Path) -> None:
        checkpoint, target = folder / "nano.safetensors", folder / "nano.onnx"
        save_checkpoint(checkpoint, nano_source.model, origin="mine (train), 6 iterations")
        command = ["onnx", str(checkpoint), "-o", str(target), "--size", "x".join(map(str, SIZE))]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        assert {path.name for path in folder.iterdir()} == {
            "nano.onnx",
            "nano.onnx.json",
            "nano.safetensors",
        }
        (folder / "output.txt").write_text(result.output)

    return made_once("nano-exported", fill)


@pytest.fixture(scope="session")
def nano_graph(nano_exported: Path) -> onnx.ModelProto:
    """Its graph, without the description that the command has put into the file."""
    proto = onnx.load(nano_exported / "nano.onnx")
    del proto.metadata_props[:]
    return proto
