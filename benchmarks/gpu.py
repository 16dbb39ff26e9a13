"""`dsgnn-bench gpu`: fill the GPU table in one command, in under ten minutes.

No GPU was at hand when this was written: what needs one has not been executed. A row that fails
is recorded with its reason and the others go on. So is a row that the time does not suffice for.

Floors: the deploy graph's matrix operations over the measured matrix rate, and the least bytes
(weights once, photos in, answers out) over the measured bandwidth; the larger of the two. Float32
is without TF32 in every row but those of ONNX Runtime's TensorRT provider, which has no option for
it (`NVIDIA_TF32_OVERRIDE=0` in the environment has).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from dsgnn.benchmarks.environment import conditions, environment, stolen
from dsgnn.benchmarks.forms import (
    ARTIFACT,
    PRECISIONS,
    TORCH_FORMS,
    Spec,
    read,
)
from dsgnn.benchmarks.latency import measure, noise
from dsgnn.benchmarks.processes import BenchProcess, apart
from dsgnn.benchmarks.results import TurnLog, save
from dsgnn.benchmarks.timing import Clock, Plan
from dsgnn.runtime.artifact import open_artifact
from dsgnn.runtime.backends import CUDA_GRAPH
from dsgnn.runtime.errors import BackendError, DsgnnError, OptionError

FILE = "gpu.json"
# What makes a row be recorded as failed; on a GPU libraries raise RuntimeError for much.
FAILURES = (DsgnnError, RuntimeError)
BATCHES = (1, 2, 4, 8, 16, 32)
LIMIT_S = 540.0
PLAN = Plan(duration_s=0.6, runs=10, rounds=5, warm_up_s=0.1, warm_up_runs=2)
ENGINES = {  # by backend
    "onnxruntime": "ONNX Runtime CUDA",
    "onnxruntime-tensorrt": "ONNX Runtime TensorRT provider",
    "tensorrt": "TensorRT",
    f"tensorrt{CUDA_GRAPH}": "TensorRT, CUDA graph",
    "tensorrt-rtx": "TensorRT-RTX",
    f"tensorrt-rtx{CUDA_GRAPH}": "TensorRT-RTX, CUDA graph",
}
ROWS = {name: PRECISIONS for name in (*TORCH_FORMS.values(), *ENGINES.values())}
BYTES = {"fp32": 4, "w16": 2, "fp16": 2, "bf16": 2}  # of a weight


def engine(subject: Mapping[str, Any]) -> str:
    """The table's name of a subject."""
    if subject["form"] in TORCH_FORMS:
        return TORCH_FORMS[subject["form"]]
    return ENGINES.get(subject["backend"], subject["backend"])


