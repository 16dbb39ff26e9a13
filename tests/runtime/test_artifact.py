"""Descriptions, sidecars, and the files they refuse."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dsgnn.runtime.artifact import (
    Description,
    Sidecar,
    open_artifact,
    read_sidecar,
    sha256_of,
    sidecar_path,
    write_sidecar,
)
from dsgnn.runtime.disk.onnx_file import check_whole, onnx_metadata
from dsgnn.runtime.errors import ArtifactError
from dsgnn.runtime.letterbox import Fixed, LongestSide
from dsgnn.runtime.ranker import Ranker

Write = Callable[..., Path]
DESCRIPTION = Description("nano", Fixed(448, 576), 5, 0.4, "fp32", "trained", "ab" * 32, "0.1.0")
SIZE = DESCRIPTION.to_dict()["input"]


def sidecar(path: Path, **changes: object) -> Sidecar:
    facts = Sidecar(
        file=path.name,
        sha256=sha256_of(path),
        verified=True,
        parity=({"check": "saliency", "largest": 1e-5, "batch": 3},),
        machine={"cpu": "x86_64"},
        build={"seconds": 1.5},
    )
    return replace(facts, **changes)


def test_description_as_json() -> None:
    assert json.loads(DESCRIPTION.to_json()) == {
        "schema": "dsgnn.artifact/1",
        "config": "nano",
        "input": {"rule": "fixed", "height": 448, "width": 576, "pad": 128, "colour": "rgb"},
        "queries": 5,
        "threshold": 0.4,
        "precision": "fp32",
        "weights": "trained",
        "source_sha256": "ab" * 32,
        "toolkit": "0.1.0",
    }


@pytest.mark.parametrize("rule", [Fixed(448, 576), LongestSide(576), LongestSide(640, 64)])
def test_description_round_trip(rule) -> None:
    described = replace(DESCRIPTION, input=rule)
    assert Description.from_json(described.to_json()) == described


def test_a_threshold_may_be_written_as_a_whole_number() -> None:
    assert Description.from_dict({**DESCRIPTION.to_dict(), "threshold": 0}).threshold == 0


@pytest.mark.parametrize("order", ["saliency", "attention"])
def test_attention_is_told(order: str) -> None:
    told = replace(DESCRIPTION, attention=True, order=order)
    assert Description.from_json(told.to_json()) == told
    facts = json.loads(told.to_json())
    assert (facts["attention"], facts["order"]) == (True, order)


def test_what_repeats_an_object_is_told_where_it_is_dropped() -> None:
    told = replace(DESCRIPTION, nms_iou=0.7)
    assert Description.from_json(told.to_json()) == told
    assert "nms_iou" not in DESCRIPTION.to_dict() and DESCRIPTION.nms_iou == 1


def test_nothing_is_told_of_attention_where_there_is_none() -> None:
    """Descriptions written before there was any are read, and written, as they were."""
    facts = json.loads(DESCRIPTION.to_json())
    assert not {"attention", "order"} & facts.keys()
    read = Description.from_dict(facts)
    assert (read.attention, read.order) == (False, "saliency")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"attention": "yes"}, "expects 'attention' to be true or false, got 'yes'"),
        ({"attention": True, "order": "size"}, "order must be one of saliency, attention, got"),
        ({"nms_iou": 0}, "nms_iou must be above 0 and at most 1, got 0"),
        ({"order": "attention"}, "the order is that of attention, but there is no"),
        (
            {"input": {**SIZE, "height": 0}},
            "the artifact's description: .* at least 1 pixel",
        ),
    ],
)
def test_facts_that_cannot_be(facts: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Description.from_dict({**DESCRIPTION.to_dict(), **facts})


def test_newer_facts_are_ignored() -> None:
    facts = DESCRIPTION.to_dict()
    assert Description.from_dict({**facts, "colour_of_the_sky": "blue"}) == DESCRIPTION


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp8"}, "precision must be one of fp32, w16, fp16, bf16, int8, got 'fp8'"),
        ({"weights": "random"}, "weights must be one of trained, .*, synthetic, got 'ran"),
        ({"queries": 0}, "queries ≥ 1 and a threshold of .*, got 0 and 0.4"),
        ({"threshold": 1.0}, "got 5 and 1.0"),
        (
            {"schema": "dsgnn.artifact/2"},
            "expected schema dsgnn.artifact/1, got 'dsgnn.artifact/2'",
        ),
        ({"input": {"rule": "crop", "pad": 128, "colour": "rgb"}}, "fixed or longest, got 'crop'"),
        ({"input": {"rule": "fixed", "pad": 0, "colour": "bgr"}}, "rgb padded with 128, got 'bgr'"),
        ({"input": {"rule": "fixed", "pad": 128, "colour": "rgb"}}, "description lacks 'height'"),
        ({"input": None}, "expects 'input' to be an object, got None"),
        ({"input": {**DESCRIPTION.to_dict()["input"], "width": "576"}}, "'width' .* got '576'"),
        ({"queries": "8"}, "description expects 'queries' to be a whole number, got '8'"),
        ({"queries": True}, "expects 'queries' to be a whole number, got True"),
        ({"threshold": None}, "expects 'threshold' to be a number, got None"),
        ({"config": 5}, "expects 'config' to be text, got 5"),
    ],
)
def test_description_refuses(change: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Description.from_dict({**DESCRIPTION.to_dict(), **change})


@pytest.mark.parametrize("name", ["config", "input", "queries", "threshold", "source_sha256"])
def test_description_misses_a_fact(name: str) -> None:
    facts = DESCRIPTION.to_dict()
    del facts[name]
    with pytest.raises(ArtifactError, match=f"the artifact's description lacks '{name}'"):
        Description.from_dict(facts)


def test_open_without_sidecar(model: Path) -> None:
    artifact = open_artifact(model)
    assert artifact.status == "unverified" and artifact.sidecar is None
    assert artifact.description.config == "colours"
    assert artifact.sha256 == sha256_of(model)


@pytest.mark.parametrize("verified", [True, False])
def test_open_with_sidecar(model: Path, verified: bool) -> None:
    written = sidecar(model, verified=verified, description=DESCRIPTION)
    write_sidecar(model, written)
    assert sidecar_path(model).name == "colours.onnx.json"
    assert read_sidecar(model) == written
    assert open_artifact(model).status == ("verified" if verified else "unverified")


def test_a_file_that_changed_since_its_sidecar(model: Path, write_model: Write) -> None:
    write_sidecar(model, sidecar(model))
    write_model(model, threshold=0.6)
    message = (
        "colours.onnx is not the file that colours.onnx.json describes: expected sha256 .*, got "
        ".*; export the checkpoint again, or delete the sidecar"
    )
    with pytest.raises(ArtifactError, match=message):
        open_artifact(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "colours.onnx.json: the sidecar is not JSON"),
        ("[1]", "colours.onnx.json: the sidecar must be a JSON object, got list"),
        ("{}", "expected schema dsgnn.sidecar/1, got None: it was made by another version"),
        ('{"schema": "dsgnn.sidecar/1", "file": "x"}', "the sidecar lacks 'sha256'"),
    ],
)
def test_damaged_sidecar(model: Path, text: str, message: str) -> None:
    sidecar_path(model).write_text(text)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parity": None}, "the sidecar expects 'parity' to be a list, got None"),
        ({"machine": "here"}, "the sidecar expects 'machine' to be an object, got 'here'"),
        ({"verified": "yes"}, "the sidecar expects 'verified' to be true or false, got 'yes'"),
        ({"description": []}, r"the sidecar expects 'description' to be an object, got \[\]"),
    ],
)
def test_a_sidecar_with_facts_of_another_kind(model: Path, change: dict, message: str) -> None:
    facts = json.loads(sidecar(model).to_json())
    sidecar_path(model).write_text(json.dumps({**facts, **change}))
    with pytest.raises(ArtifactError, match=f"colours.onnx.json: {message}"):
        open_artifact(model)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [DEEP, DEEP[:200], '{"a": ' * 60 + "1" + "}" * 60])
def test_a_sidecar_of_many_levels(model: Path, text: str) -> None:
    facts = json.loads(sidecar(model).to_json())
    for whole in (text, json.dumps(facts)[:-1] + f', "more": {text}' + "}"):
        sidecar_path(model).write_text(whole)
        with pytest.raises(ArtifactError, match="colours.onnx.json: the sidecar is not JSON"):
            open_artifact(model)


def test_metadata_of_many_levels(tmp_path: Path, write_model: Write) -> None:
    with pytest.raises(ArtifactError, match="description is not JSON: it is nested too deeply"):
        open_artifact(write_model(tmp_path / "a.onnx", metadata=DEEP))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files")
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socket"])
def test_a_sidecar_that_is_no_file(model: Path, kind: str) -> None:
    """Reading a pipe or a device may never end."""
    place = sidecar_path(model)
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            folder = os.getcwd()
            os.chdir(place.parent)
            bound.bind(place.name)
            os.chdir(folder)
    with pytest.raises(ArtifactError, match="colours.onnx.json: it is no file"):
        open_artifact(model)


def test_a_sidecar_of_many_bytes(model: Path) -> None:
    with sidecar_path(model).open("wb") as file:
        file.truncate(1 << 32)  # it takes no room on the disk
    with pytest.raises(ArtifactError, match="more than 16,777,216 bytes"):
        open_artifact(model)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_many_tiny_fields(tmp_path: Path, graph: bytes) -> None:
    """20 MB of them, in a process whose memory and time are bounded."""
    (tmp_path / "a.onnx").write_bytes(graph + b"\x08\x01" * 10_000_000)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from dsgnn.runtime.artifact import open_artifact\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (5, 5))\n"
        "try: open_artifact(Path(sys.argv[1]))\n"
        "except ValueError as error:\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    print(status.partition('VmHWM:')[2].split()[0], error)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "a.onnx"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kilobytes, _, message = done.stdout.partition(" ")
    assert int(kilobytes) < 200_000 and message.startswith("a.onnx is not an ONNX file")


def test_weights_in_another_file(model: Path, tmp_path: Path) -> None:
    """No hash covers them, so they could be changed: refused, also where the file says it oddly."""
    onnx = pytest.importorskip("onnx")
    saved = tmp_path / "apart.onnx"
    made = onnx.load(model)
    onnx.save(made, saved, save_as_external_data=True, location="apart.bin", size_threshold=0)
    with pytest.raises(ArtifactError, match="apart.onnx has weights in another file"):
        open_artifact(saved)
    canonical = saved.read_bytes()
    oddly = canonical.replace(b"\x08location", b"\x88\x80\x00location")
    assert oddly != canonical
    saved.write_bytes(oddly)
    with pytest.raises(ArtifactError, match="has weights in another file"):
        check_whole(saved)


def test_an_engine_inside_a_graph(model: Path) -> None:
    onnx = pytest.importorskip("onnx")
    made = onnx.load(model)
    made.graph.node.append(onnx.helper.make_node("EPContext", ["f"], ["x"], domain="com.microsoft"))
    onnx.save(made, model)
    with pytest.raises(ArtifactError, match="has an engine in another file"):
        open_artifact(model)


@pytest.mark.parametrize("word", ["location", "allocation", "EPContexts"])
def test_a_name_with_such_a_word(model: Path, word: str) -> None:
    """Only a whole text of this length counts."""
    onnx = pytest.importorskip("onnx")
    made = onnx.load(model)
    made.graph.doc_string = f"the {word} of"
    onnx.save(made, model)
    open_artifact(model)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_batch_that_was_fixed_afterwards(model: Path, backend: str) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip(backend)
    made = onnx.load(model)
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(made, model)
    with pytest.raises(ArtifactError, match="takes images of the shape uint8 .2, .* alone"):
        Ranker(model, backend)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model file at .*none\.onnx"):
        open_artifact(tmp_path / "none.onnx")


def test_an_onnx_file_of_somebody_else(tmp_path: Path, write_model: Write) -> None:
    path = write_model(tmp_path / "other.onnx", metadata=None)
    with pytest.raises(
        ArtifactError, match="other.onnx has no `dsgnn` metadata.*dsgnn-export onnx"
    ):
        open_artifact(path)


def test_metadata_that_is_no_json(tmp_path: Path, write_model: Write) -> None:
    path = write_model(tmp_path / "other.onnx", metadata="hello")
    with pytest.raises(ArtifactError, match="the artifact's description is not JSON"):
        open_artifact(path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"hello, this is text", b"\x00\x01" * 20])
def test_no_onnx_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="model.onnx is not an ONNX file, or it is damaged"):
        open_artifact(path)


def test_an_onnx_file_cut_short(model: Path) -> None:
    whole = model.read_bytes()
    for size in range(1, len(whole)):
        model.write_bytes(whole[:size])
        try:
            assert "dsgnn" not in onnx_metadata(model)  # the cut fell between two fields
        except ArtifactError as error:
            assert "cut short" in str(error)


@pytest.mark.parametrize("suffix", ["engine", "plan"])
def test_engines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(b"native code")
    for written in (None, sidecar(path)):  # the sidecar must hold the description
        if written:
            write_sidecar(path, written)
        with pytest.raises(ArtifactError, match=rf"m.{suffix} is native code.*keep m.{suffix}.js"):
            open_artifact(path)
    write_sidecar(path, sidecar(path, description=DESCRIPTION))
    assert open_artifact(path).description == DESCRIPTION
    path.write_bytes(b"other code")
    with pytest.raises(ArtifactError, match=r"got .*; build it again with `dsgnn-export tensorrt`"):
        open_artifact(path)


def test_other_suffix(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"expected a model file ending in \.onnx or \.engine, got m\.pth"
    ):
        open_artifact(tmp_path / "m.pth")


def test_metadata_is_what_onnx_reads(model: Path) -> None:
    onnx = pytest.importorskip("onnx")
    properties = onnx.load(model).metadata_props
    assert onnx_metadata(model) == {item.key: item.value for item in properties}
    assert set(onnx_metadata(model)) == {"dsgnn"}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "trained weights"),
        (
            {"origin": "mine (train), 6 iterations of 2 images"},
            "trained on mine (train), 6 iterations of 2 images",
        ),
        ({"weights": "published"}, "published weights"),
        ({"weights": "converted"}, "converted weights, origin unknown"),
        ({"weights": "synthetic"}, "synthetic weights, so the ranks mean nothing"),
    ],
)
def test_weights_in_words(facts: dict, words: str) -> None:
    described = replace(DESCRIPTION, **facts)
    assert described.about_weights == words
    assert Description.from_json(described.to_json()) == described


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parity": ({"photos": 51}, {"photos": 49})}, "gives PyTorch's answers on 49 photos"),
        (
            {"parity": ({"photos": 3, "against": "m.onnx"},)},
            "verified (gives the answers of m.onnx on 3 photos)",
        ),
        ({"parity": ()}, "verified"),
        ({"verified": False, "parity": ({"photos": 3},)}, "unverified"),
    ],
)
def test_what_verified_means_is_said(model: Path, changes: dict, words: str) -> None:
    write_sidecar(model, sidecar(model, **changes))
    assert words in open_artifact(model).about_status
    if "answers" not in words:
        assert open_artifact(model).about_status == words


def test_a_verdict_is_of_one_backend(model: Path) -> None:
    """What ONNX Runtime earned does not hold for OpenVINO, nor float32 for bfloat16."""
    checks = (
        {"photos": 9, "passed": True},  # as exports wrote them before
        {"photos": 8, "passed": True, "backend": "openvino on cpu, 2 threads"},
        {"photos": 8, "passed": True, "backend": "openvino-bf16 on cpu, 2 threads"},
        {"photos": 8, "passed": False, "backend": "openvino-bf16 on cpu, 2 threads"},
    )
    write_sidecar(model, sidecar(model, parity=checks))
    artifact = open_artifact(model)
    assert artifact.sidecar is not None
    verdicts = {"onnxruntime on cpu": True, "openvino on cpu": True, "openvino-bf16 on cpu": False}
    assert artifact.sidecar.verdicts() == verdicts
    assert json.loads(sidecar_path(model).read_text())["verdicts"] == verdicts
    assert artifact.status == artifact.status_in("openvino", "cpu") == "verified"
    there = artifact.about_status_in("openvino", "cpu")
    assert there == "verified (gives PyTorch's answers on 8 photos)"
    assert artifact.about_status == "verified (gives PyTorch's answers on 8 photos or more)"
    assert artifact.status_in("openvino-bf16", "cpu") == "unverified"
    assert artifact.about_status_in("openvino-bf16", "cpu") == (
        "unverified in openvino-bf16 on cpu (gives other answers there; verified in onnxruntime on "
        "cpu and openvino on cpu)"
    )
    assert artifact.about_status_in("onnxruntime", "cuda:0").startswith(
        "unverified in onnxruntime on cuda (never compared there; verified in "
    )


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-cuda-graph"])
def test_a_cuda_graph_is_the_same_engine(model: Path, backend: str) -> None:
    checks = ({"photos": 9, "passed": True, "backend": "tensorrt on cuda:0 (auto: an engine)"},)
    for parity in (checks, ()):
        build = {"flavour": "tensorrt"}
        write_sidecar(model, sidecar(model, parity=parity, build=build))
        assert open_artifact(model).status_in(backend, "cuda:1") == "verified"
        assert open_artifact(model).status_in("onnxruntime", "cpu") == "unverified"
