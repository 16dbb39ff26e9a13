"""What the hardware allows: work counted, peak rates, and the floor under a time."""

import pytest

from dsgnn.benchmarks import limits
from dsgnn.benchmarks.forms import Spec
from dsgnn.config import CONFIGS


def test_the_peak_rate_is_a_large_product_or_convolution() -> None:
    rates = limits.cpu_rates(Spec("upstream", "nano", True, threads=1))
    assert rates["tflops"]["fp32"] == max(rates["product_tflops"], rates["convolution_tflops"])
    assert 1e-4 < min(rates["product_tflops"], rates["convolution_tflops"]) < 100
    assert 0.01 < rates["gb_per_s"] < 10_000


def test_work_is_counted_on_the_deploy_graph() -> None:
    work = limits.count_work(Spec("deploy", "nano", True, size=(64, 64)))
    double = limits.count_work(Spec("deploy", "nano", True, size=(64, 128)))
    Q = CONFIGS["nano"].queries
    assert work["bytes_io"] == 64 * 64 * 3 + 4 * (Q + Q + Q * 16 * 16 + 8 * 8)
    assert 1.8 < double["operations"] / work["operations"] < 2.2
    assert 1e6 < work["weights"] < 2e7


def test_floors_are_the_larger_of_two() -> None:
    rates = {"tflops": {"fp16": 100.0}, "gb_per_s": 1000.0}
    work = {"operations": 2e11, "bytes_io": 1e6, "weights": 5e9}
    few, many = (limits.floor(work, rates, "fp16", batch) for batch in (1, 8))
    assert few["ms"] == few["bytes_ms"] == pytest.approx(10.001)
    assert many["ms"] == many["operations_ms"] == pytest.approx(16)


def test_weights_in_sixteen_bits_are_computed_in_float32() -> None:
    rates = {"tflops": {"fp32": 50.0}, "gb_per_s": 1000.0}
    work = {"operations": 1e11, "bytes_io": 0.0, "weights": 4e7}
    full, half = (limits.floor(work, rates, precision, 1) for precision in ("fp32", "w16"))
    assert half["operations_ms"] == full["operations_ms"] == pytest.approx(2)
    assert half["bytes_ms"] == full["bytes_ms"] / 2 == pytest.approx(0.08)
