"""The Triton repository against Triton's own schema and protocol, on a stand-in for the server.

The stand-in serves the gRPC protocol on loopback with the service code of tritonclient, and runs
what the repository holds with ONNX Runtime: so the client meets everything but Triton itself.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import colours_graph
from tritonclient.grpc import model_config_pb2 as schema
from tritonclient.grpc import service_pb2, service_pb2_grpc

from dsgnn.export.cli import main
from dsgnn.export.triton import check_config, read_config, write_repository
from dsgnn.runtime import Ranker
from dsgnn.runtime.artifact import (
    METADATA_KEY,
    Description,
    Sidecar,
    open_artifact,
    sha256_of,
    write_sidecar,
)
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.backends.triton import TritonRanker
from dsgnn.runtime.errors import ArtifactError, BackendError
from dsgnn.runtime.letterbox import Fixed, LongestSide, Rule

COLOURS = Path(__file__).parents[1] / "runtime" / "colours.onnx"


def description(rule: Rule = Fixed(96, 128), **facts: Any) -> Description:  # noqa: B008
    own = {"config": "colours", "input": rule, "queries": 5, "threshold": 0.5, "precision": "fp32"}
    rest = {"weights": "trained", "source_sha256": "0" * 64, "toolkit": "0.1.0"}
    return Description(**{**own, **rest, **facts})


@pytest.fixture
def colours(tmp_path: Path) -> Callable[..., Path]:
    """colours(**facts): the smallest artifact, with changed facts."""

    def write(rule: Rule = Fixed(96, 128), **facts: Any) -> Path:  # noqa: B008
        proto = onnx.load(COLOURS)
        proto.metadata_props.add(key=METADATA_KEY, value=description(rule, **facts).to_json())
        onnx.save(proto, tmp_path / "colours.onnx")
        return tmp_path / "colours.onnx"

    return write


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Path]:
    """engine(name, **build): a file with the sidecar of a TensorRT engine."""

    def write(name: str, **build: Any) -> Path:
        path = tmp_path / name
        path.write_bytes(name.encode())
        known = {"flavour": "tensorrt", "version": "10.12.0", "gpu": "NVIDIA L4", "sm": 89}
        facts = {**known, "profile": {"batch": [1, 4, 8]}, **build}
        facts = {key: value for key, value in facts.items() if value is not None}
        about = Sidecar(name, sha256_of(path), True, build=facts, description=description())
        write_sidecar(path, about)
        return path

    return write


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The two calls that the client makes; `batches` notes the size of each inference."""

    def __init__(self, repository: Path) -> None:
        self.repository, self.batches = repository, list[int]()

    def ModelConfig(self, request: Any, context: Any) -> Any:
        folder = self.repository / request.name
        if not folder.is_dir():
            context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model '{request.name}'")
        return service_pb2.ModelConfigResponse(config=read_config(folder / "config.pbtxt"))

    def ModelInfer(self, request: Any, context: Any) -> Any:
        folder = self.repository / request.model_name
        config = read_config(folder / "config.pbtxt")
        (tensor,) = request.inputs
        batch, *sides = tensor.shape
        (declared,) = config.input
        assert batch <= config.max_batch_size and tensor.datatype == "UINT8"
        assert all(want in (-1, got) for want, got in zip(declared.dims, sides, strict=True))
        self.batches.append(batch)
        image = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(tensor.shape)
        backend = open_backend(folder / "1" / config.default_model_filename)
        results = backend.infer({tensor.name: image})
        reply = service_pb2.ModelInferResponse(model_name=request.model_name)
        for wanted in request.outputs:
            value = results[wanted.name]
            reply.outputs.add(name=wanted.name, datatype="FP32", shape=value.shape)
            reply.raw_output_contents.append(value.tobytes())
        return reply


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Server, str]]:
    """A server of tmp_path/repository and its address."""
    servicer = Server(tmp_path / "repository")
    running = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield servicer, f"127.0.0.1:{port}"
    running.stop(0).wait()


