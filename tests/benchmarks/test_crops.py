"""Crops against fixations: counted by hand, the bounds, and a whole run on made-up photos."""

import builtins
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from dsgnn.benchmarks.cli import main
from dsgnn.benchmarks.crops import (
    BEST,
    LIBVIPS,
    MIDDLE,
    OURS,
    SMARTCROP,
    best_window,
    share_inside,
)
from dsgnn.benchmarks.results import load
from dsgnn.runtime.framing import Aspect


def gaze(folder: Path) -> Path:
    """Two photos of a bright square, that everybody looks at, on the left of a grey wall."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for number in range(2):
        image = np.full((120, 160, 3), 90, np.uint8)
        image[40:80, 10:50] = (20, 20, 220)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), image)
        viewer = [[80, 60, 200], [30, 60, 200], [25, 50, 300], [-4, 10, 100]]
        entries.append(
            {
                "file_name": f"{number}.png",
                "width": 160,
                "height": 120,
                "source": "OSIE",
                "viewers": [viewer, viewer],
            }
        )
    (folder / "fixations.json").write_text(json.dumps({"images": entries}))
    return folder


def test_the_share_inside_is_counted() -> None:
    points = np.array([[0, 0], [9.9, 5], [10, 5], [4, 7.5]])
    assert share_inside(points, (0, 0, 10, 7)) == 0.5
    assert share_inside(points, (0, 0, 11, 8)) == 1


@pytest.mark.parametrize("aspect", ["1:1", "9:16", "16:9", "4:3", "1:3"])
@pytest.mark.parametrize("size", [(30, 40), (40, 30), (20, 20)])
def test_no_window_keeps_more_than_the_best(aspect: str, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    h, w = size
    points = rng.uniform((0, 0), (w, h), (25, 2))
    high, wide = Aspect.of(aspect).window(h, w)
    tried = [
        share_inside(points, (x, y, x + wide, y + high))
        for y in range(h - high + 1)
        for x in range(w - wide + 1)
    ]
    assert best_window(points, size, Aspect.of(aspect)) == max(tried)


def test_a_folder_is_measured_and_told(tmp_path: Path) -> None:
    data, out = gaze(tmp_path / "gaze"), tmp_path / "out"
    call = ["crops", "--data", str(data), "--split", "all", "--aspect", "1:1,9:16"]
    done = CliRunner().invoke(main, [*call, "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = load(out / "crops.json")
    assert found["data"] == {"spec": str(data), "split": "all", "fixations": 8}
    shares = {(row["who"], row["aspect"]): row["value"] for row in found["rows"]}
    # The looks are at x = 25 and 30: the middle of 1:1 holds both, that of 9:16 holds neither.
    assert shares[MIDDLE, "1:1"] == shares[BEST, "1:1"] == shares[BEST, "9:16"] == 1
    assert shares[MIDDLE, "9:16"] == 0
    assert {0.0, 0.5, 1.0} >= {share for (who, _), share in shares.items() if who == OURS}
    assert all(row["images"] == 2 and row["source"] == "all" for row in found["rows"])
    assert "| middle of the photo | 1.000 (1.000…1.000) | 0.000 (0.000…0.000) |" in done.output
    again = CliRunner().invoke(main, [*call, "--out", str(out)])
    assert again.exit_code == 2 and "exists: give another folder" in again.output


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name in ("pyvips", "smartcrop"):
            raise OSError(f"no {name} here")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    call = ["crops", "--data", str(gaze(tmp_path / "gaze")), "--split", "all"]
    done = CliRunner().invoke(main, [*call, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert f"{LIBVIPS} was not measured: no pyvips here" in done.output
    assert f"{SMARTCROP} was not measured: no smartcrop here" in done.output
    whos = {row["who"] for row in load(tmp_path / "out" / "crops.json")["rows"]}
    assert OURS in whos and not {LIBVIPS, SMARTCROP} & whos


@pytest.mark.parametrize(("who", "library"), [(SMARTCROP, "smartcrop"), (LIBVIPS, "pyvips")])
def test_the_windows_of_other_tools_are_read_right(who: str, library: str) -> None:
    """Both find a lone red square on grey; its place tells a wrong sign or side."""
    try:
        __import__(library)
    except (ImportError, OSError):
        pytest.skip(f"{library} is not installed here")
    from dsgnn.benchmarks.crops import _others

    crop = _others()[0][who]
    for x in (20, 300):
        image = np.full((200, 400, 3), 128, np.uint8)
        image[70:130, x : x + 60] = (220, 20, 20)
        x0, y0, x1, y1 = crop(image, 200, 200)
        assert (x1 - x0, y0, y1) == (200, 0, 200) and 0 <= x0 <= 200
        assert x0 <= x + 30 < x1


def test_a_split_without_photos_is_refused(tmp_path: Path) -> None:
    data = gaze(tmp_path / "gaze")
    entry = json.loads((data / "fixations.json").read_text())
    for image in entry["images"]:
        image["viewers"] = [[[80, 60, 200]]]
    (data / "fixations.json").write_text(json.dumps(entry))
    call = ["crops", "--data", str(data), "--split", "all", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, call)
    assert done.exit_code == 2 and "no photo with fixations in its split all" in done.output
