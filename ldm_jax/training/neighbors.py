"""Retrieval: each training picture with the embeddings of its nearest neighbours (Blattmann et al., arXiv 2204.11824)."""

import os
import threading
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.embeddings import COLOR_WIDTH, mean_colors, read_embeddings
from ldm_jax.data.kept import kept
from ldm_jax.data.latents import cache_fingerprint
from ldm_jax.data.pipeline import read_ahead
from ldm_jax.data.reliable import Layer
from ldm_jax.data.sources import Source
from ldm_jax.nearest import nearest


class Neighbored(Layer):
    """A source whose examples have `neighbors` float32 [count,D]: the rows of a database nearest to them, but for themselves.

    What is searched is kept under `neighbors/` of the work directory, and searched at the first example that is read.

    Raises UserError at construction for embedding files that do not fit.
    """

    def __init__(self, below: Source, group: ConfigDict, workdir: WorkDir, workers: int = 2) -> None:
        super().__init__(below)
        self._workers, self._lock = max(workers, 1), threading.RLock()
        self._count, self._root, self._files = group.count, workdir.path / "neighbors", (group.queries, group.database)
        self._queries = read_embeddings(group.queries) if group.queries else None
        self._database = read_embeddings(group.database) if group.database else None
        if self._queries is not None and len(self._queries) != len(below):
            raise UserError(f"{group.queries} has {len(self._queries)} embeddings for {len(below)} pictures: one each, in their order")
        widths = [COLOR_WIDTH if self._queries is None else self._queries.shape[1]]
        widths += [] if self._database is None else [self._database.shape[1]]
        if any(width != group.width for width in widths):
            raise UserError(f"conditioning.neighbors.width is {group.width}, the embeddings have {' and '.join(map(str, widths))}")
        if self._count > len(below if self._database is None else self._database) - (self._database is None):
            raise UserError(f"conditioning.neighbors.count {self._count} is more than there are pictures to find")

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.below[index], "neighbors": self.database[self._table[index]].astype(np.float32)}

    @cached_property
    def database(self) -> np.ndarray:
        """What neighbours are taken from, float [N,D]."""
        return self._own if self._database is None else self._database

    @cached_property
    def _own(self) -> np.ndarray:
        """The embeddings of the pictures themselves."""
        with self._lock:  # threads read examples, and what takes long is done once
            return kept(self._path("embeddings"), self._embed) if self._queries is None else self._queries

    @cached_property
    def _table(self) -> np.ndarray:
        with self._lock:
            return kept(self._path(f"nearest-{self._count}"), self._search)

    def _embed(self) -> np.ndarray:
        indices = tqdm(range(len(self)), desc="embeddings", mininterval=5)
        with closing(read_ahead(lambda i: mean_colors(self.below[i]["image"]), indices, self._workers, 64)) as embeddings:
            return np.stack(list(embeddings))

    def _search(self) -> np.ndarray:
        own = np.arange(len(self)) if self._database is None else None
        try:
            return nearest(self._own, self.database, self._count, own)
        except ValueError as error:
            raise UserError(f"conditioning.neighbors: {error}") from error

    def _path(self, name: str) -> Path:
        """Where an array of this data is kept."""
        return self._root / f"{name}-{self.fingerprint()}.npy"

    def find(self, images: np.ndarray) -> np.ndarray:
        """The neighbours float32 [N,count,D] of other pictures, uint8 [N,H,W,3], by their mean colours. Raises UserError."""
        if self._queries is not None:
            raise UserError("embeddings of other pictures are made as those of conditioning.neighbors.queries were")
        found = nearest(np.stack([mean_colors(image) for image in images]), self.database, self._count)
        return np.asarray(self.database)[found].astype(np.float32)

    def fingerprint(self) -> str:
        """That of the source below, with the files that are searched."""
        files = [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in self._files if path]
        return cache_fingerprint(below=self.below.fingerprint(), files=files, count=self._count)
