"""dsgnn.js in the system's Chromium beside the Python it must agree with."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import onnx
import pytest

from dsgnn.export.web.site import build_site
from dsgnn.runtime import Ranker, Ranking, rle, samples
from dsgnn.runtime.images import read_image
from dsgnn.runtime.letterbox import Fixed, LongestSide, Rule, letterbox
from dsgnn.runtime.postprocess import postprocess
from dsgnn.runtime.ranker import BUNDLED

from .browser import WEB, array, chromium, opened, pixels, placed, runtime, text

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ASPECTS = ["1:1", "4:5", "16:9", "9:16", "3:1"]
# What the tests call in a page. Arrays come and go as text.
SETUP = """async (aspects) => {
  window.dsgnn = await import("./dsgnn.js");
  window.bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  window.floats = (text) => new Float32Array(bytes(text).buffer);
  window.facts = (ranking) => ({
    ...ranking.toJSON(),
    boxes: [...aspects.map((aspect) => ranking.cropBox(aspect)),
      ...[[], 1, [2, 1]].map((keep) => ranking.cropBox("1:1", keep))],
    focus: ranking.focus,
    share: ranking.attentionIn([3.5, 2, ranking.width / 2, 0.7 * ranking.height]),
    map: ranking.toJSON(["1:1"]).attention_map,
    greys: ranking.rankMap().toBase64(),
  });
  window.load = async (engine) => {
    window.ranker = await dsgnn.Ranker.load("model.onnx", {engine});
    return [ranker.engine, ranker.note];
  };
}"""
RANK = "async (photo) => facts(await ranker.rank({...photo, data: bytes(photo.data)}))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def module(browser: Browser) -> Iterator[Page]:
    """A page that has imported dsgnn.js as `dsgnn`; it needs no inference library."""
    with placed(WEB) as place, opened(browser, f"{place.address}worker.js") as page:
        page.evaluate(SETUP, ASPECTS)
        yield page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "site"
    build_site(BUNDLED, folder, runtime())
    return folder


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    return Ranker(backend="onnxruntime")


def described(rule: Rule) -> dict[str, Any]:
    """A letterbox rule as the artifact's description has it."""
    if isinstance(rule, Fixed):
        return {"rule": "fixed", "height": rule.height, "width": rule.width}
    return {"rule": "longest", "size": rule.size, "multiple": rule.multiple}


def test_the_letterbox_is_opencvs_bit_for_bit(module: Page) -> None:
    """Random pixels of 45 sizes: smaller, larger, halved, of one pixel's width, and as they are."""
    rng = np.random.default_rng(0)
    sizes = [tuple(side) for side in rng.integers(1, 400, (39, 2)).tolist()]
    sizes += [(640, 480), (320, 320), (1, 300), (300, 1), (1, 1), (160, 120)]
    cases, expected = [], []
    for number, size in enumerate(sizes):
        rule = LongestSide(160) if number % 2 else Fixed(96, 128)
        photo = rng.integers(0, 256, (*size, 3), np.uint8)
        cases.append([pixels(photo), described(rule)])
        expected.append(letterbox(photo, rule))
    found = module.evaluate(
        """(cases) => cases.map(([photo, rule]) => {
          const [padded, geometry] = dsgnn.letterbox({...photo, data: bytes(photo.data)}, rule);
          return [padded.toBase64(), geometry.resized, geometry.padded];
        })""",
        cases,
    )
    assert len({tuple(geometry.resized) for _, geometry in expected}) >= 30
    for (padded, geometry), (data, resized, size) in zip(expected, found, strict=True):
        assert (tuple(resized), tuple(size)) == (geometry.resized, geometry.padded)
        np.testing.assert_array_equal(array(data).reshape(padded.shape), padded)


def facts_of(ranking: Ranking) -> dict[str, Any]:
    """What the page is asked for below, by Python."""
    windows = [ranking.crop_box(aspect) for aspect in ASPECTS]
    windows += [ranking.crop_box("1:1", keep) for keep in ((), 1, (2, 1))]
    return {
        "boxes": [list(window) for window in windows],
        "focus": list(ranking.focus),
        "share": ranking.attention_in((3.5, 2, ranking.width / 2, 0.7 * ranking.height)),
    }


