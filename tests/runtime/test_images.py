"""Reading what people have. Files are made here by OpenCV and by hand."""

import base64
import io
import re
import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dsgnn.runtime.errors import FirstPictureWarning, InputError
from dsgnn.runtime.images import decode, read_image
from dsgnn.runtime.photo.headers import ImageTooLargeError
from dsgnn.runtime.photo.orientation import exif_orientation

# 16 × 8 CMYK JPEG by Pillow: left half magenta + yellow = red, right half cyan + magenta = blue.
CMYK = zlib.decompress(
    base64.b64decode(
        "eNr7f+P/OwY+x5T8pFSGFAYQ+H+bwZlBWkhEXERQWlxMXE5GWkHDSVtDVVUj0MrWwCkhNDUlPjQ2OqtiZmNW4YTi"
        "6NjWrW0T5i1evXZ1esOek7uWHZ+5YvWS/wcYRDgYOBgEWJwFGXwFGSIFGbwFGf4fYZBnYGBkZQQDBihgZGJmYWVj"
        "5+Dk4gYq2CrAwMTIzMzEwszKysIClK0FyjOwCLIKKRo6sgkHJrIrFYoYNU5cyKHstPGgaNDFDyrGSUVNnFxi4hKS"
        "Uqpq6hqaWiamZuYWllbOLq5u7h6eXsEhoWHhEZFRySmpaekZmVnFJaVl5RWVVc0trW3tHZ1dkyZPmTpt+oyZsxYt"
        "XrJ02fIVK1dt2rxl67btO3buOnT4yNFjx0+cPHXp8pWr167fuHnr4aPHT54+e/7i5auPnz5/+frt+4+fv/7fYuBj"
        "cWbwZYhk8GZgsGd4uXrmurRdWZ+ttC9rrP9/EwB+soTi"
    )
)
# 24 × 16 AVIF by Pillow, the colours below in its quarters, `irot` 3 and `imir` 0.
AVIF = zlib.decompress(
    base64.b64decode(
        "eNpjYGBQSCupLEgsy0xjAAIQnZuZZpibmZjm62joCBT6n5taksgAAYoZKTlFUDZDQWZyCQMa4CvILMkFsxiBWC4z"
        "Jz8ZxHEB8RkhoozqQNoEiDUyM/PS4GqlgJxUJigvsczA0Dk/Jx9sV11mQVEBkI7NLEjOB9IimcUFqVD7JIBYAIQL"
        "MisyQQLMHBwcQIonsczQuVEBrEY4OT+nKC85pwJoMi8DWwNQiDOzKL+EGczIzQRbIplZkAvzJdCpbIxMzSytbUCO"
        "TW5KYokQAxeHhcD7twsUF1wyUnN9MOOgAQPPAqCsw70Fx6337fflf8N5J0LpZ0eNtlnKEclVvdPkVgAASq5Gbg=="
    )
)
TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT = (
    *((250, 10, 10), (10, 250, 10)),
    *((10, 10, 250), (240, 240, 10)),
)


@pytest.fixture
def quarters() -> np.ndarray:
    """32 × 48 RGB, one colour in each quarter."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24], image[:16, 24:] = TOP_LEFT, TOP_RIGHT
    image[16:, :24], image[16:, 24:] = BOTTOM_LEFT, BOTTOM_RIGHT
    return image


def encode(image: np.ndarray, suffix: str, *options: int) -> bytes:
    """RGB(A) or grey to a file's bytes."""
    order = {2: slice(None), 3: [2, 1, 0], 4: [2, 1, 0, 3]}
    pixels = image if image.ndim == 2 else image[..., order[image.shape[2]]]
    done, data = cv2.imencode(suffix, pixels, options)
    assert done
    return data.tobytes()


def exif(orientation: int, order: str = "<") -> bytes:
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return mark + struct.pack(order + "HIH", 42, 8, 1) + entry + bytes(4)


def jpeg_with_exif(jpeg: bytes, block: bytes) -> bytes:
    segment = b"Exif\0\0" + block
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


def png_with_exif(png: bytes, block: bytes) -> bytes:
    chunk = b"eXIf" + block
    packed = struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:33] + packed + png[33:]  # after the header chunk


