"""From a checkpoint to ONNX: the deploy graph is described, checked, and compared with the network
before its file is put in place."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import dsgnn
from dsgnn.config import Config
from dsgnn.export.deploy.folding import Size
from dsgnn.export.deploy.network import DeployGraph
from dsgnn.export.half_precision import retype, store_as_half
from dsgnn.export.int8 import check_calibration, quantise, round_weights_only
from dsgnn.export.parity.built import check_types, product_types
from dsgnn.export.parity.comparison import Answers, Infer, gate
from dsgnn.export.parity.limits import LIMITS, Parity, machine, only_reported, settle
from dsgnn.export.sampling import FOR_ONNX, climb, sampled, ways
from dsgnn.model import DSGNN, build_model, normalise
from dsgnn.runtime.artifact import METADATA_KEY, Description, Sidecar, sha256_of, write_sidecar
from dsgnn.runtime.backends import Backend, open_backend
from dsgnn.runtime.errors import BackendError, OptionError
from dsgnn.runtime.letterbox import Fixed, LongestSide
from dsgnn.weights.checkpoint import load_checkpoint, origin_of

OPSET = 18  # from 20 on TensorRT's parser reads GridSample as nearest
INPUT = "image"
ADVICE = "Take another precision, and please report this."
INT8_ADVICE = (
    "Eight bits suit a network that separates its objects clearly: train it further, calibrate "
    "with more photos like those to be ranked, or take w16 or fp32."
)


@dataclass(frozen=True)
class ExportSource:
    """A network to export: the model, where its weights are from, their file's sha256, and what
    they were trained on in words, as far as the file says."""

    model: DSGNN
    weights: str
    sha256: str
    origin: str = ""


def read_source(
    checkpoint: str | Path | None, synthetic: str | None = None, seed: int = 0
) -> ExportSource:
    """A checkpoint, or a configuration with random weights (benchmarks and tests)."""
    if checkpoint is not None and synthetic is None:
        model, weights = load_checkpoint(checkpoint)
        return ExportSource(model, weights, sha256_of(Path(checkpoint)), origin_of(checkpoint))
    if checkpoint is None and synthetic is not None:
        torch.manual_seed(seed)
        model = build_model(synthetic)
        digest = hashlib.sha256(f"synthetic {synthetic} {seed}".encode()).hexdigest()
        return ExportSource(model, "synthetic", digest)
    raise OptionError("give either a checkpoint, or a configuration to have random weights of")


def default_size(config: Config) -> Size:
    """(H, W) for the data sets' 4:3 photos: nothing is lost and little is padded."""
    return LongestSide(config.size).geometry(3, 4).padded


def describe(source: ExportSource, size: Size | None, precision: str = "fp32") -> Description:
    config = source.model.config
    return Description(
        config=config.name,
        input=LongestSide(config.size) if size is None else Fixed(*size),
        queries=config.queries,
        threshold=config.threshold,
        precision=precision,
        weights=source.weights,
        source_sha256=source.sha256,
        toolkit=dsgnn.__version__,
        attention=config.attention,
        order=config.order,
        nms_iou=config.nms_iou,
        origin=source.origin,
    )


