"""JSON that somebody else may have written: checked for size and depth before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL = 1 << 24  # bytes of a file that describes one thing
LARGE = 1 << 32  # bytes of a file about every image of a data set or run
DEPTH = 50  # of lists and objects inside one another; ours have ten


def read_document(path: Path) -> Any:
    """What a JSON file holds. Errors as of `text_of` and `parse_document`."""
    return parse_document(text_of(path, LARGE))


def text_of(path: Path, most: int = SMALL) -> str:
    """The text of a file that has at most so many bytes.

    Raises FileNotFoundError, other OSError, and ValueError for what is no file (a folder, a device,
    a pipe: reading those may never end), has more bytes or is no text.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    if path.stat().st_size > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return path.read_text("utf-8")


def parse_document(text: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError for what is no JSON or is nested too deeply."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [content] if isinstance(content, list | dict) else []
    for _ in range(DEPTH):
        if not level:
            return content
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
    raise ValueError("it is nested too deeply")
