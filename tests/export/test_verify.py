"""`dsgnn-export verify` and `inspect` on files that are right, wrong, or somebody else's."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from dsgnn.config import CONFIGS
from dsgnn.export import verify as verify_module
from dsgnn.export.cli import main
from dsgnn.export.onnx import ExportSource, describe
from dsgnn.export.parity.comparison import compare, folder_photos
from dsgnn.model import build_model
from dsgnn.runtime import samples
from dsgnn.runtime.artifact import METADATA_KEY, read_sidecar, sha256_of, sidecar_path
from dsgnn.runtime.images import read_image
from dsgnn.runtime.ranker import BUNDLED
from dsgnn.weights.checkpoint import save_checkpoint

from .test_deploy import shake, small

SIZE = (64, 96)
QUERIES = CONFIGS["nano"].queries


def dsgnn_export(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def put_facts(proto: onnx.ModelProto, path: Path, **facts: object) -> Path:
    """The graph as an artifact, with changed facts."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    source = ExportSource(build_model("nano"), "trained", "0" * 64)
    made.metadata_props.add(
        key=METADATA_KEY, value=replace(describe(source, SIZE), **facts).to_json()
    )
    onnx.save(made, path)
    return path


@pytest.fixture(scope="module")
def nano(
    nano_source: ExportSource, nano_graph: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, onnx.ModelProto]:
    path = tmp_path_factory.mktemp("nano") / "nano.safetensors"
    save_checkpoint(path, nano_source.model)
    return path, nano_graph


def test_a_file_without_sidecar_becomes_verified(nano, tmp_path: Path) -> None:
    checkpoint, proto = nano
    path = put_facts(proto, tmp_path / "m.onnx", source_sha256=sha256_of(checkpoint))
    assert "status      unverified: no sidecar" in dsgnn_export("inspect", path).output
    result = dsgnn_export("verify", path, "--against", checkpoint, "--backend", "onnxruntime")
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith("m.onnx: verified")
    sidecar = read_sidecar(path)
    assert sidecar is not None and sidecar.verified and sidecar.sha256 == sha256_of(path)
    checks = [(check["check"], check["batch"]) for check in sidecar.parity]
    assert checks == [("photos", 1), ("photos", 3), ("slots", 8), ("threads", 1)]
    assert sidecar.parity[0]["against"] == checkpoint.name
    assert sidecar.parity[0]["backend"].startswith("onnxruntime on cpu")
    said = dsgnn_export("inspect", path).output
    assert "m.onnx: nano, fp32, trained weights" in said
    assert (
        "status      verified (gives PyTorch's answers on 6 photos), on " in said
        and "opset 18" in said
    )
    assert "input     image: uint8 (batch, 64, 96, 3)" in said
    assert f"output    masks: float (batch, {QUERIES}, 16, 24)" in said
    conv = sum(node.op_type == "Conv" for node in proto.graph.node)
    assert f"Conv {conv}" in said and sha256_of(path) in said
    assert "batch photos objects" in said  # the table


