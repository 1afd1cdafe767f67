"""Sources: random-access sequences of examples, and the table of their kinds.

An example is a dict with `image` uint8 [H, W, 3] and those of `text` str (or list[str], in a source with several captions of a
picture), `label` int, `boxes` float32 [n, 5], `segmentation` uint8 [H, W] and `mask` bool [H, W] that were asked for. What `source[i]`
gives depends on i alone.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.config import UserError
from ldm_jax.data.array_record import ArrayRecordSource
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.reader import CALLED, FIELDS, Source
from ldm_jax.data.reliable import Layer, Reliable
from ldm_jax.data.shapes import Pairs, ShapesSource
from ldm_jax.data.table import TableSource
from ldm_jax.data.tar import TarSource
from ldm_jax.data.tfds import TfdsSource
from ldm_jax.data.transforms import center_crop_example
from ldm_jax.paths import local


class Chosen(Layer):
    """A source of which only the picture and the fields asked for are taken. Raises UserError where it has not all of them."""

    def __init__(self, source: Source, needs: Collection[str]) -> None:
        super().__init__(source)
        self._fields = ("image", *(field for field in FIELDS if field in needs))
        if missing := [field for field in self._fields if field not in source[0]]:
            raise UserError(f"data.source: this source gives no {CALLED[missing[0]]}, which the conditioning needs")

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.below[index]
        return {field: example[field] for field in self._fields}

    def fingerprint(self) -> str:
        """That of the source below, with the fields."""
        return "-".join((self.below.fingerprint(), *self._fields[1:]))


class Cropped(Layer):
    """A source whose pictures, with their maps, are cropped to a square of a resolution (`transforms.center_crop_example`)."""

    def __init__(self, source: Source, resolution: int) -> None:
        super().__init__(source)
        self._resolution = resolution

    def __getitem__(self, index: int) -> dict[str, Any]:
        return center_crop_example(self.below[index], self._resolution)

    def fingerprint(self) -> str:
        """That of the source below, with the resolution."""
        return f"{self.below.fingerprint()}-{self._resolution}px"


def _path(data: ConfigDict) -> str:
    if not data.path:
        raise UserError(f"data.path is empty; data.source={data.source} needs the place of the data")
    return data.path


def _keys(data: ConfigDict) -> dict[str, str]:
    return {field: data[f"{field}_key"] for field in ("image", *FIELDS)}


def _tfds(data: ConfigDict, needs: Collection[str]) -> Source:
    if not data.name:
        raise UserError("data.name is empty; it is needed with data.source=tfds")
    return TfdsSource(data.name, data.path or None, data.split, _keys(data), needs)


_READERS: dict[str, Callable[[ConfigDict, Collection[str]], Source]] = {
    "folder": lambda data, needs: FolderSource(_path(data), needs),
    "tfds": _tfds,
    "array_record": lambda data, needs: ArrayRecordSource(_path(data), needs),
    "tar": lambda data, needs: TarSource(_path(data), needs),
    "table": lambda data, needs: TableSource(_path(data), data.split, _keys(data), needs),
}
SOURCES = ("shapes", *_READERS)


def open_data(data: ConfigDict, needs: Collection[str] = (), pairs: Pairs = "seen") -> Source:
    """The examples that a config's `data` group describes, pictures as they are stored, broken ones raising. Raises as `make_source`."""
    if unknown := sorted(set(needs) - set(FIELDS)):
        raise UserError(f"no data gives {', '.join(unknown)}; examples have {', '.join(FIELDS)}")
    if data.source == "shapes":
        drawn = ShapesSource(size=data.size, seed=data.seed, resolution=data.resolution, counts=tuple(data.counts), pairs=pairs)
        return Chosen(drawn, needs)
    if data.source not in _READERS:
        raise UserError(f"data.source is {data.source!r}; it must be one of {', '.join(SOURCES)}")
    local(data.path, "data, which is read at random places,")
    return _READERS[data.source](data, needs)


def make_source(data: ConfigDict, needs: Collection[str] = (), *, pairs: Pairs = "seen", log_path: Path | None = None) -> Source:
    """The source that a config's `data` group describes, with broken examples replaced, and pictures of `data.resolution` or as they are
    where there are buckets, or windows to be taken.

    Args:
        data: the group; which of its fields are read is said beside them in `defaults.py`.
        needs: the fields that are conditioned on, of `FIELDS`: each example has exactly these beside `image`.
        pairs: shapes only: the colour-shape pairs that are drawn, "seen", "held_out" or "all".
        log_path: file in which broken examples are named.

    Raises:
        UserError: unknown source, or data that are missing, damaged or incomplete; on reading, more than `data.max_broken` of them broken.
    """
    source = open_data(data, needs, pairs)
    if data.source == "shapes":  # drawn at the resolution, and never broken
        return source
    if not (data.min_window or data.buckets):  # else `Derived` takes a window of the picture as it is, and `Bucketed` fits it
        source = Cropped(source, data.resolution)
    return Reliable(source, log_path, data.max_broken)


def needed_fields(config: ConfigDict) -> tuple[str, ...]:
    """The fields of examples that a run's conditioners read. Holes that are drawn while training are not asked of the data."""
    if config.task != "diffusion":
        return ()
    enabled = [field for field in FIELDS if config.conditioning[field].enabled]
    return tuple(field for field in enabled if field != "mask" or not config.conditioning.mask.get("holes"))
