"""Half precision in the graph: a float32 ONNX graph is retyped, so that every runtime computes what
was checked (TensorRT 11 has typed networks only).

In fp16 and bf16 some parts stay float32, with casts where they begin and end: the normalisation of
the image, softmax, the statistics of normalisation layers, sampling and its locations, and the last
product behind saliency and score. w16 computes in float32 on weights stored as float16.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from dsgnn.runtime.errors import OptionError

BF16_OPSET = 22  # the first whose Conv takes bfloat16
STORED_AS_HALF = 1024  # elements; smaller tensors (norms, biases) are not worth the rounding
FLOAT = TensorProto.FLOAT
TYPES = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
WIDE = {
    "Softmax",
    "LayerNormalization",
    "InstanceNormalization",
    "GridSample",
    "TopK",
    "ConstantOfShape",
    "Constant",
    "Range",
}
PRODUCTS = {"Conv", "MatMul", "Gemm"}
INTEGERS = {TensorProto.INT32, TensorProto.INT64}


def store_as_half(proto: ModelProto) -> None:
    """Keep large float32 weights as float16 and cast them back: half the file, the same float32
    arithmetic (inference libraries fold the cast when they load the file)."""
    casts = []
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype != np.float32 or value.size < STORED_AS_HALF:
            continue
        name = tensor.name
        half = numpy_helper.from_array(value.astype(np.float16), f"{name}.half")
        tensor.CopyFrom(half)
        casts.append(helper.make_node("Cast", [half.name], [name], to=FLOAT))
    _set_nodes(proto, [*casts, *proto.graph.node])


def retype(proto: ModelProto, precision: str) -> None:
    """Turn a float32 graph into a typed fp16 or bf16 graph, in place; inputs and outputs keep
    their types. OptionError if a weight is too large for the type, or for bf16 with GridSample."""
    low, dtype = TYPES[precision]
    graph = proto.graph
    if precision == "bf16":
        if any(node.op_type == "GridSample" for node in graph.node):
            raise OptionError(
                "bf16 needs opset 22, where TensorRT reads GridSample as nearest: let deformable "
                "attention sample by gather, or take fp16"
            )
        proto.opset_import[0].version = BF16_OPSET
    weights = {t.name: t for t in graph.initializer if t.data_type == FLOAT}
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    kinds = {
        v.name: v.type.tensor_type.elem_type
        for v in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    floats = {name for name, kind in kinds.items() if kind == FLOAT} | weights.keys()
    wide = _islands(graph, floats)
    types = dict.fromkeys(floats, FLOAT)  # of each value, as the new graph has it
    made: dict[tuple[str, int], str] = {}  # (value, type) → name of its cast
    nodes: list[NodeProto] = []
    results = {output.name for output in graph.output}

    def as_type(name: str, kind: int) -> str:
        if types[name] == kind:
            return name
        if (name, kind) not in made:
            made[name, kind] = f"{name}.{'fp32' if kind == FLOAT else precision}"
            if name in weights:
                narrow = _narrowed(weights[name], low, dtype, made[name, kind])
                graph.initializer.append(narrow)
            else:
                nodes.append(helper.make_node("Cast", [name], [made[name, kind]], to=kind))
        return made[name, kind]

    for index, node in enumerate(graph.node):
        kind = FLOAT if index in wide else low
        to = next((a for a in node.attribute if a.name == "to"), None)
        if node.op_type == "Cast" and to is not None:
            if to.i == FLOAT:
                to.i = kind
        else:
            last = 1 if node.op_type == "Resize" else len(node.input)  # scales are float32
            for i, name in enumerate(node.input[:last]):
                if name in floats:
                    node.input[i] = as_type(name, kind)
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name not in floats:
                continue
            types[name] = kind
            if name in results and kind != FLOAT:
                node.output[i] = f"{name}.{precision}"
                nodes.append(helper.make_node("Cast", [node.output[i]], [name], to=FLOAT))
                types[name] = FLOAT
    _set_nodes(proto, nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]


def _islands(graph: onnx.GraphProto, floats: set[str]) -> set[int]:
    """Indices of the nodes that stay float32."""
    nodes = list(graph.node)
    maker = {name: i for i, node in enumerate(nodes) for name in node.output}

    def behind(name: str, products: bool) -> set[int]:
        """The nodes that compute a value, back to the products (with them, if asked)."""
        found: set[int] = set()
        todo = [name]
        while todo:
            index = maker.get(todo.pop())
            if index is None or index in found:
                continue
            if nodes[index].op_type not in PRODUCTS | WIDE:
                found.add(index)
                todo.extend(n for n in nodes[index].input if n in floats)
            elif products:
                found.add(index)
        return found

    scores: set[int] = set()
    for name in {"saliency", "score", "attention"} & {output.name for output in graph.output}:
        scores |= behind(name, products=True)
    exact: set[int] = set()  # sampling locations, and the image before the first product
    images = {value.name for value in graph.input}
    for i, node in enumerate(nodes):
        if node.op_type == "GridSample":
            exact |= behind(node.input[1], products=False)
        elif node.op_type == "Cast" and node.attribute[0].i in INTEGERS and node.input[0] in floats:
            exact |= behind(node.input[0], products=False)  # an index: locations of `gather`
        elif node.op_type == "Cast" and node.input[0] in images:
            exact.add(i)
    wide = {i for i, node in enumerate(nodes) if node.op_type in WIDE}
    # what is computed from such values alone: the weights of `gather`, the normalised image
    for i, node in enumerate(nodes):
        made_by = {maker[n] for n in node.input if n in floats and n in maker}
        masks = {j for j in made_by if nodes[j].op_type == "Cast" and j not in exact}
        if node.op_type not in PRODUCTS | WIDE and made_by - masks and made_by - masks <= exact:
            exact.add(i)
    return wide | scores | exact


def _narrowed(tensor: TensorProto, kind: int, dtype: np.dtype, name: str) -> TensorProto:
    value = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        narrow = value.astype(dtype)
    if not np.isfinite(narrow.astype(np.float32)).all():
        raise OptionError(
            f"{tensor.name} holds {np.abs(value).max():g}, too large for {dtype}: take another "
            "precision"
        )
    return TensorProto(data_type=kind, dims=tensor.dims, name=name, raw_data=narrow.tobytes())


def _set_nodes(proto: ModelProto, nodes: list[NodeProto]) -> None:
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
