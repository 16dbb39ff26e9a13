"""Where the figures were measured, and what was going on there. Unreadable facts are None."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsgnn.export.parity.limits import LIBRARIES, versions

OTHERS = ("dsgnn", "torchvision", "timm", "onnxscript", "opencv-python", "mlcommons-loadgen")
GPU_FACTS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "clocks_event_reasons.active",
)
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "CUDA_VISIBLE_DEVICES")
Shell = Callable[[list[str]], "str | None"]


def shell(command: list[str]) -> str | None:
    """What a command prints, or None when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def environment(run: Shell = shell, root: Path = Path("/")) -> dict[str, Any]:
    """What does not change during a run. root: where /proc and /sys are."""
    cpu = read_text(root / "proc/cpuinfo")
    memory = _field(read_text(root / "proc/meminfo"), "MemTotal")
    here = str(Path(__file__).parent)
    revision, changed = (
        run(["git", "-C", here, *command])
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
    )
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    governor = read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": _field(cpu, "model name") or platform.processor() or platform.machine(),
        "cpu_flags": sorted((_field(cpu, "flags") or _field(cpu, "Features") or "").split()),
        "cores": os.cpu_count(),
        "cores_allowed": affinity,
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "governor": governor or None,
        "gpus": gpus(run),
        "libraries": versions((*LIBRARIES, *OTHERS)),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "git": {
            "revision": revision.strip() if revision else None,
            "changed": bool(changed.strip()) if changed is not None else None,
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def conditions(run: Shell = shell, root: Path = Path("/")) -> dict[str, Any]:
    """What changes: load, clocks, throttling and processor ticks, to be read before and after."""
    info = read_text(root / "proc/cpuinfo").splitlines()
    clocks = [float(line.split(":")[1]) for line in info if line.startswith("cpu MHz")]
    throttled = [
        int(path.read_text())
        for path in root.glob("sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
    ]
    load = read_text(root / "proc/loadavg")
    return {
        "load": float(load.split()[0]) if load else None,
        "cpu_mhz": clocks or None,
        "throttle_count": sum(throttled) if throttled else None,
        "ticks": _ticks(read_text(root / "proc/stat")),
        "gpus": gpus(run),
    }


def conditions_since(before: dict[str, Any]) -> dict[str, Any]:
    """The conditions before and now, and what was stolen between them, for the results."""
    after = conditions()
    return {"before": before, "after": after, "stolen": stolen(before, after)}


def stolen(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Share of processor time that the machine's host gave to others between two conditions."""
    return _share("steal", before, after)


def busy(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Share of the machine's processor time that was used between two conditions."""
    idle = _share("idle", before, after)
    return None if idle is None else 1 - idle


def _share(kind: str, before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """The share of the processor's ticks between two conditions that are of one kind."""
    if not before["ticks"] or not after["ticks"]:
        return None
    some, total = (after["ticks"][name] - before["ticks"][name] for name in (kind, "total"))
    return some / total if total > 0 else None


def gpus(run: Shell = shell) -> list[dict[str, str]]:
    """One mapping of `GPU_FACTS` per NVIDIA GPU; [] without one."""
    text = run(["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader"])
    lines = (text or "").strip().splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return [dict(zip(GPU_FACTS, row, strict=True)) for row in rows if len(row) == len(GPU_FACTS)]


def peak_mib(root: Path = Path("/")) -> float | None:
    """This process's largest resident memory since it began, or since `reset_peak`, in MiB.

    VmHWM, not getrusage: that one keeps what the parent held before this process began.
    """
    peak = _field(read_text(root / "proc/self/status"), "VmHWM")
    return int(peak.split()[0]) / 1024 if peak else None


def reset_peak(root: Path = Path("/")) -> bool:
    """Start the peak over; False where the system does not allow it."""
    try:
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def read_text(path: Path) -> str:
    """The text of a file of the system, "" where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _field(text: str, name: str) -> str | None:
    """ "VmHWM:   1234 kB" → "1234 kB"."""
    found = [line for line in text.splitlines() if line.partition(":")[0].strip() == name]
    return found[0].partition(":")[2].strip() if found else None


def _ticks(stat: str) -> dict[str, int] | None:
    """First line of /proc/stat: user nice system idle iowait irq softirq steal (then parts)."""
    cells = stat.split("\n")[0].split()
    if not cells or cells[0] != "cpu" or len(cells) < 9:
        return None
    values = [int(cell) for cell in cells[1:9]]
    return {"total": sum(values), "idle": values[3] + values[4], "steal": values[7]}
