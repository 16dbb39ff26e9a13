"""One test of MLPerf's LoadGen: queries as its rules send them, answered by lanes of ours.

https://github.com/mlcommons/inference/tree/master/loadgen. LoadGen decides when a query comes,
takes the times, and judges them; a lane is a thread that answers one query after the other. In the
server scenario a query's time begins when it was due, so waiting for a lane is part of it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from dsgnn.runtime.errors import BackendError

SCENARIOS = {"single-stream": "SingleStream", "offline": "Offline", "server": "Server"}
# 662 are the fewest of which LoadGen estimates the 99th percentile, but then it calls a test valid
# with one late photo at most, so that one hiccup of the machine decides. Of 1,500 six may be late.
QUERIES = 1500
KEPT = ("mlperf_log_summary.txt", "mlperf_log_detail.txt")
TRACE = "mlperf_log_trace.json"


class BusyError(BackendError):
    """A query that was turned away because too many others were there."""


@dataclass(frozen=True)
class Load:
    """A test. scenario: one of SCENARIOS. rate_per_s: of the Poisson arrivals in "server", expected
    in "offline". p99_ms: what 99% of the queries of "server" must keep. The test ends when it has
    lasted duration_s and had so many queries. trace: keep LoadGen's log of every query too."""

    scenario: str
    rate_per_s: float = 1.0
    p99_ms: float = 100.0
    duration_s: float = 60.0
    queries: int = QUERIES
    seed: int = 0
    trace: bool = False


def drive(
    load: Load,
    ask: Callable[[int], Any],
    check: Callable[[int, Any], None],
    samples: int,
    lanes: int,
    logs: Path,
) -> dict[str, Any]:
    """Run a test; returns what LoadGen measured.

    ask: answers a sample, 0 ≤ number < samples; it runs in `lanes` threads and may raise BusyError.
    check: raises for an answer that is wrong; its time is the lane's but not the query's. logs: the
    folder that gets LoadGen's logs. The first error of another kind is raised when the test has
    ended.
    """
    import mlperf_loadgen as loadgen

    waiting: SimpleQueue[Any] = SimpleQueue()
    errors: list[BaseException] = []
    answered, refused, lock = 0, 0, Lock()

    def lane() -> None:
        nonlocal answered, refused
        while (query := waiting.get()) is not None:
            answer, good = None, False
            try:
                if errors:
                    time.sleep(0.01)  # the test cannot be ended, but it need not be a race
                else:
                    answer, good = ask(query.index), True
            except BusyError:
                with lock:
                    refused += 1
            except BaseException as error:
                errors.append(error)
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query.id, 0, 0)])
            try:
                if good:
                    check(query.index, answer)
            except BaseException as error:
                errors.append(error)
            with lock:
                answered += 1

    def issue(queries: list[Any]) -> None:
        for query in queries:
            waiting.put(query)

    threads = [Thread(target=lane, name=f"dsgnn-lane-{n}") for n in range(lanes)]
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        system = loadgen.ConstructSUT(issue, lambda: None)
        stack.callback(loadgen.DestroySUT, system)
        library = loadgen.ConstructQSL(samples, samples, lambda _: None, lambda _: None)
        stack.callback(loadgen.DestroyQSL, library)
        for thread in threads:
            thread.start()
        try:
            settings, log = _settings(loadgen, load), _log(loadgen, load, logs)
            loadgen.StartTestWithLogSettings(system, library, settings, log)
        finally:
            for _ in threads:
                waiting.put(None)
            for thread in threads:
                thread.join()
    for path in logs.iterdir():
        if path.name not in (*KEPT, *([TRACE] if load.trace else [])):
            path.unlink()
    if errors:
        raise errors[0]
    return {"lanes": lanes, "queries": answered, "refused": refused, **read_log(logs)}


def _settings(loadgen: Any, load: Load) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, SCENARIOS[load.scenario])
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1e3 * load.duration_s)
    settings.min_query_count = load.queries
    settings.single_stream_target_latency_percentile = 0.9
    settings.offline_expected_qps = load.rate_per_s
    settings.server_target_qps = load.rate_per_s
    settings.server_target_latency_ns = round(1e6 * load.p99_ms)
    settings.server_target_latency_percentile = 0.99
    settings.qsl_rng_seed = load.seed + 1
    settings.sample_index_rng_seed = load.seed + 2
    settings.schedule_rng_seed = load.seed + 3
    return settings


def _log(loadgen: Any, load: Load, logs: Path) -> Any:
    output = loadgen.LogOutputSettings()
    output.outdir = str(logs)
    output.copy_summary_to_stdout = False
    settings = loadgen.LogSettings()
    settings.log_output = output
    settings.enable_trace = load.trace
    return settings


def read_log(logs: Path) -> dict[str, Any]:
    """What LoadGen's detailed log says: whether its rules were kept, queries per second, and
    milliseconds per query; p90_early_ms and p99_early_ms are its early-stopping estimates, which
    the percentile is below with a confidence of 99%, and None where it makes none."""
    lines = (logs / KEPT[1]).read_text("utf-8").splitlines()
    entries = [json.loads(line.partition(":::MLLOG ")[2]) for line in lines]
    found = {entry["key"]: entry["value"] for entry in entries}
    rates = ("qps_with_loadgen_overhead", "samples_per_second", "completed_samples_per_sec")
    said = " ".join(found["early_stopping_result"].split())
    estimates = re.findall(r"(9[09])\.0th percentile estimate: (\d+)", said)
    early = {percentile: int(ns) / 1e6 for percentile, ns in estimates}
    return {
        "valid": found["result_validity"] == "VALID",
        "per_s": next(found[f"result_{name}"] for name in rates if f"result_{name}" in found),
        "mean_ms": found["result_mean_latency_ns"] / 1e6,
        **{f"p{p}_ms": found[f"result_{p}.00_percentile_latency_ns"] / 1e6 for p in (50, 90, 99)},
        **{f"p{p}_early_ms": early.get(p) for p in ("90", "99")},
        "over_limit": found.get("result_overlatency_query_count"),
        "early_stopping": said,
    }


def highest_rate(
    keeps: Callable[[float], bool], ceiling: float, lowest: float = 0.0, steps: int = 5
) -> float | None:
    """The highest rate per second that was found to be kept, by halving between 0 and a ceiling;
    the next that was tried and not kept is at most ceiling / 2**steps above it. None = none was.

    While none was kept, none below `lowest` is tried but for the first.
    """
    low, high = 0.0, ceiling
    for step in range(steps):
        rate = (low + high) / 2
        if step and not low and rate < lowest:
            break
        low, high = (rate, high) if keeps(rate) else (low, rate)
    return low or None
