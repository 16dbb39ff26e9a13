"""The page, the README's table, comparisons, the schema, and what is refused."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dsgnn.benchmarks import gpu, limits, results
from dsgnn.benchmarks.cli import main
from dsgnn.benchmarks.environment import environment
from dsgnn.benchmarks.forms import DEFAULT_FORMS, Spec, specs
from dsgnn.benchmarks.report import plots
from dsgnn.benchmarks.report.compare import compare
from dsgnn.benchmarks.report.page import replace_between, report
from dsgnn.benchmarks.report.tables import caveats, gpu_table, never_measured
from dsgnn.benchmarks.report.words import answers_text, milliseconds
from dsgnn.benchmarks.timing import Plan
from dsgnn.config import CONFIGS
from dsgnn.runtime.artifact import Sidecar, open_artifact, sha256_of, write_sidecar
from dsgnn.runtime.errors import DsgnnError
from dsgnn.runtime.ranker import BUNDLED

from .fakes import Clockwork, FakeBench, facts
from .test_latency import latency

PLAN = Plan(duration_s=0.2, runs=4, rounds=4, warm_up_s=0)
FORMS = {"up": "upstream", "fast": "artifact"}


def timed(out: Path, **ms: float) -> Path:
    clock = Clockwork()

    def open_bench(spec: Spec) -> FakeBench:
        return FakeBench(
            clock,
            spec.model,
            ms[spec.model],
            form=FORMS[spec.model],
            weights="synthetic" if spec.model == "up" else "trained",
        )

    found = [Spec("artifact", name) for name in ms]
    latency(found, (1,), PLAN, out, clock=clock, open_bench=open_bench)
    return out / "latency.json"


def measured(out: Path, name: str = "fast", sha256: str = "fast-hash") -> Path:
    subject = {k: v for k, v in facts(name).items() if k in results.SUBJECT} | {"sha256": sha256}
    check = {"passed": True, "iou_mean": 0.9991}
    row = {
        "subject": subject,
        "data": {"spec": "composite:9", "split": "test", "images": 9, "protocol": "dsgnn"},
        "figures": {"sa_sor": 0.75, "sor": None},
        "used": {"sa_sor": 8},
        "reference": {"sa_sor": 0.7505},
        "parity": [check],
        "parity_from": "here",
    }
    results.save(out / "accuracy.json", "accuracy", environment(), seed=0, rows=[row])
    return out / "accuracy.json"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [timed(tmp_path, up=40.0, fast=10.0), measured(tmp_path)]


def test_latency_and_accuracy_of_one_file_stand_in_one_row(files: list[Path]) -> None:
    text = report(files, None, None)
    (row,) = re.findall(r"^\| fast .*", text, re.M)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["fp32", "1"]
    assert cells[3].startswith("10.") and cells[5].startswith("0.250 (")
    assert "of peak" not in text  # of a fake no peak rates are known
    assert cells[8:] == ["1.0", "0.750", "-0.0005", "passed, mask IoU 0.9991 (here)", "–"]
    (upstream,) = re.findall(r"^\| up .*", text, re.M)
    assert "| 1 | " in upstream and "random weights" in upstream
    assert re.search(
        r"^\*\*Accuracy\.\*\* .*, revision .*\.\n\n- fast .*sa_sor 0.750 \(8\)", text, re.M
    )


def test_precisions_of_one_network_are_told_apart(tmp_path: Path) -> None:
    """What a file is stored in, and what a backend makes of it; in the order of the command."""
    clock = Clockwork()
    found = [
        Spec("artifact", "r50.onnx", backend="onnxruntime"),
        Spec("artifact", "r50.onnx", backend="openvino-bf16"),
        Spec("artifact", "r50-int8.onnx", backend="openvino"),
        Spec("artifact", "r50-int8.onnx", backend="openvino-bf16"),
    ]

    def open_bench(spec: Spec) -> FakeBench:
        precision = "int8" if "int8" in spec.model else "fp32"
        return FakeBench(
            clock,
            f"{spec.model} · {spec.backend}",
            1186.0,
            config="r50-assr",
            precision=precision,
            backend=spec.backend,
        )

    latency(found, (1,), PLAN, tmp_path, clock=clock, open_bench=open_bench)
    text = report([tmp_path / "latency.json"], None, None)
    assert text.startswith("**r50-assr.** ")
    rows = [row.strip("| ").split(" | ")[:4] for row in re.findall(r"^\| r50.*", text, re.M)]
    assert [row[:3] for row in rows] == [
        ["r50.onnx · onnxruntime", "fp32", "1"],
        ["r50.onnx · openvino-bf16", "bf16", "1"],
        ["r50-int8.onnx · openvino", "int8", "1"],
        ["r50-int8.onnx · openvino-bf16", "int8 and bf16", "1"],
    ]
    assert all(re.fullmatch(r"1,\d\d\d", row[3]) for row in rows)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.7364, "0.736"), (99.44, "99.4"), (99.96, "100"), (1186.4, "1,186"), (1e6, "1,000,000")],
)
def test_figures_are_short_and_without_exponents(value: float, text: str) -> None:
    assert plots.brief(value) == text


def test_every_point_of_a_plot_is_named() -> None:
    points = [(f"model {n}", 8.5 + 0.01 * n, 0.677) for n in range(20)] + [("<slow>", 1186.0, 0.5)]
    svg = plots.scatter(points, "p50 ms", "SA-SOR")
    names = [f"model {n}" for n in range(20)] + ["&lt;slow&gt;"]
    assert all(f">{name}</text>" in svg for name in names)
    assert plots.scatter(points, "p50 ms", "SA-SOR") == svg  # equal figures give an equal page


def test_bars_and_boxes_say_their_figures() -> None:
    bars = plots.stage_bars({"up": {"decode": 2.0, "compute": 30.0}, "fast": {"compute": 8.25}})
    assert all(f">{text}</text>" in bars for text in ("32 ms", "8.25 ms", "up", "fast", "decode"))
    boxes = plots.distributions({"up": [30.0, 33.0, 99.0], "fast": [8.0, 8.25, 9.0]})
    assert all(f">{text}</text>" in boxes for text in ("p50 33 ms", "p50 8.25 ms", "up", "fast"))


def test_the_page_is_self_contained(files: list[Path], tmp_path: Path) -> None:
    report(files, tmp_path / "report.html", None)
    page = (tmp_path / "report.html").read_text()
    page = re.sub(r'xmlns(:xlink)?="http://www.w3.org/[0-9a-z/]*"', "", page)  # names, not requests
    assert not re.search(r"https?:|src=|href=\"[^#]|url\([^#]|@import|<script|<link|<iframe", page)
    assert page.count("<svg") == 3  # stages, distributions, accuracy against latency
    assert "On a GPU nothing has been measured" in page and "cpu_flags" in page
    assert (tmp_path / "report.md").read_text() == report(files, None, None)


def test_names_from_files_cannot_become_markup(tmp_path: Path) -> None:
    path = timed(tmp_path, fast=10.0)
    content = path.read_text().replace('"name": "fast"', '"name": "<b>|fast"')
    path.write_text(content)
    report([path], tmp_path / "r.html", None)
    assert "<b>" not in (tmp_path / "r.html").read_text()
    assert "\\|fast" in (tmp_path / "r.md").read_text()


def test_accuracy_of_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    files = [timed(tmp_path, up=40.0, fast=10.0), measured(tmp_path, sha256="another")]
    with pytest.raises(DsgnnError, match=r"timed as fast-hash.*measured on another.*same file"):
        report(files, None, None)


def test_the_readme_table_is_replaced_between_its_marks(files: list[Path], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    report(files, None, readme)
    once = readme.read_text()
    assert once.startswith("before\n<!-- bench -->\n") and "old" not in once and "| fast |" in once
    assert once.endswith("<!-- /bench -->\nafter\n")
    assert "nothing has been measured" in once and "never measured" not in once
    report(files, None, readme)
    assert readme.read_text() == once
    with pytest.raises(DsgnnError, match="lacks a line <!-- bench -->"):
        replace_between(files[0], "text")


def test_unverified_drifting_and_noisy_results_say_so(files: list[Path], tmp_path: Path) -> None:
    loaded = results.load(files[0])
    row = loaded["rows"][1]
    row["subject"]["status"] = "unverified"
    row["stationary"], row["drift"] = False, 0.2
    loaded["noise"]["1"] = {"quiet": False, "worst": 0.3, "why": "fast: differs by 30%"}
    results.save(files[0], **{k: v for k, v in loaded.items() if k not in ("schema", "created")})
    text = report(files, tmp_path / "r.html", None)
    assert "UNVERIFIED, drifts by +20%" in text
    noisy = "The machine was too noisy for these figures: fast: differs by 30%."
    assert f"\n\n- {noisy}\n- UNVERIFIED: fast\n" in text  # the first caveat, and said once
    assert text.count("too noisy") == 1 and "Both halves" not in text
    assert f'<ul class="bad"><li>{noisy}</li>' in (tmp_path / "r.html").read_text()


def test_two_runs_that_agree_and_two_that_do_not(tmp_path: Path) -> None:
    first = results.load(timed(tmp_path / "a", up=40.0, fast=10.0))
    slower = results.load(timed(tmp_path / "b", up=80.0, fast=20.0))
    other = results.load(timed(tmp_path / "c", up=40.0, fast=12.0))
    said = compare(first, slower)
    assert re.search(r"fast: time B ÷ A (1\.99|2\.0[01])", said), said
    assert said.endswith("the runs agree")
    said = compare(first, other)
    assert re.search(r"apart (19|20)\.\d%", said), said
    assert said.endswith("too noisy, or it changed")


def test_one_run_by_another_baseline(tmp_path: Path) -> None:
    one = results.load(timed(tmp_path, up=40.0, fast=10.0))
    assert re.search(r"up: (3\.9[89]|4\.0[01])", compare(one, against="fast"))
    with pytest.raises(DsgnnError, match="no model is called 'absent'; there are up, fast"):
        compare(one, against="absent")


def test_results_of_another_schema_are_refused(files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(files[0].read_text().replace(results.SCHEMA, "dsgnn.bench/0"))
    with pytest.raises(DsgnnError, match=r"expected schema dsgnn.bench/1, got 'dsgnn.bench/0'"):
        results.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(DsgnnError, match="got 'list'"):
        results.load(path)


def mutations(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to every named value of a document, raw samples and free mappings left out."""
    found = []
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in (
                "plan",
                "before",
                "after",
                "variables",
                "floor",
                "samples",
                "gpus",
                "parity",
            ):
                found += [(*path, name), *mutations(item, (*path, name))]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        found += mutations(value[0], (*path, 0))
    return found


