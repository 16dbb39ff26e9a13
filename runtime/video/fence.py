"""Videos read in a process of their own, which can be killed.

A file may be made to crash FFmpeg, to keep it busy or to fill the memory. Here it ends that process
alone: the frames before it were ranked, and the next video gets a new process.

The process is asked on a pipe of its own, as its standard input may be the video.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from sys import argv
from typing import Any

import numpy as np

from dsgnn.runtime.disk.sources import Source, standard_input
from dsgnn.runtime.errors import DsgnnError, InputError
from dsgnn.runtime.fence import (
    DECODE_S,
    Answer,
    Child,
    answer_all,
    limit_memory,
    limit_time,
    stay_quiet,
)
from dsgnn.runtime.images import keep_quiet
from dsgnn.runtime.video.container import Pipe
from dsgnn.runtime.video.feed import KEPT, Ended, Feed, Shot
from dsgnn.runtime.video.film import open_film

CHILD = f"from {__name__} import main; main()"
ERRORS = (Ended, InputError, OSError)
TOO_LONG = f"reading it takes longer than {DECODE_S} s for one frame"


class FencedFilm(Feed):
    """A film or an animation, as `open_film` gives it, that another process reads."""

    def __init__(self, source: Source, rate: float | None, max_pixels: int) -> None:
        """Open a source. max_pixels: width × height of the largest frame. Errors as of
        `open_film`, and InputError if that cannot be done within the limits."""
        piped = source.path is None and not source.feed
        self._process = _Process(max_pixels, piped) if piped else _take(max_pixels)
        self._keep = not piped
        path = None if source.path is None else str(source.path)
        try:
            told, _ = self._process.ask(
                "open", TOO_LONG, path=path, feed=source.feed, address=source.address, rate=rate
            )
        except BaseException:
            self._process.end()
            raise
        self.rate, self.declared = float(told["rate"]), int(told["declared"])
        self.notes, self.has_sound = list(map(str, told["notes"])), bool(told["has_sound"])

    def shots(self, start_s: float) -> Iterator[Shot]:
        while shot := self._ask("next", start_s=float(start_s))[0]["shot"]:
            number, time_s, duration_s = shot
            yield Shot(int(number), float(time_s), float(duration_s), self._picture)
        self._hear_notes()

    def _picture(self) -> np.ndarray:
        return self._ask("picture")[1]

    def _ask(self, what: str, **about: Any) -> tuple[dict[str, Any], np.ndarray]:
        """As `Child.ask`, but where the film cannot be read on that raises Ended."""
        try:
            return self._process.ask(what, TOO_LONG, **about)
        except Ended:
            self._hear_notes()
            raise
        except InputError as error:
            raise Ended(f"{error}; {KEPT}") from error

    def _hear_notes(self) -> None:
        self.notes[:] = map(str, self._ask("notes")[0]["notes"])

    def release(self) -> None:
        """Close the film. The process waits for the next one."""
        process, self._keep = self._process, self._keep and self._process.poll() is None
        if self._keep:
            with suppress(DsgnnError, OSError):
                process.ask("close", TOO_LONG)
                _idle.append(process)
                return
        process.end()


class _Process(Child):
    """A process that reads one film after the other."""

    def __init__(self, max_pixels: int, piped: bool = False) -> None:
        """piped: whether the film comes on standard input."""
        reading, writing = os.pipe()
        standard: Any = subprocess.DEVNULL
        pump: Pipe | None = None
        if piped and (stream := standard_input()).seekable():
            standard = stream
            os.lseek(stream.fileno(), stream.tell(), os.SEEK_SET)
        elif piped:
            standard, pump = subprocess.PIPE, Pipe(standard_input())
        super().__init__(CHILD, ERRORS, max_pixels, reading, stdin=standard, pass_fds=[reading])
        os.close(reading)
        self.asks = os.fdopen(writing, "wb")
        if pump is not None:
            threading.Thread(target=self._feed, args=[pump], daemon=True).start()

    def _feed(self, pipe: Pipe) -> None:
        """Hand standard input on."""
        assert self.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # nobody reads on
            while part := pipe.read(1 << 16):
                self.stdin.write(part)
                self.stdin.flush()
            self.stdin.close()


_idle: list[_Process] = []


def _take(max_pixels: int) -> _Process:
    """A process that waits, or a new one."""
    while _idle:
        process = _idle.pop()
        if process.poll() is None and process.max_pixels == max_pixels:
            return process
        process.end()
    return _Process(max_pixels)


@atexit.register
def end_all() -> None:
    """End the processes that wait for a film."""
    while _idle:
        _idle.pop().end()


class _Reader:
    """In the process: the film that is open."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels

    def answer(self, question: dict[str, Any], _: bytes) -> Answer:
        """The answer to a question, and the picture for it."""
        limit_time()
        try:
            return self._answer(question)
        except MemoryError:
            raise InputError("reading it takes more memory than one video may") from None

    def _answer(self, question: dict[str, Any]) -> Answer:
        what = question["ask"]
        if what == "open":
            limit_memory(self._max_pixels)
            path = None if question["path"] is None else Path(question["path"])
            source = Source(path, "", feed=question["feed"], address=question["address"])
            self._film = film = open_film(source, question["rate"], self._max_pixels, limit_time)
            self._shots: Iterator[Shot] | None = None
            facts = {"rate": film.rate, "declared": film.declared, "has_sound": film.has_sound}
            return {**facts, "notes": film.notes}, None
        if what == "next":
            self._shots = self._shots or self._film.shots(question["start_s"])
            shot = next(self._shots, None)
            if shot is None:
                return {"shot": None}, None
            self._picture = shot.picture
            return {"shot": [shot.number, shot.time_s, shot.duration_s]}, None
        if what == "picture":
            return {}, self._picture()
        if what == "notes":
            return {"notes": self._film.notes}, None
        self._film.release()
        del self._film, self._shots
        return {}, None


def main() -> None:
    """Read films as the lines of a pipe ask, until it is closed. argv: max_pixels, its number."""
    out = stay_quiet()
    keep_quiet()
    reader = _Reader(int(argv[1]))
    with os.fdopen(int(argv[2]), "rb") as asks:
        answer_all(asks, out, reader.answer, ERRORS, "process that reads videos")
