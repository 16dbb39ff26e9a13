"""The files that a run writes: their names, what they replace, and that each is whole or absent."""

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from outputs import clip, files, read, results, runs, write

from dsgnn.runtime import Ranker
from dsgnn.runtime.disk.files import whole_file, write_whole
from dsgnn.runtime.disk.outputs import KINDS as ALL_KINDS
from dsgnn.runtime.disk.outputs import parse_kinds
from dsgnn.runtime.run.loop import Outcome

KINDS = tuple(kind for kind in ALL_KINDS if kind != "heat")  # these models have no attention


@pytest.fixture
def go(ranker: Ranker, place: Path) -> Callable[..., list[Outcome]]:
    return runs(ranker, KINDS)


def test_equal_names_never_overwrite_each_other(go, scene) -> None:
    write("a/x.png", scene(48, 64, red=(8, 8, 40, 40)))
    write("b/x.png", scene(48, 64, green=(8, 8, 40, 40)))
    write("a/x.bmp", scene(48, 64, blue=(8, 8, 40, 40)))
    go("a/x.png", "b/x.png", "a/x.bmp", kinds=("crops",))
    colours = [read(f"out/{name}.crop1.png")[16, 16, 2::-1] for name in ("a/x.png", "b/x.png")]
    colours.append(read("out/x.bmp.crop1.png")[16, 16, 2::-1])
    np.testing.assert_array_equal(colours, [(230, 20, 20), (20, 230, 20), (20, 20, 230)])
    assert len(files()) == 3


def test_unicode_names(go, photo: np.ndarray) -> None:
    write("Füße 日本 🦊.png", photo)
    go("Füße 日本 🦊.png")
    assert "Füße 日本 🦊.overlay.jpg" in files()
    assert results()["images"][0]["file"] == "Füße 日本 🦊.png"


def test_a_name_that_is_not_unicode(go, photo: np.ndarray) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write(name, photo)
    assert not go(name)[0].error
    assert os.fsencode(results()["images"][0]["file"]) == b"caf\xe9.png"


def test_an_earlier_run_is_replaced_and_the_rest_left(go, photo: np.ndarray, scene) -> None:
    write("photo.png", photo)
    go("photo.png")
    Path("out/mine.txt").write_text("keep")
    write("photo.png", scene(48, 64))
    go("photo.png", kinds=("map", "json"))
    assert not read("out/photo.map.png").any()
    assert results()["images"][0]["objects"] == []
    assert Path("out/mine.txt").read_text() == "keep"


def test_masks_and_crops_of_an_earlier_run_are_no_more(go, photo: np.ndarray, scene) -> None:
    write("photo.png", photo)
    write("photo.mask.png", photo)
    kinds = ("masks", "crops")
    names = ["photo.png", "photo.mask.png"]
    go(*names, kinds=kinds)
    others = ["photo.mask03.png", "photo.mask3.txt", "photo.mask4x.png", "photo.mask5.png"]
    for name in others:  # nothing that this photo's masks would not be called, nor after a gap
        Path("out", name).write_text("keep")
    Path("out/photo.mask3.png").mkdir()
    write("photo.png", scene(48, 64, red=(8, 4, 40, 36)))
    go(*names, kinds=("json", "overlay"))
    assert {"photo.mask2.png", "photo.crop2.png"} < set(files())  # not asked for, not touched
    go(*names, kinds=kinds)
    written = ["crop1", "mask1", "mask.crop1", "mask.crop2", "mask.mask1", "mask.mask2"]
    made = [*others, *(f"photo.{one}.png" for one in written)]
    assert files() == sorted(
        [*made, *("results.json", "photo.mask.overlay.jpg"), "photo.overlay.jpg"]
    )


def test_an_input_is_never_removed(go, photo: np.ndarray, scene) -> None:
    write("photo.png", scene(48, 64, red=(8, 4, 40, 36)))
    for name in ("photo.mask2.png", "sheet2.jpg"):
        write(name, photo)
    before = files(".")
    outcomes = go("photo.png", "photo.mask2.png", "sheet2.jpg", kinds=("masks", "sheet"), out=".")
    assert not any(outcome.error for outcome in outcomes) and set(before) < set(files("."))
    write("sheet.jpg", photo)
    before = Path("sheet.jpg").read_bytes()
    with pytest.raises(
        OSError, match=r"sheet sheet\.jpg is one of the inputs: choose another output folder"
    ):
        go("sheet.jpg", kinds=("sheet",), out=".")
    assert Path("sheet.jpg").read_bytes() == before