def corners(image: np.ndarray) -> list[tuple[int, ...]]:
    h, w = image.shape[:2]
    places = [(h // 4, w // 4), (h // 4, -w // 4), (-h // 4, w // 4), (-h // 4, -w // 4)]
    return [tuple(image[place].tolist()) for place in places]


UPRIGHT = [TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT]
# Where the four colours of the stored picture are seen, by the EXIF standard's definition: the
# stored row 0 is the seen top, top, bottom, bottom, left, right, right, left side.
SEEN = {
    1: UPRIGHT,
    2: [TOP_RIGHT, TOP_LEFT, BOTTOM_RIGHT, BOTTOM_LEFT],
    3: [BOTTOM_RIGHT, BOTTOM_LEFT, TOP_RIGHT, TOP_LEFT],
    4: [BOTTOM_LEFT, BOTTOM_RIGHT, TOP_LEFT, TOP_RIGHT],
    5: [TOP_LEFT, BOTTOM_LEFT, TOP_RIGHT, BOTTOM_RIGHT],
    6: [BOTTOM_LEFT, TOP_LEFT, BOTTOM_RIGHT, TOP_RIGHT],
    7: [BOTTOM_RIGHT, TOP_RIGHT, BOTTOM_LEFT, TOP_LEFT],
    8: [TOP_RIGHT, BOTTOM_RIGHT, TOP_LEFT, BOTTOM_LEFT],
}


@pytest.mark.parametrize("orientation", SEEN)
def test_exif_rotation(quarters: np.ndarray, orientation: int) -> None:
    jpeg = jpeg_with_exif(
        encode(quarters, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 100), exif(orientation)
    )
    image = decode(jpeg)
    assert image.shape == ((48, 32, 3) if orientation >= 5 else (32, 48, 3))
    assert image.flags.c_contiguous
    np.testing.assert_allclose(corners(image), SEEN[orientation], atol=12)
    # OpenCV's own reading agrees.
    flags = cv2.IMREAD_COLOR
    np.testing.assert_array_equal(
        image, cv2.imdecode(np.frombuffer(jpeg, np.uint8), flags)[..., ::-1]
    )


def test_exif_rotation_of_a_transparent_png(quarters: np.ndarray) -> None:
    alpha = np.full((32, 48, 1), 255, np.uint8)
    png = encode(np.concatenate([quarters, alpha], axis=2), ".png")
    assert corners(decode(png_with_exif(png, exif(6, ">")))) == SEEN[6]


@pytest.mark.parametrize(
    ("turns", "mirror", "orientation"),
    [
        *((None, None, 1), (1, None, 8), (2, None, 3), (3, None, 6)),  # as libavif writes EXIF's
        *((None, 1, 2), (None, 0, 4), (1, 0, 5), (3, 0, 7)),
        *((2, 1, 4), (2, 0, 2), (3, 1, 5), (1, 1, 7)),  # and what it does not write
    ],
)
def test_avif_rotation(turns: int | None, mirror: int | None, orientation: int) -> None:
    """Of the boxes in the file those count that are listed as the picture's."""
    data = bytearray(AVIF)
    listed = data.index(b"\x85\x86")  # the last two properties
    for kind, value, at in ((b"irot", turns, listed), (b"imir", mirror, listed + 1)):
        if value is None:
            data[at] = 0
        else:
            data[data.index(kind) + 4] = value
    image = decode(bytes(data))
    assert image.shape == ((24, 16, 3) if orientation >= 5 else (16, 24, 3))
    np.testing.assert_allclose(corners(image), SEEN[orientation], atol=12)


def test_avif_with_exif_is_turned_once(quarters: np.ndarray) -> None:
    """EXIF's orientation counts for nothing there: libavif writes it as boxes too."""
    options = [cv2.IMWRITE_AVIF_QUALITY, 100]
    kinds, blocks = [cv2.IMAGE_METADATA_EXIF], [np.frombuffer(exif(6), np.uint8)]
    done, data = cv2.imencodeWithMetadata(".avif", quarters[..., ::-1], kinds, blocks, options)
    assert done and exif(6) in data.tobytes() and b"irot" in data.tobytes()
    np.testing.assert_allclose(corners(decode(data.tobytes())), SEEN[6], atol=12)


@pytest.mark.parametrize(
    ("block", "orientation"),
    [
        (exif(8), 8),
        (exif(8, ">"), 8),
        (exif(0), 1),
        (exif(9), 1),
        (b"", 1),
        (b"XX" + exif(8)[2:], 1),
        (exif(8)[:9], 1),
        (exif(8)[:14], 1),
        (b"II*\0\xff\xff\xff\xff", 1),
    ],
)
def test_exif_blocks(block: bytes, orientation: int) -> None:
    assert exif_orientation(block) == orientation


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff", ".bmp", ".jp2", ".ppm", ".gif"])
def test_formats(quarters: np.ndarray, suffix: str) -> None:
    options = (cv2.IMWRITE_WEBP_QUALITY, 101) if suffix == ".webp" else ()  # 101 = lossless
    image = decode(encode(quarters, suffix, *options))
    np.testing.assert_allclose(corners(image), UPRIGHT, atol=30 if suffix == ".gif" else 8)


def test_grey_becomes_rgb() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    image = decode(encode(grey, ".png"))
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))


