"""Rank one video into files: decoding, inference and writing at the same time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from math import inf
from time import perf_counter
from typing import Any

import cv2
import numpy as np

from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.disk.outputs import (
    TABLE,
    VIDEO_KINDS,
    OutputFiles,
    clear_masks,
    lines_file,
    video_file,
)
from dsgnn.runtime.disk.pictures import to_bgr, write_picture
from dsgnn.runtime.disk.sources import Source
from dsgnn.runtime.errors import DsgnnError, InputError, OptionError
from dsgnn.runtime.framing import Aspects
from dsgnn.runtime.photo.headers import MAX_PIXELS
from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.run.lanes import cores
from dsgnn.runtime.video import h264
from dsgnn.runtime.video.feed import Ended
from dsgnn.runtime.video.frames import Frame, Frames, Selection
from dsgnn.runtime.video.pipeline import WriteBehind
from dsgnn.runtime.video.reframe import Add, reframed
from dsgnn.runtime.video.stream import FrameRanker, ranked_frames

SUMMARY_SCHEMA = "dsgnn.video/1"
RANKED = 4  # ranked frames that wait to be written
(OVERLAY,), (MAP,), (MASK,) = (TABLE[kind].video for kind in ("overlay", "map", "masks"))
LINES, SUMMARY = TABLE["json"].video
WINDOW = "dsgnn-run (q ends)"


@dataclass(frozen=True)
class VideoOptions:
    """How videos are ranked.

    select: which frames. batch: frames per inference. steady: objects keep their identity and ranks
    do not flicker. show: show the frames in a window too. max_pixels: width × height of the largest
    frame; each is decoded in a process that can be killed. Raises OptionError for a batch below 1,
    and for a window where there is no screen.
    """

    select: Selection = field(default_factory=Selection)
    batch: int = 1
    steady: bool = True
    show: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise OptionError(f"batch must be at least 1, got {self.batch}")
        screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if self.show and sys.platform.startswith("linux") and not screen:
            raise OptionError("a window needs a screen, and DISPLAY is not set here")

    def to_dict(self) -> dict[str, Any]:
        """What decides which frames are ranked and how. A run that resumes compares it."""
        facts = {**asdict(self.select), "steady": self.steady}
        del facts["raw"]  # what comes on standard input is always ranked anew
        return facts


def writes_video(sources: Iterable[Source], kinds: Collection[str], aspects: Aspects = ()) -> bool:
    """Whether a run writes any video file."""
    wanted = bool({"overlay", "map"} & set(kinds)) or bool(aspects)
    return wanted and any(source.is_video for source in sources)


def choose_threads(asked: int | None, sources: Iterable[Source]) -> int | None:
    """CPU threads of one inference: as asked, or else by what is ranked. None is Ranker's default.

    On two cores a video gets one thread, because decoding, drawing and encoding need the other core
    (compare `python tests/runtime/throughput.py --threads 1` with `--threads 2`).
    """
    if asked is not None:
        return asked
    return 1 if cores() <= 2 and any(source.is_video for source in sources) else None


def rank_video(
    ranker: FrameRanker, target: OutputFiles, options: VideoOptions, notes: list[str]
) -> Generator[tuple[int, dict[str, float]], None, None]:
    """Rank a video into the target's files; yields (objects, milliseconds per stage) per frame.

    notes: what a person should know is appended to it, such as which stream was taken.

    Whole files of the frames that were ranked are left by a source that breaks off, by Ctrl-C, by
    closing this generator, and by a bug of ours; the bug is raised when they are in place. Crops of
    a file are written after it was ranked, see `reframed`. No files are left where they cannot be
    written or the video cannot be ranked.

    Raises InputError for what is wrong with the source (after its files are in place, if there was
    any frame), OptionError if none of the kinds asked for exists for videos, OSError, and what the
    ranker raises.
    """
    if not set(target.kinds) & set(VIDEO_KINDS) and not target.aspects:
        raise OptionError(
            f"a video gives {', '.join(VIDEO_KINDS)}, and only {', '.join(target.kinds)} was "
            "asked for"
        )
    frames = Frames(target.source, options.select, options.max_pixels)
    head: dict[str, Any] = {
        **{"schema": SUMMARY_SCHEMA, "model": ranker.describe(), "file": target.source.shown},
        **{"made": target.made(), "options": options.to_dict()},
    }
    presence = Presence()
    sound = None
    heard = "overlay" in target.kinds or bool(target.aspects)
    if heard and frames.has_sound and h264.is_installed():
        if target.source.path is not None and not target.source.feed:
            if "overlay" in target.kinds:
                sound = h264.Sound(target.source.path, options.select.start_s)
        else:
            notes.append("its sound is left out, because only that of a file can be copied")
    broken: Exception | None = None
    told_ms = 0.0
    try:
        with ExitStack() as files:
            if sound is not None:
                files.callback(sound.close)
            try:
                with ExitStack() as stages:
                    pairs = ranked_frames(ranker, frames, options.batch, options.steady)
                    stages.enter_context(closing(pairs))
                    behind: WriteBehind[tuple[Frame, Ranking]] | None = None
                    crop: Add | None = None
                    for frame, ranking in pairs:
                        if behind is None:
                            if target.aspects:
                                cropping = reframed(
                                    target, options.select, frames.rate, notes, options.max_pixels
                                )
                                crop = files.enter_context(cropping)
                            size = ranking.width, ranking.height
                            writing = write_frames(
                                target, frames.rate, size, presence, options.select.start_s, sound
                            )
                            write = files.enter_context(writing)
                            behind = stages.enter_context(WriteBehind(write, RANKED))
                        behind.put((frame, ranking))
                        if crop is not None:
                            crop(frame, ranking)
                        if options.show:
                            _show(ranking.draw(frame.image))
                        written_ms = presence.save_ms  # of earlier frames, as these wait
                        save_ms, told_ms = written_ms - told_ms, written_ms
                        yield len(ranking.objects), {**ranking.timings_ms, "save": save_ms}
                if sound is not None and frames.whole:
                    sound.end_s = (options.select.end_s or inf) - options.select.start_s
            except Ended as error:
                broken = error
            except (DsgnnError, OSError, MemoryError):
                raise
            except Exception as bug:
                if not presence.frames:
                    raise
                broken = bug
    except (KeyboardInterrupt, GeneratorExit):
        notes += frames.notes
        _write_summary(target, {**head, "complete": False, "notes": notes}, presence)
        raise
    finally:
        if options.show:
            cv2.destroyAllWindows()
    notes += frames.notes + ([sound.note] if sound and sound.note else [])
    _write_summary(target, {**head, "complete": broken is None, "notes": notes}, presence)
    if broken is not None:
        raise broken
    if not presence.frames:
        raise InputError("it has no frame to rank: it is empty, or it ends before the start")


@contextmanager
def write_frames(
    target: OutputFiles,
    rate: float,
    size: tuple[int, int],
    presence: Presence,
    start_s: float = 0.0,
    sound: h264.Sound | None = None,
) -> Iterator[Callable[[tuple[Frame, Ranking]], None]]:
    """Give a function that writes one ranked frame to all the files that were asked for.

    rate: frames per second, as far as they are known. size: (width, height) of the frames.
    presence: counts what was written. start_s: the second of the source at which written videos
    begin. sound: what the annotated video sounds like.
    """
    kinds = target.kinds
    with ExitStack() as stack:
        if "json" in kinds:
            record = stack.enter_context(lines_file(target.path(LINES)))
        if "overlay" in kinds:
            drawn = stack.enter_context(video_file(target.path(OVERLAY), rate, size, sound))
        if "map" in kinds:
            greys = stack.enter_context(video_file(target.path(MAP), rate, size))
        if "masks" in kinds:
            clear_masks(target)

        def write(pair: tuple[Frame, Ranking]) -> None:
            start = perf_counter()
            frame, ranking = pair
            shown = max(0.0, frame.time_s - start_s), frame.duration_s
            if "overlay" in kinds:
                drawn(ranking.draw(frame.image), *shown)
            if "map" in kinds:
                grey = ranking.rank_map(target.palette)
                greys(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), *shown)
            if "masks" in kinds:
                for item in ranking.objects:
                    name = MASK.format(frame=frame.number, rank=item.rank)
                    write_picture(target.path(name), item.mask.view(np.uint8) * 255)
            if "json" in kinds:
                time_s = round(frame.time_s, 6)
                place = {"file": target.source.shown, "frame": frame.number, "time_s": time_s}
                record({**place, **ranking.to_dict()})
            presence.add(frame, ranking)
            presence.save_ms += 1e3 * (perf_counter() - start)

        yield write


@dataclass
class Presence:
    """Which objects were present, and for how long they held rank 1. A frame counts for as long as
    it is shown, which is until the next one, and the last one for its own duration.

    frames: how many were counted. seconds: for how long they are shown. save_ms: how long writing
    them took in all. size: (width, height). objects: an entry for each identity.
    """

    frames: int = 0
    seconds: float = 0.0
    save_ms: float = 0.0
    size: tuple[int, int] = (0, 0)
    objects: dict[int, dict[str, Any]] = field(default_factory=dict)
    _last: tuple[Frame, int | None] | None = None  # the latest frame, and what held rank 1 in it

    def add(self, frame: Frame, ranking: Ranking) -> None:
        """Count one frame."""
        if self._last is not None:
            self._show(frame.time_s - self._last[0].time_s)
        self.frames += 1
        self.size = ranking.width, ranking.height
        for item in ranking.objects:
            if item.identity is None:
                continue
            new = {"frames": 0, "first_s": frame.time_s, "best_rank": item.rank, "rank_1_s": 0.0}
            entry = self.objects.setdefault(item.identity, new)
            entry["frames"] += 1
            entry["last_s"] = frame.time_s
            entry["best_rank"] = min(entry["best_rank"], item.rank)
        first = next((item.identity for item in ranking.objects if item.rank == 1), None)
        self._last = frame, first

    def _show(self, seconds: float) -> None:
        """Count for how long the latest frame is shown."""
        self.seconds += seconds
        if self._last is not None and self._last[1] is not None:
            self.objects[self._last[1]]["rank_1_s"] += seconds

    def to_dict(self) -> dict[str, Any]:
        """The summary of the video; nothing can be added after it. Its objects are in the order of
        their time at rank 1; there are none where frames are ranked without identities."""
        if self._last is not None:
            self._show(self._last[0].duration_s)
            self._last = None
        entries: list[dict[str, Any]] = [
            {"identity": identity, **{name: round(value, 6) for name, value in entry.items()}}
            for identity, entry in self.objects.items()
        ]
        entries.sort(key=lambda entry: (-entry["rank_1_s"], entry["identity"]))
        width, height = self.size
        return {
            "width": width,
            "height": height,
            "frames": self.frames,
            "frames_per_second": round(self.frames / self.seconds, 6) if self.seconds else None,
            "seconds": round(self.seconds, 6),
            "objects": entries,
        }


def _write_summary(target: OutputFiles, head: Mapping[str, Any], presence: Presence) -> None:
    """Write NAME.summary.json, if JSON was asked for and any frame was ranked. head: what it says
    before what was present."""
    if "json" in target.kinds and presence.frames:
        summary = {**head, **presence.to_dict()}
        write_whole(target.path(SUMMARY), (json.dumps(summary, indent=2) + "\n").encode())


def _show(picture: np.ndarray) -> None:
    """Show a frame in the window. Raises KeyboardInterrupt when q or Esc was pressed there."""
    cv2.imshow(WINDOW, to_bgr(picture))
    if cv2.waitKey(1) & 0xFF in (ord("q"), 27):
        raise KeyboardInterrupt
