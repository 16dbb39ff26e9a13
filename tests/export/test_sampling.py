"""The ways to sample are the same algebra, and a fault in one of them is left for the next."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional as F

from dsgnn.config import CONFIGS
from dsgnn.export import tensorrt as exporter
from dsgnn.export.onnx import ExportSource, backend_infer, describe, described, export_onnx
from dsgnn.export.parity.built import PrecisionError, SamplingError
from dsgnn.export.parity.comparison import parity_photos
from dsgnn.export.parity.limits import ParityError
from dsgnn.export.sampling import DOMAIN, PLUGIN, plugin_version, sampled, ways
from dsgnn.export.tensorrt import build_engine
from dsgnn.runtime.artifact import read_sidecar
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.errors import OptionError

SIZE = (64, 96)


def one_node(opset: int = 18, mode: str = "bilinear") -> onnx.ModelProto:
    """A graph of one GridSample whose sides are all open."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("GridSample", ["maps", "grid"], ["out"], mode=mode, align_corners=0)],
        "one",
        [value("maps", 1, ["n", 3, "h", "w"]), value("grid", 1, ["n", "p", "k", 2])],
        [value("out", 1, ["n", 3, "p", "k"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


class Plugin(OpRun):
    """What TensorRT documents of its plugin, for the reference evaluator."""

    op_domain = DOMAIN

    def _run(self, value, sizes, start, places, weights, plugin_version=None):  # type: ignore[no-untyped-def]
        N, _, M, _ = value.shape
        Q, L, P = places.shape[1], places.shape[3], places.shape[4]
        assert places.shape == (N, Q, M, L, P, 2) and weights.shape == (N, Q, M, L, P)
        assert sizes.dtype == start.dtype == np.int32
        out = np.zeros((N, Q, M, value.shape[3]), np.float32)
        for n, q, m, level, p in np.ndindex(N, Q, M, L, P):
            h, w = sizes[level]
            x, y = places[n, q, m, level, p] * (w, h) - 0.5
            for dy in (0, 1):
                for dx in (0, 1):
                    cx, cy = int(np.floor(x)) + dx, int(np.floor(y)) + dy
                    if 0 <= cx < w and 0 <= cy < h:
                        share = (1 - abs(x - cx)) * (1 - abs(y - cy)) * weights[n, q, m, level, p]
                        out[n, q, m] += share * value[n, start[level] + cy * w + cx, m]
        return (out,)


Plugin.__name__ = PLUGIN


@pytest.mark.parametrize(("way", "opset"), [("gather", 18), ("gather", 22), ("plugin", 18)])
def test_each_way_is_the_same_algebra(way: str, opset: int) -> None:
    torch.manual_seed(0)
    maps, grid = torch.randn(3, 3, 5, 7), torch.randn(3, 2, 6, 2)
    edges = [[-1, -1], [1, 1], [0, 0], [-3, 0], [0.99, 1.01], [-1, 1]]
    grid[0, 0] = torch.tensor(edges)  # corners of the map, and outside
    made = sampled(one_node(opset), way, "2")
    assert "GridSample" not in {node.op_type for node in made.graph.node}
    if way == "gather":
        onnx.checker.check_model(made, full_check=True)
        assert [entry.domain for entry in made.opset_import] == [""]
    else:
        node = next(node for node in made.graph.node if node.op_type == PLUGIN)
        assert helper.get_attribute_value(node.attribute[0]) == b"2"
    evaluator = ReferenceEvaluator(made, new_ops=[Plugin])
    (got,) = evaluator.run(None, {"maps": maps.numpy(), "grid": grid.numpy()})
    want = F.grid_sample(maps, grid, align_corners=False).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert np.abs(want).max() > 1 and (want[0, :, 0, 3] == 0).all()


def test_which_ways_there_are() -> None:
    known = ("gridsample", "gather", "apart")
    assert ways(one_node(), known) == known and ways(one_node(), known, "gather") == known[1:]
    assert ways(sampled(one_node(), "gather"), known) == ("unchanged",)
    with pytest.raises(OptionError, match="deform must be one of gridsample, gather, apart, got"):
        ways(one_node(), known, "near")
    versions = {"10.3.0": "1", "10.11.0.33": "2", "11.4.0.106": "2", "1.7.1.116": "1"}
    assert {version: plugin_version(version) for version in versions} == versions


def small_network(mode: str = "bilinear", sign: float = 1.0) -> onnx.ModelProto:
    """Three queries whose masks are the photo's colours, sampled between the cells."""
    h, w = SIZE[0] // 4, SIZE[1] // 4
    rows, columns = np.meshgrid(np.arange(h) + 0.4, np.arange(w) + 0.3, indexing="ij")
    grid = np.stack((2 * columns / w - 1, 2 * rows / h - 1), -1)[None].astype(np.float32)
    proto = onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["": 18]>
        small (uint8[B, {SIZE[0]}, {SIZE[1]}, 3] image)
        => (float[B, 3] saliency, float[B, 3] score, float[B, 3, {h}, {w}] masks) {{
            pixels = Cast <to = 1> (image)
            planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
            cells = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (planes)
            grey = Constant <value_float = 110.0> ()
            maps = Sub (cells, grey)
            batch = Shape <start = 0, end = 1> (image)
            ones = Constant <value_ints = [1, 1, 1]> ()
            all = Concat <axis = 0> (batch, ones)
            grids = Expand (grid, all)
            found = GridSample <mode = "{mode}", align_corners = 0> (maps, grids)
            masks = Conv (found, mix)
            axes = Constant <value_ints = [2, 3]> ()
            saliency = ReduceMean <keepdims = 0> (masks, axes)
            score = Sigmoid (saliency)
        }}""")
    mix = sign * np.eye(3, dtype=np.float32)[:, :, None, None]
    for name, value in (("grid", grid), ("mix", mix)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return proto


class Network(torch.nn.Module):
    """Stands where the exporter wants a network; its graph is replaced by `planted`."""

    config = replace(CONFIGS["nano"], queries=3, attention=False)


SOURCE = ExportSource(Network(), "trained", "0" * 64)  # type: ignore[arg-type]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Export a graph with a fault in it; the reference is the sound one."""
    sound = tmp_path / "sound.onnx"
    onnx.save(described(small_network(), describe(SOURCE, SIZE)), sound)
    backend = open_backend(sound, "onnxruntime", "cpu", 1)
    sound.unlink()
    monkeypatch.setattr("dsgnn.export.onnx.DeployGraph", lambda model, size: model)
    monkeypatch.setattr("dsgnn.export.onnx.torch_infer", lambda model: backend_infer(backend))

    def plant(**fault: Any) -> None:
        monkeypatch.setattr("dsgnn.export.onnx.build_onnx", lambda *_: small_network(**fault))

    return plant


def test_a_sound_graph_passes_by_the_first_way(
    planted: Callable[..., None], tmp_path: Path
) -> None:
    planted()
    path = tmp_path / "m.onnx"
    sidecar, _ = export_onnx(SOURCE, path, parity_photos(), SIZE)
    assert sidecar.verified and sidecar.build["deform"] == "gridsample"
    assert sidecar.build["tried"] == [{"deform": "gridsample", "left": None}]
    assert read_sidecar(path) == sidecar


def test_sampling_that_was_read_as_nearest_is_left(
    planted: Callable[..., None], tmp_path: Path
) -> None:
    planted(mode="nearest")
    path = tmp_path / "m.onnx"
    sidecar, results = export_onnx(SOURCE, path, parity_photos(), SIZE)
    assert sidecar.verified and all(result.passed for result in results)
    assert sidecar.build["deform"] == "gather"
    left, kept = sidecar.build["tried"]
    assert left["deform"] == "gridsample" and "mask" in left["left"]
    assert kept == {"deform": "gather", "left": None}
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "GatherElements" in operators and "GridSample" not in operators
    kept_as_asked, _ = export_onnx(SOURCE, path, parity_photos(), SIZE, keep_unverified=True)
    assert not kept_as_asked.verified and kept_as_asked.build["deform"] == "gridsample"


def test_a_fault_that_is_not_in_the_sampling_stays_one(
    planted: Callable[..., None], tmp_path: Path
) -> None:
    planted(sign=-1.0)
    with pytest.raises(ParityError, match=r"(?s)was not written.*FAILED.*by gather: saliency dif"):
        export_onnx(SOURCE, tmp_path / "m.onnx", parity_photos(), SIZE)
    assert not list(tmp_path.iterdir())


def test_half_precision_that_was_not_built_is_refused(
    planted: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted()
    monkeypatch.setattr("dsgnn.export.onnx.retype", lambda proto, precision: None)
    with pytest.raises(
        PrecisionError, match=r"fp16 was asked for, but of the 1 products of m.onnx"
    ):
        export_onnx(SOURCE, tmp_path / "m.onnx", parity_photos(), SIZE, "fp16")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A builder whose engines are right in one way of sampling alone. It returns the ONNX file."""

    def prepare(right: str) -> Path:
        source = tmp_path / "m.onnx"
        onnx.save(described(small_network(), describe(SOURCE, SIZE)), source)
        library = SimpleNamespace(ILogger=object, __version__="10.13.0", __name__="tensorrt")

        def build(_: Any, __: Any, graph: onnx.ModelProto, way: str, *rest: Any) -> Any:
            operators = {node.op_type for node in graph.graph.node}
            assert ("GridSample" in operators) == (way in ("gridsample", "apart"))
            assert (PLUGIN in operators) == (way == "plugin")
            if way == "gather":
                raise SamplingError("no room")
            return way.encode(), {"layers": 1}

        def open_any(path: Path, *_: object) -> Any:
            backend = open_backend(source, "onnxruntime", "cpu")
            if path.suffix == ".onnx":
                return backend
            error = 0.0 if path.read_bytes() == right.encode() else 5.0
            return SimpleNamespace(
                name="tensorrt",
                device="cuda:0",
                picked="a fake",
                infer=lambda feeds: {n: v + error for n, v in backend.infer(feeds).items()},
            )

        monkeypatch.setattr(exporter, "library_of", lambda flavour: library)
        monkeypatch.setattr(exporter, "gpu", lambda: ("a fake", 89))
        monkeypatch.setattr(exporter, "_build", build)
        monkeypatch.setattr(exporter, "open_backend", open_any)
        return source

    return prepare


def test_an_engine_climbs_as_far_as_its_flavour(
    engines: Callable[[str], Path], tmp_path: Path
) -> None:
    path, photos = tmp_path / "m.engine", parity_photos()[:2]
    sidecar, _ = build_engine(engines("plugin"), path, photos, "tensorrt")
    assert sidecar.verified and path.read_bytes() == b"plugin"
    assert sidecar.build["deform"] == "plugin"
    tried = {one["deform"]: one["left"] for one in sidecar.build["tried"]}
    assert list(tried) == ["gridsample", "gather", "apart", "plugin"]
    assert "saliency differs by 5" in tried["gridsample"] and "saliency dif" in tried["apart"]
    assert tried["gather"] == "no room" and tried["plugin"] is None
    with pytest.raises(ParityError, match=r"(?s)FAILED.*by gather: no room\n  by apart: saliency"):
        build_engine(engines("plugin"), path, photos, "tensorrt-rtx", sms=(89,))
    assert path.read_bytes() == b"plugin"  # what was there before


@pytest.mark.parametrize("way", ["gridsample", "gather", "apart"])
def test_each_way_is_built(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By TensorRT-RTX itself."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(exporter, "FOR_ENGINES", {"tensorrt-rtx": (way,)})
    monkeypatch.setattr(exporter, "ways", lambda proto, known: known)
    source, path = tmp_path / "m.onnx", tmp_path / "m.engine"
    onnx.save(described(small_network(), describe(SOURCE, SIZE)), source)
    sidecar, _ = build_engine(source, path, parity_photos()[:1], "tensorrt-rtx", sms=(89,))
    assert sidecar.build["deform"] == way and len(sidecar.build["tensors"]) == 4
    assert (b"apart.0" in path.read_bytes()) == (way == "apart")


def test_a_parser_that_reads_nearest_is_found_out(tmp_path: Path) -> None:
    library = pytest.importorskip("tensorrt_rtx")
    with exporter._log(library, tmp_path / "log") as logger:
        network = library.Builder(logger).create_network(0)
        parser = library.OnnxParser(network, logger)
        assert parser.parse(one_node(mode="nearest").SerializeToString())
        with pytest.raises(SamplingError, match=r"reads 1 of 1 GridSample as nearest, and the gra"):
            exporter.check_sampling(library, network)
