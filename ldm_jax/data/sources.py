"""Sources: random-access sequences of examples (image folders, TFDS, drawn shapes).

An example is a dict with `image` uint8 [H, W, 3] and any of `text` str, `label` int, `boxes` float32 [n, 5],
`segmentation` uint8 [H, W]. What `source[i]` gives depends on i alone.
"""

import hashlib
import io
import json
import os
import struct
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from ldm_jax.config import UserError
from ldm_jax.data.shapes import Pairs, ShapesSource
from ldm_jax.data.transforms import center_crop

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SOURCES = ("shapes", "folder", "tfds")

# What Pillow raises on damaged files, besides OSError.
BROKEN = (OSError, ValueError, EOFError, SyntaxError, struct.error, Image.DecompressionBombError)


class Source(Protocol):
    """A random-access sequence of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def fingerprint(self) -> str:
        """A string that changes whenever the content or order of the examples does."""
        ...


def decode_image(file: Path | io.BytesIO) -> np.ndarray:
    """Reads a picture as RGB, upright as its EXIF tag says, transparent parts over white, 16-bit values scaled to 8.

    Returns:
        uint8 [H, W, 3].

    Raises:
        any of `BROKEN` where the file is damaged.
    """
    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I"):
            gray = np.asarray(picture).astype(np.int64).clip(0, 65535) // 257
            return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=-1)
        if picture.has_transparency_data:
            colour = picture.convert("RGBA")
            white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, colour)
        return np.asarray(picture.convert("RGB"))


class FolderSource:
    """Pictures in a folder, in the order of their relative names.

    Labels are the indices of the sorted first-level sub-folders that hold pictures (`classes`); a folder with pictures
    at its root has none. Captions are read where `needs_text`: from `metadata.jsonl` in the root (lines with
    `file_name` and `text`), else from `name.txt` beside each picture.

    Raises:
        UserError: the folder is missing or holds no pictures, or a picture lacks the caption or label it needs.
    """

    def __init__(self, path: str | Path, needs_text: bool = False, needs_label: bool = False) -> None:
        self.root = Path(path)
        if not self.root.is_dir():
            raise UserError(f"data.path: no folder {str(path)!r}; give the folder that holds the pictures")
        self._stats = _find_images(self.root)
        self.names = sorted(self._stats)
        if not self.names:
            raise UserError(f"data.path: no pictures ({', '.join(IMAGE_SUFFIXES)}) in folder {str(path)!r}")
        at_root = [name for name in self.names if "/" not in name]
        if needs_label and at_root:
            raise UserError(
                f"data.path: {len(at_root)} pictures in {str(path)!r} lie in no class sub-folder, the first is "
                f"{at_root[0]!r}; labels are needed, so put each picture into the folder of its class"
            )
        self.classes = [] if at_root else sorted({name.split("/")[0] for name in self.names})
        self._label = {name: index for index, name in enumerate(self.classes)}
        self._captions = self._read_captions() if needs_text else {}

    def _read_captions(self) -> dict[str, str]:
        captions = _read_metadata(self.root / "metadata.jsonl")
        for name in self.names:
            sidecar = (self.root / name).with_suffix(".txt")
            if name not in captions and sidecar.is_file():
                captions[name] = sidecar.read_text(encoding="utf-8", errors="replace").strip()
        missing = [name for name in self.names if not captions.get(name)]
        if missing:
            raise UserError(
                f"data.path: {len(missing)} of {len(self.names)} pictures in {str(self.root)!r} have no caption, the "
                f"first is {missing[0]!r}; put it into a .txt file beside the picture or into metadata.jsonl"
            )
        return captions

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        example: dict[str, Any] = {"image": decode_image(self.root / name)}
        if self._captions:
            example["text"] = self._captions[name]
        if self.classes:
            example["label"] = self._label[name.split("/")[0]]
        return example

    def name(self, index: int) -> str:
        """The picture's path relative to the folder."""
        return self.names[index]

    def fingerprint(self) -> str:
        """Hash of relative names, sizes in bytes, modification times and captions."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(json.dumps([name, *self._stats[name], self._captions.get(name)]).encode())
        return f"folder-{digest.hexdigest()[:16]}"


def _find_images(root: Path) -> dict[str, tuple[int, int]]:
    """{relative name with slashes: (size in bytes, modification time in ns)}, hidden files left out."""
    found = {}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                path = Path(folder, file)
                stat = path.stat()
                found[path.relative_to(root).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found


def _read_metadata(path: Path) -> dict[str, str]:
    """{file_name: text} of a metadata.jsonl file; empty where there is none."""
    captions = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[str(Path(entry["file_name"]).as_posix())] = str(entry["text"]).strip()
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f'{path}: line {number} is not {{"file_name": ..., "text": ...}} ({type(error).__name__}: {error})') from error
    return captions


class TfdsSource:
    """A TensorFlow Datasets set prepared in the array_record format, read without TensorFlow.

    Args:
        name: TFDS name, with config and version where wanted ("oxford_flowers102:2.1.1").
        data_dir: TFDS directory; None is TFDS's default.
        split: TFDS split, slices included ("train[:90%]").
        image_key: feature that holds the picture.
        text_key: feature that holds the caption; None for none.
        label_key: feature that holds the class; None for none.

    Raises:
        UserError: the set is not there in the array_record format, or lacks the split or a key.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | None,
        split: str,
        image_key: str = "image",
        text_key: str | None = None,
        label_key: str | None = None,
    ) -> None:
        import tensorflow_datasets as tfds  # seconds long

        self._keys = {"image": image_key, "text": text_key, "label": label_key}
        try:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            missing = [key for key in self._keys.values() if key and key not in builder.info.features]
            if missing:
                raise UserError(f"data: TFDS {name!r} has no feature {missing[0]!r}, only {list(builder.info.features)}")
            decoders = {image_key: tfds.decode.SkipDecoding()}
            self._source = builder.as_data_source(split=split, decoders=decoders)
        except (ValueError, LookupError, NotImplementedError, AssertionError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data.name: TFDS {name!r}, split {split!r}, cannot be read from {data_dir or 'the default data_dir'}: "
                f"{reason}; prepare it first with `tfds build {name} --file_format=array_record`"
            ) from error
        checksum = [str(builder.info.full_name), split, len(self._source), builder.info.dataset_size, self._keys]
        self._fingerprint = f"tfds-{hashlib.sha256(json.dumps(checksum).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        example: dict[str, Any] = {"image": decode_image(io.BytesIO(record[self._keys["image"]]))}
        if self._keys["text"]:
            text = record[self._keys["text"]]
            example["text"] = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else str(text)
        if self._keys["label"]:
            example["label"] = int(record[self._keys["label"]])
        return example

    def fingerprint(self) -> str:
        """Hash of name, config, version, split, numbers of examples and bytes, and the keys that are read."""
        return self._fingerprint


