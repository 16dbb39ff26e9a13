"""`dsgnn-run --aspect` and `--save heat`: the files, what results.json says, and what is left."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageCms

from dsgnn.runtime import Ranker
from dsgnn.runtime.framing import Aspect
from dsgnn.runtime.images import read_image
from dsgnn.runtime.run.cli import main

Call = Callable[..., Result]


@pytest.fixture
def heedful(tmp_path: Path, write_model: Callable[..., Path]) -> Path:
    """An artifact with an attention map, that looks at what is blue."""
    return write_model(tmp_path / "heedful.onnx", attention=True)


@pytest.fixture
def call(tmp_path: Path, heedful: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """dsgnn-run in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: str, model: Path = heedful) -> Result:
        return CliRunner().invoke(main, [*arguments, "--out", "out", "--model", str(model)])

    return run


def entry() -> dict:
    return json.loads(Path("out/results.json").read_text())["images"][0]


def files() -> list[str]:
    return sorted(path.name for path in Path("out").iterdir())


def write(path: str, image: np.ndarray) -> None:
    Path(path).write_bytes(cv2.imencode(Path(path).suffix, image[..., ::-1])[1].tobytes())


@pytest.fixture
def wide(scene: Callable[..., np.ndarray]) -> np.ndarray:
    """120 × 300: a red box on the left, and a blue one, that is looked at, on the right."""
    return scene(120, 300, red=(30, 20, 80, 90), blue=(40, 200, 100, 250))


def test_crops_have_the_photos_own_pixels(call: Call, heedful: Path, wide: np.ndarray) -> None:
    write("photo.png", wide)
    done = call("photo.png", "--save", "json", "--aspect", "1:1,16:9,9:16")
    assert done.exit_code == 0, done.output
    assert files() == ["photo.16x9.jpg", "photo.1x1.jpg", "photo.9x16.jpg", "results.json"]
    ranking = Ranker(heedful)(wide)
    record = entry()
    assert record["focus"] == pytest.approx(ranking.focus, abs=1e-4)
    assert list(record["crops"]) == ["1:1", "16:9", "9:16"]
    for aspect, crop in record["crops"].items():
        x0, y0, x1, y1 = crop["box"]
        assert crop == {
            "box": list(ranking.crop_box(aspect)),
            "attention": pytest.approx(ranking.attention_in(crop["box"]), abs=1e-4),
        }
        made = read_image(Path(f"out/photo.{Aspect.of(aspect).name}.jpg"))
        assert made.shape == (y1 - y0, x1 - x0, 3)
        apart = np.abs(made.astype(int) - wide[y0:y1, x0:x1])
        assert apart.mean() < 4
    x0, _, x1, _ = record["crops"]["1:1"]["box"]
    assert x0 <= 200 and x1 >= 250


def test_without_an_attention_map_the_share_is_not_told(
    call: Call, model: Path, wide: np.ndarray
) -> None:
    write("photo.png", wide)
    assert call("photo.png", "--aspect", "1:1", model=model).exit_code == 0
    crop = entry()["crops"]["1:1"]
    assert crop["attention"] is None
    x0, _, x1, _ = crop["box"]
    first = entry()["objects"][0]["bbox"]
    assert x0 <= first[0] and first[0] + first[2] <= x1


