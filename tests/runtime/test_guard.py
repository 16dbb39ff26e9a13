"""What strangers may send to dsgnn-serve: whose pages, how long heads, how many connections.

Each test is bounded: everything is on loopback, with short times and few connections.
"""

import gzip
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import send, serving

from dsgnn.runtime.serving import listen
from dsgnn.runtime.serving.app import ServeLimits
from dsgnn.runtime.serving.worker import Refused, Reply

pytest.importorskip("uvicorn")

Place = tuple[str, int]
PHOTO = b"a photo"


class Echo:
    """Workers that answer with what they got."""

    model, shown = {"file": "echo"}, "echo"

    async def rank(
        self, data: bytes, media: str, file: str, aspects: object = ()
    ) -> Reply | Refused:
        told = {"bytes": len(data), "file": file, "media": media}
        return Reply(json.dumps(told).encode(), {"decode": 1.0}, 1)

    async def ready(self) -> bool:
        return True


@pytest.fixture
def place() -> Iterator[Place]:
    with serving(Echo(), ServeLimits(max_bytes=100_000), ["rank.example.org"]) as address:
        yield address


def form(name: str = "a.png", extra: str = "", data: bytes = PHOTO) -> bytes:
    head = f'--x\r\nContent-Disposition: form-data; name="photo"; filename="{name}"\r\n{extra}\r\n'
    return head.encode() + data + b"\r\n--x--\r\n"


def raw(place: Place, data: bytes, timeout_s: float = 20) -> bytes:
    """Send bytes as they are; gives all that comes until the server closes."""
    with socket.create_connection(place, timeout=timeout_s) as client:
        client.sendall(data)
        answer = b""
        while part := client.recv(65_536):
            answer += part
        return answer


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:8000", True),
        ("localhost", True),
        ("LOCALHOST.:80", True),
        ("[::1]:8000", True),
        ("rank.example.org", True),
        ("Rank.Example.org:443", True),
        ("evil.example.org", False),
        ("localhost.evil.org", False),
        ("192.0.2.7:8000", False),
        ("", False),
    ],
)
def test_the_name_it_is_called_by(place: Place, method: str, host: str, allowed: bool) -> None:
    """A page whose name leads here (DNS rebinding) calls it by its own name."""
    body = PHOTO if method == "POST" else None
    path = "/rank" if method == "POST" else "/health"
    status, _, answer = send(place, body, path, method, Host=host)
    assert status == (200 if allowed else 403), answer
    assert allowed or "expected a Host" in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:8000", True),
        ("https://rank.example.org", True),
        ("http://localhost:3000", False),
        ("https://evil.example.org", False),
        ("null", False),
        ("", False),
    ],
)
def test_the_page_that_posts(place: Place, origin: str, allowed: bool) -> None:
    status, _, answer = send(place, PHOTO, Host="localhost:8000", Origin=origin)
    assert status == (200 if allowed else 403), answer


def test_a_request_without_host(place: Place) -> None:
    assert raw(place, b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert raw(place, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/rank", "/nothing"])
def test_browsers_do_not_guess_types(place: Place, path: str) -> None:
    _, headers, _ = send(place, path=path, method="GET")
    assert headers.get_all("X-Content-Type-Options") == ["nosniff"]
    _, headers, _ = send(place, path=path, method="GET", Host="evil.example.org")
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("kind", "body", "status", "words"),
    [
        ("multipart/form-data; boundary=x; charset=punycode", form("a" * 3000), 200, ""),
        ("multipart/form-data; boundary=x; charset=undefined", form("\xfc.png"), 200, ""),
        (
            "multipart/form-data; boundary=x",
            form(extra="Content-Type: x; charset=idna\r\n"),
            200,
            "",
        ),
        ("Multipart/Form-Data; boundary=x", form(), 200, ""),
        ("multipart/form-data ;boundary=x", form(), 200, ""),
        ("multipart/form-data; boundary=x", form()[:-6], 400, "ends before its last boundary"),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 400, "got no field"),
        ("multipart/form-data; boundary=x", b"nothing of the kind", 400, "cannot be read"),
        ("multipart/form-data; boundary=x", form("a" * 9000), 400, "cannot be read"),
        ("multipart/form-data; boundary=x", form(extra="X: y\r\n" * 500), 400, "cannot be read"),
        ("multipart/form-data; boundary=" + "x" * 300, form(), 400, "cannot be read"),
        (
            "multipart/form-data; boundary=x; charset=punycode",
            b'--x\r\nContent-Disposition: form-data; name="'
            + b"a" * 3000
            + b'"\r\n\r\n'
            + b"a" * 90_000
            + b"\r\n--x--\r\n",
            400,
            "expected one file in the form, got the field",
        ),
    ],
)  # the field that took 16 s is the last
def test_forms(place: Place, kind: str, body: bytes, status: int, words: str) -> None:
    start = time.monotonic()
    got, _, answer = send(place, body, Content_Type=kind)
    assert got == status and words in answer.decode(), answer
    assert got != 200 or json.loads(answer)["bytes"] == len(PHOTO)
    assert time.monotonic() - start < 5


