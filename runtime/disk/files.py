"""Files that appear whole or not at all, the lock on a folder, and names as they may be shown."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsgnn.runtime.errors import FolderBusyError, InputError

TEMPORARY = re.compile(r"\.dsgnn-[0-9a-f]{32}(\.\w+)?")  # what `whole_file` calls its file
INVISIBLE = {"Cc", "Cf", "Zl", "Zp"}  # Unicode's controls, directions and breaks of lines
JOINERS = "\u200c\u200d"  # these are of category Cf too, and belong to words and emoji


@contextmanager
def whole_file(path: Path, keep_interrupted: bool = False) -> Iterator[Path]:
    """Give a path beside `path` to write to; put it in place when the block ends well.

    The temporary name keeps the suffix (video writers choose the container by it) and starts with
    a dot, so that a folder run never takes it for an input. If the block raises, nothing is left
    and an earlier file at `path` stays as it was. keep_interrupted: put what was written in place
    also on Ctrl-C, for files that are useful up to any point.
    """
    temporary = path.with_name(f".dsgnn-{uuid.uuid4().hex}{path.suffix}")
    try:
        try:
            yield temporary
        except (KeyboardInterrupt, GeneratorExit):
            if keep_interrupted and temporary.exists():
                os.replace(temporary, path)
            raise
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all; an earlier file is replaced."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def cache_folder() -> Path:
    """Where the user's programs keep what can be made or fetched again: dsgnn's part of it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dsgnn")


def ffmpeg_name(path: Path) -> str:
    """A path as FFmpeg takes it: absolute, because FFmpeg takes what stands before a colon for a
    protocol. Raises InputError for a name that is not Unicode."""
    name = str(path.absolute())
    check_unicode(name)
    return name


def check_unicode(name: str) -> None:
    """Raise InputError for a name whose bytes are not UTF-8. Python reads such files, but OpenCV
    crashes on them as videos."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError("the name is not Unicode: rename the file, or its folder") from None


def printable(name: str, keep: str = "") -> str:
    """A name as it may be printed: whatever could move a terminal's cursor, start a new line, turn
    the direction of writing or not be encoded is written as an escape such as \\x1b.

    keep: characters that stay as they are, such as the line breaks of a long message.
    """
    return "".join(one if one in keep else _escaped(one) for one in name)


def _escaped(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if category == "Cs" or (category in INVISIBLE and character not in JOINERS):
        return character.encode("unicode_escape").decode()
    return character


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs; let go when the block or the process ends.

    Nothing is left in the folder: the folder itself is locked. Once it is, the temporary files are
    removed that a killed run has left in it. Where it cannot be locked (Windows, some network
    disks) two runs only keep each other's files whole, and nothing is removed. Raises
    FolderBusyError.
    """
    with locked(folder, f"another run is writing into {folder}") as alone:
        if alone:
            sweep(folder)
        yield


@contextmanager
def locked(path: Path, busy: str) -> Iterator[bool]:
    """Hold a file or folder; gives False where that cannot be done.

    busy: what FolderBusyError says first if another process holds it.
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        alone = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusyError(
                f"{busy}: wait for its end or choose another output folder"
            ) from None
        except OSError:  # this disk has no locks
            alone = False
        yield alone
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the temporary files of `whole_file` in a folder and its sub-folders."""
    for place, _, names in os.walk(folder):
        for name in filter(TEMPORARY.fullmatch, names):
            Path(place, name).unlink(missing_ok=True)
