"""Torch files that are written one tensor at a time, as our own reader sees them; torch itself is asked in tests/peers."""

import mmap
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.interop.safetensors_file import Spec, open_weights
from ldm_jax.interop.torch_file import STORAGES, load_state_dict
from ldm_jax.interop.torch_writer import write_checkpoint
from tests.interop import torch_files

Given = dict[str, np.ndarray]


def specs(tensors: Given) -> dict[str, Spec]:
    return {name: Spec(array.shape, array.dtype) for name, array in tensors.items()}


@pytest.fixture
def tensors() -> Given:
    """Of every dtype and of odd shapes, some not in the order of rows."""
    rng = np.random.default_rng(0)
    made = {dtype.name: (10 * rng.normal(size=(3, 1, 5))).astype(dtype) for dtype in STORAGES.values()}
    wide = rng.normal(size=(4, 7, 2)).astype(np.float32)
    return made | {
        "transposed": wide.T,
        "slice": wide[1:, ::2],
        "scalar": np.float32(3.5).reshape(()),
        "empty": np.zeros((0, 4), np.float32),
    }


def same(found: Given, expected: Given) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 50], ids=["small", "as if larger than 4 GiB"])
def test_what_is_written_is_read(limit: int, tensors: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    given = reversed(tensors.items())  # in whatever order they come, the file has that of the specs
    write_checkpoint(tmp_path / "x.ckpt", given, specs(tensors))
    same(load_state_dict(tmp_path / "x.ckpt", "state_dict"), tensors)
    assert open_weights(tmp_path / "x.ckpt").specs() == specs(tensors)
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == len(tensors) + 3
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_sparse_file_of_more_than_four_gibibytes(tmp_path: Path) -> None:
    """That the offsets and sizes which are written are right where they do not fit into 32 bits: a tensor of 4.5 GiB between two others."""
    shape = (1152, 2**20)
    path = torch_files.write(
        tmp_path / "x.ckpt", {"a": np.float32([1, 2]), "large": Spec(shape, np.dtype(np.float32)), "z": np.float32([3])}
    )
    assert path.stat().st_size > 4.5 * 2**30
    found = load_state_dict(path)
    assert found["large"].shape == shape and found["large"][0, :2].tolist() == [2, 0] and found["large"][-1, -1] == 0
    assert (found["a"].tolist(), found["z"].tolist()) == ([1, 2], [3])


def test_tensors_begin_where_torch_may_map_them(tensors: Given, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.ckpt", tensors.items(), specs(tensors))
    for name, array in load_state_dict(tmp_path / "x.ckpt").items():  # views of the mapped file, which begins at a page
        assert not array.size or array.ctypes.data % 64 == 0, name
    assert mmap.PAGESIZE % 64 == 0


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for i in range(5):
            assert [one() for one in alive if one() is not None] == []
            array = np.full((3, 3), i, np.float32)
            alive.append(weakref.ref(array))
            yield str(i), array
            del array

    write_checkpoint(tmp_path / "x.ckpt", stream(), {str(i): Spec((3, 3), np.dtype(np.float32)) for i in range(5)})
    assert [array[0, 0] for array in load_state_dict(tmp_path / "x.ckpt").values()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": np.zeros(2, np.float32)}, "1 tensors to be written were not given, such as b"),
        ({"a": np.zeros(3, np.float32)}, r"a is not to be written, or not again, or not as float32\[3\]"),
        ({"a": np.zeros(2, np.float64)}, r"not as float64\[2\]"),
        ({"c": np.zeros(2, np.float32)}, "c is not to be written"),
    ],
)
def test_tensors_that_are_not_those_to_be_written(given: Given, message: str, tmp_path: Path) -> None:
    wanted = {name: Spec((2,), np.dtype(np.float32)) for name in "ab"}
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "x.ckpt", given.items(), wanted)
    with pytest.raises(ValueError, match="not again"):
        write_checkpoint(tmp_path / "x.ckpt", 2 * [("a", np.zeros(2, np.float32))], wanted)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_place_in_a_file(tmp_path: Path) -> None:
    for dtype in (np.complex64, ml_dtypes.float8_e4m3fn):
        with pytest.raises(ValueError, match="torch files here hold no tensors of"):
            write_checkpoint(tmp_path / "x.ckpt", [], {"a": Spec((2,), np.dtype(dtype))})
    with pytest.raises(UserError, match=r"cannot write .*x\.ckpt: No such file"):
        write_checkpoint(tmp_path / "no folder" / "x.ckpt", [], {})
    assert list(tmp_path.iterdir()) == []
