"""Cuts between shots of real photos, and what is none: a pan, a zoom, a passing thing, noise."""

from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from dsgnn.runtime import samples
from dsgnn.runtime.images import read_image
from dsgnn.runtime.video.cuts import CutFinder

PHOTOS = [read_image(path) for path in samples()]


def shot(photo: np.ndarray, count: int, speed: float = 0.0, seed: int = 0) -> Iterator[np.ndarray]:
    """A camera that turns by a part of the photo's width in each frame, and there and back, with
    noise."""
    rng = np.random.default_rng(seed)
    h, w = photo.shape[:2]
    wide = int(0.6 * w)
    for i in range(count):
        place = abs((i * speed) % 2 - 1) if speed else 0.5
        x = int(place * (w - wide))
        frame = photo[:, x : x + wide].astype(np.int16) + rng.integers(-8, 9, (h, wide, 3))
        yield frame.clip(0, 255).astype(np.uint8)


def found(frames: Iterator[np.ndarray]) -> list[int]:
    finder = CutFinder()
    return [i for i, frame in enumerate(frames) if finder(frame)]


@pytest.mark.parametrize("speed", [0.0, 0.01, 0.05, 0.1, 0.35])
@pytest.mark.parametrize("number", range(len(PHOTOS)))
def test_a_turning_camera_is_no_cut(number: int, speed: float) -> None:
    assert found(shot(PHOTOS[number], 40, speed)) == []


@pytest.mark.parametrize("speed", [0.0, 0.02])
def test_every_cut_is_found_at_its_frame(speed: float) -> None:
    def film() -> Iterator[np.ndarray]:
        for number, photo in enumerate(PHOTOS):
            yield from shot(cv2.resize(photo, (320, 240)), 10, speed, number)

    assert found(film()) == [10 * i for i in range(1, len(PHOTOS))]


def test_a_lamp_that_flickers_is_no_cut() -> None:
    grey = np.full((90, 160, 3), 120, np.uint8)
    assert found(grey + np.uint8(10 * (i % 7 == 3)) for i in range(60)) == []


def test_lights_that_flash_all_the_time_are_one_cut_at_most() -> None:
    red, blue = (PHOTOS[2] // np.uint8(k) for k in ((1, 3, 3), (3, 3, 1)))
    assert len(found((red, blue)[i % 2] for i in range(60))) <= 1


def test_a_zoom_and_a_passing_thing_are_no_cuts() -> None:
    def zoom() -> Iterator[np.ndarray]:
        photo = cv2.resize(PHOTOS[0], (320, 240))
        for i in range(40):
            m = 2 * i
            yield cv2.resize(photo[m : 240 - m, m : 320 - m], (320, 240))

    def passing() -> Iterator[np.ndarray]:
        for x in range(-100, 320, 12):
            photo = cv2.resize(PHOTOS[1], (320, 240))
            photo[60:200, max(0, x) : max(0, x + 100)] = (250, 30, 30)
            yield photo

    assert found(zoom()) == [] and found(passing()) == []
