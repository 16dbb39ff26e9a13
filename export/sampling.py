"""How a graph samples its maps, and the ways that are tried one after the other.

Deformable attention samples by GridSample, which inference libraries have read as nearest or fused
wrongly (NVIDIA/TensorRT#4646, #4813, #4853; pytorch/TensorRT#4074). Where the answers are wrong,
the same graph samples in the next of these ways, each of which is the same algebra:

- "gridsample": the operator itself, which is the fastest;
- "gather": the four neighbours of each point, gathered and weighed by products and sums;
- "apart": GridSample whose results are outputs of the engine too, so that nothing is fused with it;
- "plugin": TensorRT's plugin of deformable attention, one map at a time with weights of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from onnx import ModelProto, helper, inliner, parser

from dsgnn.export.parity.limits import ParityError
from dsgnn.runtime.errors import DsgnnError, OptionError

UNCHANGED = "unchanged"  # the way of a graph that has no GridSample
FOR_ONNX = ("gridsample", "gather")
FOR_ENGINES = {
    "tensorrt": ("gridsample", "gather", "apart", "plugin"),
    "tensorrt-rtx": ("gridsample", "gather", "apart"),  # it has no such plugin
}
PLUGIN = "MultiscaleDeformableAttnPlugin_TRT"
DOMAIN = "dsgnn.sampling"
T = TypeVar("T")

# Both take maps (N, D, h, w) and grid (N, P, K, 2), x and y in -1…1, and give (N, D, P, K): sampled
# bilinearly, with zeros outside. Points are in cells: 0 is the middle of the first cell.
_GATHER = """
gridsample (maps, grid) => (sampled) {
    one = Constant <value_float = 1.0> ()
    zero = Constant <value_float = 0.0> ()
    half = Constant <value_float = 0.5> ()
    swap = Constant <value_ints = [1, 0]> ()
    last = Constant <value_ints = [-1]> ()
    rows = Constant <value_ints = [0, 0, -1]> ()
    points = Constant <value_ints = [0, 1, -1]> ()
    first = Constant <value_ints = [1]> ()
    sides = Shape <start = 2, end = 4> (maps)
    size = Cast <to = 1> (sides)
    wh = Gather (size, swap)
    most = Sub (wh, one)
    scale = Mul (wh, half)
    moved = Add (grid, one)
    scaled = Mul (moved, scale)
    at = Sub (scaled, half)
    low = Floor (at)
    flat = Reshape (maps, rows)
    channels = Shape <start = 1, end = 2> (maps)
    spread = Concat <axis = 0> (first, channels, first)
    width = Shape <start = 3, end = 4> (maps)
    strides = Concat <axis = 0> (first, width)
    stride = Cast <to = 1> (strides)
CORNERS
    total = Sum (part0, part1, part2, part3)
    where = Shape <start = 1, end = 3> (grid)
    same = Constant <value_ints = [0, 0]> ()
    shape = Concat <axis = 0> (same, where)
    sampled = Reshape (total, shape)
}"""
_CORNER = """
    step{i} = Constant <value_floats = [{x}, {y}]> ()
    corner{i} = Add (low, step{i})
    away{i} = Sub (at, corner{i})
    far{i} = Abs (away{i})
    near{i} = Sub (one, far{i})
    capped{i} = Min (corner{i}, most)
    inside{i} = Max (capped{i}, zero)
    is{i} = Equal (inside{i}, corner{i})
    counts{i} = Cast <to = 1> (is{i})
    kept{i} = Mul (near{i}, counts{i})
    weights{i} = ReduceProd <keepdims = 0> (kept{i}, last)
    weight{i} = Reshape (weights{i}, points)
    counted{i} = Mul (inside{i}, stride)
    places{i} = ReduceSum <keepdims = 0> (counted{i}, last)
    whole{i} = Cast <to = 7> (places{i})
    index{i} = Reshape (whole{i}, points)
    all{i} = Expand (index{i}, spread)
    found{i} = GatherElements <axis = 2> (flat, all{i})
    part{i} = Mul (found{i}, weight{i})"""
_PLUGIN = """
gridsample (maps, grid) => (sampled) {
    one = Constant <value_float = 1.0> ()
    half = Constant <value_float = 0.5> ()
    rows = Constant <value_ints = [0, 0, -1]> ()
    heads = Constant <value_ints = [2]> ()
    level = Constant <value_ints = [0]> ()
    list = Constant <value_ints = [0, -1, 1, 1, 1, 2]> ()
    flat = Reshape (maps, rows)
    cells = Transpose <perm = [0, 2, 1]> (flat)
    value = Unsqueeze (cells, heads)
    sides = Shape <start = 2, end = 4> (maps)
    levels = Unsqueeze (sides, level)
    sizes = Cast <to = 6> (levels)
    start = Cast <to = 6> (level)
    moved = Add (grid, one)
    share = Mul (moved, half)
    places = Reshape (share, list)
    many = Shape <start = 0, end = 5> (places)
    weights = Expand (one, many)
    read = DOMAIN.PLUGIN (value, sizes, start, places, weights)
    points = Squeeze (read, heads)
    turned = Transpose <perm = [0, 2, 1]> (points)
    where = Shape <start = 1, end = 3> (grid)
    same = Constant <value_ints = [0, 0]> ()
    shape = Concat <axis = 0> (same, where)
    sampled = Reshape (turned, shape)
}"""


def ways(proto: ModelProto, known: Sequence[str], first: str = "gridsample") -> tuple[str, ...]:
    """The ways to try, the first of them first. Raises OptionError if `first` is not known."""
    if first not in known:
        raise OptionError(f"deform must be one of {', '.join(known)}, got {first!r}")
    if all(node.op_type != "GridSample" for node in proto.graph.node):
        return (UNCHANGED,)
    return tuple(known[known.index(first) :])


def sampled(proto: ModelProto, way: str, plugin_version: str = "1") -> ModelProto:
    """A copy of the graph that samples in this way, or the graph itself where its own GridSample
    stays; for "apart" the builder of engines does the rest.

    GridSample must be bilinear with zeros outside, as all of ours are. plugin_version: see below.
    """
    if way not in ("gather", "plugin"):
        return proto
    copy = ModelProto()
    copy.CopyFrom(proto)
    for node in copy.graph.node:
        if node.op_type == "GridSample":
            node.op_type, node.domain = "gridsample", DOMAIN
            del node.attribute[:]
    opset = next(entry.version for entry in copy.opset_import if not entry.domain)
    head = f'<domain: "{DOMAIN}", opset_import: ["": {opset}, "{DOMAIN}": 1]>'
    corners = "".join(_CORNER.format(i=i, x=float(i % 2), y=float(i // 2)) for i in range(4))
    text = _GATHER.replace("CORNERS", corners)
    if way == "plugin":
        text = _PLUGIN.replace("DOMAIN", DOMAIN).replace("PLUGIN", PLUGIN)
    copy.functions.append(parser.parse_function(head + text))
    copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    made = inliner.inline_local_functions(copy)
    for node in made.graph.node:
        if node.op_type == PLUGIN:
            node.attribute.append(helper.make_attribute("plugin_version", plugin_version))
    if way == "gather":  # no operator of ours is left
        kept = [entry for entry in made.opset_import if entry.domain != DOMAIN]
        del made.opset_import[:]
        made.opset_import.extend(kept)
    return made


def plugin_version(library: str) -> str:
    """The version of the plugin to take in a version of TensorRT: the first is on its way out."""
    major, minor = (int(part) for part in library.split(".")[:2])
    return "2" if (major, minor) >= (10, 11) else "1"


def climb(
    names: Sequence[str], attempt: Callable[[str], T], *refused: type[DsgnnError]
) -> tuple[T, list[dict[str, Any]]]:
    """What the first attempt made that was not refused, and a record of each way that was tried.

    attempt: one of the names → what it made. refused: what an attempt raises that may fare better
    in another way, beside ParityError. Where all are refused, the first refusal is raised; it says
    what became of the others.
    """
    caught: tuple[type[DsgnnError], ...] = (ParityError, *refused)
    tried: list[dict[str, Any]] = []
    first: DsgnnError | None = None
    for name in names:
        try:
            made = attempt(name)
        except caught as error:
            first = first or error
            tried.append({"deform": name, "left": reason(error)})
        else:
            return made, [*tried, {"deform": name, "left": None}]
    assert first is not None
    others = [f"by {one['deform']}: {one['left']}" for one in tried[1:]]
    if others:
        first.args = (f"{first}\nSampling in other ways did not help:\n  " + "\n  ".join(others),)
    raise first


def reason(error: DsgnnError) -> str:
    """Why an artifact was refused, in one line."""
    found = error.failures if isinstance(error, ParityError) else ()
    return "; ".join(found) or " ".join(str(error).split())
