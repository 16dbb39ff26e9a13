"""What an earlier run into the same folder has done, for --skip-existing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsgnn.runtime.save import Target


class Earlier:
    """The records of earlier runs in a folder; those of another model count for nothing, nor do
    videos with other options."""

    def __init__(self, out: Path, model: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._model, self._options = dict(model), dict(options)
        results = _load(out / "results.json")
        images = results.get("images", []) if results.get("model") == self._model else []
        self._images = {image["file"]: image for image in images if "error" not in image}

    def done(self, target: Target) -> Mapping[str, Any] | None:
        """The record of a source all of whose outputs are there, else None.

        A photo's is its entry of results.json, a video's its summary; an interrupted video is not
        done.
        """
        source = target.source
        if not source.is_video:
            entry = self._images.get(source.shown)
            return entry if entry and _all_there(target, _pictures(target, entry)) else None
        summary = _load(target.path("summary.json"))
        same = (summary.get("model"), summary.get("options")) == (self._model, self._options)
        if not same or not summary.get("complete"):
            return None
        videos = [f"{kind}.mp4" for kind in ("overlay", "map") if kind in target.kinds]
        return summary if _all_there(target, [*videos, "frames.jsonl"]) else None


def _pictures(target: Target, entry: Mapping[str, Any]) -> list[str]:
    """Endings of the pictures a photo with this entry has."""
    endings = {"overlay": "overlay.jpg", "map": "map.png"}
    wanted = [ending for kind, ending in endings.items() if kind in target.kinds]
    for item in entry["objects"]:
        if "masks" in target.kinds:
            wanted.append(f"mask{item['rank']}.png")
        if "crops" in target.kinds and item["area"] > 0:
            wanted.append(f"crop{item['rank']}.png")
    return wanted


def _all_there(target: Target, endings: list[str]) -> bool:
    return all(target.path(ending).is_file() for ending in endings)


def _load(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
