"""`dsgnn-export`: checkpoints to deployable artifacts."""

from __future__ import annotations

from pathlib import Path

import click

from dsgnn.cli import needs
from dsgnn.runtime.backends import BACKENDS
from dsgnn.runtime.errors import ArtifactError, BackendError, CheckpointError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dsgnn")
def main() -> None:
    """Export checkpoints to artifacts that are proven to give the same answers.

    \b
    Example:
      dsgnn-export onnx model.safetensors -o model.onnx
    """


def _size(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | str | None:
    from dsgnn.runtime.letterbox import parse_size

    if value is None or value == "dynamic":
        return value
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}; or give dynamic") from None


def _check_output(path: Path, *suffixes: str) -> None:
    """Before minutes of work: the file can be written where it is asked for."""
    if path.suffix not in suffixes:
        raise click.UsageError(f"the output must end in {' or '.join(suffixes)}, got {path.name}")
    if not path.parent.is_dir():
        raise click.UsageError(f"there is no folder {path.parent} to write {path.name} in")


@main.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="File to write."
)
@click.option("--size", callback=_size, help="HxW in pixels, multiples of 32, or dynamic. "
              "Default: 4:3 at the configuration's size.")  # fmt: skip
@click.option(
    "--precision",
    type=click.Choice(["fp32", "w16", "fp16", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="w16: float32 arithmetic, weights stored as float16 (half the file). fp16, bf16: typed "
    "graphs for GPUs, with islands of float32. int8: convolutions in eight bits, for CPUs.",
)
@click.option("--calibrate", metavar="DIR", help="Photos like those to be ranked, for int8: its "
              "ranges come from them.",
              type=click.Path(exists=True, file_okay=False, path_type=Path))  # fmt: skip
@click.option("--deform", type=click.Choice(["gridsample", "gather"]), default="gridsample",
              show_default=True, help="How deformable attention samples.")  # fmt: skip
@click.option("--synthetic", metavar="CONFIG", help="Random weights of a configuration, in place "
              "of a checkpoint (benchmarks).")  # fmt: skip
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="More photos for the parity check.")  # fmt: skip
def onnx(
    checkpoint: Path | None,
    output: Path,
    size: tuple[int, int] | str | None,
    precision: str,
    calibrate: Path | None,
    deform: str,
    synthetic: str | None,
    images: Path | None,
) -> None:
    """Write the deploy graph of CHECKPOINT as ONNX, once it matches PyTorch on real photos.

    \b
    Example:
      dsgnn-export onnx model.safetensors -o model.int8.onnx --precision int8 --calibrate photos
    """
    with needs("export"):
        from dsgnn.export.onnx import default_size, export_onnx, read_source
        from dsgnn.export.parity import ParityError, folder_photos, parity_photos, table

    _check_output(output, ".onnx")
    try:
        source = read_source(checkpoint, synthetic)
        chosen = default_size(source.model.config) if size is None else size
        sidecar, results = export_onnx(
            source, output, parity_photos(images), chosen if isinstance(chosen, tuple) else None,
            precision, deform, folder_photos(calibrate) if calibrate else (),
        )  # fmt: skip
    except (CheckpointError, BackendError, ValueError, OverflowError, OSError) as error:
        raise click.UsageError(str(error)) from None
    except ParityError as error:
        raise click.ClickException(str(error)) from None
    click.echo(table(results) if results else sidecar.build["not_run"])
    status = "verified" if sidecar.verified else "unverified"
    click.echo(f"{output}: {status}, {output.stat().st_size / 1e6:.1f} MB, "
               f"{sidecar.build['nodes']} nodes, sha256 {sidecar.sha256[:12]}…")  # fmt: skip


def _integers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(",") if part)
    except ValueError:
        raise click.BadParameter(f"expected numbers such as 1,2,8, got {value!r}") from None


