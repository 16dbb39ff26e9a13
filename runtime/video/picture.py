"""Decoded frames as they are meant to be seen (PyAV): deinterlaced, with square pixels, upright,
laid on white where they are transparent, and in the colours of a screen."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dsgnn.runtime.images import on_white

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter

# FFmpeg's numbers (H.273): transfer curves of high dynamic range, and primaries beyond a screen's.
HDR = (16, 18)  # PQ, HLG
WIDE = (9, 11, 12)  # BT.2020, DCI-P3, Display P3
BT709 = 1
COLOURS = ("colorspace", "color_range", "color_trc", "color_primaries")


def shown(frame: VideoFrame, size: tuple[int, int], reformatter: VideoReformatter) -> np.ndarray:
    """A frame, not interlaced, as (h, w, 3) uint8 RGB.

    size: (width, height) of its picture in square pixels, before it is turned upright. High dynamic
    range and wide colours are brought to BT.709 by FFmpeg's swscale. Raises ValueError or
    av.FFmpegError for a form that cannot be converted.
    """
    colours: dict[str, Any] = {}
    if frame.color_trc in HDR or frame.color_primaries in WIDE:
        colours = {"dst_color_trc": BT709, "dst_color_primaries": BT709}
    transparent = any(component.is_alpha for component in frame.format.components)
    form = "rgba" if transparent else "rgb24"
    pixels = reformatter.reformat(frame, *size, form, **colours).to_ndarray()
    if transparent:
        pixels = on_white(pixels[:, :, :3], pixels[:, :, 3])
    return upright(pixels, frame)


def deinterlaced(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """The same frames at the same times. An interlaced one keeps one of its fields, and the lines
    between are made by what is known of the other field (bwdif)."""
    graph: Any = None
    form: tuple[Any, ...] = ()
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        told = {name: getattr(frame, name) for name in COLOURS}
        if form != (frame.width, frame.height, frame.format.name):
            yield from _pulled(graph, told, at_end=True)
            graph, form = _deinterlacer(frame), (frame.width, frame.height, frame.format.name)
        graph.push(frame)
        yield from _pulled(graph, told)
    yield from _pulled(graph, told if form else {}, at_end=True)


def _deinterlacer(frame: VideoFrame) -> Any:
    """A filter for frames of the form of this one."""
    from av.filter import Graph

    graph = Graph()
    first = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    filter_ = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(first, filter_, graph.add("buffersink")).configure()
    return graph


def _pulled(graph: Any, told: dict[str, int], at_end: bool = False) -> Iterator[VideoFrame]:
    """The frames that a filter has ready, with the colours described as in those that went in.
    at_end: no more will go in. There may be no filter."""
    import av

    if graph is not None and at_end:
        graph.push(None)
    while graph is not None:
        try:
            frame = graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
        for name, value in told.items():
            setattr(frame, name, value)
        yield frame


def upright(pixels: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """Turn and mirror pixels (h, w, 3) as the frame's display matrix asks, by quarter turns.

    Source: ISO/IEC 14496-12, 6.2.2: a point (p, q) of the picture is shown at (ap + cq, bp + dq).
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if abs(b) > abs(a):
        pixels = pixels.swapaxes(0, 1)
        a, d = c, b
    pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)
