"""What is read off a machine, from made-up /proc and /sys folders and commands."""

from pathlib import Path

from dsgnn.benchmarks.environment import (
    GPU_FACTS,
    conditions,
    environment,
    gpus,
    peak_mib,
    reset_peak,
    stolen,
)


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def nothing(command: list[str]) -> None:
    return None


def test_processor_memory_and_revision(tmp_path: Path) -> None:
    info = "processor\t: 0\nmodel name\t: Fast One\ncpu MHz\t\t: 2100.5\nflags\t\t: sse avx2\n"
    write(tmp_path, "proc/cpuinfo", info)
    write(tmp_path, "proc/meminfo", "MemTotal:       25165824 kB\nMemFree: 1 kB\n")

    def run(command: list[str]) -> str | None:
        answers = {"rev-parse": "abc123\n", "status": ""}
        return next((text for word, text in answers.items() if word in command), None)

    found = environment(run, tmp_path)
    assert (found["cpu"], found["cpu_flags"]) == ("Fast One", ["avx2", "sse"])
    assert found["memory_gib"] == 24
    assert found["git"] == {"revision": "abc123", "changed": False}
    assert "numpy" in found["libraries"]


def test_what_cannot_be_read_is_none_not_invented(tmp_path: Path) -> None:
    found = environment(nothing, tmp_path)
    assert found["memory_gib"] is None and found["governor"] is None and found["gpus"] == []
    assert found["git"] == {"revision": None, "changed": None}
    empty = {"load": None, "cpu_mhz": None, "throttle_count": None, "ticks": None, "gpus": []}
    assert conditions(nothing, tmp_path) == empty
    assert peak_mib(tmp_path) is None and not reset_peak(tmp_path)


def test_clocks_throttling_and_load(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "cpu MHz\t: 2100.5\nmodel name: x\n\ncpu MHz\t: 800\n")
    write(tmp_path, "proc/loadavg", "1.25 2 3 1/99 1234\n")
    for core, count in enumerate((3, 4)):
        folder = f"sys/devices/system/cpu/cpu{core}/thermal_throttle"
        write(tmp_path, f"{folder}/core_throttle_count", f"{count}\n")
    found = conditions(nothing, tmp_path)
    assert (found["cpu_mhz"], found["throttle_count"], found["load"]) == ([2100.5, 800], 7, 1.25)


def test_stolen_time_is_the_share_between_two_readings(tmp_path: Path) -> None:
    write(tmp_path, "proc/stat", "cpu 100 0 50 800 0 0 0 50 7 7\ncpu0 1 1 1\n")
    before = conditions(nothing, tmp_path)
    write(tmp_path, "proc/stat", "cpu 150 0 60 820 0 0 0 70 9 9\n")
    assert stolen(before, conditions(nothing, tmp_path)) == 20 / 100
    assert stolen(before, {"ticks": None}) is None
    assert stolen(before, before) is None


def test_gpus_are_read_and_their_absence_too() -> None:
    line = ", ".join(f"value {name}" for name in GPU_FACTS)
    found = gpus(lambda command: f"{line}\n{line}\n")
    assert len(found) == 2 and found[1]["driver_version"] == "value driver_version"
    assert gpus(nothing) == [] and gpus(lambda command: "No devices were found\n") == []


def test_peak_memory_is_this_process_own(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/status", "Name:\tx\nVmPeak: 99999 kB\nVmHWM:\t   20480 kB\n")
    assert peak_mib(tmp_path) == 20
    assert reset_peak(tmp_path)
    assert (tmp_path / "proc/self/clear_refs").read_text() == "5"
