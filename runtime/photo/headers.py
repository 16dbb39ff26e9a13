"""Walk the headers of a photo's file before a decoder sees its bytes.

Decoders believe what a header says: they take memory and time for it before they look for the
pixels. So every length is compared here with the file, width × height with a limit, and the number
of scans, chunks and items with what photos have. Of an animation only the first picture is left.

The sources are the formats' standards: ITU-T T.81 (JPEG), W3C PNG, RFC 9649 (WebP), TIFF 6.0,
GIF89a, ISO/IEC 14496-12 and 23008-12 (AVIF), ISO/IEC 15444-1 (JPEG 2000), and netpbm's manual.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice

from dsgnn.runtime.disk import signatures
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.photo.boxes import boxes_in
from dsgnn.runtime.photo.tiff import BYTES, TIFF, is_camera_raw

READABLE = "JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000 or PNM"
VIDEO = "it is a video, not a photo: in Python, Ranker.stream ranks videos"
PLAYLIST = "it is a playlist, not a video: give the files or the address that it names"
# Pictures that OpenCV has no decoder for, or that are no photos.
OTHERS = {
    **dict.fromkeys((b"\xff\x0a", b"\0\0\0\x0cJXL "), "a JPEG XL photo"),
    **dict.fromkeys((b"8BPS", b"qoif"), "a picture of Photoshop or QOI"),
    **dict.fromkeys((b"\x76\x2f\x31\x01", b"#?RADIANCE"), "a picture of high dynamic range"),
    b"\0\0\1\0": "an icon (ICO)",
    b"%PDF": "a PDF",
}
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
MAX_PIXELS = 100_000_000  # width × height of a photo, unless another limit is asked for
MAX_SCANS = 64  # of a progressive JPEG, each of which passes over all pixels; usual are ten
MAX_ITEMS = 1_000  # of an AVIF file; a photo of 200 megapixels in tiles of 512 pixels has 800
MAX_PARTS = 100_000  # chunks, segments or boxes of any file
MAX_TILES = 65_535  # of a JPEG 2000 file, by its standard
TEXT_HEAD = 1 << 16  # bytes in which the header of a PNM file has to end
ANIMATION = (b"acTL", b"fcTL", b"fdAT")  # chunks of an animated PNG
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # of a JPEG, but for those inside its scans
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a JPEG's size
# The header of a PNM file is numbers between blanks and comments. The expressions have one way to
# match a text, so that none takes long.
_GAP = rb"(?=[\s#])\s*(?:#[^\n]*\n\s*)*"
PNM = re.compile(rb"P[1-6]" + 2 * (_GAP + rb"(\d{1,10})") + rb"(?![\d])")
MAXVAL = re.compile(_GAP + rb"(\d{1,10})(?!\d)")

Walked = tuple[list[tuple[int, int]], bytes]  # widths and heights, and what a decoder may see


class ImageTooLargeError(InputError):
    """A photo of more pixels than the limit."""


class Damaged(Exception):
    """The headers do not fit the file."""


def walk(data: bytes, max_pixels: int = MAX_PIXELS) -> bytes:
    """Check a photo's headers; gives what a decoder may see of the file.

    max_pixels: width × height of the largest photo. Raises ImageTooLargeError for a larger one, and
    InputError for bytes that are no photo, are damaged, or have more parts than photos have.
    """
    name, walker = _format(data)
    try:
        sizes, seen = walker(data)
    except (Damaged, struct.error, IndexError, KeyError):
        raise damaged(name, data) from None
    for width, height in sizes:
        if width * height > max_pixels:
            raise ImageTooLargeError(
                f"it has {width:,} × {height:,} pixels, and max_pixels allows {max_pixels:,}"
            )
    return seen


def damaged(name: str, data: bytes) -> InputError:
    """What to raise for a file that says it is of this format and is not readable."""
    return InputError(f"the {name} data is damaged or cut short ({len(data)} bytes)")


def format_of(data: bytes) -> str:
    """The name of the format, as in READABLE. Raises InputError if it is none of them."""
    return _format(data)[0]


def is_photo(data: bytes) -> bool:
    """Whether the bytes begin as those of a photo that can be read do."""
    try:
        return bool(format_of(data))
    except InputError:
        return False


def _format(data: bytes) -> tuple[str, Callable[[bytes], Walked]]:
    if is_camera_raw(data):
        raise InputError(
            "it is a camera's raw file, of which only the preview could be read: develop it, and "
            "save it as JPEG, PNG or TIFF"
        )
    for start, name, walker in _FORMATS:
        if data.startswith(start):
            return name, walker
    if data[:4] == b"RIFF" and data[8:12] in (b"WEBP", b""):
        return "WebP", _webp
    if data[4:8] == b"ftyp":
        (size,) = struct.unpack_from(">I", data)
        brands = [data[at : at + 4] for at in range(8, min(size, len(data), 256), 4)]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF", _avif
        if brands and brands[0] in HEIF_BRANDS:
            raise InputError(
                "HEIC photos cannot be read (OpenCV has no decoder): convert it to JPEG or PNG"
            )
    if (kind := signatures.kind(BytesIO(data))) in ("video", "playlist"):
        raise InputError(VIDEO if kind == "video" else PLAYLIST)
    if other := next((OTHERS[start] for start in OTHERS if data.startswith(start)), ""):
        raise InputError(f"it is {other}, which cannot be read: convert it to JPEG or PNG")
    raise InputError(f"it is not an image ({READABLE} is expected)")


def _few(parts: Iterator) -> Iterator:
    """The same parts. Raises InputError if there are more than MAX_PARTS."""
    yield from islice(parts, MAX_PARTS)
    if next(parts, None) is not None:
        raise InputError(
            f"it has more than {MAX_PARTS:,} parts of one kind, and no photo has as many"
        )


def _jpeg(data: bytes) -> Walked:
    sizes, scans, at = [], 0, 2
    for _ in _few(iter(int, 1)):
        found = MARKER.search(data, at)
        if found is None or data[found.end() - 1] == 0xD9:  # the end
            break
        kind, at = data[found.end() - 1], found.end()
        if kind == 0xD8:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if kind in FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 3)
            sizes.append((width, height))
        elif kind == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise InputError(f"it has more than {MAX_SCANS} scans, and no photo has as many")
        at += max(length, 2)
    if not sizes or not scans:
        raise Damaged
    return sizes, data


def _png(data: bytes) -> Walked:
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise Damaged
    kept = [data[:8]]
    for kind, start, end in _few(png_chunks(data)):
        if kind not in ANIMATION:
            kept.append(data[start:end])
    if kept[-1][4:8] != b"IEND":
        raise Damaged
    return [struct.unpack_from(">II", data, 16)], b"".join(kept)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a PNG file up to its end: kind, and where they start and end. Raises Damaged
    and struct.error for a file that is cut short."""
    at, kind = 8, b""
    while kind != b"IEND" and at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        start, at = at, at + 12 + length
        if at > len(data):
            raise Damaged
        yield kind, start, at


