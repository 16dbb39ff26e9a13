"""Ranks over HTTP: the ASGI application of dsgnn-serve, its limits, and the page at /.

It holds every limit itself, so that nothing too large, too slow or too much reaches the workers
behind it (dsgnn.runtime.serving.replicas: processes of Ray Serve). Whatever is refused is answered
with a status and {"status", "error"}, which says what was expected, what came and what to do.

    POST /rank     a photo as raw bytes, or as the one file of a multipart form
                   Accept: application/json  results.json of this photo (the default)
                           image/jpeg        the photo with its objects tinted and numbered
                           image/png         the rank map: exact greys
    GET  /         the page
    GET  /health   the process answers
    GET  /ready    the workers answer and there is room
    GET  /metrics  for Prometheus
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from dsgnn.runtime.serving.worker import MEDIA, Refused, Reply

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

UNNAMED = "photo"  # `file` of a photo that came without a name
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # bounds of the histograms
READY_S = 5.0  # seconds the workers have to say how they are
PAGE = Path(__file__).with_name("page.html")

logger = logging.getLogger("dsgnn.serve")


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for.

    max_bytes: of a request's body. max_pixels: width × height of a photo, read off its header.
    max_requests: held at once, whether arriving, waiting or being ranked; with max_bytes this
    bounds the memory of the process. timeout_s: seconds from a request's first byte to its answer.
    Raises ValueError for a limit that is not positive.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_requests: int = 128
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value}")


class WorkersLost(RuntimeError):
    """The workers cannot be reached, or the one that held a photo has died."""


class Workers(Protocol):
    """What ranks. model: the `model` entry of results.json."""

    model: Mapping[str, Any]

    async def rank(self, data: bytes, media: str, file: str) -> Reply | Refused:
        """Rank an encoded photo and answer in one of MEDIA; `file` is its name in the JSON.

        A photo that cannot be ranked gives a Refused. Raises WorkersLost. May be cancelled.
        """

    async def ready(self) -> bool:
        """Whether a photo would be ranked now."""


def negotiate(accept: str) -> str | None:
    """The one of MEDIA that an Accept header likes best; None if it takes none of them.

    The most specific range counts for a type (RFC 9110, 12.5.1); of equals the first of MEDIA.
    """
    ranges: dict[str, float] = {}
    for part in accept.lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        weights = [value[2:] for value in parameters if value.startswith("q=")]
        try:
            ranges[kind] = float(weights[0]) if weights else 1.0
        except ValueError:  # not a number: as if the range were not there
            continue
    best, most = None, 0.0
    for media in MEDIA:
        names = (media, media.partition("/")[0] + "/*", "*/*")
        weight = next((ranges[name] for name in names if name in ranges), 0.0)
        if weight > most:
            best, most = media, weight
    return best


def build_app(workers: Workers, limits: Limits) -> Starlette:
    """The ASGI application over some workers."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    service = _Service(workers, limits)
    return Starlette(
        routes=[
            Route("/", service.page),
            Route("/rank", service.rank, methods=["POST"]),
            Route("/health", service.health),
            Route("/ready", service.ready),
            Route("/metrics", service.metrics),
        ],
        exception_handlers={HTTPException: _no_such_thing},
    )


