"""Processes that decode what strangers made, which may crash, hang or fill the memory.

Each ends with this process. What is common to those for photos (dsgnn.runtime.photo.decoder) and
for videos (dsgnn.runtime.video.fence) is here. So is how a program that does not read from us ends
with this process, even if that is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from dsgnn.runtime.disk.documents import parse_document
from dsgnn.runtime.errors import InputError

PIPE_BYTES = 1 << 20  # so that a photo or frame goes through in few pieces, on Linux
DECODE_S = 5  # seconds of processor time for one photo or frame
SOME_BYTES = 1 << 30  # memory for one photo or video, beside what the process has before it
PIXEL_BYTES = 12  # memory for each pixel, where more pixels than usual are allowed
MAX_LINE = 1 << 20  # bytes of an answer without its picture
PR_SET_PDEATHSIG = 1  # of Linux's prctl

Answer = tuple[dict[str, Any], np.ndarray | None]  # what it says, and its picture


class Child(subprocess.Popen[bytes]):
    """A process of Python that answers one question after the other, on its standard output.

    A question is a line of JSON, with bytes behind it. An answer is a line of JSON, with the pixels
    of a picture behind it where it tells their size.

    asks: where it reads the questions from, which is its standard input unless its maker sets
    another pipe. max_pixels: width × height of the largest picture of an answer.
    """

    def __init__(
        self,
        code: str,
        errors: Sequence[type[Exception]],
        max_pixels: int,
        *arguments: object,
        **pipes: Any,
    ) -> None:
        """code: of Python, which calls `answer_all`. errors: as for that function. max_pixels:
        width × height of the largest picture that OpenCV decodes there, and the first word for the
        code. arguments: more of them. pipes: more arguments of Popen.
        """
        self._errors, self.max_pixels, self._late = errors, max_pixels, False
        paths = os.pathsep.join(path for path in map(os.path.abspath, sys.path) if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
        environment["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(max_pixels)
        command = [sys.executable, "-P", "-c", code, str(max_pixels), *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, **pipes}
        pipes |= {"stdout": subprocess.PIPE, "pipesize": PIPE_BYTES}
        super().__init__(command, env=environment, **pipes)
        self.asks = self.stdin

    def ask(
        self, what: str, too_long: str, more: bytes = b"", **about: Any
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Ask, and wait for the answer: what it says, and its picture, (h, w, 3) uint8 RGB.

        too_long: the message where the process was ended for taking too long. more: the bytes
        behind the question. Raises the error that the question met there, InputError if the process
        ends instead, and RuntimeError for a bug of ours in it, with its traceback.
        """
        assert self.asks is not None and self.stdout is not None
        try:
            question = {"ask": what, "bytes": len(more), **about}
            self.asks.write(json.dumps(question).encode() + b"\n")
            self.asks.write(more)
            self.asks.flush()
            told, height, width = _understood(self.stdout.readline(MAX_LINE))
            if height * width > self.max_pixels:
                raise EOFError
            picture = np.empty((height, width, 3), np.uint8)
            if self.stdout.readinto(picture.data) < picture.size:  # type: ignore[attr-defined]
                raise EOFError
        except (BrokenPipeError, EOFError, ValueError):
            self.kill()
            ended_by_us = self.wait() == -getattr(signal, "SIGXCPU", 0) or self._late
            raise InputError(too_long if ended_by_us else "its decoder crashed on it") from None
        if error := told.get("error"):
            known = {kind.__name__: kind for kind in self._errors}
            if error["kind"] in known:
                raise known[error["kind"]](*error["said"])
            raise RuntimeError("a bug in the " + ":\n".join(map(str, error["said"])))
        return told, picture

    def give_up(self) -> None:
        """Kill the process because it takes too long to answer."""
        self._late = True
        self.kill()

    def end(self) -> None:
        """Kill the process, and close its pipes; a second call does nothing."""
        self.kill()
        self.wait()
        for pipe in (self.asks, self.stdin, self.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # by what it never read
                    pipe.close()


def _understood(line: bytes) -> tuple[dict[str, Any], int, int]:
    """What an answer says, and the height and width of its picture; 0 and 0 where it has none.

    Raises ValueError for what `answer_all` never says: someone else has taken over the process.
    """
    match told := parse_document(line):
        case {"size": [int(height), int(width)]}:
            return told, height, width
        case {"error": {"kind": str() | None, "said": [_, *_]}}:
            return told, 0, 0
        case {"size": _} | {"error": _}:
            pass
        case {}:
            return told, 0, 0
    raise ValueError("an answer of another form")


def end_with_parent() -> None:
    """In the process: end, by SIGTERM, when the one that started it has ended. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


WITH_PARENT: dict[str, Any] = {"preexec_fn": end_with_parent} if sys.platform == "linux" else {}
"""Arguments of Popen for a program that is to end with this process; Windows refuses them."""


def stay_quiet() -> IO[bytes]:
    """In the process: leave signals to the one that started it, and give its standard output.

    A server answers the photos it holds after these signals, and a run finishes its files. So the
    process that started this one decides when it ends. What libraries print goes nowhere from now
    on.
    """
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)  # takes number 2 if there is no standard error
    out = os.fdopen(os.dup(1), "wb")
    for number in (1, 2):
        os.dup2(nowhere, number)
    return out


def answer_all(
    asks: IO[bytes],
    out: IO[bytes],
    answer: Callable[[dict[str, Any], bytes], Answer],
    errors: Sequence[type[Exception]],
    name: str,
) -> NoReturn:
    """In the process: answer what a `Child` is asked until its pipe is closed, and end.

    out: what `stay_quiet` gave. answer: gives the answer to a question and the bytes behind it, and
    the picture for it or None. errors: those of it that the other process may meet, the special
    ones first; others are bugs. name: of this process, in a message about a bug.
    """
    for line in asks:
        picture = None
        try:
            question = json.loads(line)
            told, picture = answer(question, asks.read(question["bytes"]))
        except Exception as error:
            kind = next((kind for kind in errors if isinstance(error, kind)), None)
            if kind is None:
                said: list[Any] = [name, traceback.format_exc()]
            elif isinstance(error, OSError):
                said = [error.errno, error.strerror]
            else:
                said = [str(error)]
            told = {"error": {"kind": kind and kind.__name__, "said": said}}
        try:
            if picture is None:
                out.write(json.dumps(told).encode() + b"\n")
            else:
                out.write(json.dumps({**told, "size": picture.shape[:2]}).encode() + b"\n")
                out.write(np.ascontiguousarray(picture).data)
            out.flush()
        except BrokenPipeError:  # nobody waits for it any more
            break
    os._exit(0)  # FFmpeg may wait for a stream


def limit_memory(max_pixels: int) -> None:
    """Bound what this process may allocate beyond what it has now. Linux only."""
    if sys.platform != "linux":
        return
    import resource

    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            held = int(line.split()[1]) << 10
            _lower(resource.RLIMIT_DATA, held + max(SOME_BYTES, PIXEL_BYTES * max_pixels))


def limit_time(limit_s: int = DECODE_S) -> None:
    """Have this process ended when it has used so much more processor time. Not on Windows."""
    if sys.platform != "win32":
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _lower(resource.RLIMIT_CPU, ceil(used.ru_utime + used.ru_stime) + limit_s)


def _lower(kind: int, limit: int) -> None:
    """Set a limit of this process, unless it has a lower one that it may not change."""
    import resource

    _, hard = resource.getrlimit(kind)
    soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (soft, hard))
