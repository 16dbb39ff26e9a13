"""dsgnn-run as a person meets it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result

from dsgnn.runtime.run.cli import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: np.ndarray) -> Path:
    """A folder to stand in, with photos/a.png and photos/b.png."""
    folder = tmp_path / "here"
    (folder / "photos").mkdir(parents=True)
    for name in ("a", "b"):
        data = cv2.imencode(".png", photo[..., ::-1])[1].tobytes()
        (folder / "photos" / f"{name}.png").write_bytes(data)
    monkeypatch.chdir(folder)
    return folder


def call(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(part) for part in arguments], input=stdin)


def test_a_folder(place: Path, model: Path) -> None:
    result = call("photos", "--out", "out", "--model", model)
    assert result.exit_code == 0, result.output
    assert "colours.onnx: colours, trained weights, unverified (no sidecar" in result.output
    assert result.stderr.startswith("photos and videos found: 2\n")
    assert "2 images ranked, 4 objects; ms per image: decode " in result.output
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["a.overlay.jpg", "b.overlay.jpg", "results.json"]


def test_few_photos_have_a_line_each_where_looks_are_known(
    place: Path, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    """The shares are those of results.json; many photos have a progress bar instead."""
    model = write_model(tmp_path / "looks.onnx", attention=True, order="attention")
    result = call("photos", "--out", "out", "--model", model)
    assert result.exit_code == 0, result.output
    (objects, _) = (
        e["objects"] for e in json.loads(Path("out/results.json").read_text())["images"]
    )
    assert objects[1]["attention"] < 0.005
    shares = f"{objects[0]['attention']:.0%}, <1%"
    assert len(objects) == 2 and f"photos/a.png: {shares} of looks" in result.stdout.splitlines()
    nothing = call("photos/b.png", "--out", "none", "--model", model, "--threshold", "0.9999")
    assert nothing.stdout.startswith("photos/b.png: nothing stands out\n")
    for number in range(10):
        shutil.copy("photos/a.png", f"photos/{number}.png")
    many = call("photos", "--out", "many", "--model", model)
    assert "12 images ranked" in many.output and "of looks" not in many.output


def test_options_reach_the_ranker(place: Path, model: Path) -> None:
    result = call(
        *("photos/*.png", "--out", "deep/out", "--model", model, "--save", "json,map"),
        *("--threshold", "0.9999", "--if-none", "all", "--palette", "irsr"),
        *("--backend", "onnxruntime", "--device", "cpu", "--threads", "1"),
    )
    assert result.exit_code == 0, result.output
    assert "onnxruntime on cpu, 1 threads" in result.output
    record = json.loads(Path("deep/out/results.json").read_text())
    assert record["model"]["threshold"] == 0.9999 and record["model"]["if_none"] == "all"
    assert [len(image["objects"]) for image in record["images"]] == [5, 5]
    grey = cv2.imread("deep/out/a.map.png", cv2.IMREAD_UNCHANGED)
    assert set(np.unique(grey)) == {0, 204, 255}  # 5 and 4 fifths: the rest have no mask


def test_failures_are_named_and_the_rest_is_done(place: Path, model: Path) -> None:
    Path("photos/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    Path("photos/notes.txt").touch()
    result = call("photos", "missing.png", "--out", "out", "--model", model)
    assert result.exit_code == 1
    assert "photos/broken.jpg: the JPEG data is damaged or cut short (11 bytes)" in result.output
    assert "missing.png: there is no such file or folder" in result.output
    assert "2 images ranked" in result.output
    assert result.output.rstrip().endswith("2 inputs failed: photos/broken.jpg, missing.png")
    assert "passed over as neither image nor video: 1" in result.output


def test_standard_input(place: Path, model: Path) -> None:
    data = Path("photos/a.png").read_bytes()
    result = call("-", "--out", "out", "--model", model, stdin=data)
    assert result.exit_code == 0, result.output
    assert Path("out/stdin.overlay.jpg").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "out"], "Missing argument 'SOURCE...'"),
        (["photos"], "Missing option '-o' / '--out'"),
        (["photos", "--out", "photos/a.png"], "'photos/a.png' is a file"),
        (["photos", "--out", "photos"], "the output folder photos is also a source"),
        (["photos", "--out", "photos/a.png/b"], "Not a directory"),
        (
            ["photos", "--out", "out", "--save", "boxes"],
            "Invalid value for '--save': expected some of overlay,map,heat,masks,crops,json,sheet",
        ),
        (["photos", "--out", "out", "--threshold", "2"], "threshold must be"),
        (["photos", "--out", "out", "--model", "m.onnx"], "there is no model file at m.onnx"),
        (["photos", "--out", "out", "--model", "m.engine"], "there is no model file at m.engine"),
        (["photos", "--out", "out", "--model", "m.pth"], "convert it with dsgnn-convert"),
        (["photos", "--out", "out", "--model", "m.safetensors"], "with dsgnn-export onnx"),
        (["photos", "--out", "out", "--model", "m.bin"], "expected a model file ending in .onnx"),
        (["photos", "--out", "out", "--device", "gpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["photos", "--out", "out", "--threads", "0"], "threads must be 1 to "),
        (["photos", "--out", "out", "--backend", "x"], "'x' is not one of 'auto', 'onnxruntime'"),
    ],
)
def test_wrong_use(place: Path, model: Path, arguments: list[str], message: str) -> None:
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(model)]
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not Path("out").exists()


def test_an_empty_name_is_no_output_folder(place: Path, model: Path) -> None:
    """As a path it would be the current folder."""
    result = call("photos", "--out", "", "--model", model)
    assert result.exit_code == 2 and "the name is empty: a dot means" in result.output
    assert [path.name for path in Path().iterdir()] == ["photos"]


PLANTED = """
import sys
import numpy as np
from dsgnn.runtime.ranking import Ranking
Ranking.draw = lambda *_: {bug}
from dsgnn.runtime.run.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("bug", "said"),
    [
        ("np.zeros((2, 3)) + np.zeros((2, 2))", "ValueError: operands could not be broadcast"),
        ("None + 1", "TypeError: unsupported operand"),
    ],
)
def test_a_bug_surfaces_with_its_traceback(place: Path, model: Path, bug: str, said: str) -> None:
    options = ["photos", "-o", "out", "--model", model]
    code = PLANTED.format(bug=bug)
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(said), done.stderr
    assert [path.name for path in Path("out").iterdir()] == ["results.json"]
    assert json.loads(Path("out/results.json").read_text())["images"] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has such a device")