def test_masks_of_a_videos_other_frames_are_no_more(go, scene) -> None:
    clip("clip.avi", scene, frames=4)
    go("clip.avi", kinds=("masks",))
    Path("out/clip.masks/mine.png").write_text("keep")
    Path("out/clip.masks/12.mask1.png").write_text("keep")
    clip("clip.avi", scene, frames=2)
    go("clip.avi", kinds=("json",))
    assert len(list(Path("out/clip.masks").iterdir())) == 6
    go("clip.avi", kinds=("masks",))
    assert sorted(path.name for path in Path("out/clip.masks").iterdir()) == [
        *("000000.mask1.png", "000001.mask1.png", "12.mask1.png", "mine.png")
    ]


def test_an_output_that_is_an_input(go, photo: np.ndarray) -> None:
    write("photo.png", photo)
    write("photo.overlay.jpg", photo)
    before = Path("photo.overlay.jpg").read_bytes()
    outcomes = go("photo.png", "photo.overlay.jpg", kinds=("overlay",), out=".")
    assert outcomes[0].error == (
        "its output photo.overlay.jpg is one of the inputs: choose another output folder"
    )
    assert not outcomes[1].error and Path("photo.overlay.jpg").read_bytes() == before


def test_nothing_is_written_outside_the_output_folder(go, photo: np.ndarray) -> None:
    write("photos/deep/x.png", photo)
    Path("elsewhere").mkdir()
    Path("out").mkdir()
    Path("out/deep").symlink_to(Path("elsewhere").resolve(), target_is_directory=True)
    (outcome,) = go("photos", kinds=("overlay",))
    assert outcome.error == (
        "its output out/deep/x.overlay.jpg would leave the output folder through a link"
    )
    assert files("elsewhere") == []


def test_a_failing_write_leaves_nothing(
    go, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("photo.png", photo)
    whole = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        whole(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    (outcome,) = go("photo.png", kinds=("overlay", "json"))
    assert outcome.error == "No space left on device"
    assert files() == ["results.json"]
    assert results()["images"][0]["error"] == "No space left on device"


def test_a_panorama_that_no_jpeg_holds(go, scene) -> None:
    write("wide.png", scene(8, 65_501))
    (outcome,) = go("wide.png", kinds=("overlay", "map", "json"))
    assert outcome.error == (
        "a JPEG, as the overlay is, has at most 65,500 pixels a side, not 65501×8: ask for the map "
        "and json alone"
    )
    (outcome,) = go("wide.png", kinds=("map", "json"))
    assert not outcome.error and read("out/wide.map.png").shape == (8, 65_501)


def test_whole_files(place: Path) -> None:
    path = Path("file.txt")
    write_whole(path, b"one")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
        assert temporary.name.startswith(".")
        raise ZeroDivisionError
    assert files(".") == ["file.txt"] and path.read_bytes() == b"one"
    for keep, text in ((False, b"one"), (True, b"half")):
        with pytest.raises(KeyboardInterrupt), whole_file(path, keep) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt
        assert files(".") == ["file.txt"] and path.read_bytes() == text
    with pytest.raises(KeyboardInterrupt), whole_file(path, True):
        raise KeyboardInterrupt  # before anything was written
    assert path.read_bytes() == b"half"


def test_kinds() -> None:
    assert parse_kinds("overlay, json") == ("overlay", "json")
    message = "expected some of overlay,map,heat,masks,crops,json,sheet, got 'boxes', ''"
    with pytest.raises(ValueError, match=message):
        parse_kinds("map,boxes,")


def test_videos_that_opencv_cannot_write(go, scene, monkeypatch: pytest.MonkeyPatch) -> None:
    clip("clip.mp4", scene, frames=4)
    real = cv2.VideoWriter

    class Losing:
        """Drops every second frame, as a full disk does, without a word."""

        fourcc = staticmethod(real.fourcc)

        def __init__(self, *arguments) -> None:
            self.writer, self.calls = real(*arguments), 0
            self.isOpened, self.release = self.writer.isOpened, self.writer.release

        def write(self, frame: np.ndarray) -> None:
            self.calls += 1
            if self.calls % 2:
                self.writer.write(frame)

    monkeypatch.setattr("dsgnn.runtime.disk.outputs.h264.is_installed", lambda: False)
    monkeypatch.setattr("dsgnn.runtime.disk.outputs.cv2.VideoWriter", Losing)
    assert go("clip.mp4")[-1].error == "only 2 of 4 frames were written: is the disk full?"
    monkeypatch.setattr(Losing, "__init__", lambda self, *arguments: None)
    monkeypatch.setattr(Losing, "isOpened", lambda self: False, raising=False)
    monkeypatch.setattr(Losing, "release", lambda self: None, raising=False)
    assert go("clip.mp4")[-1].error == "OpenCV cannot write an mp4v video of 64×48 here"
    assert "clip.overlay.mp4" not in files()
