"""Results as tables of text, and what must be known before a row is quoted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

import numpy as np

from dsgnn.benchmarks import timing
from dsgnn.benchmarks.gpu import BATCHES, ROWS, engine
from dsgnn.benchmarks.latency import baseline
from dsgnn.benchmarks.report.plots import brief
from dsgnn.runtime.errors import DataError

Results = Mapping[str, Any]
Table = list[list[str]]  # the first row is the heading
HEADING = [
    "artifact",
    "precision",
    "batch",
    "inference p50 ms",
    "p99 ms",
    "time ÷ baseline (95%)",
    "of peak",
    "photos/s",
    "memory MiB",
    "size MB",
    "SA-SOR",
    "Δ PyTorch",
    "parity",
    "notes",
]
NEVER = "never measured"
FEW = 100  # samples; below, p99 is close to the largest


def run_table(results: Results, measured: Sequence[Mapping[str, Any]]) -> Table:
    """One latency run, each row with the accuracy that was measured on the same bytes."""
    table = [HEADING]
    for row in results["rows"]:
        same = [r for r in results["rows"] if r["batch"] == row["batch"]]
        base = next(r for r in same if r["subject"]["name"] == baseline(same))
        times, subject = timing.summarise(timing.inference(row["samples"])), row["subject"]
        found = accuracy_of(subject, measured)
        own, others = timing.medians(row["samples"]), timing.medians(base["samples"])
        ratio = "1" if row is base else str(timing.ratio(others, own, paired=True))
        sa_sor = found["figures"]["sa_sor"] if found else None
        reference = found["reference"]["sa_sor"] if found and found["reference"] else None
        change = None if sa_sor is None or reference is None else sa_sor - reference
        table.append(
            [
                subject["name"],
                precision_text(subject),
                str(row["batch"]),
                brief(times["p50"]),
                brief(times["p99"]) + ("*" if times["n"] < FEW else ""),
                ratio,
                "–" if row["floor"] is None else f"{row['floor']['ms'] / times['p50']:.0%}",
                brief(row["images_per_s"]),
                memory_text(row["memory"]),
                "–" if subject["bytes"] is None else f"{subject['bytes'] / 1e6:.1f}",
                "–" if sa_sor is None else f"{sa_sor:.3f}",
                "–" if change is None else f"{change:+.4f}",
                parity_text(found),
                ", ".join(notes(row)) or "–",
            ]
        )
    peaks = HEADING.index("of peak")
    if all(row[peaks] == "–" for row in table[1:]):  # as in results of before it was measured
        table = [row[:peaks] + row[peaks + 1 :] for row in table]
    return table


def accuracy_of(
    subject: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The accuracy row of a timed subject. DataError when only another file of its name was
    measured."""
    keys = ("form", "file", "config", "backend", "precision")
    rows = [row for row in measured if all(row["subject"][k] == subject[k] for k in keys)]
    equal = [row for row in rows if row["subject"]["sha256"] == subject["sha256"]]
    if rows and not equal:
        raise DataError(
            f"{subject['name']} was timed as {subject['sha256'][:12]}… and its accuracy measured "
            f"on {rows[0]['subject']['sha256'][:12]}…: measure both on the same file again"
        )
    return equal[0] if equal else None


def precision_text(subject: Mapping[str, Any]) -> str:
    """What it computes in: of the file, but for a backend that rounds."""
    own = subject["precision"]
    if not subject["backend"].endswith("-bf16"):
        return own
    return "int8 and bf16" if own == "int8" else "bf16"


def parity_text(row: Mapping[str, Any] | None) -> str:
    if row is None or not row["parity"]:
        return "–"
    passed = all(check["passed"] for check in row["parity"])
    iou = min(check["iou_mean"] for check in row["parity"])
    return f"{'passed' if passed else 'FAILED'}, mask IoU {iou:.4f} ({row['parity_from']})"


def memory_text(memory: Mapping[str, Any]) -> str:
    host, device = memory["host_mib"], memory["device_mib"]
    text = "–" if host is None else brief(host)
    return text if device is None else f"{text} + {brief(device)} on the GPU"


