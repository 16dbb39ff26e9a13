"""Counts the lines of code outside the tests: `python tests/count_code.py [REVISION]`.

A line counts if it holds code: blank lines, comments and docstrings do not. With a revision the
files of that commit are counted, else those of the working tree that git tracks.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("runtime", "dsgnn", "export", "benchmarks")
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """The lines of a module's text that hold code; a string that stands alone is a docstring."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if alone and isinstance(node.value.value, str):
            code.difference_update(range(node.lineno, node.end_lineno + 1))
    text = source.splitlines()
    return sum(bool(text[number - 1].strip()) for number in code)


def counted(revision: str = "") -> dict[str, int]:
    """Lines of code by folder, of a revision or of the working tree."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
        )
        return done.stdout

    listed = git("ls-tree", "-r", "--name-only", revision) if revision else git("ls-files")
    found = dict.fromkeys(FOLDERS, 0)
    for name in listed.splitlines():
        folder = name.partition("/")[0]
        if folder in found and name.endswith(".py") and (revision or (ROOT / name).exists()):
            text = git("show", f"{revision}:{name}") if revision else (ROOT / name).read_text()
            found[folder] += code_lines(text)
    return found


if __name__ == "__main__":
    figures = counted(*sys.argv[1:2])
    for folder, lines in {**figures, "together": sum(figures.values())}.items():
        print(f"{folder:12s} {lines:6,d}")