@pytest.mark.parametrize("rule", [Fixed(96, 128), LongestSide(128)])
def test_an_onnx_file(rule: Rule, colours: Callable[..., Path], tmp_path: Path) -> None:
    source = colours(rule)
    write_sidecar(source, Sidecar(source.name, sha256_of(source), verified=True))
    arguments = [
        "triton",
        str(source),
        "-o",
        str(tmp_path / "repository"),
        "--instances",
        "2",
        "--max-batch",
        "4",
        "--delay",
        "2.5",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "repository" / "colours"
    assert [p.name for p in folder.parent.iterdir()] == ["colours"]  # nothing half-written
    config = read_config(folder / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("colours", "onnxruntime", 4)
    assert config.dynamic_batching.max_queue_delay_microseconds == 2500
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, group.KIND_CPU)
    sides = [96, 128] if isinstance(rule, Fixed) else [-1, -1]
    masks = [24, 32] if isinstance(rule, Fixed) else [-1, -1]
    assert [(t.name, t.data_type, list(t.dims)) for t in (*config.input, *config.output)] == [
        ("image", schema.TYPE_UINT8, [*sides, 3]),
        ("saliency", schema.TYPE_FP32, [5]),
        ("score", schema.TYPE_FP32, [5]),
        ("masks", schema.TYPE_FP32, [5, *masks]),
    ]
    warm_up = [(w.batch_size, list(w.inputs["image"].dims)) for w in config.model_warmup]
    assert warm_up == [(1, [96, 128, 3]), (4, [96, 128, 3])]
    copy = open_artifact(folder / "1" / "model.onnx")
    assert (copy.status, copy.sha256) == ("verified", sha256_of(source))
    carried = Sidecar.from_json(config.parameters["dsgnn"].string_value)
    assert carried.verified and carried.description == description(rule)


def test_engines_by_generation(engine: Callable[..., Path], tmp_path: Path) -> None:
    sources = [engine("l4.engine"), engine("a100.plan", sm=80, profile={"batch": [1, 2, 16]})]
    folder = write_repository(sources, tmp_path / "repository", "sor")
    config = read_config(folder / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("sor", "tensorrt", 8)
    assert dict(config.cc_model_filenames) == {"8.9": "sm89.plan", "8.0": "sm80.plan"}
    assert [group.kind for group in config.instance_group] == [schema.ModelInstanceGroup.KIND_GPU]
    for name, source in (("sm89.plan", sources[0]), ("sm80.plan", sources[1])):
        assert open_artifact(folder / "1" / name).sha256 == sha256_of(source)


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "another size": lambda c: c.input[0].dims.__setitem__(0, 128),
    "any size": lambda c: c.input[0].dims.__setitem__(1, -1),
    "more queries": lambda c: c.output[1].dims.__setitem__(0, 6),
    "larger masks": lambda c: c.output[2].dims.__setitem__(2, 128),
    "a side less": lambda c: c.output[2].dims.pop(),
    "float images": lambda c: setattr(c.input[0], "data_type", schema.TYPE_FP32),
    "half scores": lambda c: setattr(c.output[1], "data_type", schema.TYPE_FP16),
    "another name": lambda c: setattr(c.output[0], "name", "rank"),
    "a tensor less": lambda c: c.output.pop(),
    "a tensor more": lambda c: c.output.add(name="x", data_type=schema.TYPE_FP32, dims=[5]),
    "an input as an output": lambda c: (
        c.input.pop(),
        c.output.add(name="image", data_type=schema.TYPE_UINT8, dims=[96, 128, 3]),
    ),
    "another description": lambda c: setattr(
        c.parameters["dsgnn"],
        "string_value",
        c.parameters["dsgnn"].string_value.replace('"threshold": 0.5', '"threshold": 0.6'),
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_configuration_is_found(
    mutation: str, colours: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_repository([colours()], tmp_path / "repository")
    config = read_config(folder / "config.pbtxt")
    check_config(config, description())
    MUTATIONS[mutation](config)
    with pytest.raises(ArtifactError, match="colours does not fit its artifact|colours carries"):
        check_config(config, description())


@pytest.mark.parametrize(
    "facts",
    [{"input": Fixed(96, 160)}, {"input": LongestSide(128)}, {"queries": 4}, {"threshold": 0.4}],
)
def test_a_mutated_description_is_found(
    facts: dict, colours: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_repository([colours()], tmp_path / "repository")
    with pytest.raises(ArtifactError):
        check_config(read_config(folder / "config.pbtxt"), replace(description(), **facts))


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text('name: "x" max_batch: 8')
    with pytest.raises(ArtifactError, match='is no configuration.*no field named "max_batch"'):
        read_config(tmp_path / "config.pbtxt")


def test_the_client_gives_the_rankers_answers(
    colours: Callable[..., Path], tmp_path: Path, server: tuple[Server, str]
) -> None:
    servicer, url = server
    source = colours(LongestSide(128))
    write_repository([source], tmp_path / "repository", "sor", max_batch=2)
    rng = np.random.default_rng(0)
    photos = []
    for h, w in ((48, 64), (90, 120), (64, 48), (48, 64), (200, 30)):
        photo = np.full((h, w, 3), 128, np.uint8)
        y, x = rng.integers(0, (h // 2, w // 2))
        photo[y : y + h // 3, x : x + w // 3] = (230, 20, 20)
        photo[h // 2 :, : w // 4] = (20, 20, 230)
        photos.append(photo)
    local, remote = Ranker(source), pickle.loads(pickle.dumps(TritonRanker("sor", url)))
    got, expected = remote.batch(photos), local.batch(photos)
    assert [ranking.to_dict() for ranking in got] == [ranking.to_dict() for ranking in expected]
    assert any(ranking.objects for ranking in got)
    assert sorted(servicer.batches) == [1, 1, 1, 2]  # by padded size, max_batch at most
    with ThreadPoolExecutor(3) as pool:  # a client for each thread
        assert [r.to_dict() for r in pool.map(remote, photos)] == [r.to_dict() for r in expected]
    facts = remote.describe()
    assert (facts["backend"], facts["device"], facts["status"]) == ("triton", url, "unverified")
    assert facts["sha256"] == sha256_of(source)
    every = TritonRanker("sor", url, threshold=0.9999, if_none="all")
    assert len(every(photos[0]).objects) == 5


def test_attention_passes_through_a_server(tmp_path: Path, server: tuple[Server, str]) -> None:
    source = tmp_path / "gaze.onnx"
    proto = onnx.load_model_from_string(colours_graph(attention=True))
    facts = description(LongestSide(128), attention=True, order="attention")
    proto.metadata_props.add(key=METADATA_KEY, value=facts.to_json())
    onnx.save(proto, source)
    folder = write_repository([source], tmp_path / "repository", "gaze")
    outputs = {t.name: list(t.dims) for t in read_config(folder / "config.pbtxt").output}
    assert outputs["attention"] == [-1, -1]
    photo = np.full((48, 64, 3), 128, np.uint8)
    photo[10:40, 30:60] = (20, 20, 230)
    got, expected = TritonRanker("gaze", server[1])(photo), Ranker(source)(photo)
    assert got.objects[0].attention == expected.objects[0].attention == got.objects[0].saliency
    np.testing.assert_array_equal(got.attention, expected.attention)


def test_the_client_refuses(
    colours: Callable[..., Path], tmp_path: Path, server: tuple[Server, str]
) -> None:
    _, url = server
    with pytest.raises(BackendError, match=f"no model sor at {url}: unknown model 'sor'"):
        TritonRanker("sor", url)
    with pytest.raises(BackendError, match="no model sor at 127.0.0.1:1: "):
        TritonRanker("sor", "127.0.0.1:1", timeout_s=5)
    folder = write_repository([colours()], tmp_path / "repository", "sor")
    with pytest.raises(ValueError, match="threshold must be .*, got 7"):
        TritonRanker("sor", url, threshold=7)
    path = folder / "config.pbtxt"
    good = path.read_text()
    path.write_text(good.replace("dims: 96", "dims: 64"))
    with pytest.raises(ArtifactError, match=r"expected image to be uint8 \(any, 96, 128, 3\), got"):
        TritonRanker("sor", url)
    path.write_text(good.replace('key: "dsgnn"', 'key: "other"'))
    with pytest.raises(ArtifactError, match="has no parameter `dsgnn`, so it was not made by this"):
        TritonRanker("sor", url)


def test_what_triton_cannot_run(
    colours: Callable[..., Path], engine: Callable[..., Path], tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    rtx = engine("rtx.engine", flavour="tensorrt-rtx", sm=None, sms=[89])
    static = engine("static.engine", profile={"batch": [1, 1, 1]})
    old = engine("old.engine", sm=None)
    apart = engine("apart.engine", deform="apart")
    good, twice = engine("good.engine"), engine("twice.engine")
    onnx_file = colours()
    for sources, options, message in (
        ([rtx], {}, "rtx.engine is no engine of TensorRT, the only kind that Triton runs"),
        ([static], {}, r"takes batches of \[1, 1, 1\], Triton makes them from one up: build it"),
        ([apart], {}, "apart.engine has outputs that only keep its layers apart"),
        ([old], {}, r"does not say for which generation of GPUs it was built \(no sm\)"),
        ([good, twice], {}, "twice.engine is a second engine for SM89: give one of each"),
        ([good], {"max_batch": 4}, "good.engine has its batches built in: give no largest batch"),
        ([onnx_file, good], {}, "expected one ONNX file, or engines alone, got colours.onnx, good"),
        ([onnx_file], {"instances": 0}, "at least 1 and a delay of at least 0 ms, got 1 files, "),
    ):
        with pytest.raises(ValueError, match=message):
            write_repository(sources, repository, **options)
    other = engine("other.engine", sm=80)
    facts = json.loads((tmp_path / "other.engine.json").read_text())
    facts["description"]["threshold"] = 0.25
    (tmp_path / "other.engine.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="other.engine is of another network than good.engine"):
        write_repository([good, other], repository)
    with pytest.raises(ArtifactError, match="the graph does not fit its description: expected sal"):
        write_repository([colours(queries=7)], repository)
    assert not repository.exists() or not list(repository.iterdir())
    write_repository([colours()], repository)
    with pytest.raises(
        FileExistsError, match="colours exists: delete it, or give the model another nam"
    ):
        write_repository([colours()], repository)
