"""`dsgnn-bench report` and `compare`: results as one page, as Markdown, and against each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dsgnn.benchmarks import plots, scaling, timing
from dsgnn.benchmarks.gpu import BATCHES, ROWS, engine
from dsgnn.benchmarks.latency import baseline
from dsgnn.benchmarks.plots import brief
from dsgnn.benchmarks.results import load
from dsgnn.benchmarks.timing import END_TO_END, NOISE, STAGES
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.errors import DataError, OptionError

Results = Mapping[str, Any]
Table = list[list[str]]  # the first row is the heading
HEADING = [
    "artifact",
    "precision",
    "batch",
    "inference p50 ms",
    "p99 ms",
    "time ÷ baseline (95%)",
    "photos/s",
    "memory MiB",
    "size MB",
    "SA-SOR",
    "Δ PyTorch",
    "parity",
    "notes",
]
NEVER = "never measured"
NO_GPU = "On a GPU nothing has been measured; `dsgnn-bench gpu` fills that table."
MARKS = ("<!-- bench -->", "<!-- /bench -->")
FEW = 100  # samples; below, p99 is close to the largest
FOOTNOTE = (
    "From a 640×480 JPEG to ranks; photos/s is end to end, one after the other; inference is the "
    "network alone, with the transfers of a GPU. Models are interleaved in one run, the baseline "
    "is the first PyTorch as upstream, otherwise the first row; the intervals are of that run, and "
    "`dsgnn-bench compare` tells how far another one lies. Memory is the process's peak while "
    "running. p99* is of fewer than 100 runs and close to the largest. w16 is float32 on weights "
    "stored in sixteen bits. Accuracy counts all queries of an image where none is kept, as "
    "published: that makes more false objects."
)
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1300px;margin:2em auto;padding:0 1em;
color:#222;background:#fff}table{border-collapse:collapse;margin:1em 0;display:block;overflow:auto;
font-size:13px}td,th{padding:.25em .5em;border-bottom:1px solid #ccc;text-align:right}
th{vertical-align:bottom}td{white-space:nowrap}
td:first-child,th:first-child,td:last-child,th:last-child{text-align:left}
td:first-child,td:nth-last-child(-n+2){white-space:normal;min-width:7em}svg{width:100%;height:auto}
.bad{color:#a00;font-weight:600}pre{overflow:auto;font-size:12px}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}.bad{color:#f88}
td,th{border-color:#444}}
"""


def report(files: Sequence[Path], html: Path | None, readme: Path | None) -> str:
    """Write the page and the README's table; returns the report as Markdown.

    readme: a file whose text between <!-- bench --> and <!-- /bench --> is replaced. Raises
    DataError where latency and accuracy are of different files under one name.
    """
    loaded = [load(path) for path in files]
    timed = [results for results in loaded if results["kind"] == "latency"]
    accuracies = [results for results in loaded if results["kind"] == "accuracy"]
    measured = [row for results in accuracies for row in results["rows"]]
    tables = [run_table(results, measured) for results in timed]
    on_gpu = [results for results in loaded if results["kind"] == "gpu"]
    lines: list[str] = []
    for results, table in zip(timed, tables, strict=True):
        lines += [f"**{_title(results)}.** {_about(results)}", ""]
        warnings = [*too_noisy(results), *caveats(table)]
        lines += [*(f"- {warning}" for warning in warnings), "", markdown(table), ""]
    lines.append(FOOTNOTE)
    for results in accuracies:
        lines += ["", f"**Accuracy.** {_where(results)}", ""]
        lines += [f"- {line}" for line in _accuracy_lines(results)]
    scaled = [results for results in loaded if results["kind"] == "scaling"]
    for results in scaled:
        lines += ["", f"**Ray.** {_about_scaling(results)}", "", markdown(scaling.table(results))]
    for (title, about, table), results in zip(_on_gpu(on_gpu), on_gpu, strict=True):
        warnings = [f"- {warning}" for warning in too_noisy(results)]
        lines += ["", f"**{title}.** {about}", "", *warnings, *([""] if warnings else [])]
        lines.append(markdown(table))
    text = "\n".join(lines if on_gpu else [*lines, "", NO_GPU]) + "\n"
    if html is not None:
        write_whole(html, page(timed, tables, accuracies, scaled, on_gpu, loaded).encode())
        write_whole(html.with_suffix(".md"), text.encode())
    if readme is not None:
        replace_between(readme, text)
    return text


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
                brief(row["images_per_s"]),
                memory_text(row["memory"]),
                "–" if subject["bytes"] is None else f"{subject['bytes'] / 1e6:.1f}",
                "–" if sa_sor is None else f"{sa_sor:.3f}",
                "–" if change is None else f"{change:+.4f}",
                parity_text(found),
                ", ".join(notes(row)) or "–",
            ]
        )
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


