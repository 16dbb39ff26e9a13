"""Crop a video to other aspects while it is ranked, or in a second pass over its file.

Where the source can be read again, the path of each window is planned with the whole shot in view,
and the crops are written afterwards. Otherwise frames wait for `LOOKAHEAD_S` and a little more.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from math import inf
from pathlib import Path

import numpy as np

from dsgnn.runtime.disk.files import whole_file
from dsgnn.runtime.disk.outputs import TABLE, OutputFiles, video_file
from dsgnn.runtime.disk.sources import Source
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.framing import Aspect, Box
from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.video import h264
from dsgnn.runtime.video.camera import LOOKAHEAD_S, PLACES, Operator, View, free_side, view_of
from dsgnn.runtime.video.cuts import CutFinder
from dsgnn.runtime.video.feed import Ended
from dsgnn.runtime.video.frames import Frame, Frames, Selection
from dsgnn.runtime.video.pipeline import read_ahead

LINES = TABLE["json"].video[0]
DECODED = 8  # decoded frames that wait to be cropped in the second pass

Add = Callable[[Frame, Ranking], None]


class _Window:
    """The window of one aspect in a video: its path as it becomes known."""

    def __init__(self, aspect: Aspect, size: tuple[int, int], lookahead_s: float) -> None:
        """size: (height, width) of the frames."""
        self.aspect, self._size = aspect, size
        self._axis, self._length, self._side = free_side(*size, aspect)
        self._operator = Operator(1 - self._length / self._side, lookahead_s)
        self._waiting: deque[tuple[View, bool]] = deque()
        self.boxes: list[Box] = []
        self.kept: list[float | None] = []  # shares of looks, as far as the artifact tells
        self.size = (
            (self._length, size[0]) if self._axis == 0 else (size[1], self._length)
        )  # (width, height) of the crop

    def add(self, ranking: Ranking, time_s: float, cut: bool) -> None:
        view = view_of(ranking, self.aspect, time_s, cut)
        self._waiting.append((view, ranking.attention is not None))
        self._tell(self._operator.add(view))

    def end(self) -> None:
        self._tell(self._operator.end())

    def _tell(self, places: list[float]) -> None:
        room = self._side - self._length
        for place in places:
            start = min(max(round(place * self._side), 0), room)
            end = start + self._length
            if self._axis == 0:
                self.boxes.append((start, 0, end, self._size[0]))
            else:
                self.boxes.append((0, start, self._size[1], end))
            view, known = self._waiting.popleft()
            at = np.interp(start, np.linspace(0, room, PLACES), view.kept) if room else 1.0
            self.kept.append(round(float(at), 4) if known else None)


@contextmanager
def reframed(
    target: OutputFiles, select: Selection, rate: float, notes: list[str], fenced: int
) -> Iterator[Add]:
    """Give a function that takes each ranked frame; the target's crops are whole when the block
    ends.

    select: which frames of the source are ranked. rate: frames per second, as far as it is known.
    notes: what a person should know is appended to it. fenced: as of `Frames`.

    Enter this block before that of the JSON lines: it adds the path to them once they are in place.
    When the block ends by Ctrl-C, the crops of a source that cannot be read again are written as
    far as they came, and those of a file are not written. Raises InputError and OSError where the
    crops cannot be written, or the source cannot be read.
    """
    twice = readable_twice(target.source)
    windows: list[_Window] = []
    cuts, held = CutFinder(), deque[Frame]()
    done = 0
    with ExitStack() as files:
        writers: list[h264.WriteFrame] = []

        def add(frame: Frame, ranking: Ranking) -> None:
            if not windows:
                size = frame.image.shape[0], frame.image.shape[1]
                lookahead_s = inf if twice else LOOKAHEAD_S
                windows.extend(_Window(aspect, size, lookahead_s) for aspect in target.aspects)
                if not twice:
                    writers.extend(_open(files, target, windows, rate))
            cut = cuts(frame.image)
            for window in windows:
                window.add(ranking, frame.time_s, cut)
            if not twice:
                held.append(frame)
                write_known()

        def write_known() -> None:
            nonlocal done
            while windows and done < len(windows[0].boxes):
                frame = held.popleft()
                for window, write in zip(windows, writers, strict=True):
                    _write(write, frame, window.boxes[done], select.start_s)
                done += 1

        def finish() -> None:
            for window in windows:
                window.end()
            if not twice:
                write_known()

        try:
            yield add
        except (KeyboardInterrupt, GeneratorExit):
            if not twice:
                finish()
            raise
        finish()
        if twice and windows:
            notes += _second_pass(target, select, windows, rate, fenced)
    if windows and "json" in target.kinds:
        _tell_path(target.path(LINES), windows)


def readable_twice(source: Source) -> bool:
    """Whether the source gives the same frames again."""
    return source.feed == "sequence" or (not source.feed and source.path is not None)


def _open(
    files: ExitStack,
    target: OutputFiles,
    windows: list[_Window],
    rate: float,
    sounds: list[h264.Sound] | None = None,
) -> Iterator[h264.WriteFrame]:
    """The writers of the crops. sounds: what each sounds like."""
    for index, window in enumerate(windows):
        path = target.path(target.crop_ending(window.aspect))
        sound = sounds[index] if sounds else None
        yield files.enter_context(video_file(path, rate, window.size, sound))


def _write(write: h264.WriteFrame, frame: Frame, box: Box, start_s: float) -> None:
    x0, y0, x1, y1 = box
    part = np.ascontiguousarray(frame.image[y0:y1, x0:x1])
    write(part, max(0.0, frame.time_s - start_s), frame.duration_s)


def _second_pass(
    target: OutputFiles, select: Selection, windows: list[_Window], rate: float, fenced: int
) -> list[str]:
    """Read the frames that were ranked again, and write the crops, with the sound of a file.

    Gives what a person should know of it.
    """
    frames = Frames(target.source, select, fenced)
    with ExitStack() as stack:
        sounds: list[h264.Sound] = []
        path = target.source.path
        if frames.has_sound and path is not None and h264.is_installed():
            for _ in windows:
                sounds.append(h264.Sound(path, select.start_s))
                stack.callback(sounds[-1].close)
        writers = list(_open(stack, target, windows, rate, sounds))
        decoded = stack.enter_context(closing(read_ahead(iter(frames), DECODED)))
        done, count = 0, len(windows[0].boxes)
        with suppress(Ended):  # it broke off there the first time too, which is told
            for frame in decoded:
                if done == count:
                    break
                for window, write in zip(windows, writers, strict=True):
                    _write(write, frame, window.boxes[done], select.start_s)
                done += 1
        if done < count:
            raise InputError(
                f"its crops end after {done} of {count} frames: the file has changed meanwhile"
            )
        if frames.whole:
            for sound in sounds:
                sound.end_s = (select.end_s or inf) - select.start_s
    return [sound.note for sound in sounds[:1] if sound.note]


def _tell_path(path: Path, windows: list[_Window]) -> None:
    """Add to each line of the JSON lines where the windows were."""
    with whole_file(path) as made, path.open() as lines, made.open("w") as file:
        for index, line in enumerate(lines):
            crops = {
                str(window.aspect): {"box": window.boxes[index], "attention": window.kept[index]}
                for window in windows
                if index < len(window.boxes)
            }
            file.write(json.dumps({**json.loads(line), "crops": crops}) + "\n")
