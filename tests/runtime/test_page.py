"""The page of dsgnn-serve in the system's Chromium, over a real server on loopback."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from serving import serving_model

from dsgnn.runtime.draw import RANK_COLOURS
from dsgnn.runtime.serving.app import PAGE, ServeLimits

pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")

if TYPE_CHECKING:
    from playwright.sync_api import Page

WAIT_MS = 60_000  # a busy machine is slow


@pytest.fixture
def server(model: Path) -> Iterator[str]:
    with serving_model(model, ServeLimits(max_bytes=200_000)) as (host, port):
        yield f"http://{host}:{port}/"


@pytest.fixture
def file(tmp_path: Path, scene: Callable[..., np.ndarray]) -> Path:
    """480 × 640: three objects, the largest first."""
    image = scene(
        480, 640, red=(40, 40, 360, 300), blue=(60, 380, 260, 600), green=(330, 420, 440, 560)
    )
    cv2.imwrite(str(tmp_path / "three things.png"), image[..., ::-1])
    return tmp_path / "three things.png"


def upload(page: "Page", server: str, file: Path) -> dict[str, Any]:
    """Choose a file and wait for its ranking; gives what the page offers as JSON."""
    page.goto(server)
    page.set_input_files("#file", file)
    page.wait_for_selector("#result:visible", timeout=WAIT_MS)
    with page.expect_download() as saved:
        page.get_by_role("button", name="JSON").click()
    assert saved.value.suggested_filename == f"{file.stem}.json"
    return json.loads(Path(saved.value.path()).read_text())


def at(page: "Page", x: float, y: float) -> None:
    """Point at a place of a 640 × 480 photo."""
    box = page.locator("#canvas").bounding_box()
    assert box
    page.mouse.move(box["x"] + x / 640 * box["width"], box["y"] + y / 480 * box["height"])


def highlighted(page: "Page") -> list[str]:
    return page.locator("#objects button.active").evaluate_all(
        "all => all.map(b => b.dataset.rank)"
    )


def test_objects_are_highlighted_in_the_order_of_the_json(
    page: "Page", server: str, file: Path
) -> None:
    results = upload(page, server, file)
    found = results["images"][0]["objects"]
    assert results["images"][0]["file"] == file.name and len(found) == 3
    expected = [
        f"Rank {item['rank']}: score {100 * item['score']:.0f} %, "
        f"{100 * item['area']:.{1 if item['area'] < 0.1 else 0}f} % of the photo"
        for item in found
    ]
    buttons = page.locator("#objects button")
    assert buttons.evaluate_all("all => all.map(b => b.ariaLabel)") == expected
    for item in found:  # each is where the JSON says, and its number lies on it
        x, y, width, height = item["bbox"]
        at(page, x + width / 2, y + height / 2)
        assert highlighted(page) == [str(item["rank"])]
        assert page.locator("#bubble").inner_text().startswith(f"Rank {item['rank']} · score ")
        tag = page.locator(".tag.active").bounding_box()
        frame = page.locator("#canvas").bounding_box()
        assert tag and frame
        across = (tag["x"] + tag["width"] / 2 - frame["x"]) / frame["width"] * 640
        down = (tag["y"] + tag["height"] / 2 - frame["y"]) / frame["height"] * 480
        assert x < across < x + width and y < down < y + height
    at(page, 10, 470)
    assert highlighted(page) == [] and page.locator("#bubble").is_hidden()


def test_the_picture_shows_what_is_highlighted(page: "Page", server: str, file: Path) -> None:
    """Tinted objects on a dimmed photo; alone in its light when highlighted."""
    upload(page, server, file)
    read = """([x, y]) => { const c = document.querySelector("#canvas"); return [...c.getContext(
        "2d").getImageData(x * c.width / 640, y * c.height / 480, 1, 1).data.slice(0, 3)]; }"""

    def colours(*places: tuple[int, int]) -> list[list[int]]:
        return [page.evaluate(read, place) for place in places]

    red, blue, nothing = (170, 200), (490, 160), (350, 420)
    tinted, ground = colours(blue, nothing)
    assert ground == pytest.approx([128 * 0.58] * 3, abs=2)
    orange = np.array(RANK_COLOURS[1])
    assert tinted == pytest.approx(0.32 * orange + 0.68 * np.array([20, 20, 230]), abs=3)
    at(page, *red)
    lit, other, ground = colours(red, blue, nothing)
    assert lit == pytest.approx([232, 23, 22], abs=3)
    assert other == pytest.approx([8, 8, 87], abs=3) and ground == pytest.approx([49] * 3, abs=2)


def test_the_keyboard_reaches_everything_in_order(page: "Page", server: str, file: Path) -> None:
    upload(page, server, file)
    page.locator("#file").focus()
    for rank in "123":
        page.keyboard.press("Tab")
        assert highlighted(page) == [rank]
    page.keyboard.press("Space")  # kept while the focus moves on
    page.keyboard.press("Tab")
    assert highlighted(page) == ["3"]
    assert page.locator("[aria-pressed=true]").count() == 1
    assert page.evaluate("document.activeElement.textContent") == "JSON"
    page.keyboard.press("Escape")
    assert highlighted(page) == [] and page.locator("[aria-pressed=true]").count() == 0


def test_the_overlay_and_the_map_are_the_servers(page: "Page", server: str, file: Path) -> None:
    upload(page, server, file)
    for name, ending in (("Overlay", ".overlay.jpg"), ("Rank map", ".map.png")):
        with page.expect_download(timeout=WAIT_MS) as saved:
            page.get_by_role("button", name=name).click()
        assert saved.value.suggested_filename == file.stem + ending
        pixels = cv2.imread(str(saved.value.path()), cv2.IMREAD_UNCHANGED)
        assert pixels.shape[:2] == (480, 640)
    assert pixels[200, 170] == 255 and pixels[160, 490] == 229 and pixels[420, 350] == 0


def test_drop_and_paste(page: "Page", server: str, file: Path) -> None:
    page.goto(server)
    give = """([kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "given.png", {type: "image/png"}));
        document.body.dispatchEvent(kind === "drop"
            ? new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent(kind, {clipboardData: data, bubbles: true}));
    }"""
    for kind in ("drop", "paste"):
        page.evaluate(give, [kind, list(file.read_bytes())])
        playwright.expect(page.locator("#status")).to_contain_text(
            "3 objects ranked in ", timeout=WAIT_MS
        )
        page.evaluate("document.querySelector('#status').textContent = ''")


def test_errors_in_words(page: "Page", server: str, tmp_path: Path) -> None:
    page.goto(server)
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(300_000))
    for name, said in (
        ("notes.txt", "Not ranked (415): the photo cannot be read: it is not an image"),
        ("large.png", "Not ranked (413): expected at most 200,000 bytes"),
    ):
        page.set_input_files("#file", tmp_path / name)
        playwright.expect(page.locator("#reason")).to_contain_text(said, timeout=WAIT_MS)
        assert page.get_by_role("alert").is_visible()
        assert page.get_by_role("button", name="Try again").is_hidden()
        assert page.locator("#result").is_hidden()


def test_a_server_that_is_gone(page: "Page", model: Path, file: Path) -> None:
    with serving_model(model) as (host, port):
        page.goto(f"http://{host}:{port}/")
    page.set_input_files("#file", file)
    page.get_by_role("alert").wait_for(timeout=WAIT_MS)
    assert page.locator("#reason").inner_text() == (
        "The server cannot be reached: is dsgnn-serve still running?"
    )
    assert page.get_by_role("button", name="Try again").is_visible()


def test_an_empty_scene(page: "Page", server: str, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((48, 64, 3), 128, np.uint8))
    results = upload(page, server, tmp_path / "grey.png")
    assert results["images"][0]["objects"] == [] and page.locator("#objects li").count() == 0
    assert page.get_by_role("heading", name="Nothing stands out").is_visible()
    assert "threshold of 0.5" in page.locator("#hint").inner_text()


def test_a_file_that_only_the_server_can_read(page: "Page", server: str, file: Path) -> None:
    tiff = file.with_suffix(".tiff")
    cv2.imwrite(str(tiff), cv2.imread(str(file)), [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    assert len(upload(page, server, tiff)["images"][0]["objects"]) == 3
    assert "This browser cannot show this kind of file" in page.locator("#hint").inner_text()
    at(page, 490, 160)
    assert highlighted(page) == ["2"]


def test_nothing_is_asked_of_anyone_else(page: "Page", server: str, file: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    upload(page, server, file)
    outside = [url for url in asked if not url.startswith((server, "blob:", "data:"))]
    assert outside == [] and f"{server}rank?aspect=1:1,4:5,16:9,9:16" in asked
    fetched = page.evaluate("fetch('http://127.0.0.1:9').then(() => 'sent', e => String(e))")
    assert fetched == "TypeError: Failed to fetch"


def test_the_colours_are_those_of_the_overlay() -> None:
    (listed,) = re.findall(r"COLOURS = (\[\[.*?\]\]);", PAGE.read_text("utf-8"), re.DOTALL)
    assert [tuple(colour) for colour in json.loads(listed)] == list(RANK_COLOURS)


def test_bars_show_what_orders_and_a_phone_needs_no_scrolling_sideways(
    page: "Page", server: str, file: Path
) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    found = upload(page, server, file)["images"][0]["objects"]
    bars = page.locator("#objects .bar i").evaluate_all(
        "all => all.map(i => i.offsetWidth / i.parentElement.offsetWidth)"
    )
    saliency = [item["saliency"] for item in found]
    spread = saliency[0] - saliency[-1]
    expected = [0.1 + 0.9 * (value - saliency[-1]) / spread for value in saliency]
    assert bars == pytest.approx(expected, abs=0.01) and bars == sorted(bars, reverse=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    beyond = page.locator("#objects button").evaluate_all(
        "all => all.filter(b => b.scrollWidth > b.clientWidth).length"
    )
    assert beyond == 0


def test_a_share_of_looks_is_said_and_drawn(page: "Page", server: str, file: Path) -> None:
    """A model that knows where people look stands behind the server: its answer is made up here."""

    page.add_init_script(
        """const real = window.fetch;
        window.fetch = async (...request) => {
          const answer = await real(...request), type = answer.headers.get("content-type");
          if (!answer.ok || !type.includes("json")) return answer;
          const results = await answer.json();
          results.images[0].objects.forEach((o, i) => { o.attention = [0.4, 0.1, 0.02][i]; });
          return new Response(JSON.stringify(results), {headers: answer.headers});
        };"""
    )
    upload(page, server, file)
    said = page.locator("#objects .facts b").all_text_contents()
    assert [text.replace("\u00a0", " ") for text in said] == [
        "40 % of looks",
        "10 % of looks",
        "2.0 % of looks",
    ]
    bars = page.locator("#objects .bar i").evaluate_all(
        "all => all.map(i => i.offsetWidth / i.parentElement.offsetWidth)"
    )
    assert bars == pytest.approx([1, 0.25, 0.05], abs=0.01)


@pytest.fixture
def heedful(tmp_path: Path, write_model: Callable[..., Path]) -> Iterator[str]:
    """A server with a model that tells where people look: at what is blue."""
    model = write_model(tmp_path / "heedful.onnx", attention=True)
    with serving_model(model, ServeLimits(max_bytes=200_000)) as (host, port):
        yield f"http://{host}:{port}/"


def test_the_heat_map_is_on_a_switch(page: "Page", heedful: str, file: Path) -> None:
    upload(page, heedful, file)
    read = """([x, y]) => { const c = document.querySelector("#canvas"); return [...c.getContext(
        "2d").getImageData(x * c.width / 640, y * c.height / 480, 1, 1).data.slice(0, 3)]; }"""
    blue, corner = (490, 160), (20, 460)
    before = page.evaluate(read, blue)
    assert page.locator("#legend").is_hidden()
    page.check("#heat")
    assert page.locator("#legend").inner_text().split() == ["fewer", "looks", "more", "looks"]
    hot, cold = (sum(page.evaluate(read, place)) for place in (blue, corner))
    red, _, most_blue = page.evaluate(read, blue)
    assert red > most_blue + 60 and hot > 300  # warm on what was blue
    assert cold < 3 * 128 and page.locator(".tag").first.is_hidden()
    page.uncheck("#heat")
    assert page.evaluate(read, blue) == before and page.locator("#legend").is_hidden()


def test_crops_can_be_dragged_and_tell_what_they_keep(
    page: "Page", heedful: str, file: Path
) -> None:
    image = upload(page, heedful, file)["images"][0]
    assert list(image["crops"]) == ["1:1", "4:5", "16:9", "9:16"]
    tall = page.locator("#crops li").nth(3)

    def told() -> tuple[list[int], float]:
        box = [int(side) for side in (tall.get_attribute("data-box") or "").split(",")]
        return box, float(tall.locator("span").inner_text().split()[0]) / 100

    box, share = told()
    assert box == image["crops"]["9:16"]["box"]
    assert share == pytest.approx(image["crops"]["9:16"]["attention"], abs=0.01)
    tall.scroll_into_view_if_needed()
    view = tall.locator("canvas").bounding_box()
    assert view
    x, y = view["x"] + view["width"] / 2, view["y"] + view["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 400, y + 30, steps=4)  # pulls the photo right, so the window goes left
    page.mouse.up()
    moved, less = told()
    assert moved == [0, 0, box[2] - box[0], 480] and less < share
    tall.locator("canvas").press("ArrowRight")
    assert told()[0][0] == 13  # 2% of 640
    with page.expect_download() as saved:
        tall.get_by_role("button", name="Save the crop 9:16").click()
    assert saved.value.suggested_filename == f"{file.stem}.9x16.jpg"
    made = cv2.imread(str(saved.value.path()))
    assert made.shape == (480, box[2] - box[0], 3)
    original = cv2.imread(str(file))[:, 13 : 13 + made.shape[1]]
    assert np.abs(made.astype(int) - original).mean() < 4


def test_without_a_map_there_is_no_switch_and_no_share(
    page: "Page", server: str, file: Path
) -> None:
    upload(page, server, file)
    assert page.locator("#heat").is_hidden() and page.locator("#crops li").count() == 4
    assert page.locator("#crops span").all_inner_texts() == [""] * 4
