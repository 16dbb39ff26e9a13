"""Files that name what they play: nothing is opened that nobody asked for."""

from __future__ import annotations

import http.server
import io
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from films import film, flat

from dsgnn.runtime import Ranker
from dsgnn.runtime.disk.outputs import make_folder
from dsgnn.runtime.disk.sources import find_sources
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.photo.headers import PLAYLIST
from dsgnn.runtime.run.loop import Outcome, rank_sources
from dsgnn.runtime.video import container
from dsgnn.runtime.video.container import opened_file

pytest.importorskip("av")

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\n{}\n#EXT-X-ENDLIST\n"
# {} is where the file or address stands that it names.
PLAYLISTS = {
    "list.m3u8": HLS,
    "list.m3u": "\n#EXTM3U\n#EXTINF:1,A film\n{}\n",
    "list.ffconcat": "ffconcat version 1.0\nfile {}\n",
    "list.sdp": "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns={}\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
    "m=video 5004 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n",
    "list.mpd": '<?xml version="1.0"?>\n<!-- a comment -->\n<MPD type="static" '
    'mediaPresentationDuration="PT0.5S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1000">'
    "<BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "list.asx": '<asx version="3.0"><entry><ref href="{}"/></entry></asx>',
    "list.pls": "[playlist]\nFile1={}\nNumberOfEntries=1\n",
    "list.xspf": '<?xml version="1.0"?><playlist version="1"><trackList><track><location>{}'
    "</location></track></trackList></playlist>",
    "list.idx": "# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:01:000, filepos: 0\n",
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    film("film.ts", [flat(20 + 20 * number) for number in range(5)])
    return folder


@pytest.fixture
def served() -> Iterator[tuple[str, list[str]]]:
    """The folder by HTTP: its address, and what was asked for."""
    asked: list[str] = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def go(ranker: Ranker) -> Callable[..., list[Outcome]]:
    def rank(*arguments: str) -> list[Outcome]:
        make_folder(Path("out"))
        found = find_sources(arguments, Path("out"))
        return list(rank_sources(ranker, found.sources, Path("out"), ("json",)))

    return rank


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_is_told_and_not_followed(
    name: str, go, ranker: Ranker, served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its own name, a video's, and through a pipe; what it names is there to be opened."""
    address, asked = served
    here = Path("film.ts").absolute().as_uri()
    for number, named in enumerate(("film.ts", here, f"{address}/film.ts")):
        text = PLAYLISTS[name].format(named)
        names = [f"{number}{name}", f"{number}.mp4", f"{number}.ts"]
        for path in names:
            Path(path).write_text(text, newline="")
        assert [outcome.error for outcome in go(*names)] == [PLAYLIST] * 3
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        assert [outcome.error for outcome in go("-")] == [PLAYLIST]
        for path in names:
            with pytest.raises(InputError, match=f"^{PLAYLIST}$"):
                ranker.stream(path)
    assert asked == []


@pytest.mark.parametrize("name", PLAYLISTS)
def test_what_is_not_known_as_a_playlist_opens_nothing(
    name: str, served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg knows more of them than we do, and knows them by less."""
    address, asked = served
    monkeypatch.setattr(container.signatures, "kind", lambda file: "")
    for named in ("film.ts", Path("film.ts").absolute().as_uri(), f"{address}/film.ts"):
        Path(name).write_text(PLAYLISTS[name].format(named), newline="")
        try:
            streams = opened_file(Path(name)).streams.video
        except InputError:
            continue
        assert not streams
    assert asked == []


def test_an_address_may_be_that_of_a_playlist(go, served) -> None:
    """It may name other addresses. The files of this machine are none of them."""
    address, asked = served
    Path("list.m3u8").write_text(HLS.format("film.ts"))
    assert [outcome.error for outcome in go(f"{address}/list.m3u8")] == [""] * 5
    assert "/film.ts" in asked
    for number, named in enumerate(
        (Path("film.ts").absolute().as_uri(), Path("film.ts").resolve())
    ):
        Path(f"{number}.m3u8").write_text(HLS.format(named))
        asked.clear()
        (outcome,) = go(f"{address}/{number}.m3u8")
        assert outcome.error == "no answer"


def test_a_playlist_by_tcp_opens_no_file(go) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(HLS.format(Path("film.ts").absolute().as_uri()).encode())

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (outcome,) = go(f"tcp://127.0.0.1:{server.server_address[1]}/list.m3u8")
        server.shutdown()
    assert outcome.error == "no answer"
