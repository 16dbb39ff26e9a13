"""Measure a checkpoint, an exported artifact or anybody's predictions on a data set.

Whatever made the predictions, they pass through the same letterbox, post-processing and measures.
Predictions are taken in the order of the queries, as the published evaluation does (it matters
where masks overlap).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dsgnn.data import open_data
from dsgnn.data.coco import stack_masks
from dsgnn.data.people import only_measures
from dsgnn.data.ranks import PREDICTED
from dsgnn.data.records import Samples, palette_of, ranks_from
from dsgnn.evaluation.drawings import draw_worst
from dsgnn.evaluation.rankers import Facts, Rank, lanes_of, open_ranker, threads_of
from dsgnn.metrics import image_metrics, summarise
from dsgnn.runtime.artifact import sha256_of
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.disk.outputs import Record, results_file
from dsgnn.runtime.errors import DataError, InputError, OptionError
from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.run.lanes import side_by_side

Item = TypeVar("Item")
Result = TypeVar("Result")


def evaluate(
    model: Path | None,
    data: str,
    *,
    predictions: Path | None = None,
    split: str = "test",
    teacher: Path | None = None,
    protocol: str = "dsgnn",
    out: Path | None = None,
    size: tuple[int, int] | None = None,
    worst: int = 0,
    if_none: str = "all",
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    lanes: int | None = None,
) -> dict[str, Any]:
    """Measure one split of a data set: `dsgnn.metrics.summarise`, with `model` and `data`.

    model: a checkpoint (.safetensors) or an artifact; or predictions: a results.json. data, split:
    as for `dsgnn.data.open_data`. teacher: what ranks the objects of data without ranks, see
    `dsgnn.teacher.looks.looks_of`. size: (height, width), a checkpoint sees photos as an artifact
    of that size does. if_none: what an image gives when no score passes; the published code gives
    "all". out: folder for metrics.json, per_image.csv, results.json (the predictions) and worst/,
    the `worst` images by SA-SOR beside the truth. lanes: how many images are measured at the same
    time, None = `lanes_of`. Raises the child of DsgnnError that fits for what
    is missing, damaged or does not go together, and OSError.
    """
    if only_measures(data):
        raise DataError(
            f"{data} says what people look at, but holds no ranked objects; models are measured on "
            'it with the protocol "gaze"'
        )
    threads = threads_of(model, backend, threads, lanes)
    rank, facts = open_ranker(
        model, predictions, size, if_none, "keep", backend, device, threads, usual_if_none="all"
    )
    if worst and out is None:
        raise OptionError("the worst images are drawn into a folder, and none is given", "out")
    looks = None
    if teacher is not None:
        from dsgnn.teacher.looks import looks_of

        looks = looks_of(teacher, out and out / "looks")
    samples = open_data(data, split, looks)
    if not len(samples):
        raise OptionError(f"{data} has no images in its split {split}", "split")
    palette = palette_of(samples)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with recording(out, predictions, facts) as record:
        images = measure(
            rank,
            samples,
            protocol=protocol,
            palette=palette,
            progress=True,
            record=record,
            lanes=lanes or lanes_of(model, facts, threads, len(samples)),
        )
    measured_on = {"spec": data, "split": split, "ranks": ranks_from(samples)}
    if teacher and measured_on["ranks"] == PREDICTED:
        measured_on["teacher"] = f"{teacher.name}, sha256 {sha256_of(teacher)[:12]}"
    figures: dict[str, Any] = {"model": dict(facts), "data": measured_on}
    figures |= summarise(images, protocol, palette)
    if out is not None:
        brief = {name: value for name, value in figures.items() if name != "per_image"}
        write_figures(out, brief, images)
        draw_worst(out / "worst", rank, samples, images, worst)
    return figures


def measure(
    rank: Rank,
    samples: Samples,
    indices: Iterable[int] | None = None,
    protocol: str = "dsgnn",
    palette: str = "assr",
    progress: bool = False,
    record: Record | None = None,
    lanes: int = 1,
) -> list[dict[str, Any]]:
    """`image_metrics` of the samples (of these indices), each with its `name`.

    rank: called once per sample. progress: show a bar on terminals. record: is given each ranking
    as an image of results.json. lanes: how many samples are read, ranked and measured at once.
    DataError names the image.
    """

    def work(index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        sample = samples[index]
        try:
            ranking = rank(sample)
            entry = {"file": sample.name, **ranking.to_dict()} if record else {}
            masks, scores = in_query_order(ranking)
            figures = image_metrics(sample.masks, sample.ranks, masks, scores, protocol, palette)
        except (DataError, InputError) as error:
            raise DataError(f"{sample.name}: {error}") from error
        return {"name": sample.name, **figures}, entry

    chosen = list(range(len(samples)) if indices is None else indices)
    images = []
    with closing(in_lanes(work, chosen, lanes, progress)) as measured:
        for figures, entry in measured:
            if record:
                record(entry)
            images.append(figures)
    return images


def in_lanes(
    work: Callable[[Item], Result], items: Sequence[Item], lanes: int, progress: bool
) -> Generator[Result, None, None]:
    """What the work gives for each item, in order. lanes: how many items at once. progress: show a
    bar on terminals."""
    from tqdm import tqdm

    with (
        closing(side_by_side(work, items, lanes)) as pairs,
        tqdm(total=len(items), unit="image", disable=None if progress else True) as bar,
    ):
        for _, result in pairs:
            yield result()
            bar.update()


def recording(
    out: Path | None, predictions: Path | None, facts: Facts
) -> AbstractContextManager[Record | None]:
    """What takes each ranking of a model, for results.json in the folder `out`. It is None without
    a folder, and for predictions, which are in a file already."""
    if out is None or predictions is not None:
        return nullcontext()
    return results_file(out / "results.json", facts)


def in_query_order(ranking: Ranking) -> tuple[np.ndarray, np.ndarray]:
    """A ranking's masks (P, h, w) bool and saliencies (P,), by query."""
    objects = sorted(ranking.objects, key=lambda item: item.query)
    masks = stack_masks([item.mask for item in objects], (ranking.height, ranking.width))
    return masks, np.array([item.saliency for item in objects])


def write_figures(
    out: Path, figures: Mapping[str, Any], images: Sequence[Mapping[str, Any]]
) -> None:
    """Write metrics.json and per_image.csv into a folder. images: of the same names each."""
    write_whole(out / "metrics.json", (json.dumps(figures, indent=1) + "\n").encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, images[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(images)
    write_whole(out / "per_image.csv", text.getvalue().encode())
