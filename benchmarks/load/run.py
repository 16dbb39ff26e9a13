"""`dsgnn-bench load`: an artifact, or a server that runs on this machine, under MLPerf's load.

The photos are the package's, as 640 × 480 JPEGs; a query is one of them, and its answer the
ranking. Every answer is held against what a `Ranker` gives for the photo alone, so a server that is
fast and wrong has no figures.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from dsgnn.benchmarks.environment import busy, conditions, conditions_since, environment
from dsgnn.benchmarks.forms import check_verified, photos
from dsgnn.benchmarks.load import loadgen
from dsgnn.benchmarks.load.loadgen import BusyError, Load
from dsgnn.benchmarks.load.meters import joules, listener, resident_mib, watching
from dsgnn.benchmarks.results import free, save
from dsgnn.runtime import Ranker
from dsgnn.runtime.errors import BackendError, OptionError
from dsgnn.runtime.run.lanes import lanes_for

FILE, LOGS = "load.json", "loadgen"
CLIENTS = 64  # connections to a server at once
WARM = 20
LONGEST_S = 600.0  # of a test in the search for a rate that is kept, but for the first
QUIET_S = 1.0  # before anything runs, to see what else the machine does
SALIENCY, PIXELS = 1e-3, 2  # by which answers may differ: a batch rounds otherwise than one photo
Objects = list[tuple[float, Sequence[float]]]
"""The saliency and the box [x, y, width, height] of each object, first looked at first."""


@dataclass(frozen=True)
class Target:
    """What is put under load. ask: the answer to a photo, in any thread. read: the objects of an
    answer. pid: of the process whose memory is watched, None where it cannot be told."""

    name: str
    ask: Callable[[bytes], Any]
    read: Callable[[Any], Objects]
    lanes: int
    pid: int | None


def load(
    target: str,
    out: Path,
    *,
    model: Path | None = None,
    lanes: int | None = None,
    p99_ms: float = 100.0,
    duration_s: float = 60.0,
    queries: int = loadgen.QUERIES,
    seed: int = 0,
    allow_unverified: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measure and write out/load.json, and LoadGen's logs beside it; returns what the file says.

    target: an artifact, or the address of a server such as http://127.0.0.1:8000. model: the
    artifact that the server runs, None = the bundled one. lanes: photos in flight at once, None =
    as many as `Ranker.map` has, or CLIENTS connections. Each test lasts duration_s at least, and
    has so many queries at least. options: backend, device and threads of the `Ranker`.

    The highest rate is searched between 0 and the offline throughput by `highest_rate`: a rate is
    kept where LoadGen's server test of it is valid (its early stopping shows with 99% confidence
    that 99% of the queries take at most p99_ms) and no query is turned away. While none was
    kept, none is tried but for the first at which the queries would take more than LONGEST_S.

    Raises OptionError; ArtifactError for an artifact that is not verified; BackendError for answers
    that are not those of the photo alone, or a server that fails.
    """
    written = free(out / FILE)
    if not (p99_ms > 0 and duration_s >= 0 and queries > 0 and (lanes is None or lanes > 0)):
        raise OptionError("p99, queries and lanes must be positive, and the duration not negative")
    served = "://" in target
    if served:
        check_address(target)
    pictures, path = photos(), model if served else Path(target)
    before = conditions()
    time.sleep(QUIET_S)
    busy_before = busy(before, conditions())
    with ExitStack() as stack:
        ranker = stack.enter_context(Ranker(path, **options))
        check_verified(ranker.artifact, allow_unverified)
        alone = [of_ranking(ranker(photo)) for photo in pictures]
        if served:
            subject = stack.enter_context(over_http(target, lanes or CLIENTS))
            started = {"cold_s": None, "first_ms": None, "warm_ms": warm(subject, pictures)}
        else:
            started = cold_start(path, options)
            many = lanes or lanes_for(ranker.backend.threads, ranker.backend.device)
            subject = Target(ranker.artifact.path.name, ranker, of_ranking, many, os.getpid())
        good: set[tuple[int, bytes]] = set()  # answers of a server, as they came

        def check(sample: int, answer: Any) -> None:
            if isinstance(answer, bytes) and (sample, answer) in good:
                return
            if not same(subject.read(answer), alone[sample]):
                raise BackendError(
                    f"{subject.name} ranks photo {sample} otherwise under load than "
                    f"{ranker.artifact.path.name} ranks it alone"
                )
            if isinstance(answer, bytes):
                good.add((sample, answer))

        def test(scenario: str, rate_per_s: float, logs: str) -> dict[str, Any]:
            planned = Load(scenario, rate_per_s, p99_ms, duration_s, queries, seed)
            ways = 1 if scenario == "single-stream" else subject.lanes
            energy, memory = joules(), resident_mib(subject.pid)
            ask = lambda sample: subject.ask(pictures[sample])  # noqa: E731
            found = loadgen.drive(planned, ask, check, len(pictures), ways, out / LOGS / logs)
            used = {name: value - energy[name] for name, value in joules().items()}
            return {
                "scenario": scenario,
                "rate_per_s": rate_per_s if scenario == "server" else None,
                **found,
                "memory_mib": [memory, resident_mib(subject.pid)],
                "joules_per_photo": {k: v / found["queries"] for k, v in used.items() if v > 0},
            }

        memory = stack.enter_context(watching(subject.pid))
        rows = [test("single-stream", 1.0, "single-stream")]
        guess = rows[0]["per_s"] * (os.cpu_count() or 1)
        rows.append(test("offline", guess, "offline"))
        if any(row["refused"] for row in rows):
            raise BackendError(f"{subject.name} turned photos away: give fewer lanes")
        tried: list[dict[str, Any]] = []

        def keeps(rate: float) -> bool:
            tried.append(test("server", rate, f"server-{len(tried)}"))
            return tried[-1]["valid"] and not tried[-1]["refused"]

        best = loadgen.highest_rate(keeps, rows[1]["per_s"], queries / LONGEST_S)
        chosen = next((row for row in tried if row["rate_per_s"] == best), tried[-1])
        keep_logs(out / LOGS, tried.index(chosen), len(tried))
        return save(
            written,
            "load",
            environment(),
            seed=seed,
            target="server" if served else "artifact",
            model={**ranker.describe(), "threads": ranker.backend.threads},
            plan={"p99_ms": p99_ms, "duration_s": duration_s, "queries": queries},
            conditions={**conditions_since(before), "busy_before": busy_before},
            start=started,
            highest_per_s=best,
            search=[{k: row[k] for k in ("rate_per_s", "valid", "p99_ms")} for row in tried],
            memory=memory or None,
            rows=[*rows, chosen],
        )