def milliseconds(results: Results) -> str:
    """Milliseconds of inference of every row of a latency run, for a person."""
    lines = ["inference in milliseconds, p50 and p99:"]
    for row in results["rows"]:
        times = timing.summarise(timing.inference(row["samples"]))
        name = f"batch {row['batch']}  {row['subject']['name']}"
        lines.append(f"{name}: {brief(times['p50'])} ms, {brief(times['p99'])} ms")
    return "\n".join(lines)


def gpu_table(rows: Sequence[Mapping[str, Any]], missing: Sequence[Mapping[str, Any]]) -> Table:
    """Every row of which something was measured or tried; what was not says so, or why."""
    table = [["engine", "precision", *(f"batch {batch}" for batch in BATCHES), "notes"]]
    cells = {(one["name"], one["precision"], one["batch"]): one["why"] for one in missing}
    said: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        who = engine(row["subject"]), row["subject"]["precision"]
        p50, floor = np.median(timing.inference(row["samples"])), row["floor"]["ms"]
        cells[*who, row["batch"]] = f"{brief(p50)} ÷ {brief(floor)}"
        said.setdefault(who, {}).update(dict.fromkeys(notes(row)))
    for name, precisions in ROWS.items():
        for precision in dict.fromkeys((*precisions, *(p for who, p, _ in cells if who == name))):
            if any((who, of) == (name, precision) for who, of, _ in cells):
                line = [cells.get((name, precision, batch), NEVER) for batch in BATCHES]
                notes_of = ", ".join(said.get((name, precision), {})) or "–"
                table.append([name, precision, *line, notes_of])
    return table


def never_measured(table: Table) -> str:
    """One line for all the rows that a GPU table should have and has not."""
    there = {(row[0], row[1]) for row in table[1:]}
    left = {
        name: [precision for precision in precisions if (name, precision) not in there]
        for name, precisions in ROWS.items()
    }
    said = [f"{name} ({', '.join(precisions)})" for name, precisions in left.items() if precisions]
    return f"Never measured: {'; '.join(said)}." if said else ""


def answers_text(parity: Sequence[Mapping[str, Any]]) -> str:
    """Whose answers were not those of the CPU, as " A sentence.", or nothing without comparison."""
    if not parity:
        return ""
    photos = min(one["photos"] for one in parity if "photos" in one)
    failed = {one["name"]: one["failures"][0] for one in reversed(parity) if one["failures"]}
    said = "; ".join(f"{name}: {why}" for name, why in reversed(failed.items()))
    verdict = f"FAILED for {said}" if failed else "all agree"
    return f" Answers compared with float32 on the CPU on {photos} photos: {verdict}."


def _on_gpu(runs: Sequence[Results]) -> list[tuple[str, str, Table]]:
    """Title, circumstances and table of every GPU run."""
    found = []
    for results in runs:
        name = ", ".join(gpu["name"] for gpu in results["environment"]["gpus"]) or "a GPU"
        about = "Inference p50 ms, transfers included, ÷ its floor. "
        about += _about(results) if results["rows"] else _where(results)
        about += answers_text(results["parity"])
        table = gpu_table(results["rows"], results["missing"])
        title = f"{_title(results)} on {name}".lstrip()
        found.append((title, f"{about} {never_measured(table)}".rstrip(), table))
    return found


