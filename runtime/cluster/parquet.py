"""Parquet on both ends of a large job: tables of images to rank, and tables of results.

An image of a job is named by its `Key`: a file by its name, an image in a table by the table and
its row. A results table has a row for each image:

    file     path of the image; null for bytes in a table that has no path
    table    the Parquet file it was a row of, else null
    row      its row there, from 0, else null
    width, height, objects: as an image of results.json (dsgnn.results/1); null where it failed, and
             an object's attention is null where the model does not know it
    error    why it failed, else null
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsgnn.runtime.disk.documents import parse_document
from dsgnn.runtime.disk.files import whole_file
from dsgnn.runtime.disk.outputs import RESULTS_SCHEMA
from dsgnn.runtime.errors import InputError, OptionError

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
Key = tuple[str | None, str | int | None]
SUFFIX = ".parquet"
METADATA_KEY = b"dsgnn"
PART_ROWS = 500  # results that a killed job loses at most, and does again when it is resumed
READ_ROWS = 16  # images of a table held in a worker's memory
MOVE = "move it, or choose another output folder"  # a part that a job must not touch
NOTHING = "its row has neither bytes nor a path"
NO_NAME = "its path holds the character of code 0, as no name does"
COLUMNS = "bytes and/or path, or a column image of both"


def key(row: Mapping[str, Any]) -> Key:
    """What tells an image of a job from all others."""
    return (None, row["file"]) if row["table"] is None else (row["table"], row["row"])


def shown(name: Key) -> str:
    """An image's name in messages: its path, or `table.parquet#row`."""
    table, image = name
    return str(image) if table is None else f"{table}#{image}"


@dataclass(frozen=True)
class Piece:
    """What a worker reads at once: an image file, or rows of one row group of a table.

    path: absolute. name: what results call it. group: the number of the row group, None for an
    image file. rows: those to rank, by their number in the table. first: the number of the group's
    first row.
    """

    path: str
    name: str
    group: int | None = None
    first: int = 0
    rows: Sequence[int] = ()

    def names(self) -> list[Key]:
        """The keys of its images."""
        return [(None, self.name)] if self.group is None else [(self.name, r) for r in self.rows]

    def images(self, folder: Path) -> Iterator[tuple[Row, bytes | Path | Exception]]:
        """Give for each image the beginning of its row of results, and what `read_image` reads, or
        the reason why there is nothing to read. folder: where relative paths in a table start.
        Raises OSError or InputError where reading the table breaks off."""
        if self.group is None:
            yield {"file": self.name, "table": None, "row": None}, Path(self.path)
            return
        import pyarrow.parquet

        wanted, number = frozenset(self.rows), self.first
        with arrow_errors(), pyarrow.parquet.ParquetFile(self.path) as file:
            columns = _columns(file.schema_arrow)
            for records in file.iter_batches(READ_ROWS, [self.group], columns):
                for record in records.to_pylist():
                    record = record.get("image", record) or {}
                    path, data = record.get("path"), record.get("bytes")
                    if number in wanted:
                        # Each error is a new one: what is raised holds on to photos beside it.
                        source = data or InputError(NOTHING)
                        if data is None and path:
                            source = InputError(NO_NAME) if "\0" in path else folder / path
                        yield {"file": path, "table": self.name, "row": number}, source
                    number += 1


@contextmanager
def arrow_errors() -> Iterator[None]:
    """Make Arrow's errors about a file InputErrors, text that is not UTF-8 included."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(str(error)) from error


def tasks_table(tasks: Iterable[Iterable[Piece]]) -> pyarrow.Table:
    """Tasks as Arrow: a row each, whose one column has the task's pieces as JSON."""
    import pyarrow

    texts = [json.dumps([asdict(piece) for piece in task]) for task in tasks]
    return pyarrow.table({"pieces": texts})


def tasks_of(table: pyarrow.Table) -> list[list[Piece]]:
    """What `tasks_table` was given."""
    texts = table["pieces"].to_pylist()
    return [[Piece(**piece) for piece in json.loads(text)] for text in texts]


def pieces_of_table(path: Path, name: str) -> list[Piece]:
    """One piece per row group. Raises OSError or InputError if it is no table of images."""
    import pyarrow.parquet

    pieces, first = [], 0
    with arrow_errors(), pyarrow.parquet.ParquetFile(path) as file:
        _columns(file.schema_arrow)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            rows = tuple(range(first, first + count))
            pieces.append(Piece(str(path), name, group, first, rows))
            first += count
    return pieces


def _columns(schema: pyarrow.Schema) -> list[str]:
    """The columns to read: `bytes` and `path`, or `image`, a struct of both as Hugging Face writes
    it."""
    import pyarrow

    fields = {field.name: field.type for field in schema}
    inside = fields.get("image")
    if inside is not None and pyarrow.types.is_struct(inside):
        columns, fields = ["image"], {field.name: field.type for field in inside}
    else:
        columns = [name for name in ("bytes", "path") if name in fields]
    data, path = fields.get("bytes"), fields.get("path")
    binary, large = pyarrow.binary(), pyarrow.large_binary()
    text = (None, pyarrow.string(), pyarrow.large_string())
    if data not in (None, binary, large) or path not in text or data is path is None:
        raise InputError(
            f"expected columns {COLUMNS} (binary and string), got "
            f"{', '.join(f'{field.name} {field.type}' for field in schema)}"
        )
    return columns


