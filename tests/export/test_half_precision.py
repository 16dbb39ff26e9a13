"""Graphs retyped to fp16 and bf16: valid, typed where they must be, and close to float32."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsgnn.export.half_precision import BF16_OPSET, retype
from dsgnn.export.onnx import ExportSource, describe, described, export_onnx
from dsgnn.export.parity.comparison import parity_photos
from dsgnn.export.sampling import sampled
from dsgnn.runtime.artifact import read_description, read_sidecar
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.errors import OptionError

SIZE = (64, 96)
FLOAT, HALF, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


@pytest.fixture(scope="module")
def gathered(small_graph: onnx.ModelProto) -> onnx.ModelProto:
    return sampled(small_graph, "gather")


def retyped(proto: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    retype(made, precision)
    onnx.checker.check_model(made, full_check=True)
    return made


def types_of(proto: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def test_float16_with_islands(small_graph: onnx.ModelProto) -> None:
    half = retyped(small_graph, "fp16")
    types = types_of(half)
    seen = set()
    for node in half.graph.node:
        kinds = [types[name] for name in node.input if types.get(name) in (FLOAT, HALF)]
        seen.add(node.op_type)
        if node.op_type in ("Softmax", "LayerNormalization", "InstanceNormalization", "GridSample"):
            assert set(kinds) == {FLOAT}, node.name
        if node.op_type == "Conv":
            assert set(kinds) == {HALF}, node.name
    assert {"Softmax", "LayerNormalization", "InstanceNormalization", "GridSample", "Conv"} <= seen
    assert [types[output.name] for output in half.graph.output] == [FLOAT] * 3
    maker = {name: node for node in half.graph.node for name in node.output}
    for node in half.graph.node:  # locations: float32 back to the product that predicts offsets
        if node.op_type == "GridSample":
            behind = maker[node.input[1]]
            while behind.op_type != "Add":
                assert types[behind.output[0]] == FLOAT
                behind = maker[behind.input[0]]
            assert {types[name] for name in behind.input} == {FLOAT}
    score = maker["score"]
    assert score.op_type == "Sigmoid" and types[score.input[0]] == FLOAT
    products = [n for n in half.graph.node if n.op_type in ("MatMul", "Gemm")]
    wide = [n for n in products if types[n.output[0]] == FLOAT]
    assert len(wide) == 1  # the last one only, behind saliency and score
    assert not [
        t
        for t in half.graph.initializer
        if t.data_type == FLOAT and int(np.prod(t.dims)) > 8192 and "offset" not in t.name
    ]


def test_float16_answers(
    small_source: ExportSource, small_graph: onnx.ModelProto, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), np.uint8)
    answers = []
    full = onnx.ModelProto()
    full.CopyFrom(small_graph)
    for name, proto in (("full", full), ("half", retyped(small_graph, "fp16"))):
        onnx.save(described(proto, describe(small_source, SIZE)), tmp_path / f"{name}.onnx")
        answers.append(
            open_backend(tmp_path / f"{name}.onnx", "onnxruntime").infer({"image": images})
        )
    for name, want in answers[0].items():
        got = answers[1][name]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * np.ptp(want) + 1e-3)
        assert not np.array_equal(got, want)  # it did compute in half precision


def test_bfloat16_by_gather(gathered: onnx.ModelProto) -> None:
    brain = retyped(gathered, "bf16")
    assert brain.opset_import[0].version == BF16_OPSET
    types = types_of(brain)
    for node in brain.graph.node:
        if node.op_type == "Floor":  # of a location
            assert types[node.input[0]] == FLOAT
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.INT64:
            assert types[node.input[0]] not in (BF16, HALF)
        if node.op_type == "Conv":
            assert types[node.input[0]] == types[node.input[1]] == BF16
    name = "backbone.body.layer4.0.conv2.weight"
    weights = {t.name: t for t in (*gathered.graph.initializer, *brain.graph.initializer)}
    want = numpy_helper.to_array(weights[name]).astype(ml_dtypes.bfloat16)
    assert weights[f"{name}.bf16"].raw_data == want.tobytes()


def test_bfloat16_with_gridsample(small_graph: onnx.ModelProto) -> None:
    with pytest.raises(OptionError, match="bf16 needs opset 22.*sample by gather"):
        retyped(small_graph, "bf16")


def test_a_weight_too_large_for_float16() -> None:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "large",
        [helper.make_tensor_value_info("x", FLOAT, [2])],
        [helper.make_tensor_value_info("y", FLOAT, [2])],
        [numpy_helper.from_array(np.float32([1, 7e4]), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    with pytest.raises(OptionError, match="w holds 70000, too large for float16"):
        retype(proto, "fp16")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_exported(
    small_source: ExportSource,
    small_graph: onnx.ModelProto,
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dsgnn.export.onnx.build_onnx", lambda *_: small_graph)
    path = tmp_path / "m.onnx"
    sidecar, results = export_onnx(small_source, path, parity_photos(), SIZE, precision, "gather")
    assert read_description(path).precision == precision
    assert read_sidecar(path) == sidecar
    if precision == "fp16":
        assert [result.batch for result in results] == [1, 3, 8, 1]
        assert sidecar.verified == all(result.passed for result in results)
    else:  # ONNX Runtime has no such kernels for CPUs
        assert not results and not sidecar.verified
        assert "cannot load" in sidecar.build["not_run"]
