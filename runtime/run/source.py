"""One source of a run: what becomes of a photo, a video, or what cannot be ranked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from dsgnn.runtime.disk.download import photo_at
from dsgnn.runtime.disk.outputs import OutputFiles, Record, save_crops, save_image
from dsgnn.runtime.disk.sources import Source, standard_input
from dsgnn.runtime.errors import DsgnnError, InputError
from dsgnn.runtime.images import left_out, memory_errors
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.run.sheet import Sheets, tile
from dsgnn.runtime.video.to_files import VideoOptions, rank_video

STAGES = ("decode", "preprocess", "inference", "postprocess", "save")
# What spoils one source and not the run. Anything else is a bug and ends it.
FAILURES = (DsgnnError, OSError, MemoryError)


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


@dataclass(frozen=True)
class Task:
    """A source whose turn has come. earlier: what an earlier run has recorded, if it is done.
    notes: what a person should know of it."""

    number: int
    target: OutputFiles
    earlier: Mapping[str, object] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_photo(self) -> bool:
        """Whether it is a photo's file that is to be ranked: nothing that may be waited for."""
        source = self.target.source
        file = not source.problem and source.path is not None and source.path.is_file()
        return file and self.earlier is None and not source.is_video


@dataclass(frozen=True, eq=False)
class RankedPhoto:
    """A photo whose own files are written. entry: its record. tile: what the sheet shows of it.
    None where there is no such file."""

    outcome: Outcome
    entry: Mapping[str, Any] | None
    tile: np.ndarray | None


@dataclass(frozen=True)
class RunFiles:
    """Make the files of one source after the other, and the record of them all."""

    ranker: Ranker
    record: Record
    sheets: Sheets | None
    video: VideoOptions

    def outcomes(
        self, task: Task, photo: Callable[[], RankedPhoto]
    ) -> Generator[Outcome, None, None]:
        """What becomes of a source; its failure is recorded and becomes an Outcome. So is each
        note on it, after its images. photo: gives the photo of a photo's file."""
        target, source, notes = task.target, task.target.source, task.notes
        if task.earlier is not None:
            keep_earlier(target, task.earlier, self.record)
            yield Outcome(source, skipped=True)
            return
        try:
            if source.problem:
                raise InputError(source.problem)
            with memory_errors():
                data = photo_at(source.address) if source.feed == "url" else None
                if source.is_video and data is None:
                    with closing(rank_video(self.ranker, target, self.video, notes)) as ranked:
                        for objects, timings_ms in ranked:
                            yield Outcome(source, objects, timings_ms)
                else:
                    done = photo() if data is None else self.photo(task, data)
                    self.keep(done)
                    yield done.outcome
            yield from (Outcome(source, note=note) for note in notes)
        except FAILURES as error:
            why = "; ".join([reason(error), *notes])
            nothing: dict[str, Any] = {"width": None, "height": None, "objects": []}
            self.record({"file": source.shown, **nothing, "error": why})
            stop = _stop_before(error)
            if not isinstance(stop, GeneratorExit):
                yield Outcome(source, error=why)
            if stop is not None:
                raise stop from error

    def photo(self, task: Task, data: bytes | None = None) -> RankedPhoto:
        """Rank a photo and write its own files. data: the photo's bytes, if it is no file and not
        on standard input. May be called in several threads."""
        start = perf_counter()
        target, path, made = task.target, task.target.source.path, task.target.made()
        encoded = data or (path.read_bytes() if path else standard_input().read())
        photo = self.ranker.read(encoded)
        if left := left_out(encoded):
            task.notes.append(left)
        decode_ms = 1e3 * (perf_counter() - start)
        ranking = self.ranker(photo)
        start = perf_counter()
        save_image(ranking, photo, target)
        framed = save_crops(ranking, photo, target)
        shown = target.source.shown
        picture = tile(ranking.draw(photo), shown) if self.sheets else None
        entry = None
        if "json" in target.kinds:
            entry = {"file": shown, "made": made, **ranking.to_dict(), **framed}
        save_ms = 1e3 * (perf_counter() - start)
        timings = {**ranking.timings_ms, "decode": decode_ms, "save": save_ms}
        known = [item.attention for item in ranking.objects if item.attention is not None]
        shares = None if ranking.attention is None else tuple(known)
        outcome = Outcome(target.source, len(ranking.objects), timings, shares=shares)
        return RankedPhoto(outcome, entry, picture)

    def keep(self, photo: RankedPhoto) -> None:
        """Put a photo into the files of the run."""
        if self.sheets is not None and photo.tile is not None:
            self.sheets.add(photo.tile)
        if photo.entry is not None:
            self.record(photo.entry)


def keep_earlier(target: OutputFiles, entry: Mapping[str, object], record: Record) -> None:
    """Record again what an earlier run has done. A video has its own summary instead."""
    if not target.source.is_video:
        record(entry)


def _stop_before(error: BaseException | None) -> BaseException | None:
    """The Ctrl-C, or the closing of a generator, during which the error came: what was under way
    could not be finished."""
    while error is not None and not isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        error = error.__context__
    return error


def reason(error: BaseException) -> str:
    """What happened, without the path: the message names that first."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory for an image of this size"
    return str(error) or type(error).__name__
