"""Files of a run, on a file system (local or mounted) or on Google Cloud Storage (`gs://bucket/...`): all that differs between the two.

Paths are `etils.epath.Path`, which lists and reads both. Object storage has neither rename nor append: an object is put whole and is there
from then on, so a write needs no second name, and a log is put anew each time. What many files make complete is said by a marker, which is
written last. Readers that need a file of the local disk get a copy.

gs:// is gcsfs, with Google's application default credentials; STORAGE_EMULATOR_HOST leads it to another server. TensorFlow, which etils
would take for it, is never loaded.
"""

import atexit
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from uuid import uuid4

os.environ.setdefault("EPATH_USE_TF", "false")  # read by etils at each use

from etils import epath

from ldm_jax.errors import UserError

Anywhere = str | os.PathLike[str]
_CLIENTS, _CONNECTIONS = ("gcsfs", "google"), ("aiohttp", "requests")  # packages whose errors are the storage's, and the network's


def is_remote(path: Anywhere) -> bool:
    """Whether a path is of object storage."""
    return "://" in os.fspath(path)


def resolve(path: Anywhere) -> epath.Path:
    """A path of either kind.

    Raises UserError for storage that is not to be had: another kind than gs://, no gcsfs, no such bucket, no permission.
    """
    if is_remote(path):
        scheme, _, rest = os.fspath(path).partition("://")
        if scheme != "gs" or not rest.split("/")[0]:
            raise UserError(f"{path}: a path is one of a file system, or gs://BUCKET/...")
        _reach(rest.split("/")[0])
    return epath.Path(path)


def absolute(path: Anywhere) -> epath.Path:
    """A path that does not depend on the directory that the process is in. Raises as `resolve`."""
    return resolve(path) if is_remote(path) else epath.Path(path).absolute()


def local(path: Anywhere, what: str) -> pathlib.Path:
    """A path of the file system, for what is read or written in place. Raises UserError for one of object storage."""
    if is_remote(path):
        raise UserError(f"{path}: {what} is on a file system: copy it to a local disk, or mount the bucket (gcsfuse)")
    return pathlib.Path(path)


@cache
def _reach(bucket: str) -> None:
    """Raises UserError where a bucket cannot be reached; looks once."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"gs://{bucket} needs the package gcsfs: pip install -r requirements-gcs.txt")
    with reported("reach", f"gs://{bucket}"):
        storage().info(bucket)


def storage() -> Any:
    """The `gcsfs.GCSFileSystem`. It remembers no listings: other processes write, too."""
    import fsspec

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs")


@contextmanager
def reported(what: str, path: Anywhere) -> Iterator[None]:
    """Turns what the disk or the storage refuses into a UserError: cannot `what` `path`.

    What passes, such as a broken connection that gcsfs has tried again in vain, stays as it is: a fault, and no wrong input.
    """
    try:
        yield
    except Exception as error:  # gcsfs has no class of its errors: they are plain ones, and those of the packages below it
        package = type(error).__module__.partition(".")[0]
        if not (isinstance(error, OSError) or package in _CLIENTS) or passes(error):
            raise
        raise UserError(f"cannot {what} {path}: {_reason(error, path)}") from error


def passes(error: Exception) -> bool:
    """Whether an error is of a connection, or of a storage that is busy, and may be gone the next time."""
    code = getattr(error, "code", None)  # of HTTP
    return (
        isinstance(error, TimeoutError | ConnectionError)
        or type(error).__module__.partition(".")[0] in _CONNECTIONS
        or getattr(error, "retryable", False)
        or (isinstance(code, int) and (code in (408, 429) or code >= 500))
    )


def _reason(error: Exception, path: Anywhere) -> str:
    if is_remote(path) and isinstance(error, FileNotFoundError):
        return "there is no such bucket or object"
    return " ".join(str(getattr(error, "strerror", None) or getattr(error, "message", None) or error).split()) or type(error).__name__


def user_cache() -> pathlib.Path:
    """Where this user keeps what can be made again."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ldm_jax"


def names(directory: Anywhere) -> list[str]:
    """What a directory holds, sorted; nothing where there is none."""
    known = epath.Path(directory)
    return sorted(entry.name for entry in known.iterdir()) if known.exists() else []


def make_directory(path: Anywhere, what: str = "create") -> None:
    """Makes a directory with its parents where there is none; object storage needs none. Raises UserError: cannot `what` `path`."""
    if not is_remote(path):
        with reported(what, path):
            pathlib.Path(path).mkdir(parents=True, exist_ok=True)


def temporary_for(final: Anywhere) -> pathlib.Path:
    """A name on a file system that no other writer has, for what `commit` makes `final`: hidden beside it where that can be."""
    folder, name = os.path.split(os.fspath(final))
    return pathlib.Path(tempfile.gettempdir() if is_remote(final) else folder, f".{name}.{uuid4().hex}.tmp")


