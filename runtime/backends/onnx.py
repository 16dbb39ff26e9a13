"""ONNX Runtime on a CPU or a CUDA GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dsgnn.runtime.backends import Backend, BackendError, TensorSpec

PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # both install the module `onnxruntime`
CUDA = "CUDAExecutionProvider"
# Costs time on CPUs with this network (design: measured on the r50 graph).
DISABLED_OPTIMIZERS = ["SkipLayerNormFusion"]
DTYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


class OnnxRuntime(Backend):
    """A session whose `infer` is thread-safe (ONNX Runtime's `run` is).

    Memory on a device is used again: the provider's arena keeps what a call gave back.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, device: str, threads: int) -> None:
        """device: "auto" (CUDA if its provider loads), "cpu", "cuda" or "cuda:N".

        Raises BackendError if onnxruntime or the CUDA provider is missing, both of the packages
        that share the module are installed, or the file is refused.
        """
        check_packages()
        import onnxruntime

        wants_cuda, index = parse_device(device)
        offered = onnxruntime.get_available_providers()
        if wants_cuda and CUDA not in offered:
            raise BackendError(
                f"device {device} was asked for, but this onnxruntime has no CUDA provider, only "
                f"{', '.join(offered)}: pip uninstall -y onnxruntime, then pip install "
                "'dsgnn[gpu]'"
            )
        use_cuda = wants_cuda or (device == "auto" and CUDA in offered)
        if use_cuda and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA libraries that came as Python packages
        providers: list[Any] = [(CUDA, {"device_id": index})] if use_cuda else []
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path),
                options,
                providers=[*providers, "CPUExecutionProvider"],
                disabled_optimizers=DISABLED_OPTIMIZERS,
            )
        except Exception as error:  # ONNX Runtime's errors share no public base class
            raise BackendError(f"onnxruntime cannot load {path.name}: {error}") from error
        self._session.disable_fallback()  # a failing provider raises instead of changing
        on_cuda = CUDA in self._session.get_providers()
        if wants_cuda and not on_cuda:
            raise BackendError(
                f"device {device} was asked for, but onnxruntime could not load its CUDA provider: "
                "it needs an NVIDIA driver and the CUDA and cuDNN libraries its version was built "
                "for (its own message above names the missing one); or use --device cpu"
            )
        self.device = f"cuda:{index}" if on_cuda else "cpu"
        self.threads = threads
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())

    def _infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [spec.name for spec in self.outputs]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))


def check_packages() -> None:
    """Raise BackendError unless exactly one package provides the module `onnxruntime`."""
    installed = [name for name in PACKAGES if _installed(name)]
    if len(installed) > 1:
        raise BackendError(
            f"{' and '.join(installed)} are both installed and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'dsgnn[cpu]' or "
            "'dsgnn[gpu]'"
        )
    if not installed and find_spec("onnxruntime") is None:
        raise BackendError(
            "onnxruntime is not installed: pip install 'dsgnn[cpu]', or 'dsgnn[gpu]' for CUDA"
        )


def parse_device(device: str) -> tuple[bool, int]:
    """ "auto", "cpu", "cuda" or "cuda:N" → (CUDA was asked for, GPU index)."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise BackendError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    return device.startswith("cuda"), int(match[1] or 0)


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _spec(node: Any) -> TensorSpec:
    shape = tuple(side if isinstance(side, int) else None for side in node.shape)
    if node.type not in DTYPES:
        raise BackendError(f"{node.name}: unexpected type {node.type}, known {sorted(DTYPES)}")
    return TensorSpec(node.name, np.dtype(DTYPES[node.type]), shape)
