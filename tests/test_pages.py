"""What the README and the pages of docs/ promise: links, options, and every block is executed.

A block of shell or Python is executed as it stands, page by page and in their order, in a folder
that holds what the pages name. A comment before a block says otherwise:

    <!-- slow -->              it is executed by `make test-slow`
    <!-- needs: a camera -->   it cannot be: what it needs is not where the tests run
    <!-- tested: line by line --> by tests/test_ranking_docs.py
"""

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import click
import cv2
import jsonschema
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from pages import PAGES, ROOT, Block, blocks, lines

import dsgnn
from dsgnn.data import open_data
from dsgnn.data.check import check_folder
from dsgnn.export.web.npm import kept_runtime
from dsgnn.runtime import rle, samples
from dsgnn.runtime.ranker import BUNDLED
from dsgnn.runtime.run.cli import main
from dsgnn.runtime.serving.app import PARAMETERS

SCRIPTS = Path(sys.executable).parent
CHANGES = (ROOT / "CHANGELOG.md").read_text("utf-8")
LINKS = [
    (page, link)
    for page, text in PAGES.items()
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
]
PATH = os.pathsep.join((str(SCRIPTS), os.environ["PATH"]))
ADDRESS = "127.0.0.1:8000"  # of the pages; the tests take a free port


def parse(line: str) -> None:
    """Let the command's own parser read a line; raises click's UsageError for what it refuses."""
    words = shlex.split(line.split(" < ")[0])
    if "dsgnn.teacher" in words:
        command, rest = import_module("dsgnn.teacher.cli").main, words[3:]
    else:
        first = next(i for i, word in enumerate(words) if word.startswith("dsgnn-"))
        (script,) = entry_points(group="console_scripts", name=words[first])
        command, rest = script.load(), words[first + 1 :]
    while isinstance(command, click.Group):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_parser(click.Context(command)).parse_args(rest)


