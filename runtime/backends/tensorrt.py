"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU.

Device memory, streams and graphs come from the CUDA runtime bindings (`cuda-bindings`), not torch.
An engine is native code, so it is deserialised only if its sidecar names this library and GPU.
Tests hold the order of calls against stand-ins of both libraries. Nothing here has been executed on
a GPU: there was none where it was written.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsgnn.runtime.artifact import Artifact
from dsgnn.runtime.backends.base import CUDA_GRAPH, Backend, TensorSpec, parse_device
from dsgnn.runtime.errors import ArtifactError, BackendError

APART = "apart."  # begins the names of outputs that only keep layers from being fused
FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # name → module


def library_of(flavour: str) -> Any:
    """The module of a flavour. Raises BackendError if it is missing."""
    try:
        library = importlib.import_module(FLAVOURS[flavour])
        library.__version__  # noqa: B018 (where only type stubs are installed there is none)
        return library
    except (ImportError, AttributeError) as error:
        raise BackendError(
            f"{flavour} is not installed: pip install 'dsgnn[{flavour}]' ({error})"
        ) from error


def _cuda() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError(
            f"the CUDA runtime bindings are not installed: pip install 'dsgnn[tensorrt]' ({error})"
        ) from error


def _checked(cuda: Any, call: tuple[Any, ...]) -> Any:
    """The value of a call of the bindings, which return (error, value…). Raises BackendError."""
    error, *values = call
    if error != cuda.cudaError_t.cudaSuccess:
        raise BackendError(f"CUDA: {getattr(error, 'name', error)}")
    return values[0] if len(values) == 1 else None


def gpu(index: int = 0) -> tuple[str, int]:
    """Name and generation (89 = SM89) of a GPU. Raises BackendError if there is none."""
    cuda = _cuda()
    try:
        count = _checked(cuda, cuda.cudaGetDeviceCount())
    except BackendError as error:
        raise BackendError(f"no NVIDIA GPU can be used here: {error}") from error
    if index >= count:
        raise BackendError(f"device cuda:{index} was asked for, but this machine has {count} GPUs")
    facts = _checked(cuda, cuda.cudaGetDeviceProperties(index))
    name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
    return name.rstrip("\0"), 10 * facts.major + facts.minor


