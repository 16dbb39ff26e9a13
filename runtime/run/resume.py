"""What an earlier run into the same folder has done, for a run that leaves it as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsgnn.runtime.disk.documents import parse_document, read_document
from dsgnn.runtime.disk.durable import DAMAGE
from dsgnn.runtime.disk.outputs import TABLE, OutputFiles


class Earlier:
    """The records of earlier runs in a folder. Those of another model count for nothing, nor do
    those of another file, or of videos with other options."""

    def __init__(self, out: Path, model: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._model, self._options = dict(model), dict(options)
        self._images: dict[str, Mapping[str, Any]] = {}
        try:
            results = read_document(out / TABLE["json"].run)
            images = results["images"] if results["model"] == self._model else ()
        except DAMAGE:
            return
        for image in images if isinstance(images, list) else ():
            if isinstance(image, dict) and isinstance(image.get("file"), str):
                self._images[image["file"]] = image

    def done(self, out: OutputFiles) -> Mapping[str, Any] | None:
        """The record of a source if all of its outputs are there, else None.

        A photo's record is its entry of results.json, a video's is its summary. A video that was
        interrupted is not done. Standard input never is.
        """
        source = out.source
        if source.path is None and not source.address:
            return None
        try:
            return self._video(out) if source.is_video else self._image(out)
        except DAMAGE:
            return None

    def _image(self, out: OutputFiles) -> Mapping[str, Any] | None:
        entry = self._images[out.source.shown]
        done = "error" not in entry and _made(out, entry) and _all_there(out, _pictures(out, entry))
        return entry if done else None

    def _video(self, out: OutputFiles) -> Mapping[str, Any] | None:
        summary = read_document(out.path("summary.json"))
        how = [summary[name] for name in ("file", "model", "options", "complete")]
        done = how == [out.source.shown, self._model, self._options, True]
        done = done and _made(out, summary) and _all_there(out, _video_files(out))
        return summary if done else None


def _made(out: OutputFiles, record: Mapping[str, Any]) -> bool:
    """Whether the record is of this very file, and of all the kinds that are wanted now."""
    then, now = record["made"], out.made()
    return then["of"] == now["of"] and set(now["saved"]) <= set(then["saved"])


def _pictures(out: OutputFiles, entry: Mapping[str, Any]) -> Iterator[str]:
    """Endings of the pictures that a photo with this entry has."""
    yield from map(out.crop_ending, out.aspects)
    for name, ending in ((kind, TABLE[kind].photo) for kind in out.kinds):
        if "{rank}" in ending:
            # An object whose mask is empty has no crop.
            items = (item for item in entry["objects"] if name != "crops" or item["area"] > 0)
            yield from (ending.format(rank=item["rank"]) for item in items)
        elif ending:
            yield ending


def _video_files(out: OutputFiles) -> Iterator[str]:
    """Endings of the files that a ranked video has."""
    yield from map(out.crop_ending, out.aspects)
    for ending in (ending for kind in out.kinds for ending in TABLE[kind].video):
        if "{" not in ending:
            yield ending
            continue
        with out.path("frames.jsonl").open(encoding="utf-8") as lines:
            for frame in map(parse_document, lines):
                for item in frame["objects"]:
                    yield ending.format(frame=frame["frame"], rank=item["rank"])


def _all_there(out: OutputFiles, endings: Iterator[str]) -> bool:
    return all(out.path(ending).is_file() for ending in endings)
