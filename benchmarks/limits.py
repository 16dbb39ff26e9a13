"""What a machine could do at most, and how near to that a network comes.

The floor of a network is the larger of two times: that of its matrix products at the machine's peak
rate, and that of its bytes. The peak rate is measured beside the network, in the same run: a large
matrix product, and on a CPU also a large convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from timeit import repeat
from typing import Any

from dsgnn.benchmarks.forms import Spec, read
from dsgnn.runtime.errors import BackendError

BYTES = {"fp32": 4, "w16": 2, "fp16": 2, "bf16": 2}  # of one weight


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

    from dsgnn.export.deploy.network import DeployGraph

    source, size = read(spec)
    graph = DeployGraph(source.model, size).eval()
    graph.requires_grad_(False)  # or the counter asks for gradients
    image = torch.zeros(1, *size, 3, dtype=torch.uint8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        answers = graph(image)
    return {
        "operations": float(counter.get_total_flops()),
        "bytes_io": float(image.nbytes + sum(answer.nbytes for answer in answers)),
        "weights": float(sum(weight.numel() for weight in graph.parameters())),
    }


def gpu_rates(spec: Spec) -> dict[str, Any]:
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


def cpu_rates(spec: Spec) -> dict[str, Any]:
    """Peak rates of `spec.threads` threads in float32, as PyTorch reaches them.

    TFLOP/s of a product of 2048 × 2048 matrices and of a 3 × 3 convolution of 256 channels on
    96 × 96 cells, the best of ten each, and GB/s of a large copy (read and write). "tflops" is the
    faster one.
    """
    import torch

    def best_s(work: Callable[[], Any]) -> float:
        work()
        return min(repeat(work, number=1, repeat=10))

    torch.set_num_threads(spec.threads)
    side, cells, channels, size = 2048, 96, 256, 1 << 28
    with torch.inference_mode():
        a, out = torch.randn(side, side), torch.empty(side, side)
        product = 2 * side**3 / best_s(partial(torch.mm, a, a, out=out))
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
        x = torch.randn(1, channels, cells, cells)
        convolution = 2 * 9 * channels**2 * cells**2 / best_s(partial(conv, x))
        held = torch.zeros(size, dtype=torch.uint8)
        copy = torch.zeros_like(held)
        gb_per_s = 2 * size / best_s(lambda: copy.copy_(held)) / 1e9
    return {
        "tflops": {"fp32": max(product, convolution) / 1e12},
        "product_tflops": product / 1e12,
        "convolution_tflops": convolution / 1e12,
        "gb_per_s": gb_per_s,
    }
