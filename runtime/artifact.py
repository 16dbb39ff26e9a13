"""What an artifact says about itself, and what is known about the file.

Static facts (`Description`) travel inside the ONNX file as one metadata entry named `dsgnn`. What
happened to the file (`Sidecar`: its hash, parity checks, machine, build) lies beside it in
`<artifact>.json`. Neither needs the onnx package to be read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from dsgnn.runtime.disk.documents import parse_document, text_of
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.disk.onnx_file import check_whole, onnx_metadata
from dsgnn.runtime.errors import ArtifactError, OptionError
from dsgnn.runtime.letterbox import PAD, Fixed, LongestSide, Rule

METADATA_KEY = "dsgnn"
DESCRIPTION_SCHEMA = "dsgnn.artifact/1"
SIDECAR_SCHEMA = "dsgnn.sidecar/1"
ORDERS = ("saliency", "attention")
WEIGHTS = ("trained", "published", "converted", "synthetic")
ENGINES = (".engine", ".plan")
KINDS = {  # Python's types in the words of JSON
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
PRECISIONS = ("fp32", "w16", "fp16", "bf16", "int8")  # w16: float32 on weights stored as float16


@dataclass(frozen=True)
class Description:
    """Static facts of an artifact.

    config: the network's configuration name. input: the letterbox rule its input expects (RGB,
    padded with 128). queries: Q. threshold: score above which an object is kept. precision: of the
    graph's weights and activations. weights: "trained", "published", "converted" (of unknown
    origin) or "synthetic" (random: its rankings mean nothing). source_sha256: of the checkpoint.
    toolkit: version of dsgnn. attention: whether the graph has the output `attention`, (B, gh, gw)
    float32, where people look: a softmax over a grid that covers the padded photo. order: what
    ranks the objects, the network's "saliency" or the share of its "attention" that each object
    gets. nms_iou: as for `dsgnn.runtime.postprocess.postprocess`. origin: what trained weights were
    trained on and for how long, in words; "" = not recorded.
    Raises ArtifactError for values outside these.
    """

    config: str
    input: Rule
    queries: int
    threshold: float
    precision: str
    weights: str
    source_sha256: str
    toolkit: str
    attention: bool = False
    order: str = "saliency"
    nms_iou: float = 1.0
    origin: str = ""

    def __post_init__(self) -> None:
        for name, known in (("precision", PRECISIONS), ("weights", WEIGHTS), ("order", ORDERS)):
            if (value := getattr(self, name)) not in known:
                raise ArtifactError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.queries < 1 or not 0 <= self.threshold < 1:
            raise ArtifactError(
                "expected queries ≥ 1 and a threshold of at least 0 and below 1, got "
                f"{self.queries} and {self.threshold}"
            )
        if not 0 < self.nms_iou <= 1:
            raise ArtifactError(f"nms_iou must be above 0 and at most 1, got {self.nms_iou}")
        if self.order == "attention" and not self.attention:
            raise ArtifactError("the order is that of attention, but there is no attention output")

    @property
    def about_weights(self) -> str:
        """Where the weights are from, for a person."""
        if self.origin:
            return f"{self.weights} on {self.origin}"
        notes = {"converted": ", origin unknown", "synthetic": ", so the ranks mean nothing"}
        return f"{self.weights} weights{notes.get(self.weights, '')}"

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        rule = "fixed" if isinstance(self.input, Fixed) else "longest"
        facts["input"] = {"rule": rule, **asdict(self.input), "pad": PAD, "colour": "rgb"}
        if not self.attention:  # said only of artifacts that have it, so others stay as they were
            del facts["attention"], facts["order"]
        if self.nms_iou == 1:
            del facts["nms_iou"]
        if not self.origin:
            del facts["origin"]
        return {"schema": DESCRIPTION_SCHEMA, **facts}

    def to_json(self) -> str:
        """The value of the ONNX metadata entry `dsgnn`."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Description:
        """Raises ArtifactError for another schema or a fact that is missing or of another kind."""
        _check_schema(facts, DESCRIPTION_SCHEMA)
        what = "the artifact's description"
        facts = {"attention": False, "order": "saliency", "nms_iou": 1.0, "origin": "", **facts}
        kinds = {**get_type_hints(cls), "input": dict}
        own = {one.name: _fact(what, facts, one.name, kinds[one.name]) for one in fields(cls)}
        return cls(**{**own, "input": _rule(what, own["input"])})

    @classmethod
    def from_json(cls, text: str) -> Description:
        return cls.from_dict(_load(text, "the artifact's description"))


