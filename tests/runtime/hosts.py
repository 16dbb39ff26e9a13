"""Hosts of our own on one machine, joined by a switch: Linux namespaces, for root.

Each host has its own network with one address, its own processes, its own name and a disk of its
own at `Hosts.place`; all else of the disk is the machine's. The switch is a namespace too, and no
way leads from it to the machine's network, so nothing that runs in a host reaches anybody else.

The kernel takes a namespace away, with its network and disk, when its first process ends. That
process is killed when the block ends, and by the kernel when the test's own process dies.
"""

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from sockets import family

BIN = Path(sys.executable).parent
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")
PORT = 6379  # of Ray's control process
STORE_BYTES = 100_000_000  # of Ray's objects on a host
CLONE_NEWNET = 0x40000000


def why_not() -> str:
    """Why there can be no hosts here, "" if there can be."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        return f"needs Linux with {', '.join(missing) or 'namespaces'} (iproute2 and util-linux)"
    if os.geteuid():
        return "only root makes network namespaces"
    made = subprocess.run(["unshare", *KINDS, "true"], capture_output=True, text=True)
    return f"no namespaces can be made here: {made.stderr.strip()}" if made.returncode else ""


KINDS = ("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
needs_hosts = pytest.mark.skipif(bool(why_not()), reason=why_not())


@dataclass(frozen=True)
class Host:
    """A host. first: the number of its first process. place: where its own disk is mounted."""

    name: str
    address: str
    first: int
    place: Path
    switch: int
    logs: Path
    environment: dict[str, str]

    @property
    def disk(self) -> Path:
        """Its own disk, as the machine sees it."""
        return Path(f"/proc/{self.first}/root{self.place}")

    def start(self, *command: str | Path, log: str) -> subprocess.Popen[bytes]:
        """Begin a command in it, on its own disk. log: the name of the file for what it says.

        The process that is given stands outside, and ends as the command does."""
        inside = ["nsenter", "-t", f"{self.first}", "-n", "-m", "-u", "-p"]
        with (self.logs / f"{self.name}-{log}.txt").open("wb") as file:
            return subprocess.Popen(
                [*inside, "--", "env", "-C", self.place, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment,
            )

    def said(self, log: str) -> str:
        """What the commands with that log have said."""
        return (self.logs / f"{self.name}-{log}.txt").read_text()

    def run(self, *command: str | Path, log: str = "run", seconds: float = 60) -> int:
        """Do a command in it, and give its exit status."""
        return self.start(*command, log=log).wait(seconds)

    def cut(self) -> None:
        """Pull its cable out of the switch."""
        _in_network(self.switch, "ip", "link", "set", self.name, "down")

    def join(self) -> None:
        """Put its cable back."""
        _in_network(self.switch, "ip", "link", "set", self.name, "up")

    def kill(self) -> None:
        """Kill all its processes but the first, which keeps its network and disk."""
        its = os.readlink(f"/proc/{self.first}/ns/pid")
        for path in Path("/proc").glob("[0-9]*/ns/pid"):
            number = int(path.parts[2])
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if number != self.first and os.readlink(path) == its:
                    os.kill(number, signal.SIGKILL)

    @contextmanager
    def network(self) -> Iterator[None]:
        """Sockets that this thread makes are the host's while the block runs."""
        with open("/proc/thread-self/ns/net") as before, open(f"/proc/{self.first}/ns/net") as its:
            _enter(its.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())


def _enter(network: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(network, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _in_network(first: int, *command: str) -> None:
    done = subprocess.run(
        ["nsenter", "-t", f"{first}", "-n", "--", *command], capture_output=True, text=True
    )
    assert not done.returncode, (command, done.stderr)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a command that `Host.start` gave to end."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children), signal.SIGTERM)


@contextmanager
def _namespaces(name: str) -> Iterator[int]:
    """The number of the first process of new namespaces, which waits until the block ends."""
    waiting = f"hostname {name} && echo ready && exec sleep infinity"
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", *KINDS, "sh", "-c", waiting],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (first,) = family(process.pid).keys() - {process.pid}
        yield first
    finally:
        process.kill()  # and by --kill-child its child, and by the kernel all in its namespaces
        process.wait()
        until(lambda: not Path(f"/proc/{first}").exists(), 30)


@contextmanager
def hosts(count: int, logs: Path) -> Iterator[list[Host]]:
    """So many hosts, host1 of 10.77.0.1 and so on, until the block ends.

    logs: an existing folder of the machine for what their commands say.
    """
    place = Path(tempfile.mkdtemp(prefix="hosts-"))  # short, as sockets have paths of 107 bytes
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        **{"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"},
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as stack:
        stack.callback(place.rmdir)
        switch = stack.enter_context(_namespaces("switch"))
        _in_network(switch, "ip", "link", "add", "bridge", "type", "bridge")
        _in_network(switch, "ip", "link", "set", "bridge", "up")
        made = []
        for number in range(1, count + 1):
            name, address = f"host{number}", f"10.77.0.{number}"
            first = stack.enter_context(_namespaces(name))
            cable = ("type", "veth", "peer", "name", name, "netns", f"{switch}")
            _in_network(first, "ip", "link", "add", "eth0", *cable)
            _in_network(first, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            _in_network(first, "ip", "link", "set", "lo", "up")
            _in_network(first, "ip", "link", "set", "eth0", "up")
            _in_network(switch, "ip", "link", "set", name, "master", "bridge", "up")
            host = Host(name, address, first, place, switch, logs, environment)
            for at, size in ((place, "256m"), (Path("/dev/shm"), "256m")):
                mount = ("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", f"{at}")
                subprocess.run(["nsenter", "-t", f"{first}", "-m", "--", *mount], check=True)
            made.append(host)
        yield made


def start_ray(members: list[Host]) -> None:
    """A Ray of these hosts, small and without a dashboard; the first has its control process."""
    small = ("--num-cpus=1", f"--object-store-memory={STORE_BYTES}", "--block")
    head = members[0]
    role = ("--head", f"--port={PORT}", "--include-dashboard=false")
    role = (*role, f"--temp-dir={head.place / 'ray'}")
    for host in members:
        node = ("start", *role, f"--node-ip-address={host.address}", *small)
        for _ in range(3):  # Ray gives itself half a minute, and a busy machine takes longer
            process = host.start(sys.executable, "-m", "ray.scripts.scripts", *node, log="ray")
            while "Ray runtime started" not in host.said("ray") and process.poll() is None:
                time.sleep(0.1)
            if process.poll() is None:
                break
            host.kill()
        assert process.poll() is None, host.said("ray")
        role = (f"--address={head.address}:{PORT}",)


def until(true: Callable[[], bool], seconds: float, where: Host | None = None) -> float:
    """Wait until something is true, and give the seconds that it took. where: whose words to show
    if it takes longer than so many seconds."""
    start = time.monotonic()
    while not true():
        said = [path.read_text() for path in where.logs.glob(f"{where.name}-*")] if where else []
        assert time.monotonic() < start + seconds, "\n".join(said)
        time.sleep(0.05)
    return time.monotonic() - start
