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
from dsgnn.runtime.ranker import BUNDLED

NANO = "nano"  # the bundled model
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)  # of the user's
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)


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


class NanoOrPath(click.Path):
    """A path, or `nano`, the name of the bundled model, which stands for this file of ours.

    A file of that name in the current folder comes first; a folder of that name is given as ./nano.
    """

    def __init__(self, nano: Path, exists: bool = True, dir_okay: bool = True) -> None:
        super().__init__(exists=exists, dir_okay=dir_okay, path_type=Path)
        self.nano = nano

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) != NANO or Path(NANO).is_file():
            return super().convert(value, param, ctx)
        here = Path("weights") / self.nano.name  # in a clone that was installed as a package
        if found := next((path for path in (self.nano, here) if path.is_file()), None):
            return found
        self.fail(
            f"the checkpoint of {NANO} is not in the package: run this in a clone of the "
            f"repository, or give the path of its {here.as_posix()}",
            param,
            ctx,
        )


class CheckpointFile(NanoOrPath):
    """A file or folder of weights, or the bundled model's, which lies in the repository and not in
    the package: it is found beside the code, or in weights/ of the current folder."""

    def __init__(self) -> None:
        super().__init__(Path(__file__).parents[1] / "weights" / f"{NANO}.safetensors")


def size_option(text: str, *, dynamic: bool = False) -> Callable[[Any], Any]:
    """`--size`, with what it means for this command."""
    return click.option("--size", type=SizeType(dynamic), metavar="HxW", help=text)


def backends_option(text: str) -> Callable[[Any], Any]:
    """`--backend` for several artifacts, to be repeated."""
    return click.option(
        "--backend", "backends", multiple=True, type=click.Choice(BACKENDS), help=text
    )


def teacher_option() -> Callable[[Any], Any]:
    """`--teacher`, for commands that read data sets."""
    return click.option(
        "--teacher",
        metavar="FILE",
        type=NanoOrPath(BUNDLED, dir_okay=False),
        help="What predicts where people look, to rank the objects of made-up scenes, of photos "
        "with one mask, and of COCO form without ranks: nano, which is the bundled model, another "
        "ONNX file with attention, or weights of dsgnn.teacher.",
    )


def data_option(
    text: str = "Folder in ASSR, IRSR, SIFR or COCO form, or composite:N[:FOLDER].",
    metavar: str = "DATA",
    multiple: bool = False,
) -> Callable[[Any], Any]:
    return click.option("--data", required=True, multiple=multiple, metavar=metavar, help=text)


def split_option(text: str = "Split to measure.", default: str = "test") -> Callable[[Any], Any]:
    return click.option("--split", default=default, show_default=True, help=text)


def images_option(text: str = "More photos for the parity check.") -> Callable[[Any], Any]:
    return click.option("--images", type=FOLDER, help=text)


def seed_option(text: str = "Of everything random.") -> Callable[[Any], Any]:
    return click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help=text)


def check_output(path: Path, *suffixes: str) -> None:
    """Before minutes of work: end with an error of usage unless the file can be written where it is
    asked for."""
    if path.suffix not in suffixes:
        raise click.UsageError(f"the output must end in {' or '.join(suffixes)}, got {path.name}")
    if not path.parent.is_dir():
        raise click.UsageError(f"there is no folder {path.parent} to write {path.name} in")


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
