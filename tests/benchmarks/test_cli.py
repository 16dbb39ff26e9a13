"""`dsgnn-bench`: what its commands refuse, and results reported and compared."""

import re
from pathlib import Path

from click.testing import CliRunner

from dsgnn.benchmarks.cli import main
from dsgnn.benchmarks.forms import DEFAULT_FORMS, specs


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
