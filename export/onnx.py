"""Checkpoint → ONNX: the deploy graph, described, checked and proven equal before it is put in
place."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

import dsgnn
from dsgnn.config import Config
from dsgnn.export.deploy import DeployGraph, Size
from dsgnn.export.int8 import check_calibration, quantise
from dsgnn.export.parity import Answers, Infer, Parity, ParityError, compare, machine, table
from dsgnn.export.precision import retype, store_as_half
from dsgnn.model import DSGNN, build_model, normalise
from dsgnn.runtime.artifact import METADATA_KEY, Description, Sidecar, sha256_of, write_sidecar
from dsgnn.runtime.backends import Backend, open_backend
from dsgnn.runtime.errors import BackendError
from dsgnn.runtime.letterbox import Fixed, LongestSide
from dsgnn.weights.checkpoint import load_checkpoint

OPSET = 18  # from 20 on TensorRT's parser reads GridSample as nearest
INPUT, OUTPUTS = "image", ("saliency", "score", "masks")


@dataclass(frozen=True)
class Source:
    """A model and where its weights are from."""

    model: DSGNN
    weights: str
    sha256: str


def read_source(
    checkpoint: str | Path | None, synthetic: str | None = None, seed: int = 0
) -> Source:
    """A checkpoint, or a configuration with random weights (benchmarks and tests)."""
    if checkpoint is not None and synthetic is None:
        model, weights = load_checkpoint(checkpoint)
        return Source(model, weights, sha256_of(Path(checkpoint)))
    if checkpoint is None and synthetic is not None:
        torch.manual_seed(seed)
        model = build_model(synthetic)
        digest = hashlib.sha256(f"synthetic {synthetic} {seed}".encode()).hexdigest()
        return Source(model, "synthetic", digest)
    raise ValueError("give either a checkpoint or --synthetic CONFIG")


def default_size(config: Config) -> Size:
    """(H, W) for the data sets' 4:3 photos: nothing is lost and little is padded."""
    return -(-config.size * 3 // 4 // 32) * 32, config.size


def describe(source: Source, size: Size | None, precision: str = "fp32") -> Description:
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
    )


def build_onnx(graph: torch.nn.Module, size: Size | None, example: Size) -> onnx.ModelProto:
    """A module uint8 (B, H, W, 3) → three outputs as ONNX; B is dynamic, H and W when size is None.

    example: (H, W) to trace with.
    """
    image = torch.zeros(2, *example, 3, dtype=torch.uint8)
    shape: dict[int, object] = {0: torch.export.Dim("batch", min=1, max=1024)}
    if size is None:
        shape[1] = 32 * torch.export.Dim("rows", min=2, max=128)
        shape[2] = 32 * torch.export.Dim("columns", min=2, max=128)
    program = torch.onnx.export(
        graph, (image,), dynamo=True, opset_version=OPSET, input_names=[INPUT],
        output_names=list(OUTPUTS), dynamic_shapes={"image": shape}, verbose=False,
    )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    for axis, side in enumerate(proto.graph.input[0].type.tensor_type.shape.dim):
        if axis in shape and not side.dim_param:  # the exporter falls back silently
            raise RuntimeError(f"the exporter fixed axis {axis} of the input to {side.dim_value}")
    return proto


def torch_infer(model: DSGNN) -> Infer:
    """The network itself as a reference for the parity gate."""

    def infer(images: np.ndarray) -> Answers:
        with torch.inference_mode():
            out = model(normalise(torch.from_numpy(images)))
        return {"saliency": out.saliency.numpy(), "score": out.score.numpy(),
                "masks": out.masks.numpy()}  # fmt: skip

    return infer


def backend_infer(backend: Backend) -> Infer:
    return lambda images: backend.infer({INPUT: images})


def export_onnx(
    source: Source,
    path: Path,
    photos: list[np.ndarray],
    size: Size | None,
    precision: str = "fp32",
    deform: str = "gridsample",
    calibration: Sequence[np.ndarray] = (),
) -> tuple[Sidecar, list[Parity]]:
    """Write `path` and its sidecar, if the graph gives the network's answers on the photos.

    size: (H, W) or None for any size. precision: "fp32"; "fp16" or "bf16", see
    `dsgnn.export.precision`; "w16", float32 arithmetic on weights stored as float16; or "int8",
    convolutions in eight bits with ranges from the calibration photos, see `dsgnn.export.int8`.
    photos, calibration: (h, w, 3) uint8 RGB. ParityError with the table when the precision's limits
    are not kept: nothing is put in place. bf16 is written unverified where ONNX Runtime has no
    kernels for it (`build["not_run"]` says so). ValueError for options that do not go together.
    """
    began = time.monotonic()
    if calibration and precision != "int8":
        raise ValueError(f"calibration photos are for int8, got precision {precision}")
    if precision == "int8":
        check_calibration(calibration)
    graph = DeployGraph(source.model, size, deform).eval()
    proto = build_onnx(graph, size, size or default_size(source.model.config))
    description = describe(source, size, precision)
    if precision == "w16":
        store_as_half(proto)
    elif precision in ("fp16", "bf16"):
        retype(proto, precision)
    elif precision == "int8":
        proto = quantise(proto, calibration, description.input)
    elif precision != "fp32":
        raise ValueError(f"precision must be fp32, w16, fp16, bf16 or int8, got {precision!r}")
    proto.metadata_props.add(key=METADATA_KEY, value=description.to_json())
    proto.producer_name, proto.producer_version = "dsgnn", dsgnn.__version__
    part = path.with_name(f".{path.name}.part.onnx")
    try:
        onnx.save(proto, part)
        onnx.checker.check_model(str(part), full_check=True)
        onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        build = {"opset": proto.opset_import[0].version, "deform": deform,
                 "nodes": len(proto.graph.node)}  # fmt: skip
        if calibration:
            build["calibration_photos"] = len(calibration)
        results: list[Parity] = []
        try:
            candidate = open_backend(part, "onnxruntime", "cpu")
        except BackendError as error:
            if precision != "bf16":  # the one that ONNX Runtime may lack kernels for
                raise
            build["not_run"] = str(error)
        else:
            reference, infer = torch_infer(source.model), backend_infer(candidate)
            results = compare(reference, infer, photos, description)
        failed = not all(result.passed for result in results)
        verified = bool(results) and not failed
        # with random weights nothing is separated clearly: below fp32 they are only reported
        if failed and not (source.weights == "synthetic" and precision != "fp32"):
            raise ParityError(
                f"{path.name} does not give the network's answers and was not written:\n"
                f"{table(results)}\ntry --deform gather or another precision"
            )
        sidecar = Sidecar(
            file=path.name,
            sha256=sha256_of(part),
            verified=verified,
            parity=tuple(result.to_dict() for result in results),
            machine=machine(),
            build={**build, "seconds": round(time.monotonic() - began, 1)},
        )  # fmt: skip
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    write_sidecar(path, sidecar)
    return sidecar, results
