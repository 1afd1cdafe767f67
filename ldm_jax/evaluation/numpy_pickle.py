"""Pickles of plain values and NumPy's arrays, read without running anything of them.

It is the reader of torch files (`interop.torch_file`) with other names: an array is a call of `_reconstruct` whose state is set
afterwards, or since protocol 5 of `_frombuffer`; both are built here from their bytes, for a forged state can make NumPy read any memory.
"""

import io
import pickle
from typing import Any

import numpy as np

from ldm_jax.interop import torch_file
from ldm_jax.interop.torch_file import Function, Instructions, one_line

_KINDS = {f"{kind}{size}" for kind, sizes in {"f": "248", "i": "1248", "u": "1248", "b": "1"}.items() for size in sizes}


def load_pickle(data: bytes) -> Any:
    """The pickled value: a number, text, bytes, an array of numbers, or dicts and lists of these.

    Raises ValueError, in one line, where it is cut off, no pickle, or asks for anything else; nothing of it is run.
    """
    try:
        return _plain(_Unpickler(data).load())
    except torch_file.DAMAGE as error:
        raise ValueError(one_line(str(error)) or "it is cut off") from error


class _Dtype:
    """A type of numbers, in the byte order that its state says."""

    def __init__(self, kind: Any, *_: Any) -> None:
        if kind not in _KINDS:
            raise ValueError("it has an array of something else than numbers")
        self.kind = kind
        self.dtype = np.dtype(kind)

    def build(self, state: Any) -> None:
        match state:
            case (int(), "<" | ">" | "|" | "=" as order, *_):
                self.dtype = np.dtype(order + self.kind)
            case _:
                raise ValueError("it has a type of numbers that is malformed")


class _Array:
    """An array whose state is to come."""

    array: np.ndarray | None = None

    def build(self, state: Any) -> None:
        match state:
            case (int(), shape, dtype, bool() | int() as fortran, data):
                self.array = _from_bytes(data, dtype, shape, "F" if fortran else "C")
            case _:
                raise ValueError("it has an array that is malformed")


def _from_bytes(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    plain = isinstance(data, bytes) and isinstance(dtype, _Dtype) and isinstance(shape, tuple) and order in ("C", "F")
    if not plain or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("it has an array that is malformed")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: Any, data: Any) -> Any:
    return _from_bytes(data, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any = "utf-8", *_: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("it has bytes in an encoding other than latin1")
    return text.encode(encoding)


_PLAIN = str | bytes | int | float | None | np.ndarray | np.generic
_CORES = ("numpy.core", "numpy._core")  # of NumPy 1 and 2
_FUNCTIONS = {
    "numpy.ndarray": Function(_Array),
    "numpy.dtype": Function(_Dtype),
    "_codecs.encode": Function(_encode),  # bytes in protocols before 3
    "__builtin__.bytes": Function(lambda: b""),  # and b"" is this
    **{f"{core}.multiarray._reconstruct": Function(lambda *_: _Array()) for core in _CORES},
    **{f"{core}.multiarray.scalar": Function(_scalar) for core in _CORES},
    **{f"{core}.numeric._frombuffer": Function(_from_bytes) for core in _CORES},
}


class _Unpickler(torch_file.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), self._no_storage)

    def find_class(self, module: str, name: str) -> Function:
        if function := _FUNCTIONS.get(f"{module}.{name}"):
            return function
        raise ValueError(f"it asks for {module}.{name}, which no array needs; nothing of it was run")

    @staticmethod
    def _no_storage(*_: Any) -> np.ndarray:
        raise ValueError("it holds tensors of torch")

    def _load_state(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _Dtype):
            raise ValueError(f"it sets the state of a {type(self.stack[-1]).__name__}; nothing of it was run")
        self.stack[-1].build(state)

    dispatch = Instructions(
        torch_file.Unpickler.dispatch
        | {pickle.BUILD[0]: _load_state, pickle.BYTEARRAY8[0]: torch_file.Unpickler.dispatch[pickle.BINBYTES8[0]]}
    )


def _plain(value: Any) -> Any:
    """The value with its arrays. Containers can hold one another or themselves, so each is gone through once."""
    whole = [value]
    left: list[Any] = [whole]
    seen: set[int] = set()
    while left:
        container = left.pop()
        for key, entry in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(entry, dict | list):
                left += [] if id(entry) in seen else [entry]
                seen.add(id(entry))
            elif isinstance(entry, _Array) and entry.array is not None:
                container[key] = entry.array
            elif not isinstance(entry, _PLAIN):
                raise ValueError("it holds something else than numbers, text, arrays, and dicts and lists of them")
    return whole[0]
