"""Write artifacts as a model repository for Triton Inference Server.

    REPO/NAME/config.pbtxt     batching, instances, warm-up, shapes, and the artifact's description
    REPO/NAME/1/model.onnx     the ONNX file, or
    REPO/NAME/1/sm89.plan      an engine for each generation of GPUs, of which Triton picks one
    REPO/NAME/1/….json         the sidecar of each of these files

The configuration is written and read back with Triton's own schema, and its shapes and types are
compared with the artifact's description. It has not met a real server, because none was at hand.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from dsgnn.runtime.artifact import (
    ENGINES,
    Artifact,
    Description,
    Sidecar,
    open_artifact,
    write_sidecar,
)
from dsgnn.runtime.backends import DEFAULT_THREADS
from dsgnn.runtime.backends.triton import PARAMETER, specs
from dsgnn.runtime.errors import ArtifactError, OptionError
from dsgnn.runtime.ranker import Ranker, interface

INPUTS = ("image",)
BATCH = 8
PHOTO = (480, 640)  # h, w of the warm-up of a model that takes any size


def write_repository(
    sources: Sequence[Path],
    repository: Path,
    name: str | None = None,
    max_batch: int | None = None,
    instances: int = 1,
    gpu: bool = False,
    delay_ms: float = 5.0,
) -> Path:
    """Write one model into a repository; returns its folder.

    sources: one ONNX file, or TensorRT engines of one network, each for another generation of GPUs.
    name: the model's name on the server, by default that of the first file. max_batch: the largest
    batch of an ONNX file, BATCH by default; an engine has it in its profile. instances: copies of
    the model on each device. gpu: whether an ONNX file runs on GPUs instead of CPUs. delay_ms: the
    milliseconds that a request waits at most for others, to be computed together with them.

    Raises FileExistsError if the repository has a model of this name; and ArtifactError,
    BackendError or OptionError for files that Triton cannot run or that do not belong together.
    """
    size = BATCH if max_batch is None else max_batch
    if not sources or size < 1 or instances < 1 or delay_ms < 0:
        raise OptionError(
            "expected a model file, a batch and instances of at least 1 and a delay of at least "
            f"0 ms, got {len(sources)} files, {max_batch}, {instances} and {delay_ms}"
        )
    artifacts = [open_artifact(source) for source in sources]
    name = name or sources[0].stem
    folder = repository / name
    if folder.exists():
        raise FileExistsError(f"{folder} exists: delete it, or give the model another name")
    if artifacts[0].path.suffix in ENGINES:
        files = _plans(artifacts)
        if max_batch is not None:
            raise OptionError(
                f"{artifacts[0].path.name} has its batches built in: give no largest batch"
            )
        profiles = [artifact.sidecar.build["profile"] for artifact in artifacts if artifact.sidecar]
        size = min(profile["batch"][2] for profile in profiles)
    else:
        _check_onnx(artifacts)
        files = {"model.onnx": artifacts[0]}
    config = _config(name, files, size, instances, gpu, round(1e3 * delay_ms))

    part = repository / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        (part / "1").mkdir(parents=True)
        for file, artifact in files.items():
            shutil.copyfile(artifact.path, part / "1" / file)
            if artifact.sidecar:
                write_sidecar(part / "1" / file, replace(artifact.sidecar, file=file))
        (part / "config.pbtxt").write_text(config, "utf-8")
        check_config(read_config(part / "config.pbtxt"), artifacts[0].description)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def read_config(path: Path) -> Any:
    """Read a config.pbtxt by Triton's own schema. Raises ArtifactError if it does not parse."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(path.read_text("utf-8"), ModelConfig())
    except text_format.ParseError as error:
        raise ArtifactError(f"{path} is no configuration of Triton's: {error}") from error


def check_config(config: Any, description: Description) -> None:
    """Raise ArtifactError unless a ModelConfig has exactly the inputs and outputs that a
    description tells of, and carries that description."""
    inputs, outputs = specs(config)
    expected = interface(description)
    got = {spec.name: spec for spec in (*inputs, *outputs)}
    if got != expected or tuple(spec.name for spec in inputs) != INPUTS:
        wrong = sorted(n for n in {*got, *expected} if got.get(n) != expected.get(n)) or INPUTS
        raise ArtifactError(
            f"{config.name} does not fit its artifact: "
            + "; ".join(
                f"{n} is {got.get(n, 'absent')}, expected {expected.get(n, 'nothing')}"
                for n in wrong
            )
        )
    carried = Sidecar.from_json(config.parameters[PARAMETER].string_value).description
    if carried != description:
        raise ArtifactError(f"{config.name} carries {carried}, but its artifact is {description}")