def anchors(page: str) -> set[str]:
    """What a link into a page may name: its headings, as GitHub and MkDocs both write them."""
    headings = re.findall(r"^#+ (.+)$", PAGES[page], re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_somewhere(page: str, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("line", [*lines("dsgnn-"), *lines("python -m dsgnn.teacher")])
def test_commands_take_these_options(line: str) -> None:
    parse(line)


def test_every_command_is_in_the_pages() -> None:
    shown = {name for text in PAGES.values() for name in re.findall(r"{{ help (.*) }}", text)}
    there = {"python -m dsgnn.teacher"}
    for script in entry_points(group="console_scripts"):
        if script.name.startswith("dsgnn-"):
            command = script.load()
            there |= {
                script.name,
                *(f"{script.name} {below}" for below in getattr(command, "commands", ())),
            }
    assert shown == there


def test_the_reading_of_commands_can_fail() -> None:
    with pytest.raises(click.NoSuchOption):
        parse("dsgnn-run photo.jpg --out ranked --nonsense")


def test_the_readme_is_short_and_every_mark_is_known() -> None:
    assert PAGES["README.md"].count("\n") <= 150
    marks = {block.mark.split(":")[0] for page in PAGES for block in blocks(page)}
    assert marks == {"", "slow", "needs", "tested"}
    fences = sum(text.count("```") for text in PAGES.values())
    assert fences == 2 * sum(len(blocks(page)) for page in PAGES)  # none was overlooked


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_paths_that_pages_name_exist(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    names = re.findall(r"`([\w./-]+(?:/|\.py|\.md|\.cfg|\.npz|\.json))`", text)
    skipped = {"metrics.npz", "metrics.json", "parameters.json", "cli.py", ".npz"}  # told where
    skipped |= {"results.json", "summary.json"}  # what a run writes
    for name in set(names) - skipped:
        assert (ROOT / name).exists(), name


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {dsgnn.__version__}\n" in text
    assert re.search(rf"^## \[{re.escape(dsgnn.__version__)}\]", CHANGES, re.MULTILINE)


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for text in PAGES.values():
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_extras_exist() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for line in lines("pip install '."):
        (names,) = re.findall(r"\[(.*)\]", line)
        assert set(names.split(",")) <= set(setup["options.extras_require"]), line


def picture(number: int) -> tuple[np.ndarray, list[list[float]]]:
    """A photo of two bright blocks on a dim ground, (64, 96, 3) BGR, and their polygons."""
    rng = np.random.default_rng(number)
    image = rng.integers(0, 60, (64, 96, 3), dtype=np.uint8)
    image[8:56, 8:40], image[30:56, 60:88] = rng.integers(120, 255, (2, 3))
    return image, [[8, 8, 40, 8, 40, 56, 8, 56], [60, 30, 88, 30, 88, 56, 60, 56]]


def write_pictures(*paths: str | Path) -> None:
    for number, path in enumerate(paths):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture(number)[0])


@pytest.fixture(scope="session")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name."""
    folder = tmp_path_factory.mktemp("things")
    for name in ("weights", "runtime", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for place in ("photo.jpg", "holidays/birthday.jpg", "trip/day/sea.jpg"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(samples()[0], folder / place)
    for suffix in ("", ".json"):
        shutil.copy(f"{BUNDLED}{suffix}", folder / f"nano.onnx{suffix}")
    shutil.copy(ROOT / "weights" / "nano.safetensors", folder)
    writer = cv2.VideoWriter(
        str(folder / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 1, (640, 360)
    )
    frame = cv2.resize(cv2.imread(str(samples()[0])), (640, 360))
    for number in range(12):
        writer.write(np.roll(frame, 4 * number, 1))
    writer.release()
    (folder / "photos").mkdir()
    for number in range(32):  # for int8
        shutil.copy(samples()[number % len(samples())], folder / "photos" / f"{number}.jpg")
    names = [f"{number:03}.png" for number in range(12)]  # by its name, one is for validation
    polygons = picture(0)[1]
    instances = {
        "images": [
            {"id": i, "file_name": name, "width": 96, "height": 64} for i, name in enumerate(names)
        ],
        "categories": [{"id": 1, "name": "block"}],
        "annotations": [
            {"id": 2 * i + k, "image_id": i, "category_id": 1, "visiting_order": k + 1,
             "segmentation": [polygons[k]]}
            for i in range(12) for k in range(2)
        ],
    }  # fmt: skip
    write_pictures(*(folder / "mine" / "images" / name for name in names))
    (folder / "mine" / "instances.json").write_text(json.dumps(instances))
    write_pictures(*(folder / "gaze" / "images" / name for name in names))
    looks = [
        {"file_name": name, "width": 96, "height": 64, "source": "mine",
         "viewers": [[[48, 32, 180], [22, 18 + i, 240], [74, 40, 200]] for i in range(3)]}
        for name in names
    ]  # fmt: skip
    (folder / "gaze" / "fixations.json").write_text(json.dumps({"images": looks}))
    write_pictures(*(folder / "binary" / "images" / name for name in names))
    (folder / "binary" / "masks").mkdir()
    for name in names:
        mask = (picture(0)[0].max(2) > 100) * np.uint8(255)
        cv2.imwrite(str(folder / "binary" / "masks" / name), cv2.resize(mask, (96, 64)))
    return folder


@pytest.fixture(scope="session")
def server(things: Path) -> Iterator[str]:
    """The address of a `dsgnn-serve` as the pages start it, but for the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [SCRIPTS / "dsgnn-serve", "--port", str(port)]
    process = subprocess.Popen(command, cwd=things, stderr=subprocess.DEVNULL)
    try:
        address = f"127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://{address}/ready").close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def runnable(page: str, slow: bool) -> list[Block]:
    """The blocks to execute of a page: those without a mark, and the slow ones if asked for."""
    marks = ("", "slow") if slow else ("",)
    found = [block for block in blocks(page) if block.language in ("sh", "python")]
    return [block for block in found if block.mark in marks]


def without_installing(text: str) -> str:
    """A shell block without what installs things or starts a server in the background."""
    left_out = ("pip ", "make ", "dsgnn-serve &")
    return "".join(
        line + "\n" for line in text.splitlines() if not line.lstrip().startswith(left_out)
    )


def execute(
    page: str, slow: bool, things: Path, folder: Path, request: pytest.FixtureRequest
) -> None:
    """Execute a page's blocks in a copy of `things`; a line that fails fails the test.

    Python blocks of a page share their names, as in one session. Trainings are cut short.
    """
    place = folder / "place"
    shutil.copytree(things, place, symlinks=True)
    names: dict = {}
    with contextlib.chdir(place):
        for block in runnable(page, slow):
            text = re.sub(r"--iterations \d+", "--iterations 2 --batch 2 --workers 0", block.text)
            if ADDRESS in text:
                text = text.replace(ADDRESS, request.getfixturevalue("server"))
            if block.language == "python":
                exec(compile(text, page, "exec"), names)
            else:
                shell(page, without_installing(text))


def shell(page: str, text: str) -> None:
    """Execute a block of shell here; the first line that fails fails the test."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        env={**os.environ, "PATH": PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert done.returncode == 0, f"{page}\n{text}\n{done.stdout}"


# The photos that docs/data.md and others name lie elsewhere: see test_the_forms_of_data.
EXECUTED = [page for page in PAGES if runnable(page, False) and page != "docs/data.md"]


@pytest.mark.parametrize("page", EXECUTED)
def test_the_blocks_of_a_page(
    page: str, things: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    execute(page, False, things, tmp_path, request)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.mark == "slow" for block in blocks(page))]
)
def test_the_slow_blocks_of_a_page(
    page: str, things: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    execute(page, True, things, tmp_path, request)


def test_a_block_that_fails_is_found(
    things: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PAGES, "bad.md", "```sh\nfalse\ntrue\n```\n")
    with pytest.raises(AssertionError, match="bad.md"):
        execute("bad.md", False, things, tmp_path, request)


@pytest.fixture
def forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data sets of docs/data.md, made of its own blocks and of a photo of the size they say."""
    monkeypatch.chdir(tmp_path)
    for block in blocks("docs/data.md"):
        if block.language == "json":
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text)
        if block.language == "python":
            exec(block.text, {})
    write_pictures(
        *("mine/images/street.jpg", "assr/images/train/street.jpg", "gaze/images/street.jpg"),
        *("irsr/Images/train/rgb/street.jpg", "sifr/train/rgb/street.jpg"),
        *("gaze/images/market.jpg", "binary/images/street.jpg"),
    )
    Path("binary/masks").mkdir()
    cv2.imwrite("binary/masks/street.png", (picture(0)[0].max(2) > 100) * np.uint8(255))
    return tmp_path