def test_the_file_of_a_form_is_whole(place: Place) -> None:
    """Boundaries that are none, in parts that end anywhere."""
    data = (b"\r\n--" + b"x" * 5 + b"\r\n-\r\n--\r\n") * 3000
    got, _, answer = send(
        place,
        iter([form(data=data)[at : at + 997] for at in range(0, len(data) + 200, 997)]),
        Content_Type="multipart/form-data; boundary=xy".replace("xy", "x-y"),
    )
    assert got == 400  # the form's own boundary is another
    body = form(data=data).replace(b"--x", b"--x-y").replace(b"--x-yxxxx", b"--xxxxx")
    got, _, answer = send(place, body, Content_Type="multipart/form-data; boundary=x-y")
    assert got == 200 and json.loads(answer)["bytes"] == len(data)


def test_several_accept_lines(place: Place) -> None:
    head = b"POST /rank HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 1\r\n"
    answer = raw(place, head + b"Accept: text/html\r\nAccept: image/png\r\n\r\nx")
    assert answer.startswith(b"HTTP/1.1 200 ") and b'"media": "image/png"' in answer


@pytest.mark.parametrize("zeros", [10, 4400])
def test_a_length_with_zeros_before_it(place: Place, zeros: int) -> None:
    head = b"POST /rank HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: "
    answer = raw(place, head + b"0" * zeros + b"7\r\n\r\n" + PHOTO)
    assert answer.startswith(b"HTTP/1.1 200 " if zeros == 10 else b"HTTP/1.1 400 "), answer


def test_a_body_that_is_packed(place: Place) -> None:
    status, _, answer = send(place, gzip.compress(PHOTO), Content_Encoding="gzip")
    assert status == 415 and "without Content-Encoding, got 'gzip'" in answer.decode()
    assert send(place, PHOTO, Content_Encoding="Identity")[0] == 200


def test_a_full_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    data = bytes(3_000_000)
    with serving(Echo(), ServeLimits(max_bytes=4_000_000)) as place:
        kind = "multipart/form-data; boundary=x"
        status, _, answer = send(place, form(data=data), Content_Type=kind)
    assert status == 200 and json.loads(answer)["bytes"] == len(data)


