"""Milliseconds per photo in Chromium beside Python's, in one run, for docs/browser.md; and what it
makes for the answers that a browser decodes photos by itself.

    python -m tests.export.browser_speed [ROUNDS]

The two take turns, photo by photo, on the same two cores, with two threads each. Of every photo and
stage the least of all rounds counts: what else runs on a machine only ever adds. It needs Chromium
and playwright, as tests/export/test_web.py does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np

from dsgnn.export.web.npm import fetch_runtime
from dsgnn.export.web.site import build_site
from dsgnn.runtime import Ranker, Ranking, rle, samples
from dsgnn.runtime.images import read_image
from dsgnn.runtime.ranker import BUNDLED

from .browser import array, chromium, opened, placed, text

if TYPE_CHECKING:
    from playwright.sync_api import Page

STAGES = ("decode", "preprocess", "inference", "postprocess")
LOAD = """async (threads) => {
  window.dsgnn = await import("./dsgnn.js");
  const start = performance.now();
  window.ranker = await dsgnn.Ranker.load("model.onnx", {engine: "wasm", threads});
  return [ranker.threads, performance.now() - start];
}"""
RANK = """async (file) => {
  const photo = new Blob([Uint8Array.from(atob(file), (one) => one.charCodeAt(0))]);
  const {data} = await dsgnn.readPhoto(photo), ranking = await ranker.rank(photo);
  return {...ranking.toJSON(), timings: ranking.timings, rgb: data.toBase64()};
}"""

Best = dict[str, dict[str, float]]  # the least milliseconds by photo and stage


def main(rounds: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # Chromium inherits it
    ranker = Ranker(backend="onnxruntime", threads=2)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        site = Path(folder) / "site"
        build_site(BUNDLED, site, fetch_runtime())
        with placed(site, isolated=True) as place:
            page_address = f"{place.address}worker.js"
            with opened(browser, page_address) as one, opened(browser, page_address) as two:
                pages = {f"Chromium, {n} thread(s)": page for n, page in ((1, one), (2, two))}
                for number, page in enumerate(pages.values(), start=1):
                    threads, ms = page.evaluate(LOAD, number)
                    print(f"loaded with {threads} thread(s) in {ms / 1e3:.1f} s")
                measure(ranker, pages, rounds)


def measure(ranker: Ranker, pages: Mapping[str, Page], rounds: int) -> None:
    best: dict[str, Best] = {name: {} for name in ("Python, 2 threads", *pages)}
    apart: list[str] = []
    for _ in range(rounds):
        for sample in samples():
            ranking = ranker(sample)
            keep(best["Python, 2 threads"], sample.name, ranking.timings_ms)
            for name, page in pages.items():
                found = page.evaluate(RANK, text(np.frombuffer(sample.read_bytes(), np.uint8)))
                keep(best[name], sample.name, found["timings"])
            if len(apart) < len(samples()):
                apart.append(difference(sample, found, ranking))
    for name, photos in best.items():
        means = [mean(stages[stage] for stages in photos.values()) for stage in STAGES]
        shown = ", ".join(f"{stage} {ms:.0f}" for stage, ms in zip(STAGES, means, strict=True))
        print(f"{name}: {sum(means):.0f} ms ({shown})")
    print(*apart, sep="\n")


def keep(best: Best, photo: str, timings: Mapping[str, float]) -> None:
    known = best.setdefault(photo, {})
    for stage in STAGES:
        known[stage] = min(timings[stage], known.get(stage, float("inf")))


def difference(sample: Path, found: Mapping, ranking: Ranking) -> str:
    """A line: by how much the browser's own decoder changes pixels and answers."""
    expected = read_image(sample)
    levels = np.abs(array(found["rgb"]).reshape(expected.shape).astype(int) - expected)
    same = [item["query"] for item in found["objects"]] == [item.query for item in ranking]
    line = f"{sample.name}: levels differ by {levels.mean():.3f} on average, {levels.max()} at most"
    if not same:
        return f"{line}; other objects or another order"
    pairs = list(zip(found["objects"], ranking, strict=True))
    saliency = max(abs(got["saliency"] - item.saliency) for got, item in pairs)
    wrong = sum(int((rle.decode(got["segmentation"]) != item.mask).sum()) for got, item in pairs)
    total = sum(item.mask.size for item in ranking)
    return f"{line}; same ranks, saliency within {saliency:.1e}, {wrong} of {total} mask pixels"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
