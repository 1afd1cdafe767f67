"""Features of a set of pictures, measured in parts that are kept on disk: nothing is held in memory, and a killed job goes on."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ldm_jax.config import UserError
from ldm_jax.evaluation import parts
from ldm_jax.evaluation.extractors import Extractor
from ldm_jax.evaluation.pictures import Pictures
from ldm_jax.sharding.mesh import filled, make_mesh, replicated, split_host_arrays
from ldm_jax.sharding.processes import wait_for_all

PART = 512  # pictures of a part: what a kill loses at most
_KEY = "key"

Rows = dict[str, np.ndarray]


class Features:
    """Rows that lie in the parts of a directory, in the order of the pictures."""

    def __init__(self, directory: Path, number: int) -> None:
        self.directory, self.number = directory, number

    def __len__(self) -> int:
        return self.number

    @cached_property
    def names(self) -> tuple[str, ...]:
        with parts.load(self._files[0]) as part:
            return tuple(name for name in part.files if name != _KEY)

    @property
    def _files(self) -> list[Path]:
        return [parts.part_file(self.directory, part) for part in parts.parts(self.number, PART)]

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Rows float32 [n,d] of one part after another."""
        for file in self._files:
            with parts.load(file) as part:
                yield part[name]

    @cached_property
    def keys(self) -> np.ndarray:
        """uint64 [N], of the pictures' pixels alone: equal pictures have equal ones."""
        return np.concatenate(list(self.blocks(_KEY)))

    def rows(self, name: str, most: int | None = None) -> np.ndarray:
        """All rows, or `most` of them, float32 [n,d], in the order of their keys.

        Which ones these are, and what is drawn from them by chance, so depends on the pictures, and not on the order of their files.
        """
        order = np.argsort(self.keys, kind="stable")[:most]
        place = np.full(self.number, -1)
        place[order] = np.arange(len(order))
        found, start = np.empty((0,)), 0
        for block in self.blocks(name):
            to = place[start : start + len(block)]
            found = np.empty((len(order), *block.shape[1:]), block.dtype) if start == 0 else found
            found[to[to >= 0]] = block[to >= 0]
            start += len(block)
        return found


def measure(pictures: Pictures, extractors: Sequence[Extractor], directory: Path, batch_size: int, title: str) -> Features:
    """Features of all pictures by all extractors, on every device; what lies in the directory already is not measured again.

    Of several processes each measures its share of the parts, in a directory that all of them see.

    Raises UserError where a picture cannot be read, where the directory is of other pictures, and where a feature is not finite.
    """
    weights = {extractor.name: extractor.weights for extractor in extractors}
    parts.claim(directory, {"pictures": pictures.fingerprint(), "number": len(pictures), "part": PART, "weights": weights})
    todo = parts.missing(directory, len(pictures), PART)
    mesh = make_mesh(devices=jax.local_devices())
    size = filled(batch_size, mesh)
    function = on_mesh(extractors, mesh)
    with tqdm(total=sum(stop - start for start, stop in todo), desc=title, unit="image", mininterval=2, disable=not todo) as bar:
        for part in todo:
            found = list(_batches(pictures, function, part, size, bar))
            joined = {name: np.concatenate([rows[name] for rows in found]) for name in found[0]}
            broken = [name for name, rows in joined.items() if not np.isfinite(rows).all()]
            if broken:
                raise UserError(
                    f"{broken[0]}: features of pictures {part[0]} to {part[1]} are not finite; are these the network's weights?"
                )
            parts.save(parts.part_file(directory, part), joined)
    wait_for_all()
    return Features(directory, len(pictures))


def _batches(pictures: Pictures, function: Callable[..., Rows], part: tuple[int, int], size: int, bar: Any) -> Iterator[Rows]:
    for first, last in parts.parts(part[1] - part[0], size):
        images = pictures.read(part[0] + first, part[0] + last)
        keys = [int.from_bytes(blake2b(image.tobytes(), digest_size=8).digest(), "little") for image in images]
        yield {_KEY: np.array(keys, np.uint64), **function(images, size)}
        bar.update(len(images))


def on_mesh(extractors: Sequence[Extractor], mesh: Mesh) -> Callable[[np.ndarray, int], Rows]:
    """(uint8 [n,H,W,3], size) to the features float32 [n,d] of all extractors.

    The n pictures are filled up to `size`, so that one program serves all batches, and are split over the devices; the rows of those that
    were filled up are dropped.
    """

    @jax.jit
    def run(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for extractor in extractors:
            found |= extractor.function(params[extractor.name], images)
        return found

    params = jax.device_put({extractor.name: extractor.params for extractor in extractors}, replicated(mesh))

    def features(images: np.ndarray, size: int) -> Rows:
        filled = images[np.minimum(np.arange(size), len(images) - 1)]
        with jax.default_matmul_precision("float32"):
            found = run(params, split_host_arrays(filled, mesh))
        return {name: np.asarray(rows)[: len(images)] for name, rows in found.items()}

    return features
