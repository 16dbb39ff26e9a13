"""Feed damaged files to everything that reads files of strangers: `make fuzz`.

    python tests/fuzz.py [--minutes 10] [--inputs N] [--seed 0] [TARGET...]

Each target has a few good files (fuzz_targets.py), which are changed at random and given to
one reader. The same seed changes them alike, but the good checkpoint and videos are a little
different each time that PyTorch and FFmpeg write them. A reader may only refuse, by an error of
this toolkit or of the system. Anything else is printed as a finding, and its bytes are kept in
build/fuzz: another error, a crash of the process, an input that takes more than LIMIT_S. Each
target runs in a process of its own. At the end there is a table with the longest time of one input
and the peak of memory.

Exit status: 0 nothing found, 1 something was, 2 wrong use.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from fuzz_targets import TARGETS, Target

from dsgnn.runtime.errors import DsgnnError

LIMIT_S = 5.0  # of processor time for one input
KEPT = Path("build/fuzz").absolute()
ROOM = 1 << 22  # bytes of the largest input
ALLOWED = (DsgnnError, OSError, MemoryError)
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
WORDS = (
    *(b"null", b"true", b"-1", b"1e999", b"NaN", b"0.5", b"9" * 400, b'""', b"[]", b"{}"),
    *(b'"\\ud800"', b"[" * 60 + b"]" * 60, b"1" * 5000, b'"\\u0000"', b'"../../x"'),
)


def mutated(random_: random.Random, corpus: list[bytes], text: bool) -> bytes:
    """One of the files with some changes."""
    data = bytearray(random_.choice(corpus))
    for _ in range(random_.choice((1, 1, 2, 3, 6))):
        at = random_.randrange(len(data) + 1)
        kind = random_.randrange(9 if text else 7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << random_.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = random_.randrange(256)
        elif kind == 2:
            size = random_.choice((1, 2, 4, 8))
            number = random_.choice(NUMBERS) % 256**size
            data[at : at + size] = number.to_bytes(size, random_.choice(("big", "little")))
        elif kind == 3:
            del data[at : at + random_.choice((1, 2, 4, 16, len(data) // 3))]
        elif kind == 4:
            piece = data[at : at + random_.choice((1, 4, 32, len(data) // 4))]
            data[at:at] = piece * random_.choice((1, 1, 3, 50))
        elif kind == 5:
            other = random_.choice(corpus)
            start = random_.randrange(len(other) + 1)
            data[at : at + 16] = other[start : start + random_.choice((4, 16, 200))]
        elif kind == 6:
            del data[at:]
        else:
            found = list(re.finditer(rb'"[^"]*"|-?[\d.]+|\[\]|\{\}', data))
            if found:
                one = random_.choice(found)
                data[slice(*one.span())] = random_.choice(WORDS)
    return bytes(data[:ROOM])


def fuzz(name: str, seed: int, seconds: float, inputs: int, last: Path) -> None:
    """In a process of its own: print a line of JSON for each finding, and one about all."""
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
    from dsgnn.runtime.images import keep_quiet

    keep_quiet()
    faulthandler.enable()
    target = TARGETS[name]()
    for good in target.corpus:
        target.read(good)
    chance = random.Random(f"{name} {seed}")
    with last.open("w+b") as file:
        file.truncate(ROOM + 8)
        held = mmap.mmap(file.fileno(), 0)
    count, worst_s, found, end = 0, 0.0, set(), time.monotonic() + seconds
    while time.monotonic() < end and count < inputs:
        data = mutated(chance, target.corpus, target.text)
        held[:8], held[8 : 8 + len(data)] = len(data).to_bytes(8, "little"), data
        before, error = processor_s(target), None
        try:
            target.read(data)
        except ALLOWED as refused:
            if "decoder crashed" in str(refused) or "longer than" in str(refused):
                error = refused
        except Exception as wrong:
            error = wrong
        took = processor_s(target) - before  # negative after a decoder has ended
        count, worst_s = count + 1, max(worst_s, took)
        if error is not None or took > LIMIT_S:
            lines = traceback.format_exception(error) if error else [f"it took {took:.1f} s"]
            where = [line for line in lines if "File" in line][-1:] or lines
            key = f"{type(error).__name__} {where[0].strip()[:200]}"
            if key not in found:
                found.add(key)
                keep(f"{name}-{len(found)}", data)
                print(json.dumps({"finding": key, "said": str(error)[:300]}), flush=True)
    decoder = getattr(target.read, "_process", None)
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if decoder is not None:
        status = Path(f"/proc/{decoder.pid}/status").read_text()
        peak_kb = int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
    print(json.dumps({"inputs": count, "worst_s": worst_s, "peak_mb": peak_kb >> 10}), flush=True)
    os._exit(0)


def processor_s(target: Target) -> float:
    """Seconds of processor time of this process, or of the one that decodes for it."""
    decoder = getattr(target.read, "_process", None)
    if decoder is None:
        return time.process_time()
    try:
        fields = Path(f"/proc/{decoder.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def keep(name: str, data: bytes) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / name).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", help=f"of: {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--inputs", type=int, default=10**9, help="at most so many of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"expected targets of {', '.join(TARGETS)}, got {', '.join(unknown)}")
    seconds = 60 * options.minutes / len(names)
    if options.child:
        return fuzz(names[0], options.seed, seconds, options.inputs, Path(options.child))
    total = findings = 0
    for name in names:
        with tempfile.NamedTemporaryFile() as last:
            command = [sys.executable, __file__, name, "--minutes", str(seconds / 60)]
            command += ["--inputs", str(options.inputs), "--seed", str(options.seed)]
            done = subprocess.run([*command, "--child", last.name], capture_output=True)
            lines = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == b"{"]
            for line in (line for line in lines if "finding" in line):
                findings += 1
                print(f"{name}: {line['finding']}\n    {line['said']}", flush=True)
            summary = next((line for line in lines if "inputs" in line), None)
            if summary is None:
                findings += 1
                content = Path(last.name).read_bytes()
                size = int.from_bytes(content[:8], "little")
                keep(f"{name}-crash", content[8 : 8 + size])
                said = done.stderr.decode(errors="replace")[-1500:]
                print(f"{name}: ended with status {done.returncode}\n{said}", flush=True)
                continue
            total += summary["inputs"]
            print(
                f"{name:12} {summary['inputs']:8,} inputs, longest {summary['worst_s']:.2f} s, "
                f"peak {summary['peak_mb']} MB",
                flush=True,
            )
    print(f"{total:,} inputs (seed {options.seed}), {findings} findings")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
