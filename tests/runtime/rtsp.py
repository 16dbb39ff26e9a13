"""A network camera for tests: an RTSP server (RFC 2326) on loopback, over its TCP connection."""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import StreamRequestHandler, ThreadingTCPServer

PACKETS = 7 * 188  # bytes of a transport stream in one RTP packet
SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\n"


@contextmanager
def camera(stream: bytes, hangs: bool = False) -> Iterator[str]:
    """Give HOST:PORT of a camera that sends an MPEG transport stream at once, and then closes the
    connection, or hangs in silence."""
    over = threading.Event()

    class Camera(StreamRequestHandler):
        def handle(self) -> None:
            while words := self.rfile.readline().split():
                headers = b"".join(iter(self.rfile.readline, b"\r\n")).decode()
                said = re.search(r"CSeq: *(\d+)", headers)[1]
                self.answer(words[0].decode(), f"RTSP/1.0 200 OK\r\nCSeq: {said}\r\n")
                if words[0] == b"PLAY":
                    for number, at in enumerate(range(0, len(stream), PACKETS)):
                        head = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, 90 * number, 1)
                        packet = head + stream[at : at + PACKETS]
                        self.wfile.write(b"$\0" + struct.pack(">H", len(packet)) + packet)
                    if hangs:
                        over.wait()
                    return

        def answer(self, method: str, head: str) -> None:
            body = SDP if method == "DESCRIBE" else ""
            more = {
                "OPTIONS": "Public: DESCRIBE, SETUP, PLAY\r\n",
                "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n",
                "SETUP": "Session: 1\r\nTransport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n",
                "PLAY": "Session: 1\r\n",
            }
            self.wfile.write(f"{head}{more.get(method, '')}\r\n{body}".encode())

    with ThreadingTCPServer(("127.0.0.1", 0), Camera) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            over.set()
            server.shutdown()