def _rule(what: str, facts: Mapping[str, Any]) -> Rule:
    pad, colour = _fact(what, facts, "pad", int), _fact(what, facts, "colour", str)
    if (pad, colour) != (PAD, "rgb"):
        raise ArtifactError(
            f"expected an input in rgb padded with {PAD}, got {colour!r} padded with {pad}"
        )
    rule = _fact(what, facts, "rule", str)
    try:
        if rule == "fixed":
            return Fixed(*(_fact(what, facts, side, int) for side in ("height", "width")))
        if rule == "longest":
            return LongestSide(*(_fact(what, facts, side, int) for side in ("size", "multiple")))
    except OptionError as error:
        raise ArtifactError(f"{what}: {error}") from error
    raise ArtifactError(f"input rule must be fixed or longest, got {rule!r}")


@dataclass(frozen=True)
class Sidecar:
    """What is known about one artifact file.

    file: its name. sha256: of its bytes. verified: in some place, which is a backend on a kind of
    device, every parity check passed; `verdicts` has each place. parity: one mapping per check; its
    `backend` is the `picked` of what ran the file, such as "openvino on cpu, 2 threads". machine:
    where it was verified last, or else built. build: versions, options, seconds. description: of
    engines, which cannot carry it inside.
    """

    file: str
    sha256: str
    verified: bool
    parity: tuple[Mapping[str, Any], ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    description: Description | None = None

    def place(self, check: Mapping[str, Any]) -> str:
        """Where a check ran, such as "onnxruntime on cpu". Older ones do not say: exports run in
        ONNX Runtime on the CPU, and engines in their own library."""
        flavour = self.build.get("flavour")
        usual = f"{flavour} on cuda" if flavour else "onnxruntime on cpu"
        name, _, device = str(check.get("backend", usual)).partition(" on ")
        return _place(name, device)

    def verdicts(self) -> dict[str, bool]:
        """Whether every check passed, for each place where the file was compared."""
        found: dict[str, bool] = {}
        for check in self.parity:
            place = self.place(check)
            found[place] = found.get(place, True) and bool(check.get("passed", self.verified))
        return found if self.parity else {self.place({}): self.verified}

    def to_json(self) -> str:
        facts = {"schema": SIDECAR_SCHEMA, **asdict(self)}
        facts["verdicts"] = self.verdicts() if self.parity else {}  # for readers; not read back
        facts["description"] = self.description.to_dict() if self.description else None
        return json.dumps(facts, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Sidecar:
        """Raises ArtifactError for another schema or a fact that is missing or of another kind."""
        facts = _load(text, "the sidecar")
        _check_schema(facts, SIDECAR_SCHEMA)
        what, description = "the sidecar", None
        if facts.get("description") is not None:
            description = Description.from_dict(_fact(what, facts, "description", dict))
        return cls(
            file=_fact(what, facts, "file", str),
            sha256=_fact(what, facts, "sha256", str),
            verified=_fact(what, facts, "verified", bool),
            parity=tuple(_fact(what, facts, "parity", list)),
            machine=_fact(what, facts, "machine", dict),
            build=_fact(what, facts, "build", dict),
            description=description,
        )


def _place(backend: str, device: str) -> str:
    """A backend and a kind of device in words. A CUDA graph is the same engine."""
    return f"{backend.removesuffix('-cuda-graph')} on {re.split('[:, ]', device)[0]}"


@dataclass(frozen=True)
class Artifact:
    """An artifact that may be loaded: its path, facts, hash, and whether it was proven equal."""

    path: Path
    description: Description
    sha256: str
    sidecar: Sidecar | None

    @property
    def status(self) -> str:
        """ "verified" or "unverified" (no sidecar, or its checks did not run or pass)."""
        return "verified" if self.sidecar and self.sidecar.verified else "unverified"

    @property
    def about_status(self) -> str:
        """What the status means, for a person."""
        verdicts = self.sidecar.verdicts() if self.sidecar else {}
        return self._about([place for place, passed in verdicts.items() if passed])

    def _about(self, places: Sequence[str]) -> str:
        """What the status means in these places, where every check passed."""
        if self.sidecar is None:
            return "unverified (no sidecar beside it)"
        checks = [check for check in self.sidecar.parity if self.sidecar.place(check) in places]
        counts: dict[str, int] = {}  # by place
        for check in checks:
            # Beside the comparing of photos there is one of places in a batch, with few of them.
            if check.get("check", "photos") == "photos" and "photos" in check:
                place = self.sidecar.place(check)
                counts[place] = min(check["photos"], counts.get(place, check["photos"]))
        if not self.sidecar.verified or not counts:
            return self.status
        against = str(checks[0].get("against", ""))  # of older files not known
        source = f"the answers of {against}" if against.endswith(".onnx") else "PyTorch's answers"
        few, many = min(counts.values()), max(counts.values())
        more = "" if few == many else " or more"
        return f"verified (gives {source} on {few} photos{more})"

    def status_in(self, backend: str, device: str) -> str:
        """The status where this backend runs it on this device, as a `Backend` names them:
        "verified" only if it was compared there, by whichever machine, and passed."""
        verdicts = self.sidecar.verdicts() if self.sidecar else {}
        return "verified" if verdicts.get(_place(backend, device)) else "unverified"

    def about_status_in(self, backend: str, device: str) -> str:
        """What that status means, for a person."""
        here = _place(backend, device)
        verdicts = self.sidecar.verdicts() if self.sidecar else {}
        if verdicts.get(here) or self.status == "unverified":
            return self._about([here])
        elsewhere = " and ".join(place for place, passed in verdicts.items() if passed)
        why = "gives other answers there" if here in verdicts else "never compared there"
        return f"unverified in {here} ({why}; verified in {elsewhere})"


def open_artifact(path: Path) -> Artifact:
    """Read and check an artifact and its sidecar; nothing is run.

    Raises FileNotFoundError; ArtifactError if it is not an ONNX file of dsgnn or an engine with a
    sidecar, or has changed since its sidecar was written.
    """
    if path.suffix not in (".onnx", *ENGINES):
        raise ArtifactError(f"expected a model file ending in .onnx or .engine, got {path.name}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file at {path}")
    sidecar = read_sidecar(path)
    if path.suffix in ENGINES:
        if sidecar is None or sidecar.description is None:
            raise ArtifactError(
                f"{path.name} is native code and nothing beside it says what it is: keep "
                f"{sidecar_path(path).name} with it, or build it again with `dsgnn-export tensorrt`"
            )
        description = sidecar.description
        remedy = "build it again with `dsgnn-export tensorrt`"
    else:
        description = read_description(path)
        check_whole(path)
        remedy = "export the checkpoint again, or delete the sidecar to use the file as unverified"
    digest = sha256_of(path)
    if sidecar and sidecar.sha256 != digest:
        raise ArtifactError(
            f"{path.name} is not the file that {sidecar_path(path).name} describes: expected "
            f"sha256 {sidecar.sha256}, got {digest}; {remedy}"
        )
    return Artifact(path, description, digest, sidecar)


def read_description(path: Path) -> Description:
    """The description inside an ONNX file. Raises ArtifactError when there is none."""
    metadata = onnx_metadata(path)
    if METADATA_KEY not in metadata:
        raise ArtifactError(
            f"{path.name} has no `{METADATA_KEY}` metadata, so it was not made by this toolkit: "
            "export a checkpoint with `dsgnn-export onnx`"
        )
    return Description.from_json(metadata[METADATA_KEY])


def sidecar_path(artifact: Path) -> Path:
    """`model.onnx` → `model.onnx.json`, beside it."""
    return artifact.with_name(artifact.name + ".json")


def read_sidecar(artifact: Path) -> Sidecar | None:
    """The artifact's sidecar, or None if it has none. Raises ArtifactError if it is damaged."""
    path = sidecar_path(artifact)
    if not path.exists():
        return None
    try:
        return Sidecar.from_json(text_of(path))
    except ValueError as error:
        raise ArtifactError(f"{path.name}: {error}") from error


def write_sidecar(artifact: Path, sidecar: Sidecar) -> None:
    """Write the sidecar beside its artifact, whole or not at all."""
    write_whole(sidecar_path(artifact), sidecar.to_json().encode())


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(text: str, what: str) -> dict[str, Any]:
    try:
        facts = parse_document(text)
    except ValueError as error:
        raise ArtifactError(f"{what} is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ArtifactError(f"{what} must be a JSON object, got {type(facts).__name__}")
    return facts


def _fact(what: str, facts: Mapping[str, Any], name: str, kind: type) -> Any:
    """One fact. Raises ArtifactError if it is missing or of another kind."""
    if name not in facts:
        raise ArtifactError(f"{what} lacks {name!r}")
    value = facts[name]
    fits = kind is float and type(value) is int  # JSON may write 0.0 as 0
    if type(value) is not kind and not fits:
        raise ArtifactError(f"{what} expects {name!r} to be {KINDS[kind]}, got {value!r}")
    return value


def _check_schema(facts: Mapping[str, Any], expected: str) -> None:
    if facts.get("schema") != expected:
        raise ArtifactError(
            f"expected schema {expected}, got {facts.get('schema')!r}: it was made by another "
            "version of dsgnn; export the checkpoint again or use that version"
        )
