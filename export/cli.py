"""`dsgnn-export`: checkpoints to deployable artifacts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from dsgnn.options import (
    FOLDER,
    NEW_FILE,
    CheckpointFile,
    NanoOrPath,
    check_output,
    images_option,
    needs,
    refusals,
    size_option,
)
from dsgnn.runtime.console import HELP, CommandGroup, backend_option, device_option, out_option
from dsgnn.runtime.ranker import BUNDLED

PATH = click.Path(path_type=Path)


@click.group(cls=CommandGroup, context_settings=HELP)
@click.version_option(package_name="dsgnn")
def main() -> None:
    """Export checkpoints to artifacts that are proven to give the same answers.

    \b
    Example:
      dsgnn-export onnx model.safetensors -o model.onnx

    Exit status: 0 done, 1 the artifact could not be built or gives other answers, 2 wrong use.
    """


@contextmanager
def _gate(advice: str) -> Iterator[None]:
    """An artifact that was refused or not built ends the command with status 1, wrong use with 2.

    advice: the options that may change the verdict.
    """
    from dsgnn.export.parity.built import SamplingError
    from dsgnn.export.parity.limits import ParityError
    from dsgnn.export.tensorrt import BuildError

    with refusals():
        try:
            yield
        except ParityError as error:
            raise click.ClickException(f"{error}\n{advice}") from None
        except (BuildError, SamplingError) as error:
            raise click.ClickException(str(error)) from None


@main.command()
@click.argument("checkpoint", required=False, type=CheckpointFile())
@out_option("The ONNX file to write.", kind=PATH)
@size_option(
    "Height and width in pixels, multiples of 32, or dynamic.  [default: 4:3 at the "
    "configuration's size]",
    dynamic=True,
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "w16", "fp16", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="w16: float32 arithmetic, weights stored as float16 (half the file). fp16, bf16: typed "
    "graphs for GPUs, with islands of float32. int8: convolutions in eight bits, which are faster "
    "than float32 in OpenVINO and slower in ONNX Runtime.",
)
@click.option(
    "--calibrate",
    metavar="DIR",
    type=FOLDER,
    help="Photos like those to be ranked. int8 takes its ranges from them.",
)
@click.option(
    "--deform",
    type=click.Choice(["gridsample", "gather"]),
    default="gridsample",
    show_default=True,
    help="How deformable attention samples. Where the answers by gridsample are others, gather is "
    "tried by itself.",
)
@click.option(
    "--synthetic",
    metavar="CONFIG",
    help="Random weights of a configuration, in place of a checkpoint (benchmarks).",
)
@click.option(
    "--keep-unverified",
    is_flag=True,
    help="Write the file, marked as unverified, even if it gives other answers.",
)
@images_option()
def onnx(
    checkpoint: Path | None,
    out: Path,
    size: tuple[int, int] | str | None,
    precision: str,
    calibrate: Path | None,
    deform: str,
    synthetic: str | None,
    keep_unverified: bool,
    images: Path | None,
) -> None:
    """Write the deploy graph of CHECKPOINT as ONNX, once it matches PyTorch on real photos.

    \b
    Example:
      dsgnn-export onnx model.safetensors -o model.int8.onnx --precision int8 --calibrate photos
    """
    check_output(out, ".onnx")
    if (checkpoint is None) == (synthetic is None):
        raise click.UsageError("give either a checkpoint or --synthetic CONFIG")
    if precision == "int8" and calibrate is None:
        raise click.UsageError("int8 needs photos like those to be ranked: give --calibrate DIR")
    with needs("export"):
        from dsgnn.export.onnx import default_size, export_onnx, read_source
        from dsgnn.export.parity.comparison import folder_photos, parity_photos
        from dsgnn.export.parity.limits import table

    with _gate("Options: another --precision, or --keep-unverified."):
        source = read_source(checkpoint, synthetic)
        chosen = default_size(source.model.config) if size is None else size
        sidecar, results = export_onnx(
            source,
            out,
            parity_photos(images),
            chosen if isinstance(chosen, tuple) else None,
            precision,
            deform,
            folder_photos(calibrate) if calibrate else (),
            keep_unverified=keep_unverified,
        )
    click.echo(table(results) if results else sidecar.build["not_run"])
    status = "verified" if sidecar.verified else "unverified"
    size_mb, nodes = out.stat().st_size / 1e6, sidecar.build["nodes"]
    click.echo(f"{out}: {status}, {size_mb:.1f} MB, {nodes} nodes, sha256 {sidecar.sha256[:12]}…")


def _integers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(",") if part)
    except ValueError:
        raise click.BadParameter(f"expected numbers such as 1,2,8, got {value!r}") from None


@main.command()
@click.argument("source", metavar="M.onnx", type=PATH)
@out_option("The engine to write, .engine or .plan.", kind=PATH)
@click.option(
    "--flavour",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    default="tensorrt",
    show_default=True,
    help="The library to build with. tensorrt builds for the GPU that is present; tensorrt-rtx "
    "builds for the GPU generations that --sm names, and needs no GPU to build.",
)
@click.option(
    "--batch",
    callback=_integers,
    default="1,1,1",
    show_default=True,
    help="Batch sizes min,opt,max; all equal: a static batch.",
)
@click.option(
    "--sm", callback=_integers, default="", help="GPU generations for tensorrt-rtx, such as 89,120."
)
@click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="Scratch memory at most.")
@click.option(
    "--timing-cache",
    type=NEW_FILE,
    help="Measurements of earlier builds, read and added to (tensorrt).",
)
@images_option()
def tensorrt(
    source: Path,
    out: Path,
    flavour: str,
    batch: tuple[int, ...],
    sm: tuple[int, ...],
    workspace: int | None,
    timing_cache: Path | None,
    images: Path | None,
) -> None:
    """Build an engine of M.onnx, and compare the two if this machine can run the engine.

    An engine takes photos of one size, so that M.onnx must have one too.

    \b
    Example:
      dsgnn-export onnx model.safetensors -o model.onnx --size 448x576
      dsgnn-export tensorrt model.onnx -o model.engine --batch 1,1,8
      dsgnn-export tensorrt model.onnx -o model.engine --flavour tensorrt-rtx --sm 89,120
    """
    from dsgnn.export.engine_options import check_options
    from dsgnn.runtime.artifact import open_artifact

    check_output(out, ".engine", ".plan")
    with refusals(
        "\nFor one size: dsgnn-export onnx CHECKPOINT -o M.onnx --size HxW. For the rest see "
        "--flavour, --batch and --sm."
    ):
        check_options(open_artifact(source), flavour, batch, sm, timing_cache)
    with needs("export"):
        from dsgnn.export.parity.comparison import parity_photos
        from dsgnn.export.parity.limits import table
        from dsgnn.export.tensorrt import build_engine

    with _gate("Options of `dsgnn-export onnx`: another --precision."):
        sidecar, results = build_engine(
            source, out, parity_photos(images), flavour, batch, sm, workspace, timing_cache
        )
    click.echo(table(results) if results else f"not compared: {sidecar.build['not_run']}")
    status, build = "verified" if sidecar.verified else "unverified", sidecar.build
    click.echo(
        f"{out}: {status}, {build['bytes'] / 1e6:.1f} MB, {build['layers']} layers, "
        f"{build['seconds']} s; log in {out.name}.log"
    )


@main.command()
@click.argument("artifact", type=PATH)
@click.option(
    "--against",
    required=True,
    type=CheckpointFile(),
    help="The checkpoint it came from, or an ONNX file of the same network.",
)
@images_option()
@backend_option("What runs the artifact.")
@device_option("auto, cpu, cuda or cuda:N.")
def verify(artifact: Path, against: Path, images: Path | None, backend: str, device: str) -> None:
    """Compare ARTIFACT with what it was made from, on this machine; its sidecar keeps the outcome.

    \b
    Example:
      dsgnn-export verify model.onnx --against model.safetensors
    """
    with needs("export"):
        from dsgnn.export.parity.comparison import parity_photos
        from dsgnn.export.parity.limits import only_reported, table
        from dsgnn.export.verify import verify as run
        from dsgnn.runtime.artifact import open_artifact

    with _gate(""):
        photos = parity_photos(images)
        _, results = run(artifact, against, photos, backend, device)
        reported = only_reported(open_artifact(artifact).description)
    click.echo(table(results))
    verified = all(result.passed for result in results)
    if not verified and not reported:
        raise click.ClickException(
            f"{artifact} does not give the answers of {against} here: do not use it so; take "
            "another --backend, or export again with --deform gather or another precision"
        )
    click.echo(f"{artifact}: {'verified' if verified else 'unverified'}")


@main.command()
@click.argument("artifact", type=PATH)
def inspect(artifact: Path) -> None:
    """Say what is known about ARTIFACT: facts, checks, how it was built, what is in its graph."""
    with needs("export"):
        from dsgnn.export.verify import summary

    with refusals():
        click.echo(summary(artifact))


@main.command()
@click.argument("sources", nargs=-1, required=True, metavar="M.onnx|M.engine...", type=PATH)
@out_option("The model repository.", "REPO")
@click.option("--name", help="The model's name on the server.  [default: the first file's]")
@click.option(
    "--max-batch", type=int, metavar="N", help="Images per inference of an ONNX file.  [default: 8]"
)
@click.option("--instances", type=int, default=1, show_default=True, help="Copies on each device.")
@click.option("--gpu", is_flag=True, help="Run an ONNX file on GPUs instead of CPUs.")
@click.option(
    "--delay",
    "delay_ms",
    type=float,
    default=5.0,
    show_default=True,
    metavar="MS",
    help="A request waits at most so long for others to share its inference with.",
)
def triton(sources: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Write a model of Triton Inference Server: an ONNX file, or engines of one network for several
    generations of GPUs, of which Triton takes the one that fits.

    The engines are TensorRT's, built with batches from 1 up, and run in the Triton release that has
    their version of TensorRT. dsgnn.runtime.backends.triton is the client. The configuration is
    checked with Triton's own schema; it has not met a real server.

    \b
    Example:
      dsgnn-export triton model.onnx -o repository
      dsgnn-export triton l4.engine a100.engine -o repository --name sor --instances 2
    """
    with needs("export"):
        from dsgnn.export.triton import write_repository

    with needs("triton"), refusals():
        folder = write_repository(sources, out, **options)
    click.echo(f"{folder}: start Triton with --model-repository {out}")


