"""Pickled dictionaries of numbers, texts and arrays, read without unpickling.

Some data sets, CIFAR-10 among them, are published as pickles. Unpickling calls whatever functions a
file names. Here the file is only parsed (:func:`pickletools.genops` lists what it would do) and its
few steps are carried out on a stack of plain values: nothing a file names is imported or called.
What is no number, text, byte string, list, tuple, dictionary or array of numbers is refused.
"""

import os
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eanet.errors import UserError

__all__ = ["read_pickled_dictionary"]

#: a batch of CIFAR-10 has 31 MB
_MAX_BYTES = 2**30

_ARRAY_MAKERS = {
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
}
_ARRAYS_OF_BYTES = {"numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer"}
#: names that may stand in a file, none of which is looked up
_KNOWN_NAMES = {*_ARRAY_MAKERS, *_ARRAYS_OF_BYTES, "numpy ndarray", "numpy dtype", "_codecs encode"}


class _RefusedError(Exception):
    """The file holds something else than plain values."""


@dataclass
class _Name:
    """A name that a file would import."""

    text: str


@dataclass
class _Type:
    """A type of numbers: ``u1`` and alike, and the order of its bytes."""

    code: str
    order: str = "="


@dataclass
class _Array:
    """An array whose state follows later in the file."""

    values: np.ndarray | None = None


_MARK = object()


