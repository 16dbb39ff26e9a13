"""By how much an artifact may differ from what it was made from, and what a comparison found.

The limits are those of a precision. A record of one comparison lies in the sidecar; `table` shows
records to a person, and `settle` says what follows from them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from dsgnn.runtime.artifact import Description
from dsgnn.runtime.errors import ArtifactError, DsgnnError

LIBRARIES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "numpy",
)


class ParityError(DsgnnError, RuntimeError):
    """An artifact that does not give the answers of what it was made from; failures names the
    limits that it breaks."""

    def __init__(self, message: str, failures: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)


@dataclass(frozen=True)
class ParityLimits:
    """By how much an artifact of one precision may differ from what it was made from.

    saliency: largest difference (None = not limited). iou_min: of every mask, unless its pixels
    (at stride 4) differ in at most `pixels` places. iou_mean: over all masks. margin: pairs of
    objects whose saliencies lie further apart than this share of the range must keep their order.
    attention: largest share of looks that may move from one place to another on a photo. score: how
    far from the threshold a score must lie for its object to be clearly kept, or clearly not; and
    by how much scores may differ on average.
    """

    saliency: float | None
    iou_min: float
    pixels: int
    iou_mean: float
    margin: float
    attention: float
    score: float


_SIXTEEN_BITS = ParityLimits(
    saliency=None, iou_min=0.0, pixels=0, iou_mean=0.99, margin=0.02, attention=0.02, score=0.05
)
LIMITS = {
    # two float32 programs round differently: saliencies closer than 1e-5 of the range are a tie
    "fp32": ParityLimits(
        saliency=1e-3,
        iou_min=0.999,
        pixels=4,
        iou_mean=0.999,
        margin=1e-5,
        attention=1e-3,
        score=1e-3,
    ),
    "w16": _SIXTEEN_BITS,
    "fp16": _SIXTEEN_BITS,
    "bf16": _SIXTEEN_BITS,
    "int8": replace(_SIXTEEN_BITS, iou_mean=0.95, margin=0.05, attention=0.05, score=0.1),
}


# What a record may hold, by the type of its field.
KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),  # JSON may write 0.0 as 0
    "bool": (bool,),
    "str": (str,),
    "float | None": (int, float, type(None)),
    "tuple[str, ...]": (list, tuple),
}


@dataclass(frozen=True)
class Parity:
    """One comparison. Differences are over the kept objects; rank_agreement is the share of
    clearly separated pairs in the same order; attention_moved is the largest share of looks that
    lies elsewhere on a photo, None without attention; kept_otherwise counts the objects that one
    side clearly keeps and the other does not; check says what was compared, "photos" with the
    reference, "slots" of the artifact's own batches, or its answers to several "threads"; failures
    names the limits that were broken.
    """

    batch: int
    photos: int
    objects: int
    saliency_max: float
    saliency_mean: float
    score_max: float
    score_mean: float
    iou_min: float
    iou_mean: float
    pixels_max: int
    rank_agreement: float
    top1_identical: bool
    attention_moved: float | None = None
    kept_otherwise: int = 0
    check: str = "photos"
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "failures": list(self.failures), "passed": self.passed}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Parity:
        """One record of a sidecar; what else it holds is ignored, and older ones lack what has a
        default. Raises ArtifactError for a record of another form."""
        own = {field.name: facts[field.name] for field in fields(cls) if field.name in facts}
        for field in fields(cls):
            value = own.get(field.name, field.default)
            if not isinstance(value, KINDS[str(field.type)]):
                given = "nothing" if value is MISSING else repr(value)[:100]
                raise ArtifactError(
                    f"a comparison in the sidecar has {given} as {field.name!r}, expected "
                    f"{field.type}: the sidecar is damaged, verify the file again"
                )
        return cls(**{**own, "failures": tuple(own.get("failures", ()))})


def broken_limits(
    result: Parity, limits: ParityLimits, ious: Sequence[float], pixels: Sequence[int]
) -> tuple[str, ...]:
    """The limits that a comparison breaks, in words. ious, pixels: of each mask."""
    failures = []
    # The comparisons are written so that a NaN fails.
    if not (np.isfinite(result.saliency_max) and np.isfinite(result.score_max)):
        failures.append("saliency or score is not finite")
    if limits.saliency is not None and not result.saliency_max <= limits.saliency:
        failures.append(f"saliency differs by {result.saliency_max:.2g} > {limits.saliency:g}")
    if limits.saliency is not None and not result.score_max <= limits.saliency:
        failures.append(f"score differs by {result.score_max:.2g} > {limits.saliency:g}")
    apart = [
        iou
        for iou, n in zip(ious, pixels, strict=True)
        if not iou >= limits.iou_min and n > limits.pixels
    ]
    if apart:
        failures.append(f"{len(apart)} masks below IoU {limits.iou_min:g} (worst {min(apart):.3f})")
    if not result.iou_mean >= limits.iou_mean and result.pixels_max > limits.pixels:
        failures.append(f"mean mask IoU {result.iou_mean:.4f} < {limits.iou_mean:g}")
    if result.attention_moved is not None and not result.attention_moved <= limits.attention:
        failures.append(
            f"{result.attention_moved:.2%} of the attention is elsewhere, > {limits.attention:.1%}"
        )
    if result.rank_agreement < 1:
        failures.append(f"order differs in {1 - result.rank_agreement:.1%} of the clear pairs")
    if not result.top1_identical:
        failures.append("another object is ranked first")
    if not result.score_mean <= limits.score:
        failures.append(f"scores differ by {result.score_mean:.2g} on average > {limits.score:g}")
    if result.kept_otherwise:
        failures.append(f"{result.kept_otherwise} objects are kept by one side alone")
    return tuple(failures)


def settle(results: Sequence[Parity], description: Description, keep: bool, what: str) -> bool:
    """Whether an artifact is verified: it was compared, and every check passed.

    Raises ParityError, which says `what` failed and shows the table, where a check failed and the
    artifact may not be kept. keep: it may, as unverified. It may too if its weights are random and
    it is below float32: then no two objects are clearly apart, and the comparison is only reported.
    """
    failed = not all(result.passed for result in results)
    if failed and not (keep or only_reported(description)):
        failures = dict.fromkeys(failure for result in results for failure in result.failures)
        raise ParityError(f"{what}\n{table(results)}", tuple(failures))
    return bool(results) and not failed


def only_reported(description: Description) -> bool:
    """True where a failed comparison proves nothing: below float32 with random weights."""
    return description.weights == "synthetic" and description.precision != "fp32"


def table(results: Sequence[Parity]) -> str:
    """The comparison for a person, one line per batch size."""
    lines = ["batch photos objects  |Δsaliency| max   |Δscore| max   IoU min   mean   ranks  top-1"]
    for r in results:
        if r.check == "slots":
            lines.append(f"{r.batch:5d} one photo in {r.photos} places of batches up to this size")
        elif r.check == "threads":
            lines.append(f"{r.batch:5d} {r.photos} answers to threads that ask at once")
        else:
            lines.append(
                f"{r.batch:5d} {r.photos:6d} {r.objects:7d}  {r.saliency_max:16.2e}  "
                f"{r.score_max:13.2e}  {r.iou_min:8.4f} {r.iou_mean:6.4f}  "
                f"{r.rank_agreement:6.1%}  {'same' if r.top1_identical else 'DIFFERS'}"
            )
            if r.attention_moved is not None:
                moved = f"{r.attention_moved:.2e}"
                lines.append(f"      attention that is elsewhere, of the worst photo: {moved}")
        lines.extend(f"      FAILED: {failure}" for failure in r.failures)
    return "\n".join(lines)


def versions(packages: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """The version of each package that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Where a check ran: processor, system and library versions."""
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "libraries": versions(),
    }
