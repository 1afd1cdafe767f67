"""Torch files written one tensor at a time, without torch (see `torch_file` for the format)."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.interop.safetensors_file import HasSpec, Spec
from ldm_jax.interop.torch_file import STORAGES
from ldm_jax.paths import commit

_ROOT = "archive"
_ALIGNMENT = 64  # bytes; torch's own, which lets it map a file
_KINDS = {dtype: name for name, dtype in STORAGES.items()}


def write_checkpoint(path: str | os.PathLike[str], tensors: Iterable[tuple[str, np.ndarray]], specs: Mapping[str, HasSpec]) -> None:
    """Writes tensors as they come to one file, whose dict of them is `torch.load(path, weights_only=True)["state_dict"]`: memory is that of
    one tensor, and the file appears whole or not at all.

    Args:
      path: the file, on a local disk, of any size.
      tensors: name and array, each name of `specs` once; the array as the file shall hold it.
      specs: shape and dtype of every tensor, in the order of the file's dict.

    Raises UserError where the disk does not take the file; ValueError where tensors are not those of `specs`, or torch has no such dtype.
    """
    path = Path(path)
    temporary = Path(f"{path}.tmp{os.getpid()}")
    wanted = {name: Spec(tuple(spec.shape), np.dtype(spec.dtype)) for name, spec in specs.items()}
    keys = {name: key for key, name in enumerate(wanted)}
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            begin(archive, {"state_dict": wanted})
            for name, array in tensors:
                if name not in keys or (array.shape, array.dtype) != wanted[name]:
                    raise ValueError(f"{name} is not to be written, or not again, or not as {array.dtype}{list(array.shape)}")
                add_storage(archive, keys.pop(name), array)
                del array  # or it would live while the next one is made
        if keys:
            raise ValueError(f"{len(keys)} tensors to be written were not given, such as {next(iter(keys))}")
        commit(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def begin(archive: zipfile.ZipFile, content: Any) -> list[np.ndarray | Spec]:
    """Writes all of a file but its storages: an object of plain values and tensors, each of which is an array or a `Spec`. Returns the
    tensors in the order of their storages' keys, 0 first. Raises ValueError for a dtype that torch has not."""
    stream = BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(content)
    for name, member in (("data.pkl", stream.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}"), member)
    return pickler.tensors


def storage_member(archive: zipfile.ZipFile, key: int, nbytes: int) -> zipfile.ZipInfo:
    """The next member of an archive, which is to hold the storage `key`: its header is filled up such that its bytes are aligned."""
    info = zipfile.ZipInfo(f"{_ROOT}/data/{key}")
    info.file_size, info.compress_size, info.CRC = nbytes, nbytes, 0
    start = archive.start_dir + len(info.FileHeader(zip64=True)) + 4
    filling = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", filling) + b"Z" * filling  # torch's name for such a field
    return info


def add_storage(archive: zipfile.ZipFile, key: int, array: np.ndarray) -> None:
    """Writes the storage `key`, of an array's elements in the order of rows."""
    with archive.open(storage_member(archive, key, array.nbytes), "w", force_zip64=True) as member:
        member.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class _Pickler(pickle._Pickler):
    """Python's own pickler, in which an array, or the `Spec` of one, becomes a tensor on a storage of its own.

    Names of torch are written as they are: Python would want to import them.
    """

    write: Callable[[bytes], Any]

    def __init__(self, stream: BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.tensors: list[np.ndarray | Spec] = []

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, np.ndarray | Spec):
            return super().save(obj, save_persistent_id)  # type: ignore[misc]
        if obj.dtype not in _KINDS:
            raise ValueError(f"torch files here hold no tensors of {obj.dtype}")
        sizes = [int(size) for size in obj.shape]
        strides = [int(np.prod(sizes[i + 1 :], dtype=object)) for i in range(len(sizes))]
        self.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        self._save_all("storage")
        self.write(b"ctorch\n" + _KINDS[obj.dtype].encode() + b"\n")
        self._save_all(str(len(self.tensors)), "cpu", int(np.prod(sizes, dtype=object)))
        self.write(b"tQ")
        self._save_all(0, tuple(sizes), tuple(strides), False)
        self.write(b"ccollections\nOrderedDict\n)RtR")
        self.tensors.append(obj)

    def _save_all(self, *values: Any) -> None:
        for value in values:
            self.save(value)
