"""ONNX Runtime on a CPU, or on an NVIDIA GPU by its CUDA or its TensorRT provider.

The CUDA provider passed the parity gate on an H100. Tests hold both ways to a GPU against
stand-ins, because there is none where they run.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np

from dsgnn.runtime.artifact import Artifact, sha256_of
from dsgnn.runtime.backends.base import Backend, TensorSpec, parse_device
from dsgnn.runtime.disk.files import cache_folder
from dsgnn.runtime.errors import BackendError
from dsgnn.runtime.telemetry import import_without_telemetry

PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # both install the module `onnxruntime`
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
# It costs time on CPUs with this network (measured on the graph of r50-assr).
DISABLED_OPTIMIZERS = ["SkipLayerNormFusion"]
# What takes time. The rest computes sizes and indices, much of which ONNX Runtime keeps on the CPU.
HEAVY = {"Conv", "ConvTranspose", "Einsum", "Gemm", "GridSample", "LayerNormalization", "MatMul"}
PARTS = (16, 4, 1)  # photos of one inference on a GPU
# Sessions that are kept on a GPU. Photos of every form have 17 sizes at the bundled model's size.
KEPT_SHAPES = 17 * len(PARTS)
DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntime(Backend):
    """A session, whose `run` ONNX Runtime allows from several threads.

    A session's arena keeps the device memory that a call gives back, for the next one.

    On a GPU one call waits for the other. ONNX Runtime promises more, but when four threads called
    (1.31, CUDA provider, nano on an H100) 6 of 360 photos got other objects without a word in one
    run, and another run stopped with CUDA's error 717. From one thread all 720 answers were those
    of the CPU.

    By the CUDA provider each shape of the inputs (photos, height, width) has a session of its own,
    the KEPT_SHAPES latest, or fewer when the GPU has no memory for more: since 1.20 a convolution
    plans anew whenever its shape is not that of its last call (microsoft/onnxruntime#23006), which
    took 0.7 to 0.9 s for nano on an H100, against 8 ms of an inference. So that batches make few
    shapes, they are computed in PARTS.
    """

    def __init__(
        self, artifact: Artifact, device: str, threads: int, tensorrt: bool = False
    ) -> None:
        """device: "auto" (CUDA if its provider loads), "cpu", "cuda" or "cuda:N". tensorrt: use the
        TensorRT provider, and CUDA for what it cannot take.

        Raises BackendError if onnxruntime or the provider is missing, if both packages that bring
        the module `onnxruntime` are installed, or if the file is refused.
        """
        self.name = "onnxruntime-tensorrt" if tensorrt else "onnxruntime"
        check_packages()
        onnxruntime = import_without_telemetry("onnxruntime")
        wants_cuda, index = parse_device(device)
        if tensorrt and device == "cpu":
            raise BackendError(
                f"{self.name} needs an NVIDIA GPU, got device cpu: use backend onnxruntime"
            )
        offered = onnxruntime.get_available_providers()
        needed = [TENSORRT, CUDA] if tensorrt else [CUDA] if wants_cuda else []
        absent = [_short(provider) for provider in needed if provider not in offered]
        if absent:
            raise BackendError(
                f"{self.name} on device {device} was asked for, but this onnxruntime has no "
                f"{absent[0]} provider, only {', '.join(offered)}: pip uninstall -y onnxruntime, "
                "then pip install 'dsgnn[gpu]'"
            )
        use_cuda = bool(needed) or (device == "auto" and CUDA in offered)
        if use_cuda and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA libraries that came as Python packages
        providers: list[Any] = [(TENSORRT, _tensorrt_options(artifact, index))] if tensorrt else []
        # Float32 means TF32 to CUDA by default: ten bits of mantissa, too few for the parity gate.
        providers += [(CUDA, {"device_id": index, "use_tf32": 0})] if use_cuda else []
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # int8 products must not saturate on x86 without VNNI; elsewhere this has no effect
        options.add_session_config_entry("session.x64quantprecision", "1")
        if use_cuda:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            options.log_severity_level = 3  # it warns of copies of sizes, which are a few bytes

        def open_session() -> Any:
            try:
                session = onnxruntime.InferenceSession(
                    str(artifact.path),
                    options,
                    providers=[*providers, "CPUExecutionProvider"],
                    disabled_optimizers=DISABLED_OPTIMIZERS,
                )
            except Exception as error:  # ONNX Runtime's errors share no public base class
                name = artifact.path.name
                raise BackendError(f"onnxruntime cannot load {name}: {error}") from error
            session.disable_fallback()  # a provider that fails shall raise, not be replaced
            return session

        self._session = open_session()
        loaded = self._session.get_providers()
        failed = [_short(provider) for provider in needed if provider not in loaded]
        if failed:
            pair = _cuda_pair(onnxruntime.__version__)
            if failed[0] == "TensorRT":
                needs = f"{pair} and TensorRT (pip install 'dsgnn[tensorrt]', in the version that "
                needs += "the release of onnxruntime names); or use backend onnxruntime"
            else:
                needs = f"{pair}; or use device cpu"
            raise BackendError(
                f"{self.name} on device {device} was asked for, but onnxruntime could not load its "
                f"{failed[0]} provider (its own message above names what is missing): it needs an "
                f"NVIDIA driver, {needs}"
            )
        self.device = f"cuda:{index}" if CUDA in loaded else "cpu"
        self.on_cpu = _on_cpu(self._session) if CUDA in loaded else {}
        if heavy := {name: n for name, n in self.on_cpu.items() if name in HEAVY}:
            raise BackendError(
                f"{self.name} would run {', '.join(f'{n} {op}' for op, n in heavy.items())} of "
                f"{artifact.path.name} on the CPU, for which the provider on {self.device} has no "
                "kernels: export the model in float32, update onnxruntime-gpu, or use device cpu"
            )
        self.threads = threads
        self._artifact, self._open_session = artifact, open_session
        self._each_shape_alone = CUDA in loaded and not tensorrt
        self._loaded = loaded
        self._sessions: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()
        self._turn = Lock() if CUDA in loaded else nullcontext()
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())

    def _infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [spec.name for spec in self.outputs]
        with self._turn:
            if not self._each_shape_alone:
                return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
            parts: list[list[np.ndarray]] = []
            start, count = 0, len(next(iter(feeds.values())))
            while start < count:
                end = start + next(size for size in PARTS if size <= count - start)
                part = {name: value[start:end] for name, value in feeds.items()}
                parts.append(self._run_alone(names, part))
                start = end
        if len(parts) > 1:
            parts = [[np.concatenate(values) for values in zip(*parts, strict=True)]]
        return dict(zip(names, parts[0], strict=True))

    def _run_alone(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Run the session of these shapes; if that fails, once more without the other sessions,
        which may hold the memory that it needs."""
        shapes = tuple(value.shape for value in feeds.values())
        try:
            return self._session_of(shapes).run(names, feeds)
        except Exception:
            others = [known for known in self._sessions if known != shapes]
            for known in others:
                del self._sessions[known]
            if not others:
                raise
        return self._session_of(shapes).run(names, feeds)

    def _session_of(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """The session of these shapes; the one that was opened first is that of the first ones."""
        if shapes not in self._sessions:
            if len(self._sessions) == KEPT_SHAPES:
                self._sessions.popitem(last=False)
            first, self._session = self._session, None
            self._sessions[shapes] = first or self._open_further()
        self._sessions.move_to_end(shapes)
        return self._sessions[shapes]

    def _open_further(self) -> Any:
        if sha256_of(self._artifact.path) != self._artifact.sha256:
            raise BackendError(
                f"{self._artifact.path} is another file than when it was opened: open it again"
            )
        session = self._open_session()
        if session.get_providers() != self._loaded:
            raise BackendError("the GPU has no room for a further shape of photos")
        return session

    def _release(self) -> None:
        del self._session, self._sessions, self._open_session


def _on_cpu(session: Any) -> dict[str, int]:
    """Operators that were not taken by a GPU's provider, and how many of each.

    Empty before ONNX Runtime 1.24, which cannot tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    assigned = session.get_provider_graph_assignment_info()
    on_cpu = [part for part in assigned if part.ep_name == "CPUExecutionProvider"]
    return dict(Counter(node.op_type for part in on_cpu for node in part.get_nodes()))


def _cuda_pair(version: str) -> str:
    """The CUDA and cuDNN libraries that a release of onnxruntime-gpu was built for, and what
    installs them."""
    major, minor = (int(part) for part in version.split(".")[:2])
    cuda = 13 if (major, minor) >= (1, 27) else 12
    return (
        f"the libraries of CUDA {cuda} and cuDNN 9 (pip install "
        f"'onnxruntime-gpu[cuda,cudnn]=={version}')"
    )


def _short(provider: str) -> str:
    return "TensorRT" if provider == TENSORRT else "CUDA"


def _tensorrt_options(artifact: Artifact, index: int) -> dict[str, Any]:
    """Options of the TensorRT provider.

    Engines take minutes to build, so they are kept in the user's cache. ONNX Runtime builds new
    ones for another file, GPU or version of TensorRT. The precision is the graph's, with one
    exception: float32 means TF32 unless the environment has NVIDIA_TF32_OVERRIDE=0, because the
    provider has no option against it.
    """
    precision = artifact.description.precision
    cache = cache_folder() / "tensorrt" / artifact.sha256[:16]
    cache.mkdir(parents=True, exist_ok=True)
    typed = {f"trt_{precision}_enable": True} if precision in ("fp16", "bf16") else {}
    return {
        "device_id": index,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache.parent),
        **typed,
    }


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
