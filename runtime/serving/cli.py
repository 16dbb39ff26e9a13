"""dsgnn-serve: rank photos over HTTP."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import click

from dsgnn.runtime.console import (
    DEFAULTS_SHOWN,
    OneCommand,
    backend_option,
    device_option,
    specks_option,
    threads_option,
    threshold_option,
)
from dsgnn.runtime.errors import DsgnnError


@click.command(cls=OneCommand, context_settings=DEFAULTS_SHOWN)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]FILE",
    help="ONNX file or engine made by dsgnn-export, or nano for the bundled one; may be repeated.  "
    "[default: nano]",
)
@click.option(
    "--host",
    default="127.0.0.1",
    help="Address to listen on; 0.0.0.0 for every network this machine is in.",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="A name under which browsers may reach this server; may be repeated.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    help="Port to listen on; 0 for a free one.",
)
@click.option(
    "--replicas",
    type=int,
    default=1,
    help="Copies of each model that rank side by side.",
)
@click.option(
    "--batch",
    type=int,
    metavar="N",
    help="Photos of one inference at most.  [default: the engine's largest, 4 for an ONNX file]",
)
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Run the replicas on a Ray cluster: HOST:PORT, auto for the one on this machine, or local "
    "for one that is started here.  [default: in this process]",
)
@threshold_option
@backend_option()
@device_option("cpu or cuda; several replicas have a GPU each, in processes of Ray.")
@threads_option("CPU threads of one inference.  [default: 2]", kind=int)
@specks_option
@click.option("--max-bytes", type=int, default=20_000_000, help="Bytes of one request.")
@click.option("--max-pixels", type=int, default=50_000_000, help="Pixels of one photo.")
@click.option("--max-requests", type=int, default=128, help="Requests held at once.")
@click.option(
    "--max-connections",
    type=int,
    default=512,
    help="Open connections; one address may have half of them.",
)
@click.option("--timeout", type=float, default=30.0, help="Seconds until the answer.")
@click.version_option(package_name="dsgnn")
def main(
    models: tuple[str, ...],
    host: str,
    allow_host: tuple[str, ...],
    port: int,
    replicas: int,
    batch: int | None,
    cluster: str | None,
    max_bytes: int,
    max_pixels: int,
    max_requests: int,
    max_connections: int,
    timeout: float,
    **options: Any,  # the arguments of Ranker, by its names
) -> None:
    """Rank what people look at first in photos that come over HTTP, and show a page at /.

    \b
    dsgnn-serve
    curl -F photo=@photo.jpg http://127.0.0.1:8000/rank
    curl -F photo=@photo.jpg -H 'Accept: image/jpeg' http://127.0.0.1:8000/rank -o overlay.jpg
    dsgnn-serve --model small=nano.onnx --model large=r50.onnx     # POST /rank?model=large

    \b
    POST /rank    a photo, as raw bytes or as the one file of a multipart form. By Accept:
      application/json  results.json of the photo (the default)
      image/jpeg        the photo with its objects tinted, outlined and numbered
      image/png         the rank map, ranks as greys
    GET /health /ready /metrics   for supervisors and Prometheus

    A request that is refused gets a status, and {"status", "error"} says why: 400 no photo in the
    request or an unknown parameter, 403 another site's page, 404 no such model, 406 another Accept,
    408 the photo came too slowly, 413 too many bytes or pixels, 415 not an image, 422 a damaged one
    or too long for a JPEG, 500 a bug that the log tells of, 503 full or no worker (Retry-After says
    for how long), 504 no ranking in time.

    After SIGTERM or Ctrl-C no new request is taken, and those that are held are answered. There is
    no login and no TLS: before you listen on more than this machine, put a proxy that has them in
    front, and name it with --allow-host.

    Exit status: 0 ended by a signal, 2 wrong use or configuration.
    """
    from dsgnn.runtime.serving.app import ServeLimits, build_app, check_installed
    from dsgnn.runtime.serving.listen import bind, listen, url
    from dsgnn.runtime.serving.models import parse_models, running

    with ExitStack() as stack:
        try:
            check_installed()
            files = parse_models(models)
            limits = ServeLimits(max_bytes, max_pixels, max_requests, timeout, max_connections)
            bound = stack.enter_context(bind(host, port))
            workers = stack.enter_context(
                running(files, options, limits, bound, replicas, batch, cluster)
            )
        except (DsgnnError, OSError) as error:
            raise click.UsageError(str(error)) from error
        click.echo("\n".join(ready.shown for ready in workers.values()), err=True)
        bound.listen()
        click.echo(f"listening on {url(bound)}", err=True)
        app = build_app(workers, limits, (host, *allow_host))
        listen(app, bound, limits.max_connections, timeout)