def test_colours_stay_what_they_were(call: Call, wide: np.ndarray) -> None:
    """A photo in another colour space looks the same as its crop, to whoever minds the profile."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    raw = bytearray(srgb.tobytes())
    red, blue = raw.index(b"rXYZ"), raw.index(b"bXYZ")
    raw[red + 4 : red + 12], raw[blue + 4 : blue + 12] = (
        raw[blue + 4 : blue + 12],
        raw[red + 4 : red + 12],
    )  # red and blue are swapped
    Image.fromarray(wide).save("photo.jpg", icc_profile=bytes(raw), quality=95)
    assert call("photo.jpg", "--save", "json", "--aspect", "1:1").exit_code == 0
    x0, y0, x1, y1 = entry()["crops"]["1:1"]["box"]

    def seen(path: str) -> np.ndarray:
        image = Image.open(path)
        profile = image.info.get("icc_profile")
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else srgb
        return np.asarray(ImageCms.profileToProfile(image, source, srgb)).astype(int)

    before = seen("photo.jpg")[y0:y1, x0:x1]
    assert np.abs(seen("out/photo.1x1.jpg") - before).mean() < 4
    as_stored = np.asarray(Image.open("photo.jpg")).astype(int)[y0:y1, x0:x1]
    assert np.abs(as_stored - before).mean() > 10  # the profile does count


@pytest.mark.parametrize("fit", ["pad", "blur"])
def test_what_does_not_fit_is_kept_whole(
    call: Call, scene: Callable[..., np.ndarray], fit: str
) -> None:
    photo = scene(120, 300, blue=(40, 30, 90, 270))
    write("photo.png", photo)
    assert call("photo.png", "--aspect", "9:16,5:2", "--fit", fit).exit_code == 0
    crops = entry()["crops"]
    assert crops["5:2"] == {"box": [0, 0, 300, 120], "attention": 1.0}
    tall = crops["9:16"]
    x0, y0, x1, y1 = tall["box"]
    assert tall["fit"] == fit and (y0, y1) == (0, 120)
    assert x0 <= 30 and x1 >= 270 and tall["size"] == [x1 - x0, round((x1 - x0) * 16 / 9)]
    made = read_image(Path("out/photo.9x16.jpg"))
    assert made.shape[1::-1] == tuple(tall["size"])
    top = (made.shape[0] - 120) // 2
    middle = made[top : top + 120].astype(int)
    assert np.abs(middle - photo[:, x0:x1]).mean() < 4
    assert (made[: top - 8].mean() < 1) == (fit == "pad")


def test_what_was_done_is_not_done_again(call: Call, wide: np.ndarray) -> None:
    write("photo.png", wide)
    first = ("photo.png", "--save", "json", "--aspect", "1:1,9:16")
    assert call(*first).exit_code == 0
    again = "1 input skipped"
    assert again in call(*first, "--skip-existing").output
    assert list(entry()["crops"]) == ["1:1", "9:16"]
    assert again in call("photo.png", "--aspect", "1:1", "--save", "json", "--skip-existing").output
    more = call("photo.png", "--save", "json", "--aspect", "1:1,4:5", "--skip-existing")
    assert "1 image ranked" in more.output
    assert "1 image ranked" in call(*first, "--fit", "pad", "--skip-existing").output
    Path("out/photo.9x16.jpg").unlink()
    assert "1 image ranked" in call(*first, "--fit", "pad", "--skip-existing").output
    assert Path("out/photo.9x16.jpg").is_file()


def test_an_input_is_never_written_over(call: Call, wide: np.ndarray) -> None:
    Path("out").mkdir()
    write("out/photo.png", wide)
    write("out/photo.1x1.jpg", wide)
    before = Path("out/photo.1x1.jpg").read_bytes()
    done = call("out/photo.png", "out/photo.1x1.jpg", "--save", "json", "--aspect", "1:1")
    assert done.exit_code == 1 and "is one of the inputs" in done.output
    assert Path("out/photo.1x1.jpg").read_bytes() == before


def test_a_crop_that_cannot_be_written_leaves_the_earlier_one(
    call: Call, wide: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("photo.png", wide)
    assert call("photo.png", "--aspect", "1:1").exit_code == 0
    before = Path("out/photo.1x1.jpg").read_bytes()

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        done = call("photo.png", "--save", "json", "--aspect", "1:1")
    assert done.exit_code == 1 and "No space left on device" in done.output
    assert Path("out/photo.1x1.jpg").read_bytes() == before
    assert [name for name in files() if name.startswith(".")] == []


def test_heat(call: Call, model: Path, wide: np.ndarray) -> None:
    write("photo.png", wide)
    assert call("photo.png", "--save", "heat").exit_code == 0
    assert files() == ["photo.heat.jpg"]
    heat = read_image(Path("out/photo.heat.jpg"))
    assert heat.shape == wide.shape
    brightness = cv2.cvtColor(heat, cv2.COLOR_RGB2GRAY)
    assert 190 <= brightness[:100].max(0).argmax() < 260
    without = call("photo.png", "--save", "heat", model=model)
    assert without.exit_code == 2 and "no attention map" in without.output


@pytest.mark.parametrize("aspect", ["1:0", "wide", "1:1,,2:1"])
def test_an_aspect_that_is_none_is_refused(call: Call, aspect: str) -> None:
    done = call("photo.png", "--aspect", aspect)
    assert done.exit_code == 2 and "--aspect" in done.output and not Path("out").exists()
