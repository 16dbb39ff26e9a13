"""dsgnn-bench: parse the command line, call the harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from dsgnn.options import (
    FILE,
    NEW_FILE,
    backends_option,
    data_option,
    images_option,
    needs,
    refusals,
    seed_option,
    size_option,
    split_option,
    teacher_option,
)
from dsgnn.runtime.console import (
    HELP,
    CommandGroup,
    backend_option,
    device_option,
    lanes_option,
    out_option,
    threads_option,
)

unverified_option = click.option(
    "--allow-unverified", is_flag=True, help="Take unverified artifacts, and mark them."
)


def duration_option(text: str, default: float) -> Callable[[Any], Any]:
    return click.option(
        "--duration",
        "duration_s",
        type=click.FloatRange(0),
        default=default,
        show_default=True,
        metavar="S",
        help=text,
    )


@contextmanager
def measuring(options: str = "") -> Iterator[None]:
    """What cannot be measured as asked ends with status 2, a file that cannot be read or written
    with 1. options: those of this command that may help."""
    with needs("bench"), refusals(f"\nSee {options}." if options else ""):
        try:
            yield
        except OSError as error:
            raise click.ClickException(str(error)) from None


def _batches(_: click.Context, __: click.Parameter, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"expected batch sizes such as 1,2,4,8, got {text!r}")
    return sorted({int(part) for part in parts})


@click.group(cls=CommandGroup, context_settings=HELP)
@click.version_option(package_name="dsgnn")
def main() -> None:
    """Latency and accuracy of the same artifact, measured so that they can be quoted.

    \b
    dsgnn-bench latency --synthetic nano model.onnx --out bench
    dsgnn-bench accuracy model.onnx --data ASSR --against model.safetensors --out bench
    dsgnn-bench crops --data gaze --out bench
    dsgnn-bench report bench/latency.json bench/accuracy.json -o report.html
    dsgnn-bench compare first/latency.json second/latency.json
    """


@main.command(context_settings=HELP)
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option(
    "--synthetic",
    multiple=True,
    metavar="CONFIG",
    help="A configuration with random weights, in the forms below.",
)
@click.option(
    "--form",
    "forms",
    multiple=True,
    type=click.Choice(["upstream", "deploy", "compiled", "straightforward"]),
    help="A form of checkpoints and --synthetic; repeat it.  [default: all; on a GPU all but "
    "straightforward]",
)
@backends_option("A library for artifacts; repeat it to compare.  [default: by what is installed]")
@device_option(default="cpu")
@click.option(
    "--batch",
    "batches",
    default="1",
    show_default=True,
    callback=_batches,
    metavar="1,2,4,8",
    help="Photos at once.",
)
@threads_option("CPU threads of every model.", 2)
@duration_option("Timed seconds at least, per model and batch size.", 20.0)
@click.option(
    "--runs", type=click.IntRange(1), default=30, show_default=True, help="Timed runs at least."
)
@size_option("Input of checkpoints.  [default: 4:3 at the configuration's size]")
@click.option("--cuda-graph", is_flag=True, help="Also the deploy graph as a CUDA graph.")
@unverified_option
@seed_option("For random weights and the order of turns.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@out_option("The folder that gets latency.json.")
def latency(
    models: tuple[str, ...],
    synthetic: tuple[str, ...],
    forms: tuple[str, ...],
    backends: tuple[str, ...],
    batches: list[int],
    duration_s: float,
    runs: int,
    cuda_graph: bool,
    seed: int,
    resume: bool,
    out: Path,
    **options: Any,
) -> None:
    """Time models, interleaved: checkpoints (.safetensors) and exported artifacts.

    \b
    dsgnn-bench latency --synthetic r50-assr r50.onnx --backend onnxruntime --backend openvino \\
        --out bench
    dsgnn-bench latency model.safetensors --form upstream --form deploy --batch 1,8 --out bench
    """
    if not models and not synthetic:
        raise click.UsageError("give a MODEL file or --synthetic CONFIG")
    with measuring("--resume, --out, --form, --device and --allow-unverified"):
        from dsgnn.benchmarks.forms import DEFAULT_FORMS, specs
        from dsgnn.benchmarks.latency import FILE, baseline
        from dsgnn.benchmarks.latency import latency as run
        from dsgnn.benchmarks.report.compare import compare
        from dsgnn.benchmarks.report.words import milliseconds
        from dsgnn.benchmarks.timing import Plan

        usual = DEFAULT_FORMS["cpu" if options["device"] == "cpu" else "cuda"]
        chosen = (*(forms or usual), *(("cuda-graph",) if cuda_graph else ()))
        plan = Plan.of(duration_s, runs, seed)
        found = specs(models, synthetic, chosen, backends, seed=seed, **options)
        results = run(found, batches, plan, out, resume=resume, progress=True)
        click.echo(f"time ÷ {baseline(results['rows'])}, with 95% intervals:")
        click.echo(compare(results))
        click.echo(milliseconds(results))
    click.echo(f"{out / FILE} written")


@main.command(context_settings=HELP)
@click.argument("models", nargs=-1, metavar="MODEL...")
@data_option()
@split_option()
@teacher_option()
@click.option(
    "--against",
    metavar="CKPT",
    type=FILE,
    help="The checkpoint the artifacts were exported from: differences to it, answer by answer and "
    "in accuracy.",
)
@click.option(
    "--against-synthetic", metavar="CONFIG", help="The same for artifacts with random weights."
)
@backends_option("A library for artifacts; repeat it.")
@device_option(default="cpu")
@threads_option("CPU threads.", 2)
@unverified_option
@click.option("--resume", is_flag=True, help="Measure only what is not in the folder yet.")
@out_option("The folder that gets accuracy.json.")
def accuracy(
    models: tuple[str, ...],
    data: str,
    split: str,
    teacher: Path | None,
    against: Path | None,
    against_synthetic: str | None,
    backends: tuple[str, ...],
    resume: bool,
    out: Path,
    **options: Any,
) -> None:
    """Measure the very files that were timed: SA-SOR, SOR, MAE, recall, IoU, and parity.

    \b
    dsgnn-bench accuracy model.onnx --data ASSR --against model.safetensors --out bench
    """
    if against and against_synthetic:
        raise click.UsageError("give either --against or --against-synthetic")
    with measuring("--resume, --out, --against, --teacher and --allow-unverified"):
        from dsgnn.benchmarks.accuracy import FILE
        from dsgnn.benchmarks.accuracy import accuracy as run
        from dsgnn.benchmarks.forms import Spec, specs

        found = specs(models, (), ("upstream",), backends, **options)
        reference = str(against or against_synthetic or "")
        source = Spec("upstream", reference, bool(against_synthetic)) if reference else None
        run(found, data, split, out, teacher=teacher, against=source, resume=resume, progress=True)
    click.echo(f"{out / FILE} written")


@main.command(context_settings=HELP)
@click.argument("config", metavar="CONFIG|CKPT")
@click.option(
    "--artifact",
    "artifacts",
    multiple=True,
    type=FILE,
    help="ONNX files and engines of the same network; repeat it.",
)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    help="Batch size, to be repeated; by default 1, 2, 4, 8, 16 and 32.",
)
@images_option("Photos to compare the answers on, besides the packaged ones.")
@click.option("--limit", "limit_s", type=float, default=540.0, show_default=True, help="Seconds.")
@device_option(default="cuda")
@unverified_option
@out_option("The folder that gets gpu.json.")
def gpu(
    config: str,
    artifacts: tuple[Path, ...],
    batches: tuple[int, ...],
    images: Path | None,
    limit_s: float,
    out: Path,
    **options: Any,
) -> None:
    """Compare the answers of every form on a GPU with the CPU's, and fill the GPU table.

    \b
    dsgnn-export onnx --synthetic r50-assr -o r50.onnx
    dsgnn-bench gpu r50-assr --artifact r50.onnx --out bench
    """
    with measuring("--out and --allow-unverified"):
        from dsgnn.benchmarks.forms import Spec
        from dsgnn.benchmarks.gpu import BATCHES, FILE, fill
        from dsgnn.export.parity.comparison import parity_photos

        synthetic = not config.endswith(".safetensors")
        spec = Spec("deploy", config, synthetic, **options)
        photos = parity_photos(images)
        fill(spec, artifacts, out, batches or BATCHES, photos, limit_s=limit_s, progress=True)
    click.echo(f"{out / FILE} written")


@main.command(context_settings=HELP)
@click.argument("model", required=False, type=FILE)
@click.option("--images", type=int, default=240, show_default=True, help="Photos of each turn.")
@threads_option("CPU threads of each worker.", 1)
@click.option("--rounds", type=int, default=3, show_default=True, help="Turns of each arm.")
@out_option("The folder that gets scaling.json.")
def scaling(model: Path | None, images: int, threads: int, rounds: int, out: Path) -> None:
    """What Ray Data and Ray Serve cost per image here, against a single process.

    \b
    pip install 'dsgnn[cpu,ray,serve]'
    dsgnn-bench scaling --out bench
    """
    with measuring("--images, --rounds and --out"):
        from dsgnn.benchmarks.report.tables import markdown
        from dsgnn.benchmarks.scaling import FILE, table
        from dsgnn.benchmarks.scaling import scaling as run

        click.echo(markdown(table(run(model, images, threads, rounds, out))))
    click.echo(f"{out / FILE} written")


@main.command(context_settings=HELP)
@click.argument("target", metavar="MODEL|http://127.0.0.1:PORT")
@click.option(
    "--model",
    type=FILE,
    help="The artifact that the server runs, to check its answers by.  [default: the bundled one]",
)
@lanes_option(
    "Photos in flight at once.  [default: as many as dsgnn-run has lanes; 64 connections]", None
)
@click.option(
    "--p99",
    "p99_ms",
    type=click.FloatRange(0, min_open=True),
    default=100.0,
    show_default=True,
    metavar="MS",
    help="What 99% of the photos must keep in the server scenario.",
)
@duration_option("Seconds at least of each of the seven tests.", 60.0)
@click.option(
    "--queries",
    type=click.IntRange(1),
    default=1500,
    show_default=True,
    help="Photos at least of each test; with fewer than 662 LoadGen tells no p99.",
)
@backend_option()
@device_option(default="cpu")
@threads_option("CPU threads of each inference.", 2)
@unverified_option
@seed_option("For arrivals.")
@out_option("The folder that gets load.json and LoadGen's logs.")
def load(target: str, out: Path, **options: Any) -> None:
    """Put an artifact, or a dsgnn-serve on this machine, under the load of MLPerf's LoadGen.

    Single-stream sends one photo after the other, offline all at once, and server at random times
    (Poisson). Between no rate and the throughput of offline, five tests halve their way to the
    highest rate that keeps --p99. Every answer must be the ranking of the photo alone.

    \b
    dsgnn-bench load nano.onnx --out bench
    dsgnn-bench load http://127.0.0.1:8000 --out bench-server
    """
    with measuring("--lanes, --p99, --queries, --allow-unverified and --out"):
        from dsgnn.benchmarks.load.run import FILE, summary, table
        from dsgnn.benchmarks.load.run import load as run
        from dsgnn.benchmarks.report.tables import markdown

        results = run(target, out, **options)
        click.echo(markdown(table(results)))
        click.echo(summary(results))
    click.echo(f"{out / FILE} written")


@main.command(context_settings=HELP)
@click.argument("model", required=False, type=FILE)
@data_option("Folder with fixations.json and images, of photos that people looked at.", "GAZE")
@split_option("train, val, test or all.")
@click.option(
    "--aspect", default="1:1,4:5,9:16", show_default=True, metavar="W:H,...", help="Of the crops."
)
@device_option(default="cpu")
@threads_option("CPU threads.", 2)
@out_option("The folder that gets crops.json.")
def crops(
    model: Path | None, data: str, split: str, aspect: str, device: str, threads: int, out: Path
) -> None:
    """Share of people's fixations that stays in a crop: ours, other tools', and the best possible.

    MODEL is an artifact or a checkpoint, the bundled artifact by default.

    \b
    dsgnn-bench crops --data gaze --out bench
    """
    with measuring("--data, --split, --aspect and --out"):
        from dsgnn.benchmarks.crops import FILE, summary
        from dsgnn.benchmarks.crops import crops as run
        from dsgnn.runtime.framing import parse_aspects

        ratios = parse_aspects(aspect)
        results = run(
            model, data, split, out, ratios, device=device, threads=threads, progress=True
        )
        click.echo(summary(results))
    click.echo(f"{out / FILE} written")


@main.command(context_settings=HELP)
@click.argument("results", nargs=-1, required=True, type=FILE)
@out_option("The HTML page; the Markdown goes beside it.", kind=NEW_FILE, required=False)
@click.option(
    "--readme", type=FILE, help="Replace what stands between <!-- bench --> and <!-- /bench -->."
)
def report(results: tuple[Path, ...], out: Path | None, readme: Path | None) -> None:
    """Latency, accuracy, scaling and GPU results as one self-contained page.

    \b
    dsgnn-bench report bench/latency.json bench/accuracy.json -o report.html --readme README.md
    """
    with measuring():
        from dsgnn.benchmarks.report.page import report as write

        text = write(results, out, readme)
    click.echo(text)


@main.command(context_settings=HELP)
@click.argument("a", type=FILE)
@click.argument("b", required=False, type=FILE)
@click.option(
    "--baseline",
    metavar="NAME",
    help="What ratios are to.  [default: PyTorch as upstream, or the first row]",
)
def compare(a: Path, b: Path | None, baseline: str | None) -> None:
    """Ratios with 95% intervals: within run A, and between the same models of A and B.

    \b
    dsgnn-bench compare first/latency.json second/latency.json
    """
    with measuring():
        from dsgnn.benchmarks.report.compare import compare as ratios
        from dsgnn.benchmarks.results import load as read

        text = ratios(read(a), read(b) if b else None, baseline)
    click.echo(text)
