"""Weights on disk as mappings that read one tensor at a time, and `.safetensors` files that are written one tensor at a time.

A model of billions of parameters passes from file to file without ever being in memory: `open_weights` knows every shape before it reads
any tensor, and `write_safetensors` every tensor's place before it has any.

A `.safetensors` file is the length of its header (8 bytes), the header (JSON: dtype, shape and place of each tensor, padded by spaces to
a multiple of 8 bytes), and the tensors without gaps. Large models are several such files beside a `.safetensors.index.json`, in which
`weight_map` says which tensor is in which file.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ldm_jax.config import UserError
from ldm_jax.interop.torch_file import foreign_kind, load_state_dict, one_line
from ldm_jax.paths import commit, write_json

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers' networks; transformers'; transformers' of old
_SHOWN = 8  # names that an error lists at most


class HasSpec(Protocol):
    """What is known of a tensor before it is read: a `Spec`, `jax.ShapeDtypeStruct` or any array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


class Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


class _Tensor(NamedTuple):
    spec: Spec
    read: Callable[[], np.ndarray]


class Weights(Mapping[str, np.ndarray]):
    """Tensors by name, each read from disk when it is asked for, and not kept."""

    def __init__(self, tensors: Mapping[str, _Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # the one of Mapping would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor; no tensor is read."""
        return {name: tensor.spec.shape for name, tensor in self._tensors.items()}

    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of each tensor; no tensor is read."""
        return {name: tensor.spec for name, tensor in self._tensors.items()}


def open_weights(path: str | os.PathLike[str], *, variant: str = "", key: str | None = None) -> Weights:
    """The weights in a file of any format, or in a folder.

    Args:
      path: a `.safetensors` or torch file (`.ckpt`, `.pt`, `.pth`, `.bin`), a `.safetensors.index.json` or `.bin.index.json` of several, an
        `.npz`, or a folder with one of these under the names that diffusers and transformers give (safetensors before torch's).
      variant: of a folder, the files with this word in their names, such as "fp16", instead of those without any.
      key: which dict of a torch file is meant (see `load_state_dict`).

    Returns arrays as they are in the file (bfloat16 as `ml_dtypes.bfloat16`). Reading a tensor takes the memory of that tensor, or none
    where torch's file is mapped; only `.npz` files and compressed torch files are in memory as a whole.

    Raises UserError, in one line, for what is missing (the file, a shard, a tensor of a shard), damaged, of another kind, or ambiguous.
    """
    file = Path(path)
    try:
        return Weights(_open(_in_folder(file, variant) if file.is_dir() else file, key))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _in_folder(folder: Path, variant: str) -> Path:
    word = f".{variant}" if variant else ""
    for kind in ("safetensors", "bin"):
        names = [name for stem in _STEMS for name in (f"{stem}{word}.{kind}", f"{stem}.{kind}.index{word}.json")]
        found = [name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{folder} holds several weight files: name one of {', '.join(found)}")
        if found:
            return folder / found[0]
    wanted = f"weights of the variant {variant!r}" if variant else "weights under a usual name such as diffusion_pytorch_model.safetensors"
    raise ValueError(f"{folder} holds no {wanted}; its files are: {_some(sorted(entry.name for entry in folder.iterdir())) or 'none'}")


def _open(file: Path, key: str | None) -> dict[str, _Tensor]:
    if not file.is_file():
        raise ValueError(f"no weight file at {file}")
    if file.suffix == ".json" and ".index." in file.name:
        return _open_shards(file, key)
    return _open_one(file, key)


def _open_one(file: Path, key: str | None) -> dict[str, _Tensor]:
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    return {name: _Tensor(Spec(array.shape, array.dtype), partial(np.asarray, array)) for name, array in load_state_dict(file, key).items()}


def _open_safetensors(file: Path) -> dict[str, _Tensor]:
    with file.open("rb") as stream:
        if kind := foreign_kind(stream.read(512)):
            raise ValueError(f"{file} is {kind}, not a weight file")
    try:
        opened = safe_open(str(file), framework="numpy")
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is no complete safetensors file: {one_line(str(error))}") from error
    unknown = {entry.get_dtype() for entry in slices.values()} - _DTYPES.keys()
    if unknown:
        raise ValueError(f"{file} holds tensors of a dtype that is not read here: {_some(sorted(unknown))}")
    return {
        name: _Tensor(Spec(tuple(entry.get_shape()), _DTYPES[entry.get_dtype()]), partial(opened.get_tensor, name))
        for name, entry in slices.items()
    }


def _open_shards(index: Path, key: str | None) -> dict[str, _Tensor]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
        inside = all(Path(shard).name == shard for shard in shards)  # and nowhere else on this machine
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weight files: it needs 'weight_map', from tensors to files") from error
    if not inside:
        raise ValueError(f"{index} names files outside of its folder: {_some(shards)}")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise ValueError(f"{index.parent} lacks {len(missing)} of {len(shards)} weight files that {index.name} names: {_some(missing)}")
    opened = {shard: _open_one(index.parent / shard, key) for shard in shards}
    lost = [f"{name} ({shard})" for name, shard in places.items() if name not in opened[shard]]
    if lost:
        raise ValueError(f"{index} names {len(lost)} tensors that are not in their files: {_some(lost)}")
    return {name: opened[shard][name] for name, shard in places.items()}


def _some(names: list[str]) -> str:
    return one_line(", ".join(names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    specs: Mapping[str, HasSpec],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes tensors as they come, each to its place: memory is that of one tensor, and files appear whole or not at all.

    Args:
      path: the `.safetensors` file, on a local disk.
      tensors: name and array, in any order, each name of `specs` once; the array as the file shall hold it.
      specs: shape and dtype of every tensor.
      metadata: free text for the header; torch's programs want {"format": "pt"}.
      max_shard_bytes: more than this goes to several files `NAME-00001-of-00003.safetensors` with `NAME.safetensors.index.json` beside
        them, filled in the order of `specs`; a tensor that is larger has a file of its own. None writes one file.

    Raises UserError where the disk does not take the files; ValueError where tensors are not those of `specs`, or a dtype has no place in
    the format.
    """
    path = Path(path)
    wanted = {name: Spec(tuple(spec.shape), np.dtype(spec.dtype)) for name, spec in specs.items()}
    shards = _shards(wanted, max_shard_bytes)
    files = [path]
    if len(shards) > 1:
        files = [path.with_name(f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}") for number in range(1, len(shards) + 1)]
    temporaries = [Path(f"{file}.tmp{os.getpid()}") for file in files]
    try:
        with ExitStack() as stack:
            places: dict[str, tuple[BinaryIO, int]] = {}
            for temporary, names in zip(temporaries, shards, strict=True):
                stream = stack.enter_context(temporary.open("wb"))
                header, starts = _layout({name: wanted[name] for name in names}, metadata)
                stream.write(header)
                stream.truncate(len(header) + sum(wanted[name].nbytes for name in names))
                places |= {name: (stream, len(header) + start) for name, start in starts.items()}
            _fill(places, tensors, wanted)
        for temporary, file in zip(temporaries, files, strict=True):
            commit(temporary, file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
    if len(shards) > 1:
        weight_map = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(spec.nbytes for spec in wanted.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(path.with_name(f"{path.name}.index.json"), index)  # last: it makes the files a model


def _shards(specs: Mapping[str, Spec], limit: int | None) -> list[list[str]]:
    """The names of each file, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if limit is not None and shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _layout(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The header with its length, and where after it each tensor begins. The widest dtypes come first, so each begins at a multiple of
    its own width although the format allows no gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        spec = specs[name]
        if spec.dtype not in _CODES or name == "__metadata__":
            raise ValueError(f"a safetensors file holds no {name} of dtype {spec.dtype}")
        starts[name], end = end, end + spec.nbytes
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def _fill(places: Mapping[str, tuple[BinaryIO, int]], tensors: Iterable[tuple[str, np.ndarray]], specs: Mapping[str, Spec]) -> None:
    waiting = dict(places)
    for name, array in tensors:
        if name not in waiting:
            raise ValueError(f"{name} is {'given twice' if name in places else 'not among the tensors to be written'}")
        if (array.shape, array.dtype) != specs[name]:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, not {specs[name].dtype}{list(specs[name].shape)}")
        stream, start = waiting.pop(name)
        stream.seek(start)
        stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        del array  # or it would live while the next one is made
    if waiting:
        raise ValueError(f"{len(waiting)} tensors to be written were not given: {_some(list(waiting))}")
