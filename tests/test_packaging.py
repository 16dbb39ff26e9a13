"""The wheel holds what is tracked and works alone: built, installed and run outside the project."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOR_TESTS = ("pytest", "hypothesis", "pillow")
PHOTOS_ALONE = ("artifact", "backends", "cli", "images", "outputs", "ranker", "ranking", "run")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command in `cwd` and returns what it printed; its failure fails the test."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**outside, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done.stdout


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def package_names(paths: list[str]) -> set[str]:
    """The names in the wheel of those tracked files that lie in a package's folder; measured
    results are read in the repository."""
    names = set()
    for line in setup()["options"]["package_dir"].strip().splitlines():
        package, folder = (part.strip() for part in line.split("="))
        for path in paths:
            if path.startswith(f"{folder}/") and not path.startswith("benchmarks/results/"):
                names.add(package.replace(".", "/") + path.removeprefix(folder))
    return names


def difference(wheel: set[str], tracked: set[str]) -> list[str]:
    """What is wrong with the files of a wheel, one line each."""
    missing = [f"not in the wheel: {name}" for name in tracked - wheel]
    return sorted(missing + [f"not tracked: {name}" for name in wheel - tracked])


def lowest(requirements: str) -> list[str]:
    """The requirements of a section of setup.cfg, each at its lower bound."""
    lines = [line for line in requirements.strip().splitlines() if not line.startswith("#")]
    return [line.replace(">=", "==") for line in lines]


def passes_runtime_tests(python: Path, source: Path, folder: Path, *names: str) -> None:
    """Runs modules of tests/runtime, or all, with `python` on a copy in `folder`."""
    shutil.copytree(source / "tests" / "runtime", folder / "tests" / "runtime")
    shutil.copytree(source / "tests" / "golden", folder / "tests" / "golden")
    (folder / "docs").mkdir()
    shutil.copy(source / "docs" / "frames.md", folder / "docs")  # what it hands to other tools
    shutil.copy(source / "setup.cfg", folder)  # pytest's settings
    modules = [f"tests/runtime/test_{name}.py" for name in names] or ["tests/runtime"]
    said = run(python, "-m", "pytest", "-m", "not slow", *modules, cwd=folder)
    assert " passed" in said.splitlines()[-1], said


@pytest.fixture(scope="session")
def tracked() -> list[str]:
    """The project's files as git lists them, but for those deleted and not committed yet."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    names = run("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0")
    return [name for name in names if (ROOT / name).exists()]


@pytest.fixture(scope="session")
def source(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files: nothing else that lies about can help or harm."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def wheel(source: Path) -> Path:
    """The wheel that the source distribution gives, as a package index would serve them."""
    run(sys.executable, "-m", "build", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="session")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel, its [cpu] extra and what tests are written with."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", f"{wheel}[cpu]", *FOR_TESTS, cwd=folder)
    return python


def test_the_wheel_holds_the_tracked_files(wheel: Path, tracked: list[str]) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert difference(names, package_names(tracked)) == []


def test_a_missing_and_a_stray_file_are_found() -> None:
    tracked = package_names(["runtime/models/nano.onnx", "dsgnn/model.py", "tests/test_model.py"])
    assert tracked == {"dsgnn/runtime/models/nano.onnx", "dsgnn/model.py"}
    assert difference({"dsgnn/model.py", "tests/test_model.py"}, tracked) == [
        "not in the wheel: dsgnn/runtime/models/nano.onnx",
        "not tracked: tests/test_model.py",
    ]


def test_the_runtime_passes_its_tests_alone(bare: Path, source: Path, tmp_path: Path) -> None:
    installed = run(bare, "-m", "pip", "list", cwd=tmp_path)
    assert "onnxruntime" in installed and "torch" not in installed
    passes_runtime_tests(bare, source, tmp_path, *PHOTOS_ALONE)


@pytest.mark.slow
def test_the_runtime_passes_all_its_tests_alone(bare: Path, source: Path, tmp_path: Path) -> None:
    passes_runtime_tests(bare, source, tmp_path)


