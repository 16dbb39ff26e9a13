"""What goes wrong with long runs: each ends in a message, and no file is left half written."""

import http.server
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import Result
from outputs import clip, files, results
from rtsp import camera

from dsgnn.runtime.disk.files import claimed
from dsgnn.runtime.disk.sources import Source
from dsgnn.runtime.errors import FolderBusyError
from dsgnn.runtime.run import loop as run_module
from dsgnn.runtime.run.loop import stopped_once
from dsgnn.runtime.video.container import UNREADABLE
from dsgnn.runtime.video.frames import Selection

COMMAND = Path(sys.executable).with_name("dsgnn-run")
H, W = 48, 64


pytestmark = pytest.mark.usefixtures("place")


def ranked(result: Result) -> int:
    return int(result.stdout.split()[0])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"hello", UNREADABLE),
        (b"\0" * 5000, UNREADABLE),
    ],
)
def test_no_video_at_all(command, data: bytes, reason: str) -> None:
    pytest.importorskip("av")
    Path("clip.mp4").write_bytes(data)
    result = command("clip.mp4")
    assert result.exit_code == 1 and files() == ["results.json"]
    assert f"clip.mp4: {reason}\n" in result.output


@pytest.mark.skipif(sys.platform != "linux", reason="disks elsewhere have Unicode names alone")
def test_a_video_whose_name_is_not_unicode(model: Path, scene, photos) -> None:
    """OpenCV crashes on it, and on such an output, so the command runs in a process of its own."""
    clip("clip.avi", scene, 3)
    os.rename("clip.avi", b"caf\xe9.avi")
    clip("clip.avi", scene, 3)

    def go(out: str | bytes) -> subprocess.CompletedProcess:
        options = ("--out", out, "--model", model)
        command = [COMMAND, b"caf\xe9.avi", "clip.avi", "photos", *options]
        strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
        return subprocess.run(command, capture_output=True, encoding="utf-8", env=strict)

    done = go("out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert ".avi: the name is not Unicode: rename the file, or its folder" in done.stderr
    assert "6 images ranked" in done.stdout and done.stdout.endswith("failed: caf\\xe9.avi\n")
    assert "is not Unicode" in results()["images"][0]["error"]
    done = go(b"\xe9")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "clip.avi: the name is not Unicode" in done.stderr and "3 images" in done.stdout


@pytest.mark.parametrize("library", ["cv2", "av"])
def test_a_colon_in_the_output_folder(
    command, scene, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg takes what stands before it for a protocol."""
    pytest.importorskip(library)
    monkeypatch.setattr("dsgnn.runtime.video.h264.is_installed", lambda: library == "av")
    clip("clip.avi", scene, 3)
    os.rename("clip.avi", "clip:1.avi")
    result = command("clip:1.avi", "--out", "2026-11-23T06:40")
    assert result.exit_code == 0 and ranked(result) == 3
    video = cv2.VideoCapture(str(Path("2026-11-23T06:40/clip:1.overlay.mp4").resolve()))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_streams_of_no_length(command) -> None:
    """A pipe that closes at once, and a camera that takes the call and says nothing."""
    pytest.importorskip("av")
    result = command("-", "--raw", f"{W}x{H}")
    assert result.exit_code == 1 and files() == ["results.json"]
    assert "stdin: it has no frame to rank" in result.output
    with camera(b"") as address:
        result = command(f"rtsp://{address}/live")
    assert result.exit_code == 1 and files() == ["results.json"]
    assert f"rtsp://{address}/live: no answer" in result.output


def test_a_video_that_is_gone(command, scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted while it waited for its turn; OpenCV would only say that it cannot open it."""
    clip("clip.avi", scene, 10)
    expected = run_module._expected

    def count_and_delete(source: Source, select: Selection) -> int:
        count = expected(source, select)
        source.path.unlink()
        return count

    monkeypatch.setattr(run_module, "_expected", count_and_delete)
    result = command("clip.avi")
    assert result.exit_code == 1 and files() == ["results.json"]
    assert "clip.avi: No such file or directory" in result.output


def test_frames_of_changing_size(command, scene) -> None:
    """Images: named, and what came before is kept. A stream is scaled to the first size."""
    pytest.importorskip("av")
    for number, size in enumerate([(48, 64), (48, 64), (64, 48)]):
        cv2.imwrite(f"shot{number}.png", scene(*size)[..., ::-1])
    result = command("shot%d.png", "--rate", "10")
    assert result.exit_code == 1 and "frame 2 is 48×64, the video began with 64×48" in result.output
    assert len(Path("out/shot.frames.jsonl").read_text().splitlines()) == 2
    parts = b""
    for size in ((64, 48), (80, 80)):
        writer = cv2.VideoWriter("part.ts", cv2.VideoWriter.fourcc(*"mp4v"), 25, size)
        for _ in range(25):
            writer.write(scene(*size[::-1]))
        writer.release()
        parts += Path("part.ts").read_bytes()
    Path("both.ts").write_bytes(parts)
    result = command("both.ts")
    assert ranked(result) > 30
    assert "its frames change size: all were scaled to that of the first one" in result.output
    lines = Path("out/both.frames.jsonl").read_text().splitlines()
    assert {(line["width"], line["height"]) for line in map(json.loads, lines)} == {(64, 48)}


def test_an_mp4_cut_short(command, scene) -> None:
    """Its index is at the end: nothing can be read."""
    clip("clip.mp4", scene, 30)
    data = Path("clip.mp4").read_bytes()
    Path("clip.mp4").write_bytes(data[: len(data) // 2])
    result = command("clip.mp4")
    assert result.exit_code == 1 and files() == ["results.json"]
    assert "clip.mp4: no frame can be read" in result.output


def test_damage_anywhere_in_a_video(command, scene) -> None:
    """Whatever the bytes, the run ends by itself and what it leaves can be read."""
    clip("whole.avi", scene, 8)
    whole = Path("whole.avi").read_bytes()
    random = np.random.default_rng(0)
    Path("damaged").mkdir()
    for number in range(12):
        data = bytearray(whole)
        for at in random.integers(0, len(data), 60):
            data[at] = random.integers(256)
        Path(f"damaged/{number:02}.avi").write_bytes(data)
    result = command("damaged")
    assert result.exit_code in (0, 1) and isinstance(result.exception, SystemExit | None)
    assert not [name for name in files() if name.startswith(".")]
    for path in Path("out").glob("*.frames.jsonl"):
        count = len([json.loads(line) for line in path.read_text().splitlines()])
        video = cv2.VideoCapture(str(path).replace("frames.jsonl", "overlay.mp4"))
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) == count > 0


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff", ".bmp", ".gif"])
def test_damage_anywhere_in_a_photo(command, photo: np.ndarray, suffix: str) -> None:
    """Ranked, or named with the reason: never a crash, never a missing entry."""
    whole = cv2.imencode(suffix, photo[..., ::-1])[1].tobytes()
    random = np.random.default_rng(0)
    Path("damaged").mkdir()
    for number in range(20):
        data = bytearray(whole)
        for at in random.integers(0, len(data), 1 + number):
            data[at] = random.integers(256)
        Path(f"damaged/{number:02}{suffix}").write_bytes(data)
    result = command("damaged")
    assert isinstance(result.exception, SystemExit | None)
    images = results()["images"]
    assert len(images) == 20
    failed = [image["file"] for image in images if image.get("error")]
    assert result.exit_code == bool(failed) and ranked(result) == 20 - len(failed)
    assert all(f"{name}: " in result.output for name in failed)
    assert len(files()) == 20 - len(failed) + 1


@pytest.mark.parametrize("library", ["cv2", "av"])
def test_a_full_disk(model: Path, scene, library: str) -> None:
    """No file may be over 8 kB: the video does not fit, the rest does."""
    pytest.importorskip(library)
    resource = pytest.importorskip("resource")
    clip("clip.avi", scene, 3)
    noise = np.random.default_rng(0).integers(0, 256, (20, 240, 320, 3), np.uint8)
    writer = cv2.VideoWriter("noise.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (320, 240))
    for frame in noise:
        writer.write(frame)
    writer.release()
    hide = "" if library == "av" else "dsgnn.runtime.video.h264.is_installed = lambda: False;"
    code = (
        f"import dsgnn.runtime.video.h264; {hide} from dsgnn.runtime.run.cli import main; "
        f"main(['noise.avi', 'clip.avi', '--out', 'out', '--model', {str(model)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert done.returncode == 1, done.stderr
    assert "noise.avi: " in done.stderr and "Traceback" not in done.stderr
    assert "File too large" in done.stderr or "is the disk full?" in done.stderr
    assert files() == [
        *("clip.frames.jsonl", "clip.overlay.mp4", "clip.summary.json", "results.json")
    ]
    assert "error" in results()["images"][0]


def test_an_output_that_cannot_be_written(command, scene) -> None:
    clip("clip.avi", scene, 10)
    Path("out/clip.overlay.mp4").mkdir(parents=True)
    result = command("clip.avi")
    assert result.exit_code == 1 and "clip.avi: Is a directory" in result.output
    assert files() == ["results.json"] and Path("out/clip.overlay.mp4").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_two_runs_into_one_folder(command, photos) -> None:
    Path("out").mkdir()
    with claimed(Path("out")):
        result = command("photos")
        assert result.exit_code == 2
        assert (
            "another run is writing into out: wait for its end or choose another output folder"
            in result.output
        )
        assert files() == []
        with pytest.raises(FolderBusyError), claimed(Path("out")):
            pass
    assert command("photos").exit_code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_a_stream_stalls(model: Path, photo: np.ndarray, number: str) -> None:
    """The frames that came are in whole files, though the pipe stays open and silent."""
    command = [COMMAND, "-", "--raw", f"{W}x{H}", "--rate", "5", "--out", "out", "--model", model]
    run = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Shells let what they start in the background ignore Ctrl-C, and nohup the other.
        preexec_fn=lambda: signal.signal(getattr(signal, number), signal.SIG_DFL),
    )
    for _ in range(7):
        run.stdin.write(photo.tobytes())
    run.stdin.flush()

    def lines() -> int:
        return sum(path.read_text().count("\n") for path in Path("out").glob(".*.jsonl"))

    deadline = time.monotonic() + 120
    while lines() < 7 and time.monotonic() < deadline:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    run.send_signal(getattr(signal, number))
    assert run.wait(60) == 1
    said = run.stderr.read().decode()
    run.stdin.close()
    assert "Aborted!" in said and "Traceback" not in said and "Fatal" not in said
    expected = ["stdin.frames.jsonl", "stdin.overlay.mp4", "stdin.summary.json"]
    assert files() == ["results.json", *expected]
    assert len(Path("out/stdin.frames.jsonl").read_text().splitlines()) == 7
    video = cv2.VideoCapture("out/stdin.overlay.mp4")
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 7 and video.read()[0]
    summary = json.loads(Path("out/stdin.summary.json").read_text())
    assert summary["complete"] is False and summary["frames"] == 7


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_an_impatient_second_signal_changes_nothing() -> None:
    """Nor does one that is ignored from outside, as nohup does; afterwards all is as before."""
    settings = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_IGN}
    before = {number: signal.signal(number, one) for number, one in settings.items()}
    steps = []
    with pytest.raises(KeyboardInterrupt), stopped_once():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            steps.append("goes on")
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("is too late")
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("finished")
    assert steps == ["goes on", "finished"]
    assert {number: signal.signal(number, before[number]) for number in settings} == settings


def test_video_options_reach_the_run(command, scene) -> None:
    clip("clip.avi", scene, 20)
    picks = ("--every", "2", "--start", "0.4", "--end", "1.6", "--max-frames", "5", "--batch", "2")
    assert ranked(command("clip.avi", *picks, "--no-steady")) == 5
    lines = Path("out/clip.frames.jsonl").read_text().splitlines()
    assert [json.loads(line)["frame"] for line in lines] == [4, 6, 8, 10, 12]
    assert "identity" not in lines[0]
    for wrong, message in (
        (("--every", "0"), "every and max_frames must be at least 1"),
        (("--batch", "0"), "batch must be at least 1, got 0"),
        (("--raw", "big"), "expected a size as WIDTHxHEIGHT"),
        (("--raw", "64x48"), "raw frames come on standard input: give - as a source"),
    ):
        result = command("clip.avi", *wrong)
        assert result.exit_code == 2 and message in result.output


def test_videos_without_pyav(command, scene, photos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsgnn.runtime.video.h264.is_installed", lambda: False)
    clip("clip.avi", scene, 3)
    said = "PyAV is not installed, so videos are written as MPEG-4 Part 2"
    result = command("clip.avi")
    assert result.exit_code == 0 and said in result.output and "dsgnn[video]" in result.output
    assert said not in command("photos").output
    assert said not in command("clip.avi", "--save", "json").output


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own count")
def test_5000_frames_in_flat_memory(ranker, scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """RSS grows by 5% at most after the first 1,000 frames, with every output of a video."""
    from types import SimpleNamespace

    from dsgnn.runtime.disk.sources import find_sources
    from dsgnn.runtime.run.loop import rank_sources
    from dsgnn.runtime.video.frames import Selection
    from dsgnn.runtime.video.to_files import VideoOptions

    height, width, total = 180, 320, 5000

    class Pipe:
        """A scene that never repeats, one frame per read."""

        made = 0

        def read(self, wanted: int) -> bytes:
            if self.made == total:
                return b""
            at = self.made % 200
            self.made += 1
            image = scene(height, width, red=(20, at, 90, at + 80), blue=(100, 50, 150, 90 + at))
            return image.tobytes()

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=Pipe()))
    found = find_sources(["-"], Path("out"), raw=True)
    Path("out").mkdir()
    options = VideoOptions(Selection(raw=(width, height)), batch=4)
    kinds = ("overlay", "map", "json")
    used = []
    outcomes = rank_sources(ranker, found.sources, Path("out"), kinds, "assr", options)
    for number, outcome in enumerate(outcomes):
        assert not outcome.error
        if number % 500 == 0:
            used.append(rss_bytes())
    assert number == total - 1
    assert max(used[3:]) <= 1.05 * used[2], used


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
@pytest.mark.parametrize("arguments", [("photos",), ("missing.jpg",)])
def test_messages_to_a_full_disk(model: Path, photos, arguments: tuple[str, ...]) -> None:
    options = ("--out", "out", "--model", model)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [COMMAND, *arguments, *options], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.returncode in (0, 1)


def test_a_bad_address_is_one_failed_source(command, photos) -> None:
    pytest.importorskip("av")
    addresses = [
        "http://[::1/a.jpg",
        "https://",
        "http://127.0.0.1:9/a.jpg",
        "rtsp://[/x",
        "http://é",
    ]
    Path("list.txt").write_text("\n".join([*addresses, "photos"]))
    result = command("list.txt")
    assert result.exit_code == 1 and ranked(result) == 3
    assert all(f"{address}: no answer" in result.output for address in addresses)


def test_a_photo_by_http(command, photos) -> None:
    """With a name and password, which are not shown; an animation and a video are videos."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            super().do_GET()

    asked: list[str | None] = []
    name = next(Path("photos").iterdir()).as_posix()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}"
        result = command(f"http://me:s%20cret@{place}/{name}")
        server.shutdown()
    assert result.exit_code == 0 and "cret" not in result.output
    assert asked == ["Basic bWU6cyBjcmV0"]
    (image,) = results()["images"]
    assert image["file"] == f"http://{place}/{name}" and image["objects"]
    assert any(path.endswith(".overlay.jpg") for path in files())
    assert not any(path.endswith(".mp4") for path in files())


def test_the_pages_of_a_tiff_are_told(command, scene) -> None:
    pages = [scene(48, 64, red=(8, 4, 40, 36))[..., ::-1], scene(48, 64)[..., ::-1]]
    cv2.imwritemulti("pages.tiff", pages)
    result = command("pages.tiff")
    assert result.exit_code == 0 and ranked(result) == 1
    assert "pages.tiff: it has 2 pages, of which the first was taken" in result.output


def test_libraries_do_not_speak_to_the_terminal(model: Path, scene) -> None:
    """libpng warns of a broken chunk, past OpenCV's switch."""
    png = cv2.imencode(".png", scene(48, 64, red=(8, 4, 40, 36)))[1].tobytes()
    body = b"pHYs12"
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    Path("a.png").write_bytes(png[:33] + chunk + png[33:])
    options = ("--out", "out", "--model", model)
    done = subprocess.run([COMMAND, "a.png", *options], capture_output=True, text=True)
    assert done.returncode == 0 and "libpng" not in done.stderr + done.stdout
