"""ONNX Runtime for browsers: the files that a site needs, of one release, known by their hashes.

They come from the npm registry: by npm where it is installed, so that the user's own settings hold,
else from the public registry. They are kept, so that this is done once.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from dsgnn.runtime.artifact import sha256_of
from dsgnn.runtime.disk.files import cache_folder, write_whole
from dsgnn.runtime.errors import BackendError
from dsgnn.runtime.fence import WITH_PARENT

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# Of the package, in base64; npm's lock files write it as "sha512-…".
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# sha256 of what is taken. "jspi" is the build with WebGPU for browsers that can suspend
# WebAssembly. It is 10 MB smaller than the one for those that cannot.
WASM = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": (
        "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b"
    ),
    "ort-wasm-simd-threaded.wasm": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
}
WEBGPU = {
    "ort.jspi.min.mjs": "bc57179d923fda2d88d4a395359c8df44399dde087bf9ff44fc0e40ab398e4d9",
    "ort-wasm-simd-threaded.jspi.mjs": (
        "270e2c6da9f297239d301d329782b6446641cb1e16a77967690adcfca35f3268"
    ),
    "ort-wasm-simd-threaded.jspi.wasm": (
        "a54c76f86b0f0d9572380cf1c6292a7b3903716ffcbcd6b0e5c7050bf430eb93"
    ),
}
FILES = {**WASM, **WEBGPU}
ADDRESS = f"https://registry.npmjs.org/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz"
SECONDS = 600  # for the package's 33 MB


def fetch_runtime() -> Path:
    """The folder with FILES: the kept one, or a new one from the registry.

    Raises BackendError if the registry cannot be reached or gives other bytes, OSError if they
    cannot be kept.
    """
    if kept := kept_runtime():
        return kept
    folder = _cache()
    with tempfile.TemporaryDirectory() as place:
        archive = _download(Path(place))
        got = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if got != SHA512:
            raise BackendError(
                f"the registry gave another {PACKAGE} {VERSION} than expected: sha512-{got} in "
                f"place of sha512-{SHA512}; get the package elsewhere, and give its folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as package:
            for name in FILES:
                member = package.extractfile(f"package/dist/{name}")
                assert member is not None  # the archive is the one that we know
                write_whole(folder / name, member.read())
    return check_runtime(folder)


def kept_runtime() -> Path | None:
    """The folder with FILES, if they were fetched before."""
    return None if _wrong(_cache()) else _cache()


def check_runtime(folder: Path) -> Path:
    """The folder that holds FILES: this one, or `dist` in it, as in the package.

    Raises BackendError unless they are those of this release.
    """
    found = folder / "dist" if (folder / "dist").is_dir() else folder
    if wrong := _wrong(found):
        raise BackendError(
            f"{found} must hold {', '.join(FILES)} of {PACKAGE} {VERSION}, and has not, or not "
            f"those: {', '.join(wrong)}"
        )
    return found


def _cache() -> Path:
    return cache_folder() / f"{PACKAGE}-{VERSION}"


def _wrong(folder: Path) -> list[str]:
    """The names of FILES that are missing in a folder or have another hash."""
    paths = {name: folder / name for name in FILES}
    return [n for n, path in paths.items() if not path.is_file() or sha256_of(path) != FILES[n]]


def _download(place: Path) -> Path:
    """Put the package's archive into a folder. Raises BackendError."""
    archive = place / f"{PACKAGE}-{VERSION}.tgz"
    try:
        if npm := shutil.which("npm"):
            command = [npm, "pack", f"{PACKAGE}@{VERSION}"]
            how: dict[str, Any] = {"cwd": place, "timeout": SECONDS, **WITH_PARENT}
            subprocess.run(command, check=True, capture_output=True, **how)
        else:
            with urllib.request.urlopen(ADDRESS, timeout=SECONDS) as answer:
                archive.write_bytes(answer.read())
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        reason = said.decode(errors="replace").strip()[-300:] if said else str(error)
        raise BackendError(
            f"{PACKAGE} {VERSION} could not be fetched from the npm registry: {reason}; get the "
            "package elsewhere, and give its folder"
        ) from error
    return archive
