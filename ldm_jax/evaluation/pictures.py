"""Pictures that an evaluation reads, a batch at a time: a folder or zip of picture files, or arrays in ADM's form.

ADM's form (Dhariwal & Nichol, arXiv 2105.05233) is an .npz with `arr_0` uint8 [N,H,W,3] and, of classes, `arr_1` [N].
"""

import hashlib
import io
import json
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ldm_jax.config import UserError
from ldm_jax.data.decode import BROKEN, IMAGE_SUFFIXES, decode_image, image_size
from ldm_jax.data.folder import MAPS, find_images
from ldm_jax.data.transforms import fit
from ldm_jax.evaluation.adm_npz import DAMAGE, Rows, array_names, damaged, read_arrays, read_meta
from ldm_jax.interop.torch_file import one_line
from ldm_jax.paths import fetched

_OVERVIEWS = ("grid.png", "states.png")  # what `ldm_jax.sample` puts beside its pictures
CENTRAL = "the central square, resized as ADM does"  # a provenance's `crop`
_JPEG = b"\xff\xd8\xff"
_THREADS = min(8, os.cpu_count() or 1)


class Pictures(ABC):
    """Pictures in a fixed order, of which any range can be read.

    Attributes:
        size: (height, width), pixels; of files that of the first.
        labels: integer [N], the classes, where an .npz gives them.
        provenance: what is known of how they were made: an .npz's `meta`, or what `ldm_jax.sample` wrote into the first PNG.
    """

    size: tuple[int, int]
    labels: np.ndarray | None = None
    provenance: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray:
        """Pictures start ... stop - 1.

        Returns:
            uint8 [stop - start, H, W, 3].

        Raises:
            IndexError: not 0 <= start <= stop <= N.
            UserError: one of them is broken, or has another size than the first.
        """

    def each(self, start: int, stop: int) -> list[np.ndarray]:
        """As `read`, each uint8 [H,W,3] of a size of its own."""
        return list(self.read(start, stop))

    @property
    def jpegs(self) -> int:
        """How many are JPEG files, by their content."""
        return 0

    @abstractmethod
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change where the pictures do."""

    @abstractmethod
    def describe(self) -> str:
        """One line for people."""

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"pictures {start} to {stop} of {len(self)}")


def open_pictures(path: str | Path) -> Pictures:
    """The pictures of a folder, of a .zip, of an .npz in ADM's form, or of a folder of several such .npz in the order of their names.

    Of folders and archives the picture files of all folders within are taken, in the order of their relative names, but for hidden ones,
    the maps and masks that data folders hold, and the overviews that `ldm_jax.sample` makes. A folder's .npz count where it has no
    picture files.

    Raises:
        UserError: there are none, or they are in another form; the line says what to do.
    """
    path = fetched(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise UserError(f"no file or folder {path}")
    if path.suffix.lower() == ".npz":
        return _Array(path)
    if path.suffix.lower() == ".zip":
        return _open_zip(path)
    raise UserError(f"{path}: pictures are read from a folder, a .zip of picture files, or an .npz with the array arr_0")


def crop(pictures: Pictures, size: tuple[int, int]) -> Pictures:
    """The pictures at another (height, width): ADM's resizing and the centre crop (`data.transforms.fit`), whatever their own sizes."""
    return _Cropped(pictures, size)


