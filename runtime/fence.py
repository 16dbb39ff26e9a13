"""Processes that decode what strangers made, which may crash, hang or fill the memory.

Each ends with this process. What is common to those for photos (dsgnn.runtime.photo.decoder) and
for videos (dsgnn.runtime.video.fence) is here. So is how a program that does not read from us ends
with this process, even if that is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import IO, Any

import numpy as np

PIPE_BYTES = 1 << 20  # so that a photo or frame goes through in few pieces, on Linux
DECODE_S = 5  # seconds of processor time for one photo or frame
SOME_BYTES = 1 << 30  # memory for one photo or video, beside what the process has before it
PIXEL_BYTES = 12  # memory for each pixel, where more pixels than usual are allowed
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def spawn(code: str, max_pixels: int, *arguments: object, **pipes: Any) -> subprocess.Popen[bytes]:
    """Start a process of Python that runs this code and answers on its standard output.

    max_pixels: width × height of the largest picture that OpenCV decodes there. arguments: words
    for the code. pipes: more arguments of Popen.
    """
    paths = os.pathsep.join(path for path in map(os.path.abspath, sys.path) if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    environment["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(max_pixels)
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    pipes |= {"stdout": subprocess.PIPE, "pipesize": PIPE_BYTES}
    return subprocess.Popen(command, env=environment, **pipes)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that `spawn` started, and close its pipes; a second call does nothing."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # by what it never read
                pipe.close()


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


def exactly(pipe: IO[bytes], size: int) -> np.ndarray:
    """(size,) uint8 from a pipe. Raises EOFError if it ends before that."""
    data = np.empty(size, np.uint8)
    if pipe.readinto(data) < size:  # type: ignore[attr-defined]
        raise EOFError
    return data


def took_too_long(status: int) -> bool:
    """Whether a process with this exit status was ended by `limit_time`."""
    return status == -getattr(signal, "SIGXCPU", 0)


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
