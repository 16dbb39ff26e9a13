"""Results as a page, as the README's table, in plots and sentences, and against each other."""

import re
from pathlib import Path

import pytest

from dsgnn.benchmarks import results
from dsgnn.benchmarks.forms import Spec
from dsgnn.benchmarks.latency import latency
from dsgnn.benchmarks.report import plots
from dsgnn.benchmarks.report.compare import compare
from dsgnn.benchmarks.report.page import replace_between, report
from dsgnn.benchmarks.report.tables import caveats, gpu_table, never_measured
from dsgnn.benchmarks.report.words import milliseconds
from dsgnn.runtime.errors import DsgnnError

from .fakes import PLAN, Clockwork, FakeBench, measured, save_again, timed


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


def test_accuracy_of_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    files = [timed(tmp_path, up=40.0, fast=10.0), measured(tmp_path, sha256="another")]
    with pytest.raises(DsgnnError, match=r"timed as fast-hash.*measured on another.*same file"):
        report(files, None, None)


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


def test_when_a_run_was_made_cannot_become_markup(files: list[Path], tmp_path: Path) -> None:
    content = files[0].read_text()
    files[0].write_text(re.sub(r'"created": "[^"]*"', '"created": "<b>2026-01-01"', content))
    report(files, tmp_path / "r.html", None)
    page = (tmp_path / "r.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;2026-01-01" in page


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


def test_caveats_stand_before_the_table(files: list[Path], tmp_path: Path) -> None:
    loaded = results.load(files[0])
    loaded["rows"][1]["subject"]["status"] = "unverified"
    save_again(files[0], loaded)
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


def test_unverified_drifting_and_noisy_results_say_so(files: list[Path], tmp_path: Path) -> None:
    loaded = results.load(files[0])
    row = loaded["rows"][1]
    row["subject"]["status"] = "unverified"
    row["stationary"], row["drift"] = False, 0.2
    loaded["noise"]["1"] = {"quiet": False, "worst": 0.3, "why": "fast: differs by 30%"}
    save_again(files[0], loaded)
    text = report(files, tmp_path / "r.html", None)
    assert "UNVERIFIED, drifts by +20%" in text
    noisy = "The machine was too noisy for these figures: fast: differs by 30%."
    assert f"\n\n- {noisy}\n- UNVERIFIED: fast\n" in text  # the first caveat, and said once
    assert text.count("too noisy") == 1 and "Both halves" not in text
    assert f'<ul class="bad"><li>{noisy}</li>' in (tmp_path / "r.html").read_text()


def test_a_caveat_of_all_rows_is_said_once() -> None:
    heading = ["artifact", "parity", "notes"]
    rows = [["a", "–", "random weights"], ["b", "FAILED, mask IoU 0.9", "random weights, drifts"]]
    assert caveats([heading, *rows]) == [
        "FAILED the comparison with its network: b",
        "random weights: every row",
        "drifts: b",
    ]


def test_gpu_rows_that_were_never_measured_are_one_line() -> None:
    table = gpu_table([], [])
    assert len(table) == 1
    said = never_measured(table, [])
    assert said.startswith("Never measured: PyTorch as upstream (fp32, fp16, bf16); PyTorch deploy")
    assert said.count("(fp32, fp16, bf16)") == 10 and "TensorRT-RTX, CUDA graph" in said


def test_a_run_ends_with_milliseconds(files: list[Path]) -> None:
    lines = milliseconds(results.load(files[0])).splitlines()
    assert re.fullmatch(r"batch 1  up: 40\.\d ms, 4[01](\.\d)? ms", lines[1]), lines
    assert re.fullmatch(r"batch 1  fast: 10\.\d ms, 10\.\d ms", lines[2]), lines


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
