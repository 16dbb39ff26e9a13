"""Nothing is reported to anybody: the telemetry of the libraries that rank is switched off.

ONNX Runtime, OpenVINO and Ray look up a host of their makers and leave an identity of the machine
in the user's folders, from their import on. This toolkit imports them through this module alone.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

# ONNX Runtime and Ray read these when they are imported. Child processes inherit them.
SWITCHES = {"ORT_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def import_without_telemetry(name: str) -> Any:
    """Import `onnxruntime`, `openvino`, `ray` or a module of theirs with telemetry switched off.

    A switch that the environment sets already is left as it is. Where a library was imported before
    by somebody else, its telemetry stays as it was then. Raises ImportError.
    """
    for variable, value in SWITCHES.items():
        os.environ.setdefault(variable, value)
    # OpenVINO has no switch. It works without this package of its makers, which only reports.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_module(name)