@pytest.mark.parametrize("kind", [0, 1])
def test_the_schema_holds_every_name_and_type(files: list[Path], kind: int) -> None:
    good = results.load(files[kind])
    free = {"figures", "used", "libraries", "stages", "noise", "reference"}
    paths = mutations(good)
    assert len(paths) > 40
    for path in paths:
        for spoil in ("drop", "change"):
            bad = copy.deepcopy(good)
            holder: Any = bad
            for name in path[:-1]:
                holder = holder[name]
            if spoil == "drop":
                if len(path) > 1 and path[-2] in free:
                    continue  # names are free there
                del holder[path[-1]]
            else:
                holder[path[-1]] = {"not": ["this"]}
            with pytest.raises(DsgnnError):
                results.validate(bad)


def test_an_unknown_name_and_a_truth_value_for_a_number_are_refused(files: list[Path]) -> None:
    good = results.load(files[0])
    with pytest.raises(DsgnnError, match=r"has unknown \['more'\]"):
        results.validate({**good, "more": 1})
    with pytest.raises(DsgnnError, match="seed: expected int, got bool"):
        results.validate({**good, "seed": True})


def test_gpu_rows_that_were_never_measured_are_one_line() -> None:
    table = gpu_table([], [])
    assert len(table) == 1
    said = never_measured(table)
    assert said.startswith("Never measured: PyTorch as upstream (fp32, fp16, bf16); PyTorch deploy")
    assert said.count("(fp32, fp16, bf16)") == 10 and "TensorRT-RTX, CUDA graph" in said


