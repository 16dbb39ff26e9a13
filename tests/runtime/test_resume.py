"""Skipping what an earlier run has done, and nothing else."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from outputs import clip, files, results

from dsgnn.runtime.run.cli import main

H, W = 48, 64


pytestmark = pytest.mark.usefixtures("place")


def ranked(result: Result) -> int:
    return int(result.stdout.split()[0])


def test_skipping_what_was_done(command, photos, scene) -> None:
    clip("clip.avi", scene, 10)
    Path("photos/broken.png").write_bytes(b"hello")
    save = ("--save", "overlay,masks,crops,json")
    first = command("photos", "clip.avi", *save)
    assert ranked(first) == 13 and first.exit_code == 1
    before = results()
    again = command("photos", "clip.avi", *save, "--skip-existing")
    assert ranked(again) == 0 and "4 inputs skipped: done by an earlier run" in again.output
    assert again.exit_code == 1 and results() == before  # the broken one was tried again
    Path("out/b.mask2.png").unlink()
    Path("out/c.overlay.jpg").unlink()
    assert ranked(command("photos", "clip.avi", *save, "--skip-existing")) == 2
    Path("out/clip.overlay.mp4").unlink()
    assert ranked(command("photos", "clip.avi", *save, "--skip-existing")) == 10
    assert results() == before
    other = command("photos", "clip.avi", *save, "--skip-existing", "--threshold", "0.3")
    assert ranked(other) == 13  # another model, to its results
    assert ranked(command("photos", "clip.avi", *save)) == 13


def test_other_outputs_are_not_done(command, photos, scene) -> None:
    """Kinds that were not saved are made, and maps of another palette; what is there stays."""
    clip("clip.avi", scene, 3)
    arguments = ("photos", "clip.avi", "--skip-existing", "--save")
    assert ranked(command(*arguments, "json")) == 6
    Path("out/a.map.png").write_bytes(b"of another time")
    assert ranked(command(*arguments, "masks,map,json")) == 6
    assert "a.mask2.png" in files() and "clip.masks/000002.mask1.png" in files()
    assert ranked(command(*arguments, "map,json")) == ranked(command(*arguments, "json")) == 0
    Path("out/clip.masks/000001.mask1.png").unlink()
    assert ranked(command(*arguments, "masks,json", "--palette", "irsr")) == 3
    assert ranked(command(*arguments, "map,json", "--palette", "irsr")) == 6
    assert set(np.unique(cv2.imread("out/a.map.png"))) == {0, 128, 255}
    assert ranked(command(*arguments, "map,json", "--palette", "irsr")) == 0


def test_another_file_of_the_name_is_not_done(
    command, photos, scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").mkdir()
    clip("photos/clip.avi", scene, 3)
    Path("other").mkdir()
    for path in Path("photos").iterdir():
        data = path.read_bytes()
        Path("other", path.name).write_bytes(data)
        os.utime(Path("other", path.name), ns=(0, path.stat().st_mtime_ns + 1000))
    names = ("a.png", "b.png", "c.png", "clip.avi", "%01d.png", "--skip-existing")
    for folder in ("photos", "other"):
        for number in range(2):
            Path(folder, f"{number}.png").write_bytes(Path("photos/a.png").read_bytes())
        os.utime(folder, ns=(0, len(folder)))
    out = ("--out", str(Path("out").resolve()))
    for folder in ("photos", "other"):
        with monkeypatch.context() as there:
            there.chdir(folder)
            assert ranked(command(*names, *out)) == 8
            assert ranked(command(*names, *out)) == 0


def test_other_numbered_images_are_not_done(command, photo: np.ndarray) -> None:
    """Written over, as a renderer does: nothing about their folder changes."""
    Path("out").mkdir()
    for number in range(3):
        cv2.imwrite(f"shot{number}.png", photo)
    folder = Path().stat().st_mtime_ns
    assert ranked(command("shot%d.png", "--skip-existing")) == 3
    assert ranked(command("shot%d.png", "--skip-existing")) == 0
    for change in (photo[::-1], photo):  # the second: of the size it had
        cv2.imwrite("shot1.png", change)
        assert Path().stat().st_mtime_ns == folder
        assert ranked(command("shot%d.png", "--skip-existing")) == 3
        assert ranked(command("shot%d.png", "--skip-existing")) == 0


def test_standard_input_is_never_done(model: Path, photo: np.ndarray) -> None:
    data = cv2.imencode(".png", photo)[1].tobytes()
    arguments = ("-", "--out", "out", "--model", str(model), "--skip-existing")
    for _ in range(2):
        assert ranked(CliRunner().invoke(main, arguments, input=data)) == 1


@pytest.mark.parametrize("damage", ["text", None, 3, {}, {"file": []}, {"file": "photos/a.png"}])
def test_a_damaged_record_is_not_done(command, photos, damage: object) -> None:
    command("photos")
    path, before = Path("out/results.json"), results()
    path.write_text(json.dumps({**before, "images": [damage, *before["images"][1:]]}))
    again = command("photos", "--skip-existing")
    assert ranked(again) == 1 and again.exit_code == 0 and results() == before
    path.write_text(json.dumps({**before, "images": damage}))
    assert ranked(command("photos", "--skip-existing")) == 3


def test_other_frames_of_a_video_are_not_done(command, scene) -> None:
    clip("clip.avi", scene, 10)
    assert ranked(command("clip.avi", "--max-frames", "3")) == 3
    assert ranked(command("clip.avi", "--max-frames", "3", "--skip-existing")) == 0
    for change in ((), ("--every", "2"), ("--start", "0.2"), ("--end", "0.5"), ("--no-steady",)):
        assert ranked(command("clip.avi", "--skip-existing", *change)) > 3
        assert ranked(command("clip.avi", "--skip-existing", *change)) == 0


def test_an_interrupted_video_is_not_done(command, scene) -> None:
    clip("clip.avi", scene, 10)
    command("clip.avi")
    path = Path("out/clip.summary.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "complete": False}))
    assert ranked(command("clip.avi", "--skip-existing")) == 10
    assert ranked(command("clip.avi", "--skip-existing")) == 0
    path.write_text("{half")
    assert ranked(command("clip.avi", "--skip-existing")) == 10


def test_skipping_needs_the_record(command, photos) -> None:
    result = command("photos", "--skip-existing", "--save", "overlay")
    assert result.exit_code == 2
    assert "Invalid value for '--skip-existing': what was done is read from" in result.output
