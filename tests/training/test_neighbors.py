"""Retrieval: each example with the embeddings of its nearest neighbours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.embeddings import mean_colors
from ldm_jax.data.shapes import ShapesSource
from ldm_jax.defaults import base
from ldm_jax.training.neighbors import Neighbored

SOURCE = ShapesSource(size=30, resolution=16, counts=(1,))


def group(**fields: Any) -> ConfigDict:
    made = base().conditioning.neighbors
    made.update(count=3, width=192, **fields)
    return made


def test_neighbours_are_the_most_alike_but_not_the_picture_itself(tmp_path: Path) -> None:
    source = Neighbored(SOURCE, group(), WorkDir(tmp_path))
    embeddings = np.stack([mean_colors(SOURCE[i]["image"]) for i in range(30)])
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    for i in (0, 17):
        similarity = embeddings @ embeddings[i]
        similarity[i] = -1
        best = np.argsort(-similarity)[:3]
        example = source[i]
        np.testing.assert_allclose(example["neighbors"], embeddings[best], atol=1e-6)
        assert example["neighbors"].dtype == np.float32 and example["text"] == SOURCE[i]["text"]
    np.testing.assert_allclose(source.find(SOURCE[4]["image"][None])[0, 0], embeddings[4], atol=1e-6)


def test_what_was_searched_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Neighbored(SOURCE, group(), WorkDir(tmp_path))[3]["neighbors"]
    monkeypatch.setattr("ldm_jax.training.neighbors.nearest", None)
    monkeypatch.setattr("ldm_jax.training.neighbors.mean_colors", None)
    again = Neighbored(SOURCE, group(), WorkDir(tmp_path))
    np.testing.assert_array_equal(again[3]["neighbors"], first)
    assert again.fingerprint() != Neighbored(ShapesSource(size=31, resolution=16), group(), WorkDir(tmp_path)).fingerprint()


def test_files_of_embeddings(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    queries, database = rng.normal(size=(30, 8)).astype(np.float16), rng.normal(size=(50, 8)).astype(np.float32)
    np.save(tmp_path / "queries.npy", queries)
    np.savez(tmp_path / "database.npz", embeddings=database)
    settings = {"queries": str(tmp_path / "queries.npy"), "database": str(tmp_path / "database.npz")}
    wide = group(**settings)
    wide.width = 8
    found = Neighbored(SOURCE, wide, WorkDir(tmp_path))[5]["neighbors"]
    unit = database / np.linalg.norm(database, axis=1, keepdims=True)
    np.testing.assert_array_equal(found, database[np.argsort(-(unit @ queries[5].astype(np.float64)))[:3]])
    with pytest.raises(UserError, match="width is 192, the embeddings have 8 and 8"):
        Neighbored(SOURCE, group(**settings), WorkDir(tmp_path))
    with pytest.raises(UserError, match="has 30 embeddings for 31 pictures"):
        Neighbored(ShapesSource(size=31, resolution=16), wide, WorkDir(tmp_path))
    wide.count = 51
    with pytest.raises(UserError, match="count 51 is more than there are"):
        Neighbored(SOURCE, wide, WorkDir(tmp_path))


@pytest.mark.parametrize("content", [None, b"", b"not numbers", np.zeros(3), np.zeros((2, 3), int)])
def test_what_is_no_file_of_embeddings(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError, match=r"x.npy"):
        Neighbored(SOURCE, group(database=str(path)), WorkDir(tmp_path))
