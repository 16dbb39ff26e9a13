"""Use the machine whole: photos side by side in lanes, as many as it has cores for, in order.

OpenCV and the inference libraries release the interpreter lock while they work, so threads suffice.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import islice, product
from math import ceil
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
LANE_BYTES = 1 << 30  # what a lane may need for a photo of 48 megapixels, its decoder included
LANE_PHOTOS = 4  # a lane starts a process that decodes, which takes as long as some photos
GPU_LANES = 4  # each has buffers of its own on the GPU
HERE = Path("/")


def cores(root: Path = HERE) -> int:
    """How many processor cores this process may use: those that it may run on, and no more than its
    control group has time for, rounded up. root: where proc and sys are found."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    limits = (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"])  # in versions 2 and 1
    for folder, files in product(_groups(root, "cpu"), limits):
        with suppress(OSError, ValueError):  # "max" is no number, and no limit
            texts = " ".join((folder / file).read_text() for file in files)
            quota, period = map(int, texts.split())
            if quota > 0:  # -1 is no limit
                count = min(count, ceil(quota / period))
    return max(1, count)


def memory_bytes(root: Path = HERE) -> int | None:
    """How much memory this process may use: the machine's, and no more than its control group has;
    None where that is not known. root: as for `cores`."""
    known = []
    with suppress(AttributeError, OSError, ValueError):  # not on Windows
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max" is no number, and no limit
                known.append(int((folder / name).read_text()))
    return min(known, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups and of those around them.

    A container may see its own group as the outermost one, under whatever name it is listed.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            # Version 2 has one tree, and version 1 one for each controller.
            tree = root / "sys/fs/cgroup" / (controller if controllers else "")
            group = PurePosixPath(place.lstrip("/"))
            yield from (tree / part for part in (group, *group.parents))


def threads_beside(backend: str) -> int:
    """CPU threads of one inference where several go side by side. backend: "auto" or a backend.

    One each; but OpenVINO runs all of them on the same threads, so it gets a thread for every core.
    """
    openvino = backend.startswith("openvino") or not find_spec("onnxruntime")
    return cores() if openvino else 1


def lanes_for(threads: int, device: str = "cpu", photos: int | None = None) -> int:
    """How many photos to rank side by side.

    threads: of one inference on a CPU. device: "cpu", or any other for a GPU. photos: how many
    there are, if that is known. There is a lane for each of the inferences that the cores are
    enough for, and one more, because a lane also waits for files; but no more than the memory is
    enough for, than GPU_LANES on a GPU, and than one for every LANE_PHOTOS.
    """
    lanes = max(1, cores() // threads) + 1
    if device != "cpu":
        lanes = min(lanes, GPU_LANES)
    if (memory := memory_bytes()) is not None:
        lanes = min(lanes, memory // LANE_BYTES)
    if photos is not None:
        lanes = min(lanes, ceil(photos / LANE_PHOTOS))
    return max(1, lanes)


def side_by_side(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    lanes: int,
    late: Callable[[Item, Result], Any] | None = None,
) -> Generator[tuple[Item, Callable[[], Result]], None, None]:
    """Do the work on several items at once; yields each item in order, and what gives its result.

    That returns what the work returned or raises what it raised. At most `2 * lanes` items have
    been taken and not been yielded. With one lane the work is done when its result is asked for.
    late: when this generator is closed or interrupted, it waits for the work under way, and gives
    what became of it to this function, in order; work that raised is left out.
    """
    if lanes == 1:
        for item in items:
            yield item, partial(work, item)
        return
    coming = iter(items)
    taken: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(lanes, "dsgnn-lane") as pool:
        try:
            while True:
                for item in islice(coming, 2 * lanes - len(taken)):
                    taken.append((item, pool.submit(work, item)))
                if not taken:
                    return
                wait([taken[0][1]])
                item, future = taken.popleft()
                yield item, future.result
        finally:
            for item, future in [pair for pair in taken if not pair[1].cancel()]:
                if future.exception() is None and late is not None:
                    late(item, future.result())
