"""An address to listen on, and the server of an ASGI application there, with limits of its own."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import suppress
from math import ceil
from typing import Any

HEAD_BYTES = 16_384  # of a request's first line and headers
HEAD_S = 10.0  # seconds for them to arrive
KEPT_FILES = 48  # file descriptors that connections do not get


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address and not listening yet; port 0 = any that is free.

    Raises OSError if the address is taken or does not belong to this machine.
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


def listen(app: Any, bound: socket.socket, max_connections: int, timeout_s: float) -> None:
    """Serve until SIGINT or SIGTERM, and then until every request that is held is answered.

    A second signal ends it at once, and so does twice timeout_s.
    """
    server = make_server(app, max_connections, timeout_s)
    # uvicorn raises the signal again when it is done, and Ray would end the process on it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[bound])


def make_server(app: Any, max_connections: int, timeout_s: float, **options: Any) -> Any:
    """A uvicorn.Server. max_connections: how many may be open; one address may have half of them.

    A connection that has not sent a whole head within HEAD_S is closed, and so is one too many.
    options: further ones of uvicorn.Config.
    """
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    most = min(max_connections, _free_descriptors())
    most_of_one = max(1, most // 2)

    class Bounded(H11Protocol):
        """A connection that ends if it is one too many, or if its heads come too slowly."""

        connections: set[Any]

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.head_timer: asyncio.TimerHandle | None = None
            peers = [other.client[0] for other in self.connections if other.client]
            same = peers.count(self.client[0]) if self.client else 0
            if len(self.connections) > most or same > most_of_one:
                self.end("503 Service Unavailable", "too many connections are open")
            self.await_head()

        def data_received(self, data: bytes) -> None:
            if not self.transport.is_closing():
                super().data_received(data)
                self.await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.stop_waiting()

        def await_head(self) -> None:
            """Start the time for a head, or end it when the head is there."""
            if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
                self.stop_waiting()
            elif self.head_timer is None:
                reason = f"expected a whole request head within {HEAD_S:g} s"
                self.head_timer = self.loop.call_later(
                    HEAD_S, self.end, "408 Request Timeout", reason
                )

        def stop_waiting(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def end(self, status: str, reason: str) -> None:
            """Answer and close. Nothing else is being answered on this connection."""
            if not self.transport.is_closing():
                head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nRetry-After: 1\r\n"
                head += f"Content-Length: {len(reason)}\r\nConnection: close\r\n\r\n"
                self.transport.write((head + reason).encode())
                self.transport.close()

    config = uvicorn.Config(
        app,
        http=Bounded,
        ws="none",
        lifespan="off",
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_graceful_shutdown=ceil(2 * timeout_s),
        **options,
    )
    return uvicorn.Server(config)


def _free_descriptors() -> int:
    """How many connections this process can open before the system refuses."""
    if sys.platform == "win32":
        return 1 << 30
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(8, soft - KEPT_FILES)
