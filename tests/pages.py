"""The README and the pages of docs/, cut into their blocks."""

import functools
import re
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


class Block(NamedTuple):
    """A fenced block: its language, its title, how it is marked, and its text."""

    language: str
    title: str
    mark: str
    text: str


@functools.cache
def blocks(page: str) -> list[Block]:
    found = re.finditer(
        r"(?:^ *<!-- (?P<mark>[a-z]+(?::[^\n]+)?) -->\n)?"
        r'^(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n'
        r"(?P<text>.*?)^(?P=indent)```$",
        PAGES[page],
        re.DOTALL | re.MULTILINE,
    )
    return [
        Block(each["language"], each["title"] or "", each["mark"] or "", dedent(each["text"]))
        for each in found
    ]


def lines(part: str, mark: str | None = None) -> list[str]:
    """The shell lines of all pages with `part` in them, without comments, of blocks with a mark."""
    texts = [
        block.text.replace("\\\n", "")
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh" and (mark is None or block.mark.startswith(mark))
    ]
    found = (re.sub(r"\s+#.*", "", line).strip() for line in "".join(texts).splitlines())
    return list(dict.fromkeys(line.removesuffix(" &") for line in found if part in line))