class TensorRt(Backend):
    """An engine; each thread has its own context, stream and buffers."""

    def __init__(
        self, artifact: Artifact, flavour: str | None, device: str, cuda_graphs: bool = False
    ) -> None:
        """flavour: "tensorrt", "tensorrt-rtx", or None = what the sidecar says. device: "auto",
        "cuda" or "cuda:N". cuda_graphs: replay each shape of input as one graph from its third
        inference on. TensorRT-RTX compiles kernels while it runs, and chooses the time itself. With
        graphs every shape has a context and buffers of its own.

        Raises BackendError if the engine was built for another library, version or GPU, or if
        something is missing; ArtifactError if the sidecar does not say how it was built.
        """
        name, build = artifact.path.name, _facts(artifact)
        if flavour not in (None, build["flavour"]):
            raise BackendError(
                f"{name} is an engine of {build['flavour']}, but {flavour} was asked for: use "
                f"backend {build['flavour']}, or build another engine"
            )
        _, index = parse_device(device)
        if device == "cpu":
            raise BackendError("an engine needs an NVIDIA GPU, got device cpu: use the .onnx file")
        library = library_of(build["flavour"])
        _check_fit(name, build, library.__version__, *gpu(index))
        self.name = build["flavour"] + (CUDA_GRAPH if cuda_graphs else "")
        self.device, self.threads = f"cuda:{index}", 1
        self._cuda, self._index, self._graphs = _cuda(), index, cuda_graphs
        self._call(self._cuda.cudaSetDevice(index))
        self._logger = library.Logger(library.Logger.WARNING)
        if build.get("deform") == "plugin" and not library.init_libnvinfer_plugins(
            self._logger, ""
        ):
            raise BackendError(f"{self.name} could not load the plugins that {name} needs")
        self._runtime = library.Runtime(self._logger)  # lives as long as its engine
        self._engine = self._runtime.deserialize_cuda_engine(artifact.path.read_bytes())
        if self._engine is None:
            raise BackendError(f"{self.name} cannot load {name}; its message is above")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        specs = [(name, self._spec(library, name)) for name in names]
        is_input = {
            name: self._engine.get_tensor_mode(name) == library.TensorIOMode.INPUT for name in names
        }
        self.inputs = tuple(spec for name, spec in specs if is_input[name])
        outputs = [spec for name, spec in specs if not is_input[name]]
        self.outputs = tuple(spec for spec in outputs if not spec.name.startswith(APART))
        self.apart = tuple(spec for spec in outputs if spec.name.startswith(APART))
        self._strategy = None
        if cuda_graphs and build["flavour"] == "tensorrt-rtx":
            self._strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._batch = build["profile"]["batch"]
        self.max_batch = self._batch[2]
        self._local = threading.local()

    def _call(self, result: tuple[Any, ...]) -> Any:
        return _checked(self._cuda, result)

    def _spec(self, library: Any, name: str) -> TensorSpec:
        dtype = np.dtype(library.nptype(self._engine.get_tensor_dtype(name)))
        sides = tuple(self._engine.get_tensor_shape(name))
        return TensorSpec(name, dtype, tuple(None if side < 0 else side for side in sides))

    def _infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, value in feeds.items():
            if not self._batch[0] <= len(value) <= self._batch[2]:
                raise BackendError(
                    f"input {name}: the engine takes batches of {self._batch[0]} to "
                    f"{self._batch[2]}, got {len(value)}"
                )
        if not hasattr(self._local, "lanes"):
            self._call(self._cuda.cudaSetDevice(self._index))  # each thread has a current device
            self._local.lanes = {}
        # A graph holds the state of its context, so each shape needs a context of its own.
        shapes = tuple(feeds[spec.name].shape for spec in self.inputs) if self._graphs else ()
        if shapes not in self._local.lanes:
            self._local.lanes[shapes] = _Lane(self)
        return self._local.lanes[shapes].infer(feeds)

    def _release(self) -> None:
        del self._local, self._engine, self._runtime  # the lanes go first, and free their memory

    def _context(self) -> Any:
        if self._strategy is not None:
            runtime_config = self._engine.create_runtime_config()
            runtime_config.cuda_graph_strategy = self._strategy
            return self._engine.create_execution_context(runtime_config)
        return self._engine.create_execution_context()


