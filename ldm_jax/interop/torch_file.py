"""Weights from torch, safetensors and numpy files as numpy arrays, without torch.

A torch file (`torch.save`, since 1.6) is a zip archive: `<name>/data.pkl` is a pickle of the object, in which each tensor is a call of
`torch._utils._rebuild_tensor_v2` on a storage, and `<name>/data/<key>` holds the bytes of a storage. Before 1.6 it was a row of pickles
(a magic number, a version, the machine's word sizes, the object, the keys of its storages) followed by the storages' bytes; torchvision's
VGG16 and the LPIPS heads are still kept that way.

Pickles are programs that can call any function. This reader has its own idea of the few instructions and names that a state dict needs:
tensors and plain containers are built by the functions below, whatever else a Lightning checkpoint holds becomes one placeholder that
does nothing, and every other name or instruction is an error. No name is ever looked up or imported: nothing of the file is run.
"""

import codecs
import io
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ldm_jax.paths import local_copy, resolve

STORAGES: dict[str, np.dtype] = {
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
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the end of the first pickle: a number of ten bytes
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_LIGHTNING = "pytorch-lightning_version"  # the entry that tells such a file
_HEAD = 512  # bytes that tell what kind of file it is
_INFLATED = (64 * 2**20, 16)  # bytes, and multiples of the file, that compressed members may grow to: weights hardly compress
# What damaged or forged files make zipfile and the unpickler raise; neither has one class of errors of its own.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    pickle.UnpicklingError,
    EOFError,
    OSError,  # a seek to a place that cannot be
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,  # a length that is no length
    RuntimeError,  # an encrypted member; a compression method or zip version that is not supported; recursion
)


def load_state_dict(path: str | os.PathLike[str], key: str | None = None) -> dict[str, np.ndarray]:
    """The named tensors of a `.safetensors`, `.npz` or torch file (`.pth`, `.pt`, `.ckpt`, `.bin`; any other suffix is read as one).

    Args:
      path: the file, on a file system or gs://.
      key: which of a torch file's dicts is meant: `state_dict` in Lightning checkpoints, `ema` or `model` in DiT's; "" is the outermost.
        None takes the only one that holds tensors, and `state_dict` of a file that Lightning wrote, whatever lies beside it.

    Returns arrays of the file's shapes and dtypes (bfloat16 as `ml_dtypes.bfloat16`); what is no tensor (step counts, say) is left out.
    Those of a local torch file are read-only views of the mapped file, unless its members are compressed: only what is used is read.

    Raises ValueError, in one line, for a file that is damaged, of another kind, holds no named tensors or several sets of them where `key`
    is not given, or asks for code to be run; FileNotFoundError where there is no such file.
    """
    file = resolve(path)
    if not file.exists():
        raise FileNotFoundError(f"no weight file at {file}")
    if file.is_dir():
        raise ValueError(f"{file} is a folder, not a weight file")
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
    if kind := foreign_kind(head):
        raise ValueError(f"{file} is {kind}, not a weight file")
    readers = {".safetensors": _load_safetensors, ".npz": _load_npz}
    return _choose(readers.get(file.suffix, _load_torch)(file), key, file)


def foreign_kind(head: bytes) -> str | None:
    """What a file is, in words, that begins with these bytes (some hundred) and plainly holds no weights; None for all others."""
    start = head.lstrip().lower()
    if not head:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer to weights (`git lfs pull` fetches them)"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page (the download went wrong, or wants a login)"
    if head.startswith(b"\x1f\x8b"):
        return "packed by gzip"
    if head[257:262] == b"ustar":
        return "a tar archive"
    return "text" if _is_text(head) else None


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # incremental, as the last character may be cut
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def _choose(loaded: Any, key: str | None, file: epath.Path) -> dict[str, np.ndarray]:
    """The dict of tensors that `key` names, or the only one, among the loaded object and its entries."""
    levels = {"": loaded, **loaded} if isinstance(loaded, dict) else {}
    sets = {name: tensors for name, value in levels.items() if isinstance(name, str) and (tensors := _named_tensors(value))}
    if key is None and _LIGHTNING in levels and "state_dict" in sets:
        key = "state_dict"
    if key is None and len(sets) == 1:
        return next(iter(sets.values()))
    if key is not None and key in sets:
        return sets[key]
    if not sets:
        raise ValueError(f"{file} holds no named tensors: give a state dict, or a dict that holds one")
    choices = one_line(", ".join(f"{name!r} ({len(tensors)})" for name, tensors in sets.items()))
    asked = "several sets of tensors" if key is None else f"no set of tensors {key!r}"
    raise ValueError(f"{file} holds {asked}; the key is to be one of (with the number of tensors; '' is the outermost): {choices}")


