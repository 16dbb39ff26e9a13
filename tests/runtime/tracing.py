"""See what a command does to the network and to the disk, its children included.

strace sees every system call. Where it is missing or may not be used, hooks in Python see what is
asked for from Python, and the folders show which files were left in them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

CALLS = "%network,openat,?open,?creat,mkdirat,?mkdir,renameat2,?renameat,?rename,linkat,symlinkat"
OPTED_OUT = ("ORT_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED")  # must not come from outside
ADDRESS = re.compile(r'(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)"|sin6?_port=htons\((\d+)\)')
# strace -y writes the path behind each descriptor: openat(…, O_WRONLY|O_CREAT…) = 3</tmp/file>
OPENED = re.compile(r"(?:openat|open|creat)\(.*O_(?:CREAT|WRONLY|RDWR).* = \d+<([^>]+)>$")
MADE = re.compile(r'(?:mkdir|rename|link|symlink)\w*\(.*"([^"]+)"[^"]*\) = 0$')
HOOK = """
import os, sys
def hook(event, arguments, log=os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        os.write(log, f"look-up of {{arguments[0]}}\\n".encode())
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        os.write(log, f"{{arguments[1][0]}} {{arguments[1][1]}}\\n".encode())
sys.addaudithook(hook)
"""


@dataclass(frozen=True)
class Traced:
    """What a command did. contacts: hosts beyond loopback and look-ups of names, in words. written:
    files and folders made or opened for writing, but for devices. output: both of its streams."""

    contacts: list[str]
    written: list[Path]
    output: str

    def written_outside(self, *folders: Path) -> list[Path]:
        return [path for path in self.written if not any(map(path.is_relative_to, folders))]


def has_strace() -> bool:
    """Whether there is one that may trace here; some containers forbid it."""
    probe = ["strace", "-o", os.devnull, "true"]
    return (
        bool(shutil.which("strace")) and subprocess.run(probe, capture_output=True).returncode == 0
    )


def traced(
    command: Sequence[str | Path],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 120,
    strace: bool | None = None,
) -> Traced:
    """Run a command to its end with a home and a folder for temporary files that are new.

    folder: empty; gets `home`, `temporary`, `work` (where the command runs) and the traces.
    environment: more variables. strace: None = where there is one. Fails if the command does.
    """
    home, temporary, work = (folder / name for name in ("home", "temporary", "work"))
    for one in (home, temporary, work):
        one.mkdir(parents=True)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in OPTED_OUT and not name.startswith("XDG_")
    }
    kept |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    kept |= environment or {}
    traces = folder / "traces"
    traces.mkdir()
    if strace is None:
        strace = has_strace()
    if strace:
        watch = ["strace", "-ff", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", traces / "of"]
        command = [*watch, *command]
    else:
        (traces / "sitecustomize.py").write_text(HOOK.format(log=str(traces / "log")))
        kept["PYTHONPATH"] = os.pathsep.join([str(traces), kept.get("PYTHONPATH", "")])
    run = subprocess.run(
        [str(word) for word in command],
        env=kept,
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert run.returncode == 0, run.stdout
    if strace:
        lines = [line for path in traces.iterdir() for line in path.read_text().splitlines()]
        return Traced(_contacts(lines), _written(lines, work), run.stdout)
    log = traces / "log"
    calls = log.read_text().splitlines() if log.exists() else []
    left = [path for one in (home, temporary, work) for path in one.rglob("*")]
    return Traced([call for call in calls if not _is_loopback(call)], left, run.stdout)


def _contacts(lines: list[str]) -> list[str]:
    """Addresses given to `connect`, `sendto` and their kind. Port 53 of this machine is a look-up
    too: a resolver may listen there."""
    found = []
    for line in lines:
        name = line.partition("(")[0]
        if not name.startswith(("connect", "send")) or "AF_INET" not in line:
            continue
        parts = ADDRESS.findall(line)
        host = next((host for host, _ in parts if host), "")
        port = next((port for _, port in parts if port), "")
        call = f"look-up at {host}" if port == "53" else f"{host} {port}"
        if not _is_loopback(call):
            found.append(call)
    return found


def _is_loopback(call: str) -> bool:
    host = call.split()[0]
    try:
        address = ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:  # a name, or a look-up
        return host == "localhost" or call == "look-up of localhost"


def _written(lines: list[str], work: Path) -> list[Path]:
    found = []
    for line in lines:
        match = OPENED.match(line) or MADE.match(line)
        if match and not match[1].startswith(("/dev/", "/proc/", "anon_inode", "pipe", "socket")):
            found.append(work / match[1])
    return found
