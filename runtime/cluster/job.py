"""Rank images on many machines, by Ray Data: `dsgnn-run … --ray`.

The driver (this process) finds the images and writes the results, DIR/part-*.parquet; workers
read the images and rank them, each with an engine that it loads once. So the images and the model
must be at the same paths on every machine, or the images' bytes in Parquet there; DIR need not.

A killed worker's images are ranked again by another. An image that kills its workers becomes a row
with an error: what a worker died of is done again image by image, each noted in a ledger before it
is begun. The driver writes every image once, whatever Ray may deliver twice.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import cv2
import numpy as np

from dsgnn.runtime.artifact import ENGINES, open_artifact
from dsgnn.runtime.backends import DEFAULT_THREADS
from dsgnn.runtime.cluster import parquet
from dsgnn.runtime.cluster.connect import cluster, have, machines
from dsgnn.runtime.cluster.parquet import Parts, Piece, Row
from dsgnn.runtime.disk.files import check_unicode, claimed, printable
from dsgnn.runtime.disk.sources import Source
from dsgnn.runtime.images import read_image
from dsgnn.runtime.ranker import BUNDLED, Ranker
from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.run.loop import (
    FAILURES,
    Outcome,
    Summary,
    counted,
    follow,
    reason,
    silence_opencv,
)

TASK_IMAGES = 32  # at most, of one task: what a killed worker loses
DEATHS = 2  # of workers while they ranked an image, before it is given up
KILLED = f"{DEATHS} workers died while they ranked it (out of memory?)"
OPTIONS = {
    *("sources", "out", "model", "threshold", "if_none", "backend", "device", "threads"),
    *("batch", "skip_existing", "ray", "workers"),
}
MakeRanker = Callable[[], Ranker]


def check_without_ray(workers: int | None) -> None:
    """Raise ValueError for an option that --ray alone has."""
    if workers is not None:
        raise ValueError("--workers are those of --ray: give both, or neither")


def check_options(given: Iterable[str]) -> None:
    """Raise ValueError for an option that --ray has not. given: names of click's parameters."""
    not_ours = [f"--{name.replace('_', '-')}" for name in given if name not in OPTIONS]
    if not_ours:
        raise ValueError(
            f"--ray ranks images into Parquet, where {', '.join(not_ours)} mean nothing: leave out "
            "the options of pictures and videos, or --ray"
        )


def ranker_for(
    model: Path | None,
    backend: str,
    device: str,
    threads: int | None,
    threshold: float | None,
    if_none: str,
) -> tuple[MakeRanker, bool]:
    """The arguments of Ranker to what makes one in a worker, and whether it needs a GPU.

    device: "cpu", "cuda" (Ray says which of a machine's) or "auto", which is cuda for an engine and
    cpu for an ONNX file. Raises FileNotFoundError or ArtifactError for a model that cannot be read
    here, ValueError for another device.
    """
    path = open_artifact(model or BUNDLED).path
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"with --ray the device is cpu or cuda, not one of its GPUs: got {device}")
    gpu = device == "cuda" or (device == "auto" and path.suffix in ENGINES)
    last = model and model.absolute()  # None: a worker's package has its own
    make = partial(Ranker, last, backend, "cuda" if gpu else "cpu", threads, threshold, if_none)
    return make, gpu


def run_on_ray(
    make_ranker: MakeRanker,
    sources: Sequence[Source],
    out: Path,
    address: str = "",
    workers: int | None = None,
    threads: int | None = None,
    gpu: bool = False,
    batch: int = 1,
    skip_existing: bool = False,
) -> Summary:
    """Rank images on a Ray cluster, with a progress bar; results are rows of OUT/part-*.parquet.

    make_ranker: picklable; called once in each worker. sources: images, and Parquet files with
    columns `bytes` (encoded images), `path`, or `image` of both; anything else becomes a row with
    an error, as does an image that cannot be read. out: an existing folder of this machine.
    address: HOST:PORT of a cluster that this machine is part of, "auto" for the one on this
    machine; "" = RAY_ADDRESS, or a cluster started here, on loopback, that ends with the call.
    workers: None = as many as fit. threads: CPUs of a worker, 2 by default (1 on a GPU). gpu: a GPU
    for each worker, shared evenly if there are more workers. batch: images per inference.
    skip_existing: keep the results of an earlier run into `out` and add what is missing or failed;
    else they are deleted.

    Raises BackendError if Ray is not installed, RuntimeError if it or a worker cannot start,
    ConnectionError, FolderBusyError, ValueError for options that do not fit together or earlier
    results of another model, and what `make_ranker` raises.
    """
    with claimed(out), cluster(address, "data") as ray:
        work = plan(sources)
        outcomes = rank_on_ray(
            ray, make_ranker, work, out, workers, threads, gpu, batch, skip_existing
        )
        return follow(outcomes, len(work.names) + len(work.refused))


