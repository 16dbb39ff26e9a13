"""`verify` and `inspect`: prove an artifact wherever it runs, and say what is known about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from dsgnn.export.onnx import backend_infer, read_source, torch_infer
from dsgnn.export.parity.comparison import Infer, gate
from dsgnn.export.parity.limits import Parity, machine, table
from dsgnn.runtime.artifact import Artifact, Description, Sidecar, open_artifact, write_sidecar
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.errors import ArtifactError
from dsgnn.runtime.letterbox import Fixed


def verify(
    path: Path,
    against: Path,
    photos: Sequence[np.ndarray],
    backend: str = "auto",
    device: str = "auto",
) -> tuple[Sidecar, list[Parity]]:
    """Run the parity gate on an artifact and write the outcome into its sidecar, passed or not.

    The outcome is a verdict for the backend and the kind of device alone: what the sidecar says of
    other places stays. A backend that rounds to bfloat16 is held to the limits of bf16.

    against: the checkpoint it came from, or an ONNX file of the same network and input size (which
    ONNX Runtime runs on the CPU). photos: (h, w, 3) uint8 RGB. backend, device: what runs the
    artifact, as in `open_backend`. Raises ArtifactError if the two are not of one network,
    CheckpointError, BackendError, FileNotFoundError.
    """
    artifact = open_artifact(path)
    reference = _reference(against, artifact.description)
    candidate = open_backend(path, backend, device)
    known = artifact.sidecar or Sidecar(path.name, artifact.sha256, verified=False)
    about = artifact.description
    if candidate.name.endswith("-bf16") and about.precision != "int8":
        about = replace(about, precision="bf16")
    results = gate(reference, backend_infer(candidate), photos, about, known.build)
    how = {
        "against": against.name,
        "backend": candidate.picked,
        "precision": about.precision,
        **({"on_cpu": dict(candidate.on_cpu)} if candidate.on_cpu else {}),
    }
    found = tuple({**result.to_dict(), **how} for result in results)
    elsewhere = [check for check in known.parity if known.place(check) != known.place(found[0])]
    sidecar = replace(known, parity=(*elsewhere, *found))
    sidecar = replace(
        sidecar,
        verified=any(sidecar.verdicts().values()),
        machine=machine(),
        build={key: value for key, value in known.build.items() if key != "not_run"},
    )
    write_sidecar(path, sidecar)
    return sidecar, results


def _reference(against: Path, expected: Description) -> Infer:
    """What gives the right answers. Raises ArtifactError if it is of another network, or has other
    weights: comparing with it would say nothing about the artifact."""
    if against.suffix == ".onnx":
        facts = open_artifact(against).description
        same = (facts.config, facts.queries, facts.input)
        wanted = (expected.config, expected.queries, expected.input)
        if same != wanted:
            raise ArtifactError(
                f"{against.name} is of another network or input size: expected config, queries "
                f"and input {wanted}, got {same}"
            )
        _same_weights(against, facts.source_sha256, expected.source_sha256)
        return backend_infer(open_backend(against, "onnxruntime", "cpu"))
    source = read_source(against)
    config = source.model.config
    if (config.name, config.queries) != (expected.config, expected.queries):
        raise ArtifactError(
            f"{against.name} is of another network: expected {expected.config} with "
            f"{expected.queries} queries, got {config.name} with {config.queries}"
        )
    _same_weights(against, source.sha256, expected.source_sha256)
    return torch_infer(source.model)


def _same_weights(against: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ArtifactError(
            f"{against.name} is not what the artifact came from: expected the checkpoint of sha256 "
            f"{expected}, got {found}"
        )


def summary(path: Path) -> str:
    """An artifact for a person: its facts, its checks, how it was built, what is in the graph.

    Raises FileNotFoundError or ArtifactError as `open_artifact` does.
    """
    artifact = open_artifact(path)
    facts = artifact.description
    rule = facts.input
    size = (
        f"{rule.height}x{rule.width}"
        if isinstance(rule, Fixed)
        else f"longest side {rule.size}, multiples of {rule.multiple}"
    )
    lines = [
        f"{path.name}: {facts.config}, {facts.precision}, {facts.about_weights}",
        f"status      {_status(artifact)}",
        f"size        {path.stat().st_size / 1e6:.1f} MB, sha256 {artifact.sha256}",
        f"input       uint8 RGB, {size} px (letterboxed)",
        f"answers     at most {facts.queries} objects, score above {facts.threshold:g}"
        + (f", of two with a mask IoU above {facts.nms_iou:g} the surer" * (facts.nms_iou < 1)),
        f"source      checkpoint sha256 {facts.source_sha256}, dsgnn {facts.toolkit}",
    ]
    if path.suffix == ".onnx":
        lines += _graph(path)
    if artifact.sidecar:
        for key, value in artifact.sidecar.build.items():
            shown = value if isinstance(value, str | int | float) else json.dumps(value)
            lines.append(f"build       {key}: {shown}")
        for place, passed in artifact.sidecar.verdicts().items() if artifact.sidecar.parity else ():
            checks = [c for c in artifact.sidecar.parity if artifact.sidecar.place(c) == place]
            precision = checks[0].get("precision", facts.precision)
            said = "verified" if passed else "gives other answers"
            lines += ["", f"{place}, computed in {precision}: {said}"]
            if isinstance(on_cpu := checks[0].get("on_cpu"), dict) and on_cpu:
                left = ", ".join(f"{count} {name}" for name, count in on_cpu.items())
                lines.append(f"left to the CPU, none of which takes time: {left}")
            lines.append(table([Parity.from_dict(check) for check in checks]))
    return "\n".join(lines)


def _status(artifact: Artifact) -> str:
    if artifact.sidecar is None:
        return "unverified: no sidecar beside it"
    if artifact.sidecar.verified:
        place = artifact.sidecar.machine.get("processor", "an unnamed machine")
        return f"{artifact.about_status}, on {place}"
    if artifact.sidecar.parity:
        return "unverified: the checks below failed"
    return "unverified: never run; use `dsgnn-export verify` on a machine that can"


def _graph(path: Path) -> list[str]:
    """Inputs, outputs, weights and operators of an ONNX file."""
    model = onnx.load(path)
    graph = model.graph
    lines = [f"ONNX        opset {model.opset_import[0].version}, {len(graph.node)} nodes"]
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            sides = [side.dim_param or side.dim_value for side in tensor.shape.dim]
            dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
            lines.append(f"  {kind:9s} {value.name}: {dtype} ({', '.join(map(str, sides))})")
    weights: Counter[str] = Counter()
    for tensor in graph.initializer:
        dtype = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        weights[dtype] += int(np.prod(tensor.dims))
    named = [f"{count:,} {dtype}" for dtype, count in weights.most_common()]
    lines.append(f"  constants {', '.join(named)}")
    operators = Counter(node.op_type for node in graph.node).most_common()
    for start in range(0, len(operators), 6):
        row = (f"{name} {count}" for name, count in operators[start : start + 6])
        lines.append(f"  {'operators' if not start else '':9s} {', '.join(row)}")
    return lines
