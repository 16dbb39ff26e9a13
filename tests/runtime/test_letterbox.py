"""The letterbox against upstream's own input, and its rules on odd shapes."""

import re
from pathlib import Path

import numpy as np
import pytest

from dsgnn.runtime.letterbox import Fixed, Geometry, LongestSide, letterbox, parse_size

GOLDEN = Path(__file__).parents[1] / "golden"
MEAN = np.float32([123.675, 116.28, 103.53])
STD = np.float32([58.395, 57.12, 57.375])


@pytest.mark.parametrize(
    ("name", "size"), [("r50_assr_4", 576), ("r50_assr_7", 576), ("r50_irsr_5", 640)]
)
def test_equals_upstream(name: str, size: int) -> None:
    golden = np.load(GOLDEN / f"forward_{name}.npz")
    padded, geometry = letterbox(golden["image"], LongestSide(size))
    normalised = (padded.astype(np.float32) - MEAN) / STD
    np.testing.assert_array_equal(normalised.transpose(2, 0, 1), golden["input"])
    assert geometry == Geometry(
        tuple(golden["ori_shape"][:2].tolist()),
        tuple(golden["img_shape"][:2].tolist()),
        golden["input"].shape[1:],
    )


@pytest.mark.parametrize("size", [576, 640])
def test_both_rules_agree_on_the_datasets_size(size: int) -> None:
    rule = LongestSide(size)
    geometry = rule.geometry(480, 640)
    assert Fixed(*geometry.padded).geometry(480, 640) == geometry


@pytest.mark.parametrize(
    ("rule", "shape", "resized", "padded"),
    [
        (LongestSide(640), (6000, 8000), (480, 640), (480, 640)),
        (LongestSide(640), (1, 1), (640, 640), (640, 640)),
        (LongestSide(640), (1, 8000), (1, 640), (32, 640)),
        (LongestSide(100, 8), (30, 77), (39, 100), (40, 104)),
        (Fixed(448, 576), (400, 300), (448, 336), (448, 576)),
        (Fixed(448, 576), (8000, 1), (448, 1), (448, 576)),
        (Fixed(448, 576), (300, 400), (432, 576), (448, 576)),
    ],
)
def test_geometry(rule, shape, resized, padded) -> None:
    assert rule.geometry(*shape) == Geometry(shape, resized, padded)


def test_pads_right_and_bottom_with_grey() -> None:
    image = np.full((20, 10, 3), 7, np.uint8)
    padded, geometry = letterbox(image, Fixed(32, 32))
    assert geometry.resized == (32, 16)
    assert (padded[:, :16] == 7).all() and (padded[:, 16:] == 128).all()


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.zeros((4, 5), np.uint8), r"uint8 of shape \(4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"uint8 of shape \(4, 5, 4\)"),
        (np.zeros((4, 5, 3), np.float32), r"float32 of shape \(4, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), r"uint8 of shape \(0, 5, 3\)"),
    ],
)
def test_refuses_other_arrays(image: np.ndarray, got: str) -> None:
    with pytest.raises(ValueError, match=rf"expected a non-empty uint8 RGB image.*got {got}"):
        letterbox(image, Fixed(32, 32))


def test_refuses_an_impossible_rule() -> None:
    with pytest.raises(ValueError, match="letterbox size must be at least 1 pixel, got 0"):
        LongestSide(0)
    with pytest.raises(ValueError, match="letterbox width must be at least 1 pixel, got -3"):
        Fixed(32, -3)


@pytest.mark.parametrize("text", ["448x576", "448X576", "448×576"])
def test_a_size(text: str) -> None:
    assert parse_size(text) == (448, 576)


@pytest.mark.parametrize(
    "text",
    ["", "448", "448x", "x576", "0x0", "32x0", "100x96", "²x³", "٣٢x32", "-32x32", "32x32x32"],
)
def test_refuses_what_is_no_size(text: str) -> None:
    message = f"expected HxW such as 448x576, in pixels and multiples of 32, got {text}"
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_size(text)
