"""Files as `torch.save` writes them, made without torch; with holes in the place of values, files of any size at once."""

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.interop.safetensors_file import Spec

_KINDS = {np.dtype(np.float32): b"FloatStorage", np.dtype(np.float16): b"HalfStorage", np.dtype(np.int64): b"LongStorage"}


class _Pickler(pickle._Pickler):
    """Python's own pickler, in which an array, or the `Spec` of one, becomes a tensor on a storage of its own."""

    def __init__(self, stream: BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.storages: list[np.ndarray | Spec] = []

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, np.ndarray | Spec):
            return super().save(obj, save_persistent_id)
        self.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        self.save("storage")
        self.write(b"ctorch\n" + _KINDS[obj.dtype] + b"\n")
        for value in (str(len(self.storages)), "cpu", int(np.prod(obj.shape))):
            self.save(value)
        self.write(b"tQ")
        for value in (0, tuple(obj.shape), tuple(int(np.prod(obj.shape[i + 1 :])) for i in range(len(obj.shape))), False):
            self.save(value)
        self.write(b"ccollections\nOrderedDict\n)RtR")
        self.storages.append(obj)


def write(path: Path, content: Any) -> Path:
    """Writes an object of plain values and arrays. A `Spec` is a tensor of zeros but for its first number, which is its place among all
    tensors, from 1 on; it takes no room on the disk."""
    stream = BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for key, storage in enumerate(pickler.storages):
            if isinstance(storage, Spec):
                _add_hole(archive, f"archive/data/{key}", storage.nbytes, np.asarray(key + 1, storage.dtype).tobytes())
            else:
                archive.writestr(f"archive/data/{key}", storage.tobytes())
    return path


def _add_hole(archive: zipfile.ZipFile, name: str, size: int, begin: bytes) -> None:
    """A stored member whose bytes after the first few are not written; its checksum, which torch does not look at, is wrong."""
    file: Any = archive.fp
    info = zipfile.ZipInfo(name)
    info.file_size, info.compress_size, info.header_offset, info.CRC = size, size, file.tell(), 0
    file.write(info.FileHeader() + begin)
    file.seek(size - len(begin), os.SEEK_CUR)
    archive.filelist.append(info)
    archive.start_dir = file.tell()


def write_safetensors(path: Path, specs: Mapping[str, Spec]) -> None:
    """A file of such tensors of zeros, float32, each with its number first."""
    header, end = {}, 0
    for name, spec in specs.items():
        header[name] = {"dtype": "F32", "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        file.truncate(begin + end)
        for i, entry in enumerate(header.values()):
            file.seek(begin + entry["data_offsets"][0])
            file.write(np.float32(i + 1).tobytes())
