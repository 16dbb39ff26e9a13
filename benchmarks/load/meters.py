"""What a process and the machine use while they work. What cannot be read is absent, never zero."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsgnn.benchmarks.environment import read_text

WATCH_S, POINTS = 0.5, 240  # memory is read so often; at most twice so many readings are kept


def joules(root: Path = Path("/")) -> dict[str, float]:
    """What each meter of the machine has counted, in joules: "rapl:0" for the first processor,
    "nvml:0" for the first GPU. A meter that cannot be read is not there."""
    found: dict[str, float] = {}
    for path in sorted(root.glob("sys/class/powercap/intel-rapl:*/energy_uj")):
        number = path.parent.name.partition(":")[2]
        if number.isdecimal() and (text := read_text(path)):  # 0:0 is a part of 0
            found[f"rapl:{number}"] = int(text) / 1e6
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        count, handle, millijoules = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_ulonglong()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return found
        for index in range(count.value):
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
                continue
            if not nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
                found[f"nvml:{index}"] = millijoules.value / 1e3
    except (OSError, AttributeError):  # no such library, or one that is too old
        pass
    return found


def resident_mib(pid: int | None, root: Path = Path("/")) -> float | None:
    """Memory that a process and those that it started hold now, in MiB."""
    if pid is None:
        return None
    held = re.search(r"^VmRSS:\s+(\d+) kB", read_text(root / f"proc/{pid}/status"), re.M)
    if held is None:
        return None
    texts = [read_text(path) for path in root.glob(f"proc/{pid}/task/*/children")]
    children = [resident_mib(int(child), root) for text in texts for child in text.split()]
    return int(held[1]) / 1024 + sum(mib for mib in children if mib is not None)


def listener(port: int, root: Path = Path("/")) -> int | None:
    """The process that listens on a TCP port of this machine; None where it cannot be told."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in read_text(root / f"proc/net/{name}").splitlines()
    ]
    sockets = {
        f"socket:[{cells[9]}]"
        for cells in lines
        if len(cells) > 9 and cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port
    }
    for path in root.glob("proc/[0-9]*/fd/*"):
        try:
            if os.readlink(path) in sockets:
                return int(path.parent.parent.name)
        except OSError:  # another user's, or it has ended
            continue
    return None


@contextmanager
def watching(pid: int | None) -> Iterator[list[list[float]]]:
    """Gives a list that grows by [seconds, MiB] while the block lasts; empty where the memory of
    the process cannot be read."""
    readings: list[list[float]] = []
    start, ended, every = time.monotonic(), threading.Event(), WATCH_S

    def watch() -> None:
        nonlocal every
        while not ended.wait(every):
            if (mib := resident_mib(pid)) is not None:
                readings.append([round(time.monotonic() - start, 1), round(mib, 1)])
            if len(readings) >= 2 * POINTS:
                del readings[::2]
                every *= 2

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        ended.set()
        thread.join()
