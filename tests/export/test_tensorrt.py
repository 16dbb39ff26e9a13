"""Engines really built by TensorRT-RTX, which needs no GPU; and everything that is refused.

An engine cannot be deserialised without a driver: where there is none it must be `unverified` and
say why, where there is one it must have passed the gate.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from dsgnn.config import CONFIGS
from dsgnn.export import tensorrt as exporter
from dsgnn.export.cli import main
from dsgnn.export.deploy.network import DeployGraph
from dsgnn.export.half_precision import retype
from dsgnn.export.onnx import ExportSource, build_onnx, default_size, describe, read_source
from dsgnn.export.parity.comparison import parity_photos
from dsgnn.export.parity.limits import ParityError
from dsgnn.export.tensorrt import BuildError, build_engine
from dsgnn.model import build_model
from dsgnn.runtime.artifact import METADATA_KEY, Description, open_artifact, read_sidecar, sha256_of
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.errors import ArtifactError, BackendError, OptionError
from dsgnn.runtime.letterbox import Fixed, LongestSide

SIZE = (64, 96)
RTX = ("--flavour", "tensorrt-rtx", "--sm", "89")
SLOW = pytest.mark.slow
COLOURS = Path(__file__).parents[1] / "runtime" / "colours.onnx"


def put(proto: onnx.ModelProto, path: Path, **facts: object) -> Path:
    """The graph as an artifact of random nano weights, with changed facts."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    source = ExportSource(build_model("nano"), "synthetic", "0" * 64)
    made.metadata_props.add(
        key=METADATA_KEY, value=replace(describe(source, SIZE), **facts).to_json()
    )
    onnx.save(made, path)
    return path


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """The smallest artifact; its size is not its own, so it is pinned to 64 × 96."""
    proto = onnx.load(COLOURS)
    for side, pixels in zip(
        proto.graph.input[0].type.tensor_type.shape.dim[1:3], SIZE, strict=True
    ):
        side.dim_value = pixels
    return put(proto, tmp_path / "colours.onnx", queries=5)


def tensors(B: int, Q: int, size: tuple[int, int]) -> dict[str, str]:
    """What the parsed network must take and give."""
    return {
        "image": f"UINT8 {(B, *size, 3)}",
        "saliency": f"FLOAT {(B, Q)}",
        "score": f"FLOAT {(B, Q)}",
        "masks": f"FLOAT {(B, Q, size[0] // 4, size[1] // 4)}",
    }


