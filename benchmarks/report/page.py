"""`dsgnn-bench report`: results as one self-contained page, and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from dsgnn.benchmarks import scaling
from dsgnn.benchmarks.load import run
from dsgnn.benchmarks.report import plots
from dsgnn.benchmarks.report.tables import Results, Table, accuracy_of, caveats, markdown, run_table
from dsgnn.benchmarks.report.words import (
    about_load,
    about_scaling,
    accuracy_lines,
    circumstances,
    gpu_run,
    networks,
    too_noisy,
    was_busy,
    where,
)
from dsgnn.benchmarks.results import KINDS
from dsgnn.benchmarks.results import load as read
from dsgnn.benchmarks.timing import END_TO_END, STAGES
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.errors import OptionError

NO_GPU = "On a GPU nothing has been measured; `dsgnn-bench gpu` fills that table."
OTHERS = ("scaling", "load", "gpu")  # kinds that are reported after latency and accuracy
MARKS = ("<!-- bench -->", "<!-- /bench -->")
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
    loaded = [read(path) for path in files]
    text = as_markdown(loaded)
    if html is not None:
        write_whole(html, as_page(loaded).encode())
        write_whole(html.with_suffix(".md"), text.encode())
    if readme is not None:
        replace_between(readme, text)
    return text


class Section(NamedTuple):
    """One run as it is reported: what was measured where, what a reader must know, and figures."""

    title: str
    about: str
    warnings: Sequence[str]
    table: Table


def section(results: Results, measured: Sequence[Mapping[str, Any]]) -> Section:
    """The section of a run of any kind but accuracy. measured: the rows of all accuracy runs."""
    if results["kind"] == "latency":
        table = run_table(results, measured)
        warnings = [*too_noisy(results), *caveats(table)]
        return Section(networks(results), circumstances(results), warnings, table)
    if results["kind"] == "scaling":
        return Section("Ray", about_scaling(results), [], scaling.table(results))
    if results["kind"] == "load":
        return Section("Load", about_load(results), was_busy(results), run.table(results))
    title, about, table = gpu_run(results)
    return Section(title, about, too_noisy(results), table)


def as_markdown(loaded: Sequence[Results]) -> str:
    """The report for a README: first what latency runs say, then the other kinds."""
    by_kind, measured = _sorted(loaded)
    lines: list[str] = []
    for results in by_kind["latency"]:
        lines += [_markdown(section(results, measured)), ""]
    lines.append(FOOTNOTE)
    for results in by_kind["accuracy"]:
        lines += ["", f"**Accuracy.** {where(results)}", ""]
        lines += [f"- {line}" for line in accuracy_lines(results)]
    for kind in OTHERS:
        for results in by_kind[kind]:
            lines += ["", _markdown(section(results, measured))]
    return "\n".join(lines if by_kind["gpu"] else [*lines, "", NO_GPU]) + "\n"


def as_page(loaded: Sequence[Results]) -> str:
    """One self-contained HTML page: no script, and no request to anywhere."""
    by_kind, measured = _sorted(loaded)
    body = ["<h1>dsgnn: latency and accuracy</h1>"]
    for results in by_kind["latency"]:
        body.append(_html(section(results, measured)))
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
        for results in by_kind["latency"]
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
    for results in by_kind["accuracy"]:
        body.append(f"<p>Accuracy: {escape(where(results))}</p>")
        body += [f"<p>{escape(line)}</p>" for line in accuracy_lines(results)]
    for kind in OTHERS:
        for results in by_kind[kind]:
            body.append(_html(section(results, measured)))
    if not by_kind["gpu"]:
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


def _sorted(loaded: Sequence[Results]) -> tuple[dict[str, list[Results]], list[Mapping[str, Any]]]:
    """Results by their kind, and the rows of all that measured accuracy."""
    by_kind = {kind: [r for r in loaded if r["kind"] == kind] for kind in KINDS}
    return by_kind, [row for results in by_kind["accuracy"] for row in results["rows"]]


def replace_between(path: Path, text: str) -> None:
    """Put text between the marks of a file. Raises OptionError when it lacks them."""
    content = path.read_text("utf-8")
    before, start, rest = content.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise OptionError(f"{path} lacks a line {MARKS[0]} followed by a line {MARKS[1]}")
    write_whole(path, f"{before}{start}\n{text.strip()}\n{end}{after}".encode())


def _markdown(part: Section) -> str:
    warnings = [f"- {line}" for line in part.warnings]
    head = [f"**{part.title}.** {part.about}", "", *warnings, *([""] if warnings else [])]
    return "\n".join([*head, markdown(part.table)])


def _html(part: Section) -> str:
    head = f"<h2>{escape(part.title)}</h2><p>{escape(part.about)}</p>"
    items = "".join(f"<li>{escape(line)}</li>" for line in part.warnings)
    warnings = f'<ul class="bad">{items}</ul>' if items else ""

    def cells(row: list[str], tag: str) -> str:
        worthless = any(cell.startswith("FAILED") or "UNVERIFIED" in cell for cell in row)
        return (
            f"<tr{' class=bad' if worthless else ''}>"
            + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
            + "</tr>"
        )

    heading, *rows = part.table
    table = cells(heading, "th") + "".join(cells(row, "td") for row in rows)
    return f"{head}{warnings}<table>{table}</table>"
