"""ONNX → TensorRT or TensorRT-RTX engine, described by a sidecar and proven where it can run.

One module serves `tensorrt` ≥ 10.12 and 11 and `tensorrt_rtx`: networks are strongly typed in all
of them, so precision is that of the ONNX file. TensorRT builds for the GPU that is present;
TensorRT-RTX builds for named GPU generations, with no GPU needed, and finishes the kernels where
the engine is loaded. The toolkit's tests build with TensorRT-RTX; `tensorrt` itself needs a GPU
and has not been executed by them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dsgnn.export.engine_options import check_options
from dsgnn.export.onnx import ADVICE, backend_infer
from dsgnn.export.parity.built import (
    SamplingError,
    check_sampling,
    check_types,
    layer_types,
    sampling_layers,
)
from dsgnn.export.parity.comparison import gate
from dsgnn.export.parity.limits import Parity, machine, settle
from dsgnn.export.sampling import FOR_ENGINES, climb, plugin_version, sampled, ways
from dsgnn.runtime.artifact import (
    Artifact,
    Sidecar,
    open_artifact,
    sha256_of,
    sidecar_path,
    write_sidecar,
)
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.backends.tensorrt import APART, gpu, library_of
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.errors import BackendError, DsgnnError, OptionError


class BuildError(DsgnnError, RuntimeError):
    """An engine that could not be built; the message holds what the library said."""


def build_engine(
    source: Path,
    path: Path,
    photos: Sequence[np.ndarray],
    flavour: str,
    batch: Sequence[int] = (1, 1, 1),
    sms: Sequence[int] = (),
    workspace_mib: int | None = None,
    timing_cache: Path | None = None,
) -> tuple[Sidecar, list[Parity]]:
    """Build an engine of an ONNX artifact of one size, beside its sidecar and its log.

    flavour: one of FLAVOURS. batch: smallest, usual and largest; all equal = a static batch. sms:
    for TensorRT-RTX, the GPU generations (89 = SM89, Ada). workspace_mib: scratch memory at most.
    timing_cache: a file that TensorRT's measurements are read from and added to. photos: for the
    parity gate against the ONNX file, which runs if the engine does on this machine; else the
    engine is unverified and `build["not_run"]` says why.

    Raises OptionError for options that do not fit together or a file that takes any size,
    BuildError, SamplingError or ParityError after every way to sample was tried (nothing is put in
    place), ArtifactError, BackendError if the library is missing.
    """
    began = time.monotonic()
    artifact = open_artifact(source)
    check_options(artifact, flavour, batch, sms, timing_cache)
    library = library_of(flavour)
    built_for = {"sms": list(sms)} if sms else dict(zip(("gpu", "sm"), gpu(), strict=True))
    proto = onnx.load(source)
    part = path.with_name(f".{path.name}.part{path.suffix}")

    def attempt(way: str) -> tuple[Sidecar, list[Parity]]:
        """The engine that samples in this way, compared; it is `part`."""
        graph = sampled(proto, way, plugin_version(library.__version__))
        data, facts = _build(
            library, logger, graph, way, artifact, batch, sms, workspace_mib, timing_cache
        )
        build: dict[str, Any] = {
            "flavour": flavour,
            "version": library.__version__,
            **built_for,
            "source": {"file": source.name, "sha256": artifact.sha256, "status": artifact.status},
            "precision": artifact.description.precision,
            "profile": {"batch": list(batch)},
            "workspace_mib": workspace_mib,
            "deform": way,
            "bytes": len(data),
            **facts,
        }
        part.write_bytes(data)
        sidecar = Sidecar(
            path.name, sha256_of(part), False, (), machine(), build, artifact.description
        )
        write_sidecar(part, sidecar)
        return _gate(part, source, sidecar, photos)

    try:
        with _log(library, path.with_name(path.name + ".log")) as logger:
            names = ways(proto, FOR_ENGINES[flavour])
            (sidecar, results), tried = climb(names, attempt, BuildError, SamplingError)
        seconds = round(time.monotonic() - began, 1)
        sidecar = replace(sidecar, build={**sidecar.build, "tried": tried, "seconds": seconds})
        part.replace(path)
        write_sidecar(path, sidecar)
    finally:
        part.unlink(missing_ok=True)
        sidecar_path(part).unlink(missing_ok=True)
    return sidecar, results


@contextmanager
def _log(library: Any, path: Path) -> Iterator[Any]:
    """A logger that writes everything to a file and keeps the errors, in `errors`."""

    with path.open("w", encoding="utf-8") as file:

        class BuildLogger(library.ILogger):
            def __init__(self) -> None:
                super().__init__()
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                file.write(f"{severity.name} {message}\n")
                if severity in (library.ILogger.ERROR, library.ILogger.INTERNAL_ERROR):
                    self.errors.append(message)

        yield BuildLogger()


def _build(
    library: Any,
    logger: Any,
    graph: onnx.ModelProto,
    way: str,
    artifact: Artifact,
    batch: Sequence[int],
    sms: Sequence[int],
    workspace_mib: int | None,
    timing_cache: Path | None,
) -> tuple[bytes, dict[str, Any]]:
    """The engine of a graph that samples in one of the ways of `dsgnn.export.sampling`; number of
    layers, types of its products, use of TF32, its inputs and outputs."""
    logger.errors.clear()
    builder = library.Builder(logger)
    # TensorRT 11 knows no other kind of network and may drop the flag
    typed = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    if way == "plugin" and not library.init_libnvinfer_plugins(logger, ""):
        raise BuildError(f"{library.__name__} could not load its plugins")
    parser = library.OnnxParser(network, logger)
    if not parser.parse(graph.SerializeToString()):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = "\n".join(
            f"  node {e.node_name() or '?'} ({e.node_operator() or '?'}): {e.desc()}"
            for e in errors
        )
        raise BuildError(f"the parser refused {artifact.path.name}:\n{said}")
    check_sampling(library, network)
    tensors = [network.get_output(i) for i in range(network.num_outputs)]
    if way == "apart":
        for number, layer in enumerate(sampling_layers(library, network)):
            sample = layer.get_output(0)
            sample.name = f"{APART}{number}"
            network.mark_output(sample)
    config = builder.create_builder_config()
    config.clear_flag(library.BuilderFlag.TF32)  # ten bits of mantissa do not pass the gate
    if workspace_mib is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    if sms:
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            known = getattr(library.ComputeCapability, f"SM{sm}", None)
            if known is None:
                names = [n[2:] for n in dir(library.ComputeCapability) if n.startswith("SM")]
                raise OptionError(f"GPU generations are {', '.join(names)}, got {sm}")
            config.set_compute_capability(known, index)
    image = network.get_input(0)
    sides = tuple(image.shape)[1:]
    if batch[0] == batch[2]:
        image.shape = (batch[0], *sides)
    else:
        profile = builder.create_optimization_profile()
        profile.set_shape(image.name, *[(size, *sides) for size in batch])
        config.add_optimization_profile(profile)
    if timing_cache is not None:
        known_times = timing_cache.read_bytes() if timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known_times), False)
    products = layer_types(library, network)
    check_types(products, artifact.description.precision, artifact.path.name)
    data = builder.build_serialized_network(network, config)
    if data is None:
        said = "\n".join(f"  {message}" for message in logger.errors) or "  (nothing)"
        raise BuildError(
            f"{library.__name__} could not build {artifact.path.name}; it said:\n{said}"
        )
    if timing_cache is not None:
        write_whole(timing_cache, bytes(config.get_timing_cache().serialize()))
    shown = {
        tensor.name: f"{tensor.dtype.name} {tuple(tensor.shape)}" for tensor in (image, *tensors)
    }
    tf32 = config.get_flag(library.BuilderFlag.TF32)
    facts = {"layers": network.num_layers, "products": products, "tf32": tf32, "tensors": shown}
    return bytes(data), facts


def _gate(
    part: Path, source: Path, sidecar: Sidecar, photos: Sequence[np.ndarray]
) -> tuple[Sidecar, list[Parity]]:
    """Compare with the ONNX file where engine and file run (ONNX Runtime has no bfloat16
    convolution on the CPU). Raises ParityError if the engine gives other answers."""
    description = sidecar.description
    assert description is not None
    try:
        engine = open_backend(part)
        reference = open_backend(source, "onnxruntime", "cpu")
    except BackendError as error:
        return replace(sidecar, build={**sidecar.build, "not_run": str(error)}), []
    results = gate(
        backend_infer(reference), backend_infer(engine), photos, description, sidecar.build
    )
    verified = settle(
        results,
        description,
        False,
        f"{sidecar.file} does not give the answers of {source.name} and was not written. {ADVICE}",
    )
    how = {"against": source.name, "backend": engine.picked, "precision": description.precision}
    checks = tuple({**result.to_dict(), **how} for result in results)
    return replace(sidecar, verified=verified, parity=checks), results
