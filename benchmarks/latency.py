"""`dsgnn-bench latency`: open every subject, time them interleaved, write one latency.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from dsgnn.benchmarks import timing
from dsgnn.benchmarks.environment import conditions, conditions_since, environment
from dsgnn.benchmarks.forms import ARTIFACT, STRAIGHTFORWARD, Spec, export_straightforward, facts_of
from dsgnn.benchmarks.limits import count_work, cpu_rates, floor
from dsgnn.benchmarks.processes import BenchProcess, apart
from dsgnn.benchmarks.results import SUBJECT, TurnLog, columns, free, save
from dsgnn.benchmarks.timing import END_TO_END, Clock, Plan, Sample
from dsgnn.runtime.disk.files import claimed
from dsgnn.runtime.errors import OptionError

FILE = "latency.json"


class Timed(Protocol):
    """What `measure` needs of a subject; `BenchProcess` and `Bench` have it."""

    facts: dict[str, Any]

    def run(self, batch: int) -> Sample: ...
    def start_peaks(self) -> bool: ...
    def peaks(self) -> dict[str, float | None]: ...


def latency(
    specs: Sequence[Spec],
    batches: Sequence[int],
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    open_bench: Callable[[Spec], Any] = BenchProcess,
    clock: Clock = perf_counter,
) -> dict[str, Any]:
    """Measure and write out/latency.json; returns what it says.

    open_bench: gives a context manager with the methods of `BenchProcess`. Raises OptionError when
    something cannot be measured as asked, or `out` holds other results, and FolderBusyError while
    another run is writing into it.
    """
    target = free(out / FILE)
    out.mkdir(parents=True, exist_ok=True)
    with claimed(out), ExitStack() as stack:
        benches: dict[str, Timed] = {}
        networks: dict[str, Spec] = {}
        exports: list[Path] = []
        for spec in specs:
            if spec.form == STRAIGHTFORWARD:
                spec = _exported(spec, out, resume)
                exports.append(Path(spec.export))
            bench = stack.enter_context(open_bench(spec))
            name = bench.facts["name"]
            if name in benches:
                raise OptionError(f"two models are called {name!r}: rename one, or leave it out")
            benches[name] = bench
            if spec.form != ARTIFACT:
                networks.setdefault(bench.facts["source_sha256"], spec)
        before = conditions()
        log = TurnLog(out / "latency.jsonl", _header(benches, batches, plan), set(benches), resume)
        try:
            rows = measure(benches, batches, plan, clock, log, progress)
        except BaseException:
            log.close(finished=False)
            raise
        around = conditions_since(before)
        add_floors(rows, benches, networks)
        results = save(
            target,
            "latency",
            environment(),
            seed=plan.seed,
            plan=asdict(plan),
            conditions=around,
            noise=noise(rows),
            rows=rows,
        )
        log.close(finished=True)
    for path in exports:
        path.unlink()
        facts_of(path).unlink()
    return results


def measure(
    benches: Mapping[str, Timed],
    batches: Sequence[int],
    plan: Plan,
    clock: Clock,
    log: TurnLog,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Rows of the results, for every batch size and subject; what the log holds is not repeated."""
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    total = len(batches) * len(benches) * plan.rounds
    with tqdm(total=total, unit="turn", disable=None if progress else True) as bar:
        for batch in batches:
            if batch not in log.closing:
                runners = {name: partial(bench.run, batch) for name, bench in benches.items()}
                since_load = {name: not bench.start_peaks() for name, bench in benches.items()}
                first = {name: timing.warm_up(run, plan, clock) for name, run in runners.items()}
                done = {turn.round for turn in log.turns.get(batch, [])}
                bar.update(len(done) * len(benches))
                for turn in timing.interleave(runners, plan, clock, done):
                    log.add(batch, turn)
                    bar.set_postfix_str(f"batch {batch}, {turn.name}")
                    bar.update()
                closing = {
                    name: {
                        "first_ms": first[name],
                        "memory": {**bench.peaks(), "since_load": since_load[name]},
                    }
                    for name, bench in benches.items()
                }
                log.close_batch(batch, closing)
            else:
                bar.update(plan.rounds * len(benches))
            for name, bench in benches.items():
                turns = [turn for turn in log.turns[batch] if turn.name == name]
                rows.append(_row(bench.facts, batch, columns(turns), log.closing[batch][name]))
    return rows


