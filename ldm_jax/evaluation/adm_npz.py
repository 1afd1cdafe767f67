"""Arrays in .npz files, a few rows at a time: 50,000 pictures of 256 pixels are 9.8 GB, and a job needs a batch of them."""

import json
import math
import struct
import threading
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.interop.torch_file import one_line

# What damaged archives and arrays raise, in zipfile and NumPy: neither has one class of errors of its own.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, TypeError, LookupError, RuntimeError, MemoryError)

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of its name and of the extra field


def damaged(path: Path, error: Exception) -> UserError:
    """What to tell of a file that cannot be read."""
    return UserError(f"{path} is damaged or not complete ({one_line(str(error)) or type(error).__name__}); write or fetch it anew")


def array_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz file, in its order. Raises UserError where it is none, is cut off, or is not there."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except DAMAGE as error:
        raise damaged(path, error) from error


def read_arrays(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Those arrays of an .npz file, whole. Raises UserError for a damaged file and for arrays that are pickles."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except DAMAGE as error:
        raise damaged(path, error) from error


def read_meta(path: Path, names: Collection[str]) -> dict[str, Any]:
    """The JSON object of an .npz file's array `meta` (text, bytes, or uint8 [n]), {} without one. Raises UserError for anything else."""
    if "meta" not in names:
        return {}
    array = read_arrays(path, ["meta"])["meta"]
    try:
        content = json.loads(array.tobytes() if array.dtype == np.uint8 else array.item())
    except ValueError as error:  # several elements, another encoding, no JSON
        raise UserError(f"{path}: its array meta is to be one JSON object as text or bytes ({one_line(str(error))})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: its array meta is to be one JSON object, not {type(content).__name__}")
    return content


class Rows:
    """One array of an .npz file, of which a few rows are read at a time, from any thread.

    A stored array (`np.savez`) is read at its place in the file. A deflated one (`np.savez_compressed`) is inflated from its beginning
    on: reading forwards does that once, each step backwards once again.

    Args:
        path: the file.
        name: the array's, without `.npy`.

    Attributes:
        dtype: of the array.
        shape: of the array; rows are along the first axis.

    Raises:
        UserError: the file is damaged, or the array is in Fortran order or has Python objects in it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        try:
            with zipfile.ZipFile(path) as archive:
                info = archive.getinfo(f"{name}.npy")
                with archive.open(info) as member:
                    self.shape, fortran, self.dtype = _header(member)
                    self._start = member.tell()
            self._offset = None if info.compress_type != zipfile.ZIP_STORED else self._start + _content(path, info)
        except DAMAGE as error:
            raise damaged(path, error) from error
        if fortran:
            raise UserError(f"{path}: {name} is in Fortran order; write np.ascontiguousarray of it")
        if self.dtype.hasobject or not self.shape:
            raise UserError(f"{path}: {name} is no array of numbers but {self.dtype} of shape {list(self.shape)}")
        self._row = math.prod(self.shape[1:])
        expected = self._start + self.shape[0] * self._row * self.dtype.itemsize
        if info.file_size != expected:
            raise damaged(path, ValueError(f"{name} has {info.file_size} bytes instead of {expected}"))
        self._member: IO[bytes] | None = None
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start ... stop - 1, 0 <= start <= stop <= shape[0]. Raises UserError where the file's bytes are damaged."""
        count = (stop - start) * self._row
        try:
            rows = self._inflate(start, count) if self._offset is None else self._stored(self._offset, start, count)
        except DAMAGE as error:
            raise damaged(self._path, error) from error
        return rows.reshape(stop - start, *self.shape[1:])

    def _stored(self, offset: int, start: int, count: int) -> np.ndarray:
        # not memory-mapped: pages that were read would count as this process's memory
        values = np.fromfile(self._path, self.dtype, count, offset=offset + start * self._row * self.dtype.itemsize)
        if len(values) != count:
            raise EOFError(f"{self._name} ends early")
        return values

    def _inflate(self, start: int, count: int) -> np.ndarray:
        values = np.empty(count, self.dtype)
        left = values.view(np.uint8).data
        with self._lock:
            if self._member is None:
                with zipfile.ZipFile(self._path) as archive:  # the file stays open as long as its member
                    self._member = archive.open(f"{self._name}.npy")
            self._member.seek(self._start + start * self._row * self.dtype.itemsize)
            while left:
                read = self._member.readinto(left[: 1 << 20])  # type: ignore[attr-defined]
                if not read:
                    raise EOFError(f"{self._name} ends early")
                left = left[read:]
        return values


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran order, dtype) of an array, whose values come next."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    if version in ((2, 0), (3, 0)):  # 3.0 differs in the encoding of the names of fields, of which numbers have none
        return np.lib.format.read_array_header_2_0(member)
    raise ValueError(f"its format is {version}")


def _content(path: Path, info: zipfile.ZipInfo) -> int:
    """Where in the file a member's bytes begin."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise ValueError(f"{info.filename} is not where the directory says")
    return info.header_offset + _LOCAL_HEADER.size + name + extra
