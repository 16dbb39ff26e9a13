"""Workers as processes of Ray Serve, on this machine or on a cluster.

Ray routes each photo to the least busy worker and replaces one that dies. HTTP, limits and batches
are not Ray's here: dsgnn.runtime.serving.app and dsgnn.runtime.serving.worker say why. Ray's own
HTTP proxy is off.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dsgnn.runtime.artifact import ENGINES
from dsgnn.runtime.backends import DEFAULT_THREADS
from dsgnn.runtime.cluster.connect import cluster, have, machines
from dsgnn.runtime.serving.app import Limits, WorkersLost
from dsgnn.runtime.serving.worker import PIXELS_VARIABLE, Refused, Reply, Worker


class Replicas:
    """The Workers of dsgnn.runtime.serving.app that Ray Serve runs under a name."""

    def __init__(self, handle: Any, name: str, model: Mapping[str, Any], shown: str) -> None:
        self._handle, self._name = handle, name
        self.model, self.shown = model, shown

    async def rank(self, data: bytes, media: str, file: str) -> Reply | Refused:
        """See dsgnn.runtime.serving.app.Workers.rank."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        response = self._handle.rank.remote(data, media, file)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError:  # raised by our own code in the worker
            raise
        except (RayError, RayServeException) as error:
            raise WorkersLost(f"the worker was lost ({type(error).__name__})") from error

    async def ready(self) -> bool:
        """See dsgnn.runtime.serving.app.Workers.ready."""
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException
        from ray.serve.schema import ApplicationStatus

        try:
            status = await asyncio.to_thread(serve.status)
        except (RayError, RayServeException) as error:
            raise WorkersLost("Ray Serve does not answer") from error
        return status.applications[self._name].status == ApplicationStatus.RUNNING


@contextmanager
def replicas(
    ranker: Mapping[str, Any],
    limits: Limits,
    count: int = 1,
    batch: int | None = None,
    address: str | None = None,
    name: str = "dsgnn",
) -> Iterator[Replicas]:
    """Run `count` workers until the block ends.

    ranker: the arguments of Ranker; each worker loads the model. batch: see Worker. address: of a
    running Ray cluster that this machine belongs to, "auto" = the one on this machine; None = Ray
    is started here and stopped again. name: of the Ray Serve application, unique in the cluster.

    Raises RuntimeError if Ray Serve does not start or the model cannot be loaded, ValueError for a
    count below 1 or above what the cluster has room for, and what `cluster` raises.
    """
    if count < 1:
        raise ValueError(f"--replicas must be at least 1, got {count}")
    threads = ranker.get("threads") or DEFAULT_THREADS
    on_gpu = str(ranker.get("device", "")).startswith("cuda") or (
        str(ranker.get("model") or "").endswith(ENGINES)
    )
    with cluster(address or "local", "serve", count * threads) as ray:
        check_room(machines(ray), count, threads, on_gpu)
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(
            num_replicas=count,
            max_ongoing_requests=limits.max_requests,
            graceful_shutdown_timeout_s=limits.timeout_s,
            ray_actor_options={
                "num_cpus": threads,
                "num_gpus": 1 if on_gpu else 0,
                "runtime_env": {"env_vars": {PIXELS_VARIABLE: str(limits.max_pixels)}},
            },
        )
        app = deployment(Worker).bind(dict(ranker), batch, limits.max_pixels)
        try:
            handle = serve.run(app, name=name, route_prefix=None)
            told = handle.describe.remote().result()
            if "error" in told:
                raise RuntimeError(told["error"])
            yield Replicas(handle, name, told["model"], told["shown"])
        finally:
            if address is not None:
                serve.delete(name)


def check_room(nodes: Sequence[Mapping[str, float]], count: int, threads: int, gpu: bool) -> None:
    """Raise ValueError if the machines of a cluster cannot hold `count` workers, however idle: Ray
    Serve would wait for more machines without a word, and for ever."""
    room = sum(
        int(min(node.get("CPU", 0) // threads, node.get("GPU", 0) if gpu else math.inf))
        for node in nodes
    )
    if count > room:
        raise ValueError(
            f"--replicas {count} do not fit, {room} do: each needs {threads} CPUs"
            f"{' and a GPU' if gpu else ''} of one machine, and Ray has {have(nodes)}; use fewer "
            f"--replicas or --threads{', or --device cpu' if gpu else ''}"
        )


def name_for(bound: socket.socket) -> str:
    """A name for the application: its place in the network, so that a restart takes over what an
    earlier process left in the cluster, and two never share."""
    return f"dsgnn-{socket.gethostname()}-{bound.getsockname()[1]}"
