"""Shards of object storage on a disk of this machine: they are read at random places, an epoch visits all, and a request for each would be
slow and dear. So every machine copies them whole, once."""

import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm_jax import paths
from ldm_jax.errors import UserError

_AT_ONCE = 16


def local_shards(directory: Any, suffix: str, root: str = "") -> Path:
    """A directory on a file system with the files of `directory` whose names end in `suffix`: itself, or on object storage a copy.

    The copy is the folder of the directory's name under `root` (default: `ldm_jax/latents` in the user's cache). Files that are there in
    their size are not copied again; of several processes of a machine one copies, and the others wait for it.

    Raises UserError where the files do not fit on the disk, or cannot be read or written.
    """
    if not paths.is_remote(directory):
        return Path(directory)
    folder = (paths.local(root, "data.copies") if root else paths.user_cache() / "latents") / directory.name
    paths.make_directory(folder)
    with (folder / ".lock").open("w") as lock, paths.reported("copy", f"{directory} to {folder}"):
        fcntl.flock(lock, fcntl.LOCK_EX)
        _copy_missing(directory, suffix, folder)
    return folder


def _copy_missing(directory: Any, suffix: str, folder: Path) -> None:
    sizes = {os.path.basename(entry["name"]): entry["size"] for entry in paths.storage().ls(str(directory), detail=True)}
    missing = {name: size for name, size in sizes.items() if name.endswith(suffix) and _size(folder / name) != size}
    needed, free = sum(missing.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{directory} has {needed / 1e9:.1f} GB to copy, and {folder} {free / 1e9:.1f} GB free: give data.copies=DIR of a larger disk,"
            " or data.latents=DIR of a mounted bucket"
        )
    with (
        ThreadPoolExecutor(_AT_ONCE) as pool,
        tqdm(total=needed, desc="copy latents", unit="B", unit_scale=True, disable=not missing) as bar,
    ):
        for name in pool.map(lambda name: _copy(directory / name, folder / name), missing):
            bar.update(missing[name])


def _copy(remote: Any, final: Path) -> str:
    with paths.writing(final) as temporary:
        paths.storage().get_file(str(remote), str(temporary))
    return final.name


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1
