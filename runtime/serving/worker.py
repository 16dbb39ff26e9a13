"""A model that serves: encoded photos in, encoded answers out."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from dsgnn.runtime.disk.outputs import RESULTS_SCHEMA
from dsgnn.runtime.disk.pictures import encode_picture, to_bgr
from dsgnn.runtime.errors import InputError, OptionError
from dsgnn.runtime.framing import Aspects, crop_to, frames_entry
from dsgnn.runtime.images import keep_quiet, left_out
from dsgnn.runtime.photo.decoder import Decoder
from dsgnn.runtime.photo.headers import ImageTooLargeError, is_photo
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.ranking import Ranking

# The types of an answer, and what each is.
MEDIA = {"application/json": "json", "image/jpeg": "overlay", "image/png": "map"}
BATCH = 4  # photos of one inference where the model has no profile; more gains little on CPUs
SLOW_S = 0.5  # seconds of decoding after which a photo stands aside for the others
SLOW = 2  # so many of them are decoded on at the same time, and no more


@dataclass(frozen=True)
class Reply:
    """An answer from a worker. stages_ms: milliseconds per stage. batch: how many photos were
    ranked in the same inference, this one included."""

    body: bytes
    stages_ms: Mapping[str, float]
    batch: int


class Refused(Exception):
    """A request that gets no ranking: the HTTP status and what to tell the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message


class PhotoWorker:
    """Decodes, ranks in batches, and encodes. Photos that wait are kept encoded.

    Each lane has its own copy of the model, a thread that ranks, a thread that encodes, and a
    process that decodes. A photo that takes long to decode stands aside: its process goes on at the
    lowest priority, and the lane gets another. Where a photo's caller has gone, its decoding ends.
    An object of this class is used in one event loop.

    Attributes: model (the `model` entry of results.json), shown (a line for a person).
    """

    def __init__(
        self, ranker: Mapping[str, Any], batch: int | None, max_pixels: int, lanes: int = 1
    ) -> None:
        """Load the model.

        ranker: the arguments of Ranker. batch: photos of one inference at most; None = the
        largest of the engine's profile, or BATCH. max_pixels: width × height of the largest photo.
        lanes: how many inferences run side by side. Raises what Ranker raises, and OptionError for
        a batch that the model does not take and for lanes below 1.
        """
        if lanes < 1:
            raise OptionError(f"a model needs at least 1 replica, got {lanes}")
        keep_quiet()
        self._max_pixels = max_pixels
        rankers = [Ranker(**ranker) for _ in range(lanes)]
        limit = choose_batch(batch, rankers[0])
        self.model: Mapping[str, Any] = rankers[0].describe()
        copies = f", {lanes} copies" if lanes > 1 else ""
        self.shown = f"{rankers[0]}, batches of up to {limit}{copies}"
        self._ranking = ThreadPoolExecutor(lanes, "dsgnn-rank")
        self._coding = ThreadPoolExecutor(lanes, "dsgnn-code")
        self._decoding = ThreadPoolExecutor(lanes + SLOW + 1, "dsgnn-decode")
        self._decoders = [Decoder(max_pixels) for _ in range(lanes)]
        self._turns, self._slow = asyncio.Semaphore(lanes), 0
        self._batcher = Batcher([one.batch for one in rankers], limit, self._ranking)
        # Decoded photos are large: while one batch is ranked, only the next is decoded.
        self._room = asyncio.Semaphore(2 * limit * lanes)

    async def rank(
        self, data: bytes, media: str, file: str, aspects: Aspects = ()
    ) -> Reply | Refused:
        """See dsgnn.runtime.serving.app.Workers.rank."""
        loop = asyncio.get_running_loop()
        async with self._room:
            start = perf_counter()
            try:
                photo = await self._decode(data)
            except Refused as refused:
                return refused
            except InputError as error:
                return self._why_refused(data, error)
            decoded = perf_counter()
            try:
                ranking, batch = await self._batcher(photo)
                ranked = perf_counter()
                body = await loop.run_in_executor(
                    self._coding, self._encode, ranking, photo, data, media, file, aspects
                )
            except InputError as error:
                return Refused(422, f"the photo cannot be answered: {error}")
            own = {"decode": 1e3 * (decoded - start), "encode": 1e3 * (perf_counter() - ranked)}
            return Reply(body, {**ranking.timings_ms, **own}, batch)

    async def ready(self) -> bool:
        """See dsgnn.runtime.serving.app.Workers.ready."""
        return True

    def close(self) -> None:
        """End the threads and processes. What is still being ranked is not waited for."""
        for pool in (self._ranking, self._coding, self._decoding):
            pool.shutdown(wait=False, cancel_futures=True)
        for decoder in self._decoders:
            decoder.close()

    async def _decode(self, data: bytes) -> np.ndarray:
        """Decode a photo: (h, w, 3) uint8 RGB. Raises InputError, and Refused for one that takes
        long while SLOW others do. If it is cancelled, the decoding ends."""
        loop, keep = asyncio.get_running_loop(), False
        await self._turns.acquire()
        with ExitStack() as turn:
            turn.callback(self._turns.release)
            decoder = self._decoders.pop() if self._decoders else Decoder(self._max_pixels)
            try:
                await loop.run_in_executor(self._decoding, decoder.start)
                work = loop.run_in_executor(self._decoding, decoder, data)
                work.add_done_callback(_heard)
                keep = bool((await asyncio.wait([work], timeout=SLOW_S))[0])
                if keep:
                    return work.result()
                if self._slow == SLOW:
                    raise Refused(503, "it takes long to decode, as others do now: try again later")
                turn.close()
                self._slow += 1
                decoder.yield_to_others()
                try:
                    await asyncio.wait([work])
                finally:
                    self._slow -= 1
                return work.result()
            finally:
                if keep:
                    self._decoders.append(decoder)
                else:
                    decoder.stop()
                    self._decoding.submit(decoder.close)

    def _why_refused(self, data: bytes, error: InputError) -> Refused:
        if isinstance(error, ImageTooLargeError):
            limit = f"{self._max_pixels:,}"
            return Refused(
                413, f"expected a photo of at most {limit} pixels, and its header tells of more"
            )
        return Refused(422 if is_photo(data) else 415, f"the photo cannot be read: {error}")

    def _encode(
        self,
        ranking: Ranking,
        photo: np.ndarray,
        data: bytes,
        media: str,
        file: str,
        aspects: Aspects,
    ) -> bytes:
        """Make an answer of one of the types in MEDIA. Raises InputError if it cannot hold it.

        data: the photo's file, of which a part may have been left out.
        """
        looks, objects = ranking.looks, ranking.objects
        if media == "application/json":
            note = {"note": left} if (left := left_out(data)) else {}
            image = {"file": file, **note, **ranking.to_dict()}
            if aspects:
                crops = {aspect: crop_to(looks, aspect, objects) for aspect in aspects}
                image |= {**frames_entry(looks, crops), "attention_map": looks.to_dict()}
            results = {"schema": RESULTS_SCHEMA, "model": self.model, "images": [image]}
            return json.dumps(results).encode()
        if media == "image/jpeg" and aspects:
            part = crop_to(looks, aspects[0], objects).picture(photo)
            return encode_picture(".jpg", to_bgr(part))
        if media == "image/jpeg":
            return encode_picture(".jpg", to_bgr(ranking.draw(photo)))
        return encode_picture(".png", ranking.rank_map())


