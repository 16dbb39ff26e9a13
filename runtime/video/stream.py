"""Frames in, ranked frames out: what `Ranker.stream` and dsgnn-run share."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.video.frames import Ended, Frame, Frames
from dsgnn.runtime.video.overlap import ahead
from dsgnn.runtime.video.steady import Steadier

if TYPE_CHECKING:
    from dsgnn.runtime.ranker import Ranker

AHEAD = 4  # decoded frames that wait; as much again as a batch


def ranked_frames(
    ranker: Ranker, frames: Frames, batch: int, steady: bool
) -> Generator[tuple[Frame, Ranking], None, None]:
    """Rank frames in groups of `batch`, decoding the next meanwhile.

    The frames before an `Ended` are ranked first, in a smaller group if need be.
    """
    steadier = Steadier()
    with closing(ahead(iter(frames), AHEAD + batch)) as decoded:
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
                timed = replace(
                    ranking, timings_ms={**ranking.timings_ms, "decode": frame.decode_ms}
                )
                yield frame, steadier(timed, frame.time_s) if steady else timed
        if ended is not None:
            raise ended
