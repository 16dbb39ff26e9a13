"""Contact sheets: every photo is on one, whole, in order, and readable back from its place."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from dsgnn.runtime import samples
from dsgnn.runtime.run.cli import main
from dsgnn.runtime.run.sheet import CAPTION_PX, COLUMNS, GAP_PX, ROWS, TILE_PX, Sheets, tile


def plain(number: int, size: tuple[int, int] = (120, 160)) -> np.ndarray:
    """A picture of one grey that tells its number."""
    return np.full((*size, 3), 60 + 5 * number, np.uint8)


def place(page: np.ndarray, number: int, columns: int = COLUMNS) -> np.ndarray:
    """The photo's part of a tile, without its caption."""
    row, column = divmod(number, columns)
    y = GAP_PX + row * (TILE_PX[1] + CAPTION_PX + GAP_PX)
    x = GAP_PX + column * (TILE_PX[0] + GAP_PX)
    return page[y : y + TILE_PX[1], x : x + TILE_PX[0]]


def test_every_photo_is_on_a_page_in_order(tmp_path: Path) -> None:
    count = COLUMNS * ROWS + 3
    with Sheets(tmp_path) as sheets:
        for number in range(count):
            sheets.add(tile(plain(number), f"{number}.jpg"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sheet.jpg", "sheet2.jpg"]
    pages = [cv2.imread(str(tmp_path / name)) for name in ("sheet.jpg", "sheet2.jpg")]
    for number in range(count):
        page, index = divmod(number, COLUMNS * ROWS)
        middle = place(pages[page], index)[40:200, 60:260].mean()
        assert middle == pytest.approx(60 + 5 * number, abs=2), number


@pytest.mark.parametrize("size", [(30, 400), (400, 30), (1, 1), (1500, 2000)])
def test_a_photo_of_any_shape_keeps_it(size: tuple[int, int], tmp_path: Path) -> None:
    with Sheets(tmp_path) as sheets:
        sheets.add(tile(plain(30, size), "фото"))
    found = place(cv2.imread(str(tmp_path / "sheet.jpg")), 0).mean(-1) > 120
    rows, columns = found.any(1).sum(), found.any(0).sum()
    scale = min(TILE_PX[1] / size[0], TILE_PX[0] / size[1])
    assert rows == pytest.approx(size[0] * scale, abs=2)
    assert columns == pytest.approx(size[1] * scale, abs=2)


def test_what_was_ranked_before_an_error_is_kept_and_nothing_is_no_page(tmp_path: Path) -> None:
    with Sheets(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), Sheets(tmp_path) as sheets:
        sheets.add(tile(plain(1), "one"))
        raise KeyboardInterrupt
    assert (tmp_path / "sheet.jpg").is_file()


def test_pages_of_an_earlier_run_are_no_more(tmp_path: Path) -> None:
    kept = ("sheet.jpg", "sheet05.jpg", "sheet5.jpg", "sheet3.png")  # 5: after a gap
    for name in (*kept, "sheet2.jpg", "sheet3.jpg"):
        (tmp_path / name).touch()
    with Sheets(tmp_path):
        pass
    assert len(list(tmp_path.iterdir())) == 6  # no photo, no sheet
    with Sheets(tmp_path) as sheets:
        sheets.add(tile(plain(1), "one"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_dsgnn_run_saves_one(tmp_path: Path) -> None:
    """The overlays it makes are on it; a broken file has no place there."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photo")
    photos = [str(path) for path in samples()]
    out = ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*photos, str(broken), *out, "--save", "sheet,overlay"])
    assert result.exit_code == 1, result.output
    page = cv2.imread(str(tmp_path / "out" / "sheet.jpg"))
    for number, photo in enumerate(photos):
        overlay = cv2.imread(str(tmp_path / "out" / f"{Path(photo).stem}.overlay.jpg"))
        middle = slice(60, 180), slice(120, 200)  # inside every photo's place
        scale = min(TILE_PX[1] / overlay.shape[0], TILE_PX[0] / overlay.shape[1])
        small = cv2.resize(overlay, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        y, x = (TILE_PX[1] - small.shape[0]) // 2, (TILE_PX[0] - small.shape[1]) // 2
        expected = np.zeros((TILE_PX[1], TILE_PX[0], 3), np.uint8)
        expected[y : y + small.shape[0], x : x + small.shape[1]] = small
        found = place(page, number, columns=3)
        blurred = [cv2.blur(x[middle], (3, 3)).astype(int) for x in (found, expected)]  # two JPEGs
        assert np.abs(blurred[0] - blurred[1]).mean() < 6, photo
    assert len(photos) == 6  # two rows of three
    assert page.shape[1] == 3 * (TILE_PX[0] + GAP_PX) + GAP_PX


def test_a_sheet_is_of_all_photos(tmp_path: Path) -> None:
    arguments = [str(samples()[0]), "--out", str(tmp_path), "--save", "sheet,json"]
    result = CliRunner().invoke(main, [*arguments, "--skip-existing"])
    assert result.exit_code == 2
    assert "a sheet shows all images of a run" in result.output
