"""`dsgnn-bench accuracy`: how good the very files are that were timed, and how equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsgnn.benchmarks.environment import environment
from dsgnn.benchmarks.forms import ARTIFACT, ArtifactSubject, Spec, TorchSubject, read
from dsgnn.benchmarks.results import SUBJECT, load, save
from dsgnn.data import open_data
from dsgnn.data.records import palette_of
from dsgnn.evaluation.loop import measure
from dsgnn.evaluation.rankers import model_ranker
from dsgnn.metrics import summarise
from dsgnn.runtime.errors import ArtifactError, OptionError
from dsgnn.runtime.letterbox import Rule
from dsgnn.teacher.looks import looks_of

if TYPE_CHECKING:
    from dsgnn.export.onnx import ExportSource

FILE = "accuracy.json"
PROTOCOL = "dsgnn"
FIGURES = ("sa_sor", "sor", "mae", "recall", "matched_iou", "f_measure", "false_objects")
Figures = tuple[dict[str, float | None], dict[str, int]]  # values, and what each is a mean over


def accuracy(
    specs: Sequence[Spec],
    data: str,
    split: str,
    out: Path,
    *,
    teacher: Path | None = None,
    against: Spec | None = None,
    resume: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure every subject on one split and write out/accuracy.json after each.

    teacher: what ranks the objects of data without ranks, see `dsgnn.teacher.looks.looks_of`.
    against: the checkpoint (or random weights) artifacts were exported from; it is measured with
    each artifact's own letterbox and compared answer by answer on the sample photos. Raises
    ArtifactError when an artifact is unverified, or not an export of `against`, and OptionError
    when `out` holds other results.
    """
    target = out / FILE
    rows: list[dict[str, Any]] = []
    if target.exists():
        if not resume:
            raise OptionError(f"{target} exists: resume it, or give another folder")
        rows = load(target)["rows"]
        if any((r["data"]["spec"], r["data"]["split"]) != (data, split) for r in rows):
            raise OptionError(f"{target} is about other data: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    source = read(against)[0] if against else None
    samples = open_data(data, split, looks_of(teacher, out / "looks") if teacher else None)
    palette = palette_of(samples)

    def figures(rank: Callable[..., Any]) -> Figures:
        images = measure(rank, samples, protocol=PROTOCOL, palette=palette, progress=progress)
        found = summarise(images, PROTOCOL, palette)
        used = {name: found["used"][name] for name in FIGURES if name in found["used"]}
        return {name: found[name] for name in FIGURES}, used

    references: dict[Rule, Figures] = {}
    results: dict[str, Any] = {}
    for spec in specs:
        facts, rank, rule, parity, parity_from = _open(spec, source)
        subject = {name: facts[name] for name in SUBJECT}
        known = {(row["subject"]["name"], row["subject"]["sha256"]) for row in rows}
        if (subject["name"], subject["sha256"]) not in known:
            if source is not None and spec.form == ARTIFACT and rule not in references:
                references[rule] = figures(model_ranker(source.model, rule))
            values, used = figures(rank)
            reference = references.get(rule)
            rows.append(
                {
                    "subject": subject,
                    "data": {
                        "spec": data,
                        "split": split,
                        "images": len(samples),
                        "protocol": PROTOCOL,
                    },
                    "figures": values,
                    "used": used,
                    "reference": reference[0] if reference and spec.form == ARTIFACT else None,
                    "parity": parity,
                    "parity_from": parity_from,
                }
            )
        results = save(target, "accuracy", environment(), seed=0, rows=rows)
    return results


def _open(
    spec: Spec, source: ExportSource | None
) -> tuple[dict[str, Any], Callable[..., Any], Rule, list[Mapping[str, Any]], str | None]:
    """Facts, what ranks a sample, the letterbox, and parity with where that was found out."""
    if spec.form != ARTIFACT:
        opened = TorchSubject(spec)
        return opened.facts, model_ranker(opened.source.model, opened.rule), opened.rule, [], None
    artifact = ArtifactSubject(spec)
    ranker, description = artifact.ranker, artifact.ranker.artifact.description
    parity: list[Mapping[str, Any]] = []
    where = None
    if source is not None:
        from dsgnn.export.onnx import backend_infer, torch_infer
        from dsgnn.export.parity.comparison import gate, parity_photos

        if description.source_sha256 != source.sha256:
            raise ArtifactError(
                f"{spec.model} was exported from {description.source_sha256[:12]}…, and the "
                f"reference is {source.sha256[:12]}…: give the checkpoint it was made "
                "from, or export it again"
            )
        build = ranker.artifact.sidecar.build if ranker.artifact.sidecar else {}
        found = gate(
            torch_infer(source.model),
            backend_infer(ranker.backend),
            parity_photos(),
            description,
            build,
        )
        parity, where = [result.to_dict() for result in found], "here"
    elif ranker.artifact.sidecar is not None:
        parity, where = list(ranker.artifact.sidecar.parity), "sidecar"
    return artifact.facts, lambda sample: ranker(sample.image), artifact.rule, parity, where