class _Service:
    """The endpoints and what they share: how many requests are held, and the metrics."""

    def __init__(self, workers: Workers, limits: Limits) -> None:
        from prometheus_client import CollectorRegistry, Gauge, Histogram
        from prometheus_client import Counter as Count

        self._workers, self._limits = workers, limits
        self._held = 0
        self._latest_s = 0.0  # what the latest ranking took, from request to answer
        page = PAGE.read_text("utf-8")
        self._page, self._page_policy = page, content_policy(page)
        self._registry = CollectorRegistry()
        into: dict[str, Any] = {"registry": self._registry}
        self._requests = Count(
            "dsgnn_requests",
            "Requests to rank, by answer and status.",
            ("answer", "status"),
            **into,
        )
        self._seconds = Histogram(
            "dsgnn_request_seconds", "From request to ranking.", buckets=SECONDS, **into
        )
        self._stages = Histogram(
            "dsgnn_stage_seconds", "Of one photo, by stage.", ("stage",), buckets=SECONDS, **into
        )
        self._batches = Histogram(
            "dsgnn_batch_photos",
            "Photos ranked together with one, itself included.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            **into,
        )
        Gauge("dsgnn_requests_held", "Arriving, waiting or being ranked.", **into).set_function(
            lambda: self._held
        )
        told = ("file", "sha256", "config", "precision", "backend", "device")
        model = Gauge("dsgnn_model", "1; the labels say which.", told, **into)
        model.labels(*(str(workers.model.get(name, "")) for name in told)).set(1)

    async def rank(self, request: Request) -> Response:
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        start = perf_counter()
        media = negotiate(request.headers.get("accept", "") or "*/*")
        try:
            reply = await self._admitted(request, media)
        except HTTPException as error:  # a form that cannot be parsed
            response = refusal(error.status_code, error.detail)
        except Refused as error:
            response = refusal(error.status, error.message, self._retry_after())
        except WorkersLost as error:
            logger.error("%s", error)
            response = refusal(503, f"{error}: send the photo again", self._retry_after())
        except ClientDisconnect:
            response = refusal(499, "the client has left")  # for the metrics; nobody reads it
        except Exception:
            logger.exception("a request failed")
            response = refusal(500, "the server failed at this photo; its log says why")
        else:
            self._latest_s = perf_counter() - start
            self._observe(reply)
            timing = ", ".join(f"{name};dur={ms:.1f}" for name, ms in reply.stages_ms.items())
            headers = {"Server-Timing": timing, "Vary": "Accept", "Cache-Control": "no-store"}
            response = Response(reply.body, media_type=media, headers=headers)
        self._requests.labels(MEDIA.get(media or "", "none"), response.status_code).inc()
        return response

    async def _admitted(self, request: Request, media: str | None) -> Reply:
        """Count a request in while `_ranked` deals with it. Raises Refused if there is no room."""
        if media is None:
            raise Refused(
                406,
                f"expected Accept to take {' or '.join(MEDIA)}, got {request.headers['accept']}",
            )
        if self._held >= self._limits.max_requests:
            raise Refused(
                503, f"the server holds {self._held} requests, as many as it takes: try again later"
            )
        self._held += 1
        try:
            return await self._ranked(request, media)
        finally:
            self._held -= 1

    async def _ranked(self, request: Request, media: str) -> Reply:
        from starlette.requests import ClientDisconnect

        limit_s = self._limits.timeout_s
        end = perf_counter() + limit_s
        try:
            data, file = await asyncio.wait_for(
                take_photo(request, self._limits.max_bytes), limit_s
            )
        except TimeoutError:
            raise Refused(408, f"expected the whole photo within {limit_s:g} s") from None
        ranking = asyncio.ensure_future(self._workers.rank(data, media, file))
        leaving = asyncio.ensure_future(_left(request))
        try:
            done, _ = await asyncio.wait(
                (ranking, leaving),
                timeout=max(0.0, end - perf_counter()),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            ranking.cancel()  # nothing happens to one that is done
            leaving.cancel()
        if ranking in done:
            reply = ranking.result()
            if isinstance(reply, Refused):
                raise reply
            return reply
        if leaving in done:
            raise ClientDisconnect
        raise Refused(504, f"expected a ranking within {limit_s:g} s, got none: try again later")

    def _observe(self, reply: Reply) -> None:
        self._seconds.observe(self._latest_s)
        self._batches.observe(reply.batch)
        for stage, ms in reply.stages_ms.items():
            self._stages.labels(stage).observe(ms / 1e3)

    def _retry_after(self) -> int:
        """Seconds after which a place is likely free: what the latest photo took."""
        return max(1, ceil(self._latest_s))

    async def page(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse

        headers = {
            "Content-Security-Policy": self._page_policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        return HTMLResponse(self._page, headers=headers)

    async def health(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        try:
            answered = await asyncio.wait_for(self._workers.ready(), READY_S)
        except (TimeoutError, WorkersLost):
            answered = False
        if not answered:
            return refusal(503, "no worker is ready", self._retry_after())
        if self._held >= self._limits.max_requests:
            return refusal(503, f"{self._held} requests are held: no room", self._retry_after())
        return JSONResponse({"status": "ready", "model": dict(self._workers.model)})

    async def metrics(self, request: Request) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
        from starlette.responses import Response

        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


async def take_photo(request: Request, max_bytes: int) -> tuple[bytes, str]:
    """The encoded photo of a request and its file name. Raises Refused, HTTPException (a form that
    cannot be parsed), ClientDisconnect."""
    from starlette.datastructures import UploadFile
    from starlette.requests import Request as Bounded

    declared = request.headers.get("content-length", "")
    received = 0

    def check(size: int, got: str) -> None:
        if size > max_bytes:
            raise Refused(413, f"expected at most {max_bytes:,} bytes (--max-bytes), got {got}")

    async def receive() -> Any:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        check(received, f"{received:,} and more")
        return message

    if declared.isdecimal():
        check(int(declared), f"{int(declared):,}")
    bounded = Bounded(request.scope, receive)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        data, name = await bounded.body(), UNNAMED
    else:
        async with bounded.form(max_files=1, max_fields=8) as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            if not files:
                raise Refused(
                    400,
                    f"expected one file in the form, got the fields {', '.join(form) or 'none'}",
                )
            data, name = await files[0].read(), files[0].filename or UNNAMED
    if not data:
        raise Refused(400, "expected a photo in the request's body, got 0 bytes")
    return data, name


async def _left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal(status: int, message: str, retry_after: int | None = None) -> Response:
    """The answer in words; a 503 says in how many seconds to come back."""
    from starlette.responses import JSONResponse

    headers = {"Retry-After": str(retry_after)} if status == 503 and retry_after else None
    return JSONResponse({"status": status, "error": message}, status, headers)


async def _no_such_thing(request: Request, error: Any) -> Response:
    """404 and 405, in words."""
    response = refusal(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail}; expected POST /rank or GET /, "
        "/health, /ready, /metrics",
    )
    response.headers.update(error.headers or {})
    return response


def content_policy(page: str) -> str:
    """The Content-Security-Policy that lets the page run its own script and talk to us alone."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
