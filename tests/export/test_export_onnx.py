"""From a checkpoint to a verified ONNX file, and what the gate refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from dsgnn.config import CONFIGS
from dsgnn.export.cli import main
from dsgnn.export.onnx import (
    ExportSource,
    backend_infer,
    describe,
    described,
    export_onnx,
    read_source,
    strip_traces,
    torch_infer,
)
from dsgnn.export.parity.comparison import compare, parity_photos
from dsgnn.export.parity.limits import ParityError
from dsgnn.model import build_model
from dsgnn.runtime import Ranker
from dsgnn.runtime.artifact import read_description
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.letterbox import Fixed, LongestSide
from dsgnn.weights.checkpoint import save_checkpoint

SIZE = (64, 96)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    return parity_photos()


def test_command_writes_a_verified_file(nano_exported: Path) -> None:
    target = nano_exported / "nano.onnx"
    assert "nano.onnx: verified" in (nano_exported / "output.txt").read_text()
    model = onnx.load(target)
    sides = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ["batch", 64, 96, 3]
    assert [o.name for o in model.graph.output] == ["saliency", "score", "masks", "attention"]
    assert model.opset_import[0].version == 18
    description = read_description(target)
    assert (description.config, description.input) == ("nano", Fixed(64, 96))
    assert description.about_weights == "trained on mine (train), 6 iterations"
    sidecar = json.loads((nano_exported / "nano.onnx.json").read_text())
    assert sidecar["schema"] == "dsgnn.sidecar/1" and sidecar["verified"] is True
    *against_pytorch, slots, threads = sidecar["parity"]
    assert [check["batch"] for check in against_pytorch] == [1, 3]
    assert slots["passed"] and threads["passed"]
    assert all(check["photos"] == 6 and check["passed"] for check in against_pytorch)
    assert sidecar["verdicts"] == {"onnxruntime on cpu": True}
    assert sidecar["machine"]["libraries"]["torch"] and sidecar["build"]["nodes"] > 100
    ranker = Ranker(target, if_none="all")
    together = ranker.batch(parity_photos())
    for photo, ranking in zip(parity_photos(), together, strict=True):
        alone = ranker(photo)
        assert [o.query for o in alone.objects] == [o.query for o in ranking.objects]
        for a, b in zip(alone.objects, ranking.objects, strict=True):
            assert a.saliency == pytest.approx(b.saliency, abs=1e-4)


def test_no_trace_of_this_machine_is_in_the_file(small_graph: onnx.ModelProto) -> None:
    """PyTorch notes for each node the lines of source that made it, with their paths."""
    data = small_graph.SerializeToString()
    for trace in (b"stack_trace", b"pkg.torch", b".py", str(Path.cwd()).encode()):
        assert trace not in data
    noted = onnx.ModelProto()
    noted.CopyFrom(small_graph)
    noted.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value=__file__)
    noted.graph.value_info[0].metadata_props.add(key="pkg.torch.onnx.original", value=__file__)
    strip_traces(noted)
    assert noted == small_graph


def test_half_weights_of_any_size(tmp_path: Path, photos: list[np.ndarray]) -> None:
    """A checkpoint rounded first gives a file of half the size and the same answers."""
    torch.manual_seed(3)
    # Random weights of a deeper backbone magnify the rounding of batches.
    # Of random weights many masks are alike.
    model = build_model(replace(CONFIGS["nano"], backbone="efficientnet_lite0", nms_iou=1.0)).eval()
    for norm in model.backbone.batch_norms():  # so that folding it changes the convolution
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        before = model.pixel_decoder(model.backbone(images))[0]
    save_checkpoint(tmp_path / "nano.safetensors", model)
    command = ["round", str(tmp_path / "nano.safetensors"), "-o", str(tmp_path / "r.safetensors")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    source = read_source(tmp_path / "r.safetensors")
    for parameter in source.model.parameters():
        assert parameter.numel() < 1024 or torch.equal(parameter, parameter.half().float())
    with torch.no_grad():
        after = source.model.pixel_decoder(source.model.backbone(images))[0]
    assert 0 < (after - before).abs().max() < 0.005 * before.abs().max()
    path = tmp_path / "half.onnx"
    sidecar, results = export_onnx(source, path, photos, None, "w16")
    assert sidecar.verified
    assert max(result.saliency_max for result in results) < 0.1
    assert read_description(path).input == LongestSide(model.config.size)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "Conv" in operators and "BatchNormalization" not in operators
    weights = sum(p.numel() for p in model.parameters())
    assert path.stat().st_size < 2.2 * weights  # bytes; float32 would take 4
    assert len(Ranker(path, threshold=0.0)(photos[0]).objects) == model.config.queries


def test_attention_is_an_output_that_the_gate_compares(
    nano_exported: Path, nano_source: ExportSource, photos: list[np.ndarray]
) -> None:
    """From the network to a ranking whose shares order the objects; a map that lies elsewhere on
    the photo does not pass."""
    path, model = nano_exported / "nano.onnx", nano_source.model
    sidecar = json.loads((nano_exported / "nano.onnx.json").read_text())
    assert all(0 <= check["attention_moved"] < 1e-4 for check in sidecar["parity"])
    assert [output.name for output in onnx.load(path).graph.output][-1] == "attention"
    ranking = Ranker(path, if_none="all")(photos[0])
    assert ranking.attention is not None and ranking.attention.sum() == pytest.approx(1, abs=1e-5)
    shares = [item.attention for item in ranking.objects]
    assert shares == sorted(shares, reverse=True) and max(shares) > 0
    assert [item.saliency for item in ranking.objects] == shares

    def mirrored(images: np.ndarray) -> dict[str, np.ndarray]:
        answers = torch_infer(model)(images)
        return {**answers, "attention": answers["attention"][:, :, ::-1]}

    description = read_description(path)
    for result in compare(torch_infer(model), mirrored, photos, description):
        assert "of the attention is elsewhere" in "; ".join(result.failures)
    assert all(
        r.passed for r in compare(torch_infer(model), torch_infer(model), photos, description)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--synthetic", "nano", "--size", "100x100"], "multiples of 32, got 100x100"),
        (["--synthetic", "nano", "--size", "big"], "expected HxW such as 448x576"),
        (["--synthetic", "nano", "--size", "²x³"], "32, got ²x³; or give dynamic"),
        (["--synthetic", "huge"], "unknown configuration 'huge'"),
        ([], "give either a checkpoint or --synthetic CONFIG"),
        (["missing.safetensors"], "'missing.safetensors' does not exist"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["onnx", *arguments, "-o", str(tmp_path / "m.onnx")])
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


def nearest(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "GridSample":
            mode = next(a for a in node.attribute if a.name == "mode")
            assert mode.s in (b"bilinear", b"linear")
            mode.s = b"nearest"


def swapped(model: onnx.ModelProto) -> None:
    """saliency and score exchanged."""
    names = {"saliency": "score", "score": "saliency"}
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            node.output[i] = names.get(name, name)


def one_matrix(model: onnx.ModelProto) -> None:
    tensor = next(
        t for t in model.graph.initializer if t.name == "backbone.body.layer4.0.conv2.weight"
    )
    value = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(-value, tensor.name))


def mixes_up_the_batch(model: onnx.ModelProto) -> None:
    """Every photo of a batch gets the first one's saliency."""
    for node in model.graph.node:
        for i, name in enumerate(node.output):
            if name == "saliency":
                node.output[i] = "own"
    add = onnx.helper.make_node
    zero = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "first_image")
    model.graph.initializer.append(zero)
    model.graph.node.extend(
        [
            add("Gather", ["own", "first_image"], ["first"], axis=0),
            add("Shape", ["own"], ["shape"]),
            add("Expand", ["first", "shape"], ["saliency"]),
        ]
    )