def results_table(rows: Iterable[Row], model: Mapping[str, Any] | None = None) -> pyarrow.Table:
    """Rows of results as Arrow. model: what ranked them, for a file's metadata. Without it the rows
    are on their way to the driver and have `timings_ms` too, milliseconds by stage."""
    import pyarrow

    integer, real, text = pyarrow.int32(), pyarrow.float64(), pyarrow.string()
    counts = pyarrow.struct({"size": pyarrow.list_(integer), "counts": text})
    item = pyarrow.struct(
        {
            "rank": integer,
            "saliency": real,
            "score": real,
            "attention": real,
            "bbox": pyarrow.list_(integer),
            "area": real,
            "query": integer,
            "segmentation": counts,
        }
    )
    columns = {
        **{"file": text, "table": text, "row": pyarrow.int64(), "width": integer},
        **{"height": integer, "objects": pyarrow.list_(item), "error": text},
    }
    if model is None:
        schema = pyarrow.schema({**columns, "timings_ms": pyarrow.map_(text, real)})
    else:
        facts = json.dumps({"schema": RESULTS_SCHEMA, "model": model})
        schema = pyarrow.schema(columns, {METADATA_KEY: facts})
    return pyarrow.Table.from_pylist(list(rows), schema)


class Parts:
    """The results of a job: DIR/part-00000.parquet, part-00001.parquet and so on.

    It is a context manager to add rows in. Every file appears whole or not at all. What was added
    is written out when the block ends, however it ends. done: the keys of the rows that are there,
    those of an earlier run included if it is resumed.
    """

    def __init__(self, out: Path, model: Mapping[str, Any], resume: bool) -> None:
        """out: an existing folder. resume: keep the results of an earlier run, but for failures,
        which are tried again; else its part files are deleted.

        Raises OptionError if a part is not ours, or if it is to be kept and another model made it.
        """
        self.done: set[Key] = set()
        self._out, self._model, self._rows, self._next = out, dict(model), list[Row](), 0
        earlier = sorted(out.glob(f"part-*{SUFFIX}"))
        models = [_model_of(path, MOVE) for path in earlier]  # all, before one is touched
        for path, made_by in zip(earlier, models, strict=True):
            if not resume:
                path.unlink()
                continue
            if made_by != self._model:
                other = {k: v for k, v in made_by.items() if self._model.get(k) != v}
                raise OptionError(
                    f"{path} was made with another model or other options ({other}): resume with "
                    "the same, or choose another output folder"
                )
            self._take(path)
            self._next = 1 + int(path.stem.removeprefix("part-"))

    def add(self, row: Row) -> None:
        self.done.add(key(row))
        self._rows.append(row)
        if len(self._rows) >= PART_ROWS:
            self._flush()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def _take(self, path: Path) -> None:
        """Keep what an earlier part has done, without its failures."""
        import pyarrow.parquet

        with arrow_errors():
            table = pyarrow.parquet.read_table(path)
        good = table.filter(table["error"].is_null())
        self.done.update(key(row) for row in good.select(["file", "table", "row"]).to_pylist())
        if not len(good):
            path.unlink()
        elif len(good) < len(table):
            _write(path, good)

    def _flush(self) -> None:
        if self._rows:
            table = results_table(self._rows, self._model)
            _write(self._out / f"part-{self._next:05}{SUFFIX}", table)
            self._rows, self._next = [], self._next + 1


def _write(path: Path, table: pyarrow.Table) -> None:
    import pyarrow.parquet

    with whole_file(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")


def read_results(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a part, or of all parts of a folder, and what ranked them.

    Raises FileNotFoundError for a folder without parts, and OptionError for a file that is not one
    of ours.
    """
    import pyarrow.parquet

    parts = sorted(path.glob(f"part-*{SUFFIX}")) if path.is_dir() else [path]
    if not parts:
        raise FileNotFoundError(f"{path} holds no part-*{SUFFIX}")
    model = [_model_of(part, "give what dsgnn-batch wrote") for part in parts][0]
    with arrow_errors():
        return [
            row for part in parts for row in pyarrow.parquet.read_table(part).to_pylist()
        ], model


def _model_of(path: Path, advice: str) -> dict[str, Any]:
    """What ranked the images of a part. Raises OptionError if it is not one of ours."""
    import pyarrow.parquet

    with suppress(KeyError, ValueError, OSError):
        facts = parse_document((pyarrow.parquet.read_schema(path).metadata or {})[METADATA_KEY])
        if facts["schema"] == RESULTS_SCHEMA:
            return facts["model"]
    raise OptionError(f"{path} is not of {RESULTS_SCHEMA}: {advice}")