def test_transparency_lies_on_white() -> None:
    pixels = np.uint8([[(200, 100, 0, 255), (200, 100, 0, 0), (200, 100, 0, 51)]])
    image = decode(encode(pixels, ".png"))
    assert image.tolist() == [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits(channels: int) -> None:
    levels = np.uint16([[0, 257 * 100, 65535, 128]])
    pixels = np.repeat(levels[..., None], channels, axis=2)
    if channels == 4:
        pixels[..., 3] = 65535
    image = decode(encode(pixels[..., 0] if channels == 1 else pixels, ".png"))
    assert image.dtype == np.uint8
    assert image.tolist() == [[[level] * 3 for level in (0, 100, 255, 0)]]


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_avif_of_more_bits(quarters: np.ndarray, bits: int) -> None:
    """OpenCV gives 10 and 12 bits as they are, in 16."""
    pixels = np.rint(quarters * ((2**bits - 1) / 255)).astype(np.uint8 if bits == 8 else np.uint16)
    options = (cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100)
    image = decode(encode(pixels, ".avif", *options))
    assert image.dtype == np.uint8
    np.testing.assert_allclose(corners(image), UPRIGHT, atol=3)


@pytest.mark.parametrize(("form", "bits"), [("gray12le", 12), ("gbrp10le", 10), ("gray16le", 16)])
def test_jpeg_2000_of_more_bits(form: str, bits: int) -> None:
    av = pytest.importorskip("av")
    encoder = av.CodecContext.create("jpeg2000", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 48, 32, form, Fraction(1)
    frame = av.VideoFrame(48, 32, form)
    for plane in frame.planes:
        level = round((2**bits - 1) * 200 / 255)
        plane.update(np.full(plane.buffer_size // 2, level, np.uint16).tobytes())
    data = b"".join(bytes(packet) for packet in encoder.encode(frame) + encoder.encode(None))
    np.testing.assert_allclose(decode(data), np.full((32, 48, 3), 200), atol=2)


@pytest.mark.parametrize("white", [1, 100, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_pnm_says_what_white_is(kind: str, white: int) -> None:
    levels = np.repeat(
        np.rint(np.array([0, 0.4, 1]) * white).astype(int), 1 + 2 * (kind in ("P3", "P6"))
    )
    if kind in ("P2", "P3"):
        body = " ".join(map(str, levels)).encode() + b"\n"
    else:
        body = np.array(levels, ">u2" if white > 255 else ">u1").tobytes()
    image = decode(f"{kind}\n# 9 9\n3 #9\n1 {white}\n".encode() + body)
    expected = [[np.rint(share * white) * 255 / white] * 3 for share in (0, 0.4, 1)]
    np.testing.assert_allclose(image, [expected], atol=1)


def test_pam_says_what_white_is() -> None:
    head = b"P7\nWIDTH 2\nHEIGHT 1\nDEPTH 1\nMAXVAL 1023\nTUPLTYPE GRAYSCALE\nENDHDR\n"
    image = decode(head + np.array([1023, 511], ">u2").tobytes())
    assert image.tolist() == [[[255] * 3, [127] * 3]]


def test_cmyk() -> None:
    image = decode(CMYK)
    assert image.shape == (8, 16, 3)
    np.testing.assert_allclose(image[4, [2, 13]], [(255, 0, 0), (0, 0, 255)], atol=10)


def test_one_pixel() -> None:
    assert decode(encode(np.uint8([[(1, 2, 3)]]), ".png")).tolist() == [[[1, 2, 3]]]


def test_every_kind_of_source(quarters: np.ndarray, tmp_path: Path) -> None:
    data = encode(quarters, ".png")
    path = tmp_path / "grüße 日本 🦊.png"
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data), memoryview(data), quarters):
        np.testing.assert_array_equal(read_image(source), quarters)
    assert read_image(quarters) is quarters


def heic() -> bytes:
    return struct.pack(">I", 24) + b"ftypheic" + bytes(12)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"hello, this is text", "it is not an image .JPEG, PNG, WebP.* is expected"),
        (heic(), "HEIC photos cannot be read .* convert it to JPEG or PNG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), r"the PNG data is damaged or cut short \(38 bytes\)"),
    ],
)
def test_unreadable(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(data)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\xff\x0a", "a JPEG XL photo"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL photo"),
        (b"8BPS\0\1", "a picture of Photoshop or QOI"),
        (b"#?RADIANCE\n", "a picture of high dynamic range"),
        (b"\0\0\1\0\1\0", "an icon (ICO)"),
        (b"%PDF-1.4", "a PDF"),
    ],
)
def test_pictures_of_other_kinds_are_named(start: bytes, name: str) -> None:
    said = f"^it is {re.escape(name)}, which cannot be read: convert it to JPEG or PNG$"
    with pytest.raises(InputError, match=said):
        read_image(start + bytes(64))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff", ".bmp", ".gif"])
