"""What a training run leaves to read: log.jsonl, TensorBoard events, a progress bar, a curve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsgnn.runtime.disk.documents import parse_document
from dsgnn.runtime.disk.files import whole_file, write_whole
from dsgnn.runtime.errors import DataError

LOG = "log.jsonl"
EVALUATED = ("sa_sor", "sor", "mae", "recall", "matched_iou", "f_measure", "false_objects")


class Journal:
    """Writes the records of one run; a resumed run goes on as if it had not stopped.

    Each record is one line of log.jsonl: {"iteration", "images", "loss", "learning_rate",
    "images_per_s", "losses": {name: mean since the last record}} or {"iteration", "images",
    "evaluation": {figures on the validation split}}.
    """

    def __init__(self, out: Path, start: int, end: int):
        """start, end: iterations. Records after `start` are of a run that was cut off: dropped."""
        from torch.utils.tensorboard import SummaryWriter

        path = out / LOG
        kept = [r for r in read_log(out) if r["iteration"] <= start] if start else []
        write_whole(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._log = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        # disable=None: only on a terminal
        self.bar = tqdm(total=end, initial=start, unit="it", disable=None, dynamic_ncols=True)
        self._shown: dict[str, str] = {}

    def say(self, text: str) -> None:
        """Print for whoever watches, above the progress bar."""
        tqdm.write(text)

    def losses(self, record: Mapping[str, Any]) -> None:
        """record: as in log.jsonl."""
        self._write(record)
        for name, value in record["losses"].items():
            self._board.add_scalar(f"loss/{name}", value, record["iteration"])
        for name in ("loss", "learning_rate", "images_per_s"):
            self._board.add_scalar(name, record[name], record["iteration"])
        largest = sorted(record["losses"].items(), key=lambda item: -item[1])[:3]
        self._show(loss=record["loss"], **dict(largest))

    def evaluation(self, record: Mapping[str, Any], best: bool) -> None:
        """record: as in log.jsonl. best: the best so far."""
        self._write(record)
        figures = record["evaluation"]
        for name, value in figures.items():
            if value is not None:
                self._board.add_scalar(f"evaluation/{name}", value, record["iteration"])
        told = ", ".join(f"{name} {v:.3f}" for name, v in figures.items() if v is not None)
        tqdm.write(f"iteration {record['iteration']}: {told}{' (best so far)' if best else ''}")
        self._show(sa_sor=figures["sa_sor"])

    def close(self) -> None:
        self.bar.close()
        self._board.close()
        self._log.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        print(json.dumps(record), file=self._log, flush=True)

    def _show(self, **values: float | None) -> None:
        self._shown |= {name: f"{v:.3g}" for name, v in values.items() if v is not None}
        self.bar.set_postfix(self._shown)


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of a run folder, [] if it has none; a last line that was cut off is left out.

    Raises DataError for any other damaged line.
    """
    path = out / LOG
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text("utf-8").split("\n")[:-1], start=1):
        try:
            records.append(parse_document(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
    return records


def curve(out: Path) -> Path | None:
    """Draw log.jsonl as curve.png: losses, and figures on the validation split, over images seen.

    None when there is nothing to draw yet.
    """
    from matplotlib.figure import Figure

    records = read_log(out)
    losses = [r for r in records if "losses" in r]
    evaluations = [r for r in records if "evaluation" in r]
    if not losses:
        return None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    seen = [r["images"] for r in losses]
    left.plot(seen, [r["loss"] for r in losses], "k", linewidth=2, label="sum")
    for name in losses[-1]["losses"]:
        left.plot(seen, [r["losses"].get(name) for r in losses], linewidth=1, label=name)
    left.set(title="training losses", yscale="log", xlabel="images seen")
    for name in ("sa_sor", "sor", "recall", "matched_iou"):
        points = [(r["images"], r["evaluation"][name]) for r in evaluations]
        points = [(x, y) for x, y in points if y is not None]
        if points:
            right.plot(*zip(*points, strict=True), marker=".", label=name)
    right.set(title="validation split", xlabel="images seen", ylim=(-0.05, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(
                fontsize="x-small", ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.14)
            )
    path = out / "curve.png"
    with whole_file(path) as part:
        figure.savefig(part, dpi=110)
    return path
