"""dsgnn-serve: rank photos over HTTP."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from dsgnn.runtime.backends import BACKENDS


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="ONNX file or engine made by dsgnn-export.  [default: the bundled nano]",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 for every network this machine is in.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 for a free one.",
)
@click.option("--replicas", type=int, default=1, show_default=True, help="Processes that rank.")
@click.option(
    "--batch",
    type=int,
    metavar="N",
    help="Photos of one inference at most.  [default: the engine's largest, 4 for an ONNX file]",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Run the replicas on this Ray cluster (auto: the one here).  [default: one of our own]",
)
@click.option(
    "--threshold",
    type=float,
    metavar="SCORE",
    help="Keep objects scored above this, 0 to 1.  [default: the model's own]",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", *BACKENDS]),
    default="auto",
    show_default=True,
    help="Inference library.",
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu or cuda; each replica has its own GPU."
)
@click.option("--threads", type=int, help="CPU threads of one inference.  [default: 2]")
@click.option(
    "--max-bytes", type=int, default=20_000_000, show_default=True, help="Bytes of one request."
)
@click.option(
    "--max-pixels", type=int, default=50_000_000, show_default=True, help="Pixels of one photo."
)
@click.option(
    "--max-requests", type=int, default=128, show_default=True, help="Requests held at once."
)
@click.option(
    "--timeout", type=float, default=30.0, show_default=True, help="Seconds until the answer."
)
@click.version_option(package_name="dsgnn")
def main(
    model: Path | None,
    host: str,
    port: int,
    replicas: int,
    batch: int | None,
    ray: str | None,
    threshold: float | None,
    backend: str,
    device: str,
    threads: int | None,
    max_bytes: int,
    max_pixels: int,
    max_requests: int,
    timeout: float,
) -> None:
    """Rank what people look at first in photos that come over HTTP, and show a page at /.

    \b
    dsgnn-serve
    curl -F photo=@photo.jpg http://127.0.0.1:8000/rank
    curl -F photo=@photo.jpg -H 'Accept: image/jpeg' http://127.0.0.1:8000/rank -o overlay.jpg

    \b
    POST /rank    a photo, as raw bytes or as the one file of a multipart form; by Accept:
      application/json  results.json of the photo (the default)
      image/jpeg        the photo with its objects tinted, outlined and numbered
      image/png         the rank map, ranks as greys
    GET /health /ready /metrics   for supervisors and Prometheus

    What is refused gets a status and {"status", "error"} that says why: 400 no photo in the
    request, 406 another Accept, 408 the photo came too slowly, 413 too many bytes or pixels,
    415 not an image, 422 a damaged one or too long for a JPEG, 503 full or no worker (Retry-After
    says for how long), 504 no ranking in time.

    SIGTERM and Ctrl-C: nothing new is taken, and what is held is answered. There is no login and no
    TLS: put a proxy that has them in front before listening on more than this machine.

    Exit status: 0 ended by a signal, 2 wrong use or configuration.
    """
    from dsgnn.runtime.serving import replicas as workers
    from dsgnn.runtime.serving.app import Limits, build_app
    from dsgnn.runtime.serving.listen import bind, listen, url

    with ExitStack() as stack:
        try:
            limits = Limits(max_bytes, max_pixels, max_requests, timeout)
            bound = stack.enter_context(bind(host, port))
            ranker = {
                "model": model and model.absolute(),
                "backend": backend,
                "device": device,
                "threads": threads,
                "threshold": threshold,
            }
            ready = stack.enter_context(
                workers.replicas(ranker, limits, replicas, batch, ray, workers.name_for(bound))
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise click.UsageError(str(error)) from error
        click.echo(ready.shown, err=True)
        bound.listen()
        click.echo(f"listening on {url(bound)}", err=True)
        listen(build_app(ready, limits), bound, timeout)
