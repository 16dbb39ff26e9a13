"""The worker of a server: what it decodes, what it ranks together, what stands aside."""

import asyncio
import http.client
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import encoded, send, serving_model, until

import dsgnn.runtime.photo.decoder as decoder_module
from dsgnn.runtime import Ranker
from dsgnn.runtime.serving.app import ServeLimits
from dsgnn.runtime.serving.worker import BATCH, Batcher, choose_batch

pytest.importorskip("uvicorn")


@pytest.fixture
def data(photo: np.ndarray) -> bytes:
    return encoded(photo)


# A decoding process in which some photos keep the processor busy, and never end.
SPINNING = """
import dsgnn.runtime.photo.decoder as decoder
read = decoder.read_image
def spin(data, *more):
    while b"SLOW" in data:
        pass
    return read(data, *more)
decoder.read_image = spin
decoder.main()
"""


def decoding() -> set[int]:
    """The decoding processes of this one, by their number."""
    found = set()
    for children in Path("/proc/self/task").glob("*/children"):
        for number in children.read_text().split():
            with suppress(OSError):
                if b"photo.decoder" in Path(f"/proc/{number}/cmdline").read_bytes():
                    found.add(int(number))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="processes are counted by /proc")
def test_slow_photos_stand_aside(model: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good photo waits for none of them longer than a moment, and they end after their time."""
    monkeypatch.setattr(decoder_module, "CHILD", SPINNING)
    others = decoding()  # of rankers of other tests, which end at any time
    with serving_model(model) as place, ThreadPoolExecutor(9) as pool:
        assert send(place, data)[0] == 200
        slow = [pool.submit(send, place, data + b"SLOW") for _ in range(6)]
        until(lambda: b"held 6.0" in send(place, path="/metrics", method="GET")[2])
        assert send(place, data)[0] == 200
        assert len([one for one in slow if not one.done()]) == 2
        assert send(place, path="/ready", method="GET")[0] == 200
        answers = [one.result()[0] for one in slow]
        assert answers.count(503) == 4
        assert {answer for answer in answers if answer != 503} <= {422, 504}  # 504: little time
        assert send(place, data)[0] == 200
        until(lambda: len(decoding() - others) == 1)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are counted by /proc")
def test_what_was_given_up_is_not_decoded_on(
    model: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "CHILD", SPINNING)
    others = decoding()  # of rankers of other tests, which end at any time
    with serving_model(model, ServeLimits(timeout_s=1)) as place:
        assert send(place, data)[0] == 200
        assert send(place, data + b"SLOW")[0] == 504
        until(lambda: not decoding() - others)
        until(lambda: b"held 0.0" in send(place, path="/metrics", method="GET")[2])
        leaver = http.client.HTTPConnection(*place)
        leaver.request("POST", "/rank", data + b"SLOW")
        until(lambda: len(decoding() - others) == 1)
        leaver.close()
        until(lambda: not decoding() - others)
        assert send(place, data)[0] == 200


def test_lanes_rank_side_by_side() -> None:
    both = threading.Barrier(2)

    def rank(photos: list[Any]) -> list[Any]:
        both.wait(30)
        return photos

    async def two_calls() -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            batcher = Batcher([rank, rank], 1, pool)
            return await asyncio.gather(batcher(1), batcher(2))  # type: ignore[arg-type]

    assert asyncio.run(two_calls()) == [(1, 1), (2, 1)]


def test_photos_gather_while_a_batch_runs() -> None:
    batches: list[list[int]] = []
    first = threading.Event()

    def rank(photos: list[Any]) -> list[Any]:
        batches.append(photos)
        if len(batches) == 1:
            assert first.wait(60)
        if 5 in photos:
            raise ValueError(f"five in {photos}")
        return [10 * photo for photo in photos]

    pool = ThreadPoolExecutor(1)

    async def calls_come() -> list[Any]:
        together = Batcher([rank], 3, pool)
        calls = [asyncio.create_task(together(photo)) for photo in (0,)]
        await asyncio.sleep(0.05)
        calls += [asyncio.create_task(together(photo)) for photo in range(1, 8)]
        await asyncio.sleep(0.05)
        calls[2].cancel()  # waiting: is left out
        calls[0].cancel()  # being ranked: its answer goes nowhere
        first.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [*answers, await together(9)]  # goes on after all were done

    answers = asyncio.run(calls_come())
    assert batches == [[0], [1, 3, 4], [5, 6, 7], [5], [6], [7], [9]]
    assert answers[1] == (10, 3) and answers[6] == (60, 1) and answers[8] == (90, 1)
    assert [type(answers[n]) for n in (0, 2)] == [asyncio.CancelledError] * 2
    assert str(answers[5]) == "five in [5]"


def test_the_batch_fits_the_model(ranker: Ranker) -> None:
    assert choose_batch(None, ranker) == BATCH and choose_batch(7, ranker) == 7
    ranker.backend.max_batch = 8  # as an engine's profile says
    assert choose_batch(None, ranker) == 8 and choose_batch(7, ranker) == 7
    for asked in (0, 9):
        with pytest.raises(ValueError, match=rf"expected a batch of 1 to 8 .* got {asked}"):
            choose_batch(asked, ranker)
