"""Workers as processes of Ray Serve, on this machine or on a cluster.

Ray routes each photo to the least busy worker and replaces one that dies. HTTP, limits and batches
are not Ray's here: dsgnn.runtime.serve and dsgnn.runtime.worker say why. What Ray gets of its own:
no dashboard, no HTTP proxy, no reports to its makers, and its token authentication, since its ports
listen on every interface.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from dsgnn.runtime.artifact import ENGINES
from dsgnn.runtime.backends import DEFAULT_THREADS
from dsgnn.runtime.serve import Limits, WorkersLost
from dsgnn.runtime.worker import PIXELS_VARIABLE, Refused, Reply, Worker

OWN_RAY = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


class Replicas:
    """The Workers of dsgnn.runtime.serve that Ray Serve runs under a name."""

    def __init__(self, handle: Any, name: str, model: Mapping[str, Any], shown: str) -> None:
        self._handle, self._name = handle, name
        self.model, self.shown = model, shown

    async def rank(self, data: bytes, media: str, file: str) -> Reply | Refused:
        """See dsgnn.runtime.serve.Workers.rank."""
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
        """See dsgnn.runtime.serve.Workers.ready."""
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

    Raises RuntimeError if Ray Serve is not installed, does not start or is not at the address, or
    if the model cannot be loaded, ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"--replicas must be at least 1, got {count}")
    if find_spec("ray") is None:
        raise RuntimeError("Ray Serve is not installed: pip install 'dsgnn[serve]'")
    if address is None:
        for variable, value in OWN_RAY.items():  # read when ray is imported
            os.environ.setdefault(variable, value)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    threads = ranker.get("threads") or DEFAULT_THREADS
    on_gpu = str(ranker.get("device", "")).startswith("cuda") or (
        str(ranker.get("model") or "").endswith(ENGINES)
    )
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options.update(
            num_cpus=count * threads, include_dashboard=False, _node_ip_address="127.0.0.1"
        )
    try:
        ray.init(address or "local", **options)
    except Exception as error:  # of no common class
        what = "started here" if address is None else f"reached at {address}"
        raise RuntimeError(f"Ray cannot be {what}: {error}") from error
    try:
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
        handle = serve.run(app, name=name, route_prefix=None)
        told = handle.describe.remote().result()
        if "error" in told:
            raise RuntimeError(told["error"])
        yield Replicas(handle, name, told["model"], told["shown"])
    finally:
        if address is not None:
            serve.delete(name)
        ray.shutdown()


def name_for(bound: socket.socket) -> str:
    """A name for the application: its place in the network, so that a restart takes over what an
    earlier process left in the cluster, and two never share."""
    return f"dsgnn-{socket.gethostname()}-{bound.getsockname()[1]}"
