"""Run an artifact: one small interface over the inference libraries.

`open_backend` picks the library, and none is imported before it is needed. A backend that was named
is used, or an error says what to install; only `auto` chooses.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from dsgnn.runtime.artifact import ENGINES, Artifact, open_artifact
from dsgnn.runtime.backends.base import CUDA_GRAPH, Backend, TensorSpec
from dsgnn.runtime.errors import ArtifactError, BackendError

__all__ = [
    "BACKENDS",
    "CUDA_GRAPH",
    "DEFAULT_THREADS",
    "Backend",
    "TensorSpec",
    "check_threads",
    "open_backend",
]

FOR_ONNX = ("onnxruntime", "onnxruntime-tensorrt", "openvino", "openvino-bf16")
FOR_ENGINES = ("tensorrt", f"tensorrt{CUDA_GRAPH}", "tensorrt-rtx", f"tensorrt-rtx{CUDA_GRAPH}")
BACKENDS = (*FOR_ONNX, *FOR_ENGINES)
DEFAULT_THREADS = 2  # small networks gain little from more, and services run several at once


def open_backend(
    artifact: Artifact | Path,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> Backend:
    """Load an artifact.

    artifact: what `open_artifact` returned, or a path for it. backend: "auto" or one of BACKENDS.
    "onnxruntime-tensorrt" runs ONNX files by ONNX Runtime's TensorRT provider, which builds and
    keeps its own engines; "openvino-bf16" rounds to bfloat16; "tensorrt…" run engines, and with
    "-cuda-graph" each shape is replayed as one CUDA graph. device: "auto", "cpu", "cuda" or
    "cuda:N". threads: of one call on a CPU, None = DEFAULT_THREADS.

    Raises BackendError when the file, the backend and the device do not go together or something is
    not installed, and ArtifactError for an ONNX file of a fixed batch; for a path also what
    `open_artifact` raises.
    """
    if backend not in ("auto", *BACKENDS):
        raise BackendError(f"backend must be auto, {' or '.join(BACKENDS)}, got {backend!r}")
    check_threads(threads)
    if isinstance(artifact, Path):
        artifact = open_artifact(artifact)
    is_engine = artifact.path.suffix in ENGINES
    if backend != "auto" and is_engine != (backend in FOR_ENGINES):
        raise BackendError(
            f"{backend} does not run {artifact.path.name}: engines are for "
            f"{', '.join(FOR_ENGINES)}; .onnx files for {', '.join(FOR_ONNX)}; "
            "`dsgnn-export tensorrt` builds an engine"
        )
    if is_engine:
        return _open_engine(artifact, backend, device)
    return _open_onnx(artifact, backend, device, threads or DEFAULT_THREADS)


def check_threads(threads: int | None) -> None:
    """Raise BackendError for threads that this machine has no cores for. None = the default."""
    cores = max(os.cpu_count() or 1, DEFAULT_THREADS)
    if threads is not None and not 1 <= threads <= cores:
        raise BackendError(
            f"threads must be 1 to {cores}, the cores of this machine, got {threads}"
        )


def _open_engine(artifact: Artifact, backend: str, device: str) -> Backend:
    from dsgnn.runtime.backends.tensorrt import TensorRt

    flavour = None if backend == "auto" else backend.removesuffix(CUDA_GRAPH)
    engine = TensorRt(artifact, flavour, device, backend.endswith(CUDA_GRAPH))
    why = f" (auto: an engine of {engine.name})" if backend == "auto" else ""
    engine.picked = f"{engine.name} on {engine.device}{why}"
    return engine


def _open_onnx(artifact: Artifact, backend: str, device: str, threads: int) -> Backend:
    chosen, why = _choose(device) if backend == "auto" else (backend, "")
    loaded: Backend
    if chosen.startswith("onnxruntime"):
        from dsgnn.runtime.backends.onnx import OnnxRuntime

        loaded = OnnxRuntime(artifact, device, threads, tensorrt=chosen.endswith("-tensorrt"))
    else:
        from dsgnn.runtime.backends.openvino import IMITATED, OpenVino

        loaded = OpenVino(artifact, device, threads, bf16=chosen.endswith("-bf16"))
        why += IMITATED if loaded.imitated else ""
    where = f"{loaded.device}, {threads} threads" if loaded.device == "cpu" else loaded.device
    for spec in loaded.inputs:
        if spec.name == "image" and spec.shape[:1] != (None,):
            loaded.close()
            raise ArtifactError(
                f"{artifact.path.name} takes images of the shape {spec} alone, and every export of "
                "dsgnn takes any batch: it was changed afterwards; export the checkpoint again"
            )
    loaded.picked = f"{loaded.name} on {where}{why}"
    return loaded


def _choose(device: str) -> tuple[str, str]:
    """The backend that `auto` means for an ONNX file, and the reason. Raises BackendError."""
    if find_spec("onnxruntime"):
        return "onnxruntime", " (auto: an ONNX file, and onnxruntime is installed)"
    if find_spec("openvino") and not device.startswith("cuda"):
        return "openvino", " (auto: an ONNX file, openvino is installed, onnxruntime is not)"
    raise BackendError(
        "no library to run an ONNX file is installed: pip install 'dsgnn[cpu]' (onnxruntime), "
        "'dsgnn[gpu]' (onnxruntime-gpu) or 'dsgnn[openvino]'"
    )