def test_an_upgrade_that_is_not_taken(place: Place) -> None:
    """Java's HttpClient asks for it with every first request."""
    status, _, answer = send(
        place,
        PHOTO,
        Connection="Upgrade, HTTP2-Settings",
        Upgrade="h2c",
        HTTP2_Settings="AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    )
    assert status == 200 and json.loads(answer)["bytes"] == len(PHOTO)


def test_heads_are_limited(place: Place) -> None:
    start = time.monotonic()
    for head in (
        b"GET /" + b"a" * 3_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 500_000,
    ):
        try:
            answer = raw(place, head)
        except ConnectionError:  # it was closed while we were still sending
            continue
        assert answer.startswith(b"HTTP/1.1 400 ")
    assert time.monotonic() - start < 10
    assert send(place, path="/health", method="GET")[0] == 200


def test_heads_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """In drops, not at all, and after a request that was answered."""
    monkeypatch.setattr(listen, "HEAD_S", 1.0)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(Echo()) as place:
        clients = [socket.create_connection(place, timeout=10) for _ in range(3)]
        start = time.monotonic()
        clients[0].sendall(whole[:20])
        clients[1].sendall(whole)
        assert b"200 OK" in clients[1].recv(10_000)
        clients[1].sendall(whole[:20])
        for at in range(20, 25):
            time.sleep(0.1)
            clients[0].sendall(whole[at : at + 1])
        for client in clients:
            answer = client.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            assert client.recv(10) == b""
            client.close()
        assert 0.9 < time.monotonic() - start < 8


def test_connections_are_limited() -> None:
    """In all, and for one address, which loopback has many of."""
    limits = ServeLimits(max_connections=8)
    with serving(Echo(), limits) as place:
        held = [socket.create_connection(place, timeout=10) for _ in range(4)]
        for client in held:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        assert raw(place, b"").startswith(b"HTTP/1.1 503 ")  # the fifth of one address

        def other(number: int) -> socket.socket:
            return socket.create_connection(place, 10, (f"127.0.0.{number}", 0))

        beside = [other(number) for number in (2, 3, 4, 5)]
        for client in beside:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        with other(6) as ninth:
            assert ninth.recv(100).startswith(b"HTTP/1.1 503 ")
        for client in held + beside:
            client.close()
        until = time.monotonic() + 10
        while send(place, path="/health", method="GET")[0] != 200:
            assert time.monotonic() < until


def test_few_descriptors() -> None:
    """Silent connections, more than the system allows a process: the others are answered."""
    script = """
import resource, subprocess, sys, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
from test_guard import Echo, raw
from serving import send, serving
with serving(Echo()) as place:
    child = subprocess.Popen([sys.executable, "-c", f'''
import resource, socket, time
resource.setrlimit(resource.RLIMIT_NOFILE, ({hard}, {hard}))
silent = [socket.create_connection({place!r}) for _ in range(150)]
print("there", flush=True)
time.sleep(60)
'''], stdout=subprocess.PIPE)
    child.stdout.readline()
    try:
        answers = {raw(place, b"")[:12] for _ in range(3)}
        assert answers == {b"HTTP/1.1 503"}, answers
    finally:
        child.kill()
        child.wait()
    end = time.monotonic() + 20
    while send(place, path="/health", method="GET")[0] != 200:
        assert time.monotonic() < end
"""
    folder = Path(__file__).parent
    paths = [str(folder), str(folder.parents[1])]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{script}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "out of system resource" not in run.stderr


@pytest.mark.parametrize(
    ("path", "length"), [("/rank", b"9999999999"), ("/rank", b""), ("/health", b"99999999")]
)
def test_a_refused_body_is_not_read_on(place: Place, path: str, length: bytes) -> None:
    """Its connection ends soon, and not much more of it is taken."""
    framing = b"Content-Length: " + length if length else b"Transfer-Encoding: chunked"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + framing + b"\r\n\r\n"
    part = bytes(50_000)
    part = part if length else b"%x\r\n%b\r\n" % (len(part), part)
    start, sent = time.monotonic(), 0
    with socket.create_connection(place, timeout=20) as client:
        client.sendall(head)
        try:
            while time.monotonic() - start < 10 and sent < 100_000_000:
                sent += client.send(part)
        except ConnectionError:
            pass
    assert sent < 100_000_000 and time.monotonic() - start < 8
    assert send(place, path="/health", method="GET")[0] == 200


def test_a_refusal_reaches_who_sends_all_first(place: Place) -> None:
    for _ in range(5):
        status, headers, _ = send(place, bytes(150_000))
        assert status == 413 and headers["Connection"] == "close"


def test_a_request_that_follows_on_the_same_connection(place: Place) -> None:
    one = b"POST /rank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7\r\n%b\r\na photo"
    answer = raw(place, one % b"" + one % b"Connection: close\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 2
