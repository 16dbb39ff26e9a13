"""The lines of dsgnn-run that the pages mark as tested, and those that need a camera.

What they name is made here. Each line is executed, and its files are looked at.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from pages import lines
from rtsp import camera

from dsgnn.runtime import samples
from dsgnn.runtime.run.cli import main

SCRIPTS = Path(sys.executable).parent
# A line, its pictures and videos, and the frames of its video.
FILES = [
    ("dsgnn-run clip.mp4 --out ranked", ["clip.overlay.mp4"], 12),
    (
        "dsgnn-run clip.mp4 --out ranked --aspect 9:16",
        ["clip.9x16.mp4", "clip.overlay.mp4"],
        12,
    ),
    (
        "dsgnn-run clip.mp4 --out ranked --save map,masks,json --every 5 --start 10 --end 20",
        ["clip.map.mp4"],
        1,
    ),
    ("dsgnn-run 'shots/%04d.png' --out ranked --rate 24", ["shots.overlay.mp4"], 3),
    (
        "dsgnn-run list.txt --out ranked --skip-existing",
        ["birthday.overlay.jpg", "clip.overlay.mp4"],
        12,
    ),
]
CAMERA = "dsgnn-run 0 --out ranked --show --max-frames 500"
NETWORK = "dsgnn-run rtsp://camera.local/live --out ranked --batch 4"
FFMPEG = "ffmpeg -i clip.mp4 -f rawvideo -pix_fmt rgb24 -"
PIPED = "dsgnn-run - --raw 640x360 --out ranked"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what these lines name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("holidays", "shots"):
        Path(folder).mkdir()
    shutil.copy(samples()[0], "holidays")
    picture = cv2.resize(cv2.imread(str(samples()[0])), (640, 360))
    for number in range(3):
        cv2.imwrite(f"shots/{number:04d}.png", picture)
    for name, rate, frames in (("clip.mp4", 1, 12), ("camera.ts", 25, 50)):
        writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*"mp4v"), rate, (640, 360))
        for number in range(frames):
            writer.write(np.roll(picture, 4 * number, 1))
        writer.release()
    Path("list.txt").write_text("holidays/birthday.jpg\nclip.mp4\n")
    return tmp_path


def run(line: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(main, shlex.split(line)[1:], input=stdin)


def ranked_frames() -> int:
    """The JSON lines of the one video, if there is one; its annotated video has as many frames."""
    count = 0
    for path in Path("ranked").glob("*.mp4"):
        count = int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT))
        lines = path.with_name(f"{path.name.rsplit('.', 2)[0]}.frames.jsonl").read_text()
        assert lines.count("\n") == count
    return count


@pytest.mark.parametrize(("line", "pictures", "frames"), FILES)
def test_files_are_ranked(place: Path, line: str, pictures: list[str], frames: int) -> None:
    result = run(line)
    assert result.exit_code == 0, result.output
    found = [path.name for path in Path("ranked").iterdir() if path.suffix in (".jpg", ".mp4")]
    assert sorted(found) == pictures and ranked_frames() == frames
    if "--skip-existing" in line:
        assert "2 inputs skipped: done by an earlier run" in run(line).output


def test_a_camera_in_a_window(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tests run is no camera and no screen: a file and a list stand in for them."""
    shown: list[np.ndarray] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(
        "dsgnn.runtime.video.frames._capture", lambda _: cv2.VideoCapture("clip.mp4")
    )
    monkeypatch.setattr(
        "dsgnn.runtime.video.to_files.cv2.imshow", lambda _, image: shown.append(image)
    )
    monkeypatch.setattr("dsgnn.runtime.video.to_files.cv2.destroyAllWindows", lambda: None)
    monkeypatch.setattr(
        "dsgnn.runtime.video.to_files.cv2.waitKey", lambda _: ord("q") if len(shown) == 3 else -1
    )
    assert "Aborted!" in run(CAMERA).output
    assert len(shown) == ranked_frames() == 3


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_a_network_camera(place: Path) -> None:
    """Real RTSP, on loopback; the camera falls silent, and then comes Ctrl-C."""

    def frames_so_far() -> int:
        return sum(path.read_text().count("\n") for path in Path().glob("ranked/.*.jsonl"))

    with camera(Path("camera.ts").read_bytes(), hangs=True) as address:
        words = shlex.split(NETWORK.replace("camera.local", address))
        process = subprocess.Popen(
            [SCRIPTS / words[0], *words[1:]],
            stderr=subprocess.PIPE,
            text=True,
            # Shells let what they start in the background ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while frames_so_far() < 40 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.endswith("Aborted!\n"), said
    assert ranked_frames() >= 40


def test_frames_through_a_pipe(place: Path) -> None:
    """By ffmpeg where it is installed, else the bytes that it would give."""
    if shutil.which("ffmpeg"):
        path = os.pathsep.join((str(SCRIPTS), os.environ["PATH"]))
        subprocess.run(
            f"{FFMPEG} | {PIPED}", shell=True, check=True, env={**os.environ, "PATH": path}
        )
    else:
        capture, frames = cv2.VideoCapture("clip.mp4"), b""
        while (frame := capture.read())[0]:
            frames += frame[1][..., ::-1].tobytes()
        result = run(PIPED, frames)
        assert result.exit_code == 0, result.output
    assert ranked_frames() == 12


def test_every_line_of_ranking_is_executed() -> None:
    """Those of dsgnn-batch: tests/runtime/test_distributed.py."""
    executed = {*(line for line, _, _ in FILES), CAMERA, NETWORK, f"{FFMPEG} | {PIPED}"}
    assert set(lines("dsgnn-run", "tested")) | {CAMERA, NETWORK} == executed
    assert {CAMERA, NETWORK} <= set(lines("dsgnn-run", "needs"))
