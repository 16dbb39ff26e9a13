"""Lists of records that outlive whatever ends the process.

While results.json is made, its records are in a journal beside it, `.results.journal`. That has
one record of JSON on each line; its first line is what results.json begins with. Every line is
given to the system at once, so that it outlives a killed process, and once a second to the disk.
When the run ends, however it ends, results.json is made of the journal. After a killed run the next
one does so before it begins.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from time import monotonic
from typing import Any

from dsgnn.runtime.disk.documents import parse_document, read_document
from dsgnn.runtime.disk.files import locked, whole_file

SYNC_S = 1.0  # a machine that loses its power loses the records of this time

# What reading a file raises that is damaged, or that was not written by this toolkit.
DAMAGE = (OSError, ValueError, LookupError, TypeError)


@contextmanager
def record_file(
    path: Path, head: Mapping[str, Any], name: str
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a function that adds a record to the file {**head, name: [record, …]}.

    The file is put in place when the block ends, also by an error. A record has a text `file` that
    tells it from others. If a killed process left a journal, its records are put into an earlier
    file of the same head first, in place of those of the same `file`.

    A record that cannot be written, as on a full disk, waits in memory and is tried again with the
    next one. Raises OSError if something still waits at the end, or if the file cannot be put in
    place: the journal then keeps what it has. Raises FolderBusyError if another process is writing
    the file.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    place = path.with_name(f".{path.stem}.journal")
    with FileIO(place, "a+") as file, locked(place, f"another process is writing {path}"):
        _recover(path, place, name)
        journal = _Lines(file)
        journal.add(head)
        try:
            yield journal.add
        finally:
            journal.flush()
            with place.open("rb") as lines:
                next(lines)
                _write(path, head, name, (line[:-1] for line in lines))
            place.unlink()


class _Lines:
    """Appends records to a file that is emptied first. The file always ends with a whole line, but
    for the moment of writing one."""

    def __init__(self, file: FileIO) -> None:
        self._file, self._synced = file, monotonic()
        # Where the written lines end, and what waits to follow them. Both change in one step, as
        # Ctrl-C may come between any two.
        self._state = 0, b""
        file.truncate(0)

    def add(self, record: Mapping[str, Any]) -> None:
        end, waiting = self._state
        self._state = end, waiting + json.dumps(record).encode() + b"\n"
        with suppress(OSError):  # tried again with the next record, and at the end
            self.flush()
            if monotonic() - self._synced > SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = monotonic()

    def flush(self) -> None:
        """Write what waits, all or nothing. Raises OSError."""
        end, waiting = self._state
        # More than nothing where Ctrl-C came after the system had taken it.
        done = os.fstat(self._file.fileno()).st_size - end
        try:
            while done < len(waiting):
                done += self._file.write(waiting[done:]) or 0
        except OSError:
            self._file.truncate(end)
            raise
        self._state = end + done, b""


def _recover(path: Path, journal: Path, name: str) -> None:
    """Make the file of what a killed process left in its journal."""
    head, records = _read(journal)
    if not records:
        return
    with suppress(*DAMAGE):
        earlier = read_document(path)
        old = earlier.pop(name) if isinstance(earlier, dict) else []
        if earlier == head and isinstance(old, list):
            records = {**{record["file"]: record for record in old}, **records}
    _write(path, head, name, (json.dumps(record).encode() for record in records.values()))


def _read(journal: Path) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """The head and the records by their `file`, up to the first line that is cut or damaged."""
    head: dict[str, Any] = {}
    records: dict[str, Mapping[str, Any]] = {}
    with journal.open("rb") as lines, suppress(*DAMAGE):
        head = dict(parse_document(next(lines, b"")))
        for line in lines:
            if not line.endswith(b"\n"):
                break
            record = parse_document(line)
            records[record["file"]] = record
    return head, records


def _write(path: Path, head: Mapping[str, Any], name: str, records: Iterable[bytes]) -> None:
    """records: each as JSON."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(f'{json.dumps(head)[:-1]}, "{name}": ['.encode())
        before = b"\n"
        for record in records:
            file.write(before + record)
            before = b",\n"
        file.write(b"\n]}\n")
        file.flush()
        os.fsync(file.fileno())
