"""Who may import whom: runtime <- dsgnn <- export <- benchmarks, and what stays free of PyTorch.

The rules are read off the syntax trees, and proved by importing with everything else blocked.
Each check is a function of a source text, so that the examples can show it failing. The last of
them are about the house as a whole: no crowded folder, no circle, no name for two classes.
"""

import ast
import configparser
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).parents[1]

# A layer may import itself and those before it.
LAYERS = ("dsgnn.runtime", "dsgnn", "dsgnn.export", "dsgnn.benchmarks")
# Installed everywhere and cheap to import. (tqdm is installed too, and imported where it is used.)
BASE = {"numpy", "cv2", "click"}
TORCH = {"torch", "torchvision", "timm"}
# Modules of the core, beside the readers, that must work on hosts without PyTorch.
TORCH_FREE = (
    "dsgnn",
    "dsgnn.commands",
    "dsgnn.config",
    "dsgnn.metrics",
    "dsgnn.options",
    "dsgnn.gaze_measures",
    "dsgnn.pickled",
)
# The only modules of the runtime that may import a library beyond the base, inside a function.
HOMES = {
    "av": tuple(f"dsgnn.runtime.video.{name}" for name in ("container", "film", "h264", "picture")),
    "tqdm": ("dsgnn.runtime.run.loop",),
    "onnxruntime": ("dsgnn.runtime.backends.onnx",),
    "openvino": ("dsgnn.runtime.backends.openvino",),
    "cuda": ("dsgnn.runtime.backends.tensorrt",),
    "pyarrow": ("dsgnn.runtime.cluster.parquet",),
    "ray": ("dsgnn.runtime.cluster.connect", "dsgnn.runtime.serving.replicas"),
    "grpc": ("dsgnn.runtime.cluster.connect",),
    "tritonclient": ("dsgnn.runtime.backends.triton",),
    "starlette": ("dsgnn.runtime.serving.app", "dsgnn.runtime.serving.body"),
    "python_multipart": ("dsgnn.runtime.serving.body",),
    "prometheus_client": ("dsgnn.runtime.serving.app",),
    "uvicorn": ("dsgnn.runtime.serving.listen",),
    "h11": ("dsgnn.runtime.serving.listen",),
    "supervision": ("dsgnn.runtime.ranking",),
}
# Modules of one folder, `__init__.py` and sub-folders aside.
ROOMS = 14
# The core knows nothing of video but one import, inside `Ranker.stream`, that hands over.
HAND_OVER = ("dsgnn.runtime.ranker", "dsgnn.runtime.video")
# They report to their makers unless dsgnn.runtime.telemetry imports them.
REPORTING = ("onnxruntime", "openvino", "ray")


SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def modules() -> dict[str, Path]:
    """Every module of the four folders, by the name it is imported under."""
    found = {}
    for line in SETUP["options"]["package_dir"].strip().splitlines():
        package, folder = (part.strip() for part in line.split("="))
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def layer(module: str) -> str:
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len)


def is_torch_free(module: str) -> bool:
    """True for what must work on hosts without PyTorch: the runtime, the readers, the metrics."""
    readers = module.startswith(("dsgnn.data", "dsgnn.scenes"))
    readers = readers and module != "dsgnn.data.transforms"
    core = module in TORCH_FREE
    return layer(module) == "dsgnn.runtime" or readers or core


def is_light(module: str) -> bool:
    """True for what may import the base only until it is called: also the command lines."""
    evaluation = module.startswith("dsgnn.evaluation")
    return is_torch_free(module) or evaluation or module.endswith(".cli")


class Import(NamedTuple):
    target: str
    line: int
    deferred: bool  # inside a function, or for type checkers only


def imports(module: str, source: str) -> Iterator[Import]:
    """All imports in the source of a module, `import_module("name")` included."""
    path = MODULES.get(module)
    package = module.split(".")
    if path is None or path.name != "__init__.py":
        package = package[:-1]

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, deferred)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            for name in node.names:
                full = f"{origin}.{name.name}"
                yield Import(full if full in MODULES else origin, node.lineno, deferred)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            for name in node.args[:1]:
                if isinstance(name, ast.Constant):
                    yield Import(str(name.value), node.lineno, deferred)
        body = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
        elif isinstance(node, ast.Lambda):
            body = [node.body]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            body = node.body
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred or child in body)

    yield from visit(ast.parse(source), False)


