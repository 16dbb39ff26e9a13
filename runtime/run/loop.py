"""Rank every source of a run: images and videos in, files and a summary out."""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from dsgnn.runtime.attention import percent
from dsgnn.runtime.console import say
from dsgnn.runtime.disk.download import photo_at
from dsgnn.runtime.disk.files import claimed, printable
from dsgnn.runtime.disk.outputs import (
    TABLE,
    OutputFiles,
    Record,
    forget,
    real_place,
    results_file,
    save_crops,
    save_image,
)
from dsgnn.runtime.disk.sources import Source, standard_input
from dsgnn.runtime.errors import DsgnnError, InputError, OptionError
from dsgnn.runtime.framing import Aspects
from dsgnn.runtime.images import left_out, memory_errors
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.run.resume import Earlier
from dsgnn.runtime.run.sheet import Sheets
from dsgnn.runtime.video.frames import Frames
from dsgnn.runtime.video.to_files import VideoOptions, rank_video

STAGES = ("decode", "preprocess", "inference", "postprocess", "save")
PLAIN = VideoOptions()
# What spoils one source and not the run. Anything else is a bug and ends it.
FAILURES = (DsgnnError, OSError, MemoryError)
STOPS = ("SIGINT", "SIGTERM", "SIGHUP")  # as far as the system has them
MANY = 9  # more images than this get a progress bar instead of a line each


@dataclass(frozen=True)
class Outcome:
    """One image or video frame that was ranked, or one source that failed (`error` says why).

    timings_ms: milliseconds of each of STAGES. skipped: an earlier run did it. bug: the failure is
    not the source's fault but ours. note: this is neither an image nor a failure, but something
    that a person should know of the source. shares: of looks, of each object of an image; None
    where they are not known.
    """

    source: Source
    objects: int = 0
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    skipped: bool = False
    bug: bool = False
    note: str = ""
    shares: tuple[float, ...] | None = None


@dataclass
class Summary:
    """What became of a run; `str` of it is for a person."""

    images: int = 0
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
) -> Summary:
    """Rank all sources and tell how it goes, see `rank_sources` and `follow`.

    Failures are named on standard error as they come, and so are notes. Raises FolderBusyError if
    another run is writing into `out`.
    """
    counts = [_expected(source, video) for source in sources]
    expected = sum(counts) if all(counts) else None
    with claimed(out), stopped_once():
        outcomes = rank_sources(
            ranker, sources, out, kinds, palette, video, skip_existing, aspects, fit
        )
        return follow(outcomes, expected)


def follow(outcomes: Generator[Outcome, None, None], expected: int | None) -> Summary:
    """Sum up the outcomes as they come, and name the failures. Many have a progress bar; of few
    images the shares of looks are told.

    expected: how many there will be; None = not known. Closes the generator.
    """
    from tqdm import tqdm

    few = expected is not None and expected <= MANY
    hidden = True if few else None  # None: on a terminal only
    summary = Summary()
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
) -> Generator[Outcome, None, None]:
    """Rank the sources one by one; yields an Outcome per image, per frame and per failed source.

    out: an existing folder. Nothing is written outside it, and every file appears whole or not at
    all. kinds: some of `dsgnn.runtime.disk.outputs.TABLE`, which says what each writes. palette:
    of the map. video: how videos are ranked. skip_existing: leave what an earlier run with the
    same model has done of the same file, of the same kinds, and of a video with the same options.
    aspects: each source is also cropped to them. fit: how photos are, see
    `dsgnn.runtime.framing.crop_to`.

    A source that fails is listed in results.json with its error. When the run ends early, by
    Ctrl-C or by a bug, results.json, the sheet and the files of the running video hold what was
    done; with skip_existing results.json also keeps what an earlier run has done of the rest.
    Raises OSError if results.json or a sheet cannot be written, FolderBusyError if another process
    is writing results.json, OptionError as `check_skip` and `check_heat`.
    """
    check_skip(skip_existing, kinds)
    check_heat(kinds, ranker)
    inputs = frozenset(real_place(source.path) for source in sources if source.path)
    left = iter(
        [OutputFiles(out, source, kinds, palette, inputs, aspects, fit) for source in sources]
    )
    with ExitStack() as stack:
        record: Record = forget
        if "json" in kinds:
            path = out / TABLE["json"].run
            record = stack.enter_context(results_file(path, ranker.describe()))
        sheets = stack.enter_context(Sheets(out, inputs)) if "sheet" in kinds else None
        earlier = Earlier(out, ranker.describe(), video.to_dict()) if skip_existing else None
        try:
            for target in left:
                if (entry := earlier.done(target) if earlier else None) is not None:
                    _keep(target, entry, record)
                    yield Outcome(target.source, skipped=True)
                else:
                    yield from _rank_source(ranker, target, video, record, sheets)
        except BaseException:
            for target in left:
                if (entry := earlier.done(target) if earlier else None) is not None:
                    _keep(target, entry, record)
            raise