def build_onnx(
    graph: torch.nn.Module, outputs: Sequence[str], size: Size | None, example: Size
) -> onnx.ModelProto:
    """A module uint8 (B, H, W, 3) → its outputs as ONNX; B is dynamic, H and W when size is None.

    outputs: their names, in the module's order. example: (H, W) to trace with.
    """
    image = torch.zeros(2, *example, 3, dtype=torch.uint8)
    shape: dict[int, object] = {0: torch.export.Dim("batch", min=1, max=1024)}
    if size is None:
        shape[1] = 32 * torch.export.Dim("rows", min=2, max=128)
        shape[2] = 32 * torch.export.Dim("columns", min=2, max=128)
    program = torch.onnx.export(
        graph,
        (image,),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=list(outputs),
        dynamic_shapes={"image": shape},
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for axis, side in enumerate(proto.graph.input[0].type.tensor_type.shape.dim):
        if axis in shape and not side.dim_param:  # the exporter falls back silently
            raise BackendError(
                f"PyTorch {torch.__version__} cannot export this size: it fixed axis {axis} of the "
                f"input to {side.dim_value}; install a newer PyTorch, or export a fixed size"
            )
    strip_traces(proto)
    return proto


def strip_traces(proto: onnx.ModelProto) -> None:
    """Take out the exporter's notes: they hold source lines and paths of this machine."""
    functions = [node for function in proto.functions for node in function.node]
    for part in (
        *proto.graph.node,
        *functions,
        *proto.graph.value_info,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.initializer,
        proto.graph,
    ):
        del part.metadata_props[:]
        part.doc_string = ""


def torch_infer(model: DSGNN) -> Infer:
    """The network itself as a reference for the parity gate."""

    def infer(images: np.ndarray) -> Answers:
        with torch.inference_mode():
            answers = model(normalise(torch.from_numpy(images))).answers()
        names = model.config.outputs
        return {name: value.numpy() for name, value in zip(names, answers, strict=True)}

    return infer


def backend_infer(backend: Backend) -> Infer:
    return lambda images: backend.infer({INPUT: images})


def export_onnx(
    source: ExportSource,
    path: Path,
    photos: list[np.ndarray],
    size: Size | None,
    precision: str = "fp32",
    deform: str = "gridsample",
    calibration: Sequence[np.ndarray] = (),
    *,
    keep_unverified: bool = False,
) -> tuple[Sidecar, list[Parity]]:
    """Write `path` and its sidecar, if the graph gives the network's answers on the photos.

    size: (H, W) or None for any size. precision: "fp32"; "fp16" or "bf16", see
    `dsgnn.export.half_precision`; "w16", float32 arithmetic on weights stored as float16; or
    "int8", convolutions in eight bits with ranges from the calibration photos, see
    `dsgnn.export.int8`. deform: how deformable attention samples, "gridsample" or "gather"; where
    the answers by gridsample are others, gather is tried too. photos, calibration: (h, w, 3) uint8
    RGB. keep_unverified: write what was asked for, as unverified, even if the limits of the
    precision are broken.

    bf16 is written unverified where ONNX Runtime has no kernels for it (`build["not_run"]` says
    so). Raises ParityError with the table when the limits of the precision are broken; then nothing
    is put in place. For int8 that shows within seconds where the weights alone, rounded to eight
    bits, break them. Raises PrecisionError when the graph does not compute
    in the precision, OptionError for options that do not go together.
    """
    began = time.monotonic()
    if precision not in LIMITS:
        raise OptionError(f"precision must be one of {', '.join(LIMITS)}, got {precision!r}")
    if calibration and precision != "int8":
        raise OptionError(f"calibration photos are for int8, got precision {precision}")
    if precision == "int8":
        check_calibration(calibration)
    config = source.model.config
    graph = DeployGraph(source.model, size).eval()
    proto = build_onnx(graph, config.outputs, size, size or default_size(config))
    description = describe(source, size, precision)
    names = ways(proto, FOR_ONNX, deform)
    settled = precision == "int8" or keep_unverified or only_reported(description)
    # Other ways to sample are not tried where a failure is accepted or is not the sampling's fault.
    # bf16 cannot have GridSample and always needs the next way.
    if settled and precision != "bf16":
        names = names[:1]
    part = path.with_name(f".{path.name}.part.onnx")
    reference = torch_infer(source.model)

    def compared(candidate: onnx.ModelProto) -> list[Parity]:
        onnx.save(candidate, part)
        infer = backend_infer(open_backend(part, "onnxruntime", "cpu"))
        return gate(reference, infer, photos, description)

    def attempt(way: str) -> tuple[dict[str, Any], list[Parity], bool]:
        """Build facts, checks and verdict of the graph that samples in this way; it is `part`."""
        made = onnx.ModelProto()
        made.CopyFrom(sampled(proto, way))  # the next way starts from it too
        if precision == "int8" and not (keep_unverified or only_reported(description)):
            settle(
                compared(described(round_weights_only(made), description)),
                description,
                False,
                f"{path.name} was not made: its network does not give the same answers even with "
                f"only its weights in eight bits. {INT8_ADVICE}",
            )
        made = described(_in_precision(made, description, calibration), description)
        onnx.save(made, part)
        onnx.checker.check_model(str(part), full_check=True)
        onnx.shape_inference.infer_shapes(made, strict_mode=True)
        build: dict[str, Any] = {
            "opset": made.opset_import[0].version,
            "deform": way,
            "nodes": len(made.graph.node),
            "products": product_types(made),
        }
        check_types(build["products"], precision, path.name)
        if calibration:
            build["calibration_photos"] = len(calibration)
        results: list[Parity] = []
        try:
            results = compared(made)
        except BackendError as error:
            if precision != "bf16":  # the one that ONNX Runtime may lack kernels for
                raise
            build["not_run"] = str(error)
        verified = settle(
            results,
            description,
            keep_unverified,
            f"{path.name} does not give the network's answers and was not written. "
            f"{INT8_ADVICE if precision == 'int8' else ADVICE}",
        )
        return build, results, verified

    try:
        (build, results, verified), tried = climb(names, attempt, OptionError)
        sidecar = Sidecar(
            file=path.name,
            sha256=sha256_of(part),
            verified=verified,
            parity=tuple(
                {**result.to_dict(), "backend": "onnxruntime on cpu", "precision": precision}
                for result in results
            ),
            machine=machine(),
            build={**build, "tried": tried, "seconds": round(time.monotonic() - began, 1)},
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    write_sidecar(path, sidecar)
    return sidecar, results


def _in_precision(
    proto: onnx.ModelProto, description: Description, calibration: Sequence[np.ndarray]
) -> onnx.ModelProto:
    """The float32 graph in the precision of the description; it may be changed in place."""
    if description.precision == "int8":
        return quantise(proto, calibration, description.input)
    if description.precision == "w16":
        store_as_half(proto)
    elif description.precision != "fp32":
        retype(proto, description.precision)
    return proto


def described(proto: onnx.ModelProto, description: Description) -> onnx.ModelProto:
    """The graph itself, changed in place: its static facts are inside, as `open_artifact` wants."""
    proto.metadata_props.add(key=METADATA_KEY, value=description.to_json())
    proto.producer_name, proto.producer_version = "dsgnn", dsgnn.__version__
    return proto