def test_every_command_shows_its_help_without_torch(bare: Path, tmp_path: Path) -> None:
    scripts = setup()["options.entry_points"]["console_scripts"].strip().splitlines()
    for script in scripts:
        name = script.partition(" = ")[0]
        assert run(bare.with_name(name), "--help", cwd=tmp_path).startswith(f"Usage: {name}")


def test_the_bundled_model_ranks_a_photo(bare: Path, source: Path, tmp_path: Path) -> None:
    photo = source / "runtime" / "samples" / "birthday.jpg"
    run(bare.with_name("dsgnn-run"), photo, "--out", "out", cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["images"][0]["objects"][0]["rank"] == 1


@pytest.fixture(scope="session")
def clone(bare: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a newcomer has it, after the README's `pip install '.[cpu]'` in that folder.

    The libraries are in the environment already, so that only the project itself is installed.
    """
    folder = tmp_path_factory.mktemp("clone") / "dsgnn"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("dist", "*.egg-info"))
    run(bare, "-m", "pip", "install", ".[cpu]", cwd=folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "from dsgnn.runtime import Ranker; print(Ranker())"),
        ("-m", "dsgnn.scenes.collect", "--help"),
        ("-m", "dsgnn.export.cli", "--help"),
        ("-m", "dsgnn.benchmarks.cli", "--help"),
    ],
)
def test_the_door_opens_from_the_clone(arguments: tuple[str, ...], bare: Path, clone: Path) -> None:
    """There Python finds the folder `dsgnn` of the clone before the package that was installed."""
    run(bare, *arguments, cwd=clone)


def test_the_python_of_the_readme_runs_in_the_clone(bare: Path, clone: Path) -> None:
    found = re.findall(r"```python\n(.*?)```", (clone / "README.md").read_text("utf-8"), re.DOTALL)
    assert found
    for block in found:
        run(bare, "-c", block, cwd=clone)


def test_a_door_that_is_shut_is_found(bare: Path, clone: Path, tmp_path: Path) -> None:
    """A folder `dsgnn` that does not know of its neighbours hides the installed package."""
    shutil.copytree(clone / "dsgnn", tmp_path / "dsgnn")
    with pytest.raises(AssertionError, match="No module named 'dsgnn.runtime'"):
        run(bare, "-c", "from dsgnn.runtime import Ranker", cwd=tmp_path)


@pytest.mark.parametrize("where", ["", "def test(): "])
def test_no_test_is_skipped_for_a_missing_library(where: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(f"import pytest\n{where}pytest.importorskip('absent')")
    with pytest.raises(AssertionError, match=r"absent.*: add it to \[dev\] in setup.cfg"):
        run(sys.executable, "-m", "pytest", cwd=tmp_path)


def test_types(wheel: Path, tmp_path: Path) -> None:
    """mypy on the installed package: only there are dsgnn.runtime and the others in one place."""
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path)
    run(*pip, wheel, cwd=tmp_path)
    options = ("--config-file", ROOT / "setup.cfg", "--cache-dir", ROOT / ".mypy_cache")
    run(sys.executable, "-m", "mypy", *options, "-p", "dsgnn", cwd=tmp_path)


def test_users_see_the_types(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text("from dsgnn.runtime import Ranker\nreveal_type(Ranker())")
    mypy = (sys.executable, "-m", "mypy", "--python-executable", bare, "user.py")
    assert "dsgnn.runtime.ranker.Ranker" in run(*mypy, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="no wheels of the oldest numpy")
def test_the_lower_bounds_are_true(wheel: Path, source: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    bounds = lowest(setup()["options"]["install_requires"])
    bounds += lowest(setup()["options.extras_require"]["cpu"])
    run(python, "-m", "pip", "install", f"{wheel}[cpu]", *bounds, *FOR_TESTS, cwd=tmp_path)
    passes_runtime_tests(python, source, tmp_path)
