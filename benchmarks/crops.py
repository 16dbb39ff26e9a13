"""`dsgnn-bench crops`: how much of what people look at stays in a crop, and what finding it costs.

Every window of one aspect has the same size on a photo, the largest that it has room for; whoever
crops only says where it lies. The measure is the share of people's fixations inside it, as a mean
over photos, with a 95% interval from drawing photos again. It stands between two bounds: the middle
of the photo, and the window that keeps most of these very fixations, which nobody can know before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from dsgnn.benchmarks.environment import environment
from dsgnn.benchmarks.results import free, save
from dsgnn.data.gaze import GazePhoto
from dsgnn.data.people import open_people
from dsgnn.data.sample import without_objects
from dsgnn.evaluation.rankers import open_model
from dsgnn.runtime.errors import DataError
from dsgnn.runtime.framing import Aspect, Box
from dsgnn.runtime.ranker import BUNDLED
from dsgnn.runtime.ranking import Ranking

FILE = "crops.json"
MIDDLE, BEST = "middle of the photo", "best possible"
OURS, RANKS = "dsgnn", "dsgnn by ranks alone"
FREE, WHOLE = "dsgnn, keep=(): looks alone", "dsgnn, keep=1: first object whole"
SMARTCROP, LIBVIPS = "smartcrop.py", "libvips attention"
ALL = "all"
RESAMPLES = 2000

# From a photo (h, w, 3) uint8 RGB and the (height, width) of a window to where it lies.
Cropper = Callable[[np.ndarray, int, int], Box]


def crops(
    model: Path | None,
    data: str,
    split: str,
    out: Path,
    aspects: Sequence[Aspect],
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure one split of a folder of fixations and write OUT/crops.json; returns the results.

    model: an artifact or a checkpoint; None = the bundled artifact. Photos without a fixation
    inside are left out. Raises OptionError when the file is there already or the folder has no
    fixations, DataError for a split without photos, and what `open_people` and `open_model` raise.
    """
    target = free(out / FILE)
    photos = [photo for photo in open_people(data, split) if isinstance(photo, GazePhoto)]
    photos = [photo for photo in photos if len(photo.points_inside)]
    if not photos:
        raise DataError(f"{data} has no photo with fixations in its split {split}")
    rank, facts = open_model(
        model or BUNDLED, if_none="none", specks="drop", device=device, threads=threads
    )
    others, missing = _others()
    kept: dict[str, dict[Aspect, list[float]]] = {}
    ms: dict[str, list[float]] = {}
    ranked_ms = []
    from tqdm import tqdm

    for photo in tqdm(photos, unit="image", disable=None if progress else True):
        image, points = photo.read(), photo.points_inside
        start = perf_counter()
        ranking = rank(without_objects(image, photo.path.stem))
        ranked_ms.append(1e3 * (perf_counter() - start))
        for aspect in aspects:
            for who, crop in (_ours(ranking, aspect) | others).items():
                start = perf_counter()
                box = crop(image, *aspect.window(*image.shape[:2]))
                ms.setdefault(who, []).append(1e3 * (perf_counter() - start))
                kept.setdefault(who, {}).setdefault(aspect, []).append(share_inside(points, box))
            most = best_window(points, image.shape[:2], aspect)
            kept.setdefault(BEST, {}).setdefault(aspect, []).append(most)
    out.mkdir(parents=True, exist_ok=True)
    return save(
        target,
        "crops",
        environment(),
        seed=0,
        model=dict(facts),
        data={"spec": data, "split": split, "fixations": sum(len(p.points_inside) for p in photos)},
        rank_ms=float(np.median(ranked_ms)),
        missing=missing,
        rows=_rows([photo.source for photo in photos], kept, ms),
    )


def share_inside(points: np.ndarray, box: Box) -> float:
    """The part of the points, (N, 2) of x and y, that lie in a box (x0, y0, x1, y1)."""
    inside = (points >= box[:2]) & (points < np.array(box[2:]))
    return float(inside.all(1).mean())


def best_window(points: np.ndarray, size: tuple[int, int], aspect: Aspect) -> float:
    """The largest part of the points, (N, 2), that any window keeps in a photo (h, w)."""
    high, wide = aspect.window(*size)
    axis, long, side = (0, wide, size[1]) if wide < size[1] else (1, high, size[0])
    places = np.sort(np.floor(points[:, axis]))
    starts = np.arange(side - long + 1)
    counts = np.searchsorted(places, starts + long) - np.searchsorted(places, starts)
    return float(counts.max() / len(points))


