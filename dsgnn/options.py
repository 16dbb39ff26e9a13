"""Options and refusals that several commands share, so that they read and answer alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from dsgnn.runtime.backends import BACKENDS
from dsgnn.runtime.errors import DsgnnError
from dsgnn.runtime.letterbox import parse_size

HELP = {"help_option_names": ["-h", "--help"]}
NANO = "nano"  # the bundled model


class SizeType(click.ParamType):
    """HxW in pixels, multiples of 32, as (H, W); with `dynamic` also that word, as it is."""

    name = "HxW"

    def __init__(self, dynamic: bool = False):
        self.dynamic = dynamic

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int] | str:
        if isinstance(value, tuple) or (self.dynamic and value == "dynamic"):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(f"{error}{'; or give dynamic' if self.dynamic else ''}", param, ctx)


class CheckpointFile(click.Path):
    """A file or folder of weights, or the name of the bundled model, whose checkpoint lies in the
    repository and not in the package."""

    def __init__(self, exists: bool = False) -> None:
        super().__init__(exists=exists, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == NANO and not Path(NANO).exists():
            path = Path(__file__).resolve().parents[1] / "weights" / f"{NANO}.safetensors"
            if not path.is_file():
                self.fail(
                    f"the checkpoint of {NANO} is not in the package: take weights/{path.name} "
                    "from the repository, and give its path",
                    param,
                    ctx,
                )
            return path
        return super().convert(value, param, ctx)


def size_option(text: str, *, dynamic: bool = False) -> Callable[[Any], Any]:
    """`--size`, with what it means for this command."""
    return click.option("--size", type=SizeType(dynamic), metavar="HxW", help=text)


def backend_option(text: str) -> Callable[[Any], Any]:
    """`--backend` for one artifact; by default the runtime chooses."""
    choice = click.Choice(["auto", *BACKENDS])
    return click.option("--backend", type=choice, default="auto", show_default=True, help=text)


def backends_option(text: str) -> Callable[[Any], Any]:
    """`--backend` for several artifacts, to be repeated."""
    return click.option(
        "--backend", "backends", multiple=True, type=click.Choice(BACKENDS), help=text
    )


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports in this block are of libraries that an extra brings: name it when one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.UsageError(
            f"{error.name} is not installed: pip install 'dsgnn[{extra}]'"
        ) from None


@contextmanager
def refusals(advice: str = "") -> Iterator[None]:
    """What cannot be done as asked ends the command with its message and status 2, not with a
    traceback.

    advice: is added to the message, for what this command's own options can change. Errors that are
    not the user's pass through: they are bugs.
    """
    try:
        yield
    except (DsgnnError, OSError) as error:
        raise click.UsageError(f"{error}{advice}") from None
