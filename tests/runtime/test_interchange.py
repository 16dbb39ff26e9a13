"""What docs/frames.md hands to other tools is the crop: in a browser, in libvips, by thumbor's and
imgix's own rules."""

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

from dsgnn.runtime import Ranking

if TYPE_CHECKING:
    from playwright.sync_api import Page

PAGE = Path(__file__).parents[2] / "docs" / "frames.md"
PHOTO = np.random.default_rng(0).integers(0, 255, (16, 30, 3), np.uint8).repeat(10, 0).repeat(10, 1)


@pytest.fixture
def handed() -> dict[str, Any]:
    """The names that the page's block makes, of a photo of 300 × 160 whose right part is looked
    at."""
    section = PAGE.read_text("utf-8").partition("## For other tools")[2]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    grid = np.full((4, 10), 0.01, np.float32)
    grid[1, 7] = 1
    names = {"ranking": Ranking(160, 300, (), attention=grid / grid.sum(), image=PHOTO)}
    exec(block[1], names)
    return names


def test_a_browser_shows_the_crop(page: "Page", handed: dict[str, Any]) -> None:
    encoded = base64.b64encode(cv2.imencode(".png", PHOTO[..., ::-1])[1].tobytes()).decode()
    page.set_content(
        f"<style>{handed['css']} img {{ width: 90px }}</style>"
        f'<img class="tall" src="data:image/png;base64,{encoded}">'
    )
    picture = page.locator("img").screenshot()
    seen = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    x0, y0, x1, y1 = handed["ranking"].crop_box("9:16")
    assert seen.shape == (160, 90, 3) and x0 > 100
    assert np.abs(seen.astype(int) - PHOTO[y0:y1, x0:x1]).mean() < 3


def test_libvips_and_sharp_cut_the_box(handed: dict[str, Any]) -> None:
    x0, y0, x1, y1 = handed["ranking"].crop_box("9:16")
    place = handed["extract"]
    assert handed["vips"].split()[-4:] == [str(value) for value in place.values()]
    try:
        import pyvips
    except (ImportError, OSError):
        pytest.skip("libvips is not installed here")
    image = pyvips.Image.new_from_memory(PHOTO.tobytes(), 300, 160, 3, "uchar")
    cut = image.crop(place["left"], place["top"], place["width"], place["height"])
    made = np.frombuffer(cut.write_to_memory(), np.uint8).reshape(cut.height, cut.width, 3)
    assert np.array_equal(made, PHOTO[y0:y1, x0:x1])


def test_focal_points_lie_in_the_crop(handed: dict[str, Any]) -> None:
    """thumbor takes LEFTxTOP:RIGHTxBOTTOM in pixels, imgix shares of width and height."""
    x0, y0, x1, y1 = handed["ranking"].crop_box("9:16")
    region = re.search(r"focal\((\d+)x(\d+):(\d+)x(\d+)\)", handed["thumbor"])
    assert region and [int(side) for side in region.groups()] == [x0, y0, x1, y1]
    point = re.search(r"fp-x=(0\.\d+)&fp-y=(0\.\d+)$", handed["imgix"])
    assert point and "fit=crop&crop=focalpoint" in handed["imgix"]
    x, y = (float(place) for place in point.groups())
    assert (x, y) == pytest.approx(handed["ranking"].focus, abs=1e-4)
    assert x0 <= 300 * x < x1 and 0.6 < x < 0.85
