"""5,000 requests, hostile ones among them: every good one is answered right, and memory is flat."""

import http.client
import json
import random
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from serving import resident_kb, send

from dsgnn.runtime.ranker import Ranker

pytest.importorskip("uvicorn")
REQUESTS, CLIENTS = 5000, 8


def slow_jpeg() -> bytes:
    """Few bytes, many passes over many pixels."""
    jpeg = cv2.imencode(
        ".jpg", np.full((5000, 5000), 128, np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    )[1].tobytes()
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + 50 * last + jpeg[-2:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_five_thousand_requests(model: Path, scene: Callable[..., np.ndarray]) -> None:
    photos = [
        cv2.imencode(suffix, scene(h, w, red=(8, 4, 40, 36), blue=(20, 44, 36, 60))[..., ::-1])[
            1
        ].tobytes()
        for suffix in (".png", ".jpg", ".webp")
        for h, w in ((48, 64), (300, 400))
    ]
    with Ranker(model) as ranker:
        right = [ranker(photo).to_dict()["objects"] for photo in photos]
    gif = bytearray(cv2.imencode(".gif", scene(48, 64))[1].tobytes())
    struct.pack_into("<HH", gif, 6, 40_000, 20_525)
    hostile = [
        *(photos[0][:60], b"", b"text", bytes(gif), slow_jpeg(), b"P5" + b" " * 1_000_000),
        *(photos[0][:33] + b"\xff\xff\xff\xf0tEXt" + photos[0][33:], b"P7\nMAXVAL 0\nENDHDR\n"),
    ]
    command = [sys.executable, "-m", "dsgnn.runtime.serving.cli"]
    command[1:] = ["-c", "from dsgnn.runtime.serving.cli import main; main()"]
    server = subprocess.Popen(
        [*command, "--model", str(model), "--port", "0", "--timeout", "30"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "listening on" in line)
        place = ("127.0.0.1", int(re.findall(r":(\d+)", line)[-1]))
        answers: Counter[str] = Counter()
        late: list[float] = []

        def request(number: int) -> None:
            chance = random.Random(number)
            kind = chance.random()
            if kind < 0.8:
                which = chance.randrange(len(photos))
                ready = send(place, path="/ready", method="GET")[0] if number % 10 == 0 else 200
                start = time.monotonic()
                status, _, body = send(place, photos[which], timeout_s=90)
                late.append(time.monotonic() - start)
                if ready == 200:
                    assert status == 200, body
                    assert json.loads(body)["images"][0]["objects"] == right[which]
                answers[f"good {status}"] += 1
            elif kind < 0.97:
                status = send(place, chance.choice(hostile), timeout_s=90)[0]
                assert 400 <= status < 500 or status in (200, 503, 504)
                answers[f"hostile {status}"] += 1
            elif kind < 0.985:  # a head that does not end, and a body that does not come
                with socket.create_connection(place) as connection:
                    connection.sendall(b"POST /rank HTTP/1.1\r\nHost: localhost\r\n")
            else:
                connection = http.client.HTTPConnection(*place)
                connection.request("POST", "/rank", hostile[4])
                time.sleep(0.1)
                connection.close()

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(request, range(REQUESTS // 5)))  # until memory has settled
            settled = resident_kb(server.pid)
            list(pool.map(request, range(REQUESTS // 5, REQUESTS)))
        time.sleep(8)  # decoders that were given up have ended
        grown = resident_kb(server.pid) / settled - 1
        print(dict(answers), f"slowest good {max(late):.2f} s, memory {grown:+.1%} of {settled} kB")
        assert set(answers) >= {"good 200", "hostile 413", "hostile 415", "hostile 422"}
        assert grown < 0.05
        assert send(place, path="/ready", method="GET")[0] == 200
    finally:
        server.terminate()
        assert server.wait(60) == 0