def _named_tensors(value: Any) -> dict[str, np.ndarray]:
    entries = value.items() if isinstance(value, dict) else ()
    return {name: tensor for name, tensor in entries if isinstance(name, str) and isinstance(tensor, np.ndarray)}


def one_line(text: str) -> str:
    """Names in a file can hold anything: line breaks, terminal codes, a megabyte."""
    return "".join(character if character.isprintable() else " " for character in text[:400])


def _load_safetensors(file: epath.Path) -> dict[str, np.ndarray]:
    try:
        with local_copy(file) as local:
            return load_file(local)
    except SafetensorError as error:
        raise ValueError(f"{file} is no complete safetensors file: {one_line(str(error))}") from error


def _load_npz(file: epath.Path) -> dict[str, np.ndarray]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return dict(archive.items())
    except DAMAGE as error:
        raise ValueError(f"{file} is no complete .npz file of plain arrays: {one_line(str(error))}") from error


def _load_torch(file: epath.Path) -> Any:
    with file.open("rb") as stream:
        legacy = _LEGACY_MAGIC in stream.read(_HEAD)[:32]
        try:
            return _load_legacy(_content(stream)) if legacy else _Archive(stream).load()
        except DAMAGE as error:
            reason = one_line(str(error)) or "it is truncated"  # the errors of an early end say nothing
            raise ValueError(f"{file} cannot be read as a torch weight file: {reason}") from error


def _content(stream: BinaryIO) -> mmap.mmap | bytes:
    """All bytes of an open file, mapped where it is a local one."""
    try:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (io.UnsupportedOperation, AttributeError):  # object storage gives streams without a file descriptor
        stream.seek(0)
        return stream.read()


def _view(content: mmap.mmap | bytes, dtype: np.dtype, count: int, start: int) -> np.ndarray:
    return np.frombuffer(content, dtype, count, start) if count else np.empty(0, dtype)


class _Archive:
    """The zip archive of a torch file; `load` gives the object that was saved."""

    def __init__(self, stream: BinaryIO) -> None:
        if not zipfile.is_zipfile(stream):
            stream.seek(0)
            cut = stream.read(4) == b"PK\x03\x04"
            raise ValueError("its zip archive is truncated" if cut else "it is no zip archive, as torch writes, nor its older format")
        self._content = _content(stream)
        self._zip = zipfile.ZipFile(stream)
        self._members = {info.filename: info for info in self._zip.infolist()}
        self._inflated: dict[str, bytes] = {}
        self._check_members()
        pickles = [name for name in self._members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"the archive has {len(pickles)} members named data.pkl instead of one")
        self._root = pickles[0].removesuffix("data.pkl")

    def _check_members(self) -> None:
        if len(self._members) != len(self._zip.infolist()):
            raise ValueError("the archive holds two members of the same name")
        packed = [info for info in self._members.values() if info.compress_type != zipfile.ZIP_STORED]
        if any(info.compress_type != zipfile.ZIP_DEFLATED for info in packed):
            raise ValueError("the archive is compressed in an unusual way; torch does not compress")
        size, limit = sum(info.file_size for info in packed), max(_INFLATED[0], _INFLATED[1] * len(self._content))
        if size > limit:
            raise ValueError(f"its {len(self._content)} bytes would unpack to {size}, which no weights do")

    def load(self) -> Any:
        if f"{self._root}constants.pkl" in self._members:
            raise ValueError("it is a TorchScript program; save the state_dict() of its module instead")
        byteorder = f"{self._root}byteorder"
        if byteorder in self._members and self._zip.read(byteorder) != b"little":
            raise ValueError("its storages are big-endian: save it on a little-endian machine")
        return Unpickler(io.BytesIO(self._zip.read(f"{self._root}data.pkl")), self._storage).load()

    def _storage(self, key: str, dtype: np.dtype, count: int) -> np.ndarray:
        """The 1-d array of one storage: a view of the file where the member is stored as it is, as torch writes it."""
        if not count:
            return np.empty(0, dtype)
        info = self._members.get(f"{self._root}data/{key}")
        if info is None:
            raise ValueError(f"the bytes of storage {key} are missing")
        if info.file_size < count * dtype.itemsize:
            raise ValueError(f"storage {key} has {info.file_size} bytes, too few for {count} x {dtype}")
        if info.compress_type != zipfile.ZIP_STORED:
            if key not in self._inflated:
                self._inflated[key] = self._zip.read(info)
            return _view(self._inflated[key], dtype, count, 0)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack_from(self._content, info.header_offset)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or start + count * dtype.itemsize > len(self._content):
            raise ValueError(f"storage {key} lies outside of the file")
        return _view(self._content, dtype, count, start)


