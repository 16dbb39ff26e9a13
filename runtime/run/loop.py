"""Rank every source of a run: images and videos in, files and a summary out."""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from time import perf_counter

from dsgnn.runtime.attention import percent
from dsgnn.runtime.console import say
from dsgnn.runtime.disk.files import claimed, printable
from dsgnn.runtime.disk.outputs import TABLE, OutputFiles, Record, forget, real_place, results_file
from dsgnn.runtime.disk.sources import Source
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.framing import Aspects
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.run.lanes import lanes_for, side_by_side, threads_beside
from dsgnn.runtime.run.resume import Earlier
from dsgnn.runtime.run.sheet import Sheets
from dsgnn.runtime.run.source import (
    FAILURES,
    STAGES,
    Outcome,
    RankedPhoto,
    RunFiles,
    Task,
    keep_earlier,
)
from dsgnn.runtime.video.frames import Frames
from dsgnn.runtime.video.to_files import VideoOptions, choose_threads

PLAIN = VideoOptions()
STOPS = ("SIGINT", "SIGTERM", "SIGHUP")  # as far as the system has them
MANY = 9  # more images than this get a progress bar instead of a line each


@dataclass
class Summary:
    """What became of a run; `str` of it is for a person. seconds: how long it took."""

    images: int = 0
    seconds: float = 0.0
    objects: int = 0
    skipped: int = 0
    failures: list[Outcome] = field(default_factory=list)
    total_ms: Counter[str] = field(default_factory=Counter)

    @property
    def bugs(self) -> list[Outcome]:
        """The failures that are our fault."""
        return [outcome for outcome in self.failures if outcome.bug]

    def add(self, outcome: Outcome) -> None:
        if outcome.error:
            self.failures.append(outcome)
        elif outcome.skipped:
            self.skipped += 1
        elif not outcome.note:
            self.images += 1
            self.objects += outcome.objects
            self.total_ms.update(outcome.timings_ms)

    def __str__(self) -> str:
        text = f"{counted(self.images, 'image')} ranked, {counted(self.objects, 'object')}"
        if self.images:
            timed = (stage for stage in STAGES if stage in self.total_ms)
            stages = (f"{stage} {self.total_ms[stage] / self.images:.1f}" for stage in timed)
            text += f"; ms per image: {', '.join(stages)}"
        if self.images > MANY and self.seconds:
            text += f"; {self.images / self.seconds:.1f} images per second"
        if self.skipped:
            text += f"\n{counted(self.skipped, 'input')} skipped: done by an earlier run"
        if self.failures:
            names = ", ".join(printable(outcome.source.shown) for outcome in self.failures)
            text += f"\n{counted(len(self.failures), 'input')} failed: {names}"
        if self.bugs:
            text += f"\n{counted(len(self.bugs), 'input')} met a bug of dsgnn: please report it"
        return text


def run(
    ranker: Ranker,
    sources: Sequence[Source],
    out: Path,
    kinds: Collection[str] = ("overlay", "json"),
    palette: str = "assr",
    video: VideoOptions = PLAIN,
    skip_existing: bool = False,
    aspects: Aspects = (),
    fit: str = "crop",
    lanes: int = 1,
) -> Summary:
    """Rank all sources and tell how it goes, see `rank_sources` and `follow`.

    Failures are named on standard error as they come, and so are notes. Raises FolderBusyError if
    another run is writing into `out`.
    """
    counts = [_expected(source, video) for source in sources]
    expected = sum(counts) if all(counts) else None
    with claimed(out), stopped_once():
        outcomes = rank_sources(
            ranker, sources, out, kinds, palette, video, skip_existing, aspects, fit, lanes
        )
        return follow(outcomes, expected)


def follow(outcomes: Generator[Outcome, None, None], expected: int | None) -> Summary:
    """Sum up the outcomes as they come, and name the failures.

    expected: how many there will be; None = not known. Many get a progress bar; where there are
    few, the shares of looks of each image are told. Closes the generator.
    """
    from tqdm import tqdm

    few = expected is not None and expected <= MANY
    hidden = True if few else None  # None: on a terminal only
    summary, start = Summary(), perf_counter()
    with closing(outcomes):
        for outcome in tqdm(outcomes, total=expected, unit="image", disable=hidden):
            summary.add(outcome)
            if said := outcome.error or outcome.note:
                with tqdm.external_write_mode(file=sys.stderr):
                    say(printable(f"{outcome.source.shown}: {said}"), err=True)
            elif few and outcome.shares is not None:
                shares = ", ".join(map(percent, outcome.shares))
                told = f"{shares} of looks" if shares else "nothing stands out"
                say(printable(f"{outcome.source.shown}: {told}"))
    summary.seconds = perf_counter() - start
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


