"""The schema of result files, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest

from dsgnn.benchmarks import results
from dsgnn.runtime.errors import DsgnnError

LEFT_OUT = ("plan", "before", "after", "variables", "floor", "samples", "gpus", "parity")


def test_results_of_another_schema_are_refused(files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(files[0].read_text().replace(results.SCHEMA, "dsgnn.bench/0"))
    with pytest.raises(DsgnnError, match=r"expected schema dsgnn.bench/1, got 'dsgnn.bench/0'"):
        results.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(DsgnnError, match="got 'list'"):
        results.load(path)


def mutations(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to every named value of a document, raw samples and free mappings left out."""
    found = []
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in LEFT_OUT:
                found += [(*path, name), *mutations(item, (*path, name))]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        found += mutations(value[0], (*path, 0))
    return found


@pytest.mark.parametrize("kind", [0, 1])
def test_the_schema_holds_every_name_and_type(files: list[Path], kind: int) -> None:
    good = results.load(files[kind])
    free = {"figures", "used", "libraries", "stages", "noise", "reference"}
    paths = mutations(good)
    assert len(paths) > 40
    for path in paths:
        for spoil in ("drop", "change"):
            bad = copy.deepcopy(good)
            holder: Any = bad
            for name in path[:-1]:
                holder = holder[name]
            if spoil == "drop":
                if len(path) > 1 and path[-2] in free:
                    continue  # names are free there
                del holder[path[-1]]
            else:
                holder[path[-1]] = {"not": ["this"]}
            with pytest.raises(DsgnnError):
                results.validate(bad)


def test_an_unknown_name_and_a_truth_value_for_a_number_are_refused(files: list[Path]) -> None:
    good = results.load(files[0])
    with pytest.raises(DsgnnError, match=r"has unknown \['more'\]"):
        results.validate({**good, "more": 1})
    with pytest.raises(DsgnnError, match="seed: expected int, got bool"):
        results.validate({**good, "seed": True})
