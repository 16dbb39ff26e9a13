"""What every request passes, and every answer: whose pages may ask, and when a connection ends.

A web page that somebody visits can send requests to a server on the same machine. It is told apart
by the names it must use: its own in Host after its name was made to lead here (DNS rebinding), and
its own in Origin when it posts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

DRAIN_S = 2.0  # seconds for the rest of a body that was refused, so that its answer can be read
READ = ("GET", "HEAD", "OPTIONS")  # what changes nothing and costs little


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: App, hosts: Collection[str], drain_bytes: int) -> None:
        """hosts: names under which this server is reached, beside those of loopback and the address
        that a request came to. drain_bytes: how much more of a refused body is taken."""
        self._app, self._drain_bytes = app, drain_bytes
        self._hosts = {name.lower().rstrip(".") for name in hosts}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get(b"content-length", "").strip("0")
        body = _Body(receive, bool(length) or b"transfer-encoding" in headers)
        answer = _Answer(send, body, self._drain_bytes)
        reason = self._why_not(scope, headers)
        if reason:
            await answer.refuse(403, reason)
        else:
            await self._app(scope, body.receive, answer.send)

    def _why_not(self, scope: Message, headers: dict[bytes, str]) -> str:
        """Why a request is refused, "" if it is not."""
        host = headers.get(b"host", "").lower()
        local = (scope.get("server") or ("",))[0]
        if not (_is_loopback(_name(host)) or _name(host) in {*self._hosts, local}):
            return (
                f"expected a Host that this server goes by, got {host[:80]!r}: whoever runs it can "
                "allow that name"
            )
        origin = headers.get(b"origin")
        if origin is None or scope["method"] in READ:
            return ""
        place = origin.lower().partition("://")[2]
        if place == host or (place and _name(place) in self._hosts):
            return ""
        return (
            f"expected a request of this server's own page, got one of the origin {origin[:80]!r}"
        )


def _name(host: str) -> str:
    """The name in "name:port" or "[address]:port"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:  # it is no address
        return name == "localhost"


class _Body:
    """A request's body, and whether more of it is to come."""

    def __init__(self, receive: Receive, unread: bool) -> None:
        self._receive, self.unread = receive, unread

    async def receive(self) -> Message:
        message = await self._receive()
        self.unread = self.unread and message.get("more_body", False)
        return message


class _Answer:
    """An answer on its way. If it comes before all of the body, the connection ends with it."""

    def __init__(self, send: Send, body: _Body, drain_bytes: int) -> None:
        self._send, self._body, self._drain_bytes = send, body, drain_bytes

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            if self._body.unread:
                headers.append((b"connection", b"close"))
            await self._send({**message, "headers": headers})
        elif self._body.unread and not message.get("more_body", False):
            # A client that sends all before it reads would find the connection reset.
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._drain(), DRAIN_S)
            await self._send({"type": "http.response.body", "body": b""})
        else:
            await self._send(message)

    async def _drain(self) -> None:
        left = self._drain_bytes
        while self._body.unread and left > 0:
            left -= len((await self._body.receive()).get("body", b""))

    async def refuse(self, status: int, message: str) -> None:
        """Answer with a status and words, as the application does."""
        body = json.dumps({"status": status, "error": message}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