def page(
    timed: Sequence[Results],
    tables: Sequence[Table],
    accuracies: Sequence[Results],
    scaled: Sequence[Results],
    on_gpu: Sequence[Results],
    loaded: Sequence[Results],
) -> str:
    """One self-contained HTML page: no script, and no request to anywhere."""
    measured = [row for results in accuracies for row in results["rows"]]
    body = ["<h1>dsgnn: latency and accuracy</h1>"]
    for results, table in zip(timed, tables, strict=True):
        body += [f"<h2>{escape(_title(results))}</h2>", f"<p>{escape(_about(results))}</p>"]
        body.append(_warnings([*too_noisy(results), *caveats(table)]))
        body.append(_html(table))
        for batch in sorted({row["batch"] for row in results["rows"]}):
            rows = {r["subject"]["name"]: r for r in results["rows"] if r["batch"] == batch}
            stages = {
                name: {s: row["stages"][s]["p50"] for s in STAGES if s in row["stages"]}
                for name, row in rows.items()
            }
            times = {name: row["samples"][END_TO_END] for name, row in rows.items()}
            body += [f"<h3>batch {batch}: stages, p50</h3>", plots.stage_bars(stages)]
            body += [f"<h3>batch {batch}: end to end</h3>", plots.distributions(times)]
    body.append(f"<p>{escape(FOOTNOTE)}</p>")
    points = [
        (row["subject"]["name"], row["stages"][END_TO_END]["p50"], found["figures"]["sa_sor"])
        for results in timed
        for row in results["rows"]
        if row["batch"] == 1
        and (found := accuracy_of(row["subject"], measured))
        and found["figures"]["sa_sor"] is not None
    ]
    if points:
        body += [
            "<h2>Accuracy against latency</h2>",
            plots.scatter(points, "end to end p50 ms, batch 1", "SA-SOR"),
        ]
    for results in accuracies:
        body.append(f"<p>Accuracy: {escape(_where(results))}</p>")
        body += [f"<p>{escape(line)}</p>" for line in _accuracy_lines(results)]
    for results in scaled:
        body += [
            f"<h2>Ray</h2><p>{escape(_about_scaling(results))}</p>",
            _html(scaling.table(results)),
        ]
    for (title, about, table), results in zip(_on_gpu(on_gpu), on_gpu, strict=True):
        body += [f"<h2>{escape(title)}</h2><p>{escape(about)}</p>"]
        body += [_warnings(too_noisy(results)), _html(table)]
    if not on_gpu:
        body.append(f"<p>{escape(NO_GPU)}</p>")
    body.append("<h2>Environment</h2>")
    for results in loaded:
        facts = {k: results[k] for k in ("kind", "created", "seed", "environment")}
        facts |= {k: results[k] for k in ("plan", "conditions", "rates") if k in results}
        text = escape(json.dumps(facts, indent=1))
        body.append(
            f"<details><summary>{results['kind']}, {escape(results['created'])}</summary>"
            f"<pre>{text}</pre></details>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>dsgnn benchmarks</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def compare(a: Results, b: Results | None = None, against: str | None = None) -> str:
    """Ratios of one run's models to each other; with a second run, also between the runs.

    against: name of the baseline, by default as in the report. The last line is the verdict: two
    runs agree when every ratio to the baseline is within 5% of the other run's.
    """
    lines, ratios = [], [_ratios(results, against) for results in ([a] if b is None else [a, b])]
    lines += _verdicts("A", a) if b is None else [*_verdicts("A", a), *_verdicts("B", b)]
    if b is None:
        lines += [f"batch {batch}  {name}: {ratio}" for (name, batch), ratio in ratios[0].items()]
        return "\n".join(lines)
    common = [key for key in ratios[0] if key in ratios[1]]
    if not common:
        raise OptionError("the two results have no model at the same batch size in common")
    worst = 0.0
    for name, batch in common:
        of_a, of_b = (_medians(results, name, batch) for results in (a, b))
        between = timing.ratio(of_a, of_b, paired=False)
        first, second = ratios[0][name, batch], ratios[1][name, batch]
        apart = max(first.value, second.value) / min(first.value, second.value) - 1
        worst = max(worst, apart)
        lines.append(
            f"batch {batch}  {name}: time B ÷ A {between}; ÷ baseline: A {first}, B {second}, "
            f"apart {apart:.1%}"
        )
    verdict = "the runs agree" if worst <= NOISE else "the machine was too noisy, or it changed"
    lines.append(f"ratios to the baseline are within {worst:.1%} (limit {NOISE:.0%}): {verdict}")
    return "\n".join(lines)


def _ratios(results: Results, against: str | None) -> dict[tuple[str, int], timing.Ratio]:
    if results["kind"] not in ("latency", "gpu"):
        raise OptionError(f"compare takes latency and gpu results, these are of {results['kind']}")
    found = {}
    for batch in sorted({row["batch"] for row in results["rows"]}):
        same = [row for row in results["rows"] if row["batch"] == batch]
        names = [row["subject"]["name"] for row in same]
        base = against or baseline(same)
        if base not in names:
            raise OptionError(f"no model is called {base!r}; there are {', '.join(names)}")
        for name in names:
            others, own = (_medians(results, who, batch) for who in (base, name))
            found[name, batch] = timing.ratio(others, own, paired=True)
    return found


def _medians(results: Results, name: str, batch: int) -> Any:
    for row in results["rows"]:
        if (row["subject"]["name"], row["batch"]) == (name, batch):
            return timing.medians(row["samples"])
    raise OptionError(f"no row of {name} at batch {batch}")


def _verdicts(label: str, results: Results) -> list[str]:
    return [
        f"run {label}, batch {batch}: {'quiet' if v['quiet'] else 'TOO NOISY'}; {v['why']}"
        for batch, v in results["noise"].items()
    ]


def _title(results: Results) -> str:
    """The networks of a run."""
    return ", ".join(dict.fromkeys(row["subject"]["config"] for row in results["rows"]))


def too_noisy(results: Results) -> list[str]:
    """What stands before all other caveats of a run: that the machine was not quiet, and why."""
    noisy = [v["why"] for v in results["noise"].values() if not v["quiet"]]
    return [f"The machine was too noisy for these figures: {'; '.join(noisy)}."] if noisy else []


def _about(results: Results) -> str:
    """Where and when one latency run was made, and how well its halves agree where they do."""
    threads = ", ".join(sorted({str(row["subject"]["threads"]) for row in results["rows"]}))
    verdict = ""
    if not too_noisy(results):
        worst = max(v["worst"] for v in results["noise"].values())
        verdict = f" Both halves of the run give the same ratios within {worst:.1%}."
    return f"{_where(results)} {threads} threads a model.{verdict}{_stolen(results)}"


def _about_scaling(results: Results) -> str:
    return (
        f"{_where(results)} {results['model']['file']}, {results['rows'][0]['images']} images a "
        "turn; the single process, which writes results.json, has its turns before and after each "
        f"of the others, and the overhead is against those.{_stolen(results)}"
    )


def _where(results: Results) -> str:
    env = results["environment"]
    revision = (env["git"]["revision"] or "unknown")[:10]
    changed = " with changes" if env["git"]["changed"] else ""
    created = results["created"][:10]
    return f"{env['cpu']}, {env['cores']} cores; {created}, revision {revision}{changed}."


def _stolen(results: Results) -> str:
    stolen = results["conditions"]["stolen"]
    return "" if stolen is None else f" The host took {stolen:.1%} of the processor time."


def _accuracy_lines(results: Results) -> list[str]:
    """Each accuracy row in words: every figure with how many it is a mean over."""
    lines = []
    for row in results["rows"]:
        data = row["data"]
        figures = ", ".join(
            f"{name} {value:.3f}" + (f" ({row['used'][name]})" if name in row["used"] else "")
            for name, value in row["figures"].items()
            if value is not None
        )
        lines.append(
            f"{row['subject']['name']} on {data['images']} images of {data['spec']} "
            f"{data['split']}: {figures}."
        )
    return lines


def replace_between(path: Path, text: str) -> None:
    """Put text between the marks of a file. Raises OptionError when it lacks them."""
    content = path.read_text("utf-8")
    before, start, rest = content.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise OptionError(f"{path} lacks a line {MARKS[0]} followed by a line {MARKS[1]}")
    write_whole(path, f"{before}{start}\n{text.strip()}\n{end}{after}".encode())


def markdown(table: Table) -> str:
    rows = [
        ["---"] * len(table[0]) if i == 1 else row
        for i, row in enumerate([table[0], [], *table[1:]])
    ]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)


def _warnings(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="bad">{items}</ul>' if items else ""


def _html(table: Table) -> str:
    def cells(row: list[str], tag: str) -> str:
        worthless = any(cell.startswith("FAILED") or "UNVERIFIED" in cell for cell in row)
        return (
            f"<tr{' class=bad' if worthless else ''}>"
            + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
            + "</tr>"
        )

    return f"<table>{cells(table[0], 'th')}{''.join(cells(row, 'td') for row in table[1:])}</table>"
