"""Rank every source of a run: images and videos in, files and a summary out."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import click
import cv2

from dsgnn.runtime.backends import BackendError
from dsgnn.runtime.images import read_image
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.save import (
    VIDEO_KINDS,
    Frame,
    Record,
    Target,
    forget,
    lines_file,
    real_place,
    results_file,
    save_image,
    to_bgr,
    video_file,
)
from dsgnn.runtime.sources import Source

STAGES = ("decode", "preprocess", "inference", "postprocess", "save")
# What spoils one source and not the run.
FAILURES = (OSError, ValueError, cv2.error, MemoryError, BackendError)
MANY = 3  # more images than this get a progress bar


@dataclass(frozen=True)
class Outcome:
    """One image or video frame that was ranked, or one source that failed (`error` says why).

    timings_ms: milliseconds of each of STAGES.
    """

    source: Source
    objects: int = 0
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass
class Summary:
    """What became of a run; `str` of it is for a person."""

    images: int = 0
    objects: int = 0
    failures: list[Outcome] = field(default_factory=list)
    total_ms: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        if outcome.error:
            self.failures.append(outcome)
        else:
            self.images += 1
            self.objects += outcome.objects
            self.total_ms.update(outcome.timings_ms)

    def __str__(self) -> str:
        text = f"{_count(self.images, 'image')} ranked, {_count(self.objects, 'object')}"
        if self.images:
            stages = (f"{stage} {self.total_ms[stage] / self.images:.1f}" for stage in STAGES)
            text += f"; ms per image: {', '.join(stages)}"
        if self.failures:
            names = ", ".join(outcome.source.shown for outcome in self.failures)
            text += f"\n{_count(len(self.failures), 'input')} failed: {names}"
        return text


def run(
    ranker: Ranker,
    sources: Sequence[Source],
    out: Path,
    kinds: Collection[str] = ("overlay", "json"),
    palette: str = "assr",
) -> Summary:
    """Rank all sources with a progress bar (many images, on a terminal); see `rank_sources`.

    Failures are named on standard error as they come.
    """
    from tqdm import tqdm

    expected = sum(_expected(source) for source in sources)
    hidden = None if expected > MANY else True  # None: shown on a terminal only
    outcomes = rank_sources(ranker, sources, out, kinds, palette)
    summary = Summary()
    for outcome in tqdm(outcomes, total=expected, unit="image", disable=hidden):
        summary.add(outcome)
        if outcome.error:
            with tqdm.external_write_mode(file=sys.stderr):
                click.echo(f"{outcome.source.shown}: {outcome.error}", err=True)
    return summary


def silence_opencv() -> None:
    """Keep OpenCV's log of damaged files off the terminal: failures are told in our words."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if hasattr(cv2, "setLogLevel"):  # OpenCV 4
        cv2.setLogLevel(0)
    else:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def rank_sources(
    ranker: Ranker,
    sources: Sequence[Source],
    out: Path,
    kinds: Collection[str] = ("overlay", "json"),
    palette: str = "assr",
) -> Iterator[Outcome]:
    """Rank the sources one by one; yields an Outcome per image, per frame and per failed source.

    out: an existing folder; nothing is written outside it, and every file appears whole or not at
    all, replacing one of its name. kinds: some of `overlay` NAME.overlay.jpg (.mp4 for a video),
    `map` NAME.map.png (greys of `palette`), `masks` NAME.mask<rank>.png (0 and 255), `crops`
    NAME.crop<rank>.png (transparent around the object; none for an empty mask), `json` results.json
    and for a video NAME.frames.jsonl. Videos give `overlay` and `json` only. A source that fails
    is listed in results.json with its error. Ctrl-C leaves results.json and the running video's
    files as far as they came. Raises OSError if results.json cannot be written.
    """
    inputs = frozenset(real_place(source.path) for source in sources if source.path)
    with ExitStack() as stack:
        record: Record = forget
        if "json" in kinds:
            record = stack.enter_context(results_file(out / "results.json", ranker.describe()))
        for source in sources:
            target = Target(out, source, kinds, palette, inputs)
            try:
                if source.problem:
                    raise ValueError(source.problem)
                if source.is_video:
                    yield from _rank_video(ranker, target)
                else:
                    yield _rank_image(ranker, target, record)
            except FAILURES as error:
                reason = _reason(error)
                record(
                    {
                        "file": source.shown,
                        "width": None,
                        "height": None,
                        "objects": [],
                        "error": reason,
                    }
                )
                yield Outcome(source, error=reason)