@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full", ">/dev/full", ">&- 2>&- <&-"])
def test_streams_that_take_nothing(place: Path, model: Path, streams: str) -> None:
    """The work is done whoever listens, and what libraries print goes into no file."""
    Path("photos/c.png").write_bytes(Path("photos/a.png").read_bytes()[:60])
    command = f"{Path(sys.executable).with_name('dsgnn-run')} photos -o out --model {model}"
    done = subprocess.run(f"{command} {streams}", shell=True, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["a.overlay.jpg", "b.overlay.jpg", "results.json"]
    assert len(json.loads(Path("out/results.json").read_text())["images"]) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="disks elsewhere forbid such names")
def test_names_cannot_move_the_cursor(place: Path, model: Path) -> None:
    """Nor fake a line, nor turn the direction of writing; and Latin-1 has no Japanese."""
    evil = "x\x1b[2K\x1b]0;title\x07\n9 images ranked\u202egpj.日本.jpg"
    Path("photos", evil).write_bytes(b"hello")
    other = model.with_name(f"m\x1b[31m{model.name}")
    other.write_bytes(model.read_bytes())
    command = [Path(sys.executable).with_name("dsgnn-run"), "photos", "-o", "out"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict"}
    done = subprocess.run([*command, "--model", other], capture_output=True, env=environment)
    out, err = done.stdout.decode("latin-1"), done.stderr.decode("latin-1")
    assert done.returncode == 1 and "Traceback" not in err, err
    shown = r"photos/x\x1b[2K\x1b]0;title\x07\n9 images ranked\u202egpj.\u65e5\u672c.jpg"
    assert out.splitlines()[1:] == [f"1 input failed: {shown}"]
    assert f"{shown}: it is not an image" in err and r"m\x1b[31m" in err
    assert not set(out + err) & {"\x1b", "\x07", "\u202e"}
    again = [*command, "--model", f"none\x1b[2K{evil}.onnx"]
    done = subprocess.run(again, capture_output=True, env=environment)
    assert done.returncode == 2 and b"\x1b" not in done.stderr
    assert rb"there is no model file at none\x1b[2Kx" in done.stderr


def test_results_that_cannot_be_written(place: Path, model: Path) -> None:
    Path("out/results.json").mkdir(parents=True)
    result = call("photos", "--out", "out", "--model", model)
    assert result.exit_code == 1
    assert "the results cannot be written: " in result.output
    assert not [path for path in Path("out").iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_written_to(
    place: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dsgnn.runtime.disk.outputs.os.access", lambda path, mode: path != Path("out")
    )
    result = call("photos", "--out", "out", "--model", model)
    assert result.exit_code == 2
    assert "the output folder out cannot be written to" in result.output


@pytest.mark.skipif(not Path("/proc/1").is_dir(), reason="Linux has such a folder")
def test_a_folder_of_the_system(place: Path, model: Path) -> None:
    """Not even root may write there."""
    result = call("photos", "--out", "/proc/1", "--model", model)
    assert result.exit_code == 2
    assert "the output folder /proc/1 cannot be written to" in result.output


def test_help_names_every_kind_and_status() -> None:
    result = call("--help")
    assert result.exit_code == 0
    kinds = "overlay,map,heat,masks,crops,json,sheet"
    for text in (kinds, "results.json", "Exit status: 0", "< photo.jpg"):
        assert text in result.output


def test_the_installed_command(place: Path, model: Path) -> None:
    """A process of its own: exit status, output, and no noise from OpenCV."""
    Path("photos/broken.png").write_bytes(Path("photos/a.png").read_bytes()[:60])
    command = Path(sys.executable).with_name("dsgnn-run")
    done = subprocess.run(
        [command, "photos", "--out", "out", "--model", model], capture_output=True, text=True
    )
    assert done.returncode == 1
    first, *others = done.stdout.splitlines()
    assert first.startswith("2 images ranked, 4 objects; ms per image: decode ")
    assert others == ["1 input failed: photos/broken.png"]
    said = [line for line in done.stderr.splitlines() if not line.startswith("libpng")]
    assert said[0] == "photos and videos found: 3" and said[1].startswith("colours.onnx: colours")
    assert said[2].startswith("photos/broken.png: the PNG data is damaged or cut short")
    assert len(said) == 3
