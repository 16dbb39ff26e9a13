"""Write an artifact as a static site: a page that ranks photos in the visitor's own browser.

    SITE/index.html              the page of dsgnn-serve, with the browser in place of the server
    SITE/example.html            a page of forty lines that uses dsgnn.js alone
    SITE/dsgnn.js                the module: letterbox, inference, objects, crops
    SITE/worker.js  SITE/sw.js   the page's own thread, and its files for visits without a network
    SITE/model.onnx              the artifact
    SITE/model.onnx.check.json   what it is, and a small photo with the answers that it gives here
    SITE/ort/                    ONNX Runtime for browsers, with its licence

Any web server can serve the folder. Nothing in it asks for anything outside of it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dsgnn.export.web.npm import WASM, WEBGPU, check_runtime, fetch_runtime
from dsgnn.runtime import samples
from dsgnn.runtime.artifact import ENGINES, Artifact, open_artifact
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.errors import ArtifactError, OptionError
from dsgnn.runtime.images import read_image
from dsgnn.runtime.letterbox import letterbox
from dsgnn.runtime.serving.app import PAGE, content_policy

HERE = Path(__file__).parent
SCRIPTS = ("dsgnn.js", "worker.js", "example.html")
CHECK_SCHEMA = "dsgnn.check/1"
CHECK_SIDE_PX = 160  # the longest side of the photo of the self-check
# The page's first tags, as they are on the server and as they become here.
TAG, CHARSET = '<html lang="en">', '<meta charset="utf-8">'


@dataclass(frozen=True)
class Part:
    """A part of a site: what it is, and its size in bytes."""

    name: str
    bytes: int


def build_site(model: Path, out: Path, runtime: Path | None = None) -> list[Part]:
    """Write the site of an ONNX file; returns its parts with their sizes.

    out: a new or empty folder, or an earlier site, whose files are replaced. runtime: a folder with
    the files of onnxruntime-web, such as that of the npm package; None = they are fetched once and
    kept.

    Raises FileNotFoundError; ArtifactError for what is no ONNX file of dsgnn; OptionError for a
    folder with other files in it; BackendError if the runtime cannot be had or is another one, or
    if the artifact does not run here; OSError.
    """
    artifact = open_artifact(model)
    if model.suffix in ENGINES:
        raise ArtifactError(f"{model.name} is an engine for GPUs, and browsers run ONNX files")
    if out.is_dir() and any(out.iterdir()) and not (out / "dsgnn.js").is_file():
        raise OptionError(f"{out} holds other files: give a new or an empty folder")
    library = fetch_runtime() if runtime is None else check_runtime(runtime)
    check = json.dumps(self_check(artifact))
    (out / "ort").mkdir(parents=True, exist_ok=True)
    for name in (*WASM, *WEBGPU):
        shutil.copyfile(library / name, out / "ort" / name)
    shutil.copyfile(HERE / "LICENSE.onnxruntime", out / "ort" / "LICENSE")
    shutil.copyfile(model, out / "model.onnx")
    write_whole(out / "model.onnx.check.json", check.encode())
    for name in SCRIPTS:
        shutil.copyfile(HERE / name, out / name)

    def size(*paths: Path) -> int:
        return sum(path.stat().st_size for path in paths)

    parts = [
        Part("the model", size(out / "model.onnx", out / "model.onnx.check.json")),
        Part("ONNX Runtime, WebAssembly", size(*(out / "ort" / name for name in WASM))),
        Part("ONNX Runtime, WebGPU", size(*(out / "ort" / name for name in WEBGPU))),
    ]
    write_whole(out / "index.html", _page(*(part.bytes for part in parts)).encode())
    worker = (HERE / "sw.js").read_text("utf-8").replace("VERSION", _digest(out))
    write_whole(out / "sw.js", worker.encode())
    own = (*SCRIPTS, "index.html", "sw.js", "ort/LICENSE")
    return [*parts, Part("the page, dsgnn.js and the licence", size(*(out / name for name in own)))]


def self_check(artifact: Artifact) -> dict[str, Any]:
    """What a browser compares its own answers with: a small photo, and the network's outputs.

    The answers are ONNX Runtime's on this CPU, or those of what else is installed. "rgb" and
    "masks" are bytes in base64: the photo's pixels, and the signs of the mask logits, 1 =
    positive, eight in a byte. Raises BackendError if the artifact does not run here.
    """
    photo = read_image(samples()[0])
    scale = CHECK_SIDE_PX / max(photo.shape[:2])
    photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    backend = open_backend(artifact, device="cpu")
    try:
        padded, _ = letterbox(photo, artifact.description.input)
        outputs = backend.infer({"image": padded[None]})
    finally:
        backend.close()
    answers: dict[str, Any] = {
        name: outputs[name][0].astype(np.float64).ravel().tolist()
        for name in ("saliency", "score", "attention")
        if name in outputs
    }
    answers["masks"] = _text(np.packbits(outputs["masks"][0] > 0))
    height, width, _ = photo.shape
    return {
        "schema": CHECK_SCHEMA,
        "model": {"file": artifact.path.name, "sha256": artifact.sha256, "status": artifact.status},
        "photo": {"height": height, "width": width, "rgb": _text(photo)},
        "answers": answers,
    }


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _page(model: int, wasm: int, webgpu: int) -> str:
    """The page of dsgnn-serve with the browser as its engine, and a policy that keeps it inside.

    model, wasm, webgpu: bytes that are loaded before the first photo.
    """
    page = PAGE.read_text("utf-8")
    facts = f'data-engine="browser" data-wasm="{model + wasm}" data-webgpu="{model + webgpu}"'
    policy = content_policy(page).replace("frame-ancestors 'none'", "worker-src 'self'")
    guard = f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'
    for old, new in ((TAG, f"{TAG[:-1]} {facts}>"), (CHARSET, f"{CHARSET}\n{guard}")):
        assert page.count(old) == 1
        page = page.replace(old, new)
    return page


def _digest(out: Path) -> str:
    """Of all files of a site but its service worker, which takes it as the version of the rest."""
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name != "sw.js":
            digest.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