def _rank_image(ranker: Ranker, target: Target, record: Record) -> Outcome:
    start = perf_counter()
    path = target.source.path
    photo = read_image(sys.stdin.buffer.read() if path is None else path)
    decode_ms = 1e3 * (perf_counter() - start)
    ranking = ranker(photo)
    start = perf_counter()
    save_image(ranking, photo, target)
    if "json" in target.kinds:
        record({"file": target.source.shown, **ranking.to_dict()})
    timings = {**ranking.timings_ms, "decode": decode_ms, "save": 1e3 * (perf_counter() - start)}
    return Outcome(target.source, len(ranking.objects), timings)


def _rank_video(ranker: Ranker, target: Target) -> Iterator[Outcome]:
    """Frame by frame into an annotated video and JSON lines."""
    source = target.source
    if not set(target.kinds) & set(VIDEO_KINDS):
        raise ValueError(
            f"a video gives {' and '.join(VIDEO_KINDS)}, got --save {','.join(target.kinds)}"
        )
    capture = cv2.VideoCapture(str(source.path))
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = rate if 0 < rate < 1000 else 25.0  # some containers declare none
    with ExitStack() as stack:
        stack.callback(capture.release)
        start = perf_counter()
        more, frame = capture.read()
        if not more:
            raise ValueError("no frame can be read: damaged, or no video that OpenCV decodes")
        size = frame.shape[1], frame.shape[0]
        write_line: Record = forget
        write_frame: Frame = forget
        if "json" in target.kinds:
            write_line = stack.enter_context(lines_file(target.path("frames.jsonl")))
        if "overlay" in target.kinds:
            write_frame = stack.enter_context(video_file(target.path("overlay.mp4"), rate, size))
        count = 0
        while more:
            if frame.shape[:2] != (size[1], size[0]):
                raise ValueError(
                    f"frame {count} is {frame.shape[1]}×{frame.shape[0]}, the video began with "
                    f"{size[0]}×{size[1]}: cut it where the size changes"
                )
            photo = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            decode_ms = 1e3 * (perf_counter() - start)
            ranking = ranker(photo)
            start = perf_counter()
            if "json" in target.kinds:
                place = {"file": source.shown, "frame": count, "time_s": round(count / rate, 6)}
                write_line({**place, **ranking.to_dict()})
            if "overlay" in target.kinds:
                write_frame(to_bgr(ranking.draw(photo)))
            save_ms = 1e3 * (perf_counter() - start)
            timings = {**ranking.timings_ms, "decode": decode_ms, "save": save_ms}
            yield Outcome(source, len(ranking.objects), timings)
            start = perf_counter()
            more, frame = capture.read()
            count += 1
        declared = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if count < declared - max(2, 0.02 * declared):  # some containers only estimate their number
        raise ValueError(
            f"it ends after {count} of the {declared} frames it declares: cut short or damaged; "
            "what could be read is in place"
        )


def _expected(source: Source) -> int:
    """How many outcomes a source will have, for the progress bar."""
    if not source.is_video or source.problem:
        return 1
    capture = cv2.VideoCapture(str(source.path))
    frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return max(1, frames)


def _reason(error: BaseException) -> str:
    """What happened, without the path, which the message names before it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory for an image of this size"
    return str(error)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
