"""dsgnn-run: rank photos and videos."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the outputs, made if missing.",
)
@click.option(
    "--model",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="ONNX file made by dsgnn-export.  [default: the bundled nano]",
)
@click.option(
    "--save",
    default="overlay,json",
    show_default=True,
    metavar="KINDS",
    help="What to write: some of overlay,map,masks,crops,json.",
)
@click.option(
    "--palette",
    type=click.Choice(["assr", "irsr"]),
    default="assr",
    show_default=True,
    help="Greys of the map: 255 229 204 178 153 by rank, or shares of 255.",
)
@click.option(
    "--threshold",
    type=float,
    metavar="SCORE",
    help="Keep objects scored above this, 0 to 1.  [default: the model's own]",
)
@click.option(
    "--if-none",
    type=click.Choice(["none", "all"]),
    default="none",
    show_default=True,
    help="Where no object passes, give none, or all as the published code does.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "openvino"]),
    default="auto",
    show_default=True,
    help="Inference library.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=int, help="CPU threads of one inference.  [default: 2]")
@click.version_option(package_name="dsgnn")
def main(
    sources: tuple[str, ...],
    out: Path,
    model: Path | None,
    save: str,
    palette: str,
    threshold: float | None,
    if_none: str,
    backend: str,
    device: str,
    threads: int | None,
) -> None:
    """Rank what people look at first in photos and videos.

    A SOURCE is an image, a video, a folder (with its sub-folders), a quoted pattern such as
    'trip/**/*.jpg', or - for the bytes of one image on standard input.

    \b
    dsgnn-run photo.jpg --out ranked
    dsgnn-run holidays clip.mp4 --out ranked --save overlay,crops,json
    dsgnn-run - --out ranked < photo.jpg

    \b
    What photo.jpg and clip.mp4 give in DIR:
      overlay  photo.overlay.jpg  objects tinted, outlined and numbered
               clip.overlay.mp4
      map      photo.map.png      ranks as greys
      masks    photo.mask1.png …  one per object, 1 = most salient
      crops    photo.crop1.png …  objects cut out, transparent around
      json     results.json       ranks, boxes and masks
               clip.frames.jsonl  the same for each frame
    Videos have no map, masks or crops.

    The sub-folders of a folder source are kept. Inputs of one run that would share a name keep
    their suffix and, if need be, parent folders: photo.png.overlay.jpg, b/photo.jpg.overlay.jpg.
    Files of these names from an earlier run are replaced; nothing else in DIR is touched.

    Exit status: 0 all done, 1 some inputs failed (they are named), 2 wrong use or configuration.
    """
    from dsgnn.runtime.ranker import Ranker
    from dsgnn.runtime.run import run, silence_opencv
    from dsgnn.runtime.save import make_folder, parse_kinds
    from dsgnn.runtime.sources import find_sources

    silence_opencv()
    try:
        kinds = parse_kinds(save)
        found = find_sources(sources, out)
        ranker = Ranker(model, backend, device, threads, threshold, if_none)
        make_folder(out)
    except (ValueError, OSError, RuntimeError) as error:
        raise click.UsageError(str(error)) from error
    click.echo(ranker, err=True)
    if found.passed_over:
        click.echo(f"passed over as neither image nor video: {found.passed_over}", err=True)
    try:
        summary = run(ranker, found.sources, out, kinds, palette)
    except OSError as error:
        raise click.ClickException(f"results.json cannot be written: {error}") from error
    click.echo(summary)
    sys.exit(1 if summary.failures else 0)
