"""Pickles of plain values and arrays of bytes, read without calling what they name.

A pickle is a program. Python's own unpickler runs it: it calls the functions that are named there,
hands NumPy states that NumPy trusts, and hashes keys that take forever. The files of CIFAR-10 need
few of its instructions, whichever Python, NumPy and protocol wrote them, and here are no others.
"""

from __future__ import annotations

import codecs
import io
import math
import pickletools
from dataclasses import dataclass

import numpy as np

CONSTANTS = {  # instructions whose argument is the value
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "STRING",
}  # fmt: skip
WRITTEN = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NAMES = {  # what may be named, as old and new NumPy call it; nothing of it is ever imported
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("numpy.core.multiarray", "_reconstruct"): "empty array",
    ("numpy._core.multiarray", "_reconstruct"): "empty array",
    ("numpy.core.numeric", "_frombuffer"): "array",  # protocol 5
    ("numpy._core.numeric", "_frombuffer"): "array",
    ("_codecs", "encode"): "bytes",  # protocols 0 to 2 of Python 3
}
BYTE = ("u1", b"u1", "|u1", "uint8", b"|u1")  # the one dtype


@dataclass
class _Name:
    """Stands for a function or class."""

    what: str


class _Byte:
    """Stands for the dtype; its state is not looked at."""


@dataclass
class _Array:
    """Stands for an array until its bytes are there."""

    value: np.ndarray | None = None

    def fill(self, content: object, dtype: object, shape: object, order: object) -> None:
        legal = "legal: bytes in rows"
        if not isinstance(dtype, _Byte) or not isinstance(content, bytes | bytearray):
            raise ValueError(f"an array of something else; {legal}")
        if order not in ("C", b"C"):
            raise ValueError(f"an array in columns; {legal}")
        if min(shape, default=0) < 0 or math.prod(shape) != len(content):
            raise ValueError(f"an array of shape {shape} in {len(content)} bytes")
        self.value = np.frombuffer(content, np.uint8).reshape(shape)


def load(content: bytes) -> object:
    """Read the dicts, lists, tuples, texts, numbers and arrays of bytes in a pickle.

    Keys are text; an array is an ``_Array`` with its ``value``.

    Raises:
        Exception: Of any kind: it is damaged, or asks for something else. See ``files.parsing``.
    """
    stream, stack, marks, memo = io.BytesIO(content), [], [], {}

    def marked() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    while True:
        step = pickletools.code2op[stream.read(1).decode("latin-1")]
        if step.name == "STRING":  # Python 2's text form of bytes
            argument = codecs.escape_decode(pickletools.read_stringnl(stream, decode=False))[0]
        else:
            argument = step.arg.reader(stream) if step.arg else None
        match step.name:
            case name if name in CONSTANTS:
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":  # bytes of Python 2, which pickletools decodes
                stack.append(argument.encode("latin-1"))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case name if name in WRITTEN:
                stack.append(WRITTEN[name])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(step.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(marked()))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(marked())
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = marked()
                stack[-1].extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append(_pairs(marked()))
            case "SETITEM":
                pair = [stack.pop(-2), stack.pop()]
                stack[-1].update(_pairs(pair))
            case "SETITEMS":
                pairs = _pairs(marked())
                stack[-1].update(pairs)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(stack.pop(-2), stack.pop()))
            case "REDUCE":
                stack.append(_called(stack.pop(-2), stack.pop()))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Array):
                    _, shape, dtype, by_column, raw = state
                    stack[-1].fill(raw, dtype, shape, "F" if by_column else "C")
                elif not isinstance(stack[-1], _Byte):
                    raise ValueError("it asks for BUILD of something else, which is not allowed")
            case name:
                raise ValueError(f"it asks for {name}, which is not allowed")


def _pairs(items: list) -> dict[str, object]:
    keys = [key.decode("latin-1") if isinstance(key, bytes) else key for key in items[::2]]
    if not all(isinstance(key, str) for key in keys):  # a tuple of tuples may be hashed forever
        raise ValueError("a key that is no text")
    return dict(zip(keys, items[1::2], strict=True))


def _named(module: str, name: str) -> _Name:
    if (module, name) not in NAMES:
        raise ValueError(f"it asks for {module}.{name}, which is not allowed")
    return _Name(NAMES[module, name])


def _called(function: object, arguments: object) -> object:
    """Make what a call of an allowed name stands for."""
    match getattr(function, "what", None), arguments:
        case "empty array", (_Name("ndarray"), *_):
            return _Array()
        case "array", (content, dtype, shape, order):
            array = _Array()
            array.fill(content, dtype, shape, order)
            return array
        case "dtype", (kind, *_) if kind in BYTE:
            return _Byte()
        case "bytes", (str(text), "latin1"):
            return text.encode("latin-1")
    raise ValueError("it asks for a call that is not allowed, or for numbers that are no bytes")