@pytest.mark.parametrize("name", ["mine", "assr", "irsr", "sifr"])
def test_the_forms_of_data(forms: Path, name: str) -> None:
    """Each example has the larger block, on the left, as what is looked at first."""
    report = check_folder(name, "train")
    assert report.problems == [] and report.objects == {2: 1} and report.sizes == {(64, 96): 1}
    sample = open_data(name, "train")[0]
    first = sample.masks[int(np.argmax(sample.ranks))]
    assert first[30, 20] and not first[40, 70] and first.sum() == 32 * 48


@pytest.mark.parametrize(("name", "images"), [("gaze", 2), ("binary", 1)])
def test_the_forms_without_ranks(forms: Path, name: str, images: int) -> None:
    report = check_folder(name, "all")
    assert report.problems == [] and report.images == images


def test_the_shell_of_the_data_page(forms: Path) -> None:
    for block in runnable("docs/data.md", False):
        if block.language == "sh":
            shell("docs/data.md", block.text)


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no JavaScript here")
def test_masks_are_decoded_in_another_language() -> None:
    (script,) = (block.text for block in blocks("docs/results.md") if block.language == "js")
    mask = np.random.default_rng(0).random((37, 53)) < 0.4
    mask[:, 20:30] = True  # long runs, and negative differences
    call = f"console.log(JSON.stringify([...decode({json.dumps(rle.encode(mask))})]))"
    done = subprocess.run(["node", "-e", script + call], check=True, capture_output=True)
    np.testing.assert_array_equal(np.reshape(json.loads(done.stdout), mask.shape), mask)