def check_skip(skip_existing: bool, kinds: Collection[str]) -> None:
    """Raise OptionError if what an earlier run has done cannot be skipped with these kinds."""
    if skip_existing and "json" not in kinds:
        raise OptionError("what was done is read from the json files: save json too")
    if skip_existing and "sheet" in kinds:
        raise OptionError("a sheet shows all images of a run: skip nothing, or save no sheet")


def check_heat(kinds: Collection[str], ranker: Ranker) -> None:
    """Raise OptionError if heat maps are wanted of an artifact that does not tell where people
    look."""
    if "heat" in kinds and not ranker.artifact.description.attention:
        raise OptionError(
            f"{ranker.artifact.path.name} has no attention map, so there is no heat: use the "
            "bundled model, or export a network that was trained with one"
        )


def rank_sources(
    ranker: Ranker,
    sources: Sequence[Source],
    out: Path,
    kinds: Collection[str] = ("overlay", "json"),
    palette: str = "assr",
    video: VideoOptions = PLAIN,
    skip_existing: bool = False,
    aspects: Aspects = (),
    fit: str = "crop",
    lanes: int = 1,
) -> Generator[Outcome, None, None]:
    """Rank the sources; yields an Outcome per image, per frame and per failed source, in order.

    out: an existing folder. Nothing is written outside it, and every file appears whole or not at
    all. kinds: some of `dsgnn.runtime.disk.outputs.TABLE`, which says what each writes. palette:
    of the map. video: how videos are ranked. skip_existing: leave what an earlier run with the
    same model has done of the same file, of the same kinds, and of a video with the same options.
    aspects: each source is also cropped to them. fit: how photos are, see
    `dsgnn.runtime.framing.crop_to`. lanes: how many photos are decoded, ranked and saved at the
    same time, as far as they are files; other sources come one by one.

    A source that fails is listed in results.json with its error. When the run ends early, by
    Ctrl-C or by a bug, results.json, the sheet and the files of the running video hold what was
    done; with skip_existing results.json also keeps what an earlier run has done of the rest.
    Raises OSError if results.json or a sheet cannot be written, FolderBusyError if another process
    is writing results.json, OptionError as `check_skip` and `check_heat`.
    """
    check_skip(skip_existing, kinds)
    check_heat(kinds, ranker)
    inputs = frozenset(real_place(source.path) for source in sources if source.path)
    targets = [OutputFiles(out, source, kinds, palette, inputs, aspects, fit) for source in sources]
    with ExitStack() as stack:
        record: Record = forget
        if "json" in kinds:
            path = out / TABLE["json"].run
            record = stack.enter_context(results_file(path, ranker.describe()))
        sheets = stack.enter_context(Sheets(out, inputs)) if "sheet" in kinds else None
        done = Earlier(out, ranker.describe(), video.to_dict()).done if skip_existing else forget
        files = RunFiles(ranker, record, sheets, video)
        left = dict(enumerate(targets))

        def late(task: Task, photo: RankedPhoto) -> None:
            del left[task.number]
            files.keep(photo)

        tasks = (Task(number, target, done(target)) for number, target in enumerate(targets))
        try:
            for beside, group in groupby(tasks, lambda task: lanes > 1 and task.is_photo):
                pairs = side_by_side(files.photo, group, lanes if beside else 1, late)
                with closing(pairs):
                    for task, photo in pairs:
                        del left[task.number]
                        yield from files.outcomes(task, photo)
        except BaseException:
            for target in left.values():
                if (entry := done(target)) is not None:
                    keep_earlier(target, entry, record)
            raise


def threads_of_run(
    sources: Sequence[Source], lanes: int | None, threads: int | None, backend: str
) -> int | None:
    """CPU threads of one inference: as asked, or else by what is ranked. None is Ranker's default.

    lanes: as asked. backend: "auto" or one of BACKENDS. Photos side by side have few threads each.
    """
    beside = (lanes or lanes_for(threads_beside(backend), photos=_photos(sources))) > 1
    if threads is None and beside and not any(source.is_video for source in sources):
        return threads_beside(backend)
    return choose_threads(threads, sources)


def lanes_of_run(sources: Sequence[Source], ranker: Ranker) -> int:
    """How many photos of a run to rank side by side, see `dsgnn.runtime.run.lanes`."""
    return lanes_for(ranker.backend.threads, ranker.backend.device, _photos(sources))


def _photos(sources: Sequence[Source]) -> int:
    return sum(not source.problem and not source.is_video for source in sources)


def _expected(source: Source, video: VideoOptions) -> int:
    """How many outcomes a source will have, for the progress bar; 0 if that is not known."""
    if not source.is_video or source.problem:
        return 1
    if source.path is None:  # opening standard input would use it up
        return video.select.max_frames or 0
    try:
        frames = Frames(source, video.select, video.max_pixels)
    except FAILURES:
        return 1  # the failure
    frames.close()
    return frames.expected


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
