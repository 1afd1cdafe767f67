"""WebDataset's tar shards, read at random places."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.data.reader import CALLED, Reader, as_text, captions, check_complete
from ldm_jax.data.shard_files import files_hash, find_files, place
from ldm_jax.data.tar_index import MEMBERS, json_fields, shard_index

logger = logging.getLogger(__name__)

_IN_JSON = ("text", "label", "boxes")
_REMEDIES = {
    "text": "a .txt or .json member of its name gives it",
    "label": "a .cls or .json member of its name gives it",
    "boxes": "a .json member of its name gives them, rows of class, x0, y0, x1, y1 in shares of the picture",
    "segmentation": "a .seg.png member of its name gives it",
    "mask": "a .mask.png member of its name gives it",
}


class TarSource(Reader):
    """The examples of tar shards, in the order of the shards' names and of their members.

    Of an example NAME: `NAME.jpg` (.png, .webp, .bmp); captions in `NAME.txt`, each line one, else `text` or `caption` in `NAME.json`;
    the class in `NAME.cls`, else `label` in `NAME.json`; `boxes` in `NAME.json`; the maps `NAME.seg.png` and `NAME.mask.png`. A shard that
    is cut short is read up to the cut, and the example in which it lies is broken.

    Args:
        path: a folder with .tar files, one such file, or a pattern of them ("/data/train-*.tar").
        needs: the fields to read.

    Raises:
        UserError: there are no shards, one is no tar archive, or an example lacks what is asked for.
    """

    def __init__(self, path: str | Path, needs: Collection[str] = ()) -> None:
        super().__init__(needs)
        self.shards = find_files(path, (".tar",), "tar shards")
        indices = [shard_index(shard) for shard in self.shards]
        self.damaged = {shard: index.damage for shard, index in zip(self.shards, indices, strict=True) if index.damage}
        for shard, damage in self.damaged.items():
            logger.warning("%s is damaged: %s", shard, damage)
        self.keys = [key for index in indices for key in index.keys]
        if not self.keys:
            raise UserError(f"data.path: no pictures in the tar shards of {str(path)!r}")
        self._ends = np.cumsum([len(index.keys) for index in indices])
        self._offsets, self._sizes, self._facts = (
            np.concatenate([getattr(index, name) for index in indices]) for name in ("offsets", "sizes", "facts")
        )
        self._several = bool((self._facts[:, 0] > 1).any())
        # The example in which a shard is cut lacks its later members: it is broken, as reading it shows.
        cut = {int(end) - 1 for end, index in zip(self._ends, indices, strict=True) if index.damage and index.keys}
        for field in self.needs:
            missing = [self.keys[index] for index in np.flatnonzero(~self._has(field)).tolist() if index not in cut]
            check_complete(str(path), len(self.keys), missing, field, _REMEDIES[field])

    def _has(self, field: str) -> np.ndarray:
        """bool [n]: whether each example has a field."""
        return self._facts[:, _IN_JSON.index(field)] > 0 if field in _IN_JSON else self._offsets[:, MEMBERS.index(field)] >= 0

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int, fields: Collection[str]) -> dict[str, Any]:
        example: dict[str, Any] = {field: self._member(index, field) for field in fields if field not in _IN_JSON}
        about: dict[str, Any] = {}
        if any(field in fields and (field == "boxes" or not self._is_there(index, field)) for field in _IN_JSON):
            about = json_fields(self._member(index, "json") or b"{}")
        if "text" in fields:
            content = self._member(index, "text")
            lines = about.get("text") if content is None else content.decode("utf-8-sig").splitlines()
            example["text"] = as_text(captions(lines), self._several)
        if "label" in fields:
            content = self._member(index, "label")
            example["label"] = about.get("label") if content is None else int(content)
        return example | ({"boxes": about.get("boxes")} if "boxes" in fields else {})

    def _is_there(self, index: int, member: str) -> bool:
        return bool(self._offsets[index, MEMBERS.index(member)] >= 0)

    def _member(self, index: int, member: str) -> bytes | None:
        """The content of a member; None where there is none. Raises OSError where the shard ends within it."""
        if not self._is_there(index, member):
            return None
        offset, size = (int(table[index, MEMBERS.index(member)]) for table in (self._offsets, self._sizes))
        with self._shard(index).open("rb", buffering=0) as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise OSError(f"the shard is cut short: its {CALLED.get(member, member)} has {len(content)} of {size} bytes")
        return content

    def _shard(self, index: int) -> Path:
        return self.shards[place(self._ends, index)[0]]

    def name(self, index: int) -> str:
        """The shard and the example's name in it."""
        return f"{self._shard(index).name}:{self.keys[index]}"

    def fingerprint(self) -> str:
        """Hash of the shards' names, sizes and modification times, and of the fields that are asked for."""
        return f"tar-{files_hash(self.shards, self.needs)}"
