"""What was built, whatever was asked for: in which types the products of a graph are computed.

A builder that lacks kernels for a type may fall back to another one and say nothing
(roboflow/rf-detr#1453), and the answers stay right. So the types are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx
from onnx import ModelProto, TensorProto

from dsgnn.runtime.errors import DsgnnError

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
WANTED = {
    "fp32": "float32",
    "w16": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
}
NAMES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}  # as libraries call them
USUAL = 0.9  # share of the products: the last ones, of saliency and score, stay in float32
LEAST = {"int8": 0.02}  # only convolutions are in eight bits, and a Swin network has few


class PrecisionError(DsgnnError, RuntimeError):
    """An artifact that does not compute in the precision that was asked for."""


class SamplingError(DsgnnError, RuntimeError):
    """A graph whose sampling was read as another one."""


def product_types(proto: ModelProto) -> dict[str, int]:
    """How many products of the graph are computed in each type.

    A product whose input was just brought back from eight bits counts as "int8": that is how
    inference libraries recognise it.
    """
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in inferred.input}
    kinds |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    quantised = {
        name for node in inferred.node if node.op_type == "DequantizeLinear" for name in node.output
    }
    counts: Counter[str] = Counter()
    for node in inferred.node:
        if node.op_type not in PRODUCTS:
            continue
        if node.input[0] in quantised and node.input[1] in quantised:
            counts["int8"] += 1
        else:
            kind = kinds.get(node.input[0], TensorProto.UNDEFINED)
            counts[_name(TensorProto.DataType.Name(kind))] += 1
    return dict(counts)


def layer_types(library: Any, network: Any) -> dict[str, int]:
    """The same of a network that TensorRT or TensorRT-RTX parsed; it is strongly typed."""
    kinds = {library.LayerType.CONVOLUTION, library.LayerType.MATRIX_MULTIPLY}
    kinds.add(library.LayerType.DECONVOLUTION)
    layers = (network.get_layer(number) for number in range(network.num_layers))
    found = (layer.get_output(0).dtype.name for layer in layers if layer.type in kinds)
    return dict(Counter(map(_name, found)))


def check_sampling(library: Any, network: Any) -> None:
    """Raise SamplingError unless a parsed network samples bilinearly wherever it samples: some
    parsers read the GridSample of opset 20 as nearest (NVIDIA/TensorRT#4646)."""
    modes = [sampling.interpolation_mode for sampling in sampling_layers(library, network)]
    wrong = [mode.name for mode in modes if mode != library.InterpolationMode.LINEAR]
    if wrong:
        raise SamplingError(
            f"the parser of {library.__name__} {library.__version__} reads {len(wrong)} of "
            f"{len(modes)} GridSample as {wrong[0].lower()}, and the graph means bilinear"
        )


def sampling_layers(library: Any, network: Any) -> list[Any]:
    """The GridSample layers of a parsed network."""
    found = []
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == library.LayerType.GRID_SAMPLE:
            layer.__class__ = library.IGridSampleLayer  # or its mode cannot be read
            found.append(layer)
    return found


def check_types(types: Mapping[str, int], precision: str, what: str) -> None:
    """Raise PrecisionError unless nearly all products are in the type of the precision.

    types: as `product_types` counts them. what: the artifact's name, for the message.
    """
    wanted, total = WANTED[precision], sum(types.values())
    if types.get(wanted, 0) < LEAST.get(precision, USUAL) * total:
        rest = ", ".join(f"{count} in {name}" for name, count in types.items() if name != wanted)
        raise PrecisionError(
            f"{precision} was asked for, but of the {total} products of {what} only "
            f"{types.get(wanted, 0)} are in {wanted} ({rest}): it was not written. Take another "
            "precision, and please report this"
        )


def _name(kind: str) -> str:
    return NAMES.get(kind.lower(), kind.lower())