class Cropped:
    """A source whose pictures are cropped to a square of a resolution (`transforms.center_crop`)."""

    def __init__(self, source: Any, resolution: int) -> None:
        self._source, self._resolution = source, resolution

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._source[index]
        return {**example, "image": center_crop(example["image"], self._resolution)}

    def name(self, index: int) -> str:
        """The name of the example in the source below."""
        return _name(self._source, index)

    def fingerprint(self) -> str:
        """That of the source below, with the resolution."""
        return f"{self._source.fingerprint()}-{self._resolution}px"


class Reliable:
    """A source whose broken examples are replaced by the next good one, wrapping around at the end.

    The replacement depends on the index alone, so it is the same on every host and after every restart. `broken` is the
    set of broken indices met so far; each is named once in the log file (index, name, reason; tab separated).

    Raises:
        UserError: on reading, where all examples are broken.
    """

    def __init__(self, source: Source, log_path: Path | None = None) -> None:
        self._source, self._log_path = source, log_path
        self._lock = threading.Lock()
        self.broken: set[int] = set()
        self._logged: set[int] = set()
        if log_path is not None and log_path.exists():
            first_columns = (line.split("\t")[0] for line in log_path.read_text(encoding="utf-8").splitlines())
            self._logged = {int(column) for column in first_columns if column.isdigit()}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = len(self)
        for candidate in range(index, index + size):
            candidate %= size
            if candidate in self.broken:
                continue
            try:
                return self._source[candidate]
            except BROKEN as error:
                self._note(candidate, error)
        where = "" if self._log_path is None else f"; the reasons are in {self._log_path}"
        raise UserError(f"data: all {size} examples are broken, the first is {_name(self._source, 0)!r}{where}")

    def _note(self, index: int, error: Exception) -> None:
        with self._lock:
            self.broken.add(index)
            if self._log_path is None or index in self._logged:
                return
            self._logged.add(index)
            reason = " ".join(str(error).split())
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            with self._log_path.open("a", encoding="utf-8") as log:
                log.write(f"{index}\t{_name(self._source, index)}\t{type(error).__name__}: {reason}\n")

    def name(self, index: int) -> str:
        """The name of the example in the source below."""
        return _name(self._source, index)

    def fingerprint(self) -> str:
        """That of the source below."""
        return self._source.fingerprint()


def _name(source: Source, index: int) -> str:
    return source.name(index) if hasattr(source, "name") else f"example {index}"


def make_source(
    data: ConfigDict,
    *,
    needs_text: bool = False,
    needs_label: bool = False,
    pairs: Pairs = "seen",
    log_path: Path | None = None,
) -> Source:
    """The source that a config's `data` group describes, with pictures of `data.resolution`.

    Reads `source` ("shapes" | "folder" | "tfds") and `resolution`; for shapes `size`, `seed` and `counts`; for a folder
    `path`; for TFDS `name`, `path` (its data_dir), `split`, `image_key`, `text_key` and `label_key`.

    Args:
        data: the group.
        needs_text: captions are conditioned on, so each example must have one.
        needs_label: classes are conditioned on, so each example must have one.
        pairs: shapes only: the colour-shape pairs that are drawn, "seen", "held_out" or "all".
        log_path: file in which broken examples are named.

    Raises:
        UserError: unknown source, or data that are missing or incomplete.
    """
    if data.source == "shapes":
        return ShapesSource(size=data.size, seed=data.seed, resolution=data.resolution, counts=tuple(data.counts), pairs=pairs)
    source: Source
    if data.source == "folder":
        if not data.path:
            raise UserError("data.path is empty; give the folder that holds the pictures")
        source = FolderSource(data.path, needs_text=needs_text, needs_label=needs_label)
    elif data.source == "tfds":
        for key, needed in (("name", True), ("text_key", needs_text), ("label_key", needs_label)):
            if needed and not data[key]:
                raise UserError(f"data.{key} is empty; it is needed with data.source=tfds")
        text_key, label_key = data.text_key if needs_text else None, data.label_key or None
        source = TfdsSource(data.name, data.path or None, data.split, data.image_key, text_key, label_key)
    else:
        raise UserError(f"data.source is {data.source!r}; it must be one of {', '.join(SOURCES)}")
    return Reliable(Cropped(source, data.resolution), log_path)
