"""Examples as bytes: MessagePack with an extension type for NumPy arrays. Nothing that is read is ever executed."""

from typing import Any

import ml_dtypes
import msgpack
import numpy as np

_ARRAY = 1  # code of the extension type


def encode_example(example: dict[str, Any]) -> bytes:
    """Bytes of a dict of strings, numbers, lists, dicts and NumPy arrays of numbers or booleans.

    Raises:
        ValueError: an entry of another type.
    """
    return msgpack.packb(example, default=_pack_array)


def decode_example(record: bytes) -> dict[str, Any]:
    """The dict that `encode_example` got. Arrays are read-only views into the record."""
    return msgpack.unpackb(record, ext_hook=_unpack_array, strict_map_key=False)


def _pack_array(value: Any) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray | np.generic) or (value.dtype.kind not in "biuf" and value.dtype != ml_dtypes.bfloat16):
        raise ValueError(f"cannot store a {type(value).__name__} in a record; use arrays, numbers, strings and lists")
    kind = value.dtype.str if value.dtype.kind in "biuf" else value.dtype.name
    header = msgpack.packb((kind, value.shape))
    return msgpack.ExtType(_ARRAY, header + value.tobytes())


def _unpack_array(code: int, data: bytes) -> Any:
    if code != _ARRAY:
        raise ValueError(f"unknown extension type {code} in a record")
    unpacker = msgpack.Unpacker()
    unpacker.feed(data[:64])  # more than any header is long
    dtype, shape = unpacker.unpack()
    return np.frombuffer(data, np.dtype(dtype), offset=unpacker.tell()).reshape(shape)[()]
