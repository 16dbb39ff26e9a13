"""`dsgnn-bench gpu`: fill the GPU table in one command, in under ten minutes.

Each subject's answers are compared with those of the deploy graph in float32 on the CPU, on the
photos of the parity gate, before it is timed. A row that fails is recorded with its reason and the
others go on. So is a row that the time does not suffice for. Subjects are opened and compared side
by side, and timed one at a time; those of `torch.compile` come after all others, and do not count
where the run is asked whether it agrees with itself.

Floors: the deploy graph's matrix operations over the measured matrix rate, and the least bytes
(weights once, photos in, answers out) over the measured bandwidth; the larger of the two. Float32
is without TF32 in every row but those of ONNX Runtime's TensorRT provider, which has no option for
it (`NVIDIA_TF32_OVERRIDE=0` in the environment has).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from os import cpu_count
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any

import numpy as np

from dsgnn.benchmarks.environment import conditions, conditions_since, environment
from dsgnn.benchmarks.forms import ARTIFACT, PRECISIONS, TORCH_FORMS, Answers, Spec, read
from dsgnn.benchmarks.latency import measure, noise
from dsgnn.benchmarks.limits import BYTES, count_work, floor, gpu_rates
from dsgnn.benchmarks.processes import BenchProcess, LateError, apart
from dsgnn.benchmarks.results import TurnLog, free, save
from dsgnn.benchmarks.timing import Clock, Plan
from dsgnn.runtime.artifact import Description, open_artifact
from dsgnn.runtime.backends import CUDA_GRAPH
from dsgnn.runtime.disk.files import claimed
from dsgnn.runtime.errors import DsgnnError, OptionError

FILE = "gpu.json"
# What makes a row be recorded as failed; on a GPU libraries raise RuntimeError for much.
FAILURES = (DsgnnError, RuntimeError)
BATCHES = (1, 2, 4, 8, 16, 32)
LIMIT_S = 540.0
SIDE_BY_SIDE = 16  # processes that are opened at once
# Clocks of an idle GPU are low, so that it is warmed up for longer than a run takes.
PLAN = Plan(duration_s=0.8, runs=8, rounds=8, warm_up_s=0.3, warm_up_runs=2)
ENGINES = {  # by backend
    "onnxruntime": "ONNX Runtime CUDA",
    "onnxruntime-tensorrt": "ONNX Runtime TensorRT provider",
    "tensorrt": "TensorRT",
    f"tensorrt{CUDA_GRAPH}": "TensorRT, CUDA graph",
    "tensorrt-rtx": "TensorRT-RTX",
    f"tensorrt-rtx{CUDA_GRAPH}": "TensorRT-RTX, CUDA graph",
}
ROWS = {name: PRECISIONS for name in (*TORCH_FORMS.values(), *ENGINES.values())}


def engine(subject: Mapping[str, Any]) -> str:
    """The table's name of a subject."""
    if subject["form"] in TORCH_FORMS:
        return TORCH_FORMS[subject["form"]]
    return ENGINES.get(subject["backend"], subject["backend"])


def gpu_specs(source: Spec, artifacts: Sequence[Path]) -> list[Spec]:
    """PyTorch in all its forms, and every artifact on each engine that takes such a file.

    Raises OptionError for a precision without a floor.
    """
    found = [
        replace(source, form=form, precision=precision)
        for form in TORCH_FORMS
        for precision in PRECISIONS
    ]
    for path in artifacts:
        artifact = open_artifact(path)
        precision, flavour = artifact.description.precision, "onnxruntime"
        if precision not in BYTES:
            raise OptionError(f"{path.name} is {precision}, expected one of {', '.join(BYTES)}")
        if path.suffix != ".onnx" and artifact.sidecar is not None:
            flavour = artifact.sidecar.build["flavour"]
        found += [
            replace(
                source,
                form=ARTIFACT,
                model=str(path),
                synthetic=False,
                backend=backend,
                precision=precision,
            )
            for backend in ENGINES
            if backend.removesuffix(CUDA_GRAPH).removesuffix("-tensorrt") == flavour
        ]
    return found


def description(spec: Spec) -> Description:
    """What the subjects of this checkpoint have in common."""
    from dsgnn.export.onnx import describe

    return describe(*read(spec))


class Remembered:
    """Answers of the reference, which are computed once for all who are compared with it."""

    def __init__(self, infer: Callable[[np.ndarray], Answers]):
        self._infer = infer
        self._answers: dict[tuple[tuple[int, ...], bytes], Answers] = {}
        self._lock = Lock()

    def __call__(self, images: np.ndarray) -> Answers:
        key = images.shape, images.tobytes()
        with self._lock:
            if key not in self._answers:
                self._answers[key] = self._infer(images)
            return self._answers[key]