def test_the_example_of_results_has_the_fields_that_a_run_writes(
    things: Path, tmp_path: Path
) -> None:
    text = next(block.text for block in blocks("docs/results.md") if block.language == "json")
    shown = json.loads(text)
    result = CliRunner().invoke(main, [str(things / "photo.jpg"), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    real = json.loads((tmp_path / "results.json").read_text())
    assert list(shown) == list(real) and list(shown["model"]) == list(real["model"])
    image = {name: value for name, value in real["images"][0].items() if name != "made"}
    assert list(shown["images"][0]) == list(image)
    optional = {"attention"}
    told, there = (set(entry["objects"][0]) for entry in (shown["images"][0], image))
    assert told - optional == there - optional
    explained = set(re.findall(r"^\| `(\w+)`", PAGES["docs/results.md"], re.MULTILINE))
    assert there | {"identity", "attention"} <= explained


@pytest.fixture(scope="session")
def description() -> dict:
    return yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text("utf-8"))


def checked(description: dict, operation: dict, address: str, path: str, **how: str | bytes) -> int:
    """Send a request, and hold the answer to the description of its operation; returns the status.

    how: body, content (its type) and accept.
    """
    headers = {name: str(how[key]) for name, key in (("Accept", "accept"),) if key in how}
    if "content" in how:
        headers["Content-Type"] = str(how["content"])
    method = "POST" if "body" in how else "GET"
    request = urllib.request.Request(
        f"http://{address}{path}", data=how.get("body"), headers=headers, method=method
    )  # type: ignore[arg-type]
    try:
        answer = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        told = operation["responses"][str(answer.status)]
        if "$ref" in told:
            told = description["components"]["responses"][told["$ref"].rpartition("/")[2]]
        media = answer.headers["Content-Type"].split(";")[0]
        schema = told["content"][media]["schema"]
        body = answer.read()
        if media == "application/json":
            whole = {**schema, "components": description["components"]}
            jsonschema.Draft202012Validator(whole).validate(json.loads(body))
            told = description["components"]["schemas"]["Image"]["properties"]
            for image in json.loads(body).get("images", ()):
                assert set(image) <= set(told)
    return answer.status


def test_the_server_is_as_its_description_says(server: str, description: dict) -> None:
    photo = samples()[0].read_bytes()
    rank = description["paths"]["/rank"]["post"]
    for media in rank["responses"]["200"]["content"]:
        assert checked(description, rank, server, "/rank", body=photo, accept=media) == 200
    for media in rank["requestBody"]["content"]:
        body, content = photo, media
        if media == "multipart/form-data":
            content += "; boundary=x"
            part = b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a.jpg"\r\n\r\n'
            body = part + photo + b"\r\n--x--\r\n"
        assert checked(description, rank, server, "/rank", body=body, content=content) == 200
    refused = [
        ("/rank", 400, {"body": b""}),
        ("/rank?threshold=0.3", 400, {"body": photo}),
        ("/rank?model=absent", 404, {"body": photo}),
        ("/rank", 406, {"body": photo, "accept": "text/css"}),
        ("/rank", 415, {"body": b"no photo"}),
        ("/rank", 422, {"body": photo[:200]}),
    ]
    for path, status, how in refused:
        assert checked(description, rank, server, path, **how) == status
    assert checked(description, rank, server, "/rank?model=nano", body=photo) == 200
    for query, how in (("16:9,1:1", {}), ("1:1", {"accept": "image/jpeg"})):
        path = f"/rank?aspect={query}"
        assert checked(description, rank, server, path, body=photo, **how) == 200
    for path in ("/", "/health", "/ready", "/metrics"):
        assert checked(description, description["paths"][path]["get"], server, path) == 200


def test_the_description_has_every_path_status_and_parameter(
    server: str, description: dict
) -> None:
    source = (ROOT / "runtime" / "serving" / "app.py").read_text("utf-8")
    assert set(re.findall(r'Route\("(/\w*)"', source)) == set(description["paths"])
    told = set(re.findall(r"\b([45]\d\d) ", (ROOT / "runtime/serving/cli.py").read_text("utf-8")))
    rank = description["paths"]["/rank"]["post"]
    assert told == {status for status in rank["responses"] if status != "200"}
    assert {each["name"] for each in rank["parameters"]} == set(PARAMETERS)
    assert description["info"]["version"] == dsgnn.__version__


def test_a_wrong_description_is_found(server: str, description: dict) -> None:
    wrong = json.loads(json.dumps(description))
    wrong["components"]["schemas"]["Object"]["properties"]["rank"]["type"] = "string"
    rank = wrong["paths"]["/rank"]["post"]
    with pytest.raises(jsonschema.ValidationError):
        checked(wrong, rank, server, "/rank", body=samples()[0].read_bytes())


def test_the_pages_build_strictly_and_offline(tmp_path: Path) -> None:
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        if page.startswith("docs/"):
            built = (tmp_path / page.removeprefix("docs/")).with_suffix(".html").read_text("utf-8")
            loaded = re.findall(r'<(?:script|img|link rel="(?:stylesheet|icon)")[^>]*', built)
            outside = [tag for tag in loaded if re.search(r'(?:src|href)="(?:https?:)?//', tag)]
            assert outside == [] and "{{ help" not in built
    assert "--skip-existing" in (tmp_path / "run.html").read_text("utf-8")
    assert "LARGEST_BATCH" in (tmp_path / "reference.html").read_text("utf-8")
    assert not (tmp_path / "hooks.py").exists()
    live = kept_runtime() is not None  # fetched when the tests' environment was made
    assert (tmp_path / "live" / "model.onnx").exists() == live
    assert ("<iframe" in (tmp_path / "browser.html").read_text("utf-8")) == live


def tour(slow: bool) -> list[str]:
    """The cells of the notebook with code; those tagged slow only if asked for."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text("utf-8"))["cells"]
    return [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and (slow or "slow" not in cell["metadata"].get("tags", ()))
    ]


def run_tour(slow: bool, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict:
    """Run the notebook's cells in one namespace, in a folder; returns the namespace."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", PATH)
    space: dict = {}
    for cell in tour(slow):
        exec(compile(cell, "tour.ipynb", "exec"), space)
    return space


def test_the_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(tour(False)) >= 6
    space = run_tour(False, monkeypatch, tmp_path)
    assert (tmp_path / "first.png").exists() and len(list(Path("ranked").iterdir())) >= 4
    assert space["ranking"]._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_whole_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(tour(True)) > len(tour(False))
    run_tour(True, monkeypatch, tmp_path)
    assert (tmp_path / "mine.onnx.json").exists()
