"""dsgnn-run: rank photos and videos."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import click

from dsgnn.runtime.console import (
    DEFAULTS_SHOWN,
    OneCommand,
    if_none_option,
    lanes_option,
    max_pixels_option,
    open_streams,
    out_option,
    ranker_options,
    say,
    skip_existing_option,
    specks_option,
    usage,
)
from dsgnn.runtime.disk.files import printable
from dsgnn.runtime.disk.outputs import KINDS, table_for_people
from dsgnn.runtime.errors import FolderBusyError
from dsgnn.runtime.framing import FITS, parse_aspects

NAMES = f"""\b
What photo.jpg and clip.mp4 give in DIR:
{table_for_people()}

The sub-folders of a folder source are kept. Inputs of one run that would share a name keep their
suffix and, if need be, parent folders: photo.png.overlay.jpg, b/photo.jpg.overlay.jpg. Files of
these names from an earlier run are replaced, or removed where there are fewer objects or sheets
now. Nothing else in DIR is touched. A stream that breaks off, and Ctrl-C, leave whole files of what
was ranked. What a killed run has ranked is kept as well: --skip-existing goes on from there.

Exit status: 0 all done, 1 some inputs failed (they are named), 2 wrong use or configuration. A
traceback is a bug of ours: please report it.
"""


@click.command(cls=OneCommand, context_settings=DEFAULTS_SHOWN, epilog=NAMES)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@out_option(metavar="DIR")
@click.option(
    "--save",
    default="overlay,json",
    metavar="KINDS",
    help=f"What to write: some of {','.join(KINDS)}.",
)
@click.option(
    "--palette",
    type=click.Choice(["assr", "irsr"]),
    default="assr",
    help="Greys of the map: 255 229 204 178 153 by rank, or shares of 255.",
)
@click.option(
    "--aspect",
    metavar="W:H,...",
    help="Also crop to these, keeping what people look at: photo.9x16.jpg, clip.9x16.mp4.",
)
@click.option(
    "--fit",
    type=click.Choice(FITS),
    default="crop",
    help="Where the first object does not fit into a crop of a photo: cut it, or keep it whole and "
    "fill the rest of the frame with black or with the photo blurred.",
)
@ranker_options(threads="1 where photos have lanes; else 2, and 1 for videos on two cores")
@lanes_option(
    "Photos that are decoded, ranked and saved at the same time.  [default: as the cores and the "
    "memory allow; 1 for few photos]"
)
@if_none_option
@specks_option
@max_pixels_option
@click.option("--every", type=int, default=1, help="Rank each N-th frame.")
@click.option(
    "--start", type=float, default=0.0, show_default=False, metavar="S", help="Second to start at."
)
@click.option("--end", type=float, metavar="S", help="Second to end before.")
@click.option("--max-frames", type=int, metavar="N", help="Rank at most N frames of a video.")
@click.option("--rate", type=float, help="Frames per second of a source that tells none.")
@click.option(
    "--raw", metavar="WxH", help="Standard input holds rgb24 frames of this size, not an image."
)
@click.option(
    "--batch",
    type=int,
    default=1,
    help="Frames per inference, as far as the model takes them, and 32 at most.",
)
@click.option(
    "--steady/--no-steady",
    default=True,
    help="Objects of a video keep their identity, and ranks do not flicker.",
)
@click.option("--show", is_flag=True, help="Show videos in a window while they are ranked.")
@skip_existing_option
@click.version_option(package_name="dsgnn")
def main(
    sources: tuple[str, ...],
    out: Path,
    save: str,
    palette: str,
    aspect: str | None,
    fit: str,
    max_pixels: int,
    backend: str,
    threads: int | None,
    lanes: int | None,
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
    **ranking: Any,  # the other arguments of Ranker, by its names
) -> None:
    """Rank what people look at first in photos and videos.

    A SOURCE is an image, a video, a folder (with its sub-folders), a quoted pattern such as
    'trip/**/*.jpg', numbered images as one video (shot%04d.png), a camera's number, an RTSP or HTTP
    address, - for the bytes of one image or video on standard input (with --raw: of frames), or a
    .txt file that lists sources, one on each line and relative to the list.

    \b
    dsgnn-run photo.jpg --out ranked
    dsgnn-run holidays clip.mp4 --out ranked --save overlay,crops,json
    dsgnn-run holidays --out ranked --aspect 1:1,16:9,9:16
    dsgnn-run - --out ranked < photo.jpg
    dsgnn-run rtsp://camera.local/live --out ranked --every 5 --max-frames 1000

    Videos need PyAV (pip install 'dsgnn[video]'). Animations are videos. To rank images on many
    machines see dsgnn-batch.
    """
    from dsgnn.runtime.disk.outputs import make_folder, parse_kinds
    from dsgnn.runtime.disk.sources import find_sources
    from dsgnn.runtime.images import keep_quiet
    from dsgnn.runtime.ranker import Ranker
    from dsgnn.runtime.run.loop import check_heat, check_skip, lanes_of_run, run, threads_of_run
    from dsgnn.runtime.video import h264
    from dsgnn.runtime.video.frames import Selection, parse_raw
    from dsgnn.runtime.video.to_files import VideoOptions, writes_video

    open_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    keep_quiet()
    with usage("--save"):
        kinds = parse_kinds(save)
    with usage("--aspect"):
        aspects = parse_aspects(aspect) if aspect else ()
    with usage("--skip-existing"):
        check_skip(skip_existing, kinds)
    with usage("--raw"):
        size = parse_raw(raw) if raw else None
    with usage():
        select = Selection(every, start, end, max_frames, rate, size)
        video = VideoOptions(select, batch, steady, show, max_pixels)
        found = find_sources(sources, out, raw=bool(raw))
        if len(found.sources) > len(sources) or found.passed_over:
            say(found, err=True)  # before it begins: a folder may be larger than one thinks
        threads = threads_of_run(found.sources, lanes, threads, backend)
        ranker = Ranker(
            backend=backend, threads=threads, max_pixels=max_pixels, untrusted=True, **ranking
        )
        make_folder(out)
    with usage("--save"):
        check_heat(kinds, ranker)
    lanes = lanes or lanes_of_run(found.sources, ranker)
    say(printable(str(ranker)), err=True)
    if writes_video(found.sources, kinds, aspects) and not h264.is_installed():
        say(h264.MISSING, err=True)
    try:
        summary = run(
            ranker, found.sources, out, kinds, palette, video, skip_existing, aspects, fit, lanes
        )
    except FolderBusyError as error:
        raise click.UsageError(printable(str(error))) from error
    except OSError as error:
        raise click.ClickException(f"the results cannot be written: {error}") from error
    say(summary)
    sys.exit(1 if summary.failures else 0)