def gpu_specs(source: Spec, artifacts: Sequence[Path]) -> list[Spec]:
    """PyTorch in all its forms, then every artifact on each engine that takes such a file; forms
    that take long to start come last. Raises OptionError for a precision without a floor."""
    quick = [form for form in TORCH_FORMS if form != "compiled"]
    found = [
        replace(source, form=form, precision=precision)
        for form in quick
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
    return found + [replace(source, form="compiled", precision=p) for p in PRECISIONS]


def floor(work: Mapping[str, float], rates: Mapping[str, Any], precision: str, batch: int) -> dict:
    """Milliseconds nobody gets below. work: operations and bytes_io of one photo, weights (their
    number). rates: tflops by precision, gb_per_s."""
    computed = "fp32" if precision == "w16" else precision
    operations = work["operations"] * batch
    size = work["weights"] * BYTES[precision] + work["bytes_io"] * batch
    by_operations = 1e3 * operations / (rates["tflops"][computed] * 1e12)
    by_bytes = 1e3 * size / (rates["gb_per_s"] * 1e9)
    return {
        "ms": max(by_operations, by_bytes),
        "operations_ms": by_operations,
        "bytes_ms": by_bytes,
        "operations": operations,
        "bytes": size,
    }


def count_work(spec: Spec) -> dict[str, float]:
    """Matrix operations (two per multiply-add), bytes in and out, and weights of one photo."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dsgnn.export.deploy import DeployGraph
    from dsgnn.export.onnx import default_size

    model = read(spec).model
    size = spec.size or default_size(model.config)
    graph = DeployGraph(model, size).eval()
    image = torch.zeros(1, *size, 3, dtype=torch.uint8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        answers = graph(image)
    return {
        "operations": float(counter.get_total_flops()),
        "bytes_io": float(image.nbytes + sum(answer.nbytes for answer in answers)),
        "weights": float(sum(weight.numel() for weight in graph.parameters())),
    }


def measure_rates(spec: Spec) -> dict[str, Any]:
    """TFLOP/s of a large matrix product by precision, and GB/s of a large copy (read and write)."""
    import torch

    if not torch.cuda.is_available():
        raise BackendError(
            f"PyTorch {torch.__version__} sees no GPU, and this table is about one: install an "
            "NVIDIA driver and a CUDA build of PyTorch"
        )
    device, side, size = torch.device(spec.device), 8192, 1 << 30

    def best_s(work: Callable[[], Any]) -> float:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        work()
        for mark in marks[:-1]:
            mark.record()
            work()
        marks[-1].record()
        torch.cuda.synchronize(device)
        return min(marks[i].elapsed_time(marks[i + 1]) for i in range(10)) / 1e3

    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    tflops = {}
    with torch.cuda.device(device), torch.inference_mode():
        for precision, dtype in kinds.items():
            a = torch.randn(side, side, device=device).to(dtype)
            out = torch.empty_like(a)
            tflops[precision] = 2 * side**3 / best_s(partial(torch.mm, a, a, out=out))
        held = torch.empty(size, dtype=torch.uint8, device=device)
        copy = torch.empty_like(held)
        gb_per_s = 2 * size / best_s(lambda: copy.copy_(held)) / 1e9
    return {"tflops": {k: v / 1e12 for k, v in tflops.items()}, "gb_per_s": gb_per_s}


def fill(
    source: Spec,
    artifacts: Sequence[Path],
    out: Path,
    batches: Sequence[int] = BATCHES,
    *,
    limit_s: float = LIMIT_S,
    progress: bool = False,
    open_bench: Callable[[Spec], Any] = BenchProcess,
    call: Callable[..., Any] = apart,
    clock: Clock = perf_counter,
) -> dict[str, Any]:
    """Measure what can be measured within the limit and write out/gpu.json.

    call: `processes.apart`. Raises BackendError when there is no GPU, OptionError when
    `out` holds a table or an artifact is of a precision without a floor.
    """
    target, start = out / FILE, clock()
    if target.exists():
        raise OptionError(f"{target} exists: give another folder, or delete it to measure again")
    specs = gpu_specs(source, artifacts)
    rates = call(measure_rates, source)
    work = call(count_work, source)
    out.mkdir(parents=True, exist_ok=True)
    missing: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    before = conditions()

    def miss(who: Mapping[str, Any], sizes: Sequence[int], why: str) -> None:
        missing.extend(
            {"name": engine(who), "precision": who["precision"], "batch": b, "why": why[:500]}
            for b in sizes
        )

    late = f"not reached within {limit_s:.0f} s"
    with ExitStack() as stack:
        benches: dict[str, Any] = {}
        for spec in specs:
            if clock() - start > limit_s / 2:
                miss(asdict(spec), batches, late)
                continue
            try:
                bench = stack.enter_context(open_bench(spec))
                benches[bench.facts["name"] + bench.facts["backend"]] = bench
            except FAILURES as error:
                miss(asdict(spec), batches, str(error))
        for batch in sorted(batches):
            larger = [b for b in batches if b >= batch]
            for name, bench in list(benches.items()):
                why = late
                if clock() - start <= limit_s:
                    try:
                        bench.run(batch)  # compiles, captures, and shows whether it fits
                        continue
                    except FAILURES as error:
                        why = str(error)
                miss(bench.facts, larger, why)
                del benches[name]
            if not benches:
                continue
            log = TurnLog(out / f"gpu-{batch}.jsonl", {}, set(benches), resume=False)
            try:
                rows += measure(benches, [batch], PLAN, clock, log, progress)
            except FAILURES as error:
                for bench in benches.values():
                    miss(bench.facts, [batch], str(error))
            finally:
                log.close(finished=True)
    for row in rows:
        row["floor"] = floor(work, rates, row["subject"]["precision"], row["batch"])
    after = conditions()
    return save(
        target,
        "gpu",
        environment(),
        seed=source.seed,
        plan=asdict(PLAN),
        conditions={"before": before, "after": after, "stolen": stolen(before, after)},
        noise=noise(rows),
        rows=rows,
        missing=missing,
        rates=rates,
    )
