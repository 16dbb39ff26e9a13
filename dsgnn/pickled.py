"""What a pickle would build, found out without building anything.

A pickle is a program for a small machine with a stack and a memo. Python's unpickler runs it as it
comes: 247 bytes can make it take 4 GB for a memo of that index, values inside one another some
hundred thousand times crash the interpreter when they are compared, and forty values that each hold
the one before twice keep it busy for ever. `check_pickle` follows the program with the depth and
the size of each value in its place. The instructions are those of protocols 0 to 5, see Python's
`pickletools`.
"""

from __future__ import annotations

import pickle

DEPTH = 100  # of values inside one another; checkpoints and annotations have about ten
SHARED = 100  # values that a pickle may build for each of its bytes, by using some again

_LINES = {b: 1 for b in b"ILFSVPgp"} | {b: 2 for b in b"ci"}  # arguments that are lines of text
_FIXED = (  # bytes of an argument, by the instruction
    {b: 1 for b in b"Kqh\x80\x82"}
    | {b: 2 for b in b"M\x83"}
    | {b: 4 for b in b"Jrj\x84"}
    | {b: 8 for b in b"G\x95"}
)
_COUNTED = (  # bytes of the length of an argument
    {b: 1 for b in b"UC\x8c\x8a"} | {b: 4 for b in b"TBX\x8b"} | {b: 8 for b in b"\x8d\x8e\x96"}
)
_ATOMS = frozenset(b"IJKMLFGSTUBCVXPN]})c\x82\x83\x84\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x96\x97")
_MADE_OF = {  # one value of so many
    **{b: 1 for b in b"\x85Q\x98"},
    **{b: 2 for b in b"\x86R\x81\x93"},
    **{b: 3 for b in b"\x87\x92"},
}
_PUT_INTO = {ord("a"): 1, ord("s"): 2, ord("b"): 1}  # so many go into the value below them
_MADE_TO_MARK = frozenset(b"tldio\x91")
_PUT_TO_MARK = frozenset(b"eu\x90")
_MARK = (-1, 0)
_ATOM = (0, 1)


def check_pickle(data: bytes | memoryview, start: int = 0) -> int:
    """Follow one pickle in `data`; gives where it ends.

    Raises pickle.UnpicklingError for values too deep or too many, and a memo of more places than
    the pickle has bytes; also for bytes that are no whole pickle.
    """
    try:
        return _follow(data, start)
    except IndexError:
        raise pickle.UnpicklingError("it is no whole pickle") from None


def _follow(data: bytes | memoryview, start: int) -> int:
    stack: list[tuple[int, int]] = []  # depth and size of each value
    memo: dict[int, tuple[int, int]] = {}
    at = start
    while True:
        code = data[at]
        at += 1
        argument = at
        if code in _FIXED:
            at += _FIXED[code]
        elif code in _COUNTED:
            at += _COUNTED[code]
            at += int.from_bytes(data[argument:at], "little")
        elif code in _LINES:
            for _ in range(_LINES[code]):
                at = _line_end(data, at)
        if at > len(data):
            raise IndexError
        if code == ord("."):
            return at
        if code in b"qrp\x94":
            place = len(memo) if code == 0x94 else _number(data, argument, at, code == ord("p"))
            if place > at - start:
                raise pickle.UnpicklingError(f"it has a memo of {place:,} places")
            memo[place] = stack[-1]
        elif code in b"hjg":
            place = _number(data, argument, at, code == ord("g"))
            if place not in memo:
                raise IndexError
            stack.append(memo[place])
        elif code == ord("("):
            stack.append(_MARK)
        elif code in b"01":
            while stack.pop() != _MARK and code == ord("1"):
                pass
        elif code == ord("2"):
            stack.append(stack[-1])
        elif code in _MADE_OF:
            stack.append(_joined([stack.pop() for _ in range(_MADE_OF[code])], at - start))
        elif code in _MADE_TO_MARK:
            stack.append(_joined(_to_mark(stack), at - start))
        elif code in _PUT_INTO:
            parts = [stack.pop() for _ in range(_PUT_INTO[code])]
            stack.append(_with(stack.pop(), parts, at - start))
        elif code in _PUT_TO_MARK:
            parts = _to_mark(stack)
            stack.append(_with(stack.pop(), parts, at - start))
        elif code in _ATOMS:
            stack.append(_ATOM)
        elif code not in b"\x80\x95":
            raise pickle.UnpicklingError(f"it has an unknown instruction {code:#x}")


def _number(data: bytes | memoryview, start: int, end: int, text: bool) -> int:
    if not text:
        return int.from_bytes(data[start:end], "little")
    digits = bytes(data[start : end - 1])
    if not digits.isdigit() or len(digits) > 10:
        raise IndexError
    return int(digits)


def _line_end(data: bytes | memoryview, at: int) -> int:
    while data[at] != 0x0A:
        at += 1
    return at + 1


def _to_mark(stack: list[tuple[int, int]]) -> list[tuple[int, int]]:
    parts = []
    while (part := stack.pop()) != _MARK:
        parts.append(part)
    return parts


def _joined(parts: list[tuple[int, int]], length: int) -> tuple[int, int]:
    """A value of these parts. length: bytes of the pickle so far."""
    return _with(_ATOM, parts, length)


def _with(whole: tuple[int, int], parts: list[tuple[int, int]], length: int) -> tuple[int, int]:
    depth, size = whole
    for inner, more in parts:
        depth, size = max(depth, inner + 1), size + more
    if depth > DEPTH:
        raise pickle.UnpicklingError(f"it has values more than {DEPTH} deep inside one another")
    if size > SHARED * length:
        raise pickle.UnpicklingError("it uses its values again and again inside one another")
    return depth, size
