"""The site that dsgnn-export web writes, in the system's Chromium: the page, the self-check, what
is asked of whom, and what goes on without a network.

Its model is the small one of the runtime's tests; tests/export/test_web.py has the bundled one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import colours_graph
from hosts import until

from dsgnn.export.cli import main
from dsgnn.export.web import npm
from dsgnn.export.web.site import build_site
from dsgnn.runtime import Ranker, rle
from dsgnn.runtime.artifact import Description
from dsgnn.runtime.draw import RANK_COLOURS
from dsgnn.runtime.errors import ArtifactError, BackendError
from dsgnn.runtime.framing import Aspect, crop_to, frames_entry
from dsgnn.runtime.letterbox import Fixed
from dsgnn.runtime.serving.app import PAGE

from .browser import WAIT_MS, WEB, chromium, opened, pixels, placed, runtime

sync_api = pytest.importorskip("playwright.sync_api")

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """colours.onnx with an attention map, for inputs of 192 × 256."""
    proto = onnx.load_from_string(colours_graph(attention=True))
    facts = Description(
        "colours", Fixed(192, 256), 5, 0.5, "fp32", "trained", "0" * 64, "0.1.0", attention=True
    )
    onnx.helper.set_model_props(proto, {"dsgnn": facts.to_json()})
    path = tmp_path_factory.mktemp("colours") / "colours.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "site"
    build_site(model, folder, runtime())
    return folder


def scene(h: int, w: int) -> np.ndarray:
    """A large red thing, a smaller blue one and a green one on grey: (h, w, 3) uint8 RGB."""
    image = np.full((h, w, 3), 128, np.uint8)
    for colour, (y0, x0, y1, x1) in {
        (230, 20, 20): (0.08, 0.06, 0.75, 0.47),
        (20, 20, 230): (0.12, 0.6, 0.54, 0.94),
        (20, 230, 20): (0.69, 0.66, 0.92, 0.87),
    }.items():
        image[round(y0 * h) : round(y1 * h), round(x0 * w) : round(x1 * w)] = colour
    return image


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "three things.png"
    cv2.imwrite(str(path), scene(480, 640)[..., ::-1])
    return path


def settle(page: Page) -> None:
    """Wait until the page has been loaded a second time, so that it may use threads."""
    end = time.monotonic() + WAIT_MS / 1e3
    while time.monotonic() < end:
        with suppress(sync_api.Error):  # between the two there is nothing to ask
            if page.evaluate("crossOriginIsolated"):
                return
        time.sleep(0.05)
    raise AssertionError("the page was not isolated")


def ranked(page: Page, photo: Path) -> dict[str, Any]:
    """Choose a photo and wait for its ranking; gives what the page offers as JSON."""
    page.set_input_files("#file", photo)
    sync_api.expect(page.locator("#status")).to_contain_text("ranked in ", timeout=WAIT_MS)
    with page.expect_download() as saved:
        page.get_by_role("button", name="JSON").click()
    return json.loads(Path(saved.value.path()).read_text())


def test_the_page_is_the_servers_but_for_two_tags(site: Path) -> None:
    served, here = PAGE.read_text("utf-8").splitlines(), (site / "index.html").read_text("utf-8")
    other = [line for line in here.splitlines() if line not in served]
    assert len(other) == 2 and len(here.splitlines()) == len(served) + 1
    told = {name: int(size) for name, size in re.findall(r'data-(\w+)="(\d+)"', other[0])}
    model = [site / "model.onnx", site / "model.onnx.check.json"]
    for name, files in (("wasm", npm.WASM), ("webgpu", npm.WEBGPU)):
        loaded = [*model, *(site / "ort" / file for file in files)]
        assert told[name] == sum(path.stat().st_size for path in loaded)
    assert "connect-src &#x27;self&#x27;" in other[1]


def test_a_visit(browser: Browser, site: Path, model: Path, photo: Path) -> None:
    """What a visitor meets: the size, Python's ranking, the downloads. Nothing is asked of anyone
    else, and when the server is gone the page goes on, and opens again."""
    asked: list[str] = []
    with placed(site) as place, opened(browser, place.address) as page:
        page.context.on("request", lambda request: asked.append(request.url))
        settle(page)
        bytes_ = sum(path.stat().st_size for path in (site / "ort").glob("*threaded.wasm"))
        assert f"loads {round(bytes_ / 1e6)} to " in page.inner_text("#privacy")
        assert not any("model" in path or "ort" in path for path in place.asked)
        results = ranked(page, photo)
        assert re.search(r"by WebAssembly, \d threads?\.$", page.inner_text("#engine"))
        ranker = Ranker(model)
        ranking = ranker(photo)
        assert results["model"]["sha256"] == ranker.artifact.sha256
        (image,) = results["images"]
        expected = ranking.to_dict()["objects"]
        assert image["file"] == photo.name and len(image["objects"]) == len(expected) == 3
        for got, entry in zip(image["objects"], expected, strict=True):
            assert got["bbox"] == entry["bbox"] and list(got) == list(entry)
            for name in ("rank", "saliency", "score", "attention", "area", "query"):
                assert got[name] == pytest.approx(entry[name], abs=1e-5)
            apart = rle.decode(got["segmentation"]) != rle.decode(entry["segmentation"])
            assert apart.sum() <= 1e-4 * apart.size
        aspects = [Aspect.of(text) for text in ("1:1", "4:5", "16:9", "9:16")]
        crops = {each: crop_to(ranking.looks, each, ranking.objects) for each in aspects}
        frames = frames_entry(ranking.looks, crops)
        assert image["focus"] == pytest.approx(frames["focus"], abs=1e-4)
        assert image["crops"] == frames["crops"]
        assert page.locator("#objects button").count() == 3
        for name, ending in (("Overlay", "overlay.jpg"), ("Rank map", "map.png")):
            with page.expect_download() as saved:
                page.get_by_role("button", name=name).click()
            assert saved.value.suggested_filename == f"three things.{ending}"
            made = cv2.imread(str(saved.value.path()))[..., ::-1]
            if ending == "map.png":
                np.testing.assert_array_equal(made[..., 0], ranking.rank_map())
            else:  # tinted in the rank's colour where the object is
                height, width, _ = made.shape
                at = made[round(0.2 * height), round(0.9 * width)].astype(int)
                assert at == pytest.approx(
                    0.32 * np.array(RANK_COLOURS[1]) + 0.68 * np.array([20, 20, 230]), abs=12
                )
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert asked and all(url.startswith((place.address, "blob:")) for url in asked)
        reached = page.evaluate("fetch('http://127.0.0.1:9').then(() => 'sent', (e) => e.message)")
        assert reached == "Failed to fetch"
        place.stop()
        with pytest.raises(OSError):
            urllib.request.urlopen(place.address, timeout=5)
        second = photo.with_name("second.png")
        cv2.imwrite(str(second), scene(300, 200)[..., ::-1])
        assert len(ranked(page, second)["images"][0]["objects"]) == 3
        page.reload()
        assert len(ranked(page, second)["images"][0]["objects"]) == 3


def test_a_photo_that_the_browser_cannot_read(browser: Browser, site: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no photo")
    with placed(site) as place, opened(browser, place.address) as page:
        settle(page)
        page.set_input_files("#file", tmp_path / "notes.txt")
        page.get_by_role("alert").wait_for()
        assert "Not ranked: this browser cannot read the photo" in page.inner_text("#reason")
        assert page.get_by_role("button", name="Try again").is_hidden()


def test_webgpu_is_used_after_its_self_check(browser: Browser, site: Path, model: Path) -> None:
    """On a software adapter, which a page takes only when it is asked for."""
    with placed(site) as place, opened(browser, f"{place.address}worker.js") as page:
        auto, *told = page.evaluate(
            """async () => {
              const {Ranker} = await import("./dsgnn.js");
              const auto = await Ranker.load("model.onnx");
              window.ranker = await Ranker.load("model.onnx", {engine: "webgpu"});
              return [auto.engine, ranker.engine, ranker.note];
            }"""
        )
        if told[1].startswith(("this browser", "WebGPU finds")):
            pytest.skip(told[1])
        assert (auto, told) == ("wasm", ["webgpu", ""])
        ranker = Ranker(model)
        for h, w in ((480, 640), (150, 90)):
            found = page.evaluate(
                """async ({data, ...size}) => (await ranker.rank({...size, data:
                  Uint8Array.from(atob(data), (one) => one.charCodeAt(0))})).toJSON().objects""",
                pixels(scene(h, w)),
            )
            ranking = ranker(scene(h, w))
            assert len(ranking) == 3
            for got, item in zip(found, ranking, strict=True):
                assert got["query"] == item.query
                assert got["saliency"] == pytest.approx(item.saliency, abs=1e-4)
                assert got["attention"] == pytest.approx(item.attention, abs=1e-4)
                apart = rle.decode(got["segmentation"]) != item.mask
                assert apart.sum() <= 1e-4 * apart.size


def test_a_wrong_kernel_is_found_and_told(
    browser: Browser, site: Path, tmp_path: Path, photo: Path
) -> None:
    shutil.copytree(site, tmp_path / "faulty")
    path = tmp_path / "faulty" / "model.onnx.check.json"
    check = json.loads(path.read_text())
    check["answers"]["score"][-1] += 0.3
    path.write_text(json.dumps(check))
    with placed(path.parent) as place, opened(browser, f"{place.address}?engine=webgpu") as page:
        settle(page)
        assert len(ranked(page, photo)["images"][0]["objects"]) == 3
        told = page.inner_text("#engine")
        if "has no WebGPU" in told or "WebGPU finds" in told:
            pytest.skip(told)
        assert re.fullmatch(
            r"WebGPU failed its self-check: its score is off by 0\.30\. This browser ranks by "
            r"WebAssembly, \d threads?\.",
            told,
        )


def test_every_answer_of_the_self_check_counts(browser: Browser, site: Path) -> None:
    check = json.loads((site / "model.onnx.check.json").read_text())
    with placed(WEB) as place, opened(browser, f"{place.address}worker.js") as page:

        def compared(change: str) -> str:
            return page.evaluate(
                f"""async (answers) => {{
                  const {{compareAnswers}} = await import("./dsgnn.js");
                  const signs = Uint8Array.from(atob(answers.masks), (one) => one.charCodeAt(0));
                  const outputs = {{score: [...answers.score], saliency: [...answers.saliency],
                    attention: [12, 16, [...answers.attention]], masks: Float32Array.from(
                    {{length: 8 * signs.length}}, (_, i) => signs[i >> 3] >> 7 - (i & 7) & 1)}};
                  {change};
                  return compareAnswers(answers, outputs);
                }}""",
                check["answers"],
            )

        assert compared("") == compared("outputs.score[0] += 0.001") == ""
        for change, said in {
            "outputs.score[1] -= 0.05": "its score is off by 0.050",
            "outputs.saliency[4] = NaN": "its saliency is off by Infinity",
            "outputs.saliency.pop()": "its saliency has another shape",
            "outputs.attention[2][7] += 0.01": "its attention is off by 0.010",
            "outputs.attention[2][7] = NaN": "its attention is off by Infinity",
            "outputs.masks.fill(1, 0, 300)": "of its mask pixels are wrong",
        }.items():
            assert said in compared(change), change


def test_forty_lines_are_enough(browser: Browser, site: Path, photo: Path, model: Path) -> None:
    assert (WEB / "example.html").read_text("utf-8").count("\n") <= 40
    with placed(site) as place, opened(browser, f"{place.address}example.html") as page:
        page.wait_for_function("document.querySelector('p').textContent.startsWith('Ready: ')")
        page.set_input_files("input", photo)
        page.wait_for_selector("li")
        ranking = Ranker(model)(photo)
        shares = [f"{round(100 * (item.attention or 0))}% of looks" for item in ranking]
        assert page.locator("li").all_inner_texts() == shares
        corners = ",".join(map(str, ranking.crop_box("9:16")))
        assert page.inner_text("p").endswith(f"as 9:16: {corners}")
        x0, y0, *_ = ranking[0].box
        edge = page.evaluate(
            "([x, y]) => [...document.querySelector('canvas').getContext('2d')"
            ".getImageData(x, y, 1, 1).data]",
            [x0, y0 + 9],
        )
        assert edge == pytest.approx([255, 59, 48, 255], abs=3)


def test_the_command_tells_the_sizes(model: Path, tmp_path: Path) -> None:
    library, out = runtime(), tmp_path / "site"
    command = ["web", str(model), "-o", str(out), "--runtime", str(library)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    told = [float(size) for size in re.findall(r"([\d.]+) MB", done.output)]
    whole = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert len(told) == 4 and sum(told) == pytest.approx(whole / 1e6, abs=0.2)
    assert "MIT License" in (out / "ort" / "LICENSE").read_text()
    before = (out / "sw.js").read_text()
    assert CliRunner().invoke(main, command).exit_code == 0  # over the earlier site
    assert (out / "sw.js").read_text() == before and "VERSION" not in before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    refused = CliRunner().invoke(main, [*command[:3], str(tmp_path / "mine"), *command[4:]])
    assert refused.exit_code == 2 and "mine holds other files" in refused.output


def test_what_is_no_model_or_no_runtime_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build_site(tmp_path / "absent.onnx", tmp_path / "site", tmp_path)
    with pytest.raises(ArtifactError, match=r"expected a model file ending in \.onnx"):
        build_site(tmp_path / "model.safetensors", tmp_path / "site", tmp_path)
    for name in npm.FILES:
        (tmp_path / name).write_text("another release")
    with pytest.raises(BackendError, match=r"of onnxruntime-web 1\.30\.0, and has not, or not"):
        build_site(model, tmp_path / "site", tmp_path)
    assert not (tmp_path / "site").exists()


def test_another_package_than_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def forged(place: Path) -> Path:
        (place / "package.tgz").write_bytes(b"forged")
        return place / "package.tgz"

    monkeypatch.setattr(npm, "_download", forged)
    with pytest.raises(BackendError, match=r"gave another onnxruntime-web 1\.30\.0 than expected"):
        npm.fetch_runtime()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_npm_ends_with_a_killed_command(model: Path, tmp_path: Path, number: int) -> None:
    npm_, started = tmp_path / "npm", tmp_path / "started"
    npm_.write_text(f"#!/bin/sh\necho $$ > {started}.part\nmv {started}.part {started}\n"
                    "exec sleep 300\n")  # fmt: skip
    npm_.chmod(0o755)
    command = [Path(sys.executable).with_name("dsgnn-export"), "web", model, "-o", tmp_path / "s"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(command, env=variables) as export:
        until(started.exists, 120)
        child = int(started.read_text())
        os.kill(export.pid, number)
    try:
        until(lambda: _ended(child), 10)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _ended(process: int) -> bool:
    """Whether a process is gone, or waits for its parent to ask how it ended."""
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_no_registry_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(npm, "ADDRESS", "http://127.0.0.1:9/package.tgz")
    monkeypatch.setattr(npm.shutil, "which", lambda _: None)
    with pytest.raises(BackendError, match="could not be fetched from the npm registry: .*refused"):
        npm.fetch_runtime()
