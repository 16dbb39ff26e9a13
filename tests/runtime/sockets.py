"""A process and those it started, and what they listen on, read off Linux's /proc."""

import os
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

PROC = Path("/proc")
LISTEN = "0A"  # state of a socket in /proc/net/tcp


def family(process: int) -> dict[int, str]:
    """The names of a process and of those that it started, by their number."""
    members, grown = {process}, True
    while grown:
        born = {pid for pid, parent in _parents().items() if parent in members}
        grown = not born <= members
        members |= born
    found = {}
    for pid in members:
        with suppress(OSError):  # it has just ended
            found[pid] = (PROC / str(pid) / "comm").read_text().strip()
    return found


def listening(process: int) -> set[tuple[str, IPv4Address | IPv6Address]]:
    """(name of the process, address) of each TCP socket of its family that takes connections."""
    addresses = _addresses()
    found = set()
    for pid, name in family(process).items():
        with suppress(OSError):
            for link in (PROC / str(pid) / "fd").iterdir():
                with suppress(OSError):
                    socket = os.readlink(link).removeprefix("socket:[").removesuffix("]")
                    if socket in addresses:
                        found.add((name, addresses[socket]))
    return found


def _parents() -> dict[int, int]:
    found = {}
    for path in PROC.glob("[0-9]*/stat"):
        with suppress(OSError):
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return found


def _addresses() -> dict[str, IPv4Address | IPv6Address]:
    """Of every listening socket, by its inode."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in (PROC / "net" / table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTEN:
                words = bytes.fromhex(local.partition(":")[0])  # of four bytes, the last first
                data = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                address = IPv4Address(data) if len(data) == 4 else IPv6Address(data)
                found[rest[5]] = getattr(address, "ipv4_mapped", None) or address
    return found