def notes(row: Mapping[str, Any]) -> list[str]:
    """What a reader must know before quoting a row."""
    subject, found = row["subject"], []
    if subject["weights"] == "synthetic":
        found.append("random weights")
    if subject["status"] == "unverified":
        found.append("UNVERIFIED")
    if not row["stationary"]:
        found.append(f"drifts by {row['drift']:+.0%}")
    if row["memory"]["since_load"]:
        found.append("memory includes loading")
    return found


def caveats(table: Table) -> list[str]:
    """What a reader must know before quoting the rows of `run_table`: each caveat once, with the
    rows that it is about, the worst first."""
    names: dict[str, dict[str, None]] = {}
    for row in table[1:]:
        cells = dict(zip(table[0], row, strict=True))
        said = [] if cells["notes"] == "–" else cells["notes"].split(", ")
        if cells["parity"].startswith("FAILED"):
            said.insert(0, "FAILED the comparison with its network")
        for caveat in said:
            names.setdefault(caveat, {})[cells["artifact"]] = None
    all_rows = {row[0] for row in table[1:]}
    return [
        f"{caveat}: {'every row' if set(rows) == all_rows else ', '.join(rows)}"
        for caveat, rows in sorted(names.items(), key=lambda entry: _severity(entry[0]))
    ]


def _severity(caveat: str) -> int:
    """Where a caveat stands among others: what makes a row worthless comes first."""
    worst = ("FAILED", "UNVERIFIED", "random weights")
    return next((place for place, word in enumerate(worst) if word in caveat), len(worst))


def gpu_table(rows: Sequence[Mapping[str, Any]], missing: Sequence[Mapping[str, Any]]) -> Table:
    """Every engine of which something was measured; its notes say why the rest was not."""
    table = [["engine", "precision", *(f"batch {batch}" for batch in BATCHES), "notes"]]
    cells: dict[tuple[str, str, int], str] = {}
    said: dict[tuple[str, str], dict[str, None]] = {}
    for one in missing:
        cells[one["name"], one["precision"], one["batch"]] = "–"
        said.setdefault((one["name"], one["precision"]), {})[f"–: {_reason(one)}"] = None
    for row in rows:
        who = engine(row["subject"]), row["subject"]["precision"]
        p50, floor = np.median(timing.inference(row["samples"])), row["floor"]["ms"]
        cells[*who, row["batch"]] = f"{brief(p50)} ÷ {brief(floor)}"
        for note in notes(row):
            where = f" (batch {row['batch']})" if note.startswith("drifts") else ""
            said.setdefault(who, {})[note + where] = None
    measured = {(engine(row["subject"]), row["subject"]["precision"]) for row in rows}
    for name, precisions in ROWS.items():
        for precision in dict.fromkeys((*precisions, *(p for who, p in measured if who == name))):
            if (name, precision) in measured:
                line = [cells.get((name, precision, batch), NEVER) for batch in BATCHES]
                notes_of = "; ".join(said.get((name, precision), {})) or "–"
                table.append([name, precision, *line, notes_of])
    return table


def never_measured(table: Table, missing: Sequence[Mapping[str, Any]]) -> str:
    """One line for all the rows that a GPU table should have and has not, with the reasons that are
    known."""
    there = {(row[0], row[1]) for row in table[1:]}
    reasons = {(one["name"], one["precision"]): f": {_reason(one)}" for one in missing}
    said = []
    for name, precisions in ROWS.items():
        known = dict.fromkeys((*precisions, *(of for who, of in reasons if who == name)))
        left = [precision for precision in known if (name, precision) not in there]
        for why in dict.fromkeys(reasons.get((name, precision), "") for precision in left):
            of = [precision for precision in left if reasons.get((name, precision), "") == why]
            said.append(f"{name} ({', '.join(of)}{why})")
    return f"Never measured: {'; '.join(said)}." if said else ""


def _reason(missing: Mapping[str, Any]) -> str:
    return shorten(missing["why"], 120, placeholder=" …")


def markdown(table: Table) -> str:
    rows = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)
