"""Small videos for tests, made by PyAV: of given times, in given containers, with oddities."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgnn.runtime.disk.sources import video_source
from dsgnn.runtime.video.frames import Frame, Frames, Selection

MILLI = Fraction(1, 1000)
FENCED = 10_000_000  # pixels: films are read in a process of their own here
STEP = 20  # greys from one frame to the next


def flat(grey: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """(h, w, 3) of one grey; size is (width, height)."""
    return np.full((size[1], size[0], 3), grey, np.uint8)


def film(
    path: str | Path,
    pictures: Iterable[np.ndarray],
    times_ms: Sequence[int] | None = None,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    container: str | None = None,
    rate: int | Fraction = 10,
    sound_s: float = 0,
    sound_codec: str = "aac",
    options: dict[str, str] | None = None,
    coding: dict[str, str] | None = None,
    prepare: Any = None,
    each: Any = None,
) -> Path:
    """Write a video. times_ms: of each picture; None = `rate` per second. sound_s: seconds of a
    tone beside it. options: of the container. coding: of the encoder. prepare(stream) and
    each(frame) may change what is asked for."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=container, options=options or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=coding or {})
        stream.pix_fmt = pix_fmt
        if times_ms is not None:
            stream.codec_context.time_base = MILLI
        if prepare is not None:
            prepare(stream)
        sound = out.add_stream(sound_codec, rate=48_000) if sound_s else None
        for number, picture in enumerate(pictures):
            if not number:
                stream.height, stream.width = picture.shape[:2]
            form = "rgba" if picture.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=form)
            if times_ms is None:
                frame.pts, frame.time_base = number, 1 / Fraction(rate)
            else:
                frame.pts, frame.time_base = times_ms[number], MILLI
            if each is not None:
                frame = frame.reformat(format=pix_fmt)
                each(frame)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            tone = tone_of(sound_s)
            for at in range(0, tone.shape[1], 1024):
                part = np.ascontiguousarray(tone[:, at : at + 1024])
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 48_000, at, Fraction(1, 48_000)
                out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return Path(path)


def tone_of(seconds: float) -> np.ndarray:
    """A tone of 440 Hz: (1, samples) float32, 48,000 per second."""
    return np.sin(np.arange(round(48_000 * seconds)) * 2 * np.pi * 440 / 48_000, dtype="f4")[None]


def greys(count: int, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    return [flat(20 + STEP * number, size) for number in range(count)]


def read(path: str | Path, **select: Any) -> list[Frame]:
    return list(Frames(video_source(path), Selection(**select), FENCED))


def seen(frames: list[Frame]) -> list[int]:
    """The numbers of the frames, as their pixels tell them."""
    assert all(np.ptp(frame.image.astype(int)) < 8 for frame in frames)
    return [round((float(frame.image.mean()) - 20) / STEP) for frame in frames]


def times(frames: list[Frame]) -> list[float]:
    return [round(frame.time_s, 3) for frame in frames]


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"out/{name}.frames.jsonl").read_text().splitlines()]


def summary(name: str) -> dict:
    return json.loads(Path(f"out/{name}.summary.json").read_text())