class _Lane:
    """What one thread needs to run the engine: a context, a stream, device buffers and, where
    graphs are used, the graph of one shape."""

    def __init__(self, owner: TensorRt) -> None:
        self.owner, self.cuda, self.call = owner, owner._cuda, owner._call
        self.context = owner._context()
        if self.context is None:
            raise BackendError("no execution context: is there enough GPU memory?")
        self.stream = self.call(self.cuda.cudaStreamCreate())
        self.buffers: dict[str, tuple[int, int]] = {}  # name → (address, bytes)
        self.captures = owner._graphs and owner._strategy is None
        self.ran, self.graph = False, None

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        kinds = self.cuda.cudaMemcpyKind
        for name, value in values.items():
            settled = self.captures and self.ran  # the capture must not follow a change of shape
            if not settled and not self.context.set_input_shape(name, value.shape):
                raise BackendError(f"input {name}: the engine refuses shape {value.shape}")
            self._buffer(name, value.nbytes)
        results = {}
        for spec in self.owner.outputs:
            shape = tuple(self.context.get_tensor_shape(spec.name))
            results[spec.name] = np.empty(shape, spec.dtype)
            self._buffer(spec.name, results[spec.name].nbytes)
        for spec in self.owner.apart:  # written by the engine and read by nobody
            sides = tuple(self.context.get_tensor_shape(spec.name))
            self._buffer(spec.name, int(np.prod(sides)) * spec.dtype.itemsize)
        for name, value in values.items():
            on_gpu, upload = self.buffers[name][0], kinds.cudaMemcpyHostToDevice
            self._copy(on_gpu, value.ctypes.data, value.nbytes, upload)
        self._execute()
        for name, value in results.items():
            on_gpu, download = self.buffers[name][0], kinds.cudaMemcpyDeviceToHost
            self._copy(value.ctypes.data, on_gpu, value.nbytes, download)
        self.call(self.cuda.cudaStreamSynchronize(self.stream))
        return results

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        """Copy `size` bytes between two addresses, in the order of the stream."""
        self.call(self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def _buffer(self, name: str, size: int) -> None:
        """Device memory of at least `size` bytes for a tensor."""
        address, capacity = self.buffers.get(name, (0, 0))
        if size <= capacity:
            return
        if address:
            self.call(self.cuda.cudaFree(address))
            del self.buffers[name]
        address = int(self.call(self.cuda.cudaMalloc(size)))
        self.buffers[name] = address, size
        if not self.context.set_tensor_address(name, address):
            raise BackendError(f"the engine has no tensor {name}")

    def _execute(self) -> None:
        if not (self.captures and self.ran):  # the first run sets things up
            self._enqueue()
            self.ran = True
            return
        if self.graph is None:
            mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            self.call(self.cuda.cudaStreamBeginCapture(self.stream, mode))
            try:
                self._enqueue()
            finally:
                graph = self.call(self.cuda.cudaStreamEndCapture(self.stream))
            self.graph = self.call(self.cuda.cudaGraphInstantiate(graph, 0))
            self.call(self.cuda.cudaGraphDestroy(graph))
        self.call(self.cuda.cudaGraphLaunch(self.graph, self.stream))

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(int(self.stream)):
            raise BackendError("the engine did not run; its message is above")

    def __del__(self) -> None:
        """Give everything back when its thread ends; nothing can be raised here."""
        cuda = self.cuda
        if not hasattr(self, "stream"):
            return
        cuda.cudaStreamSynchronize(self.stream)
        if self.graph is not None:
            cuda.cudaGraphExecDestroy(self.graph)
        for address, _ in self.buffers.values():
            cuda.cudaFree(address)
        cuda.cudaStreamDestroy(self.stream)


def _facts(artifact: Artifact) -> Mapping[str, Any]:
    """How an engine was built, from its sidecar. Raises ArtifactError if that is not known."""
    name, sidecar = artifact.path.name, artifact.sidecar
    assert sidecar is not None  # open_artifact refuses an engine without one
    missing = {"flavour", "version", "profile"} - sidecar.build.keys()
    if missing or not {"sms", "gpu"} & sidecar.build.keys():
        raise ArtifactError(
            f"the sidecar of {name} does not say how it was built (no "
            f"{', '.join(sorted(missing)) or 'sms or gpu'}): build it again"
        )
    if sidecar.build["flavour"] not in FLAVOURS:
        raise ArtifactError(
            f"{name}: flavour must be one of {', '.join(FLAVOURS)}, got "
            f"{sidecar.build['flavour']!r}"
        )
    return sidecar.build


def _check_fit(file: str, build: Mapping[str, Any], version: str, name: str, sm: int) -> None:
    """Raise BackendError unless library and GPU are those the engine was built for."""
    if build["version"] != version:
        raise BackendError(
            f"{file} was built with {build['flavour']} {build['version']}, but {version} is "
            "installed: install that version, or build the engine again from its .onnx file"
        )
    fits = sm in build["sms"] if "sms" in build else name == build["gpu"]
    if not fits:
        built = " and ".join(f"SM{one}" for one in build["sms"]) if "sms" in build else build["gpu"]
        raise BackendError(
            f"{file} was built for {built}, but this GPU is {name} (SM{sm}): build the "
            "engine again for it from its .onnx file"
        )
