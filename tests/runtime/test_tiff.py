"""TIFF files: what a camera's raw is, grey with transparency, and compressions that cannot be read.
Each file is made here by bytes."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgnn.runtime.errors import InputError
from dsgnn.runtime.images import decode, read_image


def tiff_of(entries: list[tuple[int, int, int, int]], after: int = 0) -> bytes:
    """A TIFF's header and one page: tag, type, count and value or place of each entry."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", after)


def small(data: bytes) -> list[tuple[int, int, int, int]]:
    """A preview of 2 × 2 grey pixels, at the end of the file."""
    return [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]


@pytest.mark.parametrize(
    "entries",
    [
        [(254, 4, 1, 1), *small(b""), (330, 4, 1, 200)],  # NEF, ARW: a preview, the rest inside
        [(254, 4, 1, 0), *small(b""), (50706, 1, 4, 0x0401)],  # DNG
        [(256, 3, 1, 2), (257, 3, 1, 2), (262, 3, 1, 32803)],  # the sensor's values in front
    ],
)
def test_a_camera_raw_is_refused(entries: list, tmp_path: Path) -> None:
    raw = tiff_of(entries) + bytes(400)
    path = tmp_path / "a.jpg"  # whatever its name
    path.write_bytes(raw)
    with pytest.raises(InputError, match="it is a camera's raw file, .*: develop it, and save it"):
        read_image(path)


def raw_with_preview(order: str, dng: bool) -> bytes:
    """A camera's raw file as TIFF/EP has it: in front a preview of 60 × 40 pixels, red on grey, and
    in a sub-page 300 × 200 values of the sensor. order: "<" or ">". dng: with the version of DNG.
    """
    mark = b"II*\0" if order == "<" else b"MM\0*"
    preview = np.full((40, 60, 3), 128, np.uint8)
    preview[6:34, 6:40] = (230, 20, 20)
    sensor = np.arange(300 * 200, dtype=np.uint16).astype(order + "u2")

    def page(at: int, entries: list[tuple[int, int, list[int]]]) -> bytes:
        """Tag, type (1, 3 or 4: of 1, 2 or 4 bytes) and values, and behind them the long ones."""
        rest, body = b"", b""
        for tag, kind, values in entries:
            data = struct.pack(order + {1: "B", 3: "H", 4: "I"}[kind] * len(values), *values)
            if len(data) > 4:
                place = struct.pack(order + "I", at + 6 + 12 * len(entries) + len(rest))
                rest, data = rest + data, place
            body += struct.pack(order + "HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
        return struct.pack(order + "H", len(entries)) + body + bytes(4) + rest

    def both(subpage: int, pixels: int) -> tuple[bytes, bytes]:
        first = [(254, 4, [1]), (256, 3, [60]), (257, 3, [40]), (258, 3, [8, 8, 8]), (259, 3, [1])]
        first += [(262, 3, [2]), (273, 4, [pixels]), (277, 3, [3]), (278, 3, [40])]
        first += [(279, 4, [preview.nbytes]), (330, 4, [subpage])]
        first += [(50706, 1, [1, 4, 0, 0])] if dng else []
        second = [(254, 4, [0]), (256, 3, [300]), (257, 3, [200]), (258, 3, [16]), (259, 3, [1])]
        second += [(262, 3, [32803]), (273, 4, [pixels + preview.nbytes]), (277, 3, [1])]
        second += [(278, 3, [200]), (279, 4, [sensor.nbytes])]
        return page(8, first), page(subpage, second)

    front = 8 + len(both(0, 0)[0])
    first, second = both(front, front + len(both(0, 0)[1]))
    head = mark + struct.pack(order + "I", 8)
    return head + first + second + preview.tobytes() + sensor.tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dng", [True, False])
def test_the_preview_of_a_camera_raw_is_not_taken_for_the_photo(order: str, dng: bool) -> None:
    data = raw_with_preview(order, dng)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert pixels.shape == (40, 60, 3) and tuple(pixels[20, 20]) == (20, 20, 230)  # OpenCV takes it
    with pytest.raises(InputError, match="it is a camera's raw file, .*: develop it, and save it"):
        decode(data)


@pytest.mark.parametrize(
    "start",
    [
        *(b"II*\0\x10\0\0\0CR\2\0", b"\0\0\0\x18ftypcrx ", b"FUJIFILMCCD-RAW 0201", b"IIRO\x08\0"),
        *(b"IIU\0\x18\0", b"FOVb\0\0"),
    ],
)
def test_raws_of_other_forms_are_refused(start: bytes) -> None:
    with pytest.raises(InputError, match="it is a camera's raw file"):
        decode(start + bytes(600))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_tiff_keeps_its_alpha(bits: int) -> None:
    """Made by bytes: OpenCV writes none. The right half is transparent."""
    grey = np.full((4, 6, 2), 2**bits - 1, np.uint8 if bits == 8 else np.uint16)
    grey[..., 0] //= 4
    grey[:, 3:, 1] = 0
    pixels = grey.tobytes()
    entries = [
        *((256, 3, 1, 6), (257, 3, 1, 4), (258, 3, 2, bits << 16 | bits), (259, 3, 1, 1)),
        *((262, 3, 1, 1), (273, 4, 1, 8 + 2 + 10 * 12 + 4), (277, 3, 1, 2), (278, 3, 1, 4)),
        *((279, 4, 1, len(pixels)), (338, 3, 1, 2)),
    ]
    image = decode(tiff_of(entries) + pixels)
    np.testing.assert_allclose(image[0, 0], 63.75, atol=1)
    assert image[3, 5].tolist() == [255] * 3


@pytest.mark.parametrize(("number", "name"), [(50000, "ZSTD"), (34925, "LZMA")])
def test_what_cannot_be_unpacked_is_not_called_damaged(number: int, name: str) -> None:
    entries = [
        *((256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (259, 3, 1, number), (262, 3, 1, 1)),
        *((273, 4, 1, 8 + 2 + 9 * 12 + 4), (277, 3, 1, 1), (278, 3, 1, 4), (279, 4, 1, 16)),
    ]
    with pytest.raises(InputError, match=f"a TIFF compressed by {name} cannot be read: save it"):
        decode(tiff_of(entries) + bytes(16))