def test_cut_short(suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(noise, suffix)
    for share in (0.1, 0.5, 0.95):
        with pytest.raises(InputError, match="data is damaged or cut short"):
            decode(data[: int(share * len(data))])


def test_floating_point_pixels() -> None:
    data = encode(np.ones((4, 4), np.float32), ".tiff")
    with pytest.raises(InputError, match="expected 8 or 16 bits per channel, got float32 pixels"):
        decode(data)


def test_more_pixels_than_allowed() -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    with pytest.raises(ImageTooLargeError, match="100,000 × 100,000 pixels, and max_pixels allows"):
        decode(png)


def test_refuses_other_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a non-empty uint8 RGB .* got float64"):
        read_image(np.zeros((4, 4, 3)))
    with pytest.raises(InputError, match="expected a path, encoded bytes, a picture .* got list"):
        read_image([1, 2, 3])
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "nothing.jpg")


def test_what_python_has(quarters: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(quarters, ".png"))

    class Place:
        def __fspath__(self) -> str:
            return str(path)

    with path.open("rb") as file:
        np.testing.assert_array_equal(read_image(file), quarters)
    np.testing.assert_array_equal(read_image(io.BytesIO(path.read_bytes())), quarters)
    np.testing.assert_array_equal(read_image(Place()), quarters)
    with path.open(encoding="latin-1") as file, pytest.raises(InputError, match="in binary mode"):
        read_image(file)


class Tensor:
    """What a tensor looks like from outside."""

    shape = (3, 4, 4)


def test_what_has_to_be_converted_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"convert values from 0 to 1 by \(255 \* image\).round"):
        read_image(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(InputError, match=r"Tensor: convert a tensor of .*permute\(1, 2, 0\)"):
        read_image(Tensor())
    path = tmp_path / "clip"
    path.write_bytes(b"\0\0\0\x18ftypisom" + bytes(40))
    for source in (path, path.read_bytes()):
        with pytest.raises(InputError, match="it is a video, not a photo: .*Ranker.stream"):
            read_image(source)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_the_first_of_several_pictures_is_not_taken_in_silence(suffix: str, tmp_path: Path) -> None:
    """By path, as bytes and as an opened file; a file of one picture gives no warning."""
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    several, one = tmp_path / f"several.{suffix}", tmp_path / f"one.{suffix}"
    pictures[0].save(several, save_all=True, append_images=pictures[1:], lossless=True)
    pictures[0].save(one)
    what = "has 3 pages" if suffix == "tiff" else "is an animation"
    for source in (several, several.read_bytes(), several.open("rb")):
        with pytest.warns(FirstPictureWarning, match=f"it {what}, of which the first"):
            assert read_image(source)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(one)
