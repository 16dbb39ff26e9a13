"""Comparing an artifact with what it was made from, and with itself, on real photos.

Reference and candidate get the same letterboxed photos, one at a time and in batches (a graph that
mixes up the images of a batch passes at batch 1), and are compared over the objects the reference
keeps: query by query in float32, below it each with the candidate's object of the same mask. The
candidate must keep the same objects at the artifact's own threshold.

`compare_slots` compares the candidate with itself: one photo in every place of a batch, beside
other photos, and after batches of other sizes. `compare_threads` does so when several threads ask
at once. Engines have failed in each of these ways alone (NVIDIA/TensorRT#4813 and #4853,
openvino#37103; the last one was seen with ONNX Runtime's CUDA provider on an H100).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from dsgnn.export.parity.limits import LIMITS, Parity, ParityError, broken_limits
from dsgnn.runtime import samples
from dsgnn.runtime.artifact import Description
from dsgnn.runtime.disk.sources import IMAGE_SUFFIXES
from dsgnn.runtime.errors import DsgnnError, InputError
from dsgnn.runtime.images import read_image
from dsgnn.runtime.letterbox import Fixed, LongestSide, Rule, letterbox
from dsgnn.runtime.photo.decoder import Decoders

log = logging.getLogger("dsgnn")

Answers = dict[str, np.ndarray]
"""saliency (B, Q), score (B, Q), masks (B, Q, H/4, W/4) logits, and attention (B, h, w) if any."""
Infer = Callable[[np.ndarray], Answers]
"""(B, H, W, 3) uint8 → Answers."""

BATCHES = (1, 3)
WALK = (1, 3, 8)
THREADS = 4  # as many as `dsgnn-run` lets work on a GPU
THREADS_S = 2.0  # how long they ask, at least one round of the photos and at most ROUNDS
ROUNDS = 64


def parity_photos(folder: Path | None = None) -> list[np.ndarray]:
    """The sample photos in the package, and every readable image of a folder, (h, w, 3) uint8 RGB.

    FileNotFoundError if the folder holds no image.
    """
    return [read_image(path) for path in samples()] + (folder_photos(folder) if folder else [])


def folder_photos(folder: Path) -> list[np.ndarray]:
    """Every image of a folder and its sub-folders, by name, (h, w, 3) uint8 RGB.

    Each is decoded in a process that can be killed. A file named like an image that is none is left
    out with a warning. FileNotFoundError if no image is left.
    """
    photos, broken = [], []
    with closing(Decoders()) as decode:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                try:
                    photos.append(decode(path))
                except (InputError, OSError) as error:
                    broken.append(f"{path.name} ({error})")
    if not photos:
        raise FileNotFoundError(f"{folder} holds no readable image")
    if broken:
        log.warning("%s: %d left out: %s", folder, len(broken), "; ".join(broken[:5]))
    return photos


def gate(
    reference: Infer,
    candidate: Infer,
    photos: Sequence[np.ndarray],
    description: Description,
    build: Mapping[str, Any] | None = None,
) -> list[Parity]:
    """Every comparison there is, at batch sizes that fit the artifact.

    photos: (h, w, 3) uint8 RGB. build: of an engine's sidecar; its profile limits the batches.
    """
    profile = (build or {}).get("profile")
    if profile is None:
        sizes, walk = BATCHES, WALK
    else:
        low, _, high = profile["batch"]
        middle = min(max(low, WALK[1]), high)
        sizes, walk = tuple(sorted({low, middle, high})), (low, middle, high)
    # Slots come first, while the candidate has seen no large batch: what such a batch leaves behind
    # would otherwise show as wrong answers of which nobody knows the cause.
    slots = compare_slots(candidate, photos, description, walk)
    found = compare(reference, candidate, photos, description, sizes)
    return [*found, slots, compare_threads(candidate, photos, description, sizes[0])]


def compare(
    reference: Infer,
    candidate: Infer,
    photos: Sequence[np.ndarray],
    description: Description,
    batches: Sequence[int] = BATCHES,
) -> list[Parity]:
    """Run both over the photos, once per batch size; the limits are those of the precision."""
    found = []
    for size in batches:
        tally = _Tally(description)
        for images in _batches(photos, description.input, size):
            for want, got in zip(_rows(reference(images)), _rows(candidate(images)), strict=True):
                tally.add(want, got)
        found.append(tally.result(size))
    return found


def compare_slots(
    candidate: Infer,
    photos: Sequence[np.ndarray],
    description: Description,
    sizes: Sequence[int] = WALK,
) -> Parity:
    """The candidate's answers for one photo, wherever it is put.

    photos: the first is watched, two more or all of them are its neighbours. sizes: smallest, one
    between, and largest batch. The photo's answer in the first place of the smallest batch is
    compared with that in every place of the largest batch of equal photos, in the smallest batch
    after that, at the ends and in the middle of batches of other photos in two orders, and in the
    smallest batch after these. The failures say where it first differed.
    """
    own, *others = _one_size(photos[:3], description.input)
    others = others or [255 - own]
    low, middle, high = sizes

    def answer(batch: Sequence[np.ndarray]) -> list[Answers]:
        return _rows(candidate(np.stack(batch)))

    def beside(size: int, place: int, turn: int) -> list[np.ndarray]:
        batch = [others[(i + turn) % len(others)] for i in range(size)]
        batch[place] = own
        return batch

    first = answer([own] * low)[0]
    tally = _OwnTally(description)

    def check(got: Answers, where: str) -> None:
        tally.check(first, got, where)

    for place, got in enumerate(answer([own] * high)):
        check(got, f"place {place} of a batch of {high} equal photos has another answer")
    check(answer([own] * low)[0], f"a batch of {low} has another answer after one of {high}")
    for size in sorted({middle, high} - {1}):
        for place in sorted({0, size // 2, size - 1}):
            for turn in (0, 1):
                got = answer(beside(size, place, turn))[place]
                check(got, f"a photo in place {place} of {size} depends on its neighbours")
    check(answer([own] * low)[0], f"a batch of {low} has another answer after others")
    return tally.record(high, "slots")


def compare_threads(
    candidate: Infer, photos: Sequence[np.ndarray], description: Description, size: int
) -> Parity:
    """The candidate's answers when several threads ask at once, against those one after another.

    size: the smallest batch. The photos are asked for again and again while THREADS_S last. Raises
    ParityError when the candidate fails in a thread.
    """
    batches = list(_batches(photos, description.input, size))
    start = perf_counter()
    alone = [candidate(images) for images in batches]
    rounds = max(1, min(ROUNDS, int(THREADS_S / (perf_counter() - start))))
    tally = _OwnTally(description)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            answers = list(pool.map(candidate, batches * rounds))
        except DsgnnError as error:
            raise ParityError(f"fails when {THREADS} threads ask at once: {error}") from error
    for wanted, found in zip(alone * rounds, answers, strict=True):
        for want, got in zip(_rows(wanted), _rows(found), strict=True):
            tally.check(want, got, f"another answer when {THREADS} threads ask at once")
    return tally.record(size, "threads")


def _one_size(photos: Sequence[np.ndarray], rule: Rule) -> list[np.ndarray]:
    """Letterboxed photos of one size, so that they make one batch."""
    if isinstance(rule, LongestSide):
        rule = Fixed(*rule.geometry(3, 4).padded)
    return [letterbox(photo, rule)[0] for photo in photos]


def _batches(photos: Sequence[np.ndarray], rule: Rule, size: int) -> Iterator[np.ndarray]:
    """Letterboxed photos, (size, H, W, 3) each; the last batch is filled from the start."""
    padded = [letterbox(photo, rule)[0] for photo in photos]
    if size > 1:
        padded = _one_size(photos, rule)
    for start in range(0, len(padded), size):
        chosen = [padded[(start + i) % len(padded)] for i in range(size)]
        yield np.stack(chosen)


def _rows(answers: Answers) -> list[Answers]:
    """The answers of a batch, photo by photo."""
    return [
        {name: value[b] for name, value in answers.items()} for b in range(len(answers["score"]))
    ]


class _Tally:
    """Sums up how much the answers of two programs differ, photo by photo."""

    def __init__(self, description: Description):
        self.threshold, self.limits = description.threshold, LIMITS[description.precision]
        self.saliency: list[float] = []
        self.score: list[float] = []
        self.ious: list[float] = []
        self.pixels: list[int] = []
        self.moved: list[float] = []
        self.photos = self.pairs = self.agreeing = self.kept_otherwise = 0
        self.top1 = self.exchanged = True

    def add(self, want: Answers, got: Answers) -> None:
        """The answers for one photo; their shapes without B. Raises ParityError for other shapes,
        or when an output is missing."""
        for name, value in want.items():
            if name not in got or got[name].shape != value.shape:
                found = got[name].shape if name in got else "missing"
                raise ParityError(f"output {name} is {found}, expected {value.shape} per photo")
        limits = self.limits
        self.photos += 1
        if "attention" in want:  # the total variation distance
            self.moved.append(np.abs(want["attention"] - got["attention"]).sum() / 2)
        names = ("saliency", "score")
        apart = [np.abs(want[a] - got[a]).sum() for a in names]
        crossed = [np.abs(want[a] - got[b]).sum() for a, b in (names, names[::-1])]
        self.exchanged &= bool(sum(crossed) < 0.1 * sum(apart))
        kept = np.flatnonzero(want["score"] > self.threshold)
        if not len(kept):  # nothing passes (synthetic weights): compare every query
            kept = np.arange(want["score"].shape[0])
        on_w, on_g = want["masks"][kept] > 0, got["masks"] > 0
        # Below float32, rounding may swap two queries that start from the peaks of a map, so that
        # there an object is compared with the one whose mask it shares.
        same = kept if limits.saliency is not None else _partners(on_w, on_g)
        on_g = on_g[same]
        w, g = want["saliency"][kept], got["saliency"][same]
        self.saliency.extend(np.abs(w - g))
        self.score.extend(np.abs(want["score"][kept] - got["score"][same]))
        self.ious.extend(_iou(on_w, on_g))
        self.pixels.extend((on_w != on_g).sum((1, 2)))
        gap = w[:, None] - w[None]
        clear = gap > limits.margin * np.ptp(want["saliency"])
        self.pairs += int(clear.sum())
        self.agreeing += int((clear & (g[:, None] > g[None])).sum())
        self.top1 &= bool(w[np.argmax(g)] >= w.max() - limits.margin * np.ptp(want["saliency"]))
        sure, maybe = self.threshold + limits.score, self.threshold - limits.score
        lost = (want["score"][kept] > sure) & (got["score"][same] <= maybe)
        more = (got["score"] > sure).sum() - (want["score"] > maybe).sum()
        self.kept_otherwise += int(lost.sum() + max(0, more))

    def result(self, batch: int) -> Parity:
        result = Parity(
            batch=batch,
            photos=self.photos,
            objects=len(self.saliency),
            saliency_max=float(np.max(self.saliency)),
            saliency_mean=float(np.mean(self.saliency)),
            score_max=float(np.max(self.score)),
            score_mean=float(np.mean(self.score)),
            iou_min=float(np.min(self.ious)),
            iou_mean=float(np.mean(self.ious)),
            pixels_max=int(np.max(self.pixels)),
            rank_agreement=self.agreeing / self.pairs if self.pairs else 1.0,
            top1_identical=self.top1,
            attention_moved=float(np.max(self.moved)) if self.moved else None,
            kept_otherwise=self.kept_otherwise,
        )
        failures = broken_limits(result, self.limits, self.ious, self.pixels)
        if failures and self.exchanged:
            failures = ("the outputs saliency and score are exchanged", *failures)
        return replace(result, failures=failures)


class _OwnTally(_Tally):
    """Compares a program with itself, and looks at each photo alone."""

    def __init__(self, description: Description):
        super().__init__(description)
        self._description, self._failures = description, list[str]()

    def check(self, want: Answers, got: Answers, where: str) -> None:
        """As `add`. where: what differs if the two do."""
        self.add(want, got)
        alone = _Tally(self._description)
        alone.add(want, got)
        if broken := alone.result(1).failures:
            self._failures.append(f"{where}: {'; '.join(broken)}")

    def record(self, batch: int, check: str) -> Parity:
        """As `result`, but what fails is the first photo that differed."""
        return replace(self.result(batch), check=check, failures=tuple(self._failures[:1]))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of bool masks (…, h, w), after broadcasting → (…). Two empty masks agree."""
    union = (a | b).sum((-2, -1))
    return np.where(union, (a & b).sum((-2, -1)) / np.maximum(union, 1), 1.0)


def _partners(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    """For each mask of `wanted` (n, h, w) an index into `got` (Q, h, w): the largest total IoU."""
    return linear_sum_assignment(_iou(wanted[:, None], got), maximize=True)[1]
