"""dsgnn-convert, dsgnn-train, dsgnn-eval and dsgnn-check: parse the command line, call the core."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from dsgnn.config import CONFIGS
from dsgnn.options import (
    FILE,
    NANO,
    NEW_FILE,
    CheckpointFile,
    NanoOrPath,
    check_output,
    data_option,
    needs,
    seed_option,
    size_option,
    split_option,
    teacher_option,
)
from dsgnn.runtime.console import (
    HELP,
    OneCommand,
    backend_option,
    device_option,
    lanes_option,
    out_option,
    threads_option,
)
from dsgnn.runtime.errors import CheckpointError, DataError, DsgnnError, NotFiniteError, OptionError
from dsgnn.runtime.ranker import BUNDLED

OPTIONS = {"initial_weights": "--init", "predict_looks": "--teacher", "validation": "--val"}
"""Arguments of the library that have another name on the command line."""


@contextmanager
def reported() -> Iterator[None]:
    """What a person can mend ends the command with its message, and without a traceback.

    The exit status is 1 for broken data and for files that cannot be read or written, 2 for wrong
    use.
    """
    try:
        yield
    except (DataError, NotFiniteError, OSError) as error:
        raise click.ClickException(str(error)) from None
    except OptionError as error:
        names = [OPTIONS.get(name, "--" + name.replace("_", "-")) for name in error.about]
        options = f" (see {', '.join(names)})" if names else ""
        raise click.UsageError(f"{error}{options}") from None
    except DsgnnError as error:
        raise click.UsageError(str(error)) from None


@click.command(cls=OneCommand, context_settings=HELP)
@click.argument("source", type=FILE)
@out_option("The .safetensors file to write.", "FILE", NEW_FILE)
@click.option(
    "--config",
    metavar="NAME",
    type=click.Choice([name for name, config in CONFIGS.items() if config.texture]),
    help="The published configuration, such as r50-assr.  [default: told by the shapes]",
)
@click.version_option(package_name="dsgnn")
def convert(source: Path, out: Path, config: str | None) -> None:
    """Convert a published checkpoint, SOURCE, for use with dsgnn.

    Only the tensors are read; no code in the file is run. All of them must fit the configuration,
    or nothing is written.

    \b
    dsgnn-convert upstream.pth -o r50-assr.safetensors
    dsgnn-convert upstream.pth -o model.safetensors --config r50-assr

    Exit status: 0 done, 1 the file is not such a checkpoint, 2 wrong use.
    """
    with needs("train"):
        from dsgnn.weights.checkpoint import convert as convert_file

    check_output(out, ".safetensors")
    try:
        chosen, weights = convert_file(source, out, config)
    except CheckpointError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written: {error}") from None
    origin = "published" if weights == "published" else "converted, origin unknown"
    click.echo(f"{out}: {chosen.name}, {origin}, {out.stat().st_size / 1e6:.0f} MB")


@click.command(cls=OneCommand, context_settings=HELP)
@click.option(
    "--config",
    required=True,
    metavar="NAME",
    type=click.Choice(list(CONFIGS)),
    help=f"One of {', '.join(CONFIGS)}.",
)
@data_option(
    "Folder in ASSR, IRSR, SIFR or COCO form, with fixations.json, or with images/ and masks/; or "
    "composite:N or composite:N:FOLDER: N made-up scenes to train on, and N others to evaluate on. "
    "Several may be given; the first is evaluated on.",
    multiple=True,
)
@click.option(
    "--share",
    "shares",
    multiple=True,
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="How often the first, second … --data is drawn, of any sum.  [default: the square root of "
    "its size]",
)
@teacher_option()
@out_option("Folder of the run, made if missing.", "RUN")
@click.option(
    "--init",
    metavar="FILE",
    type=CheckpointFile(),
    help="Weights to start from: a checkpoint of dsgnn, or nano for the bundled model's; COCO "
    "Mask2Former as the detection framework's .pth or transformers' file or folder; or a backbone "
    "as timm's file.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in RUN, exactly as if it had not stopped; start it if there is none.",
)
@click.option(
    "--amp",
    type=click.Choice(["off", "bf16", "fp16"]),
    default="off",
    show_default=True,
    help="Mixed precision.",
)
@split_option("Split to train on; train+val is the published recipe for ASSR.", "train")
@click.option(
    "--val",
    default="val",
    show_default=True,
    help="Split to evaluate on and choose the best checkpoint by, or none.",
)
@click.option(
    "--iterations",
    type=click.IntRange(1),
    help="Optimiser steps; the schedule keeps its form.  [default: the configuration's]",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="Images per process and pass.  [default: the configuration's]",
)
@click.option(
    "--accumulate",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Passes per optimiser step.",
)
@click.option(
    "--every",
    type=click.IntRange(1),
    metavar="N",
    help="Evaluate and save every N iterations.  [default: 20 times]",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Processes that prepare images, for each training process.",
)
@seed_option()
@device_option()
@click.version_option(package_name="dsgnn")
def train(
    config: str,
    data: tuple[str, ...],
    shares: tuple[float, ...],
    teacher: Path | None,
    out: Path,
    init: Path | None,
    resume: bool,
    amp: str,
    split: str,
    val: str,
    iterations: int | None,
    batch: int | None,
    accumulate: int,
    every: int | None,
    workers: int,
    seed: int,
    device: str,
) -> None:
    """Train a network. One process, or as many as torchrun starts.

    \b
    dsgnn-train --config nano --data photos --teacher nano --init nano --out runs/mine
    dsgnn-train --config r50-assr --data ASSR --init mask2former.pth --out runs/r50
    torchrun --nproc-per-node 8 --no-python dsgnn-train --config swin-l-irsr \\
        --data IRSR --init mask2former-swin-large --amp bf16 --out runs/swin

    RUN gets last.safetensors and best.safetensors (highest SA-SOR on --val), state.pt (for
    --resume), log.jsonl, curve.png, init.json (what --init took) and tensorboard/.

    A run that is resumed with more --iterations than before is extended.

    Exit status: 0 done, 1 stopped (a loss was not finite, or the data is broken), 2 wrong use.
    """
    with needs("train"):
        from dsgnn.teacher.looks import looks_of
        from dsgnn.training.loop import RunOptions
        from dsgnn.training.recipe import adapted, recipe_for
        from dsgnn.training.run import DataSplits, train_on

    with reported():
        network = CONFIGS[config]
        looks = looks_of(teacher, out / "looks") if teacher else None
        trained = train_on(
            DataSplits(data, split, None if val == "none" else val, looks, shares),
            network,
            adapted(recipe_for(network), iterations, batch, accumulate),
            out,
            RunOptions(init, resume, device, workers, every),
            seed,
            amp,
        )
    if trained:
        click.echo(f"trained: {trained}; {_next_step(trained, data[0], val, teacher)}")


def _next_step(trained: Path, data: str, val: str, teacher: Path | None) -> str:
    """How to measure a checkpoint: on the split `test`, or on `val` where there is no other."""
    from dsgnn.data.check import splits_of
    from dsgnn.data.gaze import ANNOTATIONS

    images = splits_of(data)
    split = next((name for name in ("test", val) if images.get(name)), None)
    if split is None:
        return f"measure it on photos it was not trained on: dsgnn-eval {trained} --data FOLDER"
    more = f" --teacher {NANO if teacher == BUNDLED else teacher}" if teacher else ""
    if (Path(data) / ANNOTATIONS).is_file():  # no masks to compare with
        more = " --protocol gaze"
    return f"measure it with: dsgnn-eval {trained} --data {data} --split {split}{more}"


@click.command(cls=OneCommand, context_settings=HELP)
@click.argument(
    "model", required=False, metavar="[MODEL]", type=NanoOrPath(BUNDLED, dir_okay=False)
)
@click.option(
    "--predictions",
    metavar="FILE",
    type=click.Path(exists=True, path_type=Path),
    help="A results.json instead of a MODEL, from dsgnn-run or any method in its form; or the "
    "Parquet of dsgnn-batch, a file or its folder.",
)
@data_option()
@split_option()
@click.option(
    "--protocol",
    type=click.Choice(["dsgnn", "official", "gaze"]),
    default="dsgnn",
    show_default=True,
    help="As the published code, or SA-SOR as its authors, or against people: DATA is a "
    "folder with fixations.json, in COCO form with human_rank or fixations, or with "
    "images/ and masks/.",
)
@out_option("Write metrics.json, per_image.csv and results.json there.", "DIR", required=False)
@teacher_option()
@size_option("A checkpoint sees photos at this size, as a static artifact does.")
@click.option(
    "--worst",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Draw the N images of lowest SA-SOR and the truth, into DIR/worst.",
)
@click.option(
    "--if-none",
    type=click.Choice(["all", "none"]),
    help="Where no object passes the threshold, count all, as the published code does, "
    "or none.  [default: all; none with --protocol gaze]",
)
@backend_option("Inference library for an artifact.")
@device_option()
@threads_option("CPU threads of one inference.  [default: 1 where images have lanes]")
@lanes_option(
    "Images that are read, ranked and measured at the same time.  [default: as the cores and the "
    "memory allow for an artifact, else 1]"
)
@click.version_option(package_name="dsgnn")
def evaluate(model: Path | None, data: str, **options: Any) -> None:
    """Measure MODEL, a checkpoint (.safetensors) or an exported artifact, on a data set.

    \b
    dsgnn-eval runs/r50/best.safetensors --data ASSR --out scores --worst 20
    dsgnn-eval r50-assr.onnx --data ASSR --protocol official
    dsgnn-eval --predictions ranked/results.json --data IRSR
    dsgnn-eval nano.onnx --data composite:1000:material --teacher teacher.safetensors
    dsgnn-eval nano.onnx --data GAZE --protocol gaze --split val

    Artifacts and predictions need no PyTorch.

    Exit status: 0 done, 1 the data is broken, 2 wrong use, or the model cannot be run.
    """
    people = options["protocol"] == "gaze"
    options["if_none"] = options["if_none"] or ("none" if people else "all")
    if people and options.pop("worst"):
        raise click.UsageError("--worst draws the images of lowest SA-SOR: not for --protocol gaze")
    if people and options.pop("teacher"):
        raise click.UsageError("--teacher stands for people, whom --protocol gaze measures against")
    with reported(), needs("train"):
        if people:
            from dsgnn.evaluation import gaze

            del options["protocol"]
            shown = gaze.table(gaze.evaluate(model, data, **options))
        else:
            from dsgnn.evaluation.loop import evaluate as measure
            from dsgnn.evaluation.table import table

            shown = table(measure(model, data, **options))
    click.echo(shown)


@click.command(cls=OneCommand, context_settings=HELP)
@click.argument("data", metavar="DATA")
@split_option("Split, or several joined by +.", "train")
@teacher_option()
@click.version_option(package_name="dsgnn")
def check(data: str, split: str, teacher: Path | None) -> None:
    """List all that is wrong with a data set, before training finds out.

    \b
    dsgnn-check ASSR --split train+val

    Also says which splits there are, how many objects the images have and how large they are.
    Reads every image. Needs no PyTorch, but for weights of dsgnn.teacher. Without --teacher nothing
    is said about the ranks of data that has none.

    Exit status: 0 nothing is wrong, 1 problems (each named), 2 wrong use.
    """
    from tqdm import tqdm

    from dsgnn.data.check import check_folder, splits_of
    from dsgnn.teacher.looks import looks_of

    try:
        with needs("train"):
            looks = looks_of(teacher) if teacher else None
        report = check_folder(data, split, looks, lambda n: tqdm(n, unit="image", disable=None))
    except DataError as error:  # the set cannot be opened, so no image was looked at
        click.echo(str(error))
        raise SystemExit(1) from None
    except (DsgnnError, OSError) as error:
        raise click.UsageError(str(error)) from None
    click.echo("".join(f"{problem}\n" for problem in report.problems), nl=False)
    sizes = splits_of(data)
    splits = ", ".join(f"{name} {images}" for name, images in sizes.items())
    notes = [*report.remarks, *report.facts(), f"images of each split: {splits}"]
    if report.lacks_ranks:
        notes.append(f"--teacher {NANO} predicts them by the bundled model, and checks them too")
    if sizes.get("val") == 0:
        notes.append("there is none to evaluate on while training: dsgnn-train needs --val none")
    click.echo("".join(f"{note}\n" for note in notes), nl=False, err=True)
    click.echo(f"{report.images} images, {len(report.problems)} problems", err=True)
    if report.problems:
        raise SystemExit(1)
