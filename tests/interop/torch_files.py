"""Files as `torch.save` writes them, made without torch; with holes in the place of values, files of any size at once."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.interop import torch_writer
from ldm_jax.interop.safetensors_file import Spec


def write(path: Path, content: Any) -> Path:
    """Writes an object of plain values and arrays. A `Spec` is a tensor of zeros but for its first number, which is its place among all
    tensors, from 1 on; it takes no room on the disk."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, tensor in enumerate(torch_writer.begin(archive, content)):
            if isinstance(tensor, Spec):
                _add_hole(archive, torch_writer.storage_member(archive, key, tensor.nbytes), np.asarray(key + 1, tensor.dtype).tobytes())
            else:
                torch_writer.add_storage(archive, key, tensor)
    return path


def _add_hole(archive: zipfile.ZipFile, info: zipfile.ZipInfo, begin: bytes) -> None:
    """A stored member whose bytes after the first few are not written; its checksum, which torch does not look at, is wrong."""
    file: Any = archive.fp
    info.header_offset = file.tell()
    file.write(info.FileHeader(zip64=True) + begin)
    file.seek(info.file_size - len(begin), os.SEEK_CUR)
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
