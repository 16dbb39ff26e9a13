"""Frames in, ranked frames out: the part that Python's streams and dsgnn-run share."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsgnn.runtime.disk.sources import video_source
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.video.feed import Ended
from dsgnn.runtime.video.frames import Frame, Frames, Selection
from dsgnn.runtime.video.pipeline import read_ahead
from dsgnn.runtime.video.steady import Steadier

DECODED = 4  # decoded frames that wait to be ranked, beyond those of one batch


class FrameRanker(Protocol):
    """What this wing needs of a `Ranker`."""

    def batch(self, images: Sequence[np.ndarray]) -> list[Ranking]:
        """Rank frames, each (h, w, 3) uint8 RGB, in their order."""

    def describe(self) -> dict[str, Any]:
        """The `model` entry of the records."""


def ranked_frames(
    ranker: FrameRanker, frames: Frames, batch: int, steady: bool
) -> Generator[tuple[Frame, Ranking], None, None]:
    """Rank frames in groups of `batch` while the next ones are decoded.

    steady: objects keep their identity and ranks do not flicker. When the frames end with `Ended`,
    those before it are ranked first, in a smaller group if need be, and then it is raised.
    """
    steadier = Steadier()
    with closing(read_ahead(iter(frames), DECODED + batch)) as decoded:
        ended: Ended | None = None
        while ended is None:
            group: list[Frame] = []
            try:
                for frame in decoded:
                    group.append(frame)
                    if len(group) == batch:
                        break
            except Ended as error:
                ended = error
            if not group:
                break
            rankings = ranker.batch([frame.image for frame in group])
            for frame, ranking in zip(group, rankings, strict=True):
                times = {**ranking.timings_ms, "decode": frame.decode_ms}
                timed = replace(ranking, timings_ms=times)
                yield frame, steadier(timed, frame.time_s) if steady else timed
        if ended is not None:
            raise ended


def stream_video(
    ranker: FrameRanker,
    source: str | Path | int,
    select: Selection,
    batch: int,
    steady: bool,
    fenced: int | None,
) -> Generator[tuple[np.ndarray, Ranking], None, None]:
    """Open a video and return a generator of (frame, ranking); `Ranker.stream` says the rest.

    fenced: as of `Frames`.
    """
    if batch < 1:
        raise OptionError(f"batch must be at least 1, got {batch}")
    frames = Frames(video_source(source), select, fenced)

    def pairs() -> Generator[tuple[np.ndarray, Ranking], None, None]:
        with closing(ranked_frames(ranker, frames, batch, steady)) as ranked:
            for frame, ranking in ranked:
                yield frame.image, ranking

    return pairs()
