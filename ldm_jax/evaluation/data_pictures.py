"""The pictures of a configuration's data as its training sees them: what samples of its model are to be like."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.evaluation.pictures import Pictures


class DataPictures(Pictures):
    """Pictures of a source of examples, whose `image` is uint8 [H,W,3] of one size.

    Args:
      number: so many of them, drawn at random but always the same, as the first may be of one class; None: all.
      provenance: of the pictures.
    """

    def __init__(self, source: Any, provenance: Mapping[str, Any], number: int | None = None, workers: int = 2) -> None:
        self._source, self._workers = source, workers
        order = np.random.Generator(np.random.Philox(0)).permutation(len(source))
        self.indices = np.arange(len(source)) if number is None else np.sort(order[:number])
        self.size = source[0]["image"].shape[:2]
        self.provenance = {**provenance, "data": source.fingerprint(), "number": len(self)}

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> np.ndarray:
        self._check(start, stop)
        with ThreadPoolExecutor(self._workers) as pool:
            images = list(pool.map(lambda i: self._source[i]["image"], self.indices[start:stop].tolist()))
        if any(image.shape[:2] != self.size for image in images):
            raise UserError("the pictures of the data have different sizes: evaluate without data.buckets")
        return np.stack(images) if images else np.empty((0, *self.size, 3), np.uint8)

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}-{len(self)}-{self.size[0]}x{self.size[1]}"

    def describe(self) -> str:
        return f"{len(self)} pictures of the data"
