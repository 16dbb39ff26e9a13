"""Rank images on many machines, by Ray Data: dsgnn-batch.

The driver (this process) finds the images and writes the results, DIR/part-*.parquet. Workers read
the images and rank them, each with an engine that it loads once. So every machine needs the model
and the images, or the Parquet files that hold them, at the same paths; DIR is needed here alone.

A killed worker's images are ranked again by another one. An image that kills its workers becomes a
row with an error: a task that a worker died of is done again image by image, and each image is
noted in a ledger before it is begun. The driver writes every image once, even if Ray delivers it
twice.

A bug of ours that an image meets becomes a row as well, because a job of days should not end for
it. The row tells the kind of error and its place, and the command's exit status tells of it too.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import traceback
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np

from dsgnn.runtime.artifact import ENGINES, open_artifact
from dsgnn.runtime.backends import DEFAULT_THREADS
from dsgnn.runtime.cluster import parquet
from dsgnn.runtime.cluster.connect import cluster, have, machines
from dsgnn.runtime.cluster.parquet import Parts, Piece, Row
from dsgnn.runtime.cluster.probe import SAME, Told, lacking, probe
from dsgnn.runtime.console import say
from dsgnn.runtime.disk.files import check_unicode, claimed, printable
from dsgnn.runtime.disk.sources import Source
from dsgnn.runtime.errors import ArtifactError, BackendError, DsgnnError, InputError, OptionError
from dsgnn.runtime.images import keep_quiet, memory_errors
from dsgnn.runtime.photo.headers import MAX_PIXELS
from dsgnn.runtime.ranker import BUNDLED, Ranker, model_path
from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.run.loop import Summary, counted, follow
from dsgnn.runtime.run.source import FAILURES, Outcome, reason

TASK_IMAGES = 32  # of one task at most, which is what a killed worker loses
DEATHS = 2  # so many workers may die while they rank an image before it is given up
KILLED = f"{DEATHS} workers died while they ranked it (out of memory?)"
BUG = "bug of dsgnn: "  # what the error of a row begins with if it is our fault
MakeRanker = Callable[[], Ranker]


def ranker_for(
    model: Path | None,
    backend: str,
    device: str,
    threads: int | None,
    threshold: float | None,
    if_none: str,
    specks: str = "drop",
    max_pixels: int = MAX_PIXELS,
) -> tuple[MakeRanker, bool]:
    """Turn the arguments of Ranker into a function that makes one in a worker, for photos of
    strangers; also say whether a worker needs a GPU.

    device: "cpu", "cuda" (Ray says which GPU of a machine) or "auto", which is cuda for an engine
    and cpu for an ONNX file. Raises FileNotFoundError or ArtifactError for a model that cannot be
    read here, OptionError for another device.
    """
    path = open_artifact(model_path(model)).path
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"a worker's device is cpu or cuda, as Ray picks the GPU: got {device}")
    gpu = device == "cuda" or (device == "auto" and path.suffix in ENGINES)
    last = None if path == BUNDLED else path.absolute()  # None: each worker's package has its own
    runs_on = "cuda" if gpu else "cpu"
    arguments = (last, backend, runs_on, threads, threshold, if_none, specks, max_pixels)
    make = partial(Ranker, *arguments, untrusted=True)
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
    columns `bytes` (encoded images), `path`, or `image` of both. Anything else becomes a row with
    an error, and so does an image that cannot be read. out: an existing folder of this machine.
    address: as of `cluster`; a cluster that is started here ends with the call. workers: None = as
    many as fit. threads: CPUs of a worker, 2 by default (1 on a GPU). gpu: whether each worker has
    a GPU, which several share evenly if there are more workers than GPUs. batch: images per
    inference. skip_existing: keep the results of an earlier run into `out`, and add what is missing
    or failed; otherwise they are deleted.

    Raises BackendError if Ray is not installed, or it or a worker cannot start or go on,
    FolderBusyError, OptionError for options that do not fit together or earlier results of another
    model, OSError if the results cannot be written, and what `make_ranker` raises.
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
        raise OptionError(f"workers and batch must be at least 1, got {workers} and {batch}")
    nodes = machines(ray)
    count, needs = fit(nodes, workers, threads, gpu)
    model, line = probe(ray, _describe, [make_ranker], needs)
    text = f"{line}; {counted(count, 'worker')}, {counted(len(nodes), 'machine')}"
    say(printable(text), err=True)
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
                source, error = Source(None, parquet.shown(name)), row["error"] or ""
                bug = error.startswith(BUG)
                yield Outcome(source, len(row["objects"] or ()), times, error, bug=bug)


@dataclass(frozen=True)
class Work:
    """What there is to do. refused: rows of results for sources that cannot be ranked."""

    pieces: list[Piece]
    refused: list[Row]

    @property
    def names(self) -> list[parquet.Key]:
        """The keys of all images."""
        return [name for piece in self.pieces for name in piece.names()]


def plan(sources: Iterable[Source]) -> Work:
    """Read what the tables hold; see `run_on_ray`."""
    pieces: list[Piece] = []
    refused = []
    for source in sources:
        try:
            if source.problem:
                raise InputError(source.problem)
            check_unicode(f"{source.path} {source.shown}")  # Parquet and Ray hold nothing else
            if source.path is None or source.is_video:
                raise InputError("workers read image files and Parquet: rank it with dsgnn-run")
            if source.path.suffix.lower() == parquet.SUFFIX:
                pieces += parquet.pieces_of_table(source.path, source.shown)
            else:
                pieces.append(Piece(str(source.path), source.shown))
        except FAILURES as error:
            name = os.fsencode(source.shown).decode("utf-8", "backslashreplace")
            row = {"file": name, "table": None, "row": None}
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
    """The tasks' rows of results as they come, in any order. worker: arguments of _Member."""
    if not tasks:
        return
    # beside this process, so that no other machine takes it away
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    kept: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
    ledger = ray.remote(num_cpus=0, scheduling_strategy=here, **kept)(_Ledger).remote()

    def noted(work: parquet.Key, by: int) -> int:
        return ray.get(ledger.add.remote(work, by))

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data = ray.data.from_arrow([parquet.tasks_table([task]) for task in tasks])
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    blocks = data.map_batches(
        _Member,
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
    except ray.exceptions.RayTaskError:  # raised by our own code outside of any image: a bug
        raise
    except ray.exceptions.RayError as error:
        raise BackendError(f"the workers cannot go on: {_last_words(error)}") from error
    if todo:
        raise BackendError(
            f"Ray lost {counted(len(todo), 'image')}: rank into the same folder again, and skip "
            "what is there"
        )


def _last_words(error: Exception) -> str:
    """What an error of Ray's says: of a worker that refused to begin, the reason alone, which is
    the last line of its traceback."""
    kind, _, reason = str(error).rstrip().rpartition("\n")[2].partition(": ")
    refused = getattr(error, "actor_init_failed", False) and kind.startswith("dsgnn.")
    return reason if refused else str(error)


class _Ledger:
    """Counts how often work was begun and not ended. It lives outside of the workers, which may die
    of their work."""

    def __init__(self) -> None:
        self._begun = Counter[parquet.Key]()

    def add(self, work: parquet.Key, by: int) -> int:
        self._begun[work] += by
        return self._begun[work]


class _Member:
    """A worker: one engine on one machine of the cluster."""

    def __init__(
        self,
        make_ranker: MakeRanker,
        model: Mapping[str, Any],
        threads: int,
        batch: int,
        folder: Path,
        noted: Callable[[parquet.Key, int], int],
    ) -> None:
        keep_quiet()
        cv2.setNumThreads(threads)
        self._batch, self._folder, self._noted = batch, folder, noted
        try:
            self._ranker = make_ranker()
        except (DsgnnError, OSError) as error:  # a machine that was not there for `probe`
            raise lacking({socket.gethostname(): error}) from error
        if self._ranker.describe() != model:
            raise ArtifactError(
                f"the model on {socket.gethostname()} is {self._ranker.describe()}, elsewhere "
                f"{model}: {SAME}"
            )

    def __call__(self, table: Any) -> Iterator[Any]:
        """Turn tasks, as an Arrow table, into rows of results, as Arrow tables.

        A task that a worker has died of is done image by image, to find out which one it was.
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
        """The piece's images. Where reading a table breaks off, the others come with the reason."""
        left = dict.fromkeys(piece.names())
        try:
            for row, source in piece.images(self._folder):
                yield row, source
                del left[parquet.key(row)]
        except Exception as error:
            for table, number in left:
                yield {"file": None, "table": table, "row": number}, error

    def _rows(self, images: Sequence[tuple[Row, bytes | Path | Exception]]) -> list[Row]:
        """The images' rows of results, each with the milliseconds of its stages."""
        photos: list[np.ndarray] = []
        decoded: list[float | Exception] = []  # milliseconds that it took, or why it failed
        for _, source in images:
            start = perf_counter()
            try:
                if isinstance(source, Exception):
                    raise source
                with memory_errors():
                    photos.append(self._ranker.read(source))
                decoded.append(1e3 * (perf_counter() - start))
            except Exception as error:
                decoded.append(error)
        rankings, rows = iter(self._rank(photos)), []
        for (row, _), decode in zip(images, decoded, strict=True):
            result = decode if isinstance(decode, Exception) else next(rankings)
            if isinstance(result, Exception):
                rows.append(_failed(row, _said(result)))
            else:
                times = {**result.timings_ms, "decode": decode}
                rows.append({**row, **result.to_dict(), "timings_ms": times})
        return rows

    def _rank(self, photos: Sequence[np.ndarray]) -> list[Ranking | Exception]:
        """Each photo's ranking, or why it has none: one photo must not spoil the others'."""
        try:
            with memory_errors():
                return list(self._ranker.batch(photos))
        except Exception as error:
            if len(photos) == 1:
                return [error]
            return [result for photo in photos for result in self._rank([photo])]


def _said(error: Exception) -> str:
    """The error of a row: the reason why the image failed, or the kind and the place of a bug.

    What the machine did, rather than the image, is told with the machine's name.
    """
    if isinstance(error, DsgnnError):
        return reason(error)
    if isinstance(error, FAILURES):
        return f"{reason(error)} (on {socket.gethostname()})"
    traceback.print_exception(error)  # into the worker's log, which Ray keeps
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}, in {place.name}"
    return f"{BUG}{type(error).__name__}: {error} ({where})"


def _describe(make_ranker: MakeRanker) -> Told:
    ranker = make_ranker()
    return ranker.describe(), str(ranker)


def fit(
    nodes: Sequence[Mapping[str, float]], workers: int | None, threads: int | None, gpu: bool
) -> tuple[int, dict[str, float]]:
    """How many workers there will be and what each needs of its machine (`num_cpus`, `num_gpus`).

    nodes: what each machine has. workers: None = as many as fit now. Raises OptionError if none do.
    """
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpu:
        fit, cpus = gpus, 1
    else:
        cpus = threads or DEFAULT_THREADS
        fit = sum(int(node.get("CPU", 0) // cpus) for node in nodes)
    if workers is None and not fit:
        raise OptionError(
            f"no worker fits: it needs {'a GPU' if gpu else f'{cpus} CPUs'} of one machine, and "
            f"the cluster has {have(nodes)}; use fewer threads or the device cpu, or name a number "
            "of workers to wait for machines that join"
        )
    count = workers or fit
    share = 1 / math.ceil(count / gpus) if gpus else 1
    return count, {"num_cpus": cpus, "num_gpus": share if gpu else 0}
