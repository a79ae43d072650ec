"""The numbers in a pickle, without unpickling it: for CIFAR's files, which are published as pickles only in that form.

A pickle is a program for a stack machine that may call any function. Here its instructions are listed by pickletools,
which runs none of them, and followed by a machine of this module's own that knows those for constants, lists, tuples
and dicts alone. Of the three names that a NumPy array is made with, none is imported: they are recognised as text, and
the array is told by its shape and by where its bytes lie in the file. Any other instruction or name ends the reading.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triscale.data.lists import quote
from triscale.errors import UsageError

MAX_PICKLE_BYTES = 256 * 2**20
_LONG_STRING = 3072
"""Strings of this many bytes are told by their place alone."""
_HEADER_BYTES = {"SHORT_BINSTRING": 2, "BINSTRING": 5, "SHORT_BINBYTES": 2, "BINBYTES": 5}
"""Bytes of an instruction before its string."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a long string lies in its file, in bytes."""

    offset: int
    size: int


@dataclass(slots=True)
class InertArray:
    """A NumPy array as its pickle describes it."""

    shape: tuple[int, ...] = ()
    dtype: str = ""
    column_major: bool = False
    data: Span | None = None


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that the pickle would have had imported."""

    name: str


@dataclass(slots=True)
class _Dtype:
    code: object = None


class _Refused(Exception):
    """The pickle holds what is not followed."""


def read_inert_pickle(path: Path) -> dict[str, Any]:
    """The dict in a pickle: strings as str, numbers, lists, tuples, dicts, arrays as `InertArray`.

    Raises:
        UsageError: the file cannot be read, is larger than 256 MiB, is no pickle of a dict, or would do more than
            make these.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_PICKLE_BYTES:
            raise _Refused("it is no file, or a larger one than is read")
        # In memory, where a length that a pickle claims is cut to what there is; a file would have it all allocated.
        made = _Machine().run(io.BytesIO(path.read_bytes()))
    except OSError as error:
        raise UsageError(f"{quote(str(path))}: {error.strerror or 'cannot be read'}") from error
    except (_Refused, ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{quote(str(path))}: not CIFAR's file as it is published; {quote(str(error))} (pickles are never executed)"
        ) from error
    if not isinstance(made, dict):
        raise UsageError(f"{quote(str(path))}: it holds no dict")
    return made


@dataclass(slots=True)
class _Machine:
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, file: io.BytesIO) -> Any:
        """What the pickle in `file` makes."""
        instructions: Iterator[tuple[Any, Any, Any]] = pickletools.genops(file)
        for code, argument, position in instructions:
            name = code.name
            if name == "STOP":
                break
            if name in _HEADER_BYTES:
                self.stack.append(_string(argument, position + _HEADER_BYTES[name]))
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name] if argument is None else argument)
            elif name in _INSTRUCTIONS:
                _INSTRUCTIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise _Refused(f"instruction {name}")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        """What was put on the stack since the last mark, taken from it."""
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def take(self, count: int) -> tuple[Any, ...]:
        """The last `count` things of the stack, taken from it."""
        return tuple(reversed([self.stack.pop() for _ in range(count)]))


def _string(text: str | bytes, offset: int) -> str | Span:
    if len(text) >= _LONG_STRING:
        return Span(offset, len(text))
    return text if isinstance(text, str) else text.decode("latin-1")


def _append(machine: _Machine, values: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        raise _Refused("a list is no list")
    target += values


def _set_items(machine: _Machine, values: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict) or len(values) % 2:
        raise _Refused("a dict is no dict")
    target.update(zip(values[::2], values[1::2], strict=True))


def _import(machine: _Machine, argument: str) -> None:
    if argument not in _NAMES:
        raise _Refused(f"name {argument}")
    machine.stack.append(_Name(_NAMES[argument]))


def _call(machine: _Machine, argument: object) -> None:
    called, arguments = machine.take(2)
    if not isinstance(called, _Name) or not isinstance(arguments, tuple):
        raise _Refused("a call")
    if called.name == "array" and arguments[:1] == (_Name("type of arrays"),):
        machine.stack.append(InertArray())
    elif called.name == "dtype" and arguments:
        machine.stack.append(_Dtype(arguments[0]))
    else:
        raise _Refused("a call")


def _build(machine: _Machine, argument: object) -> None:
    (state,) = machine.take(1)
    built = machine.stack[-1]
    if isinstance(built, _Dtype):
        return
    if not isinstance(built, InertArray) or not isinstance(state, tuple) or len(state) != 5:
        raise _Refused("a state")
    _, shape, dtype, column_major, data = state
    if not isinstance(shape, tuple) or not isinstance(dtype, _Dtype) or not isinstance(data, Span):
        raise _Refused("an array")
    built.shape, built.dtype = shape, str(dtype.code)
    built.column_major, built.data = bool(column_major), data


def _put(machine: _Machine, argument: int) -> None:
    machine.memo[argument] = machine.stack[-1]


_NAMES = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy ndarray": "type of arrays",
    "numpy dtype": "dtype",
}
"""The names that are recognised, as pickletools spells them, and what they mean here."""
_CONSTANTS: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "BININT": 0,
    "BININT1": 0,
    "BININT2": 0,
    "LONG1": 0,
    "BINUNICODE": "",
    "SHORT_BINUNICODE": "",
}
"""Instructions that put their argument, or the constant that they stand for, on the stack."""
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.stack.append(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.stack.append(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.stack.append(machine.take(3)),
    "APPEND": lambda machine, _: _append(machine, list(machine.take(1))),
    "APPENDS": lambda machine, _: _append(machine, machine.since_mark()),
    "SETITEM": lambda machine, _: _set_items(machine, list(machine.take(2))),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.since_mark()),
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "BINGET": lambda machine, number: machine.stack.append(machine.memo[number]),
    "LONG_BINGET": lambda machine, number: machine.stack.append(machine.memo[number]),
    "GLOBAL": _import,
    "REDUCE": _call,
    "BUILD": _build,
}
