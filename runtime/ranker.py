"""The one call: a photo in, its ranked objects out."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np

from dsgnn.runtime.artifact import Artifact, Description, open_artifact
from dsgnn.runtime.backends import Backend, TensorSpec, open_backend
from dsgnn.runtime.errors import ArtifactError, InputError, OptionError
from dsgnn.runtime.images import ImageSource, read_image
from dsgnn.runtime.letterbox import Fixed, Geometry, letterbox
from dsgnn.runtime.photo.decoder import Decoders
from dsgnn.runtime.photo.headers import MAX_PIXELS
from dsgnn.runtime.postprocess import STRIDE, check_choices, postprocess
from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.run.lanes import lanes_for, side_by_side

BUNDLED = Path(__file__).parent / "models" / "nano.onnx"
LARGEST_BATCH = 32  # photos of one inference where the artifact sets no limit: memory grows with it


class Ranker:
    """Rank the salient objects of photos with one loaded artifact.

    `ranker(photo)` may be called from several threads at once. A Ranker can be pickled: the other
    process loads the artifact again. In a `with` block, or by `close`, it gives back what the
    artifact holds.

    Attributes: artifact (path, description, sha256, status), backend (its `picked` says what runs
    it), threshold, if_none, specks.
    """

    _max_pixels: int = MAX_PIXELS
    _decoders: Decoders | None = None
    _made_by: tuple[Callable[..., Ranker], tuple[Any, ...]]  # what makes an equal one

    def __init__(
        self,
        model: str | Path | None = None,
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        threshold: float | None = None,
        if_none: str = "none",
        specks: str = "drop",
        max_pixels: int = MAX_PIXELS,
        untrusted: bool = False,
    ) -> None:
        """Load an artifact.

        model: an ONNX file or engine made by `dsgnn-export`; None or "nano" = the bundled one.
        backend: "auto" or one of BACKENDS, see `dsgnn.runtime.backends.open_backend`. device:
        "auto", "cpu", "cuda" or "cuda:N"; the one that is named is used, or it is an error.
        threads: of one call on a CPU, 2 by default. threshold: an object is kept if its score is
        above it, at least 0 and below 1; None = the artifact's own. if_none: what an image gives
        when no score passes: "none" = no object, "all" = every query, as upstream does. specks:
        "drop" parts of a mask that are far smaller than the object
        (`dsgnn.runtime.postprocess.without_specks`), or "keep" them. max_pixels: width × height of
        the largest photo that is decoded. untrusted: photos may be made to do harm, so each is
        decoded in another process, with 5 s of processor time and 1 GB of memory (on Linux); what a
        photo does to its decoder makes that call alone fail, with InputError.

        Raises FileNotFoundError; ArtifactError for a file that is not ours, is damaged, or is not
        the one its sidecar describes; BackendError if something is not installed or does not fit;
        OptionError.
        """
        check_options(threshold, if_none, specks)
        if max_pixels < 1:
            raise OptionError(f"max_pixels must be at least 1, got {max_pixels}")
        path = model_path(model)
        artifact = open_artifact(path)
        decoders = Decoders(max_pixels) if untrusted else None  # starts while the artifact loads
        try:
            loaded = open_backend(artifact, backend, device, threads)
            self._set_up(artifact, loaded, threshold, if_none, specks)
        except BaseException:
            if decoders:
                decoders.close()
            raise
        self._max_pixels, self._decoders = max_pixels, decoders
        anywhere = None if path == BUNDLED else path.absolute()  # another process may run elsewhere
        options = (threshold, if_none, specks, max_pixels, untrusted)
        self._made_by = (type(self), (anywhere, backend, device, threads, *options))

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        backend: Backend,
        threshold: float | None = None,
        if_none: str = "none",
        specks: str = "drop",
    ) -> Self:
        """A Ranker of an artifact that a backend has loaded; threshold, if_none, specks as above.

        It can be pickled if the backend can. Raises ArtifactError if the two do not belong
        together, OptionError.
        """
        check_options(threshold, if_none, specks)
        ranker = cls.__new__(cls)
        ranker._set_up(artifact, backend, threshold, if_none, specks)
        ranker._made_by = (cls.of, (artifact, backend, threshold, if_none, specks))
        return ranker

    def _set_up(
        self,
        artifact: Artifact,
        backend: Backend,
        threshold: float | None,
        if_none: str,
        specks: str,
    ) -> None:
        check_interface(backend, artifact.description)
        self.artifact, self.backend = artifact, backend
        self.if_none, self.specks = if_none, specks
        self.threshold = artifact.description.threshold if threshold is None else threshold

    def __call__(self, image: ImageSource) -> Ranking:
        """Rank one photo.

        image: a path, encoded bytes, or a (h, w, 3) uint8 RGB array. Returns its Ranking, with
        milliseconds per stage. Raises OSError or InputError if it cannot be read, ArtifactError if
        the network's answers mean nothing, BackendError if the inference fails.
        """
        return self.batch([image])[0]

    def read(self, image: ImageSource) -> np.ndarray:
        """Read one photo as a call does: (h, w, 3) uint8 RGB. Raises OSError or InputError."""
        if self._decoders is not None:
            return self._decoders(image)
        return read_image(image, self._max_pixels)

    def batch(self, images: Iterable[ImageSource]) -> list[Ranking]:
        """Rank several photos, in their order, those of equal padded size in one inference.

        images: as for a single call, with the same errors; all of them are held in memory. An
        inference has as many as the artifact takes, or LARGEST_BATCH where it sets no limit. A
        photo's "inference" time is its share of the batch it was in.
        """
        if isinstance(images, (str, os.PathLike, bytes)) or getattr(images, "ndim", 4) == 3:
            raise InputError("expected several photos, such as a list of them, got one photo")
        photos = [self._prepare(image) for image in images]
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, photo in enumerate(photos):
            by_size.setdefault(photo.geometry.padded, []).append(index)
        limit = self.backend.max_batch or self.backend.inputs[0].shape[0] or LARGEST_BATCH
        rankings: dict[int, Ranking] = {}
        for same in by_size.values():
            for start in range(0, len(same), limit):
                members = same[start : start + limit]
                rankings.update(zip(members, self._rank([photos[i] for i in members]), strict=True))
        return [rankings[index] for index in range(len(photos))]

    def map(
        self, images: Iterable[ImageSource], *, lanes: int | None = None
    ) -> Generator[Ranking, None, None]:
        """Rank many photos, several of them at the same time; yields their rankings, in order.

        images: as for a single call. They are taken as they are needed: a lane has one, and as many
        wait for their turn. lanes: how many are read and ranked at once; None = as many as the
        cores and the memory this process may use are enough for. Most photos per second are ranked
        by a Ranker of threads=1. An error of a photo is raised after the rankings of those before
        it, and ends the generator. Raises OptionError for lanes below 1.
        """
        if lanes is not None and lanes < 1:
            raise OptionError(f"lanes must be at least 1, got {lanes}")
        many = lanes or lanes_for(self.backend.threads, self.backend.device)

        def rankings() -> Generator[Ranking, None, None]:
            with closing(side_by_side(self, images, many)) as pairs:
                for _, ranking in pairs:
                    yield ranking()

        return rankings()

    def stream(
        self,
        source: str | Path | int,
        *,
        every: int = 1,
        start_s: float = 0.0,
        end_s: float | None = None,
        max_frames: int | None = None,
        batch: int = 1,
        steady: bool = True,
    ) -> Generator[tuple[np.ndarray, Ranking], None, None]:
        """Rank a video: open it and return a generator of (frame, ranking).

        source: a video file, URL, camera number, or pattern of numbered images ("shot%04d.png").
        every: take each N-th frame. start_s, end_s: seconds of the source. max_frames: stop after
        so many. batch: frames per inference; an inference has no more of them than one of `batch`
        has photos. steady: objects keep their `identity` and ranks do not flicker
        (dsgnn.runtime.video.steady); False = every frame for itself.

        A frame is (h, w, 3) uint8 RGB. Frames are decoded ahead in a thread; close the generator,
        or leave it, to end that. Raises OptionError for wrong arguments, and OSError or InputError
        if the source cannot be opened. If the source breaks off, the generator raises
        dsgnn.runtime.video.frames.Ended, an InputError, after the last good frame.
        """
        from dsgnn.runtime.video.stream import Selection, stream_video

        select = Selection(every, start_s, end_s, max_frames)
        fenced = None if self._decoders is None else self._max_pixels
        return stream_video(self, source, select, batch, steady, fenced)

    def close(self) -> None:
        """Give back what the artifact holds; ranking afterwards raises BackendError.

        No other thread may be ranking. A second call does nothing.
        """
        self.backend.close()
        if self._decoders is not None:
            self._decoders.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """What ranks, for records: the `model` entry of results.json."""
        facts = self.artifact.description
        return {
            "file": self.artifact.path.name,
            "sha256": self.artifact.sha256,
            "status": self.artifact.status_in(self.backend.name, self.backend.device),
            "config": facts.config,
            "weights": facts.weights,
            **({"origin": facts.origin} if facts.origin else {}),
            "precision": facts.precision,
            "toolkit": facts.toolkit,
            "backend": self.backend.name,
            "device": self.backend.device,
            "threshold": self.threshold,
            "if_none": self.if_none,
            "specks": self.specks,
        }

    def __str__(self) -> str:
        """One line for a person: which model, whether proven, and what runs it."""
        facts = self.artifact.description
        return (
            f"{self.artifact.path.name}: {facts.config}, {facts.about_weights}, "
            f"{self.artifact.about_status_in(self.backend.name, self.backend.device)}; "
            f"{self.backend.picked}"
        )

    def __reduce__(self) -> tuple[Callable[..., Ranker], tuple[Any, ...]]:
        return self._made_by

    def _prepare(self, image: ImageSource) -> _Photo:
        start = perf_counter()
        photo = self.read(image)
        decoded = perf_counter()
        padded, geometry = letterbox(photo, self.artifact.description.input)
        ready = perf_counter()
        file = str(image) if isinstance(image, str | Path) else None
        times_ms = {"decode": 1e3 * (decoded - start), "preprocess": 1e3 * (ready - decoded)}
        return _Photo(photo, file, padded, geometry, times_ms)

    def _rank(self, photos: list[_Photo]) -> list[Ranking]:
        """One inference over photos of equal padded size."""
        facts, start = self.artifact.description, perf_counter()
        batch = np.stack([photo.padded for photo in photos])  # (B, H, W, 3)
        outputs = self.backend.infer({"image": batch})
        inference_ms = 1e3 * (perf_counter() - start) / len(photos)
        rankings = []
        for index, photo in enumerate(photos):
            start = perf_counter()
            ranking = postprocess(
                outputs["saliency"][index],
                outputs["score"][index],
                outputs["masks"][index],
                photo.geometry,
                self.threshold,
                self.if_none,
                outputs["attention"][index] if facts.attention else None,
                facts.order,
                self.specks,
                facts.nms_iou,
            )
            times_ms = {**photo.times_ms, "inference": inference_ms}
            times_ms["postprocess"] = 1e3 * (perf_counter() - start)
            told = replace(ranking, timings_ms=times_ms, image=photo.image, file=photo.file)
            rankings.append(told)
        return rankings


@dataclass(frozen=True, eq=False)
class _Photo:
    """A photo ready for the network. image: as read. file: its path, if any. padded: (H, W, 3)
    uint8. times_ms: of the two stages so far."""

    image: np.ndarray
    file: str | None
    padded: np.ndarray
    geometry: Geometry
    times_ms: dict[str, float]


def model_path(model: str | Path | None) -> Path:
    """The artifact that is meant: a file, or the bundled one by its name.

    Raises ArtifactError for a checkpoint, which has to be exported first.
    """
    if model is None or (str(model) == "nano" and not Path(model).is_file()):
        return BUNDLED
    path = Path(model)
    convert = "convert it with dsgnn-convert, and make an ONNX file of that"
    remedies = {".safetensors": "make an ONNX file of it", ".pth": convert, ".pt": convert}
    if remedy := remedies.get(path.suffix):
        raise ArtifactError(
            f"{path.name} is a checkpoint, for PyTorch: {remedy} with dsgnn-export onnx"
        )
    return path


def check_options(threshold: float | None, if_none: str, specks: str) -> None:
    """Raise OptionError for a threshold, an `if_none` or `specks` that Ranker does not take."""
    check_choices(if_none, specks)
    if threshold is not None and not 0 <= threshold < 1:
        raise OptionError(f"threshold must be at least 0 and below 1, got {threshold}")


def interface(description: Description) -> dict[str, TensorSpec]:
    """The inputs and outputs that an artifact of this description has, by name; None = any."""
    queries = description.queries
    height = width = None
    if isinstance(description.input, Fixed):
        height, width = description.input.height, description.input.width
    masks = (None, queries, height and height // STRIDE, width and width // STRIDE)
    specs = [
        TensorSpec("image", np.dtype(np.uint8), (None, height, width, 3)),
        TensorSpec("saliency", np.dtype(np.float32), (None, queries)),
        TensorSpec("score", np.dtype(np.float32), (None, queries)),
        TensorSpec("masks", np.dtype(np.float32), masks),
    ]
    if description.attention:
        specs.append(TensorSpec("attention", np.dtype(np.float32), (None, None, None)))
    return {spec.name: spec for spec in specs}


def check_interface(backend: Backend, description: Description) -> None:
    """Raise ArtifactError unless the graph has the inputs and outputs its description promises."""
    got = {spec.name: spec for spec in (*backend.inputs, *backend.outputs)}
    for name, spec in interface(description).items():
        if name not in got or not got[name].accepts(spec.dtype, spec.shape):
            raise ArtifactError(
                f"the graph does not fit its description: expected {name} to be {spec}, got "
                f"{got.get(name, 'no such tensor')}; export the checkpoint again"
            )