def rank_on_ray(
    ray: Any,
    make_ranker: MakeRanker,
    work: Work,
    out: Path,
    workers: int | None = None,
    threads: int | None = None,
    gpu: bool = False,
    batch: int = 1,
    skip_existing: bool = False,
) -> Generator[Outcome, None, None]:
    """Rank images on the cluster that `ray` is connected to; an Outcome as each is written.

    See `run_on_ray`.
    """
    if batch < 1 or (workers is not None and workers < 1):
        raise ValueError(f"workers and batch must be at least 1, got {workers} and {batch}")
    nodes = machines(ray)
    count, needs = fit(nodes, workers, threads, gpu)
    model, line = _probe(ray, make_ranker, needs)
    text = f"{line}; {counted(count, 'worker')}, {counted(len(nodes), 'machine')}"
    click.echo(text, err=True)
    with Parts(out, model, skip_existing) as parts:
        for name in filter(parts.done.__contains__, work.names):
            yield Outcome(Source(None, parquet.shown(name)), skipped=True)
        size = max(batch, min(TASK_IMAGES, len(work.names) // (4 * count)))
        tasks = _tasks(work.pieces, parts.done, size)
        worker = {
            **{"make_ranker": make_ranker, "model": model, "batch": batch},
            **{"threads": int(needs["num_cpus"]), "folder": Path.cwd()},
        }
        for row in chain(work.refused, _ranked(ray, tasks, count, needs, worker)):
            times = dict(row.pop("timings_ms", None) or ())  # Arrow gives a map as pairs
            name = parquet.key(row)
            if name not in parts.done:
                parts.add(row)
                source = Source(None, parquet.shown(name))
                yield Outcome(source, len(row["objects"] or ()), times, row["error"] or "")


@dataclass(frozen=True)
class Work:
    """What there is to do. refused: rows of results for what is nothing to rank."""

    pieces: list[Piece]
    refused: list[Row]

    @property
    def names(self) -> list[parquet.Key]:
        """Of all images."""
        return [name for piece in self.pieces for name in piece.names()]


def plan(sources: Iterable[Source]) -> Work:
    """Read what the tables hold; see `run_on_ray`."""
    pieces: list[Piece] = []
    refused = []
    for source in sources:
        try:
            if source.problem:
                raise ValueError(source.problem)
            check_unicode(f"{source.path} {source.shown}")  # Parquet and Ray hold nothing else
            if source.path is None or source.is_video:
                raise ValueError("workers read image files and Parquet: rank it without --ray")
            if source.path.suffix.lower() == parquet.SUFFIX:
                pieces += parquet.pieces_of_table(source.path, source.shown)
            else:
                pieces.append(Piece(str(source.path), source.shown))
        except (ValueError, OSError) as error:
            row = {"path": printable(source.shown), "table": None, "row": None}
            refused.append(_failed(row, reason(error)))
    return Work(pieces, refused)


def _failed(row: Row, error: str) -> Row:
    return {**row, "width": None, "height": None, "objects": None, "error": error}


def _tasks(pieces: Sequence[Piece], done: Container[parquet.Key], size: int) -> list[list[Piece]]:
    """What is not done, in tasks of `size` image files or one row group."""
    files = [piece for piece in pieces if piece.group is None and piece.names()[0] not in done]
    tasks = [files[start : start + size] for start in range(0, len(files), size)]
    for piece in pieces:
        rows = [number for number in piece.rows if (piece.name, number) not in done]
        if rows:
            tasks.append([replace(piece, rows=rows)])
    return tasks


def _ranked(
    ray: Any,
    tasks: Sequence[list[Piece]],
    workers: int,
    needs: Mapping[str, float],
    worker: Mapping[str, Any],
) -> Iterator[Row]:
    """The tasks' rows of results as they come, in any order. worker: arguments of _Worker."""
    if not tasks:
        return
    ledger = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Ledger).remote()

    def noted(work: parquet.Key, by: int) -> int:
        return ray.get(ledger.add.remote(work, by))

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data = ray.data.from_arrow([parquet.tasks_table([task]) for task in tasks])
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    blocks = data.map_batches(
        _Worker,
        fn_constructor_kwargs={**worker, "noted": noted},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(tasks))),
        **needs,
    ).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    todo = {name for task in tasks for piece in task for name in piece.names()}
    try:
        for block in blocks:
            for row in block.to_pylist():
                todo.discard(parquet.key(row))
                yield row
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"the workers cannot go on: {error}") from error
    if todo:
        raise RuntimeError(f"Ray lost {counted(len(todo), 'image')}: --skip-existing ranks them")


class _Ledger:
    """How often work was begun and not ended, kept outside of the workers that may die of it."""

    def __init__(self) -> None:
        self._begun = Counter[parquet.Key]()

    def add(self, work: parquet.Key, by: int) -> int:
        self._begun[work] += by
        return self._begun[work]