@pytest.mark.parametrize(
    ("fault", "batch", "message"),
    [
        (nearest, 1, "mask"),
        (swapped, 1, "saliency differs"),
        (one_matrix, 1, "saliency differs"),
        (mixes_up_the_batch, 3, "saliency differs"),
    ],
)
def test_the_gate_catches(
    fault: Callable[[onnx.ModelProto], None],
    batch: int,
    message: str,
    small_source: ExportSource,
    small_graph: onnx.ModelProto,
    photos: list[np.ndarray],
    tmp_path: Path,
) -> None:
    description = describe(small_source, SIZE)
    reference = torch_infer(small_source.model)

    def check(model: onnx.ModelProto) -> list:
        path, own = tmp_path / "m.onnx", onnx.ModelProto()
        own.CopyFrom(model)
        onnx.save(described(own, description), path)
        return compare(
            reference, backend_infer(open_backend(path, "onnxruntime")), photos, description
        )

    assert all(result.passed for result in check(small_graph))
    broken = onnx.ModelProto()
    broken.CopyFrom(small_graph)
    fault(broken)
    results = {result.batch: result for result in check(broken)}
    assert not results[batch].passed
    assert message in "; ".join(results[batch].failures)
    if batch > 1:  # one photo at a time shows nothing
        assert results[1].passed


def test_a_failing_export_leaves_nothing(
    small_source: ExportSource,
    small_graph: onnx.ModelProto,
    photos: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dsgnn.export.onnx.build_onnx", lambda *_: small_graph)
    monkeypatch.setattr(
        "dsgnn.export.onnx.torch_infer",
        lambda model: (
            lambda images: {name: value + 1 for name, value in torch_infer(model)(images).items()}
        ),
    )
    old = tmp_path / "m.onnx"
    old.write_text("what was here before")
    with pytest.raises(ParityError, match=r"(?s)was not written\..*another precision.*FAILED"):
        export_onnx(small_source, old, photos, SIZE)
    assert old.read_text() == "what was here before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
