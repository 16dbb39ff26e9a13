"""The bundled model served: 2,000 photos of mixed sizes, 64 clients, and memory stays flat."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import pytest
from serving import resident_kb, send

from dsgnn.runtime import Ranker, samples

pytest.importorskip("uvicorn")
PHOTOS, CLIENTS, STEP = 2000, 64, 100
WIDTHS = (160, 320, 640, 1000, 1600, 2400)


def sized(path: Path, width: int) -> bytes:
    image = cv2.imread(str(path))
    size = (width, round(width * image.shape[0] / image.shape[1]))
    return cv2.imencode(".jpg", cv2.resize(image, size))[1].tobytes()


def order(image: dict[str, Any]) -> list[tuple[int, float]]:
    return [(item["rank"], item["saliency"]) for item in image["objects"]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_two_thousand_photos_of_mixed_sizes() -> None:
    photos = [sized(path, width) for width in WIDTHS for path in samples()]
    with Ranker(threads=1) as ranker:
        alone = [order(ranker(photo).to_dict()) for photo in photos]
    assert sum(map(bool, alone)) > len(alone) / 2
    began = time.monotonic()
    server = subprocess.Popen(
        [Path(sys.executable).with_name("dsgnn-serve"), "--port", "0", "--timeout", "600"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "listening on" in line)
        ready_s = time.monotonic() - began
        place = ("127.0.0.1", int(re.findall(r":(\d+)", line)[-1]))

        def request(number: int) -> None:
            which = number * 7 % len(photos)  # 7 and 36 have no factor in common
            status, _, body = send(place, photos[which], timeout_s=600)
            assert status == 200, body
            found = order(json.loads(body)["images"][0])
            assert [rank for rank, _ in found] == [rank for rank, _ in alone[which]]
            assert [s for _, s in found] == pytest.approx([s for _, s in alone[which]], abs=1e-3)

        # Read when nobody asks: what is held then stays, and photos in flight do not count.
        held_kb = []
        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as pool:
            for first in range(0, PHOTOS, STEP):
                list(pool.map(request, range(first, first + STEP)))
                held_kb.append(resident_kb(server.pid))
        rate = PHOTOS / (time.monotonic() - began)
        quarter = len(held_kb) // 4
        settled, last = max(held_kb[quarter : 2 * quarter]), max(held_kb[-quarter:])
        print(
            f"ready in {ready_s:.2f} s, {rate:.1f} photos/s from {CLIENTS} clients, memory "
            f"{last / settled - 1:+.1%} of {settled / 1024:.0f} MiB from the second to the last "
            "quarter"
        )
        assert last < 1.05 * settled
    finally:
        server.terminate()
        assert server.wait(60) == 0
