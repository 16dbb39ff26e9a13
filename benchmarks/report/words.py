"""Results in sentences: where and when a run was made, and what else must be said beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsgnn.benchmarks import timing
from dsgnn.benchmarks.load.run import summary
from dsgnn.benchmarks.report.plots import brief
from dsgnn.benchmarks.report.tables import Results, Table, gpu_table, never_measured

BUSY = 0.05  # of the processor time


def networks(results: Results) -> str:
    """The networks of a run."""
    return ", ".join(dict.fromkeys(row["subject"]["config"] for row in results["rows"]))


def too_noisy(results: Results) -> list[str]:
    """What stands before all other caveats of a run: that the machine was not quiet, and why."""
    noisy = [v["why"] for v in results["noise"].values() if not v["quiet"]]
    return [f"The machine was too noisy for these figures: {'; '.join(noisy)}."] if noisy else []


def circumstances(results: Results) -> str:
    """Where and when one latency run was made, and how well its halves agree where they do."""
    threads = ", ".join(sorted({str(row["subject"]["threads"]) for row in results["rows"]}))
    verdict = ""
    if not too_noisy(results):
        worst = max(v["worst"] for v in results["noise"].values())
        verdict = f" Both halves of the run give the same ratios within {worst:.1%}."
    return f"{where(results)} {threads} threads a model.{verdict}{stolen_text(results)}"


def about_scaling(results: Results) -> str:
    return (
        f"{where(results)} {results['model']['file']}, {results['rows'][0]['images']} images a "
        "turn; the single process, which writes results.json, has its turns before and after each "
        f"of the others, and the overhead is against those.{stolen_text(results)}"
    )


def about_load(results: Results) -> str:
    model, plan = results["model"], results["plan"]
    what = model["file"] + (" in dsgnn-serve" if results["target"] == "server" else "")
    return (
        f"{where(results)} {what}, {model['backend']}, {model['threads']} threads an inference, "
        f"{plan['duration_s']:g} s a test at least. {summary(results)}{stolen_text(results)}"
    )


def was_busy(results: Results) -> list[str]:
    """That a machine had other things to do when a load run began, where it had."""
    share = results["conditions"]["busy_before"]
    if share is None or share <= BUSY:
        return []
    return [f"The machine was busy before it began ({share:.0%} of its processor time)."]


def where(results: Results) -> str:
    env = results["environment"]
    revision = (env["git"]["revision"] or "unknown")[:10]
    changed = " with changes" if env["git"]["changed"] else ""
    created = results["created"][:10]
    return f"{env['cpu']}, {env['cores']} cores; {created}, revision {revision}{changed}."


def stolen_text(results: Results) -> str:
    stolen = results["conditions"]["stolen"]
    return "" if stolen is None else f" The host took {stolen:.1%} of the processor time."


def milliseconds(results: Results) -> str:
    """Milliseconds of inference of every row of a latency run, for a person."""
    lines = ["inference in milliseconds, p50 and p99:"]
    for row in results["rows"]:
        times = timing.summarise(timing.inference(row["samples"]))
        name = f"batch {row['batch']}  {row['subject']['name']}"
        lines.append(f"{name}: {brief(times['p50'])} ms, {brief(times['p99'])} ms")
    return "\n".join(lines)


def answers_text(parity: Sequence[Mapping[str, Any]]) -> str:
    """Whose answers were not those of the CPU, as " A sentence.", or nothing without comparison."""
    if not parity:
        return ""

    def said(those: Sequence[Mapping[str, Any]]) -> str:
        """Each name once, with the first reason."""
        whys = {one["name"]: one["failures"][0] for one in reversed(those) if one["failures"]}
        return "; ".join(f"{name}: {why}" for name, why in reversed(whys.items()))

    compared = [one for one in parity if "photos" in one]
    silent = said([one for one in parity if "photos" not in one])
    left = f" Without an answer: {silent}." if silent else ""
    if not compared:
        return left
    photos, failed = min(one["photos"] for one in compared), said(compared)
    verdict = f"FAILED for {failed}" if failed else "all agree"
    return f" Answers compared with float32 on the CPU on {photos} photos: {verdict}.{left}"


def accuracy_lines(results: Results) -> list[str]:
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


def gpu_run(results: Results) -> tuple[str, str, Table]:
    """Title, circumstances and table of a GPU run."""
    name = ", ".join(gpu["name"] for gpu in results["environment"]["gpus"]) or "a GPU"
    about = "Inference p50 ms, transfers included, ÷ its floor. "
    about += circumstances(results) if results["rows"] else where(results)
    about += answers_text(results["parity"])
    table = gpu_table(results["rows"], results["missing"])
    title = f"{networks(results)} on {name}".lstrip()
    return title, f"{about} {never_measured(table, results['missing'])}".rstrip(), table
