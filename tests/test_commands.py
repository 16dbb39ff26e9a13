"""The command that lists the others, and the options that they share."""

import configparser
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dsgnn.commands import main
from dsgnn.options import needs, refusals, size_option
from dsgnn.runtime.errors import InputError

SETUP = configparser.ConfigParser()
SETUP.read(Path(__file__).parents[1] / "setup.cfg")
SCRIPTS = [
    line.partition(" = ")[0]
    for line in SETUP["options.entry_points"]["console_scripts"].strip().splitlines()
]


def test_every_command_is_listed_with_what_it_does() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    listed = result.output.partition("Commands:")[2].strip().splitlines()
    names = {name for name in SCRIPTS if name != "dsgnn"}
    assert {f"dsgnn-{line.split()[0]}" for line in listed} == names
    assert all(len(line.split()) > 3 for line in listed)


def test_a_listed_command_runs_and_an_unknown_one_is_refused() -> None:
    result = CliRunner().invoke(main, ["export", "onnx", "--help"])
    assert result.exit_code == 0 and "CHECKPOINT" in result.output
    result = CliRunner().invoke(main, ["paint"])
    assert result.exit_code == 2 and "No such command 'paint'" in result.output


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes(dynamic: bool) -> None:
    @click.command()
    @size_option("The size.", dynamic=dynamic)
    def show(size: object) -> None:
        click.echo(repr(size))

    def said(*arguments: str) -> str:
        return CliRunner().invoke(show, arguments).output

    assert said("--size", "448x576") == "(448, 576)\n" and said() == "None\n"
    assert "multiples of 32, got 100x100" in said("--size", "100x100")
    assert (said("--size", "dynamic") == "'dynamic'\n") == dynamic
    assert ("or give dynamic" in said("--size", "big")) == dynamic


def test_what_a_user_can_mend_is_a_message_and_a_bug_is_not() -> None:
    @click.command()
    @click.argument("kind")
    def fail(kind: str) -> None:
        with needs("bench"), refusals("\nSee --other."):
            if kind == "library":
                raise ModuleNotFoundError("no such library", name="a_library")
            raise InputError("no photo") if kind == "input" else ValueError("a bug")

    result = CliRunner().invoke(fail, ["input"])
    assert result.exit_code == 2 and "Error: no photo\nSee --other." in result.output
    result = CliRunner().invoke(fail, ["library"])
    assert result.exit_code == 2 and "pip install 'dsgnn[bench]'" in result.output
    assert isinstance(CliRunner().invoke(fail, ["bug"]).exception, ValueError)
