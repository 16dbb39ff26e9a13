"""What Ray Data and Ray Serve cost on one machine, against a single process, in one run.

Every arm ranks the same photos, as files or over HTTP, with the same model and threads per worker.
Before and after each arm the single process has a turn (`dsgnn-run --save json`), and the arm is
held against the mean of the two: what slows the machine slows both. Starting Ray, the workers and
their engines is told apart: a job of Ray Data counts from the end of its first task.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from dsgnn.benchmarks.environment import conditions, conditions_since, environment
from dsgnn.benchmarks.results import free, save
from dsgnn.runtime import Ranker, samples
from dsgnn.runtime.cluster.connect import cluster
from dsgnn.runtime.cluster.job import TASK_IMAGES, plan, rank_on_ray, ranker_for
from dsgnn.runtime.disk.sources import Source, find_sources
from dsgnn.runtime.errors import BackendError, InputError, OptionError
from dsgnn.runtime.fence import WITH_PARENT
from dsgnn.runtime.run.loop import rank_sources

FILE = "scaling.json"
CLIENTS = (1, 8)
Turn = tuple[float, float]
"""Milliseconds per image, and seconds until the first."""


def scaling(
    model: Path | None, images: int, threads: int, rounds: int, out: Path
) -> dict[str, Any]:
    """Measure and write OUT/scaling.json; returns the results.

    images: of each turn. threads: of each worker and of the single process; with as many workers as
    the machine has CPUs for. Raises OptionError if there are too few images, InputError or
    BackendError if an arm fails.
    """
    many = max(1, (os.cpu_count() or 1) // threads)
    if images < 8 * many or rounds < 1:
        raise OptionError(
            f"expected at least {8 * many} images and one round, got {images} and {rounds}"
        )
    target = free(out / FILE)
    out.mkdir(parents=True, exist_ok=True)
    before, rows = conditions(), []
    with TemporaryDirectory() as folder:
        for index in range(images):
            shutil.copy(samples()[index % len(samples())], Path(folder, f"{index:05}.jpg"))
        sources = find_sources([folder], out).sources
        ranker = Ranker(model, device="cpu", threads=threads)
        ranker(samples()[0])  # the first is slower

        def measured(name: str, workers: int, clients: int, arm: Callable[[], Turn]) -> None:
            turns = [
                (single(ranker, sources), arm(), single(ranker, sources)) for _ in range(rounds)
            ]
            alone = [(first + last) / 2 for first, _, last in turns]
            taken = [ms for _, (ms, _), _ in turns]
            rows.append(
                {
                    "name": name,
                    "workers": workers,
                    "threads": threads,
                    "clients": clients,
                    "images": images,
                    "start_s": median(start for _, (_, start), _ in turns),
                    "ms_per_image": median(taken),
                    "single_ms": median(alone),
                    "overhead_ms": median(a - b for a, b in zip(taken, alone, strict=True)),
                    "speed_up": median(b / a for a, b in zip(taken, alone, strict=True)),
                    "turns": [[first, ms, last] for first, (ms, _), last in turns],
                }
            )

        with cluster("", "data") as ray:
            for count in sorted({1, many}):
                job = partial(ray_data, ray, model, sources, count, threads)
                measured("Ray Data", count, 0, job)
        with server(model, threads) as (port, start_s):
            for clients in CLIENTS:
                posts = partial(ray_serve, port, sources, clients, start_s)
                measured("Ray Serve", 1, clients, posts)
    return save(
        target,
        "scaling",
        environment(),
        seed=0,
        model=ranker.describe(),
        conditions=conditions_since(before),
        rows=rows,
    )


def single(ranker: Ranker, sources: Sequence[Source]) -> float:
    """Milliseconds per image of one process that reads files and writes results.json."""
    with TemporaryDirectory() as folder:
        start = perf_counter()
        for outcome in rank_sources(ranker, sources, Path(folder), ("json",)):
            _check(outcome.error)
        return 1e3 * (perf_counter() - start) / len(sources)


def ray_data(
    ray: Any, model: Path | None, sources: Sequence[Source], workers: int, threads: int
) -> Turn:
    """A job of Ray Data, of files to Parquet, in a cluster that runs."""
    make_ranker, gpu = ranker_for(model, "auto", "cpu", threads, None, "none")
    stamps = []
    with TemporaryDirectory() as folder:
        start = perf_counter()
        outcomes = rank_on_ray(ray, make_ranker, plan(sources), Path(folder), workers, threads, gpu)
        for outcome in outcomes:
            _check(outcome.error)
            stamps.append(perf_counter())
    # When the first task ends each worker has done one.
    done = workers * min(TASK_IMAGES, len(sources) // (4 * workers))
    return 1e3 * (stamps[-1] - stamps[0]) / (len(stamps) - done), stamps[0] - start


@contextmanager
def server(model: Path | None, threads: int) -> Iterator[tuple[int, float]]:
    """dsgnn-serve with one replica on Ray: its port, and the seconds until it listened."""
    serve = str(Path(sys.executable).with_name("dsgnn-serve"))
    command = [serve, "--port", "0", "--cluster", "local"]
    command += ["--threads", str(threads), *(["--model", str(model)] if model else [])]
    start = perf_counter()
    quiet = subprocess.DEVNULL  # it logs requests to its standard output
    pipes: dict[str, Any] = {"stdout": quiet, "stderr": subprocess.PIPE, **WITH_PARENT}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("listening on "):
                break
        else:
            raise BackendError(f"dsgnn-serve did not start: {''.join(said)}")
        try:
            yield int(line.rpartition(":")[2].strip("/\n")), perf_counter() - start
        finally:
            process.terminate()


def ray_serve(port: int, sources: Sequence[Source], clients: int, start_s: float) -> Turn:
    """Clients that post photos, each one after the other, to a server that took start_s."""

    def post(paths: Sequence[Path]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        for path in paths:
            connection.request("POST", "/rank", path.read_bytes())
            response = connection.getresponse()
            body = response.read()
            _check("" if response.status == 200 else f"{response.status} {body.decode()}")
        connection.close()

    paths = [source.path for source in sources if source.path]
    with ThreadPoolExecutor(clients) as pool:
        start = perf_counter()
        list(pool.map(post, [paths[client::clients] for client in range(clients)]))
        return 1e3 * (perf_counter() - start) / len(paths), start_s


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """The rows as text, after a heading."""
    lines = [
        ["", "workers", "ms per image", "single process", "overhead, ms", "speed-up", "start, s"]
    ]
    for row in results["rows"]:
        clients = f", {row['clients']} clients" if row["clients"] else ""
        times = (row[name] for name in ("ms_per_image", "single_ms", "overhead_ms"))
        lines.append(
            [
                f"{row['name']}{clients}",
                f"{row['workers']} × {row['threads']} threads",
                *(f"{ms:,.1f}" for ms in times),
                f"{row['speed_up']:.2f}",
                f"{row['start_s']:.1f}",
            ]
        )
    return lines


def _check(error: str) -> None:
    if error:
        raise InputError(f"an image failed: {error}")
