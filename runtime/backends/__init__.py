"""Run an artifact: one small interface over the inference libraries.

`open_backend` picks one; nothing is imported before it is needed. A backend that was named is used
or it is an error that says what to install; only `auto` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from dsgnn.runtime.artifact import ENGINES, check_suffix
from dsgnn.runtime.errors import BackendError

CUDA_GRAPH = "-cuda-graph"
BACKENDS = ("onnxruntime", "onnxruntime-tensorrt", "openvino", "openvino-bf16", "tensorrt",
            f"tensorrt{CUDA_GRAPH}", "tensorrt-rtx", f"tensorrt-rtx{CUDA_GRAPH}")  # fmt: skip
DEFAULT_THREADS = 2  # small networks gain little from more, and services run several at once


@dataclass(frozen=True)
class TensorSpec:
    """A declared input or output. shape: None = any size."""

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...]

    def accepts(self, dtype: np.dtype, shape: tuple[int | None, ...]) -> bool:
        """Whether a tensor of this dtype and shape fits; an unknown side (None) fits any."""
        return (
            dtype == self.dtype
            and len(shape) == len(self.shape)
            and all(
                None in (own, got) or own == got for own, got in zip(self.shape, shape, strict=True)
            )
        )

    def __str__(self) -> str:
        sides = ", ".join("any" if side is None else str(side) for side in self.shape)
        return f"{self.dtype} ({sides})"


class Backend(ABC):
    """A loaded artifact. `infer` may be called from several threads at once.

    name: one of BACKENDS. device: "cpu" or "cuda:N". threads: of one call, on a CPU. max_batch:
    images of one call at most; None = as the input is declared.
    picked: one sentence that says what is used, and why where `auto` chose.
    """

    name: str
    device: str
    threads: int
    picked: str
    max_batch: int | None = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch: every declared input by name in, every declared output by name out.

        Raises BackendError if a name, dtype or shape is not the declared one.
        """
        declared = {spec.name: spec for spec in self.inputs}
        if feeds.keys() != declared.keys():
            raise BackendError(f"expected inputs {sorted(declared)}, got {sorted(feeds)}")
        for name, spec in declared.items():
            value = feeds[name]
            if not spec.accepts(value.dtype, value.shape):
                raise BackendError(
                    f"input {name}: expected {spec}, got {value.dtype} {value.shape}"
                )
        try:
            return self._infer(feeds)
        except Exception as error:  # the libraries' errors share no base class
            raise BackendError(f"{self.name} failed: {error}") from error

    @abstractmethod
    def _infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...


def open_backend(
    path: Path, backend: str = "auto", device: str = "auto", threads: int | None = None
) -> Backend:
    """Load an artifact.

    backend: "auto" or one of BACKENDS; "tensorrt…" run engines, with "-cuda-graph" replayed as one
    CUDA graph for each shape; the others run ONNX files: "onnxruntime-tensorrt" by ONNX Runtime's
    TensorRT provider, which builds and keeps its own engines; "openvino-bf16" rounds to bfloat16.
    device: "auto", "cpu", "cuda" or "cuda:N". threads: of one call on a CPU, 2 by default. Raises
    BackendError when the file, the backend and the device do not go together or something is not
    installed.
    """
    if backend not in ("auto", *BACKENDS):
        raise BackendError(f"backend must be auto, {' or '.join(BACKENDS)}, got {backend!r}")
    check_suffix(path)
    is_engine = path.suffix in ENGINES
    for_engines = [name for name in BACKENDS if name.startswith("tensorrt")]
    if backend != "auto" and is_engine != (backend in for_engines):
        for_onnx = [name for name in BACKENDS if name not in for_engines]
        raise BackendError(
            f"{backend} does not run {path.name}: engines are for {', '.join(for_engines)}; .onnx "
            f"files for {', '.join(for_onnx)}; `dsgnn-export tensorrt` builds an engine"
        )
    if threads is not None and threads < 1:
        raise BackendError(f"threads must be at least 1, got {threads}")
    count = threads or DEFAULT_THREADS
    loaded: Backend
    if is_engine:
        from dsgnn.runtime.backends.tensorrt import TensorRt

        flavour = None if backend == "auto" else backend.removesuffix(CUDA_GRAPH)
        loaded = TensorRt(path, flavour, device, backend.endswith(CUDA_GRAPH))
        why = f" (auto: an engine of {loaded.name})" if backend == "auto" else ""
        loaded.picked = f"{loaded.name} on {loaded.device}{why}"
        return loaded
    chosen, why = _choose(device) if backend == "auto" else (backend, "")
    if chosen.startswith("onnxruntime"):
        from dsgnn.runtime.backends.onnx import OnnxRuntime

        loaded = OnnxRuntime(path, device, count, tensorrt=chosen.endswith("-tensorrt"))
    else:
        from dsgnn.runtime.backends.openvino import IMITATED, OpenVino

        loaded = OpenVino(path, device, count, bf16=chosen.endswith("-bf16"))
        why += IMITATED if loaded.imitated else ""
    where = f"{loaded.device}, {count} threads" if loaded.device == "cpu" else loaded.device
    loaded.picked = f"{loaded.name} on {where}{why}"
    return loaded


def _choose(device: str) -> tuple[str, str]:
    """The backend `auto` means for an ONNX file, and the reason."""
    if find_spec("onnxruntime"):
        return "onnxruntime", " (auto: an ONNX file, and onnxruntime is installed)"
    if find_spec("openvino") and not device.startswith("cuda"):
        return "openvino", " (auto: an ONNX file, openvino is installed, onnxruntime is not)"
    raise BackendError(
        "no library to run an ONNX file is installed: pip install 'dsgnn[cpu]' (onnxruntime), "
        "'dsgnn[gpu]' (onnxruntime-gpu) or 'dsgnn[openvino]'"
    )
