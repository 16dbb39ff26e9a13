"""The parity gate: an artifact is used only after it gave the network's answers on real photos.

Reference and candidate get the same letterboxed photos, one at a time and in batches (a graph that
mixes up the images of a batch passes at batch 1), and are compared over the objects the reference
keeps: query by query in float32, below it each with the candidate's object of the same mask.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from dsgnn.runtime import samples
from dsgnn.runtime.artifact import Description
from dsgnn.runtime.disk.sources import IMAGE_SUFFIXES
from dsgnn.runtime.errors import DsgnnError, InputError
from dsgnn.runtime.images import read_image
from dsgnn.runtime.letterbox import Fixed, LongestSide, Rule, letterbox

log = logging.getLogger("dsgnn")

Answers = dict[str, np.ndarray]
"""saliency (B, Q), score (B, Q), masks (B, Q, H/4, W/4) logits, and attention (B, h, w) if any."""
Infer = Callable[[np.ndarray], Answers]
"""(B, H, W, 3) uint8 → Answers."""

BATCHES = (1, 3)
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
    """An artifact that does not give the answers of what it was made from."""


@dataclass(frozen=True)
class ParityLimits:
    """By how much an artifact of one precision may differ from what it was made from.

    saliency: largest difference (None = not limited). iou_min: of every mask, unless its pixels
    (at stride 4) differ in at most `pixels` places. iou_mean: over all masks. margin: pairs of
    objects whose saliencies lie further apart than this share of the range must keep their order.
    attention: largest share of looks that may move from one place to another on a photo.
    """

    saliency: float | None
    iou_min: float
    pixels: int
    iou_mean: float
    margin: float
    attention: float


LIMITS = {
    # two float32 programs round differently: saliencies closer than 1e-5 of the range are a tie
    "fp32": ParityLimits(
        saliency=1e-3, iou_min=0.999, pixels=4, iou_mean=0.999, margin=1e-5, attention=1e-3
    ),
    "w16": ParityLimits(
        saliency=None, iou_min=0.0, pixels=0, iou_mean=0.99, margin=0.02, attention=0.02
    ),
    "fp16": ParityLimits(
        saliency=None, iou_min=0.0, pixels=0, iou_mean=0.99, margin=0.02, attention=0.02
    ),
    "bf16": ParityLimits(
        saliency=None, iou_min=0.0, pixels=0, iou_mean=0.99, margin=0.02, attention=0.02
    ),
    "int8": ParityLimits(
        saliency=None, iou_min=0.0, pixels=0, iou_mean=0.95, margin=0.05, attention=0.05
    ),
}


@dataclass(frozen=True)
class Parity:
    """One comparison. Differences are over the kept objects; rank_agreement is the share of
    clearly separated pairs in the same order; attention_moved is the largest share of looks that
    lies elsewhere on a photo, None without attention; failures names the limits that were broken.
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
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "failures": list(self.failures), "passed": self.passed}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Parity:
        """One record of a sidecar; what else it holds is ignored."""
        facts = {"attention_moved": None, **facts}  # older records have no attention
        own = {name: facts[name] for name in cls.__dataclass_fields__}
        return cls(**{**own, "failures": tuple(own["failures"])})


def parity_photos(folder: Path | None = None) -> list[np.ndarray]:
    """The sample photos in the package, and every readable image of a folder, (h, w, 3) uint8 RGB.

    FileNotFoundError if the folder holds no image.
    """
    return [read_image(path) for path in samples()] + (folder_photos(folder) if folder else [])


def folder_photos(folder: Path) -> list[np.ndarray]:
    """Every image of a folder and its sub-folders, by name, (h, w, 3) uint8 RGB.

    A file named like an image that is none is left out with a warning. FileNotFoundError if no
    image is left.
    """
    photos, broken = [], []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            try:
                photos.append(read_image(path))
            except (InputError, OSError) as error:
                broken.append(f"{path.name} ({error})")
    if not photos:
        raise FileNotFoundError(f"{folder} holds no readable image")
    if broken:
        log.warning("%s: %d left out: %s", folder, len(broken), "; ".join(broken[:5]))
    return photos


def compare(
    reference: Infer,
    candidate: Infer,
    photos: Sequence[np.ndarray],
    description: Description,
    batches: Sequence[int] = BATCHES,
) -> list[Parity]:
    """Run both over the photos, once per batch size; the limits are those of the precision."""
    limits = LIMITS[description.precision]
    return [
        _compare(
            reference,
            candidate,
            _batches(photos, description.input, size),
            size,
            description.threshold,
            limits,
        )
        for size in batches
    ]


def batch_sizes(build: Mapping[str, Any]) -> Sequence[int]:
    """The batch sizes to compare at: an engine takes those of its profile only."""
    if "profile" not in build:
        return BATCHES
    low, _, high = build["profile"]["batch"]
    return sorted({min(max(low, size), high) for size in BATCHES})