@pytest.mark.parametrize(
    ("precision", "sms", "batch"),
    [("fp32", "89,120", "1,1,1"), ("fp16", "89", "1,2,4"), ("bf16", "120", "2,2,2")],
)
def test_nano(
    nano_graph: onnx.ModelProto, precision: str, sms: str, batch: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    proto = onnx.ModelProto()
    proto.CopyFrom(nano_graph)
    if precision != "fp32":
        retype(proto, precision)
    source = put(proto, tmp_path / "nano.onnx", precision=precision)
    path = tmp_path / "nano.engine"
    arguments = [
        "tensorrt",
        str(source),
        "-o",
        str(path),
        "--flavour",
        "tensorrt-rtx",
        "--sm",
        sms,
        "--batch",
        batch,
        "--workspace",
        "512",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert path.stat().st_size > 1e6
    sidecar = read_sidecar(path)
    assert sidecar is not None and sidecar.sha256 == sha256_of(path)
    build = sidecar.build
    assert (build["flavour"], build["sms"]) == ("tensorrt-rtx", [int(sm) for sm in sms.split(",")])
    assert build["version"].count(".") >= 2 and build["bytes"] == path.stat().st_size
    assert build["source"] == {
        "file": "nano.onnx",
        "sha256": sha256_of(source),
        "status": "unverified",
    }
    assert build["layers"] > 500 and build["seconds"] > 0 and build["workspace_mib"] == 512
    assert build["tf32"] is False
    sizes = [int(size) for size in batch.split(",")]
    assert build["precision"] == precision and build["profile"] == {"batch": sizes}
    B = sizes[0] if sizes[0] == sizes[2] else -1
    attention = {"attention": f"FLOAT {(B, SIZE[0] // 8, SIZE[1] // 8)}"}
    assert build["tensors"] == tensors(B, CONFIGS["nano"].queries, SIZE) | attention
    if "not_run" in build:
        assert not sidecar.verified and not sidecar.parity
        assert "not compared: " in result.output and "unverified" in result.output
        with pytest.raises(BackendError, match="no NVIDIA GPU can be used here|was built for"):
            open_backend(path)
    else:
        assert sidecar.parity
    assert open_artifact(path).description.precision == precision
    said = CliRunner().invoke(main, ["inspect", str(path)]).output
    assert f"nano.engine: nano, {precision}, synthetic weights" in said
    assert f"layers: {build['layers']}" in said and "flavour: tensorrt-rtx" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "nano.engine",
        "nano.engine.json",
        "nano.engine.log",
        "nano.onnx",
    ]


@lru_cache(maxsize=1)  # of Swin-L tracing takes longer than building
def published(config: str) -> tuple[onnx.ModelProto, Description]:
    """The graph of random weights at the configuration's own size. Copy before a change."""
    source = read_source(None, config)
    size = default_size(source.model.config)
    proto = build_onnx(
        DeployGraph(source.model, size).eval(), source.model.config.outputs, size, size
    )
    return proto, describe(source, size)


@pytest.mark.parametrize(
    ("config", "precision", "sms", "batch"),
    [
        pytest.param("r50-assr", "fp32", (89,), (1, 1, 1), marks=SLOW),
        pytest.param("r50-assr", "fp16", (89, 120), (1, 4, 8), marks=SLOW),
        pytest.param("swin-l-assr", "fp32", (89,), (1, 1, 1), marks=SLOW),
        pytest.param("swin-l-assr", "fp16", (89, 120), (1, 2, 4), marks=SLOW),
    ],
)
def test_published(
    config: str,
    precision: str,
    sms: tuple[int, ...],
    batch: tuple[int, int, int],
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorrt_rtx")
    proto = onnx.ModelProto()
    graph, facts = published(config)
    proto.CopyFrom(graph)
    if precision != "fp32":
        retype(proto, precision)
    facts = replace(facts, precision=precision)
    proto.metadata_props.add(key=METADATA_KEY, value=facts.to_json())
    source, path = tmp_path / "m.onnx", tmp_path / "m.engine"
    onnx.save(proto, source)
    sidecar, results = build_engine(
        source, path, parity_photos(), "tensorrt-rtx", sms=sms, batch=batch
    )
    build = sidecar.build
    assert (sidecar.sha256, build["bytes"]) == (sha256_of(path), path.stat().st_size)
    assert build["source"]["sha256"] == sha256_of(source)
    assert (build["precision"], build["sms"]) == (precision, list(sms))
    assert build["profile"] == {"batch": list(batch)} and build["layers"] > 2000
    assert isinstance(facts.input, Fixed)
    B = batch[0] if batch[0] == batch[2] else -1
    size = facts.input.height, facts.input.width
    assert build["tensors"] == tensors(B, facts.queries, size)
    # its weights are of the graph's types, and stored once for all GPUs
    assert 0.9 < build["bytes"] / source.stat().st_size < 1.3
    assert bool(results) != ("not_run" in build)
    source.unlink()  # pytest keeps the folders of three runs, and these are gigabytes
    path.unlink()


def test_every_part_of_a_published_network(
    small_source: ExportSource, small_graph: onnx.ModelProto, tmp_path: Path
) -> None:
    """r50-assr with small widths; in its own widths it is among the slow tests."""
    pytest.importorskip("tensorrt_rtx")
    facts, proto = describe(small_source, SIZE), onnx.ModelProto()
    proto.CopyFrom(small_graph)
    proto.metadata_props.add(key=METADATA_KEY, value=facts.to_json())
    onnx.save(proto, tmp_path / "m.onnx")
    sidecar, results = build_engine(
        tmp_path / "m.onnx", tmp_path / "m.engine", parity_photos(), "tensorrt-rtx", sms=(89,)
    )
    assert sidecar.build["layers"] > 1000
    assert sidecar.build["tensors"] == tensors(1, facts.queries, SIZE)
    assert bool(results) != ("not_run" in sidecar.build)


def test_an_operator_the_parser_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    proto = onnx.load(COLOURS)
    for node in proto.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type, node.name = "Det", "odd"
    path = put(proto, tmp_path / "m.onnx")
    with pytest.raises(BuildError, match=r"the parser refused m.onnx:\n  node odd \(Det\): "):
        build_engine(path, tmp_path / "m.engine", [], "tensorrt-rtx", sms=(89,))
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.engine.log"}
    assert "Det" in (tmp_path / "m.engine.log").read_text()


def test_an_unknown_generation(colours: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(OptionError, match=r"GPU generations are .*89, got 13"):
        build_engine(colours, colours.with_name("m.engine"), [], "tensorrt-rtx", sms=(13,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flavour", "tensorrt-rtx"], "TensorRT-RTX builds for named GPU generations: name them"),
        (["--sm", "89"], "TensorRT builds for the GPU that is present"),
        ([*RTX, "--timing-cache", "t"], "TensorRT-RTX measures nothing when it builds"),
        ([*RTX, "--batch", "4,2,1"], "batch must be 1 ≤ min ≤ opt ≤ max, got 4,2,1"),
        ([*RTX, "--batch", "4"], "got 4"),
        (["--sm", "ada"], "expected numbers such as 1,2,8, got 'ada'"),
        ([*RTX, "-o", "m.bin"], "must end in .engine or .plan, got m.bin"),
    ],
)
def test_wrong_use(options: list[str], message: str, colours: Path) -> None:
    target = colours.with_name("m.engine")
    arguments = ["tensorrt", str(colours), "-o", str(target), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and message in result.output, result.output
    assert [p.name for p in colours.parent.iterdir()] == ["colours.onnx"]


def test_files_of_any_size_and_missing_libraries(
    tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anything = put(onnx.load(COLOURS), tmp_path / "any.onnx", input=LongestSide(96))
    with pytest.raises(OptionError, match="any.onnx takes photos of any size.*such as 96x96"):
        build_engine(anything, tmp_path / "m.engine", [], "tensorrt-rtx", sms=(89,))
    command = ["tensorrt", str(anything), "-o", str(tmp_path / "m.engine")]
    with monkeypatch.context() as patch:  # said before anything heavy is imported
        patch.setitem(sys.modules, "dsgnn.export.tensorrt", None)
        result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "dsgnn-export onnx CHECKPOINT -o M.onnx --size HxW" in " ".join(result.output.split())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"tensorrt is not installed: pip install 'dsgnn\[tens"):
        build_engine(colours, tmp_path / "m.engine", [], "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())  # its type stubs alone
    with pytest.raises(BackendError, match=r"tensorrt is not installed.*__version__"):
        build_engine(colours, tmp_path / "m.engine", [], "tensorrt")


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch, colours: Path) -> Callable[[float], Path]:
    """A builder and an engine that answers as the ONNX file does, plus an error."""

    def prepare(error: float) -> Path:
        library = SimpleNamespace(ILogger=object, __version__="1.7.1")
        monkeypatch.setattr(exporter, "library_of", lambda flavour: library)
        monkeypatch.setattr(exporter, "_build", lambda *_: (b"an engine", {"layers": 3}))
        seen: list[int] = []

        def open_any(path: Path, *arguments: object):
            backend = open_backend(colours, "onnxruntime", "cpu")
            if path.suffix == ".onnx":
                return backend
            assert open_artifact(path).sidecar is not None

            def infer(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                seen.append(len(feeds["image"]))
                assert 2 <= len(feeds["image"]) <= 8
                return {name: value + error for name, value in backend.infer(feeds).items()}

            return SimpleNamespace(infer=infer, picked="a fake")

        monkeypatch.setattr(exporter, "open_backend", open_any)
        return colours

    return prepare


def test_the_gate_runs_where_the_engine_does(fake_build, tmp_path: Path) -> None:
    source = fake_build(0.0)
    sidecar, results = build_engine(
        source, tmp_path / "m.engine", parity_photos(), "tensorrt-rtx", sms=(89,), batch=(2, 4, 8)
    )
    assert sidecar.verified and [result.batch for result in results] == [2, 3, 8, 8, 2]
    assert open_artifact(tmp_path / "m.engine").status == "verified"
    assert sidecar.parity[0]["against"] == "colours.onnx"


def test_an_engine_with_other_answers_is_not_written(fake_build, tmp_path: Path) -> None:
    source = fake_build(5.0)
    (tmp_path / "m.engine").write_text("what was here before")
    with pytest.raises(ParityError, match=r"(?s)was not written\..*another precision.*FAILED"):
        build_engine(
            source,
            tmp_path / "m.engine",
            parity_photos(),
            "tensorrt-rtx",
            sms=(89,),
            batch=(2, 4, 8),
        )
    assert (tmp_path / "m.engine").read_text() == "what was here before"
    assert {p.name for p in tmp_path.iterdir()} == {"colours.onnx", "m.engine", "m.engine.log"}


def test_an_engine_of_a_file_that_the_cpu_cannot_run_is_kept(
    fake_build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fake_build(0.0)

    def refuse(path: Path, *arguments: object) -> object:
        if path.suffix == ".onnx":
            raise BackendError("onnxruntime cannot load it: no bfloat16 Conv")
        return SimpleNamespace()

    monkeypatch.setattr(exporter, "open_backend", refuse)
    sidecar, results = build_engine(
        source, tmp_path / "m.engine", parity_photos(), "tensorrt-rtx", sms=(89,)
    )
    assert not sidecar.verified and not results and (tmp_path / "m.engine").exists()
    assert sidecar.build["not_run"] == "onnxruntime cannot load it: no bfloat16 Conv"


def test_an_engine_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.engine").write_bytes(b"native code")
    for run in (open_artifact, open_backend):
        with pytest.raises(ArtifactError, match="m.engine is native code.*keep m.engine.json"):
            run(tmp_path / "m.engine")
