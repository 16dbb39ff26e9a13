"""What the commands share: options of one meaning, errors of usage, and lines for a person."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

from dsgnn.runtime.backends import BACKENDS
from dsgnn.runtime.disk.files import printable
from dsgnn.runtime.errors import DsgnnError
from dsgnn.runtime.photo.headers import MAX_PIXELS

HELP = {"help_option_names": ["-h", "--help"]}  # settings of every command
DEFAULTS_SHOWN = {**HELP, "show_default": True}  # for those that tell the default of every option
AT_LEAST_ONE = click.IntRange(1)
Command = TypeVar("Command", bound=Callable[..., Any])


class OutputFolder(click.Path):
    """A folder to write into, which may be missing. An empty name is refused: as a path it would
    mean the current folder."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, *place: Any) -> Any:
        if not str(value):
            self.fail("the name is empty: a dot means this folder", *place)
        return super().convert(value, *place)


threshold_option = click.option(
    "--threshold",
    type=float,
    metavar="SCORE",
    help="Keep objects scored above this, 0 to 1.  [default: the model's own]",
)
if_none_option = click.option(
    "--if-none",
    type=click.Choice(["none", "all"]),
    default="none",
    show_default=True,
    help="What an image gives where no object passes: none, or all as the published code does "
    "(dsgnn-eval has all for its published protocols).",
)
specks_option = click.option(
    "--specks",
    type=click.Choice(["drop", "keep"]),
    default="drop",
    show_default=True,
    help="Parts of a mask that are far smaller than the object: drop them, or keep them as the "
    "published code does.",
)
max_pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=MAX_PIXELS,
    show_default=True,
    help="Pixels of a photo at most: width × height.",
)
skip_existing_option = click.option(
    "--skip-existing", is_flag=True, help="Leave what an earlier run into DIR has done."
)


def out_option(
    text: str = "Folder for the outputs, made if missing.",
    metavar: str | None = None,
    kind: click.Path | None = None,
    required: bool = True,
) -> Callable[[Any], Any]:
    """`--out`. kind: of what is written; None = a folder."""
    place = kind or OutputFolder()
    return click.option("-o", "--out", required=required, metavar=metavar, type=place, help=text)


def backend_option(text: str = "Inference library.") -> Callable[[Any], Any]:
    """`--backend` for one artifact; by default the runtime chooses."""
    choice = click.Choice(["auto", *BACKENDS])
    return click.option("--backend", type=choice, default="auto", show_default=True, help=text)


def device_option(
    text: str = "cpu, cuda or cuda:N.", default: str = "auto"
) -> Callable[[Any], Any]:
    return click.option("--device", default=default, show_default=True, help=text)


def threads_option(
    text: str, default: int | None = None, kind: Any = AT_LEAST_ONE
) -> Callable[[Any], Any]:
    """`--threads`. kind: int where the number is held against the cores of the machine."""
    return click.option("--threads", type=kind, default=default, show_default=True, help=text)


def lanes_option(text: str, metavar: str | None = "N") -> Callable[[Any], Any]:
    return click.option("--lanes", type=AT_LEAST_ONE, metavar=metavar, help=text)


def ranker_options(
    device: str = "cpu, cuda or cuda:N.", threads: str = "2"
) -> Callable[[Command], Command]:
    """The options that say what ranks. device: the help of that option. threads: the default."""
    options = [
        click.option(
            "--model",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="ONNX file or engine made by dsgnn-export, or nano for the bundled one.  "
            "[default: nano]",
        ),
        threshold_option,
        backend_option(),
        device_option(device),
        threads_option(f"CPU threads of one inference.  [default: {threads}]", kind=int),
    ]

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@contextmanager
def usage(option: str = "") -> Iterator[None]:
    """Make what a person did wrong an error of usage (exit status 2). option: the one that it is
    about, to be named."""
    try:
        yield
    except (DsgnnError, OSError) as error:
        said = printable(str(error))
        if option:
            raise click.BadParameter(said, param_hint=f"'{option}'") from error
        raise click.UsageError(said) from error


def open_streams() -> None:
    """Make standard output and error such that a command can print, come what may.

    One that is closed becomes the null device. Otherwise the next file that is opened, such as a
    video, would take its number, and whatever a library prints would be written into that file.
    Characters that an encoding lacks are written as escapes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if name != "stdin" and getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif name != "stdin" and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


class OneCommand(click.Command):
    """A command that says so, with exit status 1, where standard output cannot be written."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        try:
            return super().main(*arguments, **settings)
        except OSError as error:
            try:
                click.echo()  # is it standard output that fails?
            except OSError:
                _drop(sys.stdout)
                say(f"Error: standard output cannot be written: {error.strerror}", err=True)
                sys.exit(1)
            raise


class CommandGroup(OneCommand, click.Group):
    """Commands under one name, of which the same is true."""


def say(text: object, err: bool = False) -> None:
    """Print a line on standard output or error. Where it cannot be written, as on a full disk, it
    and all that follows there is dropped: nobody's work ends for want of a message."""
    try:
        click.echo(str(text), err=err)
    except OSError:
        _drop(sys.stderr if err else sys.stdout)


def _drop(stream: TextIO) -> None:
    """Drop what is printed on a stream from now on, and what Python still holds for it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
