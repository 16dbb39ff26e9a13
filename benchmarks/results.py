"""The files of the harness: one versioned form for every kind, and the log of an unfinished run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

from dsgnn.benchmarks.timing import Turn
from dsgnn.runtime.disk.documents import read_document
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.errors import DataError, OptionError

SCHEMA = "dsgnn.bench/1"
DIGITS = 4  # of a raw time in milliseconds

# `check` holds a value against a form; as classes of msgspec these forms would take more lines.
# A form: a type (or several), {name: form} with exactly these names, {str: form} with any names,
# [form] a list of any length.
NUMBER = (int, float)
MAYBE = (int, float, NoneType)
STATISTICS = dict.fromkeys(("mean", "std", "min", "p50", "p90", "p95", "p99", "cv"), NUMBER)
SUBJECT = {
    "name": str,
    "form": str,
    "file": (str, NoneType),
    "sha256": str,
    "status": str,
    "config": str,
    "weights": str,
    "precision": str,
    "backend": str,
    "device": str,
    "input": str,
    "bytes": (int, NoneType),
    "source_sha256": str,
}
LATENCY_ROW = {
    "subject": {**SUBJECT, "threads": int},
    "batch": int,
    "load_s": NUMBER,
    "first_ms": NUMBER,
    "memory": {"load_mib": MAYBE, "host_mib": MAYBE, "device_mib": MAYBE, "since_load": bool},
    "stages": {str: {**STATISTICS, "n": int}},
    "images_per_s": NUMBER,
    "drift": NUMBER,
    "stationary": bool,
    "floor": (dict, NoneType),
    "samples": {str: [NUMBER]},
}
ACCURACY_ROW = {
    "subject": SUBJECT,
    "data": {"spec": str, "split": str, "images": int, "protocol": str},
    "figures": {str: MAYBE},
    "used": {str: int},
    "reference": ({str: MAYBE}, NoneType),
    "parity": [dict],
    "parity_from": (str, NoneType),
}
SCALING_ROW = {
    "name": str,
    "workers": int,
    "threads": int,
    "clients": int,
    "images": int,
    **dict.fromkeys(("start_s", "ms_per_image", "single_ms", "overhead_ms", "speed_up"), NUMBER),
    "turns": [[NUMBER]],
}
CROPS_ROW = {
    **dict.fromkeys(("source", "who", "aspect"), str),
    "images": int,
    "value": NUMBER,
    "interval": [NUMBER],
    "ms": MAYBE,
}
LOAD_ROW = {
    **dict.fromkeys(("scenario", "early_stopping"), str),
    **dict.fromkeys(("lanes", "queries", "refused"), int),
    **dict.fromkeys(("per_s", "mean_ms", "p50_ms", "p90_ms", "p99_ms"), NUMBER),
    **dict.fromkeys(("rate_per_s", "p90_early_ms", "p99_early_ms"), MAYBE),
    "valid": bool,
    "over_limit": (int, NoneType),
    "memory_mib": [MAYBE],  # before and after
    "joules_per_photo": {str: NUMBER},  # of the meters that can be read
}
COMMON = {
    "schema": str,
    "kind": str,
    "created": str,
    "seed": int,
    "environment": {
        "system": str,
        "python": str,
        "cpu": str,
        "cpu_flags": [str],
        "cores": int,
        "cores_allowed": (int, NoneType),
        "memory_gib": MAYBE,
        "governor": (str, NoneType),
        "gpus": [dict],
        "libraries": {str: str},
        "variables": dict,
        "git": {"revision": (str, NoneType), "changed": (bool, NoneType)},
        "command": [str],
    },
}
CONDITIONS = {"before": dict, "after": dict, "stolen": MAYBE}
LATENCY = {
    "plan": dict,
    "conditions": CONDITIONS,
    "noise": {str: {"quiet": bool, "worst": NUMBER, "why": str}},
    "rows": [LATENCY_ROW],
}
KINDS: dict[str, dict[str, Any]] = {  # beside what is COMMON
    "latency": LATENCY,
    "accuracy": {"rows": [ACCURACY_ROW]},
    "scaling": {"model": dict, "conditions": CONDITIONS, "rows": [SCALING_ROW]},
    "crops": {
        "model": dict,
        "data": {"spec": str, "split": str, "fixations": int},
        "rank_ms": NUMBER,
        "missing": [{"name": str, "why": str}],
        "rows": [CROPS_ROW],
    },
    "load": {
        "target": str,
        "model": dict,
        "plan": {"p99_ms": NUMBER, "duration_s": NUMBER, "queries": int},
        "conditions": {**CONDITIONS, "busy_before": MAYBE},
        "start": {"cold_s": MAYBE, "first_ms": MAYBE, "warm_ms": NUMBER},
        "highest_per_s": MAYBE,
        "search": [{"rate_per_s": NUMBER, "valid": bool, "p99_ms": NUMBER}],
        "memory": ([[NUMBER]], NoneType),  # [seconds, MiB]
        "rows": [LOAD_ROW],
    },
    # rows that could not be measured, with the reason; and what the floors rest on
    "gpu": {
        **LATENCY,
        "missing": [{"name": str, "precision": str, "batch": int, "why": str}],
        "rates": {"gb_per_s": NUMBER, "tflops": {str: NUMBER}},
        "parity": [dict],  # of the answers, by `dsgnn.export.parity`
    },
}


def check(value: Any, form: Any, where: str = "results") -> None:
    """Raise DataError naming the first place where a value has not its form."""
    options = form if isinstance(form, tuple) else (form,)
    nested = [option for option in options if not isinstance(option, type)]
    kinds = tuple(option for option in options if isinstance(option, type))
    # bool is an int to Python, not to us
    if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
        return
    if not nested or not isinstance(value, type(nested[0])):
        names = " or ".join(
            option.__name__ if isinstance(option, type) else type(option).__name__
            for option in options
        )
        raise DataError(f"{where}: expected {names}, got {type(value).__name__} {value!r:.80}")
    inner = nested[0]
    if isinstance(inner, list):
        for number, item in enumerate(value):
            check(item, inner[0], f"{where}[{number}]")
        return
    any_name = inner.get(str)
    if any_name is None and (wrong := inner.keys() ^ value.keys()):
        lacking, strange = sorted(wrong - value.keys()), sorted(wrong - inner.keys())
        raise DataError(f"{where}: lacks {lacking}, has unknown {strange}")
    for name, item in value.items():
        check(item, any_name or inner[name], f"{where}.{name}")


def validate(results: Any) -> None:
    """Raise DataError unless `results` has the form of its kind and of this schema."""
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, dict) else type(results).__name__
        raise DataError(
            f"expected schema {SCHEMA}, got {found!r}: made by another version of dsgnn-bench, or "
            "by something else; measure again"
        )
    if results.get("kind") not in list(KINDS):
        raise DataError(f"kind must be one of {', '.join(KINDS)}, got {results.get('kind')!r}")
    check(results, COMMON | KINDS[results["kind"]])


def load(path: Path) -> dict[str, Any]:
    """The results in a file. Raises OptionError where they have not the form, OSError."""
    try:
        results = read_document(path)
        validate(results)
    except ValueError as error:
        raise OptionError(f"{path}: {error}") from error
    return results


def free(path: Path) -> Path:
    """A path to write results to. Raises OptionError where there are some."""
    if path.exists():
        raise OptionError(f"{path} exists: give another folder, or delete it")
    return path


def save(path: Path, kind: str, environment: Mapping[str, Any], **content: Any) -> dict[str, Any]:
    """Write results whole, and only if they have their form. Returns them."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    results = {"schema": SCHEMA, "kind": kind, "created": now, "environment": environment}
    results |= content
    results = json.loads(json.dumps(results))  # tuples become lists, as for the reader
    validate(results)
    # one line per row: raw samples would otherwise take one line each
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    brief = json.dumps({**results, "rows": []}, indent=1)
    text = brief.replace('"rows": []', f'"rows": [\n{rows}\n]')
    write_whole(path, (text + "\n").encode())
    return results


