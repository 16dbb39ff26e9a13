"""How fast a video is ranked, and what each stage costs alone.

    python tests/runtime/throughput.py [--seconds 30] [--size 640x360] [--model FILE]

Makes a clip of moving coloured boxes on a photo (a sample of the package), ranks it as dsgnn-run
does by default (annotated H.264, JSON lines, summary), and then runs decoding, ranking, and drawing
with writing each alone over the same frames. Printed: frames per second, and the wall time over
that of the slowest stage alone.
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np

from dsgnn.runtime import Ranker, samples
from dsgnn.runtime.frames import Frames, Selection, parse_raw
from dsgnn.runtime.run import rank_sources
from dsgnn.runtime.save import Target, video_file
from dsgnn.runtime.sources import find_sources, video_source
from dsgnn.runtime.steady import Steadier
from dsgnn.runtime.video import Presence, write_frames

RATE = 25


def make_clip(path: Path, seconds: float, size: tuple[int, int]) -> None:
    """A clip of `size` (width, height) at 25 frames per second."""
    width, height = size
    photo = cv2.resize(cv2.imread(str(samples()[2])), size)
    colours = ((30, 30, 220), (220, 60, 30), (40, 200, 40))
    side = height // 4
    with video_file(path, RATE, size) as write:
        for number in range(round(seconds * RATE)):
            picture = photo.copy()
            for index, colour in enumerate(colours):
                x = (number * (2 + index) + index * width // 3) % (width - side)
                y = height // 8 + index * side
                picture[y : y + side, x : x + side] = colour
            write(np.ascontiguousarray(picture[..., ::-1]))


def measure(ranker: Ranker, clip: Path, out: Path) -> dict[str, float]:
    """Seconds: wall, decode, rank and write; and the number of frames."""
    found = find_sources([str(clip)], out)
    ranker(np.zeros((360, 640, 3), np.uint8))  # the first call is slower
    start = perf_counter()
    outcomes = list(rank_sources(ranker, found.sources, out))
    wall = perf_counter() - start
    assert not any(outcome.error for outcome in outcomes)

    start = perf_counter()
    frames = list(Frames(video_source(clip), Selection()))
    decode = perf_counter() - start

    start = perf_counter()
    steadier = Steadier()
    rankings = [steadier(ranker.batch([frame.image])[0], frame.time_s) for frame in frames]
    rank = perf_counter() - start

    target = Target(out, found.sources[0], ("overlay", "json"), "assr", frozenset())
    size = frames[0].image.shape[1::-1]
    start = perf_counter()
    with write_frames(target, RATE, size, Presence(RATE)) as write:
        for pair in zip(frames, rankings, strict=True):
            write(pair)
    alone = perf_counter() - start
    return {"wall": wall, "decode": decode, "rank": rank, "write": alone, "frames": len(frames)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--size", type=parse_raw, default=(640, 360))
    parser.add_argument("--model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip, out = Path(folder, "clip.mp4"), Path(folder, "out")
        out.mkdir()
        make_clip(clip, options.seconds, options.size)
        ranker = Ranker(options.model)
        figures = measure(ranker, clip, out)
    frames = figures.pop("frames")
    slowest = max(figures["decode"], figures["rank"], figures["write"])
    print(ranker)
    print(f"{frames / figures['wall']:.1f} frames per second over {frames} frames")
    for stage, seconds in figures.items():
        print(f"{stage:7} {1e3 * seconds / frames:7.2f} ms per frame")
    print(f"wall over slowest stage alone: {figures['wall'] / slowest:.3f}")


if __name__ == "__main__":
    main()