def test_a_backend_has_a_verdict_of_its_own(
    nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 fails its limits, and float32 in the same file stays verified, whoever is last."""
    path = put_facts(nano[1], tmp_path / "m.onnx")
    real = verify_module.open_backend
    limits: list[str] = []

    def open_any(artifact: Path, backend: str, device: str) -> object:
        opened = real(artifact, "onnxruntime", device)
        if backend != "openvino-bf16":
            return opened
        return SimpleNamespace(
            name=backend,
            on_cpu={"Shape": 2},
            picked=f"{backend} on cpu, 2 threads",
            infer=lambda feeds: {n: 2 * v for n, v in opened.infer(feeds).items()},
        )

    def gate(reference, candidate, photos, about, build):  # type: ignore[no-untyped-def]
        limits.append(about.precision)
        return compare(reference, candidate, photos[:1], about, (1,))

    monkeypatch.setattr(verify_module, "open_backend", open_any)
    monkeypatch.setattr(verify_module, "gate", gate)
    for backend in ("openvino-bf16", "onnxruntime", "openvino-bf16"):
        result = dsgnn_export("verify", path, "--against", path, "--backend", backend)
        assert result.exit_code == (backend == "openvino-bf16"), result.output
    assert limits == ["bf16", "fp32", "bf16"]
    sidecar = read_sidecar(path)
    assert sidecar is not None and sidecar.verified and len(sidecar.parity) == 2
    assert sidecar.verdicts() == {"onnxruntime on cpu": True, "openvino-bf16 on cpu": False}
    said = dsgnn_export("inspect", path).output
    assert "onnxruntime on cpu, computed in fp32: verified" in said
    assert "openvino-bf16 on cpu, computed in bf16: gives other answers" in said
    assert "left to the CPU, none of which takes time: 2 Shape" in said
    assert "status      verified (gives the answers of m.onnx on 1 photos), on " in said


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_onnx_file_is_a_reference_too(nano, tmp_path: Path, backend: str) -> None:
    good = put_facts(nano[1], tmp_path / "good.onnx")
    other = put_facts(nano[1], tmp_path / "other.onnx")
    result = dsgnn_export("verify", other, "--against", good, "--backend", backend)
    assert result.exit_code == 0, result.output
    assert read_sidecar(other).verified and not sidecar_path(good).exists()


def broken_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    broken = onnx.ModelProto()
    broken.CopyFrom(proto)
    tensor = next(
        t for t in broken.graph.initializer if t.name.endswith("pixels.decoder.fuse.0.weight")
    )
    value = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.flip(value).copy(), tensor.name))
    return broken


def test_failing_loses_the_verdict(nano, tmp_path: Path) -> None:
    checkpoint, proto = nano
    path = put_facts(
        broken_weights(proto), tmp_path / "m.onnx", source_sha256=sha256_of(checkpoint)
    )
    result = dsgnn_export("verify", path, "--against", checkpoint)
    assert result.exit_code == 1, result.output
    assert "FAILED" in result.output and "--deform gather" in result.output
    sidecar = read_sidecar(path)
    assert sidecar is not None and not sidecar.verified and sidecar.parity[0]["failures"]
    said = dsgnn_export("inspect", path).output
    assert "unverified: the checks below failed" in said and "FAILED" in said


def test_synthetic_is_only_reported_below_float32(nano, tmp_path: Path) -> None:
    checkpoint, proto = nano
    facts = {"weights": "synthetic", "precision": "fp16", "source_sha256": sha256_of(checkpoint)}
    path = put_facts(broken_weights(proto), tmp_path / "m.onnx", **facts)
    result = dsgnn_export("verify", path, "--against", checkpoint)
    assert result.exit_code == 0 and "FAILED" in result.output
    assert result.output.rstrip().endswith("m.onnx: unverified")
    assert not read_sidecar(path).verified


def test_references_of_another_network(nano, tmp_path: Path) -> None:
    path = put_facts(nano[1], tmp_path / "m.onnx")
    other = put_facts(nano[1], tmp_path / "o.onnx", config="other")
    result = dsgnn_export("verify", path, "--against", other)
    assert result.exit_code == 2 and "o.onnx is of another network or input size" in result.output
    save_checkpoint(tmp_path / "small.safetensors", shake(build_model(small("r50-assr"))))
    result = dsgnn_export("verify", path, "--against", tmp_path / "small.safetensors")
    assert result.exit_code == 2
    assert f"expected nano with {QUERIES} queries, got r50-assr with 5" in result.output
    assert not sidecar_path(path).exists()


def test_a_reference_of_other_weights_says_nothing_of_the_artifact(nano, tmp_path: Path) -> None:
    checkpoint, proto = nano
    path = put_facts(proto, tmp_path / "m.onnx", source_sha256="ab" * 32)
    other = put_facts(proto, tmp_path / "o.onnx", source_sha256="cd" * 32)
    for against, sha256 in ((checkpoint, sha256_of(checkpoint)), (other, "cd" * 32)):
        result = dsgnn_export("verify", path, "--against", against)
        assert result.exit_code == 2
        assert f"expected the checkpoint of sha256 {'ab' * 32}, got {sha256}" in result.output
    assert not sidecar_path(path).exists()


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_files_that_are_no_artifact(tmp_path: Path, command: str) -> None:
    more = ["--against", tmp_path / "some.pth"] if command == "verify" else []
    (tmp_path / "some.pth").touch()
    assert "no model file at" in dsgnn_export(command, tmp_path / "none.onnx", *more).output
    (tmp_path / "text.onnx").write_text("hello, this is text")
    result = dsgnn_export(command, tmp_path / "text.onnx", *more)
    assert result.exit_code == 2 and "text.onnx is not an ONNX file" in result.output


@pytest.mark.parametrize(
    ("command", "name"),
    [("onnx", "m.onnx"), ("tensorrt", "m.engine"), ("round", "m.safetensors")],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path, command, name) -> None:
    source = tmp_path / "empty"  # so that whatever is done with it would fail
    source.touch()
    result = dsgnn_export(command, source, "-o", tmp_path / "absent" / name)
    assert result.exit_code == 2 and f"absent to write {name} in" in result.output
    result = dsgnn_export(command, source, "-o", tmp_path / "m.txt")
    assert result.exit_code == 2 and "the output must end in ." in result.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"iou_min": None}, "has None as 'iou_min', expected float"),
        ({"batch": "1"}, "has '1' as 'batch', expected int"),
        ({"failures": 3}, "has 3 as 'failures'"),
        ({"on_cpu": [1]}, None),
    ],
)
def test_a_damaged_comparison_in_a_sidecar(tmp_path: Path, change: dict, said: str | None) -> None:
    """It is refused with its field's name; what does not belong to a record is passed over."""
    path = tmp_path / "nano.onnx"
    path.symlink_to(BUNDLED)
    facts = json.loads(sidecar_path(BUNDLED).read_text())
    facts["parity"][0] |= change
    sidecar_path(path).write_text(json.dumps(facts))
    result = dsgnn_export("inspect", path)
    assert result.exit_code == (2 if said else 0), result.output
    assert said is None or said in " ".join(result.output.split())


def test_photos_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, broken = samples()[0], tmp_path / "deep" / "broken.png"
    (tmp_path / "deep").mkdir()
    (tmp_path / "notes.txt").write_text("no image, and not named like one")
    broken.write_bytes(good.read_bytes()[:100])
    with pytest.raises(FileNotFoundError, match="holds no readable image"):
        folder_photos(tmp_path)
    (tmp_path / "deep" / "a.jpg").write_bytes(good.read_bytes())
    (photo,) = folder_photos(tmp_path)
    np.testing.assert_array_equal(photo, read_image(good))
    (record,) = caplog.records
    assert "1 left out: " in record.getMessage() and "broken.png" in record.getMessage()
