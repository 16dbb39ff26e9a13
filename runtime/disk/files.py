"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsgnn.runtime.errors import FolderBusyError


@contextmanager
def whole_file(path: Path, keep_interrupted: bool = False) -> Iterator[Path]:
    """Give a path beside `path` to write to; put it in place when the block ends well.

    The temporary name keeps the suffix (video writers choose the container by it) and starts with
    a dot, so that a folder run never takes it for an input. If the block raises, nothing is left
    and an earlier file at `path` stays as it was. keep_interrupted: put what was written in place
    also on Ctrl-C, for files that are useful up to any point.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
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


def ffmpeg_name(path: Path) -> str:
    """A path as FFmpeg takes it: absolute, or it takes what stands before a colon for a protocol.

    Raises ValueError for a name that is not Unicode.
    """
    name = str(path.absolute())
    check_unicode(name)
    return name


def check_unicode(name: str) -> None:
    """Raise ValueError for a name whose bytes are not UTF-8: Python reads such files, OpenCV
    crashes on them as videos."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("the name is not Unicode: rename the file, or its folder") from None


def printable(name: str) -> str:
    """A name with the bytes escaped that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs; let go when the block or the process ends.

    Nothing is left in the folder: the folder itself is locked. Where that cannot be done (Windows,
    some network disks) two runs only keep each other's files whole. Raises FolderBusyError.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusyError(
                f"another run is writing into {folder}: wait for its end or choose another --out"
            ) from None
        except OSError:  # this disk has no locks
            pass
        yield
    finally:
        os.close(handle)