def _load_legacy(content: mmap.mmap | bytes) -> Any:
    """The object of a file from before torch 1.6.

    Where a storage lies follows from the sizes of those before it, which only the object says. So the object is read twice: on storages
    of the right sizes that hold nothing, and on views of the file.
    """
    stream = content if isinstance(content, mmap.mmap) else io.BytesIO(content)
    described: dict[str, tuple[np.dtype, int]] = {}

    def describe(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if described.setdefault(key, (dtype, count)) != (dtype, count) or count * dtype.itemsize > len(content):
            raise ValueError(f"storage {key} cannot be of {count} x {dtype}")
        return np.broadcast_to(np.zeros((), dtype), count)

    _magic, _version, machine = (Unpickler(stream, describe).load() for _ in range(3))
    if not machine["little_endian"]:
        raise ValueError("its storages are big-endian: save it on a little-endian machine")
    begin = stream.tell()
    Unpickler(stream, describe).load()
    keys = Unpickler(stream, describe).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(described):
        raise ValueError("its storages are not those of its tensors")
    starts: dict[str, int] = {}
    for key in keys:
        dtype, count = described[key]
        (written,) = struct.unpack("<q", stream.read(8))
        starts[key] = stream.tell()
        end = starts[key] + count * dtype.itemsize
        if written != count or end > len(content):
            raise ValueError(f"storage {key} is truncated")
        stream.seek(end)
    stream.seek(begin)
    return Unpickler(stream, lambda key, dtype, count: _view(content, dtype, count, starts[key])).load()


class _Placeholder:
    """Stands for everything that weights do not need: it takes what a pickle does to objects, keeps nothing, and runs nothing."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append


@dataclass(frozen=True, slots=True)
class Function:
    """One of this reader's own functions, as a pickle's instructions see it."""

    call: Callable[..., Any]


_PLAIN_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK DUP BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT EMPTY_SET
    GLOBAL STACK_GLOBAL BINPERSID
"""  # those of protocols 2 to 5 that make plain values, and those that ask this class; none of older protocols


class Instructions(dict[int, Callable[..., None]]):
    """The instructions of a pickle by their codes."""

    def __missing__(self, code: int) -> Callable[..., None]:
        raise ValueError(f"it holds the pickle instruction {code:#04x}, which weights do not need; nothing of it was run")


class Unpickler(pickle._Unpickler):
    """Python's unpickler with few instructions, none of which reaches a function or an object's state but as written here.

    Its twin in C has no such table, looks into the registry of `copyreg` before it asks, and allocates whatever the index of a memo says.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: Any, read_storage: Callable[[str, np.dtype, int], np.ndarray]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._read_storage = read_storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return name
        if function := _FUNCTIONS.get(f"{module}.{name}"):
            return function
        if module.split(".")[0] in _PLACEHOLDER_PACKAGES or f"{module}.{name}" in _PLACEHOLDER_NAMES:
            return _PLACEHOLDER
        raise ValueError(f"it asks for {module}.{name}, which weights do not need; nothing of it was run")

    def persistent_load(self, pid: Any) -> np.ndarray:
        match pid:
            case ("storage", str(kind), str(key), _, int(count)) | ("storage", str(kind), str(key), _, int(count), None):
                if kind in STORAGES and count >= 0:
                    return self._read_storage(key, STORAGES[kind], count)
        raise ValueError("it describes a storage in a way that torch does not")  # not how: that can be endless

    def _load_call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or not isinstance(function, Function | _Placeholder):
            raise ValueError(f"it calls a {type(function).__name__}; nothing of it was run")
        self.stack.append(function.call(*arguments) if isinstance(function, Function) else function)

    def _load_state(self) -> None:
        """The state that torch hangs on an ordered dict (`_metadata`), and any placeholder's, is dropped."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict | _Placeholder):
            raise ValueError(f"it sets the state of a {type(self.stack[-1]).__name__}; nothing of it was run")

    def _load_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def _load_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def _load_members(self) -> None:
        for member in self.pop_mark():
            self.stack[-1].add(_key(member))

    dispatch = Instructions(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _PLAIN_INSTRUCTIONS.split()}
        | {pickle.REDUCE[0]: _load_call, pickle.NEWOBJ[0]: _load_call, pickle.BUILD[0]: _load_state}
        | {pickle.SETITEM[0]: _load_item, pickle.SETITEMS[0]: _load_items, pickle.ADDITEMS[0]: _load_members}
    )


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A read-only view of a storage. The bounds are checked: `as_strided` itself would read any memory."""
    plain = isinstance(storage, np.ndarray) and storage.ndim == 1 and isinstance(size, tuple | list) and isinstance(stride, tuple | list)
    if not plain or len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise ValueError("the size, stride or offset of a tensor is malformed")
    if 0 in size:
        return np.empty(size, storage.dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= storage.size:
        raise ValueError(f"a tensor of size {size}, stride {stride} and offset {offset} exceeds its storage of {storage.size}")
    strides = [step * storage.strides[0] for step in stride]  # in a storage's own steps: those that hold nothing have steps of 0
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _key(value: Any) -> Any:
    """A key of a dict or member of a set, unless it is made of others: Python's stack does not bear the hash of deeply nested tuples."""
    if not isinstance(value, str | bytes | int | float | None | _Placeholder):
        raise ValueError(f"it has a {type(value).__name__} as a key")
    return value


