"""Every name of TensorRT that the exporter and the backend use exists in both flavours.

`tensorrt` cannot be imported without its GPU libraries, so it is held by its published type stubs
(`tensorrt-stubs`); `tensorrt_rtx` by the bindings that are installed. Not by mypy: which of the two
modules is used is only known when the program runs, and the stubs of 10.13 are no valid Python.
"""

import ast
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsgnn.export import tensorrt as exporter
from dsgnn.export.parity import built
from dsgnn.runtime.backends import tensorrt as backend

# variable or attribute in our source -> class of the library
HOLDS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "layer": "ILayer",
    "sampling": "IGridSampleLayer",
    "image": "ITensor",
    "tensor": "ITensor",
    "e": "ParserError",
    "_runtime": "Runtime",
    "_engine": "ICudaEngine",
    "runtime_config": "IRuntimeConfig",
    "context": "IExecutionContext",
}
# TensorRT builds for the GPU that is present, TensorRT-RTX for named ones; TensorRT-RTX measures
# nothing when it builds, captures CUDA graphs itself and has no plugins. Each call is kept to its
# flavour.
ONLY_RTX = {
    "CudaGraphStrategy",
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "IRuntimeConfig.cuda_graph_strategy",
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}
ONLY_TENSORRT = {
    "init_libnvinfer_plugins",
    "IBuilderConfig.set_timing_cache",
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.get_timing_cache",
}


def used() -> set[str]:
    """Dotted names below the library: `Builder`, `Builder.create_network`, …"""
    names = set()
    for module in (exporter, built, backend):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(node, ast.Attribute):
                continue
            chain = ast.unparse(node).split(".")
            owner = chain[-2]
            if chain[0] == "library" and all(part.isidentifier() for part in chain):
                names.add(".".join(chain[1:]))
            elif owner in HOLDS and chain[0] not in ("tensor", "np"):
                names.add(f"{HOLDS[owner]}.{chain[-1]}")
    return names - {"__name__", "__version__", "ILayer.__class__"}


def stubs() -> set[str]:
    """Dotted names that the stubs of `tensorrt` declare, inherited ones included; read by line."""
    spec = find_spec("tensorrt_bindings")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    text = (folder / "__init__.pyi").read_text() + (folder / "tensorrt.pyi").read_text()
    names = {name for name in ("nptype", "init_libnvinfer_plugins") if f"def {name}(" in text}
    members: dict[str, set[str]] = {}
    owner = ""
    for line in (folder / "tensorrt.pyi").read_text().splitlines():
        if start := re.match(r"class (\w+)(?:\((.*)\))?:", line):
            owner = start[1]
            bases = re.findall(r"\w+", start[2] or "")
            members[owner] = set().union(*(members.get(base, set()) for base in bases))
        elif member := re.match(r"    (?:def |class )?(\w+)\b", line):
            members.get(owner, set()).add(member[1])
    for name, found in members.items():
        names |= {name, *(f"{name}.{member}" for member in found)}
    return names


def test_the_list_is_read_from_the_source() -> None:
    names = used()
    assert {
        "Builder",
        "Builder.build_serialized_network",
        "OnnxParser.parse",
        "Runtime",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.get_tensor_mode",
        "TensorIOMode.INPUT",
        "ParserError.node_operator",
        "MemoryPoolType.WORKSPACE",
        "ITensor.shape",
        "nptype",
        "IOptimizationProfile.set_shape",
        *ONLY_RTX,
        *ONLY_TENSORRT,
    } <= names


def test_tensorrt_has_them() -> None:
    if find_spec("tensorrt_bindings") is None:
        pytest.skip("needs tensorrt-stubs, which the Makefile installs without TensorRT")
    assert used() - stubs() == ONLY_RTX


def test_tensorrt_rtx_has_them() -> None:
    library = pytest.importorskip("tensorrt_rtx")

    def exists(name: str) -> bool:
        found = library
        for part in name.split("."):
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True

    assert {name for name in used() if not exists(name)} <= ONLY_TENSORRT