@main.command()
@click.argument("model", metavar="M.onnx", type=NanoOrPath(BUNDLED, exists=False))
@out_option("The folder to write.", "SITE")
@click.option(
    "--runtime",
    type=FOLDER,
    help="The npm package onnxruntime-web, unpacked.  [default: it is fetched once and kept]",
)
def web(model: Path, out: Path, runtime: Path | None) -> None:
    """Write a folder that ranks photos by M.onnx in the visitor's own browser, on any web server.

    Photos stay on the visitor's machine. M.onnx may be nano, the bundled model.

    \b
    Example:
      dsgnn-export web nano -o site
      python -m http.server --directory site
    """
    from dsgnn.export.web.site import build_site

    with refusals("\nOptions: --runtime FOLDER for the library, -o for the site's folder."):
        parts = build_site(model, out, runtime)
    lines = [f"{part.bytes / 1e6:6.1f} MB  {part.name}" for part in parts]
    click.echo("\n".join([*lines, f"{out}: serve it with python -m http.server --directory {out}"]))


@main.command(name="round")
@click.argument("checkpoint", type=CheckpointFile())
@out_option("The .safetensors file to write.", kind=PATH)
def round_(checkpoint: Path, out: Path) -> None:
    """Round the weights of CHECKPOINT to float16 values, for a w16 export that loses nothing."""
    with needs("export"):
        from dsgnn.export.round_weights import round_weights
        from dsgnn.weights.checkpoint import load_checkpoint, origin_of, save_checkpoint

    check_output(out, ".safetensors")
    with refusals():
        model, weights = load_checkpoint(checkpoint)
        save_checkpoint(out, round_weights(model), weights, origin_of(checkpoint), compact=True)