def columns(turns: Iterable[Turn]) -> dict[str, list[float]]:
    """Turns of one model → {"round": [...], stage: [ms...]}, one entry per run."""
    table: dict[str, list[float]] = {"round": []}
    for turn in turns:
        for sample in turn.samples:
            table["round"].append(turn.round)
            for stage, value in sample.items():
                table.setdefault(stage, []).append(round(value, DIGITS))
    return table


class TurnLog:
    """Every turn as it is measured, one line each, so that a run that was stopped can go on.

    header: what must be the same for that. turns: {batch: [Turn…]} of complete rounds; closing:
    {batch: …} what was said at the end of each finished batch.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], names: set[str], resume: bool):
        """Raises OptionError when there is a log and `resume` is off, or it is of another run,
        DataError when it is damaged."""
        self.turns: dict[int, list[Turn]] = {}
        self.closing: dict[int, Any] = {}
        plain: dict[str, Any] = json.loads(json.dumps(header))
        if path.exists():
            if not resume:
                raise OptionError(
                    f"{path} holds an unfinished run: resume it, or give another folder"
                )
            self._read(path, plain, names)
        lines: list[Any] = [plain]
        for batch, turns in self.turns.items():
            lines += [_line(batch, turn) for turn in turns]
        lines += [{"batch": batch, "closing": closing} for batch, closing in self.closing.items()]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file = path.open("a", encoding="utf-8")
        self._path = path

    def add(self, batch: int, turn: Turn) -> None:
        self.turns.setdefault(batch, []).append(turn)
        print(json.dumps(_line(batch, turn)), file=self._file, flush=True)

    def close_batch(self, batch: int, closing: Any) -> None:
        self.closing[batch] = closing
        print(json.dumps({"batch": batch, "closing": closing}), file=self._file, flush=True)

    def close(self, finished: bool) -> None:
        """finished: everything is in the results, the log is not needed any more."""
        self._file.close()
        if finished:
            self._path.unlink()

    def _read(self, path: Path, header: dict[str, Any], names: set[str]) -> None:
        lines = path.read_text("utf-8").split("\n")[:-1]  # a line that was cut off is left out
        try:
            old, *entries = [json.loads(line) for line in lines]
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}): delete it and start again") from None
        changed = [name for name in header if old.get(name) != header[name]]
        if changed:
            raise DataError(
                f"{path} is of another run, {', '.join(changed)} differ: give the same command and "
                "files, or another folder"
            )
        found: dict[int, dict[int, list[Turn]]] = {}
        for entry in entries:
            if "closing" in entry:
                self.closing[entry["batch"]] = entry["closing"]
                continue
            turn = Turn(entry["round"], entry["name"], entry["samples"])
            found.setdefault(entry["batch"], {}).setdefault(turn.round, []).append(turn)
        for batch, rounds in found.items():
            whole = [turns for turns in rounds.values() if {t.name for t in turns} == names]
            self.turns[batch] = [turn for turns in whole for turn in turns]


def _line(batch: int, turn: Turn) -> dict[str, Any]:
    samples = [{k: round(v, DIGITS) for k, v in sample.items()} for sample in turn.samples]
    return {"batch": batch, "round": turn.round, "name": turn.name, "samples": samples}
