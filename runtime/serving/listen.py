"""An address to listen on, and the loop that serves an ASGI application there."""

from __future__ import annotations

import signal
import socket
from contextlib import suppress
from math import ceil
from typing import Any


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address and not listening yet; port 0 = any that is free.

    Raises OSError if the address is taken or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from error
    return bound


def url(bound: socket.socket) -> str:
    """What to type into a browser on this machine."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def listen(app: Any, bound: socket.socket, timeout_s: float) -> None:
    """Serve until SIGINT or SIGTERM, and then until every request held is answered.

    A second signal ends it at once, and so does twice timeout_s.
    """
    import uvicorn

    config = uvicorn.Config(
        app, ws="none", lifespan="off", timeout_graceful_shutdown=ceil(2 * timeout_s)
    )
    # uvicorn raises the signal again when it is done; Ray would end the process on it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[bound])
