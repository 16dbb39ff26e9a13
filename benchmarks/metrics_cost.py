"""What measuring one image costs: `python -m dsgnn.benchmarks.metrics_cost`.

Times `dsgnn.metrics.image_metrics` and the naive version of the tests, alternately in one process,
on the same made-up 640x480 images with five objects and five predictions each, after checking that
both give the same values. Processor time, so that other work on the machine counts little. Needs a
checkout (the naive version is not installed).
"""

from __future__ import annotations

import runpy
import time
from pathlib import Path

import cv2
import numpy as np

from dsgnn.metrics import image_metrics

NAIVE = Path(__file__).resolve().parents[1] / "tests" / "core" / "naive_metrics.py"
HEIGHT, WIDTH, OBJECTS = 480, 640, 5
IMAGES, ROUNDS = 20, 5


def made_up_sample(
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ragged blobs, and the same blobs moved a little as predictions: a sample for `evaluate`."""
    truth = np.zeros((OBJECTS, HEIGHT, WIDTH), np.uint8)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for mask in truth:
        centre = rng.uniform((0.2 * WIDTH, 0.2 * HEIGHT), (0.8 * WIDTH, 0.8 * HEIGHT))
        radius = rng.uniform(0.05, 0.2, angles.shape) * WIDTH
        outline = centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        cv2.fillPoly(mask, [outline.astype(np.int32)], 1)
    moved = np.stack([np.roll(mask, rng.integers(-20, 21, 2), (0, 1)) for mask in truth])
    ranks, scores = rng.permutation(OBJECTS) + 1, rng.normal(size=OBJECTS)
    return truth.astype(bool), ranks, moved.astype(bool), scores


def main() -> None:
    if not NAIVE.is_file():
        raise SystemExit(f"the naive version is not at {NAIVE}: run this from a checkout")
    naive_metrics = runpy.run_path(str(NAIVE))["naive_metrics"]
    rng = np.random.default_rng(0)
    samples = [made_up_sample(rng) for _ in range(IMAGES)]
    for sample in samples:
        ours, naive = image_metrics(*sample), naive_metrics(*sample)
        for name, value in naive.items():
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-9, err_msg=name)

    taken_ms: dict[str, list[float]] = {"image_metrics": [], "naive": []}
    for sample in [sample for sample in samples for _ in range(ROUNDS)]:
        for name, function in (("image_metrics", image_metrics), ("naive", naive_metrics)):
            start = time.thread_time()
            function(*sample)
            taken_ms[name].append((time.thread_time() - start) * 1e3)
    medians = {name: float(np.median(values)) for name, values in taken_ms.items()}
    for name, values in taken_ms.items():
        low, high = np.percentile(values, [10, 90])
        print(f"{name:<14} {medians[name]:7.2f} ms per image (10th-90th: {low:.2f}-{high:.2f})")
    print(f"ratio          {medians['naive'] / medians['image_metrics']:7.1f}")


if __name__ == "__main__":
    main()