class _Worker:
    """One engine on one machine of the cluster."""

    def __init__(
        self,
        make_ranker: MakeRanker,
        model: Mapping[str, Any],
        threads: int,
        batch: int,
        folder: Path,
        noted: Callable[[parquet.Key, int], int],
    ) -> None:
        silence_opencv()
        cv2.setNumThreads(threads)
        self._ranker, self._batch, self._folder, self._noted = make_ranker(), batch, folder, noted
        if self._ranker.describe() != model:
            raise ValueError(
                f"the model here is {self._ranker.describe()}, elsewhere {model}: put the same "
                "file and libraries on every machine"
            )

    def __call__(self, table: Any) -> Iterator[Any]:
        """Tasks as an Arrow table to rows of results as Arrow tables.

        A task that a worker has died of is done image by image, so that it shows of which.
        """
        for pieces in parquet.tasks_of(table):
            begun = self._noted(("task", f"{pieces[0].names()[0]}"), 1)
            images = (image for piece in pieces for image in self._images(piece))
            if begun == 1:
                while some := list(islice(images, self._batch)):
                    yield parquet.results_table(self._rows(some))
            for row, source in images:  # of a task that was begun before
                name = parquet.key(row)
                if self._noted(name, 1) > DEATHS:
                    yield parquet.results_table([_failed(row, KILLED)])
                else:
                    yield parquet.results_table(self._rows([(row, source)]))
                    self._noted(name, -1)

    def _images(self, piece: Piece) -> Iterator[tuple[Row, bytes | Path | Exception]]:
        """The piece's images; where reading a table breaks off, those left with the reason."""
        left = dict.fromkeys(piece.names())
        try:
            for row, source in piece.images(self._folder):
                yield row, source
                del left[parquet.key(row)]
        except Exception as error:
            for table, number in left:
                yield {"path": None, "table": table, "row": number}, error

    def _rows(self, images: Sequence[tuple[Row, bytes | Path | Exception]]) -> list[Row]:
        """The images' rows of results, each with the milliseconds of its stages."""
        decoded: dict[int, tuple[np.ndarray, float]] = {}
        rows = []
        for index, (row, source) in enumerate(images):
            start = perf_counter()
            try:
                if isinstance(source, Exception):
                    raise source
                decoded[index] = read_image(source), 1e3 * (perf_counter() - start)
            except Exception as error:
                rows.append(_failed(row, _said(error)))
            else:
                rows.append(row)
        photos = [photo for photo, _ in decoded.values()]
        for (index, (_, decode_ms)), result in zip(
            decoded.items(), self._rank(photos), strict=True
        ):
            if isinstance(result, Exception):
                rows[index] = _failed(rows[index], _said(result))
            else:
                times = {**result.timings_ms, "decode": decode_ms}
                rows[index] = {**rows[index], **result.to_dict(), "timings_ms": times}
        return rows

    def _rank(self, photos: Sequence[np.ndarray]) -> list[Ranking | Exception]:
        """Each photo's ranking, or why it has none: one must not spoil its batch."""
        try:
            return list(self._ranker.batch(photos))
        except Exception as error:
            if len(photos) == 1:
                return [error]
            return [result for photo in photos for result in self._rank([photo])]


def _said(error: Exception) -> str:
    """A reason for a row; of a fault of ours with its kind, as a job of days does not end for it"""
    return reason(error) if isinstance(error, FAILURES) else repr(error)


def _describe(make_ranker: MakeRanker) -> tuple[dict[str, Any], str]:
    ranker = make_ranker()
    return ranker.describe(), str(ranker)


def _probe(
    ray: Any, make_ranker: MakeRanker, needs: Mapping[str, float]
) -> tuple[dict[str, Any], str]:
    """What ranks, as a worker says that loads the engine once to try: before work is begun."""
    try:
        return ray.get(ray.remote(**needs, max_retries=0)(_describe).remote(make_ranker))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):  # which here would be said of the results
            raise RuntimeError(f"a worker cannot load the model: {error.cause}") from None
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"a worker could not start: {error}") from error


def fit(
    nodes: Sequence[Mapping[str, float]], workers: int | None, threads: int | None, gpu: bool
) -> tuple[int, dict[str, float]]:
    """How many workers there will be and what each needs of its machine (`num_cpus`, `num_gpus`).

    nodes: what each machine has. workers: None = as many as fit now. Raises ValueError if none do.
    """
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpu:
        fit, cpus = gpus, 1
    else:
        cpus = threads or DEFAULT_THREADS
        fit = sum(int(node.get("CPU", 0) // cpus) for node in nodes)
    if workers is None and not fit:
        raise ValueError(
            f"no worker fits: it needs {'a GPU' if gpu else f'{cpus} CPUs'} of one machine, the "
            f"cluster has {have(nodes)}; use fewer --threads or --device cpu, or wait for machines "
            "that join with --workers N"
        )
    count = workers or fit
    share = 1 / math.ceil(count / gpus) if gpus else 1
    return count, {"num_cpus": cpus, "num_gpus": share if gpu else 0}
