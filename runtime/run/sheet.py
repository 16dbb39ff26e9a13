"""Contact sheets: many ranked photos on one page, to see at a glance what a model does."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.disk.outputs import real_place

TILE_PX = (320, 240)  # width, height of a photo's place
CAPTION_PX, GAP_PX = 22, 6
COLUMNS, ROWS = 4, 8
GROUND, INK = 32, 220  # greys
JPEG_QUALITY = 85


class Sheets:
    """Pages of at most 4 × 8 pictures: out/sheet.jpg, sheet2.jpg and so on. Fewer fill their rows
    evenly: six are 3 × 2.

    It is a context manager. The last page is written when the block ends, also by an error. If
    there is any page, further ones of an earlier run are removed. inputs: `real_place` of every
    file that the run reads; none of them is written over. Raises OSError if a page cannot be
    written.
    """

    def __init__(self, out: Path, inputs: frozenset[Path] = frozenset()) -> None:
        self.out, self.inputs, self.pages = out, inputs, 0
        self._tiles: list[np.ndarray] = []

    def add(self, tile: np.ndarray) -> None:
        """Add what `tile` made."""
        self._tiles.append(tile)
        if len(self._tiles) == COLUMNS * ROWS:
            self._write()

    def _path(self, number: int) -> Path:
        return self.out / ("sheet.jpg" if number == 1 else f"sheet{number}.jpg")

    def _write(self) -> None:
        path = self._path(self.pages + 1)
        if real_place(path) in self.inputs:
            raise OSError(f"the sheet {path} is one of the inputs: choose another output folder")
        rows = -(-len(self._tiles) // COLUMNS)
        columns = -(-len(self._tiles) // rows)
        high, wide = self._tiles[0].shape[:2]
        page_px = rows * (high + GAP_PX) + GAP_PX, columns * (wide + GAP_PX) + GAP_PX
        page = np.full((*page_px, 3), GROUND, np.uint8)
        for number, tile in enumerate(self._tiles):
            y = GAP_PX + number // columns * (high + GAP_PX)
            x = GAP_PX + number % columns * (wide + GAP_PX)
            page[y : y + high, x : x + wide] = tile
        self._tiles.clear()
        self.pages += 1
        data = cv2.imencode(".jpg", page[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        write_whole(path, data.tobytes())

    def __enter__(self) -> Sheets:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tiles:
            self._write()
        number = self.pages + 1
        while self.pages and (path := self._path(number)).is_file():
            if real_place(path) not in self.inputs:
                path.unlink()
            number += 1


def tile(picture: np.ndarray, caption: str) -> np.ndarray:
    """A picture as a sheet shows it, shrunk or enlarged to its place, with its caption below.

    picture: (h, w, 3) uint8 RGB, as is the result.
    """
    w, h = TILE_PX
    placed = np.full((h + CAPTION_PX, w, 3), GROUND, np.uint8)
    scale = min(h / picture.shape[0], w / picture.shape[1])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    small = cv2.resize(
        picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    )
    x, y = (w - size[0]) // 2, (h - size[1]) // 2
    placed[y : y + size[1], x : x + size[0]] = small
    text = caption.encode("ascii", "replace").decode()[-46:]  # OpenCV's fonts have only these
    cv2.putText(
        placed, text, (2, h + 15), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (INK,) * 3, 1, cv2.LINE_AA
    )
    return placed
