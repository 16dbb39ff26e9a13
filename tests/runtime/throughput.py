"""How fast a video is ranked, and what each stage costs alone.

    python tests/runtime/throughput.py [--seconds 30] [--size 640x360] [--model FILE]

Makes a clip of moving coloured boxes on a photo (a sample of the package), ranks it as dsgnn-run
does by default (annotated H.264, JSON lines, summary), and then runs decoding, ranking, and drawing
with writing each alone over the same frames. Prints JSON: frames per second, milliseconds per
frame of the whole and of each stage alone, and the whole's time over that of the slowest stage.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np

from dsgnn.runtime import Ranker, samples
from dsgnn.runtime.disk.outputs import OutputFiles, video_file
from dsgnn.runtime.disk.sources import find_sources, video_source
from dsgnn.runtime.run.loop import rank_sources
from dsgnn.runtime.video import h264
from dsgnn.runtime.video.frames import Frames, Selection, parse_raw
from dsgnn.runtime.video.steady import Steadier
from dsgnn.runtime.video.to_files import Presence, choose_threads, write_frames

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
            write(np.ascontiguousarray(picture[..., ::-1]), number / RATE, 1 / RATE)


def measure(ranker: Ranker, clip: Path, out: Path) -> dict[str, float]:
    """Seconds: wall, decode, rank and write; and the number of frames."""
    found = find_sources([str(clip)], out)
    for frame, _ in ranker.stream(clip, max_frames=3):  # the first calls are slower
        ranker(frame)
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

    target = OutputFiles(out, found.sources[0], ("overlay", "json"), "assr", frozenset())
    size = frames[0].image.shape[1::-1]
    start = perf_counter()
    with write_frames(target, RATE, size, Presence()) as write:
        for pair in zip(frames, rankings, strict=True):
            write(pair)
    alone = perf_counter() - start
    return {"wall": wall, "decode": decode, "rank": rank, "write": alone, "frames": len(frames)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--size", type=parse_raw, default=(640, 360))
    parser.add_argument("--model")
    parser.add_argument("--threads", type=int, help="default: as dsgnn-run takes for videos")
    options = parser.parse_args()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as folder:
        clip, out = Path(folder, "clip.mp4"), Path(folder, "out")
        out.mkdir()
        make_clip(clip, options.seconds, options.size)
        threads = choose_threads(options.threads, [video_source(clip)])
        ranker = Ranker(options.model, threads=threads)
        figures = measure(ranker, clip, out)
    frames = figures.pop("frames")
    slowest = max(("decode", "rank", "write"), key=lambda stage: figures[stage])
    report = {
        "size": "x".join(map(str, options.size)),
        "frames": frames,
        "frames_per_second": round(frames / figures["wall"], 2),
        "ms_per_frame": {name: round(1e3 * s / frames, 2) for name, s in figures.items()},
        "slowest_stage": slowest,
        "wall_over_slowest_stage": round(figures["wall"] / figures[slowest], 3),
        "video": "H.264" if h264.is_installed() else "MPEG-4 Part 2",
        "cores": os.cpu_count(),
        "load_before": load,
        "threads": ranker.backend.threads,
        "model": ranker.describe(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