def of_ranking(ranking: Any) -> Objects:
    return of_objects(ranking.to_dict()["objects"])


def of_objects(objects: Sequence[Mapping[str, Any]]) -> Objects:
    """objects: of results.json."""
    by_rank = sorted(objects, key=lambda item: item["rank"])
    return [(item["saliency"], item["bbox"]) for item in by_rank]


def same(one: Objects, other: Objects) -> bool:
    """Whether two rankings have the same objects in the same order, but for rounding."""
    return len(one) == len(other) and all(
        abs(saliency - other_saliency) <= SALIENCY
        and all(abs(a - b) <= PIXELS for a, b in zip(box, other_box, strict=True))
        for (saliency, box), (other_saliency, other_box) in zip(one, other, strict=True)
    )


def check_address(address: str) -> tuple[str, int]:
    """The host and port of a server on this machine; OptionError for any other address."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port or 80
    except ValueError:
        host = ""
    local = host in ("127.0.0.1", "localhost", "::1")
    if not local or parts.scheme != "http" or parts.path not in ("", "/"):
        raise OptionError(
            f"expected a server on this machine such as http://127.0.0.1:8000, got {address}: "
            "elsewhere the network would be measured too"
        )
    return host, port


@contextmanager
def over_http(address: str, clients: int) -> Iterator[Target]:
    """A running dsgnn-serve, with a connection for each thread that asks."""
    host, port = check_address(address)
    mine = threading.local()
    opened: list[http.client.HTTPConnection] = []

    def ask(photo: bytes) -> bytes:
        if not hasattr(mine, "connection"):
            mine.connection = http.client.HTTPConnection(host, port, timeout=120)
            opened.append(mine.connection)
        try:
            response = _post(mine.connection, photo)
        except (ConnectionError, http.client.BadStatusLine):  # it was idle for too long
            mine.connection.close()
            response = _post(mine.connection, photo)
        status, body = response
        if status in (503, 504):
            raise BusyError(f"{address} answered {status}: {body.decode()}")
        if status != 200:
            raise BackendError(f"{address} answered {status}: {body.decode()}")
        return body

    def read(body: bytes) -> Objects:
        return of_objects(json.loads(body)["images"][0]["objects"])

    try:
        yield Target(address, ask, read, clients, listener(port))
    finally:
        for connection in opened:
            connection.close()


def _post(connection: http.client.HTTPConnection, photo: bytes) -> tuple[int, bytes]:
    connection.request("POST", "/rank", photo)
    response = connection.getresponse()
    return response.status, response.read()


def warm(target: Target, pictures: Sequence[bytes]) -> float:
    """Median milliseconds of a photo, one after the other."""
    times = []
    for number in range(WARM):
        start = time.perf_counter()
        target.ask(pictures[number % len(pictures)])
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


CHILD = """
import json, sys
from time import perf_counter
from dsgnn.runtime import Ranker, samples
path, options = json.loads(sys.argv[1])
photos = [path.read_bytes() for path in samples()]
ranker = Ranker(path, **options)
print("loaded", flush=True)
times = []
for number in range(int(sys.argv[2]) + 1):
    start = perf_counter()
    ranker(photos[number % len(photos)])
    times.append(1e3 * (perf_counter() - start))
