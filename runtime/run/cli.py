"""dsgnn-run: rank photos and videos."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from dsgnn.runtime.backends import BACKENDS
from dsgnn.runtime.errors import FolderBusyError

GIVEN = ParameterSource.COMMANDLINE


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
    help="ONNX file or engine made by dsgnn-export.  [default: the bundled nano]",
)
@click.option(
    "--save",
    default="overlay,json",
    show_default=True,
    metavar="KINDS",
    help="What to write: some of overlay,map,masks,crops,json,sheet.",
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
    type=click.Choice(["auto", *BACKENDS]),
    default="auto",
    show_default=True,
    help="Inference library.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=int, help="CPU threads of one inference.  [default: 2; "
              "1 for videos where there are two cores]")  # fmt: skip
@click.option("--every", type=int, default=1, show_default=True, help="Rank each N-th frame.")
@click.option("--start", type=float, default=0.0, metavar="S", help="Second to start at.")
@click.option("--end", type=float, metavar="S", help="Second to end before.")
@click.option("--max-frames", type=int, metavar="N", help="Rank at most N frames of a video.")
@click.option("--rate", type=float, help="Frames per second of a source that tells none.")
@click.option("--raw", metavar="WxH", help="- has rgb24 frames of this size, and no image.")
@click.option("--batch", type=int, default=1, show_default=True,
              help="Frames per inference; the model's limit holds, or 32.")  # fmt: skip
@click.option(
    "--steady/--no-steady",
    default=True,
    show_default=True,
    help="Objects of a video keep their identity, and ranks do not flicker.",
)
@click.option("--show", is_flag=True, help="Show videos in a window while they are ranked.")
@click.option("--skip-existing", is_flag=True, help="Leave what an earlier run into DIR has done.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Rank images by the workers of a Ray cluster: HOST:PORT, auto for the one this machine "
    "runs, or without an address one that is started here. Results are Parquet.",
)
@click.option("--workers", type=int, metavar="N", help="Of --ray.  [default: as many as fit]")
@click.version_option(package_name="dsgnn")
@click.pass_context
def main(
    context: click.Context,
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
    every: int,
    start: float,
    end: float | None,
    max_frames: int | None,
    rate: float | None,
    raw: str | None,
    batch: int,
    steady: bool,
    show: bool,
    skip_existing: bool,
    ray: str | None,
    workers: int | None,
) -> None:
    """Rank what people look at first in photos and videos.

    A SOURCE is an image, a video, a folder (with its sub-folders), a quoted pattern such as
    'trip/**/*.jpg', numbered images as one video (shot%04d.png), a camera's number, an RTSP or HTTP
    address, - for the bytes of one image on standard input (with --raw: of frames), or a .txt file
    that lists sources, one on each line.

    \b
    dsgnn-run photo.jpg --out ranked
    dsgnn-run holidays clip.mp4 --out ranked --save overlay,crops,json
    dsgnn-run - --out ranked < photo.jpg
    dsgnn-run rtsp://camera.local/live --out ranked --every 5 --max-frames 1000

    \b
    What photo.jpg and clip.mp4 give in DIR:
      overlay  photo.overlay.jpg  objects tinted, outlined and numbered
               clip.overlay.mp4
      map      photo.map.png      ranks as greys
               clip.map.mp4
      masks    photo.mask1.png …  one per object, 1 = most salient
               clip.masks/000000.mask1.png …
      crops    photo.crop1.png …  objects cut out, transparent around (not of videos)
      sheet    sheet.jpg          all photos ranked on one page (not videos)
      json     results.json       ranks, boxes and masks
               clip.frames.jsonl  the same for each frame, and which object is which
               clip.summary.json  how long each object held rank 1
    Videos are H.264 where PyAV is installed (pip install 'dsgnn[video]'). A stream that breaks off,
    and Ctrl-C, leave whole files of what was ranked.

    The sub-folders of a folder source are kept. Inputs of one run that would share a name keep
    their suffix and, if need be, parent folders: photo.png.overlay.jpg, b/photo.jpg.overlay.jpg.
    Files of these names from an earlier run are replaced, or removed where there are fewer objects
    or sheets now; nothing else in DIR is touched.

    With --ray the results are DIR/part-*.parquet, a row per image as in results.json, and a SOURCE
    may be a .parquet file or a pattern of them, with columns bytes and/or path, or image with both.
    A worker has --threads CPUs, or with --device cuda a GPU, and loads the model once.

    \b
    dsgnn-run photos 'tables/*.parquet' --out ranked --ray 10.0.0.1:6379 --skip-existing

    Exit status: 0 all done, 1 some inputs failed (they are named), 2 wrong use or configuration.
    """
    from dsgnn.runtime.cluster import job as distributed
    from dsgnn.runtime.disk.outputs import make_folder, parse_kinds
    from dsgnn.runtime.disk.sources import find_sources
    from dsgnn.runtime.ranker import Ranker
    from dsgnn.runtime.run.loop import check_skip, run, silence_opencv
    from dsgnn.runtime.video import h264
    from dsgnn.runtime.video.frames import Selection, parse_raw
    from dsgnn.runtime.video.to_files import VideoOptions, choose_threads, writes_video

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    silence_opencv()
    try:
        kinds = parse_kinds(save)
        size = parse_raw(raw) if raw else None
        select = Selection(every, start, end, max_frames, rate, size)
        video = VideoOptions(select, batch, steady, show)
        check_skip(skip_existing, kinds)
        found = find_sources(sources, out, raw=bool(raw))
        if ray is None:
            distributed.check_without_ray(workers)
            threads = choose_threads(threads, found.sources)
            ranker = Ranker(model, backend, device, threads, threshold, if_none)
        else:
            distributed.check_options(
                name for name in context.params if context.get_parameter_source(name) == GIVEN
            )
            make_ranker, gpu = distributed.ranker_for(
                model, backend, device, threads, threshold, if_none
            )
        make_folder(out)
    except (ValueError, OSError, RuntimeError) as error:
        raise click.UsageError(str(error)) from error
    if found.passed_over:
        click.echo(f"passed over as neither image nor video: {found.passed_over}", err=True)
    if ray is not None:
        try:
            summary = distributed.run_on_ray(
                make_ranker, found.sources, out, ray, workers, threads, gpu, batch, skip_existing
            )
        except (ValueError, RuntimeError, ConnectionError) as error:
            raise click.UsageError(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"the results cannot be written: {error}") from error
        click.echo(summary)
        sys.exit(1 if summary.failures else 0)
    click.echo(ranker, err=True)
    if writes_video(found.sources, kinds) and not h264.is_installed():
        click.echo(h264.MISSING, err=True)
    try:
        summary = run(ranker, found.sources, out, kinds, palette, video, skip_existing)
    except FolderBusyError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"the results cannot be written: {error}") from error
    click.echo(summary)
    sys.exit(1 if summary.failures else 0)
