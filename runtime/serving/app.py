"""Ranks over HTTP: the ASGI application of dsgnn-serve, its limits, and the page at /.

It enforces every limit itself, so that nothing too large, too slow or too much reaches the workers
behind it: a PhotoWorker in this process, or processes of Ray Serve (see
dsgnn.runtime.serving.replicas). Whatever is refused is answered with a status and
{"status", "error"}. The error says what was expected, what came and what to do.

    POST /rank     a photo as raw bytes, or as the one file of a multipart form
                   ?model=NAME       one of several models (the first is the default)
                   ?aspect=16:9,1:1  also where to crop the photo to these
                   Accept: application/json  results.json of this photo (the default)
                           image/jpeg        the photo with its objects tinted and numbered; with
                                             an aspect, the photo cropped to it
                           image/png         the rank map: exact greys
    GET  /         the page
    GET  /health   the process answers
    GET  /ready    the workers answer, there is room, and a photo would be ranked in time
    GET  /metrics  figures for Prometheus
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from dsgnn.runtime.errors import BackendError, DsgnnError, OptionError
from dsgnn.runtime.framing import Aspects, parse_aspects
from dsgnn.runtime.serving.body import take_photo
from dsgnn.runtime.serving.guard import App, Guard
from dsgnn.runtime.serving.worker import MEDIA, Refused, Reply

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

NEEDED = ("starlette", "uvicorn", "h11", "python_multipart", "prometheus_client")
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # bounds of the histograms
READY_S = 5.0  # seconds in which the workers have to say that they are ready
PAGE = Path(__file__).with_name("page.html")

MAX_ASPECTS = 16  # of one request
PARAMETERS = ("model", "aspect")

logger = logging.getLogger("dsgnn.serve")


@dataclass(frozen=True)
class ServeLimits:
    """What one request, and all of them together, may ask for.

    max_bytes: the size of a request's body. max_pixels: width × height of a photo, compared with
    its header. max_requests: how many requests are held at once, whether they are arriving, waiting
    or being ranked; together with max_bytes this bounds the memory of the process. timeout_s:
    seconds from a request's first byte to its answer. max_connections: how many connections are
    open at once; one address may have half of them. Raises OptionError for a limit that is not
    positive.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_requests: int = 128
    timeout_s: float = 30.0
    max_connections: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise OptionError(f"{field.name} must be positive, got {value}")


class WorkersLostError(DsgnnError, RuntimeError):
    """The workers cannot be reached, or the one that held a photo has died."""


class Workers(Protocol):
    """What ranks with one model. model: the `model` entry of results.json. shown: a line about it
    for a person."""

    model: Mapping[str, Any]
    shown: str

    async def rank(
        self, data: bytes, media: str, file: str, aspects: Aspects = ()
    ) -> Reply | Refused:
        """Rank an encoded photo and answer with one of the types in MEDIA.

        file: the photo's name in the JSON. aspects: those that the JSON has crops of; the JPEG is
        the photo cropped to the first one, if there is any. A photo that cannot be ranked gives a
        Refused. Raises WorkersLostError. May be cancelled.
        """

    async def ready(self) -> bool:
        """Whether a photo would be ranked now."""


def negotiate(accept: str) -> str | None:
    """The type in MEDIA that an Accept header likes best, or None if it accepts none of them.

    For each type the most specific range counts (RFC 9110, 12.5.1). Among equals the first type in
    MEDIA wins.
    """
    ranges: dict[str, float] = {}
    for part in accept.lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        weights = [value[2:] for value in parameters if value.startswith("q=")]
        with suppress(ValueError):  # where it is no number the range is ignored
            ranges[kind] = float(weights[0]) if weights else 1.0
    best, most = None, 0.0
    for media in MEDIA:
        names = (media, media.partition("/")[0] + "/*", "*/*")
        weight = next((ranges[name] for name in names if name in ranges), 0.0)
        if weight > most:
            best, most = media, weight
    return best


def check_aspects(aspects: Aspects, media: str) -> None:
    """Raise Refused for aspects that an answer of this type cannot have."""
    if len(aspects) > MAX_ASPECTS:
        raise Refused(400, f"expected at most {MAX_ASPECTS} aspects, got {len(aspects)}")
    if media == "image/png" and aspects:
        raise Refused(400, "a rank map has no aspect: accept application/json or image/jpeg")
    if media == "image/jpeg" and len(aspects) > 1:
        raise Refused(400, f"a JPEG has one aspect, got {len(aspects)}: accept application/json")


