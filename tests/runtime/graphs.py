"""The small networks of the tests, as ONNX files."""

import numpy as np


def colours_graph(attention: bool = False) -> bytes:
    """How colours.onnx was made; needs onnx.

    attention: with a fourth output over cells of 16 × 16 pixels, which prefers what is blue.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = np.float32([[2, -1, -1], [-1, 2, -1], [-1, -1, 2], [1, 1, -2], [0, 0, 0]]) / 32
    bias = np.float32([-4, -4, -4, -10, -8])
    nodes = [
        helper.make_node("Cast", ["image"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["t"], ["p"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Conv", ["p", "w", "b"], ["masks"]),
        helper.make_node("Relu", ["masks"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["saliency"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMax", ["masks"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("Sigmoid", ["m"], ["score"]),
    ]
    constants = {"w": weights.reshape(5, 3, 1, 1), "b": bias}
    shapes = {"saliency": ["B", 5], "score": ["B", 5], "masks": ["B", 5, "h", "w"]}
    if attention:
        nodes += [
            helper.make_node("AveragePool", ["p"], ["q"], kernel_shape=[4, 4], strides=[4, 4]),
            helper.make_node("Conv", ["q", "blue"], ["c"]),
            helper.make_node("Squeeze", ["c", "axis"], ["logits"]),
            helper.make_node("Shape", ["logits"], ["size"]),
            helper.make_node("Flatten", ["logits"], ["flat"], axis=1),
            helper.make_node("Softmax", ["flat"], ["soft"], axis=1),
            helper.make_node("Reshape", ["soft", "size"], ["attention"]),
        ]
        constants["blue"] = np.float32([-0.02, -0.02, 0.03]).reshape(1, 3, 1, 1)
        constants["axis"] = np.int64([1])
        shapes["attention"] = ["B", "gh", "gw"]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    made = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="dsgnn tests",
    )
    return made.SerializeToString(deterministic=True)
