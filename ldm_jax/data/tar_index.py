"""Where the members of a tar shard lie, found once by a walk over its headers and kept beside the shard.

Members whose names are equal up to the first dot of their last part are one example, as WebDataset has it: `a/01.jpg`, `a/01.txt`,
`a/01.seg.png`. A member that is there twice counts as its last, as tar means it.
"""

import hashlib
import io
import json
import logging
import tarfile
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.data.reader import captions
from ldm_jax.paths import user_cache, write_bytes

logger = logging.getLogger(__name__)

SUFFIXES = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp"), "image"),
    "txt": "text",
    "cls": "label",
    "json": "json",
    "seg.png": "segmentation",
    "mask.png": "mask",
}
MEMBERS = ("image", "text", "label", "json", "segmentation", "mask")

_VERSION = 2
_BLOCK = 512  # bytes; tar's unit


@dataclass(frozen=True)
class ShardIndex:
    """The examples of a shard.

    Attributes:
      keys: their names in the shard, in order; those without a picture are left out.
      offsets: int64 [n, 6], of the content of each of `MEMBERS`, in bytes; -1 for one that is not there.
      sizes: int64 [n, 6], in bytes.
      facts: int64 [n, 3], how many captions it has, whether it has a class, and boxes (of `.json`).
      damage: what is wrong with the shard; "" for nothing. What lies before the damage is in the index.
    """

    keys: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    facts: np.ndarray
    damage: str


def shard_index(path: Path) -> ShardIndex:
    """The index of a shard, from where it is kept, or made now. Raises UserError where the file is no tar archive."""
    stat = path.stat()
    mark = f"{_VERSION} {stat.st_size} {stat.st_mtime_ns}"
    places = [
        path.with_name(f".{path.name}.index.npz"),
        _cache_directory() / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()}.npz",
    ]
    for place in places:
        if place.is_file() and (kept := _load(place, mark)) is not None:
            return kept
    index = make_index(path)
    _keep(index, mark, places)
    return index


def _cache_directory() -> Path:
    return user_cache() / "tar"


def _load(place: Path, mark: str) -> ShardIndex | None:
    """The index kept in a file; None where it is of another state of the shard, or damaged."""
    try:
        with np.load(place, allow_pickle=False) as kept:
            about = json.loads(bytes(kept["about"]))
            if about["mark"] != mark:
                return None
            return ShardIndex(about["keys"], kept["offsets"], kept["sizes"], kept["facts"], about["damage"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged (%s); the shard is read again", place, error)
        return None


def _keep(index: ShardIndex, mark: str, places: list[Path]) -> None:
    """Writes the index to the first place that takes it: without one, the next run walks over the shard again."""
    about = json.dumps({"mark": mark, "keys": index.keys, "damage": index.damage}).encode()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, about=np.frombuffer(about, np.uint8), offsets=index.offsets, sizes=index.sizes, facts=index.facts)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(place, buffer.getvalue())
            return
        except (OSError, UserError) as error:
            logger.info("the index of a tar shard is not kept in %s: %s", place, error)


def make_index(path: Path) -> ShardIndex:
    """Walks over the headers of a shard, reading captions and JSON on the way. Raises UserError where it is no tar archive."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    damage = ""
    try:
        with tarfile.open(path, "r:") as tar:
            while True:
                try:
                    member = tar.next()
                except tarfile.ReadError as error:
                    damage = f"{error} after {_last(groups)}"
                    break
                if member is None:
                    break
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all, of a shard with millions too
                _add(groups, member)
            if not damage and not _ends_properly(path, tar.offset):
                damage = f"it ends without an end mark after {_last(groups)}"
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"data.path: {path} is not a tar archive that can be read at random places ({error}); unpack .tar.gz first"
        ) from error
    groups = {key: members for key, members in groups.items() if "image" in members}
    places = np.array([[m.get(kind, (-1, 0)) for kind in MEMBERS] for m in groups.values()], np.int64).reshape(-1, len(MEMBERS), 2)
    with path.open("rb") as file:
        facts = np.array([_facts(file, members) for members in groups.values()], np.int64).reshape(-1, 3)
    return ShardIndex(list(groups), places[..., 0], places[..., 1], facts, damage)


def _last(groups: dict[str, Any]) -> str:
    return repr(next(reversed(groups), "its beginning"))


def _add(groups: dict[str, dict[str, tuple[int, int]]], member: tarfile.TarInfo) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    if member.isfile() and stem and suffix.lower() in SUFFIXES:
        members = groups.setdefault(f"{folder}/{stem}" if folder else stem, {})
        members[SUFFIXES[suffix.lower()]] = (member.offset_data, member.size)


def _ends_properly(path: Path, offset: int) -> bool:
    """Whether a block of zeros is where the walk stopped."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_BLOCK) == bytes(_BLOCK)


def _facts(file: io.BufferedReader, members: dict[str, tuple[int, int]]) -> tuple[int, int, int]:
    """What is known of an example's captions, class and boxes; one whose files make no sense has none."""
    about, texts = {}, []
    with suppress(OSError, ValueError):
        about = json_fields(_content(file, members["json"])) if "json" in members else {}
    with suppress(OSError, ValueError):
        text = _content(file, members["text"]).decode("utf-8-sig").splitlines() if "text" in members else about.get("text")
        texts = captions(text)
    return len(texts), "label" in members or "label" in about, "boxes" in about


def _content(file: io.BufferedReader, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def json_fields(content: bytes) -> dict[str, Any]:
    """`text` (or `caption`), `label` and `boxes` of a `.json` member. Raises ValueError where it is no JSON object."""
    about = json.loads(content)
    if not isinstance(about, dict):
        raise ValueError("its .json is not an object")
    found = {"text": about.get("text", about.get("caption")), "label": about.get("label"), "boxes": about.get("boxes")}
    return {field: value for field, value in found.items() if value is not None}
