"""Rank every source of a run: images and videos in, files and a summary out."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import cv2

from dsgnn.runtime.disk.files import claimed, printable
from dsgnn.runtime.disk.outputs import (
    Record,
    Target,
    forget,
    real_place,
    results_file,
    save_image,
)
from dsgnn.runtime.disk.sources import Source, standard_input
from dsgnn.runtime.errors import BackendError
from dsgnn.runtime.images import read_image
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.run.resume import Earlier
from dsgnn.runtime.run.sheet import Sheets
from dsgnn.runtime.video.frames import Frames, Selection
from dsgnn.runtime.video.to_files import VideoOptions, rank_video

STAGES = ("decode", "preprocess", "inference", "postprocess", "save")
PLAIN = VideoOptions()
# What spoils one source and not the run.
FAILURES = (OSError, ValueError, cv2.error, MemoryError, BackendError)
STOPS = ("SIGINT", "SIGTERM", "SIGHUP")  # as far as the system has them
MANY = 3  # more images than this get a progress bar


@dataclass(frozen=True)
class Outcome:
    """One image or video frame that was ranked, or one source that failed (`error` says why).

    timings_ms: milliseconds of each of STAGES. skipped: an earlier run did it.
    """

    source: Source
    objects: int = 0
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    skipped: bool = False


@dataclass
class Summary:
    """What became of a run; `str` of it is for a person."""

    images: int = 0
    objects: int = 0
    skipped: int = 0
    failures: list[Outcome] = field(default_factory=list)
    total_ms: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        if outcome.error:
            self.failures.append(outcome)
        elif outcome.skipped:
            self.skipped += 1
        else:
            self.images += 1
            self.objects += outcome.objects
            self.total_ms.update(outcome.timings_ms)

    def __str__(self) -> str:
        text = f"{counted(self.images, 'image')} ranked, {counted(self.objects, 'object')}"
        if self.images:
            timed = (stage for stage in STAGES if stage in self.total_ms)
            stages = (f"{stage} {self.total_ms[stage] / self.images:.1f}" for stage in timed)
            text += f"; ms per image: {', '.join(stages)}"
        if self.skipped:
            text += f"\n{counted(self.skipped, 'input')} skipped: done by an earlier run"
        if self.failures:
            names = ", ".join(printable(outcome.source.shown) for outcome in self.failures)
            text += f"\n{counted(len(self.failures), 'input')} failed: {names}"
        return text


def run(
    ranker: Ranker,
    sources: Sequence[Source],
    out: Path,
    kinds: Collection[str] = ("overlay", "json"),
    palette: str = "assr",
    video: VideoOptions = PLAIN,
    skip_existing: bool = False,
) -> Summary:
    """Rank all sources with a progress bar (many images, on a terminal); see `rank_sources`.

    Failures are named on standard error as they come. Raises FolderBusyError if another run is
    writing into `out`.
    """
    counts = [_expected(source, video.select) for source in sources]
    expected = sum(counts) if all(counts) else None
    with claimed(out), stopped_once():
        outcomes = rank_sources(ranker, sources, out, kinds, palette, video, skip_existing)
        return follow(outcomes, expected)


def follow(outcomes: Generator[Outcome, None, None], expected: int | None) -> Summary:
    """Sum up the outcomes as they come, with a progress bar, and name the failures.

    expected: how many there will be; None = not known. Closes the generator.
    """
    from tqdm import tqdm

    hidden = True if expected is not None and expected <= MANY else None  # None: on a terminal only
    summary = Summary()
    with closing(outcomes):
        for outcome in tqdm(outcomes, total=expected, unit="image", disable=hidden):
            summary.add(outcome)
            if outcome.error:
                with tqdm.external_write_mode(file=sys.stderr):
                    click.echo(f"{outcome.source.shown}: {outcome.error}", err=True)
    return summary


@contextmanager
def stopped_once() -> Iterator[None]:
    """Make the first Ctrl-C, SIGTERM or closed terminal of the block raise KeyboardInterrupt.

    Further ones are ignored while the files are finished, which takes seconds. What the process
    ignores already (nohup) stays ignored. Other threads than the main one get no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in STOPS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number in numbers if before[number] not in (signal.SIG_IGN, None)]

    def stop(*_: object) -> None:
        for number in heeded:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in heeded:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def silence_opencv() -> None:
    """Keep OpenCV's log of damaged files off the terminal: failures are told in our words."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if hasattr(cv2, "setLogLevel"):  # OpenCV 4
        cv2.setLogLevel(0)
    else:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def check_skip(skip_existing: bool, kinds: Collection[str]) -> None:
    """Raise ValueError unless what `skip_existing` reads is written, and if a kind needs all."""
    if skip_existing and "json" not in kinds:
        raise ValueError("--skip-existing reads what was done from the json files: --save json too")
    if skip_existing and "sheet" in kinds:
        raise ValueError("a sheet shows all images of a run: leave out --skip-existing, or sheet")


def rank_sources(
    ranker: Ranker,
    sources: Sequence[Source],
    out: Path,
    kinds: Collection[str] = ("overlay", "json"),
    palette: str = "assr",
    video: VideoOptions = PLAIN,
    skip_existing: bool = False,
) -> Generator[Outcome, None, None]:
    """Rank the sources one by one; yields an Outcome per image, per frame and per failed source.

    out: an existing folder; nothing is written outside it, and every file appears whole or not at
    all, replacing one of its name; masks, crops and sheets of an earlier run beyond those of this
    one are removed. kinds: some of `overlay` NAME.overlay.jpg (.mp4 for a video),
    `map` NAME.map.png (greys of `palette`), `masks` NAME.mask<rank>.png (0 and 255), `crops`
    NAME.crop<rank>.png (transparent around the object; none for an empty mask), `json` results.json
    and for a video NAME.frames.jsonl and NAME.summary.json, `sheet` all images on one page, see
    `Sheets`. A video's map is a video, its masks are NAME.masks/<frame>.mask<rank>.png, and it has
    no crops and no place on the sheet. video: how videos are ranked. skip_existing: leave what an
    earlier run with the same model has done of the same file, if it saved all of `kinds`, and of a
    video if the same frames were ranked (needs `json`, and no `sheet`). A source that fails is
    listed in results.json with its error. Ctrl-C leaves results.json, the sheet and the running
    video's files as far as they came; with skip_existing results.json keeps what an earlier run has
    done of the rest. Raises OSError if results.json or the sheet cannot be
    written, ValueError for skip_existing with the wrong kinds.
    """
    check_skip(skip_existing, kinds)
    earlier = Earlier(out, ranker.describe(), video.to_dict()) if skip_existing else None
    inputs = frozenset(real_place(source.path) for source in sources if source.path)
    with ExitStack() as stack:
        record: Record = forget
        if "json" in kinds:
            record = stack.enter_context(results_file(out / "results.json", ranker.describe()))
        sheets = stack.enter_context(Sheets(out, inputs)) if "sheet" in kinds else None
        left = iter(sources)
        try:
            for source in left:
                target = Target(out, source, kinds, palette, inputs)
                try:
                    if source.problem:
                        raise ValueError(source.problem)
                    if earlier and (entry := earlier.done(target)) is not None:
                        if not source.is_video:
                            record(entry)
                        yield Outcome(source, skipped=True)
                    elif source.is_video:
                        with closing(rank_video(ranker, target, video)) as ranked:
                            for objects, timings_ms in ranked:
                                yield Outcome(source, objects, timings_ms)
                    else:
                        yield _rank_image(ranker, target, record, sheets)
                except FAILURES as error:
                    outcome = Outcome(source, error=reason(error))
                    nothing: dict[str, Any] = {"width": None, "height": None, "objects": []}
                    record({"file": source.shown, **nothing, "error": outcome.error})
                    stop = _stop_before(error)
                    if not isinstance(stop, GeneratorExit):
                        yield outcome
                    if stop is not None:
                        raise stop from error
        except (KeyboardInterrupt, GeneratorExit):
            for source in left:
                target = Target(out, source, kinds, palette, inputs)
                if earlier and (entry := earlier.done(target)) and not source.is_video:
                    record(entry)
            raise


def _stop_before(error: BaseException | None) -> BaseException | None:
    """The Ctrl-C, or the closing of a generator, on which the error came: what was under way could
    not be finished."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        error = error.__context__
    return error


def _rank_image(ranker: Ranker, target: Target, record: Record, sheets: Sheets | None) -> Outcome:
    start = perf_counter()
    path, made = target.source.path, target.made()
    photo = read_image(standard_input().read() if path is None else path)
    decode_ms = 1e3 * (perf_counter() - start)
    ranking = ranker(photo)
    start = perf_counter()
    save_image(ranking, photo, target)
    if sheets:
        sheets.add(ranking.draw(photo), target.source.shown)
    if "json" in target.kinds:
        record({"file": target.source.shown, "made": made, **ranking.to_dict()})
    timings = {**ranking.timings_ms, "decode": decode_ms, "save": 1e3 * (perf_counter() - start)}
    return Outcome(target.source, len(ranking.objects), timings)


def _expected(source: Source, select: Selection) -> int:
    """How many outcomes a source will have, for the progress bar; 0 = that is not known."""
    if not source.is_video or source.problem:
        return 1
    if source.feed:
        return select.max_frames or 0
    try:
        frames = Frames(source, select)
    except (ValueError, OSError):
        return 1  # its failure
    frames.close()
    return frames.expected


def reason(error: BaseException) -> str:
    """What happened, without the path, which the message names before it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory for an image of this size"
    return str(error) or type(error).__name__


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
