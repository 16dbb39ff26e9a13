"""dsgnn-convert, dsgnn-train and dsgnn-eval: parse the command line, call the core."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from dsgnn.config import CONFIGS

HELP = {"help_option_names": ["-h", "--help"]}


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports in this block are of libraries that an extra brings: name it when one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.UsageError(
            f"{error.name} is not installed: pip install 'dsgnn[{extra}]'"
        ) from None


@click.command(context_settings=HELP)
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, metavar="FILE",
              type=click.Path(dir_okay=False, path_type=Path),
              help="The .safetensors file to write.")  # fmt: skip
@click.option("--config", metavar="NAME",
              type=click.Choice([name for name, config in CONFIGS.items() if config.texture]),
              help="The published configuration, such as r50-assr.  "
              "[default: told by the shapes]")  # fmt: skip
@click.version_option(package_name="dsgnn")
def convert(source: Path, output: Path, config: str | None) -> None:
    """Convert a published checkpoint, SOURCE, for use with dsgnn.

    Only the tensors are read; no code in the file is run. All of them must fit the configuration,
    or nothing is written.

    \b
    dsgnn-convert upstream.pth -o r50-assr.safetensors
    dsgnn-convert upstream.pth -o model.safetensors --config r50-assr

    Exit status: 0 done, 1 the file is not such a checkpoint, 2 wrong use.
    """
    with needs("train"):
        from dsgnn.checkpoint import CheckpointError
        from dsgnn.checkpoint import convert as convert_file

    if output.suffix != ".safetensors":
        raise click.UsageError(f"the output must end in .safetensors, got {output.name}")
    if not output.parent.is_dir():
        raise click.UsageError(f"the folder {output.parent} does not exist")
    try:
        chosen = convert_file(source, output, config)
    except CheckpointError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error}") from None
    click.echo(f"{output}: {chosen.name}, {output.stat().st_size / 1e6:.0f} MB")
