"""What the README promises: its links, its commands' options, its Python."""

import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
LINKS = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("sh")).splitlines()
    return [re.sub(r"\s+#.*", "", line) for line in lines if "dsgnn-" in line]


def parse(line: str) -> None:
    """Let the command's own parser read a line; raises click's UsageError for what it refuses."""
    words = shlex.split(line)
    words = words[next(i for i, word in enumerate(words) if word.startswith("dsgnn-")) :]
    (script,) = entry_points(group="console_scripts", name=words[0])
    command, rest = script.load(), words[1:]
    while isinstance(command, click.Group):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_parser(click.Context(command)).parse_args(rest)


@pytest.mark.parametrize("path", LINKS)
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("line", commands())
def test_commands_take_these_options(line: str) -> None:
    parse(line)


def test_the_reading_of_commands_can_fail() -> None:
    with pytest.raises(click.NoSuchOption):
        parse("dsgnn-run photo.jpg --out ranked --nonsense")


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("python")
    exec(block, {})
    assert "of the photo" in capsys.readouterr().out
