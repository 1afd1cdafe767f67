"""Pictures in a folder, with captions, classes, maps, masks and boxes beside them."""

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ldm_jax.config import UserError
from ldm_jax.data.boxes import read_coco
from ldm_jax.data.decode import IMAGE_SUFFIXES, image_size
from ldm_jax.data.metadata import Metadata, read_metadata
from ldm_jax.data.reader import Reader, as_text, captions, check_complete, class_numbers

MAPS = {"segmentation": "segmentation", "mask": "masks"}
"""Folders at the root whose pictures are fields of other pictures."""

_REMEDIES = {
    "text": "put it into a .txt file beside the picture, or into metadata.jsonl or metadata.csv",
    "label": "put each picture into the folder of its class, or its label into metadata.jsonl or metadata.csv",
    "boxes": "list the picture among the images of boxes.json",
    "segmentation": "put it into segmentation/ under the picture's own name, ending in .png",
    "mask": "put it into masks/ under the picture's own name, ending in .png",
}


class FolderSource(Reader):
    """Pictures in a folder, in the order of their relative names.

    Of each field, where it is asked for:
      text: lines of `metadata.jsonl` or `metadata.csv` in the root (`file_name`, `text`), else `name.txt` beside each picture, each line a
        caption.
      label: that of the metadata, else the index of the first-level sub-folder among those that hold pictures (`classes`).
      boxes: `boxes.json` in the root, in COCO's form (`boxes.read_coco`).
      segmentation, mask: `segmentation/NAME.png` and `masks/NAME.png` in the root.

    Raises:
        UserError: the folder is missing or holds no pictures, or a picture lacks what is asked for.
    """

    def __init__(self, path: str | Path, needs: Collection[str] = ()) -> None:
        super().__init__(needs)
        self.root = Path(path)
        if not self.root.is_dir():
            raise UserError(f"data.path: no folder {str(path)!r}; give the folder that holds the pictures")
        self._stats = find_images(self.root)
        self.names = sorted(name for name in self._stats if name.split("/")[0] not in MAPS.values())
        if not self.names:
            raise UserError(f"data.path: no pictures ({', '.join(IMAGE_SUFFIXES)}) in folder {str(path)!r}")
        self.classes: list[str] = []
        self.box_classes: list[str] = []
        metadata = read_metadata(self.root) if {"text", "label"} & set(self.needs) else Metadata()
        # {field: {name: what `read` gives, of maps the file's name}}, complete for every picture
        self._fields: dict[str, dict[str, Any]] = {}
        for field in self.needs:
            self._fields[field] = self._find(field, metadata)
            missing = [name for name in self.names if self._fields[field].get(name) is None]
            check_complete(str(self.root), len(self.names), missing, field, _REMEDIES[field])

    def _find(self, field: str, metadata: Metadata) -> dict[str, Any]:
        if field == "text":
            return self._captions(metadata.texts)
        if field == "label":
            return self._labels(metadata.labels)
        if field == "boxes":
            if not (self.root / "boxes.json").is_file():
                raise UserError(f"data.path: boxes are needed, and {str(self.root)!r} has no boxes.json (in COCO's form)")
            boxes, self.box_classes = read_coco(self.root / "boxes.json")
            return boxes
        maps = {name: (Path(MAPS[field]) / name).with_suffix(".png").as_posix() for name in self.names}
        return {name: file for name, file in maps.items() if file in self._stats}

    def _captions(self, given: dict[str, list[str]]) -> dict[str, Any]:
        texts = {name: given.get(name) or self._sidecar(name) for name in self.names}
        several = any(len(found) > 1 for found in texts.values())
        return {name: as_text(found, several) for name, found in texts.items()}

    def _sidecar(self, name: str) -> list[str]:
        file = (self.root / name).with_suffix(".txt")
        try:
            return captions(file.read_text(encoding="utf-8-sig").splitlines()) if file.is_file() else []
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error

    def _labels(self, given: dict[str, Any]) -> dict[str, Any]:
        if given:
            known = [name for name in self.names if name in given]
            numbers, self.classes = class_numbers([given[name] for name in known])
            return dict(zip(known, numbers.tolist(), strict=True))
        tops = {name: name.split("/")[0] for name in self.names if "/" in name}
        self.classes = sorted(set(tops.values()))
        number = {top: index for index, top in enumerate(self.classes)}
        return {name: number[top] for name, top in tops.items()}

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, fields: Collection[str]) -> dict[str, Any]:
        name = self.names[index]
        example: dict[str, Any] = {"image": (self.root / name).read_bytes()} if "image" in fields else {}
        for field in fields:
            if field in self._fields:
                value = self._fields[field][name]
                example[field] = (self.root / value).read_bytes() if field in MAPS else value
        return example

    def size(self, index: int) -> tuple[int, int]:
        return image_size(self.root / self.names[index])

    def name(self, index: int) -> str:
        """The picture's path relative to the folder."""
        return self.names[index]

    def fingerprint(self) -> str:
        """Hash of relative names, sizes in bytes, modification times and the fields that are asked for."""
        digest = hashlib.sha256(json.dumps(self.needs).encode())
        for name in self.names:
            fields = [_summary(self._fields[field][name], self._stats if field in MAPS else {}) for field in self.needs]
            digest.update(json.dumps([name, *self._stats[name], *fields]).encode())
        return f"folder-{digest.hexdigest()[:16]}"


def _summary(value: Any, stats: dict[str, tuple[int, int]]) -> Any:
    """What stands for a field in the fingerprint: of a map its file's size and time, else its content."""
    return stats[value] if stats else value.tolist() if hasattr(value, "tolist") else value


def find_images(root: Path) -> dict[str, tuple[int, int]]:
    """{relative name with slashes: (size in bytes, modification time in ns)}, hidden files left out."""
    found = {}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                path = Path(folder, file)
                stat = path.stat() if path.exists() else path.lstat()  # a link to nothing is a broken picture
                found[path.relative_to(root).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found
