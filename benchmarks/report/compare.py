"""`dsgnn-bench compare`: ratios within a run, and between two runs of the same models."""

from __future__ import annotations

from typing import Any

from dsgnn.benchmarks import timing
from dsgnn.benchmarks.latency import baseline
from dsgnn.benchmarks.report.tables import Results
from dsgnn.benchmarks.timing import NOISE
from dsgnn.runtime.errors import OptionError


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
