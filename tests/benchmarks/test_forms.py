"""Every form of one network gives the same answers: they are timed on the same work."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dsgnn.benchmarks.cli import main
from dsgnn.benchmarks.forms import Spec, open_subject
from dsgnn.benchmarks.results import load
from dsgnn.runtime.errors import DsgnnError
from dsgnn.runtime.ranker import BUNDLED

from .fakes import Clockwork

SIZE = (64, 96)


def test_pytorch_forms_give_the_same_answers() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    answers = {}
    for form, precision in (("upstream", "fp32"), ("deploy", "fp32"), ("deploy", "bf16")):
        spec = Spec(form, "nano", True, size=SIZE, precision=precision, threads=1)
        subject = open_subject(spec)
        answers[form, precision], stages = subject.infer(images, Clockwork())
        assert stages.keys() == {"compute"} and subject.facts["form"] == form
    for name, expected in answers["upstream", "fp32"].items():
        np.testing.assert_allclose(answers["deploy", "fp32"][name], expected, atol=1e-3, rtol=1e-3)
        half = answers["deploy", "bf16"][name]
        assert half.dtype == np.float32 and np.isfinite(half).all()


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DsgnnError, match=r"install g\+\+, or leave it out"):
        open_subject(Spec("compiled", "nano", True))


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    arguments = [
        "latency",
        "--synthetic",
        "nano",
        str(BUNDLED),
        "--size",
        "64x96",
        "--duration",
        "0.1",
        "--runs",
        "2",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    found = load(tmp_path / "latency.json")
    forms = [row["subject"]["form"] for row in found["rows"]]
    assert forms == ["upstream", "deploy", "compiled", "straightforward", "artifact"]
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]