def check_installed() -> None:
    """Raise BackendError if a library is missing that serving needs."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"serving needs {', '.join(missing)}, which is not installed: "
            "pip install 'dsgnn[serve]'"
        )


def build_app(
    models: Mapping[str, Workers], limits: ServeLimits, hosts: Collection[str] = ()
) -> App:
    """The ASGI application over the workers of one or several models.

    models: the workers of each model by its name; the first is the default. hosts: see Guard.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    service = _Service(models, limits)
    app = Starlette(
        routes=[
            Route("/", service.page),
            Route("/rank", service.rank, methods=["POST"]),
            Route("/health", service.health),
            Route("/ready", service.ready),
            Route("/metrics", service.metrics),
        ],
        exception_handlers={HTTPException: _no_such_thing},
    )
    return Guard(app, hosts, limits.max_bytes)


class _Queue:
    """The photos that a model holds, and for how long another one would wait."""

    def __init__(self) -> None:
        self._held, self._since = 0, 0.0  # since the latest answer, or the first photo after a rest
        self._intervals: deque[float] = deque(maxlen=8)  # seconds between answers, without rests

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Count a photo while the block runs."""
        if not self._held:
            self._since = perf_counter()
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self._intervals.append(perf_counter() - self._since)
            self._since = perf_counter()

    def wait_s(self) -> float:
        """Seconds until a photo that comes now would be answered, by the latest answers."""
        if not self._held:
            return 0.0
        each_s = sum(self._intervals) / max(1, len(self._intervals))
        return self._held * each_s + perf_counter() - self._since


class _Service:
    """The endpoints and what they share: how many requests are held, and the metrics."""

    def __init__(self, models: Mapping[str, Workers], limits: ServeLimits) -> None:
        from prometheus_client import CollectorRegistry, Gauge, Histogram
        from prometheus_client import Counter as Count

        self._models, self._limits = dict(models), limits
        self._default = next(iter(self._models))
        self._queues = {name: _Queue() for name in self._models}
        self._held = 0
        self._latest_s = 0.0  # seconds that the latest ranking took, from request to answer
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
        gauge = Gauge("dsgnn_model", "1; the labels say which model.", ("name", *told), **into)
        for name, workers in self._models.items():
            gauge.labels(name, *(str(workers.model.get(label, "")) for label in told)).set(1)

    async def rank(self, request: Request) -> Response:
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        start = perf_counter()
        accept = ", ".join(request.headers.getlist("accept"))
        media = negotiate(accept or "*/*")
        try:
            reply = await self._admitted(request, media)
        except Refused as error:
            response = refusal(error.status, error.message, self._retry_after())
        except WorkersLostError as error:
            logger.error("%s", error)
            response = refusal(503, f"{error}: send the photo again", self._retry_after())
        except ClientDisconnect:
            response = refusal(499, "the client has left")  # only the metrics see it
        except Exception:  # a bug of ours, or this machine at its end; no fault of the photo's
            logger.exception("a request failed")
            response = refusal(500, "the server failed at this photo; its log says why")
        else:
            self._latest_s = perf_counter() - start
            self._seconds.observe(self._latest_s)
            self._batches.observe(reply.batch)
            for stage, ms in reply.stages_ms.items():
                self._stages.labels(stage).observe(ms / 1e3)
            timing = ", ".join(f"{name};dur={ms:.1f}" for name, ms in reply.stages_ms.items())
            headers = {"Server-Timing": timing, "Vary": "Accept", "Cache-Control": "no-store"}
            response = Response(reply.body, media_type=media, headers=headers)
        self._requests.labels(MEDIA.get(media or "", "none"), response.status_code).inc()
        return response

    async def _admitted(self, request: Request, media: str | None) -> Reply:
        """Count a request as held while `_ranked` deals with it.

        Raises Refused if there is no room, and for a request of what this server does not have.
        """
        model, aspects = self._chosen(request)
        if media is None:
            raise Refused(
                406,
                f"expected Accept to take {' or '.join(MEDIA)}, got "
                f"{', '.join(request.headers.getlist('accept'))[:200]}",
            )
        check_aspects(aspects, media)
        if self._held >= self._limits.max_requests:
            raise Refused(
                503, f"the server holds {self._held} requests, as many as it takes: try again later"
            )
        self._held += 1
        try:
            return await self._ranked(request, model, media, aspects)
        finally:
            self._held -= 1

    def _chosen(self, request: Request) -> tuple[str, Aspects]:
        """The name of the model, and the aspects, that the query asks for. Raises Refused."""
        query = request.query_params.multi_items()
        unknown = [name for name, _ in query if name not in PARAMETERS]
        if unknown:
            raise Refused(
                400,
                f"expected no query parameter but {' and '.join(PARAMETERS)}, got "
                f"{', '.join(unknown)[:200]}",
            )
        wanted = ",".join(value for name, value in query if name == "aspect")
        try:
            aspects = parse_aspects(wanted[:1000]) if wanted else ()
        except OptionError as error:
            raise Refused(400, str(error)[:300]) from None
        asked = [value for name, value in query if name == "model"] or [self._default]
        if len(asked) > 1 or asked[0] not in self._models:
            raise Refused(
                404,
                f"expected one model of {', '.join(self._models)}, got {', '.join(asked)[:200]}",
            )
        return asked[0], aspects

    async def _ranked(self, request: Request, model: str, media: str, aspects: Aspects) -> Reply:
        """Take the photo and wait for its ranking, until the client leaves or time is up."""
        from starlette.requests import ClientDisconnect

        limit_s = self._limits.timeout_s
        end = perf_counter() + limit_s
        try:
            data, file = await asyncio.wait_for(
                take_photo(request, self._limits.max_bytes), limit_s
            )
        except TimeoutError:
            raise Refused(408, f"expected the whole photo within {limit_s:g} s") from None
        ranking = asyncio.ensure_future(self._models[model].rank(data, media, file, aspects))
        leaving = asyncio.ensure_future(_left(request))
        with self._queues[model].holding():
            try:
                done, _ = await asyncio.wait(
                    (ranking, leaving),
                    timeout=max(0.0, end - perf_counter()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                ranking.cancel()  # this does nothing to one that is done
                leaving.cancel()
        if ranking in done:
            reply = ranking.result()
            if isinstance(reply, Refused):
                raise reply
            return reply
        if leaving in done:
            raise ClientDisconnect
        raise Refused(504, f"expected a ranking within {limit_s:g} s, got none: try again later")

    def _retry_after(self) -> int:
        """Seconds after which a place is likely to be free: as long as the latest photo took."""
        return max(1, ceil(self._latest_s))

    async def page(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse

        headers = {
            "Content-Security-Policy": self._page_policy,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return HTMLResponse(self._page, headers=headers)

    async def health(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        try:
            every = asyncio.gather(*(workers.ready() for workers in self._models.values()))
            answered = all(await asyncio.wait_for(every, READY_S))
        except (TimeoutError, WorkersLostError):
            answered = False
        if not answered:
            return refusal(503, "no worker is ready", self._retry_after())
        if self._held >= self._limits.max_requests:
            return refusal(503, f"{self._held} requests are held: no room", self._retry_after())
        wait_s = max(queue.wait_s() for queue in self._queues.values())
        if wait_s > self._limits.timeout_s:
            return refusal(503, f"a photo would wait {wait_s:.0f} s", self._retry_after())
        models = {name: dict(workers.model) for name, workers in self._models.items()}
        return JSONResponse({"status": "ready", "model": models[self._default], "models": models})

    async def metrics(self, request: Request) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
        from starlette.responses import Response

        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


async def _left(request: Request) -> None:
    """Wait until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal(status: int, message: str, retry_after: int | None = None) -> Response:
    """An answer in words. retry_after: for a 503, in how many seconds to come back."""
    from starlette.responses import JSONResponse

    headers = {"Retry-After": str(retry_after)} if status == 503 and retry_after else None
    return JSONResponse({"status": status, "error": message}, status, headers)


async def _no_such_thing(request: Request, error: Any) -> Response:
    """Answer 404 and 405 in words."""
    response = refusal(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail}; expected POST /rank or GET /, "
        "/health, /ready, /metrics",
    )
    response.headers.update(error.headers or {})
    return response


def content_policy(page: str) -> str:
    """The Content-Security-Policy with which the page runs its own script and talks to us alone."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
