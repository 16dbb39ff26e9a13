"""Videos read in a process of their own, which can be killed.

A file may be made to crash FFmpeg, to keep it busy or to fill the memory. Here it ends that process
alone: the frames before it were ranked, and the next video gets a new process.

The process is asked by lines of JSON on a pipe of its own, as its standard input may be the video.
It answers with lines of JSON, and the pixels behind them where there are any.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import threading
import traceback
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
    end,
    exactly,
    limit_memory,
    limit_time,
    spawn,
    stay_quiet,
    took_too_long,
)
from dsgnn.runtime.images import keep_quiet
from dsgnn.runtime.video.container import Pipe
from dsgnn.runtime.video.feed import KEPT, Ended, Feed, Shot
from dsgnn.runtime.video.film import open_film

CHILD = f"from {__name__} import main; main()"
MAX_LINE = 1 << 20  # bytes of an answer without its pixels


class FencedFilm:
    """A film or an animation, as `open_film` gives it, that another process reads."""

    def __init__(self, source: Source, rate: float | None, max_pixels: int) -> None:
        """Open a source. max_pixels: width × height of the largest frame. Errors as of
        `open_film`, and InputError if that cannot be done within the limits."""
        piped = source.path is None and not source.feed
        self._process = _Process(max_pixels, piped) if piped else _take(max_pixels)
        self._keep = not piped
        path = None if source.path is None else str(source.path)
        about = {"path": path, "feed": source.feed, "address": source.address, "rate": rate}
        try:
            told = self._process.ask("open", **about)
        except BaseException:
            self._process.end()
            raise
        self.rate, self.declared = float(told["rate"]), int(told["declared"])
        self.notes, self.has_sound = list(map(str, told["notes"])), bool(told["has_sound"])

    def shots(self, start_s: float) -> Iterator[Shot]:
        try:
            while (told := self._process.ask("next", start_s=float(start_s))).get("more"):
                number, time_s, duration_s = told["shot"]
                yield Shot(int(number), float(time_s), float(duration_s), self._picture)
            self.notes[:] = map(str, told["notes"])
        except Ended as error:
            self.notes[:] = map(str, getattr(error, "notes", None) or self.notes)
            raise
        except InputError as error:
            raise Ended(f"{error}; {KEPT}") from error

    def _picture(self) -> np.ndarray:
        try:
            height, width = map(int, self._process.ask("picture")["size"])
            return self._process.pixels(height, width)
        except Ended:
            raise
        except InputError as error:
            raise Ended(f"{error}; {KEPT}") from error

    def release(self) -> None:
        """Close the film. The process waits for the next one."""
        process, self._keep = self._process, self._keep and self._process.alive
        if self._keep:
            with suppress(DsgnnError, OSError):
                process.ask("close")
                _idle.append(process)
                return
        process.end()


class _Process:
    """A process that reads one film after the other."""

    def __init__(self, max_pixels: int, piped: bool = False) -> None:
        """piped: whether the film comes on standard input."""
        self.max_pixels = max_pixels
        asks, self._asks = os.pipe()
        standard: Any = subprocess.DEVNULL
        pump: Pipe | None = None
        if piped and (stream := standard_input()).seekable():
            standard = stream
            os.lseek(stream.fileno(), stream.tell(), os.SEEK_SET)
        elif piped:
            standard, pump = subprocess.PIPE, Pipe(standard_input())
        self._child = spawn(CHILD, max_pixels, asks, max_pixels, stdin=standard, pass_fds=[asks])
        os.close(asks)
        if pump is not None:
            threading.Thread(target=self._feed, args=[pump], daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def ask(self, what: str, **about: Any) -> dict[str, Any]:
        """Ask and wait for the answer. Raises what the film raised there, InputError if the process
        ends instead, and RuntimeError for a bug of ours in it, with its traceback."""
        try:
            os.write(self._asks, json.dumps({"ask": what, **about}).encode() + b"\n")
            assert self._child.stdout is not None
            line = self._child.stdout.readline(MAX_LINE)
            answer: dict[str, Any] = json.loads(line)
        except (BrokenPipeError, ValueError):
            raise self._ended() from None
        if error := answer.get("error"):
            raise _raised(error)
        return answer

    def pixels(self, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB, which follow an answer. Raises InputError."""
        assert self._child.stdout is not None
        try:
            if height * width > self.max_pixels:  # someone else has taken over the process
                raise EOFError
            return exactly(self._child.stdout, height * width * 3).reshape(height, width, 3)
        except EOFError:
            raise self._ended() from None

    def end(self) -> None:
        """End the process; a second call does nothing."""
        end(self._child)
        if self._asks >= 0:
            os.close(self._asks)
            self._asks = -1

    def _ended(self) -> InputError:
        """Why the process does not answer."""
        self._child.kill()
        if took_too_long(self._child.wait()):
            return InputError(f"reading it takes longer than {DECODE_S} s for one frame")
        return InputError("its decoder crashed on it")

    def _feed(self, pipe: Pipe) -> None:
        """Hand standard input on."""
        out = self._child.stdin
        assert out is not None
        with suppress(BrokenPipeError, ValueError):  # nobody reads on
            while part := pipe.read(1 << 16):
                out.write(part)
                out.flush()
            out.close()