def check_answers(
    bench: Any,
    reference: Callable[[np.ndarray], Answers],
    about: Description,
    photos: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """The parity gate's comparison for one bench; if it fails to answer, the reason, and nothing
    if it is too late for one."""
    from dsgnn.export.parity.comparison import compare

    precision = bench.facts["precision"]
    who = {"name": bench.facts["name"], "precision": precision}
    try:
        results = compare(reference, bench.answers, photos, replace(about, precision=precision))
    except LateError:
        return []
    except FAILURES as error:
        return [{**who, "passed": False, "failures": [str(error)[:500]]}]
    return [{**who, **result.to_dict()} for result in results]


def fill(
    source: Spec,
    artifacts: Sequence[Path],
    out: Path,
    batches: Sequence[int] = BATCHES,
    photos: Sequence[np.ndarray] = (),
    *,
    limit_s: float = LIMIT_S,
    progress: bool = False,
    open_bench: Callable[..., Any] = BenchProcess,
    call: Callable[..., Any] = apart,
    clock: Clock = perf_counter,
) -> dict[str, Any]:
    """Measure what can be measured within the limit and write out/gpu.json.

    photos: (h, w, 3) uint8 RGB each, to compare answers on; without any, nothing is compared.
    call: `processes.apart`. Raises BackendError when there is no GPU, OptionError when
    `out` holds a table or an artifact is of a precision without a floor, and FolderBusyError while
    another run is writing into it.
    """
    target, start = free(out / FILE), clock()
    specs = gpu_specs(source, artifacts)
    with ThreadPoolExecutor() as pool:
        facts = [pool.submit(call, fact, source) for fact in (gpu_rates, count_work)]
        described = pool.submit(call, description, source) if photos else None
    rates, work = (fact.result() for fact in facts)
    about = described.result() if described else None
    out.mkdir(parents=True, exist_ok=True)
    missing: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    parity: list[dict[str, Any]] = []
    before = conditions()

    def miss(who: Mapping[str, Any], sizes: Sequence[int], why: str) -> None:
        missing.extend(
            {"name": engine(who), "precision": who["precision"], "batch": b, "why": why[:500]}
            for b in sizes
        )

    def opened(spec: Spec) -> Any:
        """The bench of a subject, or why there is none."""
        if clock() - start > limit_s:
            return late
        try:
            return open_bench(spec, until=start + limit_s)
        except FAILURES as error:
            return str(error)

    def started(bench: Any, batch: int) -> str:
        """Run it once: that compiles, captures, and shows whether it fits. → why it does not."""
        if clock() - start > limit_s:
            return late
        bench.until = start + limit_s
        try:
            bench.run(batch)
        except FAILURES as error:
            return str(error)
        return ""

    def run(specs: Sequence[Spec], pool: Executor, stack: ExitStack) -> None:
        """Open, compare and time these subjects."""
        nonlocal rows, parity
        benches: dict[str, Any] = {}
        for spec, bench in zip(specs, pool.map(opened, specs), strict=True):
            if isinstance(bench, str):
                miss(asdict(spec), batches, bench)
                continue
            stack.enter_context(bench)
            benches[bench.facts["name"] + bench.facts["backend"]] = bench
        if about is not None:
            check = partial(check_answers, reference=reference, about=about, photos=photos)
            parity += [one for found in pool.map(check, benches.values()) for one in found]
        for batch in sorted(batches):
            larger = [b for b in batches if b >= batch]
            whys = list(pool.map(started, benches.values(), [batch] * len(benches)))
            for name, why in zip(list(benches), whys, strict=True):
                if why:
                    miss(benches[name].facts, larger, why)
                    del benches[name]
            if not benches:
                continue
            for bench in benches.values():
                bench.until = None  # a batch that has begun is finished
            log = TurnLog(out / f"gpu-{batch}.jsonl", {}, set(benches), resume=False)
            try:
                rows += measure(benches, [batch], PLAN, clock, log, progress)
            except FAILURES as error:
                for bench in benches.values():
                    miss(bench.facts, [batch], str(error))
            finally:
                log.close(finished=True)

    late = f"not reached within {limit_s:.0f} s"
    cpu = replace(source, form="deploy", device="cpu", precision="fp32", threads=cpu_count() or 1)
    with claimed(out), ThreadPoolExecutor(SIDE_BY_SIDE) as pool, ExitStack() as outer:
        if photos:
            reference = Remembered(outer.enter_context(open_bench(cpu)).answers)
        # Compilers keep all cores busy, so that they start when nothing else is to be timed.
        for compiled in (False, True):
            group = [spec for spec in specs if (spec.form == "compiled") == compiled]
            with ExitStack() as stack:
                try:
                    run(group, pool, stack)
                except BaseException:  # Ctrl-C, say, which the processes do not hear of
                    for process in BenchProcess.alive:
                        process.kill()
                    raise
    for row in rows:
        row["floor"] = floor(work, rates, row["subject"]["precision"], row["batch"])
    return save(
        target,
        "gpu",
        environment(),
        seed=source.seed,
        plan=asdict(PLAN),
        conditions=conditions_since(before),
        noise=noise([row for row in rows if row["subject"]["form"] != "compiled"]),
        rows=rows,
        missing=missing,
        rates=rates,
        parity=parity,
    )
