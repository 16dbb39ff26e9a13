"""Records that outlive a killed process and a full disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from dsgnn.runtime.disk import durable
from dsgnn.runtime.disk.durable import record_file
from dsgnn.runtime.disk.files import claimed, printable
from dsgnn.runtime.disk.outputs import results_file
from dsgnn.runtime.errors import FolderBusyError
from dsgnn.runtime.run.cli import main

COMMAND = Path(sys.executable).with_name("dsgnn-run")
HEAD = {"schema": "x/1", "model": {"file": "m"}}


def images(count: int, start: int = 0) -> list[dict]:
    return [{"file": f"{i}.png", "objects": [i]} for i in range(start, start + count)]


def load(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


@contextmanager
def killed(path: Path, records: list[dict]) -> Iterator[Path]:
    """What a killed process leaves: its journal, and no file."""
    journal = path.with_name(f".{path.stem}.journal")
    before = path.read_bytes() if path.exists() else None
    with record_file(path, HEAD, "images") as record:
        for one in records:
            record(one)
        data = journal.read_bytes()
    path.unlink() if before is None else path.write_bytes(before)
    journal.write_bytes(data)
    yield journal


def test_a_file_of_records(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for error in (None, KeyboardInterrupt, ZeroDivisionError):
        try:
            with results_file(path, {"file": "m"}) as record:
                for one in images(3):
                    record(one)
                if error:
                    raise error
        except (KeyboardInterrupt, ZeroDivisionError):
            pass
        whole = {"schema": "dsgnn.results/1", "model": {"file": "m"}, "images": images(3)}
        assert load(path) == whole and os.listdir(tmp_path) == ["results.json"]
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data,
        lambda data: data + b'{"file": "5.png", "obj',  # the process died in the middle
        lambda data: data + b'{"file": "5.png"}',  # or just before the line's end
        lambda data: data + b"\0" * 100 + b"\n",  # what a disk without power leaves
        lambda data: data + b"[" * 200_000 + b"\n",
        lambda data: data + b"3\n",
    ],
)
def test_a_journal_is_read_to_its_last_good_line(tmp_path: Path, damage) -> None:
    path = tmp_path / "results.json"
    with killed(path, images(5)) as journal:
        journal.write_bytes(damage(journal.read_bytes()))
    with pytest.raises(ZeroDivisionError), record_file(path, HEAD, "images"):
        assert load(path) == {**HEAD, "images": images(5)}
        raise ZeroDivisionError


def test_a_killed_run_adds_to_what_was_there(tmp_path: Path) -> None:
    """In place of the records of the same file; another model's are not mixed in."""
    path = tmp_path / "results.json"
    old = {**HEAD, "images": [{"file": "0.png", "objects": ["old"]}, *images(1, start=9)]}
    path.write_text(json.dumps(old))
    with killed(path, images(2)), record_file(path, HEAD, "images") as record:
        assert load(path)["images"] == [*images(1), *images(1, start=9), *images(1, start=1)]
        record(images(1)[0])
    assert load(path)["images"] == images(1)
    path.write_text(json.dumps({**old, "model": {"file": "another"}}))
    with killed(path, images(2)), record_file(path, HEAD, "images"):
        assert load(path) == {**HEAD, "images": images(2)}
    for wrong in ("[1]", "{", '{"images": 3}', json.dumps({**HEAD, "images": [3]})):
        path.write_text(wrong)
        with killed(path, images(2)), record_file(path, HEAD, "images"):
            assert load(path) == {**HEAD, "images": images(2)}


def test_two_writers(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with record_file(path, HEAD, "images") as record:
        record(images(1)[0])
        with pytest.raises(FolderBusyError, match="another process is writing"):  # noqa: SIM117
            with record_file(path, HEAD, "images"):
                pass
        record(images(1, start=1)[0])
    assert load(path)["images"] == images(2)


class Full(FileIO):
    """A file on a disk that takes `room` bytes more."""

    room = 0

    def write(self, data: bytes) -> int:
        count = min(len(data), Full.room)
        Full.room -= count
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data[:count])


