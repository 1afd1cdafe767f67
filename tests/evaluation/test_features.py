"""Features in parts on disk: what a kill leaves, what is refused, and that neither batches nor devices matter."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.evaluation import features, parts
from ldm_jax.evaluation.extractors import Extractor, colors
from ldm_jax.evaluation.features import measure, on_mesh
from ldm_jax.sharding.mesh import make_mesh
from tests.evaluation.toy_features import InMemory, images, tiny_inception


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PART", 16)


def pixels(weights: str = "") -> Extractor:
    """The first row of pixels, as it is."""

    def function(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        return {"pixels": x[:, 0].reshape(len(x), -1).astype(jnp.float32)}

    return Extractor("pixels", function, {}, weights, "as they are")


def test_features_are_those_of_the_pictures_in_their_order(tmp_path: Path) -> None:
    pictures = InMemory(images(0, 37))
    found = measure(pictures, [pixels(), colors(), tiny_inception()], tmp_path, 5, "x")
    expected = pictures._images[:, 0].reshape(37, -1)
    assert len(found) == 37 and set(found.names) == {"pixels", "colors", "inception", "inception_spatial", "inception_logits"}
    blocks = list(found.blocks("pixels"))
    assert [len(block) for block in blocks] == [16, 16, 5] and all(block.dtype == np.float32 for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), expected)
    assert pictures.reads.tolist() == [1] * 37
    assert found.keys.dtype == np.uint64 and len(set(found.keys.tolist())) == 37


def test_rows_are_ordered_by_pictures_and_not_by_their_places(tmp_path: Path) -> None:
    given = images(1, 40)
    given[7] = given[21]  # equal pictures have equal keys
    order = np.random.default_rng(0).permutation(40)
    first = measure(InMemory(given), [pixels()], tmp_path / "a", 8, "x")
    second = measure(InMemory(given[order]), [pixels()], tmp_path / "b", 8, "x")
    assert first.keys[7] == first.keys[21] and len(np.unique(first.keys)) == 39
    for most in (None, 40, 100, 11, 1):
        rows = first.rows("pixels", most)
        np.testing.assert_array_equal(rows, second.rows("pixels", most))
        assert len(rows) == min(most or 40, 40)
        np.testing.assert_array_equal(rows, first.rows("pixels")[: len(rows)])
    everything = {row.tobytes() for row in given[:, 0].reshape(40, -1).astype(np.float32)}
    assert {row.tobytes() for row in first.rows("pixels")} == everything
    assert not np.array_equal(first.rows("pixels"), given[:, 0].reshape(40, -1))


def test_parts_that_are_there_are_not_measured_again(tmp_path: Path) -> None:
    pictures, undisturbed = InMemory(images(0, 50)), measure(InMemory(images(0, 50)), [tiny_inception()], tmp_path / "whole", 8, "x")

    class Killed(Exception):
        pass

    def read(start: int, stop: int, limit: int = 40) -> np.ndarray:
        if stop > limit:
            raise Killed
        return InMemory.read(pictures, start, stop)

    pictures.read = read  # type: ignore[method-assign]
    with pytest.raises(Killed):
        measure(pictures, [tiny_inception()], tmp_path / "parts", 8, "x")
    assert pictures.reads.tolist() == [1] * 40 + [0] * 10
    there = sorted(file.name for file in (tmp_path / "parts").glob("*.npz"))
    assert there == ["00000000-00000016.npz", "00000016-00000032.npz"]
    # what a kill in the middle of writing leaves
    (tmp_path / "parts" / ".00000032-00000048.tmp.npz").write_bytes(b"half a file")
    (tmp_path / "parts" / "about.json.tmp123").write_text('{"pict')
    del pictures.read
    found = measure(pictures, [tiny_inception()], tmp_path / "parts", 32, "x")  # nor does another batch matter
    assert pictures.reads.tolist() == [1] * 32 + [2] * 8 + [1] * 10
    for name in found.names:
        np.testing.assert_allclose(found.rows(name), undisturbed.rows(name), rtol=1e-6)
    again = measure(pictures, [tiny_inception()], tmp_path / "parts", 8, "x")
    assert pictures.reads.sum() == 58 and len(again) == 50 and again.names == found.names


def test_a_directory_of_other_work_is_refused(tmp_path: Path) -> None:
    measure(InMemory(images(0, 20)), [pixels()], tmp_path, 8, "x")
    others = {
        "pictures": (InMemory(images(0, 20), "others"), [pixels()]),
        "number": (InMemory(images(0, 21)), [pixels()]),
        "weights": (InMemory(images(0, 20)), [pixels("other weights")]),
        "weights ": (InMemory(images(0, 20)), [pixels(), colors()]),
    }
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for what, (pictures, extractors) in others.items():
        with pytest.raises(
            UserError, match=rf"holds the work of another job \({what.strip()} differ\): remove it, or give another --output"
        ):
            measure(pictures, extractors, tmp_path, 8, "x")
        assert pictures.reads.sum() == 0
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / parts.ABOUT).write_text("{")
    with pytest.raises(UserError, match=r"cannot use .*; give another --output"):
        measure(InMemory(images(0, 20)), [pixels()], tmp_path, 8, "x")


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use .*file/x: .*; give another --output"):
        parts.claim(tmp_path / "file" / "x", {})


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def function(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        return {"bad": 1 / (x[:, 0, 0, :1].astype(jnp.float32) - 7), "good": x[:, 0, 0].astype(jnp.float32)}

    given = np.zeros((40, 4, 4, 3), np.uint8)
    given[20] = 7
    with pytest.raises(UserError, match="bad: features of pictures 16 to 32 are not finite; are these the network's weights"):
        measure(InMemory(given), [Extractor("x", function, {}, "", "")], tmp_path, 8, "x")
    assert [file.name for file in tmp_path.glob("*.npz")] == ["00000000-00000016.npz"]  # what is broken is not kept


def test_a_disk_that_is_full_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"cannot write .*part\.npz: No space left on device"):
        parts.save(tmp_path / "part.npz", {"a": np.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_work_is_cut_and_shared_without_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parts.parts(10, 4) == [(0, 4), (4, 8), (8, 10)] and parts.parts(8, 4) == [(0, 4), (4, 8)] and parts.parts(0, 4) == []
    parts.save(parts.part_file(tmp_path, (4, 8)), {"a": np.zeros(1)})
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(parts.missing(tmp_path, 30, 4))
    assert shares == [[(0, 4), (12, 16), (24, 28)], [(16, 20), (28, 30)], [(8, 12), (20, 24)]]
    assert sorted([*itertools.chain(*shares), (4, 8)]) == parts.parts(30, 4)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_batches_are_filled_up_and_split_over_devices(devices: int) -> None:
    seen: list[tuple[int, ...]] = []

    def function(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        seen.append(x.shape)
        return {"means": x.astype(jnp.float32).mean((1, 2)) * params["factor"]}

    extractor = Extractor("x", function, {"factor": np.float32(2)}, "", "")
    run, given = on_mesh([extractor], make_mesh(devices=jax.devices()[:devices])), images(0, 16)
    for number in (16, 11, 1):
        found = run(given[:number], 16)["means"]
        assert found.shape == (number, 3) and isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, 2 * given[:number].mean((1, 2)), rtol=1e-6)
    assert seen == [(16, 10, 10, 3)]  # one program for all