def _keep(target: OutputFiles, entry: Mapping[str, object], record: Record) -> None:
    """Record again what an earlier run has done. A video has its own summary instead."""
    if not target.source.is_video:
        record(entry)


def _rank_source(
    ranker: Ranker,
    target: OutputFiles,
    video: VideoOptions,
    record: Record,
    sheets: Sheets | None,
) -> Generator[Outcome, None, None]:
    """Rank one image or video; its failure is recorded and becomes an Outcome. So is each note on
    it, after its images."""
    source, notes = target.source, list[str]()
    try:
        if source.problem:
            raise InputError(source.problem)
        with memory_errors():
            photo = photo_at(source.address) if source.feed == "url" else None
            if source.is_video and photo is None:
                with closing(rank_video(ranker, target, video, notes)) as ranked:
                    for objects, timings_ms in ranked:
                        yield Outcome(source, objects, timings_ms)
            else:
                yield _rank_image(ranker, target, record, sheets, notes, photo)
        yield from (Outcome(source, note=note) for note in notes)
    except FAILURES as error:
        why = "; ".join([reason(error), *notes])
        record({"file": source.shown, "width": None, "height": None, "objects": [], "error": why})
        stop = _stop_before(error)
        if not isinstance(stop, GeneratorExit):
            yield Outcome(source, error=why)
        if stop is not None:
            raise stop from error


def _stop_before(error: BaseException | None) -> BaseException | None:
    """The Ctrl-C, or the closing of a generator, during which the error came: what was under way
    could not be finished."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        error = error.__context__
    return error


def _rank_image(
    ranker: Ranker,
    target: OutputFiles,
    record: Record,
    sheets: Sheets | None,
    notes: list[str],
    data: bytes | None,
) -> Outcome:
    """Rank a photo. notes: what a person should know is appended to it. data: the photo's bytes,
    if it is no file and not on standard input."""
    start = perf_counter()
    path, made = target.source.path, target.made()
    encoded = data or (path.read_bytes() if path else standard_input().read())
    photo = ranker.read(encoded)
    if left := left_out(encoded):
        notes.append(left)
    decode_ms = 1e3 * (perf_counter() - start)
    ranking = ranker(photo)
    start = perf_counter()
    save_image(ranking, photo, target)
    framed = save_crops(ranking, photo, target)
    if sheets:
        sheets.add(ranking.draw(photo), target.source.shown)
    if "json" in target.kinds:
        record({"file": target.source.shown, "made": made, **ranking.to_dict(), **framed})
    timings = {**ranking.timings_ms, "decode": decode_ms, "save": 1e3 * (perf_counter() - start)}
    known = [item.attention for item in ranking.objects if item.attention is not None]
    shares = None if ranking.attention is None else tuple(known)
    return Outcome(target.source, len(ranking.objects), timings, shares=shares)


def _expected(source: Source, video: VideoOptions) -> int:
    """How many outcomes a source will have, for the progress bar; 0 if that is not known."""
    if not source.is_video or source.problem:
        return 1
    if source.feed:
        return video.select.max_frames or 0
    try:
        frames = Frames(source, video.select, video.max_pixels)
    except FAILURES:
        return 1  # the failure
    frames.close()
    return frames.expected


def reason(error: BaseException) -> str:
    """What happened, without the path: the message names that first."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory for an image of this size"
    return str(error) or type(error).__name__


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
