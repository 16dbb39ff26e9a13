"""Photos that are made to do harm. Each costs what it is, and fails alone.

The bytes are made here. What is measured are seconds of processor time and peaks of memory, with
bounds that a loaded machine keeps as well.
"""

import json
import re
import resource
import signal
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

import dsgnn.runtime.photo.decoder as decoder_module
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.images import decode
from dsgnn.runtime.photo.decoder import DECODE_S, Decoder, Decoders
from dsgnn.runtime.photo.headers import MAX_ITEMS, MAX_SCANS, ImageTooLargeError, walk
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.run.cli import main

PHOTO = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
# A decoding process with a decoder that some photos crash.
CRASHING = """
import ctypes
import dsgnn.runtime.photo.decoder as decoder
read = decoder.read_image
decoder.read_image = lambda data, *more: (
    ctypes.string_at(0) if b"CRASH" in data else read(data, *more)
)
decoder.main()
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the limits of processes are Linux's")


def encode(suffix: str, picture: np.ndarray = PHOTO, *options: int) -> bytes:
    return cv2.imencode(suffix, picture, options)[1].tobytes()


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def box(kind: bytes, body: bytes) -> bytes:
    """A box of an ISO image file."""
    return struct.pack(">I4s", len(body) + 8, kind) + body


def animated_png(frame: bytes = b"") -> bytes:
    """A PNG whose second picture has these bytes instead of pixels."""
    png = encode(".png")
    control = struct.pack(">IIIIIHHBB", 0, 64, 48, 0, 0, 1, 10, 0, 0)
    head = png[:33] + chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", control)
    after = chunk(b"fcTL", struct.pack(">I", 1) + control[4:])
    return head + png[33:-12] + after + chunk(b"fdAT", struct.pack(">I", 2) + frame) + png[-12:]


def scans(count: int, side: int = 1500) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    jpeg = encode(".jpg", noise, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + count * last[:2000] + jpeg[-2:]


def avif_of_many_items(count: int) -> bytes:
    """An AVIF whose index tells of more items than the picture has."""
    avif = encode(".avif", PHOTO)
    at = avif.index(b"iinf") - 4
    (size,) = struct.unpack_from(">I", avif, at)
    entry = box(b"infe", b"\2\0\0\0" + struct.pack(">HH4s", 9, 0, b"Exif") + b"\0")
    more = box(b"iinf", b"\0\0\0\0" + struct.pack(">H", count) + count * entry)
    data = bytearray(avif[:at] + more + avif[at + size :])
    meta = data.index(b"meta") - 4
    (was,) = struct.unpack_from(">I", data, meta)
    struct.pack_into(">I", data, meta, was - size + len(more))
    return bytes(data)


def gif_of_a_huge_screen() -> bytes:
    gif = bytearray(encode(".gif"))
    struct.pack_into("<HH", gif, 6, 40_000, 20_525)  # 821 megapixels
    return bytes(gif)


def tiff(**tags: int) -> bytes:
    """A TIFF of one strip with these tags as 32-bit numbers, by their number: t256=64."""
    entries = {256: 64, 257: 48, 258: 8, 262: 1, 273: 8, 277: 1, 279: 64 * 48}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    index = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items())
    )
    body = bytes(64 * 48)
    head = b"II*\0" + struct.pack("<I", 8 + len(body))
    return head + body + struct.pack("<H", len(entries)) + index + bytes(4)


def webp(width: int, height: int) -> bytes:
    data = bytearray(encode(".webp", PHOTO, cv2.IMWRITE_WEBP_QUALITY, 101))
    at = data.index(b"VP8L") + 9
    (bits,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at, bits & ~0xFFFFFFF | width - 1 | height - 1 << 14)
    return bytes(data)


def jp2(**places: int) -> bytes:
    """A JPEG 2000 with other numbers at these offsets of its size segment."""
    data = bytearray(encode(".jp2"))
    at = data.index(b"\xff\x4f\xff\x51") + 8
    for name, value in places.items():
        struct.pack_into(
            ">I", data, at + 4 * ["x1", "y1", "x0", "y0", "tile_w", "tile_h"].index(name), value
        )
    return bytes(data)


def bmp(width: int, height: int) -> bytes:
    data = bytearray(encode(".bmp"))
    struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


PAM = b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 1\nMAXVAL %d\nTUPLTYPE GRAYSCALE\nENDHDR\n\0\0\0\0"
# name → the bytes, and what is said of them
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "png chunk of 4 GB": (
        lambda: encode(".png")[:33] + b"\xff\xff\xff\xf0tEXt" + encode(".png")[33:],
        "damaged or cut short",
    ),
    "png of 10 gigapixels": (
        lambda: encode(".png")[:16] + struct.pack(">II", 100_000, 100_000) + encode(".png")[24:],
        "100,000 × 100,000 pixels",
    ),
    "gif of 821 megapixels": (gif_of_a_huge_screen, "40,000 × 20,525 pixels"),
    "spaces": (lambda: b"P5" + b" " * 19_000_000, "damaged or cut short"),
    "comments": (lambda: b"P5" + b"#\n" * 9_000_000, "damaged or cut short"),
    "pam of white 0": (lambda: PAM % 0, "white is 0: expected 1 to 65535"),
    "pgm of a long white": (
        lambda: b"P5 2 2 " + b"9" * 4304 + b"\n\0\0\0\0",
        "damaged or cut short",
    ),
    "pam of a long white": (
        lambda: PAM.replace(b"%d", b"9" * 4304),
        "more than ten digits",
    ),
    "pgm of 90 megapixels": (lambda: b"P5 9000 10000 255\n" + bytes(9), "damaged or cut short"),
    "scans": (lambda: scans(200), f"more than {MAX_SCANS} scans"),
    "jpeg segments": (
        lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 5_000_000 + encode(".jpg")[2:],
        "more than 100,000 parts",
    ),
    "png chunks": (
        lambda: encode(".png")[:33] + chunk(b"tEXt", b"") * 1_600_000 + encode(".png")[33:],
        "more than 100,000 parts",
    ),
    "avif items": (lambda: avif_of_many_items(30_000), f"more than {MAX_ITEMS:,} items"),
    "avif of a gigapixel": (
        lambda: re.sub(
            rb"ispe\0{4}.{8}",
            b"ispe\0\0\0\0" + struct.pack(">II", 32_768, 32_768),
            encode(".avif"),
            flags=re.S,
        ),
        "32,768 × 32,768 pixels",
    ),
    "tiff of a huge tile": (
        lambda: tiff(t322=1 << 20, t323=1 << 20, t324=8, t325=64),
        "1,048,576 × 1,048,576 pixels",
    ),
    "tiff of a gigapixel": (lambda: tiff(t256=1 << 15, t257=1 << 15), "32,768 × 32,768 pixels"),
    "webp of 268 megapixels": (lambda: webp(16_384, 16_384), "16,384 × 16,384 pixels"),
    "jpeg 2000 of a gigapixel": (
        lambda: jp2(x1=1 << 15, y1=1 << 15, tile_w=1 << 15, tile_h=1 << 15),
        "32,768 × 32,768 pixels",
    ),
    "jpeg 2000 of tiny tiles": (
        lambda: jp2(x1=8000, y1=8000, tile_w=1, tile_h=1),
        "more than 65,535 tiles",
    ),
    "bmp of a gigapixel": (lambda: bmp(1 << 15, -(1 << 15)), "32,768 × 32,768 pixels"),
    "an AVI": (lambda: b"RIFF\x10\0\0\0AVI LIST" + bytes(99), "it is a video, not a photo"),
    "a Sun raster": (lambda: b"\x59\xa6\x6a\x95" + bytes(99), "is not an image"),
}


def spent() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    decoder = Decoder()
    decoder(encode(".png"))
    yield decoder
    decoder.close()


def peak(decoder: Decoder) -> int:
    """Bytes of memory that the decoding process had at most."""
    status = Path(f"/proc/{decoder._process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


@LINUX
@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_by_its_headers(name: str, decoder: Decoder) -> None:
    """Before a decoder sees it: in less than a second, in no more memory than its own bytes."""
    make, message = HOSTILE[name]
    data = make()
    before = spent()
    with pytest.raises(InputError, match=re.escape(message)):
        walk(data)
    assert spent() - before < 1
    with pytest.raises(InputError, match=re.escape(message)):
        decoder(data)
    assert decoder._process.poll() is None
    assert peak(decoder) < 400 << 20


def test_the_limit_is_the_callers(model: Path) -> None:
    photo = encode(".png")
    assert decode(photo, 48 * 64).shape == (48, 64, 3)
    with pytest.raises(ImageTooLargeError, match="64 × 48 pixels, and max_pixels allows 3,071"):
        decode(photo, 48 * 64 - 1)
    for untrusted in (False, True):
        with Ranker(model, max_pixels=3071, untrusted=untrusted) as ranker:
            with pytest.raises(ImageTooLargeError):
                ranker(photo)
            assert ranker(PHOTO).width == 64  # an array is there already


@pytest.mark.parametrize("frame", [b"", b"\0" * 9, b"\x78\x9c\xff\xff"])
def test_an_animation_is_its_first_picture(frame: bytes) -> None:
    """Broken further pictures of an animated PNG crashed OpenCV; no decoder gets to see them."""
    png = animated_png(frame)
    assert b"fdAT" not in walk(png) and b"acTL" not in walk(png)
    np.testing.assert_array_equal(decode(png), PHOTO[..., ::-1])


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_further_pictures_are_cut_off(suffix: str) -> None:
    animation = cv2.Animation()
    animation.frames = [PHOTO, 255 - PHOTO, PHOTO]
    animation.durations = np.array([100, 100, 100])
    data = cv2.imencodeanimation(suffix, animation)[1].tobytes()
    whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert len(walk(data)) < 0.6 * len(data)
    np.testing.assert_array_equal(decode(data), whole[..., ::-1])


@LINUX
def test_what_only_a_decoder_finds_out(decoder: Decoder) -> None:
    """Within the limits of headers a photo may still take long. The next one is not held up."""
    short = Decoder(limit_s=1)
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000), np.uint8)
    jpeg = encode(".jpg", noise, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    slow = jpeg[:-2] + 50 * last + jpeg[-2:]
    start = time.perf_counter()
    with pytest.raises(InputError, match="longer than 1 s"):
        short(slow)
    assert time.perf_counter() - start < 8
    assert short(encode(".png")).shape == PHOTO.shape
    short.close()


@LINUX
def test_a_photo_has_its_gigabyte(decoder: Decoder) -> None:
    """16 bits of four channels need more for so many pixels: a refusal, and the process lives."""
    chunks = struct.pack(">IIBBBBB", 10_000, 10_000, 16, 6, 0, 0, 0)
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(80_001)) for _ in range(10_000)) + packer.flush()
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with pytest.raises(InputError, match="not enough memory"):
        decoder(png)
    assert decoder(encode(".png")).shape == PHOTO.shape
    assert peak(decoder) < 1300 << 20


def test_a_crash_fails_one_photo(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A photo at which the decoder crashes, in dsgnn-run: the others are ranked."""
    monkeypatch.setattr(decoder_module, "CHILD", CRASHING)
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in "abc":
        tail = b"CRASH" if name == "b" else b""
        (photos / f"{name}.bmp").write_bytes(encode(".bmp") + tail)
    result = CliRunner().invoke(main, [str(photos), "--out", str(out), "--model", str(model)])
    assert result.exit_code == 1, result.output
    assert "b.bmp: its decoder crashed on it" in result.output
    images = json.loads((out / "results.json").read_text())["images"]
    assert ["error" in image for image in images] == [False, True, False]