def _check_onnx(artifacts: Sequence[Artifact]) -> None:
    """Raise OptionError for several files, and ArtifactError for a graph that is not as
    described."""
    if len(artifacts) > 1:
        names = ", ".join(artifact.path.name for artifact in artifacts)
        raise OptionError(f"expected one ONNX file, or engines alone, got {names}")
    Ranker(artifacts[0].path, "onnxruntime", "cpu")


def _plans(artifacts: Sequence[Artifact]) -> dict[str, Artifact]:
    """The engines by the names that their files get in the repository. Raises OptionError for what
    is no engine of TensorRT, and for engines that do not belong together."""
    plans: dict[str, Artifact] = {}
    first = artifacts[0].description
    for artifact in artifacts:
        where, sidecar = artifact.path.name, artifact.sidecar
        build = sidecar.build if sidecar else {}
        if build.get("flavour") != "tensorrt":
            raise OptionError(
                f"{where} is no engine of TensorRT, the only kind that Triton runs: build it with "
                "`dsgnn-export tensorrt`, or give the ONNX file"
            )
        if "sm" not in build:
            raise OptionError(
                f"the sidecar of {where} does not say for which generation of GPUs it was built "
                "(no sm): build it again"
            )
        if build["profile"]["batch"][0] != 1 or build["profile"]["batch"][2] == 1:
            raise OptionError(
                f"{where} takes batches of {build['profile']['batch']}, Triton makes them from one "
                "up: build it with a profile such as 1,4,8"
            )
        if build.get("deform") == "apart":
            raise OptionError(
                f"{where} has outputs that only keep its layers apart, which no configuration "
                "tells of: build it from an ONNX file that samples by gather"
            )
        if artifact.description != first:
            raise OptionError(f"{where} is of another network than {artifacts[0].path.name}")
        if plans.setdefault(f"sm{build['sm']}.plan", artifact) is not artifact:
            raise OptionError(f"{where} is a second engine for SM{build['sm']}: give one of each")
    return plans


def _config(
    name: str, files: dict[str, Artifact], max_batch: int, instances: int, gpu: bool, delay_us: int
) -> str:
    """The text of config.pbtxt. files: the artifacts by their names in the repository."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as schema
    from tritonclient.utils import np_to_triton_dtype

    (artifact, *_), plans = files.values(), [file for file in files if file.endswith(".plan")]
    description = artifact.description
    config = schema.ModelConfig(name=name, max_batch_size=max_batch)
    for spec in interface(description).values():
        tensor = (config.input if spec.name in INPUTS else config.output).add(name=spec.name)
        tensor.data_type = getattr(schema, f"TYPE_{np_to_triton_dtype(spec.dtype)}")
        tensor.dims.extend(-1 if side is None else side for side in spec.shape[1:])
    config.dynamic_batching.max_queue_delay_microseconds = delay_us
    group = config.instance_group.add(count=instances)
    group.kind = group.KIND_GPU if plans or gpu else group.KIND_CPU
    if plans:
        config.backend = "tensorrt"
        for file in plans:
            sm = file.removeprefix("sm").removesuffix(".plan")
            config.cc_model_filenames[f"{sm[:-1]}.{sm[-1]}"] = file
    else:
        config.backend, config.default_model_filename = "onnxruntime", "model.onnx"
        if not gpu:
            config.parameters["intra_op_thread_count"].string_value = str(DEFAULT_THREADS)
    image = config.input[0]
    sides = description.input.geometry(*PHOTO).padded
    for size in sorted({1, max_batch}):
        inputs = {
            image.name: schema.ModelWarmup.Input(
                data_type=image.data_type, dims=[*sides, 3], random_data=True
            )
        }
        config.model_warmup.add(name=f"batch of {size}", batch_size=size, inputs=inputs)
    config.parameters[PARAMETER].string_value = _facts(name, files).to_json()
    return text_format.MessageToString(config)


def _facts(name: str, files: dict[str, Artifact]) -> Sidecar:
    """What a client is told about all files together, in the form of a sidecar."""
    digests = {file: artifact.sha256 for file, artifact in files.items()}
    (first, *others) = files.values()
    together = sha256("".join(digests.values()).encode()).hexdigest()
    verified = all(artifact.status == "verified" for artifact in files.values())
    return Sidecar(
        file=name,
        sha256=together if others else first.sha256,
        verified=verified,
        build={"files": digests},
        description=first.description,
    )
