"""Workers as processes of Ray Serve, on this machine or on a cluster.

Ray sends each photo to the least busy worker and replaces one that dies. HTTP, limits and batches
are not left to Ray: dsgnn.runtime.serving.app and dsgnn.runtime.serving.worker hold them. Ray's own
HTTP proxy is off.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dsgnn.runtime.artifact import ENGINES
from dsgnn.runtime.backends import DEFAULT_THREADS
from dsgnn.runtime.cluster.connect import cluster, have, machines
from dsgnn.runtime.cluster.probe import Told, probe
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.framing import Aspects
from dsgnn.runtime.serving.app import ServeLimits, WorkersLostError
from dsgnn.runtime.serving.worker import PhotoWorker, Refused, Reply

# For how many seconds Ray trusts what it knows of a worker's queue before it asks again. With Ray's
# own 10, a worker whose machine is cut off looks idle for as long, and is sent photo after photo;
# one that does not answer is sent none. Ray reads the variable when it is imported.
QUEUE_KNOWN_S = ("RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S", "1")


class Replicas:
    """The Workers of dsgnn.runtime.serving.app that Ray Serve runs under a name."""

    def __init__(self, handle: Any, name: str, model: Mapping[str, Any], shown: str) -> None:
        self._handle, self._name = handle, name
        self.model, self.shown = model, shown

    async def rank(
        self, data: bytes, media: str, file: str, aspects: Aspects = ()
    ) -> Reply | Refused:
        """See dsgnn.runtime.serving.app.Workers.rank."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        response = self._handle.rank.remote(data, media, file, aspects)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError:  # our own code in the worker raised it
            raise
        except (RayError, RayServeException) as error:
            raise WorkersLostError(f"the worker was lost ({type(error).__name__})") from error

    async def ready(self) -> bool:
        """See dsgnn.runtime.serving.app.Workers.ready."""
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException
        from ray.serve.schema import ReplicaState

        try:
            status = await asyncio.to_thread(serve.status)
        except (RayError, RayServeException) as error:
            raise WorkersLostError("Ray Serve does not answer") from error
        # Ray calls it unhealthy while one of several replicas is missing; the others answer.
        deployments = status.applications[self._name].deployments.values()
        return all(one.replica_states.get(ReplicaState.RUNNING) for one in deployments)


@contextmanager
def replicas(
    rankers: Mapping[str, Mapping[str, Any]],
    limits: ServeLimits,
    count: int = 1,
    batch: int | None = None,
    address: str = "local",
    name: str = "dsgnn",
) -> Iterator[dict[str, Replicas]]:
    """Run `count` workers of each model until the block ends; gives them by the model's name.

    rankers: the arguments of Ranker for each model; each worker loads the model. batch: see
    PhotoWorker. address: of a running Ray cluster that this machine belongs to; "auto" = the one on
    this machine; "local" = Ray is started here and stopped again. name: what the names of the Ray
    Serve applications begin with, unique in the cluster.

    Raises BackendError if a model cannot be loaded, OptionError for a count below 1 or above what
    the cluster has room for, and what `cluster` raises.
    """
    if count < 1:
        raise OptionError(f"a model needs at least 1 replica, got {count}")
    needs = {model: need(ranker) for model, ranker in rankers.items()}
    cpus = count * sum(threads for threads, _ in needs.values())
    os.environ.setdefault(*QUEUE_KNOWN_S)
    with cluster(address, "serve", cpus) as ray:
        for threads, gpu in needs.values():
            check_room(machines(ray), count, threads, gpu)
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="Disabled")
        running: dict[str, Replicas] = {}
        try:
            for model, ranker in rankers.items():
                app = f"{name}-{model}"
                serve.delete(app)  # what an earlier process left, which holds its GPUs
                worker = (dict(ranker), batch, limits.max_pixels)
                threads, gpu = needs[model]
                resources = {"num_cpus": threads, "num_gpus": 1 if gpu else 0}
                told = probe(ray, _describe, worker, resources)
                deployment = serve.deployment(
                    num_replicas=count,
                    max_ongoing_requests=limits.max_requests,
                    graceful_shutdown_timeout_s=limits.timeout_s,
                    ray_actor_options=resources,
                )
                bound = deployment(PhotoWorker).bind(*worker)
                handle = serve.run(bound, name=app, route_prefix=None)
                running[model] = Replicas(handle, app, *told)
            yield running
        finally:
            if address != "local":
                for model in rankers:
                    serve.delete(f"{name}-{model}")


def need(ranker: Mapping[str, Any]) -> tuple[int, bool]:
    """What each worker needs: CPU threads, and whether a GPU."""
    gpu = str(ranker.get("device", "")).startswith("cuda") or (
        str(ranker.get("model") or "").endswith(ENGINES)
    )
    return ranker.get("threads") or DEFAULT_THREADS, gpu


def _describe(ranker: Mapping[str, Any], batch: int | None, max_pixels: int) -> Told:
    worker = PhotoWorker(ranker, batch, max_pixels)
    worker.close()
    return worker.model, worker.shown


def check_room(nodes: Sequence[Mapping[str, float]], count: int, threads: int, gpu: bool) -> None:
    """Raise OptionError if the machines of a cluster cannot hold `count` workers, even when idle.

    Ray Serve would wait for more machines without a word, and for ever.
    """
    room = sum(
        int(min(node.get("CPU", 0) // threads, node.get("GPU", 0) if gpu else math.inf))
        for node in nodes
    )
    if count > room:
        raise OptionError(
            f"{count} replicas do not fit, {room} do: each needs {threads} CPUs"
            f"{' and a GPU' if gpu else ''} of one machine, and Ray has {have(nodes)}; use fewer "
            f"replicas or threads{', or the CPU' if gpu else ''}"
        )


def name_for(bound: socket.socket) -> str:
    """What the applications' names begin with: the place in the network. So a restart takes over
    what an earlier process left in the cluster, and two servers never share a name."""
    return f"dsgnn-{socket.gethostname()}-{bound.getsockname()[1]}"
