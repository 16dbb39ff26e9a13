"""Ray, connected to or started: the one place that does so, for dsgnn-batch and dsgnn-serve.

A Ray that is started here is for this machine alone: everything it listens on is on loopback and
asks for Ray's token (~/.ray/auth_token, Ray's default since 2.60); it has no dashboard and reports
to nobody. A Ray that is connected to is as its owner set it up.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from time import sleep
from typing import Any

from dsgnn.runtime.console import say
from dsgnn.runtime.errors import BackendError, OptionError
from dsgnn.runtime.telemetry import import_without_telemetry

# Ray's switch for one machine alone, made for macOS and Windows. It is read when Ray is imported;
# ray.init(_node_ip_address="127.0.0.1") is replaced by an address that others reach.
ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Variables that leave a process only this machine to talk to over HTTP.
NO_WAY_OUT = {
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost,::1",
}
HEARD_S = 5.0  # after so long an interruption has not been heard
LOST = "Ray's control process on this machine has ended, so nothing can go on: start again"


@contextmanager
def cluster(address: str, part: str, cpus: int | None = None) -> Iterator[Any]:
    """Give Ray, connected. What was started or connected here ends with the block.

    address: HOST:PORT of a cluster that this machine is part of, "auto" for the one on this
    machine, or "local" for one that is started here. An empty address is what this process is
    connected to already, else RAY_ADDRESS, else "local". part: the one of Ray that is needed,
    "data" or "serve". cpus: of a Ray that is started here; None = all.

    Raises OptionError for what is no address, or a second one, and BackendError if that part of Ray
    is not installed, Ray cannot be reached or started, or a Ray that was started here has ended.
    """
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    if where == "local":
        os.environ[ONE_MACHINE] = "0"
    try:
        ray = import_without_telemetry("ray")
        import_without_telemetry(f"ray.{part}")
    except ImportError as error:
        fix = "pip install 'dsgnn[ray]'"
        raise BackendError(f"Ray {part.title()} is not installed: {fix} ({error})") from error
    if ray.is_initialized():
        if address:
            raise OptionError(f"Ray is connected already: leave out the address {address}")
        yield ray
        return
    options: dict[str, Any] = {}
    if where == "local":
        options = {"include_dashboard": False, "num_cpus": cpus}
        if part == "serve":
            options["runtime_env"] = {"worker_process_setup_hook": f"{__name__}.confine_grpc"}
    elif where != "auto":
        _check_answers(where)
    try:
        with _no_cloud_asked() as started:
            ray.init(where, logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # of no common class
        what = "started here" if where == "local" else f"reached at {where}"
        raise BackendError(f"Ray cannot be {what}: {error}") from error
    watch = _Watch(started)
    try:
        if where == "local":
            _check_confined(ray.util.get_node_ip_address())
        yield ray
    except BaseException as error:
        if watch.lost:
            raise BackendError(LOST) from error
        raise
    finally:
        watch.end()
        if not watch.lost:  # it would wait a minute for the process that is gone
            ray.shutdown()
    if watch.lost:
        raise BackendError(LOST)


class _Watch:
    """Ends the processes of a Ray that was started here when its control process dies.

    It interrupts the main thread then. Where that waits inside of Ray and hears nothing, this
    process ends, as it would a minute later: Ray ends it itself, and leaves other processes.
    """

    def __init__(self, started: Mapping[str, Any]) -> None:
        """started: the processes that Ray began here, by their kind; none = nothing to watch."""
        self.lost, self._ending, self._started = False, False, started
        if started:
            threading.Thread(target=self._wait, name="watch-ray", daemon=True).start()

    def end(self) -> None:
        """Ray ends now because it should."""
        self._ending = True

    def _wait(self) -> None:
        self._started["gcs_server"].wait()
        if self._ending:
            return
        self.lost = True
        for process in self._started.values():
            for number in [*descendants(process.pid), process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        _thread.interrupt_main()
        sleep(HEARD_S)
        if not self._ending:
            say(f"Error: {LOST}", err=True)
            os._exit(1)


def descendants(parent: int) -> list[int]:
    """The numbers of the processes that a process has begun, and of those they have begun."""
    with suppress(OSError):
        tasks = Path(f"/proc/{parent}/task").iterdir()
        children = [int(n) for task in tasks for n in (task / "children").read_text().split()]
        return [n for child in children for n in (child, *descendants(child))]
    return []


@contextmanager
def _no_cloud_asked() -> Iterator[dict[str, Any]]:
    """While Ray is started: keep its dashboard's process from asking clouds whether it is in them.

    It asks 169.254.169.254 and metadata.google.internal even where usage statistics are off, and
    Ray has no switch for that. That process alone gets a proxy which does not exist, so its
    requests end on this machine. Gives the processes that were started, by their kind.
    """
    services = import_without_telemetry("ray._private.services")
    start, started = services.start_ray_process, dict[str, Any]()

    def start_apart(command: Any, process_type: str, *arguments: Any, **options: Any) -> Any:
        if process_type == "dashboard":
            options["env_updates"] = {**(options.get("env_updates") or {}), **NO_WAY_OUT}
        information = start(command, process_type, *arguments, **options)
        started[process_type] = information.process
        return information

    services.start_ray_process = start_apart
    try:
        yield started
    finally:
        services.start_ray_process = start


def machines(ray: Any) -> list[dict[str, float]]:
    """What each machine of the cluster has: `CPU`, `GPU` and more. What it has none of is left
    out."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def have(nodes: Iterable[Mapping[str, float]]) -> str:
    """What machines have, for a message."""
    return ", ".join(
        f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes
    )


def confine_grpc() -> None:
    """In a process of Ray, make servers of gRPC listen on loopback, whatever address they get.

    A replica of Ray Serve has such a server for calls between deployments. It listens on every
    interface, and no option changes or stops that.
    """
    from grpc import aio

    make = aio.server

    def server(*arguments: Any, **options: Any) -> Any:
        made = make(*arguments, **options)
        for name in ("add_insecure_port", "add_secure_port"):
            setattr(made, name, partial(_bind, getattr(made, name)))
        return made

    aio.server = server


def _bind(add_port: Callable[..., int], address: str, *credentials: Any) -> int:
    return add_port(f"127.0.0.1:{address.rpartition(':')[2]}", *credentials)


def _check_answers(address: str) -> None:
    """Raise BackendError at once if nobody answers, where Ray would try for minutes, and
    OptionError if it is no address."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise OptionError(
            f"expected the address of a cluster as HOST:PORT, or auto, got {address!r}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise BackendError(f"there is no Ray cluster at {address}: {error}") from error


def _check_confined(address: str) -> None:
    """Raise BackendError if a Ray that was started here can be reached from elsewhere."""
    if not ip_address(address).is_loopback:
        raise BackendError(
            f"Ray listens on {address}, expected loopback: it was imported before dsgnn could "
            f"confine it; import it later, or set {ONE_MACHINE}=0 before"
        )
