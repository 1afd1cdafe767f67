"""Aspect-ratio buckets: each picture at the size nearest to its shape, batches of one size, every picture once an epoch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_jax.config import UserError, bucket_sizes, check, override
from ldm_jax.data.buckets import Bucketed, arrange, picture_sizes
from ldm_jax.data.decode import decode_image, image_size
from ldm_jax.data.derive import Derive, Derived
from ldm_jax.data.order import Bucket, turn
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.reliable import Reliable
from ldm_jax.data.sources import open_data
from ldm_jax.data.transforms import fit
from ldm_jax.defaults import base
from tests.data import pictures

SIZES = ((16, 16), (24, 12), (12, 24))
SIDES = st.integers(1, 300)


@given(
    st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=60), st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=6), st.integers(1, 9)
)
def test_each_picture_goes_to_the_nearest_ratio_of_those_that_are_left(shapes: list, sizes: list, least: int) -> None:
    order, buckets = arrange(np.array(shapes), sizes, least)
    assert sorted(order) == list(range(len(shapes)))
    assert [b.start for b in buckets] == [0, *(b.stop for b in buckets[:-1])] and buckets[-1].stop == len(shapes)
    assert len(buckets) == 1 or min(b.number for b in buckets) >= least
    left = [(b.height, b.width) for b in buckets]
    assert left == [size for size in sizes if size in left] or len(set(sizes)) < len(sizes)
    for bucket in buckets:
        own = order[bucket.start : bucket.stop]
        assert (np.diff(own) > 0).all()
        for i in own:
            far = [abs(np.log(shapes[i][0] / shapes[i][1]) - np.log(h / w)) for h, w in left]
            assert np.isclose(far[left.index((bucket.height, bucket.width))], min(far))


def test_small_buckets_give_their_pictures_to_the_others() -> None:
    shapes = np.array([(10, 10)] * 8 + [(20, 10)] * 5 + [(30, 10)] * 2)
    _, buckets = arrange(shapes, [(16, 16), (24, 12), (30, 10)], 4)
    assert buckets == [Bucket(16, 16, 0, 8), Bucket(24, 12, 8, 15)]
    assert arrange(shapes, [(16, 16), (24, 12)], 100)[1] == [Bucket(16, 16, 0, 15)]
    assert [b.number for b in arrange(shapes, [(30, 10), (24, 12), (16, 16)], 1)[1]] == [2, 5, 8]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 5), st.booleans())
def test_a_cycle_gives_each_bucket_its_turns(numbers: list[int], batch: int, seed: int, shuffle: bool) -> None:
    stops = np.cumsum(numbers).tolist()
    buckets = [Bucket(8, 8 + i, stop - n, stop) for i, (stop, n) in enumerate(zip(stops, numbers, strict=True))]
    turns = [max(1, round(n / batch)) for n in numbers]
    for cycle in (0, 3):
        steps = range(cycle * sum(turns), (cycle + 1) * sum(turns))
        seen = [turn(buckets, batch, seed, step, shuffle) for step in steps]
        for bucket, number in zip(buckets, turns, strict=True):
            nth = sorted(n for b, n in seen if b == bucket)
            assert nth == list(range(cycle * number, (cycle + 1) * number))


def save_folder(root: Path) -> None:
    """30 pictures: 12 squares, 10 tall ones, of which one is stored on its side, and 8 wide ones."""
    shapes = [(20, 20)] * 12 + [(20, 44)] * 10 + [(44, 20)] * 8  # width, height
    for i in np.random.default_rng(0).permutation(30).tolist():
        pictures.save(root / f"{i:02}.png", 8 * i, shapes[i])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(root / "12.png").transpose(Image.Transpose.ROTATE_90).save(root / "12.png", exif=exif)


def folder(root: Path, **fields: Any) -> Reliable:
    save_folder(root)
    data = base().data
    data.update(source="folder", path=str(root), **fields)
    return Reliable(open_data(data))


def test_pictures_are_sorted_into_buckets_and_fitted(tmp_path: Path) -> None:
    below = folder(tmp_path / "data")
    (tmp_path / "data" / "29.png").write_bytes((tmp_path / "data" / "29.png").read_bytes()[:60])  # its head is whole
    source = Bucketed(below, SIZES, 4, tmp_path / "kept", workers=2)
    assert source.buckets == [Bucket(16, 16, 0, 12), Bucket(24, 12, 12, 22), Bucket(12, 24, 22, 30)]
    order = [*range(12), *range(12, 22), *range(22, 30)]
    for i, original in enumerate(order[:-1]):
        example = source[i]
        assert example["image"].shape[:2] == source.size(i)
        np.testing.assert_array_equal(example["image"], fit(below[original], *source.size(i))["image"])
        assert source.name(i).endswith(f"{original:02}.png")
    assert source[29]["image"].shape == (12, 24, 3)  # broken: the next good one, a square, in its place
    again = Bucketed(below, SIZES[:1], 4, tmp_path / "kept", workers=1)
    assert len(list((tmp_path / "kept").iterdir())) == 1 and again.fingerprint() != source.fingerprint() != below.fingerprint()


def test_the_head_of_a_file_says_the_size(tmp_path: Path) -> None:
    below = folder(tmp_path / "data")
    expected = [below[i]["image"].shape[:2] for i in range(30)]
    np.testing.assert_array_equal(picture_sizes(below, 2), expected)
    for turned in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turned
        file = pictures.encoded(Image.new("RGB", (5, 9)), "JPEG", exif=exif)
        assert image_size(file) == decode_image(file).shape[:2]


def test_a_batch_is_of_one_bucket_and_an_epoch_has_each_picture_once(tmp_path: Path) -> None:
    source = Bucketed(folder(tmp_path / "data"), SIZES, 4, tmp_path / "kept", workers=1)
    batches = Batches(source, 4, seed=3)
    steps = range(3 + 2 + 2)  # a cycle: 12, 10 (of 4: rounded to 2) and 8 pictures
    indices = [batches.indices(step) for step in steps]
    assert len({tuple(i // 4 for i in np.sort(rows)) for rows in indices}) > 2
    for step, rows in zip(steps, indices, strict=True):
        shape = batches.batch(step)["image"].shape
        assert shape == (4, *source.size(rows[0]), 3)
    seen = np.concatenate(indices)
    assert sorted(seen[seen < 12]) == list(range(12)) and sorted(seen[seen >= 22]) == list(range(22, 30))
    assert len(set(seen[(seen >= 12) & (seen < 22)])) == 8
    parts = [Batches(source, 4, seed=3, rows=range(2 * p, 2 * p + 2)) for p in range(2)]
    both = np.concatenate([part.batch(5)["image"] for part in parts])
    np.testing.assert_array_equal(both, batches.batch(5)["image"])
    tall = [rows for rows in map(batches.indices, range(7 * 5)) if 12 <= rows[0] < 22]
    assert sorted(np.concatenate(tall)) == sorted([*range(12, 22)] * 4)  # five cycles are four epochs of the tall ones


def test_what_is_drawn_for_an_example_has_its_size(tmp_path: Path) -> None:
    source = Derived(
        Bucketed(folder(tmp_path / "data"), SIZES, 4, tmp_path / "kept", 1), Derive(16, degradation="bicubic", factor=4, holes="wide")
    )
    assert len(source.buckets) == 3
    for batch in (Batches(source, 4, seed=0).batch(step) for step in range(4)):
        height, width = batch["image"].shape[1:3]
        assert batch["mask"].shape == (4, height, width) and batch["low_res"].shape == (4, height // 4, width // 4, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"buckets": ("16x16", "24")}, r"heights and widths in pixels, such as .*, not '24'"),
        ({"buckets": ("16x0",)}, "heights and widths"),
        ({"buckets": (16, 16)}, "heights and widths"),
        ({"buckets": ("64x64", "64x81")}, "data.buckets: 64x81: 81 pixels are not divisible by the autoencoder's factor 8"),
        ({"buckets": ("64x64", "64x88")}, "data.buckets: 64x88: a side of 11 latents cannot be halved 3 times"),
        ({"buckets": ("64x64",), "min_window": 0.5}, "data.min_window takes square windows"),
    ],
)
def test_bad_buckets_are_refused(fields: dict, message: str) -> None:
    config = base()
    config.data.update(**fields)
    with pytest.raises(UserError, match=message):
        check(config)


def test_buckets_from_a_command() -> None:
    config = base()
    override(config, "data.buckets", "('16x16', '24x12')")
    assert bucket_sizes(config.data) == [(16, 16), (24, 12)]


def test_an_autoencoder_has_no_buckets() -> None:
    config = base()
    config.task, config.data.buckets = "autoencoder", ("64x64",)
    with pytest.raises(UserError, match=r"data.buckets are sizes for the denoiser"):
        check(config)