def read_pickled_dictionary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the dictionary that a pickle holds.

    Args:
        path: the file, of any protocol, written by Python 2 or 3.

    Returns:
        The values by name; arrays are numpy arrays, texts of Python 2 are ``str``.

    Raises:
        UserError: the file is missing, damaged, too large, or holds anything but plain values.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{str(path)!r} is larger than {_MAX_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    try:
        found = _Reader().read(content)
    except _RefusedError as error:
        raise UserError(
            f"{str(path)!r}: not read: {error}; only plain values and arrays are"
        ) from None
    # what a damaged file makes of a parser and of this one's stack
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{str(path)!r} is no pickle, or is damaged: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{str(path)!r} holds no dictionary")
    return {_text(key): _plain(value) for key, value in found.items()}


def _text(value: Any) -> str:
    """Return a key as text; those of Python 2 may be bytes."""
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    """Return a value with its arrays as numpy arrays."""
    if isinstance(value, _Array):
        if value.values is None:
            raise UserError("a pickled array has no values")
        return value.values
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value


@dataclass
class _Reader:
    """A stack and a memory of plain values, as the format describes them."""

    stack: list[Any] = field(default_factory=list[Any])
    memory: dict[int, Any] = field(default_factory=dict[int, Any])

    def read(self, content: bytes) -> Any:
        """Carry out all steps of a file and return what it holds."""
        for opcode, argument, _ in _steps(content):
            name = opcode.name
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _VALUES:
                self.stack.append(argument)
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name == "STOP":
                return self.stack.pop()
            else:
                raise _RefusedError(f"it has the step {name}")
        raise ValueError("it ends early")

    def put(self, place: int | None) -> None:
        """Remember the top of the stack."""
        self.memory[len(self.memory) if place is None else place] = self.stack[-1]

    def since_mark(self) -> list[Any]:
        """Take everything above the last mark."""
        start = max(place for place, value in enumerate(self.stack) if value is _MARK)
        taken = self.stack[start + 1 :]
        del self.stack[start:]
        return taken

    def extend(self, values: list[Any]) -> None:
        """Append values to the list on top."""
        target = self.stack[-1]
        if not isinstance(target, list):
            raise _RefusedError("it fills something that is no list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        """Enter keys and values, in turn, into the dictionary on top."""
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _RefusedError("it fills something that is no dictionary")
        target.update(zip(values[::2], values[1::2], strict=True))

    def tuple_of(self, count: int) -> None:
        """Make one tuple of the values on top."""
        taken = tuple(self.stack[-count:])
        if len(taken) != count:
            raise ValueError("a value is missing")
        self.stack[-count:] = [taken]

    def name(self, text: str) -> None:
        """Put a name that is known here onto the stack, without looking it up."""
        if text not in _KNOWN_NAMES:
            raise _RefusedError(f"it names {text.replace(' ', '.')}")
        self.stack.append(_Name(text))

    def named_by_stack(self) -> None:
        """Do the same with a module and a name that lie on the stack."""
        attribute, module = self.stack.pop(), self.stack.pop()
        self.name(f"{module} {attribute}")

    def call(self) -> None:
        """Do what the few known calls would do."""
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Name):
            raise _RefusedError("it calls something without a name")
        if called.text in _ARRAY_MAKERS:
            self.stack.append(_Array())
        elif called.text in _ARRAYS_OF_BYTES:
            values, number_type, shape, order = arguments
            self.stack.append(_Array(_array((1, shape, number_type, order == "F", values))))
        elif called.text == "numpy dtype":
            self.stack.append(_Type(_text(arguments[0])))
        elif called.text == "_codecs encode" and arguments[1] == "latin1":
            self.stack.append(arguments[0].encode("latin-1"))
        else:
            raise _RefusedError(f"it calls {called.text.replace(' ', '.')}")

    def build(self) -> None:
        """Give a type its byte order, an array its values."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Type):
            target.order = _text(state[1])
        elif isinstance(target, _Array):
            target.values = _array(state)
        else:
            raise _RefusedError("it builds an object")


def _steps(content: bytes) -> Iterator[tuple[Any, Any, int | None]]:
    """Yield the steps of a file."""
    yield from pickletools.genops(content)


def _array(state: tuple[Any, ...]) -> np.ndarray:
    """Return the array that version, shape, type, order and bytes describe."""
    _, shape, number_type, is_fortran, values = state
    if not isinstance(number_type, _Type) or number_type.code[:1] not in "uifb":
        raise _RefusedError("it holds an array of something else than numbers")
    order = {"|": "=", "": "="}.get(number_type.order, number_type.order)
    dtype = np.dtype(order + number_type.code)
    data = values.encode("latin-1") if isinstance(values, str) else values
    array = np.frombuffer(data, dtype=dtype)
    return array.reshape(shape, order="F" if is_fortran else "C").copy()


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_ACTIONS: dict[str, Callable[[_Reader, Any], None]] = {
    "PROTO": lambda reader, argument: None,
    "FRAME": lambda reader, argument: None,
    "PUT": lambda reader, argument: reader.put(argument),
    "BINPUT": lambda reader, argument: reader.put(argument),
    "LONG_BINPUT": lambda reader, argument: reader.put(argument),
    "MEMOIZE": lambda reader, argument: reader.put(None),
    "GET": lambda reader, argument: reader.stack.append(reader.memory[argument]),
    "BINGET": lambda reader, argument: reader.stack.append(reader.memory[argument]),
    "LONG_BINGET": lambda reader, argument: reader.stack.append(reader.memory[argument]),
    "APPEND": lambda reader, argument: reader.extend([reader.stack.pop()]),
    "APPENDS": lambda reader, argument: reader.extend(reader.since_mark()),
    "LIST": lambda reader, argument: reader.stack.append(reader.since_mark()),
    "DICT": lambda reader, argument: _dictionary(reader),
    "SETITEM": lambda reader, argument: reader.set_items(
        [reader.stack.pop(-2), reader.stack.pop()]
    ),
    "SETITEMS": lambda reader, argument: reader.set_items(reader.since_mark()),
    "TUPLE": lambda reader, argument: reader.stack.append(tuple(reader.since_mark())),
    "TUPLE1": lambda reader, argument: reader.tuple_of(1),
    "TUPLE2": lambda reader, argument: reader.tuple_of(2),
    "TUPLE3": lambda reader, argument: reader.tuple_of(3),
    "GLOBAL": lambda reader, argument: reader.name(argument),
    "STACK_GLOBAL": lambda reader, argument: reader.named_by_stack(),
    "REDUCE": lambda reader, argument: reader.call(),
    "BUILD": lambda reader, argument: reader.build(),
}


def _dictionary(reader: _Reader) -> None:
    """Make a dictionary of the keys and values above the last mark."""
    values = reader.since_mark()
    reader.stack.append({})
    reader.set_items(values)