@pytest.mark.parametrize("room", range(0, 400, 37))
def test_a_disk_that_is_full_for_a_moment(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, and the journal has whole lines alone whenever the process may be killed."""
    monkeypatch.setattr(durable, "FileIO", Full)
    path, journal = tmp_path / "results.json", tmp_path / ".results.journal"
    Full.room = 10_000
    with record_file(path, HEAD, "images") as record:
        for number, one in enumerate(images(30)):
            if number == 10:
                Full.room = room
            if number == 20:
                Full.room = 10_000
            record(one)
            lines = journal.read_bytes().split(b"\n")
            assert lines.pop() == b"" and len([json.loads(x) for x in lines]) > min(number, 10)
    assert load(path)["images"] == images(30)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_interrupt_after_the_system_took_a_record_does_not_write_it_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A signal that comes during a write is told when the write has ended."""
    writes = 0

    class Interrupted(FileIO):
        def write(self, data) -> int:
            nonlocal writes
            done = super().write(data)
            writes += 1
            if writes == at + 1:  # the first is of the head
                raise KeyboardInterrupt
            return done

    monkeypatch.setattr(durable, "FileIO", Interrupted)
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt), record_file(path, HEAD, "images") as record:
        for one in images(5):
            record(one)
    assert load(path) == {**HEAD, "images": images(at)}


def test_a_disk_that_stays_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before stays in the journal, for the next run."""
    path = tmp_path / "results.json"
    with monkeypatch.context() as patch:
        patch.setattr(durable, "FileIO", Full)
        Full.room = 10_000
        with pytest.raises(OSError, match="No space left"):  # noqa: SIM117
            with record_file(path, HEAD, "images") as record:
                for number, one in enumerate(images(9)):
                    Full.room = 0 if number == 6 else Full.room
                    record(one)
    assert os.listdir(tmp_path) == [".results.journal"]
    with record_file(path, HEAD, "images"):
        assert load(path)["images"] == images(6)


def test_a_full_disk_for_real(tmp_path: Path, model: Path, photo: np.ndarray) -> None:
    """A disk of 1 MB, which only root can make: the run ends with what it could keep."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        (tmp_path / "photos").mkdir()
        for number in range(40):
            cv2.imwrite(str(tmp_path / f"photos/{number:02}.png"), photo[..., ::-1])
        (disk / "filler").write_bytes(bytes(900_000))
        options = ["-o", disk / "out", "--model", model, "--save", "masks,json"]
        command = [COMMAND, tmp_path / "photos", *options, "--skip-existing"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "No space left on device" in done.stderr
        (disk / "filler").unlink()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ranked, skipped = (int(line.split()[0]) for line in done.stdout.splitlines()[:2])
        assert ranked + skipped == 40 and skipped > 0
        assert len(load(disk / "out/results.json")["images"]) == 40
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_a_killed_run_is_resumed(
    tmp_path: Path, model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the middle, twice; nothing that was recorded is ranked again, nothing is left."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(400):
        cv2.imwrite(f"photos/{number:03}.png", photo[..., ::-1])
    command = ["photos", "-o", "out", "--model", str(model), "--skip-existing"]
    journal, before = Path("out/.results.journal"), 0
    for after in (60, 150):
        process = subprocess.Popen([COMMAND, *command], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") > after:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        recorded = journal.read_bytes().count(b"\n") - 1
        assert before + 50 < recorded < 400
        before = recorded
    Path(f"out/.dsgnn-{'0' * 32}.jpg").write_bytes(b"half")
    Path("out/.mine.jpg").write_bytes(b"keep")
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    ranked, skipped = (int(line.split()[0]) for line in result.stdout.splitlines()[:2])
    assert (ranked, skipped) == (400 - before, before)
    assert [image["file"] for image in load(Path("out/results.json"))["images"]] == [
        f"photos/{number:03}.png" for number in range(400)
    ]
    assert [path.name for path in Path("out").glob(".*")] == [".mine.jpg"]


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    """In sub-folders too, under the lock, and nothing else."""
    (tmp_path / "clip.masks").mkdir()
    name = f".dsgnn-{'0a' * 16}"
    for left in (name, f"{name}.mp4", f"clip.masks/{name}.png"):
        (tmp_path / left).touch()
    others = [".dsgnn-1.png", f"{name}.tar.gz", f"x{name}", "photo.jpg"]
    for other in others:
        (tmp_path / other).touch()
    (tmp_path / f"{name}.png").mkdir()
    with claimed(tmp_path):
        assert sorted(os.listdir(tmp_path)) == sorted([*others, "clip.masks", f"{name}.png"])
        assert os.listdir(tmp_path / "clip.masks") == []
        (tmp_path / name).touch()
        with pytest.raises(FolderBusyError), claimed(tmp_path):
            pass
        assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Füße 日本 🦊👩\u200d🚀.png", "Füße 日本 🦊👩\u200d🚀.png"),
        ("a\x1b[2Kb", r"a\x1b[2Kb"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b1m\x7f", r"\x9b1m\x7f"),
        ("\u202egpj\u2066\u200f\u2028", r"\u202egpj\u2066\u200f\u2028"),
        ("caf\udce9", r"caf\xe9"),
        ("\ud800", r"\ud800"),
    ],
)
def test_printable_names(name: str, shown: str) -> None:
    assert printable(name) == shown
