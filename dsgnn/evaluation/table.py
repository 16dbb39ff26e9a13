"""The figures of an evaluation as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# How the figures are shown: name, heading, what the mean is over.
FIGURES = (
    ("sa_sor", "SA-SOR", "images"),
    ("sor", "SOR", "images"),
    ("mae", "MAE", "images"),
    ("recall", "recall at IoU 0.5", "objects"),
    ("matched_iou", "IoU of those found", "objects"),
    ("f_measure", "F-measure", "images"),
    ("false_objects", "false objects", "images"),
    ("false_objects_on_empty", "false objects, empty images", "images"),
)


def table(figures: Mapping[str, Any]) -> str:
    """The figures for a terminal: each with what it is a mean over, then by number of objects."""
    lines = [
        f"{figures['data']['spec']} {figures['data']['split']}: {figures['images']} images, "
        f"protocol {figures['protocol']}, palette {figures['palette']}"
    ]
    if if_none := figures.get("model", {}).get("if_none"):
        lines.append(f"  where nothing passes the threshold, {if_none} of the queries count")
    if teacher := figures["data"].get("teacher"):
        lines.append(f"  the true ranks are predicted by {teacher}, not by people")
    for name, heading, over in FIGURES:
        if figures[name] is not None:
            lines.append(f"  {heading:<28}{figures[name]:7.4f}  {figures['used'][name]:6} {over}")
    lines.append(f"{'objects':>9}{'images':>8}{'SA-SOR':>8}{'SOR':>8}{'MAE':>8}{'recall':>8}")
    for count, part in figures["by_objects"].items():
        values = (part[name] for name in ("sa_sor", "sor", "mae", "recall"))
        cells = "".join("       -" if v is None else f"{v:8.4f}" for v in values)
        lines.append(f"{count:>9}{part['images']:>8}{cells}")
    return "\n".join(lines)