class _Files(Pictures):
    """Picture files, decoded by a few threads.

    Args:
        path: of the folder or archive.
        marks: {relative name: what changes with the file's content}.
        opened: gives a file by its name.
    """

    def __init__(self, path: Path, marks: Mapping[str, Any], opened: Callable[[str], IO[bytes]]) -> None:
        self._path, self._marks, self._opened = path, marks, opened
        self._names = sorted(marks)
        self.size = self._of_file(image_size, self._names[0])
        self.provenance = self._of_file(_parameters, self._names[0])

    def __len__(self) -> int:
        return len(self._names)

    def each(self, start: int, stop: int) -> list[np.ndarray]:
        self._check(start, stop)
        return _in_threads(lambda name: self._of_file(decode_image, name), self._names[start:stop])

    def read(self, start: int, stop: int) -> np.ndarray:
        pictures = self.each(start, stop)
        for name, picture in zip(self._names[start:stop], pictures, strict=True):
            if picture.shape[:2] != self.size:
                (height, width), (rows, columns) = self.size, picture.shape[:2]
                raise UserError(
                    f"{self._path / name} has {columns}x{rows} pixels, but {self._names[0]} {width}x{height}: crop them to one size, "
                    "or write statistics from a configuration with --write-reference"
                )
        return np.stack(pictures) if pictures else np.empty((0, *self.size, 3), np.uint8)

    @cached_property
    def jpegs(self) -> int:
        return sum(_in_threads(lambda name: self._of_file(_is_jpeg, name, len(_JPEG)), self._names))

    def fingerprint(self) -> str:
        return _digest([[name, self._marks[name]] for name in self._names])

    def describe(self) -> str:
        return f"{len(self)} picture files, the first of {self.size[1]}x{self.size[0]} pixels, in {self._path}"

    def _of_file(self, function: Callable[[io.BytesIO], Any], name: str, length: int = -1) -> Any:
        try:
            with self._opened(name) as file:
                return function(io.BytesIO(file.read(length)))
        except (*BROKEN, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            raise UserError(
                f"{self._path / name} cannot be read: {one_line(str(error))}; make or fetch it anew, or take it away"
            ) from error


class _Array(Pictures):
    """An .npz in ADM's form."""

    def __init__(self, path: Path) -> None:
        self._path = path
        names = array_names(path)
        if "arr_0" not in names:
            raise UserError(
                f"{path} holds {', '.join(names) or 'nothing'}; pictures are arr_0, uint8 [N,H,W,3], as np.savez(path, images) writes"
            )
        self._rows = Rows(path, "arr_0")
        self._check_form()
        self.size = self._rows.shape[1], self._rows.shape[2]
        self.labels = self._read_labels() if "arr_1" in names else None
        self.provenance = read_meta(path, names)

    def _check_form(self) -> None:
        shape, dtype = self._rows.shape, self._rows.dtype
        if dtype.kind == "f":
            raise UserError(
                f"{self._path}: arr_0 is {dtype}; write uint8 by rounding, np.clip(np.rint(127.5 * x + 127.5), 0, 255) of x in [-1, 1]: "
                "a cast alone cuts off, which darkens each picture by half a level and shifts FID"
            )
        if dtype != np.uint8:
            raise UserError(f"{self._path}: arr_0 is {dtype}; pictures are uint8, 0 to 255")
        if len(shape) != 4 or shape[3] != 3 or 0 in shape:
            channels_first = len(shape) == 4 and shape[1] == 3
            advice = "move the channels to the end: x.transpose(0, 2, 3, 1)" if channels_first else "pictures are [N,H,W,3], one at least"
            raise UserError(f"{self._path}: arr_0 has the shape {list(shape)}; {advice}")

    def _read_labels(self) -> np.ndarray:
        labels = read_arrays(self._path, ["arr_1"])["arr_1"]
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{self._path}: arr_1 is {labels.dtype} {list(labels.shape)}; classes are integers, one for each of {len(self)}"
            )
        return labels

    def __len__(self) -> int:
        return self._rows.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        self._check(start, stop)
        return self._rows.read(start, stop)

    def fingerprint(self) -> str:
        with zipfile.ZipFile(self._path) as archive:
            return _digest(sorted((info.filename, info.file_size, info.CRC) for info in archive.infolist()))

    def describe(self) -> str:
        return f"{len(self)} pictures of {self.size[1]}x{self.size[0]} pixels in {self._path}"