def _entries(items: Any) -> list[Any]:
    """What a container is made of, which has to be in memory already: an array can be endless (steps of 0)."""
    if not isinstance(items, tuple | list | dict):
        raise ValueError(f"it makes a container of a {type(items).__name__}")
    return list(items.items() if isinstance(items, dict) else items)


def _make_dict(items: Any = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in _entries(items)}


def _make_set(items: Any = ()) -> set[Any]:
    return {_key(member) for member in _entries(items)}


_FUNCTIONS: dict[str, Function] = {
    "collections.OrderedDict": Function(_make_dict),
    "collections.Counter": Function(_make_dict),  # steps of a learning-rate schedule
    "collections.defaultdict": Function(lambda *_: {}),
    "__builtin__.set": Function(_make_set),  # the name in torch's pickle protocol, 2
    "builtins.set": Function(_make_set),
    "torch.Size": Function(lambda items: tuple(_entries(items))),
    "torch._utils._rebuild_tensor": Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": Function(_rebuild_tensor),
    "torch._utils._rebuild_parameter": Function(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": Function(lambda data, *_: data),
}
_PLACEHOLDER = _Placeholder()
_PLACEHOLDER_PACKAGES = ("pytorch_lightning", "lightning", "omegaconf")
_TYPES = ("dict", "list", "tuple", "int", "long", "float", "str", "unicode", "bool", "bytes")  # protocol 2 uses Python 2's names
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# Beside a checkpoint's weights: omegaconf's type annotations, a best score and random states as numpy's, devices, command lines.
_PLACEHOLDER_NAMES = {
    "typing.Any",
    "argparse.Namespace",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _TYPES),
    "torch.device",
    *(f"torch.{name}" for name in _DTYPES),
}