@main.command()
@click.argument("source", metavar="M.onnx", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The engine.")
@click.option("--flavour", type=click.Choice(["tensorrt", "tensorrt-rtx"]), default="tensorrt-rtx",
              show_default=True, help="The library.")  # fmt: skip
@click.option("--batch", callback=_integers, default="1,1,1", show_default=True,
              help="Batch sizes min,opt,max; all equal: a static batch.")  # fmt: skip
@click.option("--sm", callback=_integers, default="", help="GPU generations for tensorrt-rtx, such "
              "as 89,120; tensorrt builds for the GPU that is present.")  # fmt: skip
@click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="Scratch memory at most.")
@click.option("--timing-cache", type=click.Path(dir_okay=False, path_type=Path),
              help="Measurements of earlier builds, read and added to (tensorrt).")  # fmt: skip
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="More photos for the parity check.")  # fmt: skip
def tensorrt(
    source: Path,
    output: Path,
    flavour: str,
    batch: tuple[int, ...],
    sm: tuple[int, ...],
    workspace: int | None,
    timing_cache: Path | None,
    images: Path | None,
) -> None:
    """Build an engine of M.onnx, and compare the two if this machine can run the engine.

    \b
    Example:
      dsgnn-export tensorrt model.onnx -o model.engine --sm 89,120 --batch 1,1,8
    """
    with needs("export"):
        from dsgnn.export.parity import ParityError, parity_photos, table
        from dsgnn.export.tensorrt import BuildError, build_engine

    _check_output(output, ".engine", ".plan")
    try:
        sidecar, results = build_engine(
            source, output, parity_photos(images), flavour, batch, sm, workspace, timing_cache
        )
    except (BuildError, ParityError) as error:
        raise click.ClickException(str(error)) from None
    except (BackendError, ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from None
    click.echo(table(results) if results else f"not compared: {sidecar.build['not_run']}")
    status = "verified" if sidecar.verified else "unverified"
    click.echo(f"{output}: {status}, {sidecar.build['bytes'] / 1e6:.1f} MB, "
               f"{sidecar.build['layers']} layers, {sidecar.build['seconds']} s; log in "
               f"{output.name}.log")  # fmt: skip


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", required=True, type=click.Path(path_type=Path),
              help="The checkpoint it came from, or an ONNX file of the same network.")  # fmt: skip
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="More photos for the parity check.")  # fmt: skip
@click.option("--backend", type=click.Choice(["auto", *BACKENDS]), default="auto",
              show_default=True, help="What runs the artifact.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def verify(artifact: Path, against: Path, images: Path | None, backend: str, device: str) -> None:
    """Compare ARTIFACT with what it was made from, on this machine; its sidecar keeps the outcome.

    \b
    Example:
      dsgnn-export verify model.onnx --against model.safetensors
    """
    with needs("export"):
        from dsgnn.export.parity import ParityError, parity_photos, table
        from dsgnn.export.verify import verify as run
        from dsgnn.runtime.artifact import open_artifact

    try:
        photos = parity_photos(images)
        sidecar, results = run(artifact, against, photos, backend, device)
        facts = open_artifact(artifact).description
    except (ArtifactError, BackendError, CheckpointError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from None
    except ParityError as error:
        raise click.ClickException(str(error)) from None
    click.echo(table(results))
    reported = facts.weights == "synthetic" and facts.precision != "fp32"
    if not sidecar.verified and not reported:
        raise click.ClickException(f"{artifact} does not give the answers of {against}: do not "
                                   "use it; export again, with --deform gather or another "
                                   "precision")  # fmt: skip
    click.echo(f"{artifact}: {'verified' if sidecar.verified else 'unverified'}")


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
def inspect(artifact: Path) -> None:
    """Say what is known about ARTIFACT: facts, checks, how it was built, what is in its graph."""
    with needs("export"):
        from dsgnn.export.verify import summary

    try:
        click.echo(summary(artifact))
    except (ArtifactError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from None


@main.command()
@click.argument("sources", nargs=-1, required=True, metavar="M.onnx|M.engine...",
                type=click.Path(path_type=Path))  # fmt: skip
@click.option("-o", "--output", required=True, metavar="REPO", help="The model repository.",
              type=click.Path(file_okay=False, path_type=Path))  # fmt: skip
@click.option("--name", help="Of the model on the server.  [default: the first file's]")
@click.option("--max-batch", type=int, metavar="N",
              help="Images per inference of an ONNX file.  [default: 8]")  # fmt: skip
@click.option("--instances", type=int, default=1, show_default=True, help="Copies on each device.")
@click.option("--gpu", is_flag=True, help="Run an ONNX file on GPUs instead of CPUs.")
@click.option("--delay", type=float, default=5.0, show_default=True, metavar="MS",
              help="Wait so long at most for requests that share an inference.")  # fmt: skip
def triton(
    sources: tuple[Path, ...],
    output: Path,
    name: str | None,
    max_batch: int | None,
    instances: int,
    gpu: bool,
    delay: float,
) -> None:
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

    try:
        folder = write_repository(sources, output, name, max_batch, instances, gpu, delay)
    except ImportError as error:
        raise click.UsageError(f"{error.name} is missing: pip install 'dsgnn[triton]'") from None
    except (BackendError, ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"{folder}: start Triton with --model-repository {output}")


@main.command(name="round")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="File to write."
)
def round_(checkpoint: Path, output: Path) -> None:
    """Round the weights of CHECKPOINT to float16 values, for a w16 export that loses nothing."""
    with needs("export"):
        from dsgnn.export.half import round_weights
        from dsgnn.weights.checkpoint import load_checkpoint, save_checkpoint

    _check_output(output, ".safetensors")
    try:
        model, weights = load_checkpoint(checkpoint)
        save_checkpoint(output, round_weights(model), weights)
    except (CheckpointError, OSError) as error:
        raise click.UsageError(str(error)) from None
