"""What can be timed: one network in several forms, all from the same encoded photos to rankings.

forms of a checkpoint (or of random weights):
  upstream         PyTorch eager computing what the published code does: every head after every
                   output, and the training branches
  deploy           PyTorch eager, the deploy graph
  compiled         the deploy graph under torch.compile
  cuda-graph       the deploy graph replayed as one CUDA graph per batch size
  straightforward  the network exported as it is (dynamo exporter, opset 18, last outputs only), in
                   a default ONNX Runtime session: what one gets without this toolkit
and "artifact", a file, run by one of the runtime's backends. Normalisation is part of each network.
PyTorch is imported only for the forms that need it, so that an artifact's memory is its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np

from dsgnn.benchmarks.timing import END_TO_END, Clock, Sample
from dsgnn.runtime import Ranker, samples
from dsgnn.runtime.disk.files import whole_file
from dsgnn.runtime.errors import ArtifactError, BackendError, OptionError
from dsgnn.runtime.images import read_image
from dsgnn.runtime.letterbox import Rule, letterbox
from dsgnn.runtime.postprocess import postprocess
from dsgnn.runtime.telemetry import import_without_telemetry

if TYPE_CHECKING:
    from dsgnn.export.onnx import ExportSource
    from dsgnn.runtime.artifact import Artifact, Description

Answers = dict[str, np.ndarray]
TORCH_FORMS = {
    "upstream": "PyTorch as upstream",
    "deploy": "PyTorch deploy graph",
    "compiled": "PyTorch compiled",
    "cuda-graph": "PyTorch CUDA graph",
}
STRAIGHTFORWARD, ARTIFACT = "straightforward", "artifact"
DEFAULT_FORMS = {
    "cpu": ("upstream", "deploy", "compiled", STRAIGHTFORWARD),
    "cuda": ("upstream", "deploy", "compiled"),
}
PRECISIONS = ("fp32", "fp16", "bf16")
PHOTO = (640, 480)  # width, height: the data sets' own size


@dataclass(frozen=True)
class Spec:
    """One subject before it is opened (it can be sent to another process).

    model: a file, or with `synthetic` a configuration's name. backend: for artifacts. size: (H, W)
    of a checkpoint's input, None = 4:3 at the configuration's size. precision: of PyTorch, by
    autocast below fp32. export: where a straightforward export lies.
    """

    form: str
    model: str
    synthetic: bool = False
    backend: str = "auto"
    device: str = "cpu"
    threads: int = 2
    size: tuple[int, int] | None = None
    precision: str = "fp32"
    allow_unverified: bool = False
    export: str = ""
    seed: int = 0


class Subject(Protocol):
    """An opened network. facts: the `subject` entry of the results; infer also returns
    milliseconds of the stages inside it."""

    facts: dict[str, Any]
    rule: Rule
    threshold: float

    def infer(self, images: np.ndarray, clock: Clock) -> tuple[Answers, Sample]: ...


def specs(
    models: Sequence[str],
    synthetic: Sequence[str],
    forms: Sequence[str],
    backends: Sequence[str],
    **options: Any,
) -> list[Spec]:
    """Every subject that the command line asks for; options: the other fields of `Spec`.

    Raises OptionError when nothing is asked for, or what is asked for does not go together.
    """
    checkpoints = [(m, False) for m in models if m.endswith(".safetensors")]
    checkpoints += [(config, True) for config in synthetic]
    artifacts = [m for m in models if not m.endswith(".safetensors")]
    if not checkpoints and not artifacts:
        raise OptionError(
            "nothing to measure: give a model file, or a configuration for random weights"
        )
    if backends and not artifacts:
        raise OptionError("a backend is for exported artifacts, and none was given")
    on_gpu = options.get("device", "cpu").startswith("cuda")
    if "cuda-graph" in forms and not on_gpu:
        raise OptionError("CUDA graphs need a GPU: choose device cuda, or leave them out")
    if STRAIGHTFORWARD in forms and on_gpu:
        raise OptionError(
            "the straightforward export is timed on the CPU: name other forms, or device cpu"
        )
    found = [
        Spec(form, model, is_synthetic, **options)
        for model, is_synthetic in checkpoints
        for form in forms
    ]
    found += [
        Spec(ARTIFACT, model, backend=backend, **options)
        for model in artifacts
        for backend in backends or ("auto",)
    ]
    return found


def photos() -> list[bytes]:
    """The package's sample photos as 640 × 480 JPEGs."""
    encoded = []
    for path in samples():
        image = cv2.resize(read_image(path), PHOTO, interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        encoded.append(data.tobytes())
    return encoded


def run_once(subject: Subject, batch: Sequence[bytes], clock: Clock) -> Sample:
    """Encoded photos → rankings once; milliseconds by stage and end to end.

    Every query is post-processed when none passes the threshold, as with random weights.
    """
    start = clock()
    images = [read_image(photo) for photo in batch]
    decoded = clock()
    fitted = [letterbox(image, subject.rule) for image in images]
    stacked = np.stack([padded for padded, _ in fitted])  # (B, H, W, 3)
    ready = clock()
    answers, inside = subject.infer(stacked, clock)
    answered = clock()
    for b, (_, geometry) in enumerate(fitted):
        saliency, score, masks = (answers[name][b] for name in ("saliency", "score", "masks"))
        postprocess(saliency, score, masks, geometry, subject.threshold, "all")
    end = clock()
    return {
        "decode": 1e3 * (decoded - start),
        "preprocess": 1e3 * (ready - decoded),
        **inside,
        "postprocess": 1e3 * (end - answered),
        END_TO_END: 1e3 * (end - start),
    }


def open_subject(spec: Spec) -> Subject:
    """Raises OptionError, ArtifactError, BackendError or CheckpointError."""
    if spec.form == ARTIFACT:
        return ArtifactSubject(spec)
    if spec.form == STRAIGHTFORWARD:
        return StraightforwardSubject(spec)
    if spec.form in TORCH_FORMS:
        return TorchSubject(spec)
    raise OptionError(f"unknown form {spec.form!r}")


class ArtifactSubject:
    """An exported file as `dsgnn-run` runs it. On a GPU, compute includes both transfers."""

    def __init__(self, spec: Spec):
        ranker = Ranker(
            spec.model, spec.backend, spec.device, spec.threads, if_none="all", specks="keep"
        )
        self.ranker, artifact = ranker, ranker.artifact
        check_verified(artifact, spec.allow_unverified)
        self.rule, self.threshold = artifact.description.input, ranker.threshold
        self._infer = ranker.backend.infer
        self.facts = {
            **ranker.describe(),
            "name": f"{artifact.path.name} · {ranker.backend.name}",
            "form": ARTIFACT,
            "threads": ranker.backend.threads,
            "input": str(self.rule),
            "bytes": artifact.path.stat().st_size,
            "source_sha256": artifact.description.source_sha256,
        }

    def infer(self, images: np.ndarray, clock: Clock) -> tuple[Answers, Sample]:
        start = clock()
        answers = self._infer({"image": images})
        return answers, {"compute": 1e3 * (clock() - start)}


class StraightforwardSubject:
    """A file of `export_straightforward` in ONNX Runtime as it comes."""

    def __init__(self, spec: Spec):
        from dsgnn.runtime.artifact import Description, sha256_of
        from dsgnn.runtime.backends.onnx import check_packages

        check_packages()
        onnxruntime = import_without_telemetry("onnxruntime")
        path = Path(spec.export)
        description = Description.from_json(facts_of(path).read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec.threads  # equal for all; the rest is the default
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.rule, self.threshold = description.input, description.threshold
        self.facts = _facts(
            spec,
            description,
            path,
            name=f"{_title(spec)} · straightforward ONNX export",
            sha256=sha256_of(path),
            status="baseline",
            precision="fp32",
            backend="onnxruntime",
            device="cpu",
        )

    def infer(self, images: np.ndarray, clock: Clock) -> tuple[Answers, Sample]:
        names = [output.name for output in self._session.get_outputs()]
        start = clock()
        values = self._session.run(names, {"image": images})
        return dict(zip(names, values, strict=True)), {"compute": 1e3 * (clock() - start)}


class TorchSubject:
    """A checkpoint in this process, which it sets to one GPU and to float32 without TF32; there
    transfers and compute are timed by CUDA events."""

    def __init__(self, spec: Spec):
        import torch

        on_gpu = spec.device.startswith("cuda")
        if on_gpu and not torch.cuda.is_available():
            raise BackendError(
                f"device {spec.device} was asked for, but PyTorch {torch.__version__} sees no GPU: "
                "install an NVIDIA driver and a CUDA build of PyTorch, or choose device cpu"
            )
        if spec.form == "cuda-graph" and not on_gpu:
            raise OptionError("CUDA graphs need a GPU: choose device cuda")
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if spec.form == "compiled" and not on_gpu and not any(map(shutil.which, compilers)):
            raise BackendError(
                "torch.compile needs a C++ compiler, and there is none: install g++, or leave it "
                "out by naming the other forms"
            )
        # after the refusals: these take seconds to import
        from dsgnn.export.deploy.network import DeployGraph
        from dsgnn.export.onnx import describe

        source, size = read(spec)
        self.source = source
        description = describe(source, size)
        self.rule, self.threshold = description.input, description.threshold
        self._form, self._on_gpu, self._device = spec.form, on_gpu, torch.device(spec.device)
        if on_gpu:
            torch.cuda.set_device(self._device.index or 0)  # events, streams and graphs are of it
            torch.backends.cudnn.allow_tf32 = False  # as everywhere here, float32 is float32
        types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        self._dtype = types[spec.precision]
        if not on_gpu:
            torch.set_num_threads(spec.threads)
        network: Any = source.model
        if spec.form != "upstream":
            network = DeployGraph(source.model, size).eval()
        self._network = network.to(self._device)
        if spec.form == "compiled":
            self._network = torch.compile(self._network)
        self._graphs: dict[int, Any] = {}
        precision = "" if spec.precision == "fp32" else f" {spec.precision}"
        self.facts = _facts(
            spec,
            description,
            None if spec.synthetic else Path(spec.model),
            name=f"{_title(spec)} · {TORCH_FORMS[spec.form]}{precision}",
            sha256=source.sha256,
            status="checkpoint",
            precision=spec.precision,
            backend="pytorch",
            device=spec.device,
        )

    def infer(self, images: np.ndarray, clock: Clock) -> tuple[Answers, Sample]:
        import torch

        if not self._on_gpu:
            start = clock()
            with torch.inference_mode():
                outputs = self._compute(torch.from_numpy(images))
            return _answers(outputs), {"compute": 1e3 * (clock() - start)}
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        with torch.inference_mode():
            marks[0].record()
            image = torch.from_numpy(images).to(self._device)
            marks[1].record()
            outputs = self._replay(image) if self._form == "cuda-graph" else self._compute(image)
            marks[2].record()
            answers = _answers(outputs)
            marks[3].record()
        marks[3].synchronize()
        stages = ("host_to_device", "compute", "device_to_host")
        return answers, {
            stage: marks[i].elapsed_time(marks[i + 1]) for i, stage in enumerate(stages)
        }

    def close(self) -> None:
        """Give the device memory back."""
        self._graphs.clear()
        self._network = None

    def _compute(self, image: Any) -> tuple[Any, ...]:
        import torch

        from dsgnn.model import normalise

        # a cache of cast weights would outlive the pool of a captured graph
        cache = self._form != "cuda-graph"
        kind, half = self._device.type, self._dtype != torch.float32
        with torch.autocast(kind, self._dtype, enabled=half, cache_enabled=cache):
            if self._form != "upstream":
                return self._network(image)
            out = self._network(normalise(image), training_outputs=True)
            return out.answers()

    def _replay(self, image: Any) -> tuple[Any, ...]:
        """One captured graph per batch size; its first use warms up on a side stream."""
        import torch

        batch = image.shape[0]
        if batch not in self._graphs:
            held, side = image.clone(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._compute(held)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self._compute(held)
            self._graphs[batch] = (graph, held, outputs)
        graph, held, outputs = self._graphs[batch]
        held.copy_(image)
        graph.replay()
        return outputs


def read(spec: Spec) -> tuple[ExportSource, tuple[int, int]]:
    """The network of a spec's checkpoint or configuration, and its input's height and width."""
    from dsgnn.export.onnx import default_size, read_source

    checkpoint, config = (None, spec.model) if spec.synthetic else (spec.model, None)
    source = read_source(checkpoint, config, spec.seed)
    return source, spec.size or default_size(source.model.config)


def check_verified(artifact: Artifact, allow_unverified: bool) -> None:
    """Raise ArtifactError for an artifact that is not verified, unless that is allowed."""
    if artifact.status != "verified" and not allow_unverified:
        raise ArtifactError(
            f"{artifact.path} is unverified: nobody has checked that it gives the network's "
            "answers. Export it again (dsgnn-export checks it), or allow unverified artifacts, and "
            "the results will be marked"
        )


def export_straightforward(spec: Spec) -> None:
    """Write the network as it is to `spec.export`, with its description beside it."""
    import onnx
    import torch

    from dsgnn.export.onnx import build_onnx, describe
    from dsgnn.model import normalise

    class AsItIs(torch.nn.Module):
        """A wrapper: the exporter cannot take a module with an attribute called `graph`."""

        def __init__(self, network: torch.nn.Module):
            super().__init__()
            self.network = network

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = self.network(normalise(image))
            return out.answers()

    source, size = read(spec)
    outputs = source.model.config.outputs
    proto = build_onnx(AsItIs(source.model).eval(), outputs, size, size)
    path = Path(spec.export)
    facts_of(path).write_text(describe(source, size).to_json())
    with whole_file(path) as part:
        onnx.save(proto, part)


def facts_of(export: Path) -> Path:
    """Where the description of a straightforward export lies."""
    return export.with_suffix(".facts.json")


def _facts(spec: Spec, about: Description, path: Path | None, **own: str) -> dict[str, Any]:
    """The facts of a subject that no `Ranker` describes. path: of the file that it was read from,
    if it was."""
    return {
        **own,
        "form": spec.form,
        "file": path.name if path else None,
        "config": about.config,
        "weights": about.weights,
        "threads": spec.threads,
        "input": str(about.input),
        "bytes": path.stat().st_size if path else None,
        "source_sha256": about.source_sha256,
    }


def _title(spec: Spec) -> str:
    return spec.model if spec.synthetic else Path(spec.model).name


def _answers(outputs: Sequence[Any]) -> Answers:
    names = ("saliency", "score", "masks", "attention")[: len(outputs)]
    return {name: x.float().cpu().numpy() for name, x in zip(names, outputs, strict=True)}