_idle: list[_Process] = []


def _take(max_pixels: int) -> _Process:
    """A process that waits, or a new one."""
    while _idle:
        process = _idle.pop()
        if process.alive and process.max_pixels == max_pixels:
            return process
        process.end()
    return _Process(max_pixels)


@atexit.register
def end_all() -> None:
    """End the processes that wait for a film."""
    while _idle:
        _idle.pop().end()


def _raised(error: dict[str, Any]) -> Exception:
    """The error that a process tells of."""
    kind, said = error["kind"], str(error["said"])
    if kind == "Ended":
        ended = Ended(said)
        ended.notes = list(map(str, error["notes"]))
        return ended
    if kind == "OSError":
        return OSError(error["number"], said)
    if kind == "InputError":
        return InputError(said)
    return RuntimeError(f"a bug in the process that reads videos:\n{said}")


class _Reader:
    """In the process: the film that is open."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._film: Feed | None = None

    def answer(self, asked: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        """The answer to one line, and pixels that follow it."""
        what = asked["ask"]
        if what == "open":
            limit_memory(self._max_pixels)
            path = None if asked["path"] is None else Path(asked["path"])
            source = Source(path, "", feed=asked["feed"], address=asked["address"])
            self._film = film = open_film(source, asked["rate"], self._max_pixels, limit_time)
            self._shots: Iterator[Shot] | None = None
            facts = {"rate": film.rate, "declared": film.declared, "has_sound": film.has_sound}
            return {**facts, "notes": film.notes}, None
        assert self._film is not None
        if what == "next":
            self._shots = self._shots or self._film.shots(asked["start_s"])
            shot = next(self._shots, None)
            if shot is None:
                return {"more": False, "notes": self._film.notes}, None
            self._picture = shot.picture
            return {"more": True, "shot": [shot.number, shot.time_s, shot.duration_s]}, None
        if what == "picture":
            pixels = self._picture()
            return {"size": pixels.shape[:2]}, pixels
        self._film.release()
        self._film = self._shots = None
        return {"closed": True}, None

    def error(self, error: Exception) -> dict[str, Any]:
        """An error as an answer."""
        notes = self._film.notes if self._film else []
        if isinstance(error, MemoryError):
            return {"kind": "InputError", "said": "reading it takes more memory than one video may"}
        if isinstance(error, OSError):
            return {"kind": "OSError", "number": error.errno, "said": error.strerror}
        if isinstance(error, DsgnnError):
            kind = "Ended" if isinstance(error, Ended) else "InputError"
            return {"kind": kind, "said": str(error), "notes": notes}
        return {"kind": "bug", "said": traceback.format_exc()}


def main() -> None:
    """Read films as the lines of a pipe ask, until it is closed. argv: its number, max_pixels."""
    out = stay_quiet()
    keep_quiet()
    reader = _Reader(int(argv[2]))
    with os.fdopen(int(argv[1]), "rb") as asks:
        for line in asks:
            limit_time()
            pixels = None
            try:
                answer, pixels = reader.answer(json.loads(line))
            except Exception as error:
                answer = {"error": reader.error(error)}
            try:
                out.write(json.dumps(answer).encode() + b"\n")
                if pixels is not None:
                    out.write(np.ascontiguousarray(pixels).data)
                out.flush()
            except BrokenPipeError:  # nobody waits for it any more
                os._exit(0)
    os._exit(0)  # FFmpeg may wait for a stream
