"""Measure a checkpoint, an exported artifact or anybody's predictions against people.

What is measured depends on what the folder knows, see `dsgnn.data.people`; how it is measured, and
the baselines, are in `dsgnn.gaze_measures`. Only checkpoints need PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsgnn.data.coco import Photo
from dsgnn.data.gaze import GazePhoto
from dsgnn.data.people import MeasuredPhoto, open_people
from dsgnn.data.sample import without_objects
from dsgnn.evaluation.loop import in_lanes, in_query_order, recording, write_figures
from dsgnn.evaluation.rankers import Rank, lanes_of, open_ranker, threads_of
from dsgnn.gaze_measures import (
    FIGURES,
    HALF,
    MODEL,
    PhotoFigures,
    looks_figures,
    ranked_figures,
    summarise_gaze,
    union_figures,
)
from dsgnn.runtime.errors import DataError
from dsgnn.runtime.ranking import Ranking


def evaluate(
    model: Path | None,
    data: str,
    *,
    predictions: Path | None = None,
    split: str = "test",
    out: Path | None = None,
    size: tuple[int, int] | None = None,
    if_none: str = "none",
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    lanes: int | None = None,
) -> dict[str, Any]:
    """Measure one split of a folder of which it is known what people look at.

    Returns `model`, `data`, `protocol` ("gaze"), `images` (their number), `objects` (found per
    photo, on average), `figures`, as `dsgnn.gaze_measures.summarise_gaze` gives them, and
    `by_source`: the same of the photos of each source, where the folder has several.
    model: a checkpoint (.safetensors) or an artifact; or predictions: a results.json. data, split:
    as for `dsgnn.data.people.open_people`. out: folder for metrics.json, per_image.csv and
    results.json (the predictions). The other arguments are as for `dsgnn.evaluation.loop.evaluate`.
    Raises DsgnnError and OSError for what does not fit, is missing or damaged.
    """
    photos = open_people(data, split)
    if not photos:
        raise DataError(f"{data} has no photos in its split {split}")
    threads = threads_of(model, backend, threads, lanes)
    rank, facts = open_ranker(
        model, predictions, size, if_none, "drop", backend, device, threads, usual_if_none="none"
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    names, counts, measured = [], [], []
    with recording(out, predictions, facts) as record:
        many = lanes or lanes_of(model, facts, threads, len(photos))
        for name, ranking, figures in measure_gaze(rank, photos, many):
            names.append(name)
            counts.append(len(ranking.objects))
            measured.append(figures)
            if record is not None:
                record({"file": name, **ranking.to_dict()})
    result = {
        "model": dict(facts),
        "data": {"spec": data, "split": split},
        "protocol": "gaze",
        "images": len(photos),
        "objects": float(np.mean(counts)),
        "figures": summarise_gaze(measured),
        "by_source": _by_source(photos, measured),
    }
    if out is not None:
        write_figures(out, result, _per_image(names, counts, measured))
    return result


def measure_gaze(
    rank: Rank, photos: Sequence[MeasuredPhoto], lanes: int = 1
) -> Iterator[tuple[str, Ranking, PhotoFigures]]:
    """Rank and measure each photo: (name, its ranking, its figures), with a bar on terminals.
    lanes: how many photos at once."""

    def work(photo: MeasuredPhoto) -> tuple[str, Ranking, PhotoFigures]:
        name = photo.path.stem
        ranking = rank(without_objects(photo.read(), name))
        return name, ranking, _figures(photo, ranking)

    return in_lanes(work, photos, lanes, progress=True)


def _figures(photo: MeasuredPhoto, ranking: Ranking) -> PhotoFigures:
    masks, saliency = in_query_order(ranking)
    if isinstance(photo, GazePhoto):
        return looks_figures(photo.points, photo.viewers, masks, saliency, ranking.attention)
    if isinstance(photo, Photo):
        return ranked_figures(photo.masks(), photo.human_ranks, photo.shares, masks, saliency)
    return union_figures(photo.read_mask(masks.shape[1:]), masks)


def _by_source(
    photos: Sequence[MeasuredPhoto], measured: Sequence[PhotoFigures]
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[PhotoFigures]] = {}
    for photo, figures in zip(photos, measured, strict=True):
        groups.setdefault(getattr(photo, "source", ""), []).append(figures)
    return {
        source: {"images": len(group), "figures": summarise_gaze(group)}
        for source, group in sorted(groups.items())
        if len(groups) > 1
    }


def _per_image(
    names: Sequence[str], counts: Sequence[int], measured: Sequence[PhotoFigures]
) -> list[dict[str, Any]]:
    """The model's own figures of each photo."""
    shown = [figure for figure in FIGURES if any(figure in photo for photo in measured)]
    rows: list[dict[str, Any]] = []
    for name, count, photo in zip(names, counts, measured, strict=True):
        rows.append({"name": name, "objects": count})
        for figure in shown:
            total, number = photo.get(figure, {}).get(MODEL, (0.0, 0))
            rows[-1][figure] = total / number if number else ""
    return rows


def table(result: Mapping[str, Any]) -> str:
    """The figures for a terminal: each with its 95% interval and its baselines below it."""
    lines = [
        f"{result['data']['spec']} {result['data']['split']}: {result['images']} photos, protocol "
        f"{result['protocol']}, {result['objects']:.2f} objects found per photo",
        f"  {'':<44}{'value':>7}  95% interval",
    ]
    lines += _rows(result["figures"])
    for source, part in result["by_source"].items():
        lines += [f"{source}: {part['images']} photos", *_rows(part["figures"])]
    return "\n".join(lines)


def _rows(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, rows in figures.items():
        heading, over = FIGURES[name]
        for who, row in rows.items():
            low, high = row["interval"]
            label = heading if who == MODEL else f"    {who}"
            line = f"  {label:<44}{row['value']:7.3f}  {low:.3f} to {high:.3f}"
            counted = who in (MODEL, HALF) or row["count"] != rows[MODEL]["count"]
            yield f"{line}  {row['count']} {over}" if counted else line