def _webp(data: bytes) -> Walked:
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise Damaged
    sizes, end = [], size + 8
    for kind, start, _, after in _few(riff_chunks(data, end)):
        if kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", data, start + 6)
            sizes.append((width & 0x3FFF, height & 0x3FFF))
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, start + 1)
            sizes.append(((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1))
        elif kind in (b"VP8X", b"ANMF"):
            at = start + (4 if kind == b"VP8X" else 6)
            width, height = (
                int.from_bytes(data[at + 3 * i : at + 3 * i + 3], "little") for i in (0, 1)
            )
            sizes.append((width + 1, height + 1))
        if kind == b"ANMF":  # the first picture
            return sizes, data[:4] + struct.pack("<I", after - 8) + data[8:after]
    if not sizes:
        raise Damaged
    return sizes, data


def riff_chunks(data: bytes, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """The chunks of a WebP file up to a place in it: kind, where the content starts and ends, and
    where the next chunk starts. Raises Damaged for one that reaches beyond the end."""
    at = 12
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        start, at = at + 8, at + 8 + length + length % 2
        if start + length > end:
            raise Damaged
        yield kind, start, start + length, min(at, end)


def _gif(data: bytes) -> Walked:
    sizes = [struct.unpack_from("<HH", data, 6)]
    at = 13 + signatures.gif_colours(data[10])
    blocks = _few(iter(int, 1))
    while data[at] == 0x21:  # an extension
        next(blocks)
        at = _after_blocks(data, at + 2)
    if data[at] != 0x2C:
        raise Damaged
    sizes.append(struct.unpack_from("<HH", data, at + 5))
    at = _after_blocks(data, at + 11 + signatures.gif_colours(data[at + 9]))
    return sizes, data[:at] + b";"


def _after_blocks(data: bytes, at: int) -> int:
    """Where a sequence of data blocks of a GIF has ended."""
    while size := data[at]:
        at += size + 1
    return at + 1


def _bmp(data: bytes) -> Walked:
    (head,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if head == 12 else "<ii", data, 18)
    return [(abs(width), abs(height))], data


def _tiff(data: bytes) -> Walked:
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    number, count, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    (start,) = struct.unpack_from(order + number, data, 8 if big else 4)
    (entries,) = struct.unpack_from(order + count, data, start)
    start += struct.calcsize(order + count)
    if start + entries * entry > len(data):
        raise Damaged
    values = {}
    for at in _few(iter(range(start, start + entries * entry, entry))):
        tag, kind, many = struct.unpack_from(order + "HH" + number, data, at)
        at += 4 + struct.calcsize(number)
        held = many * (BYTES[kind] if kind < len(BYTES) else 1)
        if held > struct.calcsize(number):
            (at,) = struct.unpack_from(order + number, data, at)
            if at + held > len(data) and tag in (273, 279, 324, 325):  # where the pixels are
                raise Damaged
        if kind in (3, 4, 16) and many:
            values[tag] = struct.unpack_from(order + {3: "H", 4: "I", 16: "Q"}[kind], data, at)[0]
    sizes = [(values[256], values[257])]
    if 322 in values and 323 in values:  # a tile, which is made whole even if the picture is less
        sizes.append((values[322], values[323]))
    return sizes, data


def _avif(data: bytes) -> Walked:
    boxes = dict(_whole_boxes(data, 0, len(data)))
    start, end = boxes[b"meta"]
    meta = dict(_whole_boxes(data, start + 4, end))
    properties = dict(_whole_boxes(data, *meta[b"iprp"]))
    version, at = data[meta[b"iinf"][0]], meta[b"iinf"][0] + 4
    counts = [struct.unpack_from(">I" if version else ">H", data, at)[0]]
    at = meta[b"iloc"][0]
    counts.append(struct.unpack_from(">H" if data[at] < 2 else ">I", data, at + 6)[0])
    if b"iref" in meta:
        start, end = meta[b"iref"]
        counts.append(sum(1 for _ in _few(boxes_in(data, start + 4, end))))
    inside = list(_few(boxes_in(data, *properties[b"ipco"])))
    counts.append(len(inside))
    if max(counts) > MAX_ITEMS:
        raise InputError(f"it has more than {MAX_ITEMS:,} items, and no photo has as many")
    sizes = [struct.unpack_from(">II", data, at + 4) for kind, (at, _) in inside if kind == b"ispe"]
    if not sizes:
        raise Damaged
    return sizes, data


def _whole_boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The boxes in data[start:end]. Raises Damaged if the last one goes beyond the end."""
    for kind, (at, after) in _few(boxes_in(data, start, end)):
        (size,) = struct.unpack_from(">I", data, at - 8)
        if size > 8 and at - 8 + size > end:
            raise Damaged
        yield kind, (at, after)


def _jpeg_2000(data: bytes) -> Walked:
    at = 0
    if not data.startswith(b"\xff\x4f"):
        at = dict(_few(boxes_in(data, 0, len(data))))[b"jp2c"][0]
    if data[at : at + 4] != b"\xff\x4f\xff\x51":
        raise Damaged
    x1, y1, x0, y0, tile_w, tile_h = struct.unpack_from(">6I", data, at + 8)
    width, height = x1 - x0, y1 - y0
    if min(width, height, tile_w, tile_h) < 1:
        raise Damaged
    if -(-x1 // tile_w) * -(-y1 // tile_h) > MAX_TILES:
        raise InputError(f"it has more than {MAX_TILES:,} tiles, and no photo has as many")
    return [(width, height)], data


def _pnm(data: bytes) -> Walked:
    width, height, _, needed = pnm_head(data)
    if needed > len(data):
        raise Damaged
    return [(width, height)], data


def pnm_head(data: bytes) -> tuple[int, int, int, int]:
    """Of a PNM or PAM file: width, height, the value of white, and how many bytes it has at least.

    Raises Damaged for a header that is not whole, InputError for a white of no use.
    """
    head = data[:TEXT_HEAD]
    if data[1:2] == b"7":
        end = head.index(b"\nENDHDR") + 8 if b"\nENDHDR" in head else 0
        words = dict(
            line.split(None, 1) for line in head[:end].splitlines() if len(line.split()) == 2
        )
        names = (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL")
        if not end or not all(words[name].strip().isdigit() for name in names):
            raise Damaged
        if max(len(words[name]) for name in names) > 10:
            raise InputError("a number of its header has more than ten digits")
        width, height, channels, white = (int(words[name]) for name in names)
    else:
        found = PNM.match(head)
        if found is None:
            raise Damaged
        width, height, white = int(found[1]), int(found[2]), 1
        end, channels = found.end(), 3 if data[1:2] in b"36" else 1
        if data[1:2] not in b"14":
            found = MAXVAL.match(head, end)
            if found is None:
                raise Damaged
            white, end = int(found[1]), found.end()
    if not 1 <= white <= 65535:
        raise InputError(f"its header says that white is {white}: expected 1 to 65535")
    numbers = width * height * channels
    if data[1:2] in b"123":  # as text: a digit each, with a blank after it
        return width, height, white, end + (numbers if data[1:2] == b"1" else 2 * numbers - 1)
    if data[1:2] == b"4":
        return width, height, white, end + -(-width // 8) * height
    return width, height, white, end + numbers * (2 if white > 255 else 1)


_FORMATS: tuple[tuple[bytes, str, Callable[[bytes], Walked]], ...] = (
    (b"\xff\xd8\xff", "JPEG", _jpeg),
    (b"\x89PNG", "PNG", _png),
    *((start, "TIFF", _tiff) for start in (*TIFF, b"II+\0", b"MM\0+")),
    (b"GIF8", "GIF", _gif),
    (b"BM", "BMP", _bmp),
    (b"\0\0\0\x0cjP  ", "JPEG 2000", _jpeg_2000),
    (b"\xff\x4f\xff\x51", "JPEG 2000", _jpeg_2000),
    *((b"P%d" % number, "PNM", _pnm) for number in range(1, 8)),
)
