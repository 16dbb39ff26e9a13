"""One process of dsgnn-serve with its own model: encoded photos in, encoded answers out."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from dsgnn.runtime.disk.outputs import RESULTS_SCHEMA, encode_picture, to_bgr
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.images import SIGNATURES, read_image
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.run.loop import silence_opencv

MEDIA = {"application/json": "json", "image/jpeg": "overlay", "image/png": "map"}  # and what it is
BATCH = 4  # photos of one inference where the model has no profile: more gains little on CPUs
# Set for the process before it starts: OpenCV then compares each photo's header with it and
# decodes nothing larger, whatever the format.
PIXELS_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"


@dataclass(frozen=True)
class Reply:
    """An answer from a worker. stages_ms: milliseconds per stage. batch: photos that were
    ranked in the same inference call."""

    body: bytes
    stages_ms: Mapping[str, float]
    batch: int


class Refused(Exception):
    """A request that gets no ranking: the HTTP status and what to tell the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message


class Worker:
    """Decodes, ranks in batches, and encodes. Photos that wait are held encoded.

    An object of this class lives in one event loop.
    """

    def __init__(self, ranker: Mapping[str, Any], batch: int | None, max_pixels: int) -> None:
        """ranker: the arguments of Ranker. batch: photos of one inference at most; None = the
        largest of the engine's profile, or BATCH. max_pixels: what PIXELS_VARIABLE says, for the
        message. Whatever Ranker raises is kept for `describe`: Ray would try again and again.
        """
        silence_opencv()
        self._max_pixels = max_pixels
        self._error = ""
        try:
            self._ranker = Ranker(**ranker)
            self._batch = choose_batch(batch, self._ranker)
        except (ValueError, OSError, RuntimeError) as error:
            self._error = str(error)
            return
        self._together = Together(self._ranker.batch, self._batch)
        # Of decoded photos, which are large, one batch is ranked while the next gets ready.
        self._room = asyncio.Semaphore(2 * self._batch)

    async def describe(self) -> dict[str, Any]:
        """{"error"}, or {"model": as in results.json, "shown": for a person}."""
        if self._error:
            return {"error": self._error}
        shown = f"{self._ranker}, batches of up to {self._batch}"
        return {"model": self._ranker.describe(), "shown": shown}

    async def rank(self, data: bytes, media: str, file: str) -> Reply | Refused:
        """See dsgnn.runtime.serving.app.Workers.rank."""
        async with self._room:
            start = perf_counter()
            try:
                photo = await asyncio.to_thread(read_image, data)
            except InputError as error:
                return self._why_refused(data, str(error))
            decoded = perf_counter()
            ranking, batch = await self._together(photo)
            ranked = perf_counter()
            try:
                body = await asyncio.to_thread(self._encode, ranking, photo, media, file)
            except ValueError as error:
                return Refused(422, f"the answer cannot be encoded: {error}")
            own = {
                "decode": 1e3 * (decoded - start),
                "encode": 1e3 * (perf_counter() - ranked),
            }
            return Reply(body, {**ranking.timings_ms, **own}, batch)

    def _why_refused(self, data: bytes, reason: str) -> Refused:
        if "CV_IO_MAX_IMAGE" in reason:
            limit = f"{self._max_pixels:,}"
            return Refused(
                413,
                f"expected a photo of at most {limit} pixels (--max-pixels), got a header of more",
            )
        known = data.startswith(tuple(SIGNATURES))
        return Refused(422 if known else 415, f"the photo cannot be read: {reason}")

    def _encode(self, ranking: Ranking, photo: np.ndarray, media: str, file: str) -> bytes:
        """An answer in one of dsgnn.runtime.serving.app.MEDIA."""
        if media == "application/json":
            image = {"file": file, **ranking.to_dict()}
            results = {
                "schema": RESULTS_SCHEMA,
                "model": self._ranker.describe(),
                "images": [image],
            }
            return json.dumps(results).encode()
        if media == "image/jpeg":
            return encode_picture(".jpg", to_bgr(ranking.draw(photo)))
        return encode_picture(".png", ranking.rank_map())


class Together:
    """Rank photos that are waiting at the same time in one call, without waiting for any.

    While one batch is ranked, in a thread, the next gathers: a single photo is never held back,
    and under load batches are full. One whose caller has gone is left out.
    """

    def __init__(self, rank_batch: Callable[[list[np.ndarray]], list[Ranking]], limit: int) -> None:
        self._rank_batch, self._limit = rank_batch, limit
        self._waiting: deque[tuple[np.ndarray, asyncio.Future[tuple[Ranking, int]]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, photo: np.ndarray) -> tuple[Ranking, int]:
        """The photo's ranking and the number of photos it was ranked with, itself included."""
        future: asyncio.Future[tuple[Ranking, int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((photo, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                group: list[tuple[np.ndarray, asyncio.Future[Any]]] = []
                while self._waiting and len(group) < self._limit:
                    photo, future = self._waiting.popleft()
                    if not future.cancelled():
                        group.append((photo, future))
                await self._rank(group)
        finally:
            self._running = None

    async def _rank(self, group: list[tuple[np.ndarray, asyncio.Future[Any]]]) -> None:
        try:
            rankings = await asyncio.to_thread(self._rank_batch, [photo for photo, _ in group])
        except Exception as error:
            if len(group) > 1:  # one photo must not spoil the others
                for single in group:
                    await self._rank([single])
            elif not group[0][1].cancelled():
                group[0][1].set_exception(error)
            return
        for (_, future), ranking in zip(group, rankings, strict=True):
            if not future.cancelled():
                future.set_result((ranking, len(group)))


def choose_batch(asked: int | None, ranker: Ranker) -> int:
    """Photos of one inference at most. Raises ValueError if the model does not take as many."""
    most = ranker.backend.max_batch or ranker.backend.inputs[0].shape[0]
    if asked is not None and not 1 <= asked <= (most or asked):
        raise ValueError(
            f"expected a batch of 1 to {most or 'any number of'} photos, which is what "
            f"{ranker.artifact.path.name} takes, got {asked}"
        )
    return asked or most or BATCH
