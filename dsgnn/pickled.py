"""What a pickle would build, found out without building anything.

A pickle is a program for a small machine with a stack and a memo. Python's unpickler runs it as it
comes: 247 bytes can make it take 4 GB for a memo of that index, values inside one another some
hundred thousand times crash the interpreter when they are compared, and forty values that each hold
the one before twice keep it busy for ever. `check_pickle` follows the program with the depth and
the size of each value in its place. Python's `pickletools` knows what each instruction takes from
the stack and leaves there.
"""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
from typing import Any

DEPTH = 100  # of values inside one another; checkpoints and annotations have about ten
SHARED = 100  # values that a pickle may build for each of its bytes, by using some again

_INSTRUCTIONS = {found.code.encode("latin1"): found for found in pickletools.opcodes}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_MAKE_ATOMS = {
    found.name for found in pickletools.opcodes if found.stack_after and not found.stack_before
} - {*_GETS, "MARK"}
_PUT_INTO = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_MARK = (-1, 0)
_ATOM = (0, 1)


def check_pickle(data: bytes | mmap.mmap, start: int = 0) -> int:
    """Follow one pickle in `data`; gives where it ends.

    Raises pickle.UnpicklingError for values too deep or too many, and a memo of more places than
    the pickle has bytes; also for bytes that are no whole pickle.
    """
    file: Any = io.BytesIO(data) if isinstance(data, bytes) else data
    file.seek(start)
    try:
        _follow(file, start)
    except (IndexError, KeyError, ValueError):
        raise pickle.UnpicklingError("it is no whole pickle") from None
    return file.tell()


def _follow(file: Any, start: int) -> None:
    stack: list[tuple[int, int]] = []  # depth and size of each value
    memo: dict[int, tuple[int, int]] = {}
    while code := file.read(1):
        if (instruction := _INSTRUCTIONS.get(code)) is None:
            raise pickle.UnpicklingError(f"it has an unknown instruction {code[0]:#x}")
        name = instruction.name
        argument: Any = _argument(file, instruction.arg, name) if instruction.arg else None
        if name in _MAKE_ATOMS:
            stack.append(_ATOM)
        elif name == "STOP":
            return
        elif name in _PUTS:
            place = len(memo) if argument is None else argument
            if place > file.tell() - start:
                raise pickle.UnpicklingError(f"it has a memo of {place:,} places")
            memo[place] = stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            taken = _taken(stack, instruction)
            if instruction.stack_after:
                whole = taken.pop() if name in _PUT_INTO else _ATOM
                stack.append(_with(whole, taken, file.tell() - start))
    raise IndexError


def _argument(file: Any, kind: pickletools.ArgumentDescriptor, name: str) -> Any:
    """What follows an instruction of this name, as far as it matters here. Text in lines is not
    decoded, as `pickletools` takes ASCII only."""
    if kind.n != pickletools.UP_TO_NEWLINE:
        return kind.reader(file)
    lines = [file.readline() for _ in range(2 if name in ("GLOBAL", "INST") else 1)]
    if not lines[-1].endswith(b"\n"):
        raise IndexError
    return int(lines[0]) if name in ("PUT", "GET") else None


def _taken(
    stack: list[tuple[int, int]], instruction: pickletools.OpcodeInfo
) -> list[tuple[int, int]]:
    """What an instruction takes from the stack, the top first."""
    before = instruction.stack_before
    if pickletools.markobject not in before:
        return [stack.pop() for _ in before]
    parts = []
    while (part := stack.pop()) != _MARK:
        parts.append(part)
    if before[0] is not pickletools.markobject:  # what they are put into
        parts.append(stack.pop())
    return parts


def _with(whole: tuple[int, int], parts: list[tuple[int, int]], length: int) -> tuple[int, int]:
    """A value with these parts in it. length: bytes of the pickle so far."""
    depth, size = whole
    for inner, more in parts:
        depth, size = max(depth, inner + 1), size + more
    if depth > DEPTH:
        raise pickle.UnpicklingError(f"it has values more than {DEPTH} deep inside one another")
    if size > SHARED * length:
        raise pickle.UnpicklingError("it uses its values again and again inside one another")
    return depth, size