def commit(temporary: pathlib.Path, final: Anywhere) -> None:
    """Gives a written file its final name once its bytes are on the disk, and returns once the name is there too.

    Raises OSError; UserError where object storage does not take it.
    """
    if is_remote(final):
        with reported("write", final):
            storage().put_file(os.fspath(temporary), os.fspath(final))
        temporary.unlink()
        return
    _synchronise(temporary)
    os.replace(temporary, final)
    _synchronise(pathlib.Path(final).parent)


@contextmanager
def writing(final: Anywhere) -> Iterator[pathlib.Path]:
    """A file of the local disk to write, which becomes `final` once all of it is there; where that fails, nothing stays.

    Raises UserError where the disk does not take it.
    """
    temporary = temporary_for(final)
    try:
        with reported("write", final):
            yield temporary
            commit(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Anywhere, data: bytes) -> None:
    """Writes a file complete or not at all. Raises UserError where the disk does not take it."""
    if is_remote(path):
        with reported("write", path):
            storage().pipe_file(os.fspath(path), data)
        return
    with writing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Anywhere, value: Any) -> None:
    """`write_bytes` of a value as JSON."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def append(path: Anywhere, text: str) -> None:
    """Adds to a file, made with its directory where there is none. On object storage it is read and put anew: for a few lines, and of
    several writers at once the last one stays. Raises UserError."""
    data = text.encode("utf-8", "backslashreplace")
    if is_remote(path):
        known = epath.Path(path)
        write_bytes(known, (known.read_bytes() if known.exists() else b"") + data)
        return
    make_directory(pathlib.Path(path).parent)
    with reported("write", path), open(path, "ab") as file:
        file.write(data)


def replace_directory(new: pathlib.Path, final: pathlib.Path) -> None:
    """Puts a complete directory in the place of another; a kill between leaves the other under `.NAME.old`, and nothing half-made."""
    old = final.parent / f".{final.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    _synchronise(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory to write into, which takes the place of `final` once all of it is there; where the writing fails, nothing stays.

    Of a file system. Raises UserError where it cannot be made.
    """
    root = final.parent / f".{final.name}.new"
    with reported("create", root):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
    try:
        yield root
        replace_directory(root, final)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _synchronise(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Anywhere) -> None:
    """Removes a directory with all that is in it, if it is there."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif epath.Path(path).exists():
        storage().rm(os.fspath(path), recursive=True)


def send_tree(folder: pathlib.Path | str, final: Anywhere) -> None:
    """Puts all files below a folder of the local disk, which the caller removes, in their places. Raises UserError."""
    for file in sorted(filter(pathlib.Path.is_file, pathlib.Path(folder).rglob("*"))):
        target = epath.Path(final) / file.relative_to(folder).as_posix()
        if is_remote(target):
            commit(file, target)
            continue
        make_directory(target.parent)
        with writing(target) as temporary:
            shutil.copyfile(file, temporary)


@contextmanager
def local_copy(path: Anywhere) -> Iterator[pathlib.Path]:
    """The file or folder on a file system: itself, or a copy that is removed afterwards. Raises UserError where it cannot be read."""
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    remote = resolve(path)
    with tempfile.TemporaryDirectory(prefix="ldm_jax_") as folder:
        copy = pathlib.Path(folder, remote.name)
        with reported("read", path):
            storage().get(str(remote), str(copy), recursive=remote.is_dir())
        yield copy


_copies = ExitStack()
atexit.register(_copies.close)


def fetched(path: Anywhere) -> pathlib.Path:
    """As `local_copy`; the copy stays until the process ends."""
    return _copies.enter_context(local_copy(path))


class Mirror:
    """Files that grow, such as logs. `folder` is where they are written: the directory itself, or, where it is on object storage, a local
    one whose files `push` puts in their places.

    Each push puts what has grown as a whole; so that this stays a hundredth of the time, one that is not `now` waits a hundred times as
    long as the last one took, and `_EVERY` seconds.
    """

    _EVERY = 60.0

    def __init__(self, directory: Anywhere, names: tuple[str, ...] = ()) -> None:
        """Makes the directory; `names` are of files that go on growing, if they are there. Raises UserError."""
        self._directory = epath.Path(directory)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._sizes: dict[str, int] = {}
        self._next = 0.0
        make_directory(directory)
        if not is_remote(directory):
            self.folder = pathlib.Path(directory)
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="ldm_jax_")
        self.folder = pathlib.Path(self._scratch.name)
        for name in names:
            if (self._directory / name).exists():
                (self.folder / name).write_bytes((self._directory / name).read_bytes())

    def push(self, now: bool = True) -> None:
        """Puts the files in their places. Raises UserError."""
        if self._scratch is None or not (now or time.monotonic() > self._next):
            return
        start = time.monotonic()
        for file in sorted(self.folder.iterdir()):
            if (size := file.stat().st_size) != self._sizes.get(file.name):
                write_bytes(self._directory / file.name, file.read_bytes())
                self._sizes[file.name] = size
        end = time.monotonic()
        self._next = end + max(self._EVERY, 100 * (end - start))

    def close(self) -> None:
        """Pushes, and removes what is local."""
        self.push()
        if self._scratch is not None:
            self._scratch.cleanup()