def assert_same(found: dict[str, Any], ranking: Ranking, saliency: float) -> tuple[int, int]:
    """Hold a page's ranking to Python's; returns how many mask pixels differ, and of how many."""
    expected = ranking.to_dict()
    order = [item.query for item in ranking]
    assert [item["query"] for item in found["objects"]] == order
    wrong = total = 0
    for got, item, entry in zip(found["objects"], ranking, expected["objects"], strict=True):
        mask = rle.decode(got["segmentation"])
        assert rle.encode(mask) == got["segmentation"]  # in the very same letters
        wrong, total = wrong + int((mask != item.mask).sum()), total + mask.size
        np.testing.assert_allclose(got["bbox"], entry["bbox"], 0, 1)
        assert got["saliency"] == pytest.approx(item.saliency, abs=saliency)
        assert got["score"] == pytest.approx(item.score, abs=saliency)
        assert (got.get("attention") is None) == (item.attention is None)
        assert got.get("attention") == pytest.approx(item.attention, abs=saliency)
    return wrong, total


def test_objects_masks_and_crops_are_pythons(module: Page) -> None:
    """Made-up outputs of networks: with and without attention, in any order, with specks, with a
    mask of nothing, on photos smaller and larger than the network's input and half of it."""
    rng = np.random.default_rng(3)
    wrong = total = repeated = 0
    sizes = [(160, 120), (96, 128), *rng.integers(20, 420, (28, 2)).tolist()]
    for number, (h, w) in enumerate(sizes):
        rule = Fixed(192, 256) if number % 3 == 0 else LongestSide(256)
        geometry = rule.geometry(h, w)
        height, width = (side // 4 for side in geometry.padded)
        noise = rng.normal(size=(6, height, width)).astype(np.float32)
        masks = np.stack([cv2.GaussianBlur(one, (0, 0), rng.uniform(1, 6)) - 0.01 for one in noise])
        masks[1] = np.where(np.indices((height, width)).sum(0) % 9 > 7, 1, -1)  # diagonals
        if number % 5 == 0:
            masks[2] = -1
        saliency, score = (rng.uniform(0.3, 1, 6).astype(np.float32) for _ in range(2))
        if number % 7 == 0:
            saliency[:] = 0.5  # equal objects keep the query order
        attention, order = None, "saliency"
        if number % 2:
            attention = rng.uniform(size=(height // 2, width // 2)).astype(np.float32) ** 4
            order = "attention" if number % 4 == 1 else "saliency"
        specks = "drop" if number % 3 else "keep"
        nms_iou = (1.0, 0.3, 0.5)[number % 3]  # of noise, some masks share this much
        if_none, threshold = ("all", 0.999) if number % 11 == 10 else ("none", 0.5)
        ranking = postprocess(
            saliency, score, masks, geometry, threshold, if_none, attention, order, specks, nms_iou
        )
        repeated += len(ranking) < (score > threshold).sum()
        looks = None if attention is None else [*attention.shape, text(attention)]
        found = module.evaluate(
            """([saliency, score, masks, looks, geometry, options]) => facts(dsgnn.postprocess({
              saliency: floats(saliency), score: floats(score), masks: floats(masks),
              attention: looks && [looks[0], looks[1], floats(looks[2])]}, geometry, options))""",
            [
                *map(text, (saliency, score, masks.astype(np.float32))),
                looks,
                {
                    "original": geometry.original,
                    "resized": geometry.resized,
                    "padded": geometry.padded,
                },
                {
                    "threshold": threshold,
                    "ifNone": if_none,
                    "order": order,
                    "specks": specks,
                    "nmsIou": nms_iou,
                },
            ],
        )
        differ, pixels_ = assert_same(found, ranking, 1e-4)
        wrong, total = wrong + differ, total + pixels_
        expected = facts_of(ranking)
        assert found["boxes"] == expected["boxes"]
        assert found["focus"] == pytest.approx(expected["focus"], abs=1e-9)
        assert found["share"] == pytest.approx(expected["share"], abs=1e-5)
        told = ranking.looks.to_dict()
        assert (found["map"] is None) == (told is None)
        for name in told or ():
            np.testing.assert_allclose(found["map"][name], told[name], 0, 1.01e-3)
        if not differ:
            np.testing.assert_array_equal(array(found["greys"]), ranking.rank_map().ravel())
    assert wrong <= 1e-6 * total, (wrong, total)  # a logit that is nearly 0
    assert repeated >= 5


def exif(orientation: int) -> np.ndarray:
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    block = b"II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)
    return np.frombuffer(block, np.uint8)


def test_photos_are_read_as_in_python(module: Page) -> None:
    """Turned as the EXIF of JPEG, PNG and WebP says; grey, transparent, and raw pixels."""
    image = np.zeros((32, 64, 3), np.uint8)  # in blocks of 16, so that JPEG loses nothing
    image[:16, :32], image[:16, 32:], image[16:, :32] = (255, 0, 0), (0, 255, 0), (90, 90, 200)
    kinds = [(kind, turn) for kind in (".jpg", ".png", ".webp") for turn in range(1, 9)]
    files = {
        f"{kind} {turn}": cv2.imencodeWithMetadata(
            kind,
            image,
            [cv2.IMAGE_METADATA_EXIF],
            [exif(turn)],
            [] if kind == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 101 if kind == ".webp" else 100],
        )[1]
        for kind, turn in kinds
    }
    files["grey"] = cv2.imencode(".png", image[..., 1])[1]
    clear = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    clear[:, 48:, 3], clear[20:, :, 3] = 0, 128
    files["alpha"] = cv2.imencode(".png", clear)[1]
    found = module.evaluate(
        """async (files) => Promise.all(files.map(async (file) => {
          const {data, width, height} = await dsgnn.readPhoto(new Blob([bytes(file)]));
          return [height, width, data.toBase64()];
        }))""",
        [text(data) for data in files.values()],
    )
    for (name, data), (height, width, rgb) in zip(files.items(), found, strict=True):
        expected = read_image(data.tobytes())
        assert (height, width) == expected.shape[:2], name
        apart = np.abs(array(rgb).reshape(expected.shape).astype(int) - expected)
        limit = {"alpha": 1, "grey": 0}.get(name, 2 if name.startswith(".jpg") else 0)
        assert apart.max() <= limit, name
    raw = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    laid = module.evaluate(
        "async (photo) => (await dsgnn.readPhoto({...photo, data: bytes(photo.data)})).data"
        ".toBase64()",
        pixels(raw),
    )
    png = cv2.imencode(".png", cv2.cvtColor(raw, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    np.testing.assert_array_equal(array(laid).reshape(9, 7, 3), read_image(png))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("dsgnn.readPhoto(new Blob(['no photo']))", "this browser cannot read the photo"),
        ("dsgnn.readPhoto({width: 3, height: 2, data: [1, 2]})", "expected RGB or RGBA of 3 × 2"),
        ("dsgnn.readPhoto(null)", "expected an image file"),
        ("dsgnn.Ranker.load('absent.onnx')", "the model cannot be loaded from http"),
        ("dsgnn.Ranker.load('m.onnx', {engine: 'cuda'})", "engine must be one of auto,webgpu,wasm"),
        ("dsgnn.Ranker.load('m.onnx', {threshold: 1})", "threshold must be at least 0 and below 1"),
        ("dsgnn.Ranker.load('m.onnx', {specks: 'no'})", "specks must be one of drop,keep"),
        (
            "new dsgnn.Ranking(4, 4, [], null, null, {}).cropBox('wide')",
            'expected an aspect such as "9:16" or [9, 16], got "wide"',
        ),
    ],
)
def test_wrong_use_is_told_in_words(module: Page, call: str, said: str) -> None:
    told = module.evaluate(
        f"async () => {{ try {{ await {call}; }} catch (error) {{ return error.message; }} }}"
    )
    assert told is not None and said in told


def generated() -> dict[str, np.ndarray]:
    """Ten photos that were never taken, as Python reads them: odd sizes, turned by EXIF, with
    transparent parts, grey."""
    parts = [read_image(sample) for sample in samples()]
    made: dict[str, np.ndarray] = {}
    for number, (h, w) in enumerate([(1, 1), (3, 500), (801, 97), (333, 777), (160, 120)]):
        made[f"{h} × {w}"] = cv2.resize(parts[number], (w, h), interpolation=cv2.INTER_AREA)
    for turn in (3, 6):
        data = cv2.imencodeWithMetadata(
            ".jpg", parts[turn % 6][..., ::-1], [cv2.IMAGE_METADATA_EXIF], [exif(turn)]
        )[1]
        made[f"turned {turn}"] = read_image(data.tobytes())
    grey = cv2.cvtColor(parts[1], cv2.COLOR_RGB2GRAY)
    made["grey"] = read_image(cv2.imencode(".png", grey)[1].tobytes())
    alpha = np.linspace(0, 255, parts[4].shape[1]).astype(np.uint8)
    clear = np.dstack([parts[4][..., ::-1], np.broadcast_to(alpha, parts[4].shape[:2])])
    made["alpha"] = read_image(cv2.imencode(".png", clear)[1].tobytes())
    made["noise"] = np.random.default_rng(1).integers(0, 256, (240, 320, 3), np.uint8)
    return made


def all_photos() -> dict[str, np.ndarray]:
    """The six samples and the ten generated photos."""
    photos = {**{sample.name: read_image(sample) for sample in samples()}, **generated()}
    assert len(photos) == 16
    return photos


def ranked_alike(page: Page, ranker: Ranker, photos: dict[str, np.ndarray]) -> int:
    """Rank photos in a page that holds `ranker`, hold each to Python's; how many objects."""
    objects = 0
    for name, photo in photos.items():
        found = page.evaluate(RANK, pixels(photo))
        ranking = ranker(photo)
        wrong, total = assert_same(found, ranking, 1e-4)
        assert wrong <= 1e-4 * total, name
        objects += len(ranking)
        expected = facts_of(ranking)
        np.testing.assert_allclose(found["boxes"], expected["boxes"], 0, 1, err_msg=name)
        np.testing.assert_allclose(found["focus"], expected["focus"], 0, 1e-3, err_msg=name)
    return objects


def test_samples_and_made_photos_get_pythons_ranks(
    browser: Browser, site: Path, ranker: Ranker
) -> None:
    photos = all_photos()
    with placed(site) as place, opened(browser, f"{place.address}worker.js") as page:
        page.evaluate(SETUP, ASPECTS)
        assert page.evaluate("load('wasm')") == ["wasm", ""]
        assert ranked_alike(page, ranker, photos) >= 16
        told = page.evaluate("ranker.describe()")
    expected = ranker.describe()
    other = {"backend": "onnxruntime-web wasm", "device": "cpu"}
    assert told == {**expected, **other}


def test_the_javascript_of_the_docs(browser: Browser, site: Path, ranker: Ranker) -> None:
    page_text = (WEB.parents[1] / "docs" / "browser.md").read_text("utf-8")
    (script,) = re.findall(r"```js\n(.*?)```", page_text, re.DOTALL)
    with placed(site) as place, opened(browser, f"{place.address}example.html") as page:
        page.evaluate(
            "(text) => { window.photo = new Blob([Uint8Array.from(atob(text), "
            "(one) => one.charCodeAt(0))]); }",
            text(np.frombuffer(samples()[1].read_bytes(), np.uint8)),
        )
        page.add_script_tag(
            content=f"{script}window.found = [ranking.objects.map((one) => one.box), "
            "[x0, y0, x1, y1]];",
            type="module",
        )
        page.wait_for_function("window.found")
        boxes, corners = page.evaluate("found")
    ranking = ranker(samples()[1])
    np.testing.assert_allclose(boxes, [item.box for item in ranking], 0, 1)
    np.testing.assert_allclose(corners, ranking.crop_box("9:16"), 0, 1)


def on_webgpu(browser: Browser, site: Path, ranker: Ranker) -> int:
    """Rank all photos on a software adapter, where the browser has one; how many objects.

    The browser's own process crashed in one of many runs: then all is done once more.
    """
    from playwright.sync_api import Error

    try:
        return _on_webgpu(browser, site, ranker)
    except Error as error:
        if "Target crashed" not in str(error):
            raise
    return _on_webgpu(browser, site, ranker)


def _on_webgpu(browser: Browser, site: Path, ranker: Ranker) -> int:
    with placed(site) as place, opened(browser, f"{place.address}worker.js") as page:
        page.evaluate(SETUP, ASPECTS)
        engine, note = page.evaluate("load('webgpu')")
        if note.startswith(("this browser", "WebGPU finds")):
            pytest.skip(note)
        assert (engine, note) == ("webgpu", "")
        return ranked_alike(page, ranker, all_photos())


def test_webgpu_gives_pythons_ranks(browser: Browser, tmp_path: Path) -> None:
    """The bundled network on small pictures of one size, as a software adapter is slow."""
    proto = onnx.load(BUNDLED)
    facts = json.loads(proto.metadata_props[0].value)
    facts["input"] = {**facts["input"], "rule": "fixed", "height": 64, "width": 96}
    onnx.helper.set_model_props(proto, {"dsgnn": json.dumps(facts)})
    small = tmp_path / "small.onnx"
    onnx.save(proto, small)
    build_site(small, tmp_path / "site", runtime())
    assert on_webgpu(browser, tmp_path / "site", Ranker(small, "onnxruntime")) >= 16


@pytest.mark.slow
def test_webgpu_gives_pythons_ranks_at_full_size(
    browser: Browser, site: Path, ranker: Ranker
) -> None:
    """A minute a photo."""
    assert on_webgpu(browser, site, ranker) >= 16
