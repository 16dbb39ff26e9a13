"""int8: what is quantised, how close it stays, and what is refused."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper

from dsgnn.config import CONFIGS
from dsgnn.export.cli import main
from dsgnn.export.int8 import FIRST, PEAKS, PHOTOS, check_calibration, quantise
from dsgnn.export.onnx import ExportSource, export_onnx
from dsgnn.export.parity.comparison import parity_photos
from dsgnn.export.parity.limits import ParityError
from dsgnn.model import build_model
from dsgnn.runtime.artifact import read_description, read_sidecar
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.letterbox import Fixed, letterbox
from dsgnn.weights.checkpoint import save_checkpoint

SIZE = (64, 96)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Enough different pieces of the sample photos."""
    found = []
    for photo in parity_photos():
        h, w = photo.shape[0] // 4, photo.shape[1] // 4
        found += [
            photo[y : y + h, x : x + w] for y in range(0, 3 * h, h) for x in range(0, 4 * w, w)
        ]
    return found[:PHOTOS]


@pytest.fixture(scope="module")
def quantised(nano_graph: onnx.ModelProto, photos: list[np.ndarray]) -> onnx.ModelProto:
    made = quantise(nano_graph, photos, Fixed(*SIZE))
    onnx.checker.check_model(made, full_check=True)
    return made


def test_what_is_quantised(nano_graph: onnx.ModelProto, quantised: onnx.ModelProto) -> None:
    graph = quantised.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    before = [node for node in nano_graph.graph.node if node.op_type == "Conv"]
    eight = 0
    for old in before:
        node = next(n for n in convolutions if n.name == old.name)
        expected = old.name not in {n.name for n in before[:FIRST]} and PEAKS not in old.input[1]
        assert all(name in maker for name in node.input[1:]) == expected, old.input[1]
        if not expected:
            continue
        eight += 1
        weight = maker[node.input[1]]  # DequantizeLinear: one scale per output channel
        values, scales = (numpy_helper.to_array(tensors[name]) for name in weight.input[:2])
        assert values.dtype == np.int8 and scales.shape == values.shape[:1]
        # the ranges are those after the activation function
        assert not {"Relu", "Clip"} & {reader.op_type for reader in readers[node.output[0]]}
    assert eight == len(before) - FIRST - 2
    kept = Counter(node.op_type for node in nano_graph.graph.node)
    now = Counter(node.op_type for node in graph.node)
    for kind in ("MatMul", "Gemm", "Softmax", "LayerNormalization", "TopK", "Sigmoid"):
        assert now[kind] == kept[kind]


def test_close_to_float32(nano_graph: onnx.ModelProto, quantised: onnx.ModelProto) -> None:
    """The pixel features, which every quantised convolution leads to."""
    onnxruntime = pytest.importorskip("onnxruntime")
    fuse = next(n for n in nano_graph.graph.node if "decoder.fuse" in " ".join(n.input))
    relu = next(n for n in nano_graph.graph.node if fuse.output[0] in n.input)
    narrow = next(n for n in quantised.graph.node if relu.output[0] in n.input)
    assert (relu.op_type, narrow.op_type) == ("Relu", "QuantizeLinear")
    wide = next(n for n in quantised.graph.node if narrow.output[0] in n.input)
    images = np.stack([letterbox(photo, Fixed(*SIZE))[0] for photo in parity_photos()])
    answers = []
    for proto, name in ((nano_graph, relu.output[0]), (quantised, wide.output[0])):
        made = onnx.ModelProto()
        made.CopyFrom(proto)
        made.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
        session = onnxruntime.InferenceSession(made.SerializeToString())
        answers.append(session.run([name], {"image": images})[0])
    error = np.sqrt(np.mean((answers[0] - answers[1]) ** 2)) / answers[0].std()
    assert 0 < error < 0.1


