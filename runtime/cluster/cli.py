"""dsgnn-batch: rank images on many machines."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import click

from dsgnn.runtime.console import (
    HELP,
    OneCommand,
    if_none_option,
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
from dsgnn.runtime.errors import DsgnnError


@click.command(cls=OneCommand, context_settings=HELP)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@out_option(metavar="DIR")
@click.option(
    "--cluster",
    default="",
    metavar="ADDRESS",
    help="A Ray cluster that this machine is part of: HOST:PORT, or auto for the one that runs "
    "here.  [default: RAY_ADDRESS, or one that is started here and ends with the command]",
)
@click.option("--workers", type=int, metavar="N", help="Workers.  [default: as many as fit]")
@click.option("--batch", type=int, default=1, show_default=True, help="Images per inference.")
@ranker_options("cpu, or cuda: Ray says which GPU of a machine.", "2; 1 on a GPU")
@if_none_option
@specks_option
@max_pixels_option
@skip_existing_option
@click.version_option(package_name="dsgnn")
def main(
    sources: tuple[str, ...],
    out: Path,
    cluster: str,
    workers: int | None,
    batch: int,
    threads: int | None,
    skip_existing: bool,
    **ranking: Any,  # the other arguments of Ranker, by its names
) -> None:
    """Rank images on many machines, by Ray, into Parquet.

    A SOURCE is an image, a folder (with its sub-folders), a quoted pattern, a .txt file that lists
    sources, or a .parquet file or a pattern of them, with columns bytes and/or path, or image with
    both. Images and the model must be at the same paths on every machine.

    \b
    dsgnn-batch photos --out ranked
    dsgnn-batch 'tables/*.parquet' --out ranked --cluster auto --device cuda
    dsgnn-batch photos --out ranked --cluster 10.0.0.1:6379 --skip-existing

    The results are DIR/part-*.parquet, a row per image as in results.json. An image that cannot be
    read is a row with an error. A worker has --threads CPUs, or with --device cuda a GPU, and loads
    the model once.

    Exit status: 0 all done, 1 some inputs failed (they are named), 2 wrong use or configuration, 3
    some inputs met a bug of ours: their rows say which, please report it.
    """
    from dsgnn.runtime.cluster.job import ranker_for, run_on_ray
    from dsgnn.runtime.disk.outputs import make_folder
    from dsgnn.runtime.disk.sources import find_sources

    open_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with usage():
        found = find_sources(sources, out)
        if len(found.sources) > len(sources) or found.passed_over:
            say(found, err=True)  # before it begins: a folder may be larger than one thinks
        make_ranker, gpu = ranker_for(threads=threads, **ranking)
        make_folder(out)
    try:
        summary = run_on_ray(
            make_ranker, found.sources, out, cluster, workers, threads, gpu, batch, skip_existing
        )
    except DsgnnError as error:
        raise click.UsageError(printable(str(error), keep="\n")) from error
    except OSError as error:
        raise click.ClickException(f"the results cannot be written: {error}") from error
    say(summary)
    sys.exit(3 if summary.bugs else 1 if summary.failures else 0)
