"""What a file is by its bytes, whatever its name says."""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

HEAD = 1024  # bytes of the beginning that tell the form
BLOCKS = 1 << 17  # that are walked at most, to tell an animation from a picture
# Raw files of cameras, beside those that begin as TIFF does.
RAWS = (b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW", b"FOVb", b"\0MRM")
STILLS = (
    *(b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", b"P7\n"),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),  # JPEG 2000
    *RAWS,
)
PNM = re.compile(rb"P[1-6][\s#]")
MOVING = (
    *(b"\x1a\x45\xdf\xa3", b"OggS", b"FLV\1", b"\x06\x0e\x2b\x34", b"DKIF", b"YUV4MPEG2 "),
    *(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b".RMF", b"\x1f\x07\0", b"nut/multimedia"),
    *(b"\0\0\1\xba", b"\0\0\1\xb3"),  # MPEG program and elementary streams
)
# The first unit of an H.264 stream (parameters, delimiter or information), or of an H.265 one.
H26X = re.compile(rb"\x00?\x00\x00\x01(?:[\x06\x09\x27\x47\x67]|[\x40\x42\x44\x46\x4e]\x01)")
ATOMS = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"moof", b"styp")
STILL_BRANDS = (
    *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"mif2", b"msf1", b"avif"),
    *(b"crx ", b"jxl "),
)
# Texts that name the files or addresses of what they play: HLS and M3U, FFmpeg's scripts, SDP, PLS,
# VobSub's index, and those in XML (DASH, ASX, SMIL, XSPF, Smooth Streaming).
PLAYLIST = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:#EXTM3U|ffconcat version|v=0\r?\n|\[playlist\]|# VobSub|"
    rb"(?:<[?!][^>]*>\s*)*<(?:MPD|asx|smil|playlist|SmoothStreamingMedia)[\s>])",
    re.I,
)
SOUND = re.compile(rb"ID3|fLaC|#!AMR|MAC |wvPk|MThd|FORM....AIF|\xff[\xf1-\xf3\xf9-\xfb]", re.S)


def kind(file: BinaryIO) -> str:
    """Say what a file that can be seeked holds: "image", "animation", "video", "sound", "playlist",
    and "" for anything else. The file is left at its beginning.

    A container that may hold video counts as one, also if it turns out to hold sound alone.
    """
    head = file.read(HEAD)
    try:
        if head.startswith(b"GIF8"):
            return "animation" if _pictures_of_gif(file) > 1 else "image"
        if head.startswith(b"\x89PNG"):
            return "animation" if _is_apng(file) else "image"
    finally:
        file.seek(0)
    if head.startswith(b"RIFF"):
        moves = head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2
        webp = "animation" if moves else "image"
        return {b"WEBP": webp, b"AVI ": "video", b"WAVE": "sound"}.get(head[8:12], "")
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] in STILL_BRANDS else "video"
    if head.startswith(STILLS) or PNM.match(head):
        return "image"
    if head.startswith(MOVING) or head[4:8] in ATOMS or H26X.match(head) or _is_transport(head):
        return "video"
    if PLAYLIST.match(head):
        return "playlist"
    return "sound" if SOUND.match(head) else ""


def _is_transport(head: bytes) -> bool:
    """An MPEG transport stream has a sync byte every 188 bytes, or every 192 with time codes."""
    return any(
        len(head) > at + 2 * step and {head[at], head[at + step], head[at + 2 * step]} == {0x47}
        for at, step in ((0, 188), (4, 192))
    )


def _is_apng(file: BinaryIO) -> bool:
    """Whether a chunk of control of an animation stands before the first picture.

    As in a GIF, what lies behind BLOCKS chunks is not looked at.
    """
    file.seek(8)
    for _ in range(BLOCKS):
        if len(head := file.read(8)) < 8:
            break
        size, name = struct.unpack(">I4s", head)
        if name in (b"acTL", b"IDAT"):
            return name == b"acTL" and file.read(4) > b"\0\0\0\1"
        file.seek(size + 4, 1)
    return False


def gif_colours(flags: int) -> int:
    """How many bytes a GIF's table of colours has."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _pictures_of_gif(file: BinaryIO) -> int:
    """How many pictures a GIF has; 2 stands for more. Source: the GIF89a specification.

    What lies behind BLOCKS blocks is not looked at: a file may be made of nothing else.
    """
    file.seek(10)
    (flags,) = file.read(1) or b"\0"
    file.seek(13 + gif_colours(flags))
    pictures = blocks = 0
    while pictures < 2 and (mark := file.read(1)) in (b"\x21", b"\x2c"):
        if mark == b"\x21":
            file.seek(1, 1)
        else:
            pictures += 1
            (flags,) = file.read(9)[8:] or b"\0"
            file.seek(1 + gif_colours(flags), 1)
        while (size := file.read(1)) > b"\0":
            file.seek(size[0], 1)
            blocks += 1
            if blocks == BLOCKS:
                return pictures
    return pictures
