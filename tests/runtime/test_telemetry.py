"""Nothing phones home: what a Ranker does to the network and the disk, in a process of its own."""

import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tracing import has_strace, traced

RANK = """
import sys
from dsgnn.runtime import Ranker, samples
print(len(Ranker(backend=sys.argv[1])(samples()[0]).objects), "objects")
"""
SERVE = """
import re, subprocess, sys, urllib.request
from dsgnn.runtime import samples
command = [sys.executable, "-c", "from dsgnn.runtime.serving.cli import main; main()"]
server = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
while not (found := re.search("http://[^ ]+/", server.stderr.readline())):
    pass
photo = urllib.request.Request(found[0] + "rank", samples()[0].read_bytes())
photo.add_header("Content-Type", "image/jpeg")
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
print(opener.open(photo).read().count(b"segmentation"), "objects")
server.terminate()
server.communicate()
"""
BATCH = """
from click.testing import CliRunner
from dsgnn.runtime import samples
from dsgnn.runtime.cluster.cli import main
print(CliRunner().invoke(main, [str(samples()[0]), "--out", "ranked"]).output)
"""
CALL_OUT = """
import socket, sys
from pathlib import Path
from tempfile import TemporaryDirectory
Path("out.txt").write_text("asked for")
Path.home().joinpath("device-id").write_text("not asked for")
Path.home().joinpath(".cache").mkdir()
socket.socket(type=socket.SOCK_DGRAM).connect(("127.0.0.1", 9))
socket.socket(type=socket.SOCK_DGRAM).connect(("192.0.2.1", 443))
try:
    socket.getaddrinfo("nobody.invalid", 443)
except socket.gaierror:
    pass
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_ranker_contacts_nobody_and_writes_nothing(backend: str, tmp_path: Path) -> None:
    if find_spec(backend) is None:  # an import here would report
        pytest.skip(f"could not import {backend}")
    seen = traced([sys.executable, "-c", RANK, backend], tmp_path)
    assert "objects" in seen.output
    assert seen.contacts == []
    assert seen.written == []


def test_a_server_contacts_nobody_and_writes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    seen = traced([sys.executable, "-c", SERVE], tmp_path)
    assert "objects" in seen.output
    assert seen.contacts == []
    assert seen.written == []


def test_a_batch_on_a_ray_of_this_machine_asks_nobody(tmp_path: Path) -> None:
    """It writes its session, its shared memory and its token, and nothing else but results."""
    if find_spec("ray") is None:
        pytest.skip("could not import ray")
    if not has_strace():
        pytest.skip("strace is missing or may not be used here")
    # The path of its sockets must be short, so its session is not in the folder of the test.
    with TemporaryDirectory(dir="/tmp") as session:
        where = {"RAY_TMPDIR": session}
        seen = traced([sys.executable, "-c", BATCH], tmp_path, where, timeout_s=300)
    assert "1 image ranked" in seen.output
    assert seen.contacts == []
    asked_for = tmp_path / "home" / ".ray", tmp_path / "work" / "ranked"
    assert seen.written_outside(Path(session), tmp_path / "temporary", *asked_for) == []


@pytest.mark.parametrize("strace", [True, False])
def test_the_tracing_sees_contacts_and_files(strace: bool, tmp_path: Path) -> None:
    if strace and not has_strace():
        pytest.skip("strace is missing or may not be used here")
    seen = traced([sys.executable, "-c", CALL_OUT], tmp_path, strace=strace)
    assert seen.contacts[0] == "192.0.2.1 443"
    assert seen.contacts[1].startswith("look-up")
    home = tmp_path / "home"
    assert sorted(seen.written_outside(tmp_path / "work")) == [home / ".cache", home / "device-id"]