def _batches(photos: Sequence[np.ndarray], rule: Rule, size: int) -> Iterator[np.ndarray]:
    """Letterboxed photos, (size, H, W, 3) each; the last batch is filled from the start."""
    if size > 1 and isinstance(rule, LongestSide):  # one batch, one size
        short = -(-rule.size * 3 // 4 // rule.multiple) * rule.multiple
        rule = Fixed(short, rule.size)
    padded = [letterbox(photo, rule)[0] for photo in photos]
    for start in range(0, len(padded), size):
        chosen = [padded[(start + i) % len(padded)] for i in range(size)]
        yield np.stack(chosen)


def _compare(
    reference: Infer,
    candidate: Infer,
    batches: Iterator[np.ndarray],
    size: int,
    threshold: float,
    limits: ParityLimits,
) -> Parity:
    saliency: list[float] = []
    score: list[float] = []
    ious: list[float] = []
    pixels: list[int] = []
    moved: list[float] = []
    pairs = agreeing = photos = 0
    top1 = True
    for images in batches:
        want, got = reference(images), candidate(images)
        for name, value in want.items():
            if got[name].shape != value.shape:
                raise ParityError(f"output {name} is {got[name].shape}, expected {value.shape}")
        if "attention" in want:
            apart = np.abs(want["attention"] - got["attention"])
            moved.extend(apart.sum((1, 2)) / 2)  # the total variation distance
        for b in range(len(images)):
            photos += 1
            kept = np.flatnonzero(want["score"][b] > threshold)
            if not len(kept):  # nothing passes (synthetic weights): compare every query
                kept = np.arange(want["score"].shape[1])
            on_w, on_g = want["masks"][b][kept] > 0, got["masks"][b] > 0
            # Below float32, rounding may swap two queries that start from the peaks of a map, so
            # that there an object is compared with the one whose mask it shares.
            same = kept if limits.saliency is not None else _partners(on_w, on_g)
            on_g = on_g[same]
            w, g = want["saliency"][b][kept], got["saliency"][b][same]
            saliency.extend(np.abs(w - g))
            score.extend(np.abs(want["score"][b][kept] - got["score"][b][same]))
            ious.extend(_iou(on_w, on_g))
            pixels.extend((on_w != on_g).sum((1, 2)))
            gap = w[:, None] - w[None]
            clear = gap > limits.margin * np.ptp(want["saliency"][b])
            pairs += int(clear.sum())
            agreeing += int((clear & (g[:, None] > g[None])).sum())
            top1 &= bool(w[np.argmax(g)] >= w.max() - limits.margin * np.ptp(want["saliency"][b]))
    result = Parity(
        batch=size,
        photos=photos,
        objects=len(saliency),
        saliency_max=float(np.max(saliency)),
        saliency_mean=float(np.mean(saliency)),
        score_max=float(np.max(score)),
        score_mean=float(np.mean(score)),
        iou_min=float(np.min(ious)),
        iou_mean=float(np.mean(ious)),
        pixels_max=int(np.max(pixels)),
        rank_agreement=agreeing / pairs if pairs else 1.0,
        top1_identical=top1,
        attention_moved=float(np.max(moved)) if moved else None,
    )
    return Parity(**{**asdict(result), "failures": _failures(result, limits, ious, pixels)})


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of bool masks (…, h, w), after broadcasting → (…). Two empty masks agree."""
    union = (a | b).sum((-2, -1))
    return np.where(union, (a & b).sum((-2, -1)) / np.maximum(union, 1), 1.0)


def _partners(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    """For each mask of `wanted` (n, h, w) an index into `got` (Q, h, w): the largest total IoU."""
    return linear_sum_assignment(_iou(wanted[:, None], got), maximize=True)[1]


def _failures(
    result: Parity, limits: ParityLimits, ious: Sequence[float], pixels: Sequence[int]
) -> tuple[str, ...]:
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
    return tuple(failures)


def settle(results: Sequence[Parity], description: Description, keep: bool, what: str) -> bool:
    """Whether an artifact is verified: it was compared, and every check passed.

    Raises ParityError, which says `what` failed and shows the table, where a check failed and the
    artifact may not be kept. keep: it may, as unverified. It may too if its weights are random and
    it is below float32: then no two objects are clearly apart, and the comparison is only reported.
    """
    failed = not all(result.passed for result in results)
    if failed and not (keep or only_reported(description)):
        raise ParityError(f"{what}\n{table(results)}")
    return bool(results) and not failed


def only_reported(description: Description) -> bool:
    """True where a failed comparison proves nothing: below float32 with random weights."""
    return description.weights == "synthetic" and description.precision != "fp32"


def table(results: Sequence[Parity]) -> str:
    """The comparison for a person, one line per batch size."""
    lines = ["batch photos objects  |Δsaliency| max   |Δscore| max   IoU min   mean   ranks  top-1"]
    for r in results:
        lines.append(
            f"{r.batch:5d} {r.photos:6d} {r.objects:7d}  {r.saliency_max:16.2e}  "
            f"{r.score_max:13.2e}  {r.iou_min:8.4f} {r.iou_mean:6.4f}  {r.rank_agreement:6.1%}  "
            f"{'same' if r.top1_identical else 'DIFFERS'}"
        )
        if r.attention_moved is not None:
            lines.append(
                f"      attention that is elsewhere, of the worst photo: {r.attention_moved:.2e}"
            )
        lines.extend(f"      FAILED: {failure}" for failure in r.failures)
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where a check ran: processor, system and library versions."""
    libraries = {}
    for package in LIBRARIES:
        try:
            libraries[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "libraries": libraries,
    }
