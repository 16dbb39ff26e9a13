"""The command that lists the others, and the options that they share."""

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dsgnn.commands import main
from dsgnn.options import CheckpointFile, needs, refusals, size_option
from dsgnn.runtime.errors import InputError

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
@pytest.mark.parametrize(
    ("script", "option"), [*((script, "--help") for script in SCRIPTS), ("dsgnn-run", "--version")]
)
def test_what_cannot_be_printed_is_a_message(script: str, option: str) -> None:
    command = Path(sys.executable).with_name(script)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([command, option], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "Error: standard output cannot be written: No space left on device\n"
    assert done.returncode == 1


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
                raise ModuleNotFoundError("No module named 'absent'", name="absent")
            raise InputError("no photo") if kind == "input" else ValueError("a bug")

    result = CliRunner().invoke(fail, ["input"])
    assert result.exit_code == 2 and "Error: no photo\nSee --other." in result.output
    result = CliRunner().invoke(fail, ["library"])
    assert result.exit_code == 2
    assert "absent is not installed: pip install 'dsgnn[bench]'" in result.output
    assert isinstance(CliRunner().invoke(fail, ["bug"]).exception, ValueError)


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and those below it, by their names."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {word}")


def every_command() -> dict[str, click.Command]:
    found = {"python -m dsgnn.teacher": import_module("dsgnn.teacher.cli").main}
    for line in SETUP["options.entry_points"]["console_scripts"].strip().splitlines():
        name, _, place = line.partition(" = ")
        module, _, function = place.partition(":")
        if name != "dsgnn":
            found |= commands(getattr(import_module(module), function), name)
    return found


def spellings(found: dict[str, click.Command]) -> dict[str, set[tuple[str, ...]]]:
    """The ways in which each option is written, by its long name."""
    ways: dict[str, set[tuple[str, ...]]] = {}
    for command in found.values():
        for option in command.params:
            if isinstance(option, click.Option):
                ways.setdefault(max(option.opts, key=len), set()).add(tuple(sorted(option.opts)))
    return ways


def test_an_option_has_one_name_everywhere() -> None:
    ways = spellings(every_command())
    assert ways["--out"] == {("--out", "-o")} and "--output" not in ways
    assert {name: way for name, way in ways.items() if len(way) > 1} == {}


def test_an_option_of_two_names_is_found() -> None:
    one, other = (
        click.Command(name, params=[click.Option([*names])])
        for name, names in (("a", ("-o", "--out")), ("b", ("--out",)))
    )
    assert len(spellings({"a": one, "b": other})["--out"]) == 2


SHARED = ["--out", "--threads", "--device", "--seed", "--data", "--split", "--threshold", "--lanes"]
SHARED += ["--teacher", "--allow-unverified", "--skip-existing", "--specks", "--duration"]


def test_an_option_of_several_commands_is_written_once() -> None:
    places: dict[str, list[Path]] = {option: [] for option in SHARED}
    for folder in ("runtime", "dsgnn", "export", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)) if "click.option" in text else ():
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "click.option":
                    for word in node.args:
                        if isinstance(word, ast.Constant) and word.value in places:
                            places[word.value].append(path)
    assert {option: found for option, found in places.items() if len(found) != 1} == {}


def test_every_command_says_what_it_does_in_whole_sentences() -> None:
    for name, command in every_command().items():
        first = (command.help or "").strip().split("\n\n")[0].strip()
        assert first.endswith("."), f"{name}: {first}"
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help and option.help.partition("  [default")[0].rstrip().endswith(
                    (".", ")")
                ), f"{name} {option.opts}: {option.help}"


@pytest.mark.parametrize(
    "command", [["onnx", "absent", "-o", "a.onnx"], ["round", "absent", "-o", "a.safetensors"]]
)
def test_a_missing_checkpoint_is_told_before_pytorch_is_loaded(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dsgnn.export.onnx", "dsgnn.export.round_weights"):
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(import_module("dsgnn.export.cli").main, command)
    assert result.exit_code == 2 and "'absent' does not exist" in result.output


def test_the_bundled_checkpoint_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = CheckpointFile()

    @click.command()
    @click.option("--init", type=kind)
    def show(init: Path | None) -> None:
        click.echo(str(init))

    def said(name: str) -> str:
        return CliRunner().invoke(show, ["--init", name]).output

    monkeypatch.chdir(tmp_path)
    assert said("nano").strip().endswith("weights/nano.safetensors")
    assert "Path 'absent' does not exist" in said("absent")
    monkeypatch.setattr(kind, "nano", tmp_path / "site-packages" / "nano.safetensors")
    refused = said("nano").replace("\n", " ")
    assert "run this in a clone of the repository" in refused
    assert "give the path of its weights/nano.safetensors" in refused
    (tmp_path / "weights").mkdir()  # as in a clone, with the package installed elsewhere
    Path("weights/nano.safetensors").write_bytes(b"")
    assert said("nano") == "weights/nano.safetensors\n"
    Path("nano").mkdir()
    assert said("nano") == "weights/nano.safetensors\n" and said("./nano") == "nano\n"
    Path("nano").rmdir()
    Path("nano").write_text("a file of that name")
    assert said("nano") == "nano\n"