class _Joined(Pictures):
    """Several .npz one after the other; the provenance is what all of them say alike."""

    def __init__(self, path: Path, parts: Sequence[Pictures]) -> None:
        self._path, self._parts = path, parts
        self._ends = np.cumsum([len(part) for part in parts]).tolist()
        sizes = {part.size for part in parts}
        if len(sizes) > 1:
            listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
            raise UserError(f"the .npz in {path} hold pictures of {listed} pixels; put those of one size into a folder")
        self.size = parts[0].size
        labels = [part.labels for part in parts if part.labels is not None]
        if labels and len(labels) < len(parts):
            raise UserError(f"{len(labels)} of the {len(parts)} .npz in {path} have classes (arr_1); give all of them classes, or none")
        self.labels = np.concatenate(labels) if labels else None
        first, *others = (part.provenance for part in parts)
        self.provenance = {key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)}

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        self._check(start, stop)
        read = [np.empty((0, *self.size, 3), np.uint8)]
        for part, end in zip(self._parts, self._ends, strict=True):
            begin = end - len(part)
            if start < end and begin < stop:
                read.append(part.read(max(start, begin) - begin, min(stop, end) - begin))
        return np.concatenate(read)

    def fingerprint(self) -> str:
        return _digest([part.fingerprint() for part in self._parts])

    def describe(self) -> str:
        return f"{len(self)} pictures of {self.size[1]}x{self.size[0]} pixels in {len(self._parts)} .npz in {self._path}"


class _Cropped(Pictures):
    """Pictures through `fit`, by a few threads."""

    def __init__(self, below: Pictures, size: tuple[int, int]) -> None:
        self._below, self.size, self.labels = below, size, below.labels
        self._how = CENTRAL if size[0] == size[1] else f"the central {size[1]}x{size[0]}, resized as ADM does"
        self.provenance = {**below.provenance, "crop": self._how}

    def __len__(self) -> int:
        return len(self._below)

    def read(self, start: int, stop: int) -> np.ndarray:
        pictures = _in_threads(lambda picture: fit({"image": picture}, *self.size)["image"], self._below.each(start, stop))
        return np.stack(pictures) if pictures else np.empty((0, *self.size, 3), np.uint8)

    @property
    def jpegs(self) -> int:
        return self._below.jpegs

    def fingerprint(self) -> str:
        return _digest([self._below.fingerprint(), self.size])

    def describe(self) -> str:
        return f"{self._below.describe()}, {self._how}"


def _open_folder(path: Path) -> Pictures:
    found = {name: stat for name, stat in find_images(path).items() if _is_picture(name)}
    if found:
        return _Files(path, found, lambda name: (path / name).open("rb"))
    parts = sorted(file for file in path.glob("*.npz") if not file.name.startswith("."))
    if not parts:
        raise UserError(f"no pictures ({', '.join(IMAGE_SUFFIXES)}) and no .npz in folder {path}")
    return _Joined(path, [_Array(part) for part in parts])


def _open_zip(path: Path) -> Pictures:
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as error:
        raise damaged(path, error) from error
    found = {info.filename: (info.file_size, info.CRC) for info in archive.infolist() if _is_picture(info.filename)}
    if not found:
        archive.close()
        raise UserError(f"no pictures ({', '.join(IMAGE_SUFFIXES)}) in {path}")
    return _Files(path, found, archive.open)


def _is_picture(name: str) -> bool:
    """Whether a file is one of the pictures, by its relative name."""
    *folders, file = name.split("/")
    beside = bool({"__MACOSX", *MAPS.values()} & set(folders[:1])) or file in _OVERVIEWS
    return file.lower().endswith(IMAGE_SUFFIXES) and not beside and not any(part.startswith(".") for part in (*folders, file))


def _is_jpeg(file: io.BytesIO) -> bool:
    return file.read() == _JPEG


def _parameters(file: io.BytesIO) -> dict[str, Any]:
    """What a picture's PNG text says of how it was made: JSON of `ldm_jax.sample`; of other programs, the text."""
    with Image.open(file) as opened:
        text = opened.info.get("parameters")
    if not isinstance(text, str):
        return {}
    try:
        content = json.loads(text)
    except ValueError:
        content = text
    return content if isinstance(content, dict) else {"parameters": content}


def _in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:  # Pillow and zlib let other threads run
        return list(pool.map(function, items))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