def test_a_photo_that_its_decoder_does_not_survive() -> None:
    """The next one gets a new process; so does one after a decoder that takes too long."""
    decoder, data = Decoder(), encode(".png")
    photo = decoder(data)
    decoder._process.kill()
    decoder._process.wait()
    np.testing.assert_array_equal(decoder(data), photo)
    decoder._limit_s = 1
    decoder._process.send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match="longer than 1 s"):
        decoder(data)
    decoder._limit_s = DECODE_S
    np.testing.assert_array_equal(decoder(data), photo)

    def dies() -> None:
        time.sleep(0.3)
        decoder._process.kill()

    decoder._process.send_signal(signal.SIGSTOP)
    threading.Thread(target=dies).start()
    with pytest.raises(InputError, match="crashed"):
        decoder(data)
    decoder.close()


@pytest.mark.parametrize(
    "said",
    [
        "[1]",
        '"text"',
        "null",
        100_000 * "[",
        '{"size": "ab"}',
        '{"size": [1e999, 1]}',
        '{"size": [-1, -1]}',
        '{"size": [99999, 99999]}',
        '{"error": "text"}',
        '{"error": {"kind": [], "said": ["text"]}}',
    ],
    ids=lambda said: said[:20],
)
def test_a_process_that_a_photo_has_taken_over(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer in another form than ours is the photo's fault, and no bug of ours."""
    answers = f"for said in ('{{}}', {said!r}): sys.stdin.readline(); print(said, flush=True)"
    monkeypatch.setattr(decoder_module, "CHILD", f"import sys\n{answers}")
    decoder = Decoder()
    with pytest.raises(InputError, match="its decoder crashed on it"):
        decoder(encode(".png"))
    decoder.close()


def test_threads_share_the_processes(model: Path) -> None:
    """Each thread that decodes has a process; those that are free are used again."""
    decoders = Decoders()
    data = encode(".png")
    shapes = []

    def work() -> None:
        for _ in range(20):
            shapes.append(decoders(data).shape)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shapes == 80 * [(48, 64, 3)] and 1 <= len(decoders._idle) <= 4
    processes = [decoder._process for decoder in decoders._idle]
    decoders.close()
    assert all(process.poll() is not None for process in processes)