def violations(module: str, source: str) -> list[str]:
    """What the imports of one module break."""
    found = []
    for target, line, deferred in imports(module, source):
        library = target.partition(".")[0]
        if library == "dsgnn":
            if LAYERS.index(layer(target)) > LAYERS.index(layer(module)):
                found.append(f"line {line}: {layer(module)} must not import {target}")
            elif is_light(module) and not deferred and not is_light(target):
                found.append(f"line {line}: {target} is heavy, import it inside a function")
        elif library not in BASE and library not in sys.stdlib_module_names:
            if library in TORCH and is_torch_free(module):
                found.append(f"line {line}: {module} must work without {library}")
            elif layer(module) == "dsgnn.runtime" and module not in HOMES.get(library, ()):
                homes = " and ".join(HOMES.get(library, ["no module"]))
                found.append(
                    f"line {line}: in the runtime {library} has its home in {homes}, not here"
                )
            elif is_light(module) and not deferred:
                found.append(f"line {line}: {library} is heavy, import it inside a function")
    return found


def logic(source: str) -> list[str]:
    """What a command-line module holds beyond parsing and calling: loops and classes."""
    kinds = (ast.For, ast.AsyncFor, ast.While, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [f"line {node.lineno}: {type(node).__name__} in a command line" for node in nodes]


def reporting_imports(source: str) -> list[str]:
    """The imports in a source of libraries that report to their makers, past telemetry.py."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [word.value for word in node.args[:1] if isinstance(word, ast.Constant)]
        found += [name for name in names if name.partition(".")[0] in REPORTING]
    return found


def undeclared(sources: Iterable[str]) -> set[str]:
    """The libraries imported in these sources that neither setup.cfg nor this project brings."""

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lists = [SETUP["options"]["install_requires"], *SETUP["options.extras_require"].values()]
    declared = {plain(name) for name in re.findall(r"^[\w.-]+", "\n".join(lists), re.MULTILINE)}
    own = {"dsgnn", "tests", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    brought_by = packages_distributions()
    libraries = {entry.target.partition(".")[0] for s in sources for entry in imports("", s)}
    return {
        library
        for library in libraries - own - sys.stdlib_module_names - {""}
        if declared.isdisjoint(map(plain, brought_by.get(library, [library])))
    }


def crowded(modules: Mapping[str, Path]) -> dict[str, int]:
    """The folders that hold more than ROOMS modules, with how many they hold."""
    folders = Counter(path.parent for path in modules.values() if path.name != "__init__.py")
    return {folder.name: count for folder, count in folders.items() if count > ROOMS}


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Groups of modules that import each other, each of which can be reached from all others.

    sources: texts by module. Imports inside functions and under TYPE_CHECKING count, and only one
    deferred import of HAND_OVER does not. What a package's `__init__` imports counts for those that
    import the package itself.
    """
    names = list(sources)
    arrows = []
    for module, source in sources.items():
        handed = False
        for target, _, deferred in imports(module, source):
            core, wing = HAND_OVER
            if module == core and target.startswith(f"{wing}.") and deferred and not handed:
                handed = True
            elif target in sources and target != module:
                arrows.append((names.index(module), names.index(target)))
    ends = tuple(zip(*arrows, strict=True)) or ((), ())
    graph = csr_array(([1] * len(arrows), ends), shape=(len(names), len(names)))
    _, groups = connected_components(graph, connection="strong")
    sizes = Counter(groups.tolist())
    return [
        [name for name, of in zip(names, groups, strict=True) if of == group]
        for group, size in sizes.items()
        if size > 1
    ]


def shared_names(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Public classes by name, where more than one module has a class of that name."""
    homes: dict[str, list[str]] = {}
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


IMPORT_ALONE = """
import importlib, sys
allowed, *names = sys.argv[1:]
allowed = {*sys.stdlib_module_names, *allowed.split(",")}
class Blocker:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker)
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
"""


def import_alone(names: list[str], allowed: set[str], path: Path = ROOT) -> str:
    """Imports modules in a new process where only the standard library and `allowed` exist.

    Returns a line for each that fails. Modules are also searched in `path`.
    """
    command = [sys.executable, "-c", IMPORT_ALONE, ",".join(allowed), *names]
    run = subprocess.run(command, capture_output=True, text=True, cwd=path, timeout=120)
    return run.stdout + run.stderr


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_layers(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


def test_every_imported_library_is_declared() -> None:
    """What another package happens to bring, or a developer has, is missing in a new place."""
    paths = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    assert undeclared(path.read_text("utf-8") for path in paths) == set()


@pytest.mark.parametrize("module", [name for name in MODULES if name.endswith("cli")])
def test_command_lines_only_parse_and_call(module: str) -> None:
    assert logic(MODULES[module].read_text()) == []


def test_light_modules_import_with_the_base_alone() -> None:
    light = [name for name in MODULES if is_light(name)]
    assert import_alone(light, {"dsgnn", *BASE}) == ""


def test_the_top_package_needs_nothing() -> None:
    assert import_alone(["dsgnn"], {"dsgnn"}) == ""


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        (
            "dsgnn.runtime.run.loop",
            "import dsgnn.model",
            "dsgnn.runtime must not import dsgnn.model",
        ),
        ("dsgnn.runtime.run.loop", "from dsgnn import __version__", "must not import dsgnn"),
        ("dsgnn.runtime.run.loop", "from ... import export", "must not import dsgnn.export"),
        ("dsgnn.runtime", "from ..metrics import evaluate", "must not import dsgnn.metrics"),
        (
            "dsgnn.model",
            "def f():\n import dsgnn.export.onnx",
            "must not import dsgnn.export",
        ),
        ("dsgnn.export.onnx", "from dsgnn import benchmarks", "must not import dsgnn.benchmarks"),
        ("dsgnn.model", "import_module('dsgnn.export')", "must not import dsgnn.export"),
        ("dsgnn.runtime.run.loop", "def f():\n import torch", "must work without torch"),
        ("dsgnn.runtime.run.loop", "if TYPE_CHECKING:\n import torch", "must work without torch"),
        ("dsgnn.data.coco", "def f():\n import torchvision.io", "must work without torchvision"),
        ("dsgnn.metrics", "from torch import nn", "must work without torch"),
        ("dsgnn.runtime.run.loop", "def f():\n import scipy", "scipy has its home in no module"),
        ("dsgnn.runtime.ranker", "def f():\n import onnxruntime", "dsgnn.runtime.backends.onnx"),
        ("dsgnn.runtime.run.loop", "import tqdm", "tqdm is heavy"),
        ("dsgnn.runtime.run.loop", "try:\n import tqdm\nexcept OSError:\n pass", "tqdm is heavy"),
        ("dsgnn.runtime.run.loop", "def f(bar=__import__('tqdm')):\n pass", "tqdm is heavy"),
        ("dsgnn.cli", "import torch", "torch is heavy"),
        ("dsgnn.cli", "from dsgnn.model import build_model", "dsgnn.model is heavy"),
        (
            "dsgnn.evaluation.loop",
            "from dsgnn.data.transforms import x",
            "dsgnn.data.transforms is heavy",
        ),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, complaint: str) -> None:
    found = violations(module, source)
    assert len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dsgnn.runtime.run.loop", "import os.path, click, cv2\nfrom dsgnn.runtime import ranking"),
        ("dsgnn.runtime.run.loop", "def f():\n from tqdm import tqdm"),
        ("dsgnn.runtime.backends.onnx", "def f():\n import onnxruntime"),
        ("dsgnn.cli", "def f():\n import torch\n from dsgnn.model import build_model"),
        ("dsgnn.metrics", "import numpy.typing\nfrom dsgnn.runtime.ranking import Ranking"),
        ("dsgnn.data.transforms", "import torch"),
        ("dsgnn.export.onnx", "import torch, onnx\nfrom dsgnn import __version__"),
        ("dsgnn.benchmarks.latency", "import dsgnn.export.onnx, dsgnn.model, dsgnn.runtime"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_an_undeclared_library_is_found() -> None:
    source = "import json, numpy, sympy.core\ndef f():\n import cv2\n from mpmath import mp"
    assert undeclared([source]) == {"sympy", "mpmath"}


def test_every_import_of_a_reporting_library_is_without_telemetry() -> None:
    """replicas.py imports parts of a Ray that `cluster` has imported before."""
    found = {name: reporting_imports(path.read_text("utf-8")) for name, path in MODULES.items()}
    found = {name: targets for name, targets in found.items() if targets}
    assert set(found) == {"dsgnn.runtime.serving.replicas"}
    assert {name.partition(".")[0] for name in found["dsgnn.runtime.serving.replicas"]} == {"ray"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import onnxruntime.tools", ["onnxruntime.tools"]),
        ("def f():\n from openvino import Core", ["openvino"]),
        ("importlib.import_module('ray')", ["ray"]),
        ("import_without_telemetry('ray')", []),
        ("import raymond, json", []),
    ],
)
def test_an_import_past_telemetry_is_found(source: str, found: list[str]) -> None:
    assert reporting_imports(source) == found


def test_a_loop_and_a_class_in_a_command_line_are_found() -> None:
    source = "class A:\n pass\ndef f(names):\n for name in names:\n  while name:\n   pass"
    assert [line.partition(" in ")[0] for line in logic(source)] == [
        "line 1: ClassDef",
        "line 4: For",
        "line 5: While",
    ]


def test_a_module_that_needs_more_is_found(tmp_path: Path) -> None:
    (tmp_path / "needy.py").write_text("import numpy\nimport pytest\n")
    assert import_alone(["needy"], {"needy", "numpy"}, tmp_path) == "needy: pytest is blocked\n"


def test_names_of_the_rules_exist() -> None:
    """A renamed module must not slip out of its rule."""
    named = {*TORCH_FREE, "dsgnn.evaluation.loop", "dsgnn.evaluation.gaze"}
    named |= {"dsgnn.data.transforms"}
    homes = {module for modules in HOMES.values() for module in modules}
    assert {*named, *homes, *LAYERS} <= set(MODULES)


def texts() -> dict[str, str]:
    return {module: path.read_text("utf-8") for module, path in MODULES.items()}


def test_no_folder_is_crowded() -> None:
    assert crowded(MODULES) == {}


def test_no_modules_import_each_other() -> None:
    assert circles(texts()) == []


def test_no_two_public_classes_share_a_name() -> None:
    assert shared_names(texts()) == {}


def test_a_crowded_folder_is_found() -> None:
    rooms = {f"a.m{number}": Path("a", f"m{number}.py") for number in range(14)}
    rooms |= {"a": Path("a", "__init__.py"), "a.wing.m": Path("a", "wing", "m.py")}
    assert crowded(rooms) == {}
    assert crowded({**rooms, "a.m14": Path("a", "m14.py")}) == {"a": 15}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import b", "import a"),
        ("from b import x", "def f():\n from a import y"),
        ("if TYPE_CHECKING:\n from b import x", "import a"),
        ("def f():\n return import_module('b')", "import a"),
    ],
)
def test_a_circle_is_found(first: str, second: str) -> None:
    assert circles({"a": first, "b": second, "c": "import a, b"}) == [["a", "b"]]


def test_a_long_circle_is_found_and_a_diamond_is_none() -> None:
    diamond = {"a": "import b, c", "b": "import d", "c": "import d", "d": "import os"}
    assert circles(diamond) == []
    assert circles({**diamond, "d": "import a"}) == [["a", "b", "c", "d"]]
    assert circles({"a": "import os", "b": ""}) == []


def test_only_one_deferred_import_hands_over() -> None:
    ranker, clip = "dsgnn.runtime.ranker", "dsgnn.runtime.video.clip"
    once = "def stream():\n from dsgnn.runtime.video.clip import frames"
    video = "from dsgnn.runtime.ranker import Ranker"
    assert circles({ranker: once, clip: video}) == []
    assert circles({ranker: once.replace("def stream():\n ", ""), clip: video}) == [[ranker, clip]]
    assert circles({ranker: f"{once}\n{once}", clip: video}) == [[ranker, clip]]


def test_a_shared_class_name_is_found() -> None:
    sources = {
        "a": "class Log: pass\nclass _Own: pass",
        "b": "def f():\n class Log: pass\nclass _Own: pass",
        "c": "class Other: pass",
    }
    assert shared_names(sources) == {"Log": ["a", "b"]}