print(json.dumps(times), flush=True)
"""


def cold_start(path: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """A new process: seconds until the artifact is loaded, milliseconds of the first photo and the
    median of the WARM after it. The files may be in the system's cache."""
    arguments = json.dumps([str(path) if path else None, options])
    command = [sys.executable, "-c", CHILD, arguments, str(WARM)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        loaded, cold_s = process.stdout.readline(), time.perf_counter() - start
        text = process.stdout.read()
    if process.returncode or not loaded:
        raise BackendError(f"a new process could not rank with {path}; what it said is above")
    first, *others = json.loads(text)
    return {"cold_s": cold_s, "first_ms": first, "warm_ms": median(others)}


def keep_logs(logs: Path, chosen: int, tried: int) -> None:
    """Of the tests of the search only the logs of the chosen one stay, as "server"."""
    (logs / f"server-{chosen}").rename(logs / "server")
    for number in set(range(tried)) - {chosen}:
        shutil.rmtree(logs / f"server-{number}")


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """The rows as text, after a heading."""

    def ms(value: float | None) -> str:
        return "–" if value is None else f"{value:,.1f}"

    heading = ["scenario", "in flight", "photos", "photos/s", "p50 ms", "p90 ms", "p99 ms"]
    lines = [[*heading, "p99 ms at most", "LoadGen says", "memory MiB", "J per photo"]]
    for row in results["rows"]:
        memory = ["–" if mib is None else f"{mib:,.0f}" for mib in row["memory_mib"]]
        energy = [f"{name} {value:.2f}" for name, value in row["joules_per_photo"].items()]
        # of a stream of photos that all wait from the beginning, times say nothing
        times = (
            [None] * 3 if row["scenario"] == "offline" else [row[f"p{p}_ms"] for p in (50, 90, 99)]
        )
        lines.append(
            [
                row["scenario"],
                str(row["lanes"]),
                f"{row['queries']:,}",
                f"{row['per_s']:,.1f}",
                *map(ms, times),
                ms(row["p99_early_ms"]),
                "valid" if row["valid"] else "INVALID",
                " → ".join(memory) if memory[0] != "–" else "–",
                ", ".join(energy) or "–",
            ]
        )
    return lines


def summary(results: Mapping[str, Any]) -> str:
    """The highest rate, the start and the memory in sentences."""
    best, plan, start = results["highest_per_s"], results["plan"], results["start"]
    limit = f"a p99 of {plan['p99_ms']:g} ms"
    said = (
        f"No rate that was tried keeps {limit}."
        if best is None
        else (f"{limit[0].upper()}{limit[1:]} is kept at {best:,.1f} photos/s, Poisson arrivals.")
    )
    if start["cold_s"] is not None:
        said += f" A new process has the model loaded after {start['cold_s']:.2f} s; its first "
        said += f"photo takes {start['first_ms']:,.0f} ms, later ones {start['warm_ms']:,.1f} ms."
    if results["memory"]:
        values = [mib for _, mib in results["memory"]]
        said += f" Memory between {min(values):,.0f} and {max(values):,.0f} MiB."
    return said