def test_a_caveat_of_all_rows_is_said_once() -> None:
    heading = ["artifact", "parity", "notes"]
    rows = [["a", "–", "random weights"], ["b", "FAILED, mask IoU 0.9", "random weights, drifts"]]
    assert caveats([heading, *rows]) == [
        "FAILED the comparison with its network: b",
        "random weights: every row",
        "drifts: b",
    ]


def test_caveats_stand_before_the_table(files: list[Path], tmp_path: Path) -> None:
    loaded = results.load(files[0])
    loaded["rows"][1]["subject"]["status"] = "unverified"
    results.save(files[0], **{k: v for k, v in loaded.items() if k not in ("schema", "created")})
    content = files[1].read_text()
    files[1].write_text(content.replace('"passed": true', '"passed": false'))
    report(files, tmp_path / "r.html", None)
    page = (tmp_path / "r.html").read_text()
    (seen,) = re.findall(r'<ul class="bad">(.*?)</ul><table>', page)
    assert re.findall("<li>(.*?)</li>", seen) == [
        "FAILED the comparison with its network: fast",
        "UNVERIFIED: fast",
        "random weights: up",
    ]
    assert "- UNVERIFIED: fast\n" in (tmp_path / "r.md").read_text()


def test_when_a_run_was_made_cannot_become_markup(files: list[Path], tmp_path: Path) -> None:
    content = files[0].read_text()
    files[0].write_text(re.sub(r'"created": "[^"]*"', '"created": "<b>2026-01-01"', content))
    report(files, tmp_path / "r.html", None)
    page = (tmp_path / "r.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;2026-01-01" in page


def test_a_run_ends_with_milliseconds(files: list[Path]) -> None:
    lines = milliseconds(results.load(files[0])).splitlines()
    assert re.fullmatch(r"batch 1  up: 40\.\d ms, 4[01](\.\d)? ms", lines[1]), lines
    assert re.fullmatch(r"batch 1  fast: 10\.\d ms, 10\.\d ms", lines[2]), lines


def gpu_run(out: Path, clock: Clockwork, slow: str = "", fails: str = "", **options: Any) -> Any:
    """The table of fakes: forms run in 8 ms, `fails` cannot be opened, `slow` takes an hour."""

    def call(function: Any, spec: Spec) -> Any:
        if function is gpu.gpu_rates:
            return {"tflops": {"fp32": 50, "fp16": 500, "bf16": 500}, "gb_per_s": 1000}
        return {"operations": 1e11, "bytes_io": 1e6, "weights": 4e7}

    def open_bench(spec: Spec) -> FakeBench:
        if spec.form == fails:
            raise DsgnnError(f"{spec.form} does not work here")
        ms = 3.6e6 if spec.form == slow else 8.0
        name = f"{spec.form} {spec.precision}"
        return FakeBench(
            clock,
            name,
            ms,
            form=spec.form,
            precision=spec.precision,
            backend="pytorch",
            device="cuda",
        )

    return gpu.fill(
        Spec("deploy", "nano", True, device="cuda"),
        [],
        out,
        (1, 4),
        clock=clock,
        call=call,
        open_bench=open_bench,
        **options,
    )


def test_the_gpu_table_holds_floors_and_reasons(tmp_path: Path) -> None:
    found = gpu_run(tmp_path, Clockwork(), fails="cuda-graph")
    assert results.load(tmp_path / "gpu.json") == found
    rows = gpu_table(found["rows"], found["missing"])[1:]
    table = {(row[0], row[1]): row[2:] for row in rows}
    # 1e11 operations at 50 TFLOP/s take 2 ms, 4e7 weights of 4 bytes at 1 TB/s take 0.16 ms
    assert re.fullmatch(r"8\.\d* ÷ 2", table["PyTorch deploy graph", "fp32"][0])
    assert table["PyTorch deploy graph", "fp32"][1] == "never measured"  # batch 2
    assert re.fullmatch(r"32\.\d* ÷ 8", table["PyTorch deploy graph", "fp32"][2])
    assert table["PyTorch CUDA graph", "bf16"][0] == "cuda-graph does not work here"
    assert ("TensorRT", "fp16") not in table and "; TensorRT (fp32, fp16, bf16)" in never_measured(
        gpu_table(found["rows"], found["missing"])
    )


def test_every_gpu_has_a_table_that_names_it_and_its_warnings(tmp_path: Path) -> None:
    files = []
    for name in ("NVIDIA L4", "NVIDIA H200"):
        found = gpu_run(tmp_path / name, Clockwork(), fails="cuda-graph")
        found["environment"]["gpus"] = [{"name": name}]
        for row in found["rows"]:
            row["subject"]["status"] = "unverified"
        kept = {k: v for k, v in found.items() if k not in ("schema", "created")}
        results.save(tmp_path / name / "gpu.json", **kept)
        files.append(tmp_path / name / "gpu.json")
    text = report(files, tmp_path / "r.html", None)
    assert re.findall(r"^\*\*(.*)\.\*\* Inference p50", text, re.M) == [
        "nano on NVIDIA L4",
        "nano on NVIDIA H200",
    ]
    assert (
        len(re.findall(r"^\| PyTorch deploy graph \| fp16 .* \| UNVERIFIED \|$", text, re.M)) == 2
    )
    assert (
        "never been" not in text and "nano on NVIDIA H200</h2>" in (tmp_path / "r.html").read_text()
    )


def test_answers_are_compared_on_the_gpu_and_told() -> None:
    """One form agrees, one has another order, and one cannot answer."""
    about = open_artifact(BUNDLED).description

    def answers(images: np.ndarray, sign: int = 1) -> dict[str, np.ndarray]:
        B, Q = len(images), about.queries
        masks = np.ones((B, Q, 60, 80), np.float32)
        saliency = np.tile(sign * np.arange(Q, dtype=np.float32), (B, 1))
        score = np.full((B, Q), 0.9, np.float32)
        return {"saliency": saliency, "score": score, "masks": masks}

    def broken(images: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("out of memory")

    asked: list[int] = []

    def reference(images: np.ndarray) -> dict[str, np.ndarray]:
        asked.append(len(images))
        return answers(images)

    forms = {"good": answers, "upside down": lambda images: answers(images, -1), "full": broken}
    benches = {
        name: SimpleNamespace(facts={"name": name, "precision": "fp32"}, answers=form)
        for name, form in forms.items()
    }
    photos = [np.full((480, 640, 3), level, np.uint8) for level in (10, 200)]
    found = gpu.check_answers(benches, gpu.Remembered(reference), about, photos)
    assert [(one["name"], one["passed"]) for one in found] == [
        ("good", True),
        ("good", True),
        ("upside down", False),
        ("upside down", False),
        ("full", False),
    ]
    assert asked == [1, 1, 3]  # not once more for each form
    text = answers_text(found)
    assert "upside down: saliency differs" in text and "full: out of memory" in text
    assert "good" not in text and answers_text(found[:2]).endswith("all agree.")


def test_the_gpu_table_stops_in_time(tmp_path: Path) -> None:
    found = gpu_run(tmp_path, Clockwork(), slow="deploy")
    assert found["rows"] == [] or {row["batch"] for row in found["rows"]} == {1}
    whys = {missing["why"] for missing in found["missing"]}
    assert "not reached within 540 s" in whys


def test_floors_are_the_larger_of_two() -> None:
    rates = {"tflops": {"fp16": 100.0}, "gb_per_s": 1000.0}
    work = {"operations": 2e11, "bytes_io": 1e6, "weights": 5e9}
    few, many = (limits.floor(work, rates, "fp16", batch) for batch in (1, 8))
    assert few["ms"] == few["bytes_ms"] == pytest.approx(10.001)
    assert many["ms"] == many["operations_ms"] == pytest.approx(16)


def test_weights_in_sixteen_bits_are_computed_in_float32() -> None:
    rates = {"tflops": {"fp32": 50.0}, "gb_per_s": 1000.0}
    work = {"operations": 1e11, "bytes_io": 0.0, "weights": 4e7}
    full, half = (limits.floor(work, rates, precision, 1) for precision in ("fp32", "w16"))
    assert half["operations_ms"] == full["operations_ms"] == pytest.approx(2)
    assert half["bytes_ms"] == full["bytes_ms"] / 2 == pytest.approx(0.08)


def test_artifacts_run_on_the_engines_that_take_them(tmp_path: Path) -> None:
    """By the kind of file, in the precision of the file."""
    inside = open_artifact(BUNDLED).description

    def engine(flavour: str, precision: str) -> Path:
        path = tmp_path / f"{flavour}-{precision}.engine"
        path.write_bytes(flavour.encode())
        facts = replace(inside, precision=precision)
        about = Sidecar(
            path.name, sha256_of(path), True, build={"flavour": flavour}, description=facts
        )
        write_sidecar(path, about)
        return path

    def found(path: Path) -> list[tuple[str, str]]:
        specs = gpu.gpu_specs(Spec("deploy", "nano", True, device="cuda"), [path])
        return [(s.backend, s.precision) for s in specs if s.form == "artifact"]

    kept = inside.precision
    assert found(BUNDLED) == [("onnxruntime", kept), ("onnxruntime-tensorrt", kept)]
    assert found(engine("tensorrt", "fp16")) == [
        ("tensorrt", "fp16"),
        ("tensorrt-cuda-graph", "fp16"),
    ]
    assert found(engine("tensorrt-rtx", "bf16")) == [
        ("tensorrt-rtx", "bf16"),
        ("tensorrt-rtx-cuda-graph", "bf16"),
    ]
    with pytest.raises(DsgnnError, match=r"-int8.engine is int8, expected one of fp32, w16"):
        found(engine("tensorrt", "int8"))


def test_a_precision_beyond_the_table_gets_a_row(tmp_path: Path) -> None:
    found = gpu_run(tmp_path, Clockwork())
    (first, *_) = found["rows"]
    first["subject"] |= {"form": "artifact", "backend": "onnxruntime", "precision": "w16"}
    rows = gpu_table(found["rows"], found["missing"])[1:]
    table = {(row[0], row[1]): row[2:] for row in rows}
    assert len(table) == 13 and " ÷ " in table["ONNX Runtime CUDA", "w16"][0]


def test_work_is_counted_on_the_deploy_graph() -> None:
    work = limits.count_work(Spec("deploy", "nano", True, size=(64, 64)))
    double = limits.count_work(Spec("deploy", "nano", True, size=(64, 128)))
    Q = CONFIGS["nano"].queries
    assert work["bytes_io"] == 64 * 64 * 3 + 4 * (Q + Q + Q * 16 * 16 + 8 * 8)
    assert 1.8 < double["operations"] / work["operations"] < 2.2
    assert 1e6 < work["weights"] < 2e7


def test_the_commands_refuse_with_status_two(tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        done = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2, done.output
        return re.sub(r"\s+", " ", done.output)

    assert "give a MODEL file or --synthetic" in said("latency")
    nano = ("latency", "--synthetic", "nano")
    forms = specs([], ["nano"], DEFAULT_FORMS["cuda"], (), device="cuda")  # nothing to refuse
    assert [spec.form for spec in forms] == ["upstream", "deploy", "compiled"]
    assert "a backend is for exported" in said(*nano, "--backend", "openvino")
    assert "'none-such' is not one of 'onnxruntime'" in said(*nano, "--backend", "none-such")
    assert "CUDA graphs need a GPU" in said(*nano, "--cuda-graph")
    assert "timed on the CPU" in said(*nano, "--device", "cuda", "--form", "straightforward")
    for wrong in ("0,1", "²"):
        assert "batch sizes such as" in said(*nano, "--batch", wrong)
    for wrong in ("0x0", "²x³"):
        assert f"32, got {wrong}" in said(*nano, "--size", wrong)
    assert "either --against or" in said(
        "accuracy", "m.onnx", "--data", "x", "--against", __file__, "--against-synthetic", "nano"
    )
    assert not (tmp_path / "out").exists()


def test_compare_and_report_from_the_command_line(files: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["report", *map(str, files), "-o", str(page)])
    assert done.exit_code == 0 and "| fast |" in done.output and page.exists()
    done = CliRunner().invoke(main, ["compare", str(files[0]), "--baseline", "fast"])
    assert done.exit_code == 0 and re.search(r"up: (3\.9|4\.0)", done.output)
    done = CliRunner().invoke(main, ["compare", str(files[1])])
    assert done.exit_code == 2 and "these are of accuracy" in done.output
