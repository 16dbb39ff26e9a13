"""int8: convolutions in eight bits, as QuantizeLinear and DequantizeLinear around them.

onnxruntime's quantiser with ranges from calibration photos: weights signed, one scale per output
channel; activations unsigned, as CPUs multiply them (TensorRT takes symmetric ones only). These
rules keep it close to float32. They were found by quantising `nano` in parts and comparing its
masks on photos that calibration had not seen:

- an activation function belongs to the convolution before it. Quantised alone, a convolution spends
  its 256 steps on values that the ReLU after it throws away: this was by far the largest error;
- ranges are the 99.999th percentile of what was seen, not the extremes;
- the first convolutions stay float32: few channels, large values, and all errors pass through the
  rest; so do the convolutions of the map whose peaks seed the queries (near ties) and everything
  that is not a convolution: queries, attention, LayerNorm, ranks, scores.

Weights use the full eight bits: the runtime asks ONNX Runtime for products that do not saturate
where a processor has no VNNI.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import ModelProto

from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.letterbox import Rule, letterbox
from dsgnn.runtime.telemetry import import_without_telemetry

PHOTOS = 32  # fewer leave the ranges to chance
FIRST = 9  # convolutions that stay float32
PERCENTILE = 99.999
ACTIVATIONS = ("Relu", "Clip")
PEAKS = "seeds.heat."  # parameters of the map whose peaks seed the queries


class _Photos:
    """A CalibrationDataReader of onnxruntime. It reads one photo at a time: the quantiser holds
    every activation of all it reads in one go (12 GB for 48 photos through r50-assr)."""

    def __init__(self, name: str, photos: Sequence[np.ndarray], rule: Rule):
        self.name, self.photos, self.rule = name, photos, rule
        self.feeds: Iterator[dict[str, np.ndarray]] = iter(())

    def __len__(self) -> int:
        return len(self.photos)

    def set_range(self, start_index: int, end_index: int) -> None:
        part = self.photos[start_index:end_index]
        self.feeds = iter([{self.name: letterbox(photo, self.rule)[0][None]} for photo in part])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantise(proto: ModelProto, photos: Sequence[np.ndarray], rule: Rule) -> ModelProto:
    """The float32 graph with its convolutions in int8.

    photos: (h, w, 3) uint8 RGB, unlike each other and like what will be ranked; rule: how they are
    letterboxed. OptionError for fewer than PHOTOS.
    """
    check_calibration(photos)
    quantization = import_without_telemetry("onnxruntime.quantization")
    with TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(proto, source)
        quantization.quantize_static(
            source,
            target,
            _Photos(proto.graph.input[0].name, photos, rule),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", *ACTIVATIONS],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=_chosen(proto),
            calibrate_method=quantization.CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": PERCENTILE, "CalibStridedMinMax": 1},
        )
        return onnx.load(target)


def check_calibration(photos: Sequence[np.ndarray]) -> None:
    """Raise OptionError for too few photos."""
    if len(photos) < PHOTOS:
        raise OptionError(
            f"int8 needs at least {PHOTOS} calibration photos, got {len(photos)}: give photos like "
            "those to be ranked"
        )


def round_weights_only(proto: ModelProto) -> ModelProto:
    """A copy that computes in float32 on the eight-bit weights of `quantise`, without calibration.

    It errs less than the int8 graph. If even this copy breaks the limits of int8, then calibration
    is not worth its minutes.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    chosen = set(_chosen(copy))
    weights = {
        node.input[1] for node in copy.graph.node if node.op_type == "Conv" and node.name in chosen
    }
    for tensor in copy.graph.initializer:
        if tensor.name in weights:
            value = onnx.numpy_helper.to_array(tensor)  # (out, in, h, w)
            step = np.abs(value).max((1, 2, 3), keepdims=True) / 127
            rounded = np.round(value / np.where(step, step, 1)) * step
            tensor.CopyFrom(onnx.numpy_helper.from_array(rounded.astype(np.float32), tensor.name))
    return copy


def _chosen(proto: ModelProto) -> list[str]:
    """Names of the convolutions to quantise and of the activation functions right after them."""
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"][FIRST:]
    chosen = [node for node in convolutions if not node.input[1].startswith(PEAKS)]
    made = {node.output[0] for node in chosen}
    return [node.name for node in chosen] + [
        node.name
        for node in proto.graph.node
        if node.op_type in ACTIVATIONS and node.input[0] in made
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantiser, which prints what it does and advice that does not fit our graphs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(disabled)
