"""What an engine can be asked for, told before anything heavy is imported or built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsgnn.runtime.artifact import Artifact
from dsgnn.runtime.backends.tensorrt import FLAVOURS
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.letterbox import Fixed


def check_options(
    artifact: Artifact,
    flavour: str,
    batch: Sequence[int],
    sms: Sequence[int],
    timing_cache: Path | None,
) -> None:
    """Raise OptionError for an ONNX file that takes photos of any size, or for options that do not
    fit together; they are those of `dsgnn.export.tensorrt.build_engine`."""
    rule = artifact.description.input
    if not isinstance(rule, Fixed):
        height, width = rule.geometry(3, 4).padded
        raise OptionError(
            f"{artifact.path.name} takes photos of any size, and an engine takes one: export its "
            f"checkpoint at a fixed size first, such as {height}x{width}"
        )
    if flavour not in FLAVOURS:
        raise OptionError(f"flavour must be one of {', '.join(FLAVOURS)}, got {flavour!r}")
    if len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise OptionError(f"batch must be 1 ≤ min ≤ opt ≤ max, got {','.join(map(str, batch))}")
    if flavour == "tensorrt" and sms:
        raise OptionError(
            "TensorRT builds for the GPU that is present: name no GPU generations, or build for "
            "TensorRT-RTX"
        )
    if flavour == "tensorrt-rtx" and not sms:
        raise OptionError("TensorRT-RTX builds for named GPU generations: name them, as 89,120")
    if flavour == "tensorrt-rtx" and timing_cache:
        raise OptionError("TensorRT-RTX measures nothing when it builds: it takes no timing cache")
