"""Weights from torch, safetensors and numpy files as numpy arrays, without torch.

A torch file (`torch.save`, since 1.6) is a zip archive: `<name>/data.pkl` is a pickle of the object, in which each tensor is a call of
`torch._utils._rebuild_tensor_v2` on a storage, and `<name>/data/<key>` holds the bytes of a storage. Before 1.6 it was a row of pickles
(a magic number, a version, the machine's word sizes, the object, the keys of its storages) followed by the storages' bytes; torchvision's
VGG16 and the LPIPS heads are still kept that way.

Pickles can call any function, so this reader knows the few names that a state dict needs, replaces them by its own functions, and refuses
the rest: nothing of the file is run.
"""

import io
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file

_STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
# What damaged or forged files make zipfile and the unpickler raise; neither has one class of errors of its own.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    pickle.UnpicklingError,
    EOFError,
    OSError,  # a seek to a place that cannot be
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    OverflowError,
    RuntimeError,  # an encrypted member; a compression method or zip version that is not supported
)


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The named tensors of a `.safetensors`, `.npz` or torch zip file (`.pth`, `.pt`, `.ckpt`, `.bin`; any other suffix
    is read as one).

    A torch file whose object has the key `state_dict` gives that dict; entries that are no tensors (step counts, say)
    are left out. Arrays keep the file's shapes and dtypes (bfloat16 as `ml_dtypes.bfloat16`), and those of a local
    torch file are read-only views of the mapped file, so that only what is used is read.

    Raises ValueError, in one line, for a file that is damaged, of another format, holds no tensors, or asks for code to
    be run; FileNotFoundError where there is no such file.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no weight file at {file}")
    if file.suffix == ".safetensors":
        return _load_safetensors(file)
    state = _load_npz(file) if file.suffix == ".npz" else _load_torch(file)
    if not state:
        raise ValueError(f"{file} holds no named tensors: give a state dict, or a dict with the key 'state_dict'")
    return state


def _load_safetensors(file: epath.Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no complete safetensors file: {error}") from error


def _load_npz(file: epath.Path) -> dict[str, np.ndarray]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return dict(archive.items())
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"{file} is no complete .npz file of plain arrays: {error}") from error


def _load_torch(file: epath.Path) -> dict[str, np.ndarray]:
    with file.open("rb") as stream:
        legacy = stream.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC
        stream.seek(0)
        try:
            loaded = _load_legacy(stream) if legacy else _Archive(stream).load()
        except _DAMAGE as error:
            raise ValueError(f"{file} cannot be read as a torch weight file: {error}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = state.items() if isinstance(state, dict) else ()
    return {name: tensor for name, tensor in tensors if isinstance(name, str) and isinstance(tensor, np.ndarray)}


class _Archive:
    """The zip archive of a torch file; `load` gives the object that was saved."""

    def __init__(self, stream: BinaryIO) -> None:
        if not zipfile.is_zipfile(stream):
            raise ValueError("it is no zip archive, or it is truncated")
        self._content = _content(stream)
        self._zip = zipfile.ZipFile(stream)
        self._members = {info.filename: info for info in self._zip.infolist()}
        pickles = [name for name in self._members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"the archive has {len(pickles)} members named data.pkl instead of one")
        self._root = pickles[0].removesuffix("data.pkl")

    def load(self) -> Any:
        byteorder = f"{self._root}byteorder"
        if byteorder in self._members and self._zip.read(byteorder) != b"little":
            raise ValueError("its storages are big-endian: save it on a little-endian machine")
        return _Unpickler(io.BytesIO(self._zip.read(f"{self._root}data.pkl")), self._storage).load()

    def _storage(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        """The 1-d array of one storage: a view of the file where the member is stored as it is, as torch writes it."""
        info = self._members.get(f"{self._root}data/{key}")
        if info is None:
            raise ValueError(f"the bytes of storage {key} are missing")
        if info.file_size < count * dtype.itemsize:
            raise ValueError(f"storage {key} has {info.file_size} bytes, too few for {count} x {dtype}")
        if info.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(self._zip.read(info), dtype, count)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(self._content, info.header_offset)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or start + count * dtype.itemsize > len(self._content):
            raise ValueError(f"storage {key} lies outside of the file")
        return np.frombuffer(self._content, dtype, count, start)


def _load_legacy(stream: BinaryIO) -> Any:
    """The object of a file from before torch 1.6. Storages follow the object, so they are allocated first and filled afterwards."""
    storages: dict[str, np.ndarray] = {}
    file_size = stream.seek(0, os.SEEK_END)
    stream.seek(0)

    def allocate(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if key not in storages:
            if count * dtype.itemsize > file_size:
                raise ValueError(f"storage {key} of {count} x {dtype} is larger than the file")
            storages[key] = np.empty(count, dtype)
        return storages[key]

    _magic, _version, machine = (_Unpickler(stream, allocate).load() for _ in range(3))
    if not machine["little_endian"]:
        raise ValueError("its storages are big-endian: save it on a little-endian machine")
    loaded = _Unpickler(stream, allocate).load()
    for key in _Unpickler(stream, allocate).load():
        storage = storages[key]
        (count,) = struct.unpack("<q", stream.read(8))
        data = stream.read(storage.nbytes)
        if count != storage.size or len(data) != storage.nbytes:
            raise ValueError(f"storage {key} is truncated")
        storage[:] = np.frombuffer(data, storage.dtype)
    return loaded


def _content(stream: BinaryIO) -> mmap.mmap | bytes:
    """All bytes of an open file, mapped where it is a local one."""
    try:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (io.UnsupportedOperation, AttributeError):  # object storage gives streams without a file descriptor
        stream.seek(0)
        return stream.read()


class _Unpickler(pickle.Unpickler):
    """Reads plain containers and tensors; every other global name is an error, raised before anything is called."""

    def __init__(self, stream: BinaryIO, read_storage: Callable[[str, np.dtype, int], np.ndarray]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._read_storage = read_storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return name
        if (module, name) not in _ALLOWED:
            raise ValueError(f"it asks for {module}.{name}, which weights do not need; nothing of it was run")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        match pid:
            case ("storage", str(kind), str(key), _, int(count), *view) if kind in _STORAGES and count >= 0 and not any(view):
                return self._read_storage(key, _STORAGES[kind], count) if count else np.empty(0, _STORAGES[kind])
        raise ValueError(f"unknown kind of storage {str(pid)[:80]}")


class _Function(NamedTuple):
    """A callable without settable attributes, so that a pickle's BUILD instruction cannot change it."""

    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


class _Dict(dict):
    """Stands for OrderedDict; the state that torch hangs on it (`_metadata`) is dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A read-only view of a storage. The bounds are checked: `as_strided` itself would read any memory."""
    where = f"a tensor of size {size}, stride {stride} and offset {offset}"
    whole = all(type(number) is int and number >= 0 for number in (offset, *size, *stride))
    if not isinstance(storage, np.ndarray) or len(size) != len(stride) or not whole:
        raise ValueError(f"{where} is malformed")
    if 0 in size:
        return np.empty(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= storage.size:
        raise ValueError(f"{where} exceeds its storage of {storage.size}")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


_ALLOWED: dict[tuple[str, str], _Function] = {
    ("collections", "OrderedDict"): _Function(lambda *items: _Dict(*items)),
    ("__builtin__", "set"): _Function(lambda *items: set(*items)),  # the name in torch's pickle protocol, 2
    ("torch", "Size"): _Function(lambda *size: tuple(*size)),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_: data),
}
