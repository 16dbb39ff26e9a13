"""Films that crash, hang or fill the process that reads them: they fail alone."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from films import film, flat

import dsgnn.runtime.video.fence as fence_module
from dsgnn.runtime import Ranker
from dsgnn.runtime.disk.outputs import make_folder
from dsgnn.runtime.disk.sources import find_sources, video_source
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.run.loop import rank_sources
from dsgnn.runtime.video.fence import FencedFilm, end_all
from dsgnn.runtime.video.film import open_film
from dsgnn.runtime.video.frames import Frames, Selection

pytest.importorskip("av")
PIXELS = 1_000_000
# The process that reads films, in which something happens at the third frame of some.
PLANTED = """
import os, signal
import dsgnn.runtime.video.fence as fence
import dsgnn.runtime.video.film as film
shown, limit = film.shown, fence.limit_time
fence.limit_time = lambda: limit(1)
frames = 0
def plant(*arguments):
    global frames
    frames += 1
    if frames == 3:
        {}
    return shown(*arguments)
film.shown = plant
fence.main()
"""
CRASH = PLANTED.format("os.kill(os.getpid(), signal.SIGSEGV)")
HANG = PLANTED.format("\n        while True: pass")
FILL = PLANTED.format("bytearray(3 << 30)")
BUG = PLANTED.format("(1, 2)[3]")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    film("clip.mkv", [flat(20 * number, (64, 48)) for number in range(1, 7)])
    end_all()  # a process of another test
    yield
    end_all()


def pixels(frames: Frames) -> list[int]:
    return [round(float(frame.image.mean())) for frame in frames]


def test_the_frames_are_those_of_an_open_film() -> None:
    fenced = list(Frames(video_source("clip.mkv"), Selection(every=2), PIXELS))
    plain = list(Frames(video_source("clip.mkv"), Selection(every=2)))
    for one, other in zip(fenced, plain, strict=True):
        assert (one.number, one.time_s, one.duration_s) == (
            other.number,
            other.time_s,
            other.duration_s,
        )
        assert np.array_equal(one.image, other.image)
    told, itself = (
        FencedFilm(video_source("clip.mkv"), None, PIXELS),
        open_film(video_source("clip.mkv"), None),
    )
    assert (told.rate, told.declared, told.has_sound, told.notes) == (
        itself.rate,
        itself.declared,
        itself.has_sound,
        itself.notes,
    )


def test_one_process_reads_films_one_after_the_other() -> None:
    numbers = []
    for _ in range(3):
        assert len(pixels(Frames(video_source("clip.mkv"), Selection(), PIXELS))) == 6
        (process,) = fence_module._idle
        numbers.append(process.pid)
    assert len(set(numbers)) == 1
    end_all()
    with pytest.raises(ProcessLookupError):
        os.kill(numbers[0], 0)


@pytest.mark.parametrize(
    ("child", "said"),
    [
        pytest.param(CRASH, "its decoder crashed on it", id="crash"),
        pytest.param(HANG, "reading it takes longer than 5 s for one frame", id="hang"),
        pytest.param(FILL, "reading it takes more memory than one video may", id="memory"),
    ],
)
def test_a_film_fails_alone(
    child: str, said: str, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames before are in its records, and the film behind it is ranked as always."""
    if child is HANG and not hasattr(signal, "SIGXCPU"):
        pytest.skip("processor time is not limited here")
    film("good.mkv", [flat(100, (64, 48))] * 2)
    make_folder(Path("out"))
    found = find_sources(["clip.mkv", "good.mkv"], Path("out"))
    monkeypatch.setattr(fence_module, "CHILD", child)
    errors = [o.error for o in rank_sources(ranker, found.sources, Path("out"), ("json",))]
    assert [error for error in errors if error] == [errors[2]]
    assert said in errors[2]
    assert len(Path("out/clip.frames.jsonl").read_text().splitlines()) == 2
    assert len(Path("out/good.frames.jsonl").read_text().splitlines()) == 2


def test_a_bug_in_the_process_surfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence_module, "CHILD", BUG)
    with pytest.raises(RuntimeError, match="(?s)bug in the process.*IndexError"):
        pixels(Frames(video_source("clip.mkv"), Selection(), PIXELS))


def test_frames_of_too_many_pixels() -> None:
    with pytest.raises(InputError, match="its frames have 3,072 pixels, more than the 3,000"):
        Frames(video_source("clip.mkv"), Selection(), 3_000)
