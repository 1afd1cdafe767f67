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
      number: the first so many of them; all where there are not so many, or it is None.
      provenance: of the pictures.
    """

    def __init__(self, source: Any, provenance: Mapping[str, Any], number: int | None = None, workers: int = 2) -> None:
        self._source, self._workers = source, workers
        self._number = len(source) if number is None else min(number, len(source))
        self.size = source[0]["image"].shape[:2]
        self.provenance = {**provenance, "data": source.fingerprint(), "number": self._number}

    def __len__(self) -> int:
        return self._number

    def read(self, start: int, stop: int) -> np.ndarray:
        self._check(start, stop)
        with ThreadPoolExecutor(self._workers) as pool:
            images = list(pool.map(lambda i: self._source[i]["image"], range(start, stop)))
        if any(image.shape[:2] != self.size for image in images):
            raise UserError("the pictures of the data have different sizes: evaluate without data.buckets")
        return np.stack(images) if images else np.empty((0, *self.size, 3), np.uint8)

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()}-{self._number}-{self.size[0]}x{self.size[1]}"

    def describe(self) -> str:
        return f"{self._number} pictures of the data"