def export(
    monkeypatch, graph: onnx.ModelProto, target: Path, *options: object, checkpoint: object = None
):
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    monkeypatch.setattr("dsgnn.export.onnx.build_onnx", lambda *_: made)
    source = [str(checkpoint)] if checkpoint else ["--synthetic", "nano"]
    command = ["onnx", *source, "--size", "64x96", "-o", str(target)]
    return CliRunner().invoke(main, [*command, *(str(option) for option in options)])


def test_command(
    nano_graph: onnx.ModelProto,
    photos: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, photo in enumerate(photos):
        cv2.imwrite(str(folder / f"{i:02d}.png"), photo[..., ::-1])
    path = tmp_path / "m.onnx"
    result = export(monkeypatch, nano_graph, path, "--precision", "int8", "--calibrate", folder)
    assert result.exit_code == 0, result.output
    assert read_description(path).precision == "int8"
    sidecar = read_sidecar(path)
    assert sidecar is not None and sidecar.build["calibration_photos"] == PHOTOS
    assert [check["batch"] for check in sidecar.parity] == [1, 3, 8, 1]
    image = letterbox(photos[0], Fixed(*SIZE))[0][None]
    for backend in ("onnxruntime", "openvino"):
        answers = open_backend(path, backend).infer({"image": image})
        assert answers["masks"].shape == (1, CONFIGS["nano"].queries, 16, 24)
        assert np.isfinite(answers["masks"]).all()


def test_a_network_that_int8_cannot_serve_is_refused_before_calibration(
    nano_source: ExportSource,
    nano_graph: onnx.ModelProto,
    photos: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint that was never trained: its objects are alike, and rounding swaps them."""

    def unreached(*_: object) -> None:
        raise AssertionError("it was calibrated")

    monkeypatch.setattr("dsgnn.export.onnx.build_onnx", lambda *_: nano_graph)
    monkeypatch.setattr("dsgnn.export.onnx.quantise", unreached)
    untrained = replace(nano_source, weights="trained")
    path = tmp_path / "m.onnx"
    with pytest.raises(ParityError, match=r"(?s)only its weights in eight bits.*train it.*FAILED"):
        export_onnx(untrained, path, parity_photos(), SIZE, "int8", calibration=photos)
    assert not list(tmp_path.iterdir())


def test_what_fails_can_be_kept_unverified(
    nano_graph: onnx.ModelProto,
    photos: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(5)
    checkpoint, folder = tmp_path / "nano.safetensors", tmp_path / "photos"
    save_checkpoint(checkpoint, build_model("nano"))
    folder.mkdir()
    for i, photo in enumerate(photos):
        cv2.imwrite(str(folder / f"{i:02d}.png"), photo[..., ::-1])
    path = tmp_path / "m.onnx"
    options = ["--precision", "int8", "--calibrate", folder]
    refused = export(monkeypatch, nano_graph, path, *options, checkpoint=checkpoint)
    assert refused.exit_code == 1 and not path.exists()
    assert "or --keep-unverified." in refused.output
    options.append("--keep-unverified")
    kept = export(monkeypatch, nano_graph, path, *options, checkpoint=checkpoint)
    assert kept.exit_code == 0 and "m.onnx: unverified" in kept.output, kept.output
    sidecar = read_sidecar(path)
    assert sidecar is not None and not sidecar.verified
    assert not all(check["passed"] for check in sidecar.parity)


def test_wrong_use(
    nano_graph: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.onnx"
    result = export(monkeypatch, nano_graph, target, "--precision", "int8")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "int8 needs photos like those to be ranked: give --calibrate DIR" in said
    folder = tmp_path / "photos"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), np.zeros((8, 8, 3), np.uint8))
    result = export(monkeypatch, nano_graph, target, "--calibrate", folder)
    assert result.exit_code == 2
    assert "calibration photos are for int8, got precision fp32" in result.output
    with pytest.raises(OptionError, match=f"at least {PHOTOS} calibration photos, got 31"):
        check_calibration([np.zeros((8, 8, 3), np.uint8)] * 31)
    assert not target.exists()
