"""What an earlier run into the same folder has done, for --skip-existing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsgnn.runtime.disk.outputs import Target

# What reading a record raises that is damaged, or was not written by dsgnn-run.
DAMAGE = (OSError, ValueError, LookupError, TypeError)


class Earlier:
    """The records of earlier runs in a folder. Those of another model count for nothing, nor do
    those of another file or of videos with other options."""

    def __init__(self, out: Path, model: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._model, self._options = dict(model), dict(options)
        self._images: dict[str, Mapping[str, Any]] = {}
        try:
            results = _load(out / "results.json")
            images = results["images"] if results["model"] == self._model else ()
        except DAMAGE:
            return
        for image in images if isinstance(images, list) else ():
            if isinstance(image, dict) and isinstance(image.get("file"), str):
                self._images[image["file"]] = image

    def done(self, target: Target) -> Mapping[str, Any] | None:
        """The record of a source all of whose outputs are there, else None.

        A photo's is its entry of results.json, a video's its summary. An interrupted video is not
        done; standard input never is.
        """
        source = target.source
        if source.path is None and not source.address:
            return None
        try:
            return self._video(target) if source.is_video else self._image(target)
        except DAMAGE:
            return None

    def _image(self, target: Target) -> Mapping[str, Any] | None:
        entry = self._images[target.source.shown]
        done = "error" not in entry and _made(target, entry)
        done = done and _all_there(target, _pictures(target, entry))
        return entry if done else None

    def _video(self, target: Target) -> Mapping[str, Any] | None:
        summary = _load(target.path("summary.json"))
        how = [summary[name] for name in ("file", "model", "options", "complete")]
        done = how == [target.source.shown, self._model, self._options, True]
        done = done and _made(target, summary) and _all_there(target, _files(target))
        return summary if done else None


def _made(target: Target, record: Mapping[str, Any]) -> bool:
    """Whether the record is of this very file, and of all the kinds that are wanted now."""
    then, now = record["made"], target.made()
    return then["of"] == now["of"] and set(now["saved"]) <= set(then["saved"])


def _pictures(target: Target, entry: Mapping[str, Any]) -> Iterator[str]:
    """Endings of the pictures a photo with this entry has."""
    endings = {"overlay": "overlay.jpg", "map": "map.png"}
    yield from (ending for kind, ending in endings.items() if kind in target.kinds)
    for item in entry["objects"]:
        if "masks" in target.kinds:
            yield f"mask{item['rank']}.png"
        if "crops" in target.kinds and item["area"] > 0:
            yield f"crop{item['rank']}.png"


def _files(target: Target) -> Iterator[str]:
    """Endings of the files a ranked video has."""
    yield "frames.jsonl"
    yield from (f"{kind}.mp4" for kind in ("overlay", "map") if kind in target.kinds)
    if "masks" in target.kinds:
        with target.path("frames.jsonl").open(encoding="utf-8") as lines:
            for frame in map(json.loads, lines):
                for item in frame["objects"]:
                    yield f"masks/{frame['frame']:06d}.mask{item['rank']}.png"


def _all_there(target: Target, endings: Iterator[str]) -> bool:
    return all(target.path(ending).is_file() for ending in endings)


def _load(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