def _heard(work: asyncio.Future[np.ndarray]) -> None:
    """Keep asyncio from reporting the error of a photo that was given up."""
    if not work.cancelled():
        work.exception()


RankBatch = Callable[[list[np.ndarray]], list[Ranking]]
Waiting = tuple[np.ndarray, "asyncio.Future[tuple[Ranking, int]]"]


class Batcher:
    """Rank photos that wait at the same time in one call, without making any wait for others.

    While a lane ranks a batch, in a thread, the next batch gathers. So a single photo is never held
    back, and under load the batches are full. A photo whose caller has gone is left out.
    """

    def __init__(self, lanes: Sequence[RankBatch], limit: int, pool: ThreadPoolExecutor) -> None:
        """lanes: each ranks a batch, and is called by one thread of the pool at a time. limit:
        photos of one batch at most."""
        self._free, self._limit, self._pool = list(lanes), limit, pool
        self._waiting: deque[Waiting] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, photo: np.ndarray) -> tuple[Ranking, int]:
        """The photo's ranking, and how many photos were ranked with it, itself included."""
        future: asyncio.Future[tuple[Ranking, int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((photo, future))
        if self._free:
            task = asyncio.create_task(self._run(self._free.pop()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return await future

    async def _run(self, lane: RankBatch) -> None:
        try:
            while self._waiting:
                group: list[Waiting] = []
                while self._waiting and len(group) < self._limit:
                    photo, future = self._waiting.popleft()
                    if not future.cancelled():
                        group.append((photo, future))
                if group:
                    await self._rank(lane, group)
        finally:
            self._free.append(lane)

    async def _rank(self, lane: RankBatch, group: list[Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            rankings = await loop.run_in_executor(self._pool, lane, [photo for photo, _ in group])
        except Exception as error:
            if len(group) > 1:  # a photo that fails must not spoil the others
                for single in group:
                    await self._rank(lane, [single])
            elif not group[0][1].cancelled():
                group[0][1].set_exception(error)
            return
        for (_, future), ranking in zip(group, rankings, strict=True):
            if not future.cancelled():
                future.set_result((ranking, len(group)))


def choose_batch(asked: int | None, ranker: Ranker) -> int:
    """Photos of one inference at most. Raises OptionError if the model does not take as many."""
    most = ranker.backend.max_batch or ranker.backend.inputs[0].shape[0]
    if asked is not None and not 1 <= asked <= (most or asked):
        raise OptionError(
            f"expected a batch of 1 to {most or 'any number of'} photos, which is what "
            f"{ranker.artifact.path.name} takes, got {asked}"
        )
    return asked or most or BATCH