def table(results: Mapping[str, Any], source: str = ALL) -> list[list[str]]:
    """A row for each who crops: the share kept for each aspect with its interval, and the time."""
    rows = [row for row in results["rows"] if row["source"] == source]
    aspects = list(dict.fromkeys(row["aspect"] for row in rows))
    lines = [["crop", *aspects, "ms"]]
    for who in dict.fromkeys(row["who"] for row in rows):
        mine = {row["aspect"]: row for row in rows if row["who"] == who}
        cells = [
            f"{mine[a]['value']:.3f} ({mine[a]['interval'][0]:.3f}…{mine[a]['interval'][1]:.3f})"
            for a in aspects
        ]
        times = [row["ms"] for row in mine.values() if row["ms"] is not None]
        lines.append([who, *cells, f"{np.mean(times):.2f}" if times else ""])
    return lines


def summary(results: Mapping[str, Any]) -> str:
    """The tables of all photos and of each source, with what has to be said beside them."""
    from dsgnn.benchmarks.report.tables import markdown

    texts = []
    for source in dict.fromkeys(row["source"] for row in results["rows"]):
        images = next(row["images"] for row in results["rows"] if row["source"] == source)
        texts.append(f"Share of fixations kept, {source}: {images} photos, 95% intervals")
        texts.append(markdown(table(results, source)))
    texts.append(
        f"Beside the ms of dsgnn, ranking takes {results['rank_ms']:.0f} ms for each photo, once "
        "for all aspects."
    )
    texts += [f"{one['name']} was not measured: {one['why']}" for one in results["missing"]]
    return "\n\n".join(texts)


def _ours(ranking: Ranking, aspect: Aspect) -> dict[str, Cropper]:
    def by(made: Ranking, keep: Any = None) -> Cropper:
        return lambda image, high, wide: made.crop_box(aspect, keep)

    ranks = replace(ranking, attention=None, attention_cell_px=None)
    if ranking.attention is None:
        return {OURS: by(ranks)}
    return {OURS: by(ranking), FREE: by(ranking, ()), WHOLE: by(ranking, 1), RANKS: by(ranks)}


def _others() -> tuple[dict[str, Cropper], list[dict[str, str]]]:
    """The other croppers as far as they are installed, and why the rest are not measured."""
    found: dict[str, Cropper] = {MIDDLE: _middle}
    missing = []
    for who, make in ((SMARTCROP, _smartcrop), (LIBVIPS, _libvips)):
        try:
            found[who] = make()
        except (ImportError, OSError) as error:
            why = f"{error}: pip install 'dsgnn[bench]'"
            missing.append({"name": who, "why": f"{why}, and libvips" if who == LIBVIPS else why})
    return found, missing


def _middle(image: np.ndarray, high: int, wide: int) -> Box:
    x, y = (image.shape[1] - wide) // 2, (image.shape[0] - high) // 2
    return x, y, x + wide, y + high


def _smartcrop() -> Cropper:
    import smartcrop
    from PIL import Image

    cropper = smartcrop.SmartCrop()

    def crop(image: np.ndarray, high: int, wide: int) -> Box:
        # Only the largest window, as of the others; it would also try one of nine tenths.
        found = cropper.crop(Image.fromarray(image), wide, high, min_scale=1.0)["top_crop"]
        return found["x"], found["y"], found["x"] + wide, found["y"] + high

    return crop


def _libvips() -> Cropper:
    import pyvips

    def crop(image: np.ndarray, high: int, wide: int) -> Box:
        h, w = image.shape[:2]
        picture = pyvips.Image.new_from_memory(image.tobytes(), w, h, 3, "uchar")
        found = picture.copy(interpretation="srgb").smartcrop(wide, high, interesting="attention")
        x, y = -found.xoffset, -found.yoffset
        return x, y, x + wide, y + high

    return crop


def _rows(
    sources: Sequence[str],
    kept: Mapping[str, Mapping[Aspect, Sequence[float]]],
    ms: Mapping[str, Sequence[float]],
) -> list[dict[str, Any]]:
    groups = {ALL: np.ones(len(sources), bool)}
    if len(set(sources)) > 1:
        groups |= {name: np.array(sources) == name for name in sorted(set(sources))}
    rows = []
    for source, chosen in groups.items():
        rng = np.random.default_rng(0)
        draws = rng.integers(0, chosen.sum(), (RESAMPLES, chosen.sum()))
        for who, by_aspect in kept.items():
            for aspect, shares in by_aspect.items():
                values = np.array(shares)[chosen]
                means = values[draws].mean(1)
                rows.append(
                    {
                        "source": source,
                        "who": who,
                        "aspect": str(aspect),
                        "images": len(values),
                        "value": float(values.mean()),
                        "interval": np.percentile(means, [2.5, 97.5]).tolist(),
                        "ms": float(np.median(ms[who])) if who in ms else None,
                    }
                )
    return rows