def add_floors(
    rows: Sequence[dict[str, Any]], benches: Mapping[str, Timed], networks: Mapping[str, Spec]
) -> None:
    """Put a floor beside every row that computes in float32 on the CPU and whose network is known.

    networks: by `source_sha256`, a checkpoint among those that were timed. The machine's rates are
    measured here, in a process of their own, right after the networks.
    """
    rates: Any = None
    counted: dict[tuple[str, tuple[int, int]], Any] = {}
    for row in rows:
        subject, facts = row["subject"], benches[row["subject"]["name"]].facts
        spec = networks.get(subject["source_sha256"])
        rounded = subject["precision"] not in ("fp32", "w16") or subject["backend"].endswith("bf16")
        if spec is None or rounded or subject["device"] != "cpu" or "shape" not in facts:
            continue
        rates = rates or apart(cpu_rates, spec)
        key = subject["source_sha256"], facts["shape"]
        if key not in counted:
            counted[key] = apart(count_work, replace(spec, size=facts["shape"]))
        row["floor"] = {**floor(counted[key], rates, subject["precision"], row["batch"]), **rates}


def noise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per batch size (as text): does the run agree with itself? See `timing.split_half`."""
    verdicts = {}
    for batch in sorted({row["batch"] for row in rows}):
        same = [row for row in rows if row["batch"] == batch]
        by_name = {row["subject"]["name"]: timing.medians(row["samples"]) for row in same}
        verdicts[str(batch)] = timing.split_half(by_name, baseline(same))
    return verdicts


def baseline(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the others are compared with: PyTorch as upstream, or the first row."""
    names = [row["subject"]["name"] for row in rows]
    upstream = [row["subject"]["name"] for row in rows if row["subject"]["form"] == "upstream"]
    return (upstream or names)[0]


def _row(
    facts: Mapping[str, Any],
    batch: int,
    samples: dict[str, list[float]],
    closing: Mapping[str, Any],
) -> dict[str, Any]:
    stages = {
        stage: timing.summarise(samples[stage])
        for stage in (*timing.STAGES, END_TO_END)
        if stage in samples
    }
    change = timing.drift(timing.medians(samples))
    return {
        "subject": {name: facts[name] for name in (*SUBJECT, "threads")},
        "batch": batch,
        "load_s": facts["load_s"],
        "first_ms": closing["first_ms"],
        "memory": {"load_mib": facts["load_peak_mib"], **closing["memory"]},
        "stages": stages,
        "images_per_s": 1e3 * batch / stages[END_TO_END]["mean"],
        "drift": change,
        "stationary": abs(change) <= timing.DRIFT,
        "floor": None,
        "samples": samples,
    }


def _header(benches: Mapping[str, Timed], batches: Sequence[int], plan: Plan) -> dict[str, Any]:
    kept = ("sha256", "backend", "device", "precision", "threads", "input")
    return {
        "batches": list(batches),
        "plan": asdict(plan),
        "models": {name: {k: b.facts[k] for k in kept} for name, b in benches.items()},
    }


def _exported(spec: Spec, out: Path, resume: bool) -> Spec:
    """Export in a process of its own; a resumed run takes the file it began with."""
    path = out / f"straightforward-{Path(spec.model).stem}.onnx"
    spec = replace(spec, export=str(path))
    if not (resume and path.exists()):
        apart(export_straightforward, spec)
    return spec
