"""Run-length encodings, against strings that pycocotools 2.0.11 wrote and a decoder."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest

from dsgnn.runtime import rle


def decode(size: list[int], counts: str) -> np.ndarray:
    """COCO's scheme, one character at a time."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        group = ord(character) - 48
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            if group & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    edges = np.cumsum([0, *runs])
    flat = np.zeros(size[0] * size[1], bool)
    for start, end in list(pairwise(edges))[1::2]:
        flat[start:end] = True
    return flat.reshape(size[1], size[0]).T


def stripes() -> np.ndarray:
    """Full columns, and one that goes on from its foot at the head of the next."""
    mask = np.zeros((600, 800), bool)
    mask[:, 100:103] = True
    mask[590:, 103] = True
    mask[:7, 104] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        (np.zeros((3, 4), bool), "<"),
        (np.ones((3, 4), bool), "0<"),
        (np.eye(5, dtype=bool), "0150000000"),
        (np.ones((1, 1), bool), "01"),
        (np.zeros((1, 1), bool), "1"),
        (stripes(), "Pcj1Xh1^b0YXN[Wg<"),
    ],
)
def test_equals_pycocotools(mask: np.ndarray, counts: str) -> None:
    assert rle.encode(mask) == {"size": list(mask.shape), "counts": counts}


def test_equals_pycocotools_on_an_ellipse_and_a_frame() -> None:
    y, x = np.mgrid[:480, :640]
    ellipse = ((y - 200) / 150) ** 2 + ((x - 300) / 250) ** 2 < 1
    frame = np.zeros((2000, 3000), bool)
    frame[5:1990, 7:2990] = True
    frame[100:200, 100:300] = False
    digests = [
        hashlib.sha256(rle.encode(mask)["counts"].encode()).hexdigest()[:16]
        for mask in (ellipse, frame)
    ]
    assert digests == ["e0dea5755e766cf9", "ebc4dd2ad1b37593"]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_decodes_to_the_mask(share: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(rng.integers(1, 30, 2)) < share
        np.testing.assert_array_equal(decode(**rle.encode(mask)), mask)


def test_a_view_that_is_not_contiguous() -> None:
    mask = np.random.default_rng(0).random((40, 60)) < 0.5
    np.testing.assert_array_equal(decode(**rle.encode(mask[::2, ::-3])), mask[::2, ::-3])


def test_equals_pycocotools_on_random_masks() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(1)
    for _ in range(200):
        mask = rng.random(rng.integers(1, 50, 2)) < rng.random()
        expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle.encode(mask)["counts"] == expected["counts"].decode()
