"""Crops act alike on every entry of an example; the pictures of the centre crop are ADM's."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from ldm_jax.config import UserError
from ldm_jax.data.shapes import ShapesSource
from ldm_jax.data.transforms import center_crop, center_crop_example, crop, fit, mirror, random_crop, random_window

SIDES = st.integers(1, 70)


def adm(image: np.ndarray, resolution: int) -> np.ndarray:
    """The centre crop as ADM states it, written a second time."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * resolution:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.Resampling.BOX)
    scale = resolution / min(picture.size)
    array = np.asarray(picture.resize(tuple(round(side * scale) for side in picture.size), Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - resolution) // 2, (array.shape[1] - resolution) // 2
    return array[top : top + resolution, left : left + resolution]


def placed(height: int, width: int) -> dict[str, Any]:
    """An example whose picture and maps say where each pixel is: red grows to the right, green downwards."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height)[:, None] + 0.5) / height
    image = np.stack(np.broadcast_arrays(20 + 215 * x, 20 + 215 * y, 0), axis=-1)
    places = np.arange(height * width, dtype=np.int32).reshape(height, width)
    boxes = np.array([[3, 0.1, 0.2, 0.3, 0.4]], np.float32)
    return {"image": np.rint(image).astype(np.uint8), "segmentation": places, "mask": places % 3 == 0, "boxes": boxes, "text": "a"}


def assert_consistent(example: dict[str, Any], whole: dict[str, Any], height: int, width: int) -> None:
    """Each pixel of the maps is the one of the whole picture's under its centre, as `crop` says, and the picture agrees."""
    image_height, image_width = whole["image"].shape[:2]
    x0, y0, x1, y1 = example["crop"].astype(float)
    x = x0 + (np.arange(width) + 0.5) / width * (x1 - x0)
    y = y0 + (np.arange(height)[:, None] + 0.5) / height * (y1 - y0)
    row, column = np.divmod(example["segmentation"], image_width)
    assert np.abs((column + 0.5) - x * image_width).max() <= 0.5 + 1e-3
    assert np.abs((row + 0.5) - y * image_height).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(example["mask"], example["segmentation"] % 3 == 0)
    # Near the border of a window the cubic filter leans on fewer pixels of it.
    margin = 2 + int(np.ceil(2 * width / ((x1 - x0) * image_width)))
    inner = (slice(margin, -margin), slice(margin, -margin))
    for channel, (at, pixel) in enumerate(((x, (x1 - x0) / width), (y, (y1 - y0) / height))):
        expected = np.broadcast_to(20 + 215 * at, (height, width))
        np.testing.assert_allclose(example["image"][..., channel][inner], expected[inner], atol=2 + 0.35 * 215 * pixel)
    assert example["image"].shape == (height, width, 3) and example["crop"].dtype == np.float32 and example["crop"].shape == (4,)
    np.testing.assert_array_equal(example["boxes"], whole["boxes"])
    assert example["text"] == whole["text"]


@settings(max_examples=100, deadline=None)
@given(SIDES, SIDES, st.integers(1, 40), st.integers(0, 2**32))
def test_center_crop_is_adms_bit_for_bit(height: int, width: int, resolution: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    found = center_crop(image, resolution)
    if image.shape[:2] == (resolution, resolution):
        assert found is image
    else:
        np.testing.assert_array_equal(found, adm(image, resolution))
    np.testing.assert_array_equal(center_crop_example({"image": image}, resolution)["image"], found)


@pytest.mark.parametrize("size", [(64, 64), (65, 200), (301, 131), (40, 60), (32, 32), (129, 64)])
def test_center_crop_of_an_example_cuts_every_entry_alike(size: tuple[int, int]) -> None:
    whole = placed(*size)
    found = center_crop_example(whole, 32)
    assert_consistent(found, whole, 32, 32)
    x0, y0, x1, y1 = found["crop"]
    short = min(size)
    np.testing.assert_allclose([(x1 - x0) * size[1], (y1 - y0) * size[0]], short, rtol=0.03)
    # ADM's crop is off the centre by at most half a pixel of the resized picture.
    assert abs(x0 + x1 - 1) * size[1] <= 1.01 * short / 32 and abs(y0 + y1 - 1) * size[0] <= 1.01 * short / 32


def test_an_example_of_the_right_size_is_kept_whole() -> None:
    whole = placed(32, 32)
    found = center_crop_example(whole, 32)
    assert found["image"] is whole["image"] and found["crop"].tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(found["segmentation"], whole["segmentation"])
    again = center_crop_example({**whole, "crop": np.array([0.25, 0.5, 0.5, 0.75], np.float32)}, 32)
    np.testing.assert_array_equal(again["crop"], [0.25, 0.5, 0.5, 0.75])


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 32), (20, 60)])
@pytest.mark.parametrize("picture", [(64, 64), (65, 200), (301, 131), (30, 40)])
def test_fit_fills_a_bucket_with_the_centre(size: tuple[int, int], picture: tuple[int, int]) -> None:
    whole = placed(*picture)
    found = fit(whole, *size)
    assert_consistent(found, whole, *size)
    x0, y0, x1, y1 = found["crop"]
    np.testing.assert_allclose((x1 - x0) * picture[1] / size[1], (y1 - y0) * picture[0] / size[0], rtol=0.04)  # nothing is stretched
    assert max(x1 - x0, y1 - y0) == 1 and abs(x0 + x1 - 1) <= 1 / size[1] and abs(y0 + y1 - 1) <= 1 / size[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(6, 40), st.integers(0, 2**32))
def test_a_random_crop_cuts_every_entry_alike(height: int, width: int, resolution: int, seed: int) -> None:
    whole = placed(height, width)
    found = random_crop(whole, resolution, np.random.default_rng(seed), 0.5)
    assert_consistent(found, whole, resolution, resolution)
    left, top, side = random_window(np.random.default_rng(seed), height, width, 0.5)
    window = np.array([left / width, top / height, (left + side) / width, (top + side) / height])
    np.testing.assert_allclose(found["crop"], window, atol=1e-6)
    np.testing.assert_array_equal(found["image"], center_crop(whole["image"][top : top + side, left : left + side], resolution))


def test_a_crop_at_its_own_size_is_a_slice() -> None:
    whole = placed(40, 60)
    found = crop(whole, 7, 5, 16, 16)
    for key in ("image", "segmentation", "mask"):
        np.testing.assert_array_equal(found[key], whole[key][5:21, 7:23])


def test_maps_are_read_at_the_centres_of_pixels() -> None:
    labels = np.arange(36, dtype=np.uint8).reshape(6, 6)
    example = {"image": np.zeros((6, 6, 3), np.uint8), "segmentation": labels}
    np.testing.assert_array_equal(center_crop_example(example, 2)["segmentation"], labels[1::3, 1::3])
    np.testing.assert_array_equal(center_crop_example(example, 12)["segmentation"], labels.repeat(2, 0).repeat(2, 1))


def test_crops_compose() -> None:
    whole = placed(96, 96)
    once = crop(whole, 12, 24, 24, 24)
    twice = crop(crop(whole, 8, 16, 48, 48), 4, 8, 24, 24)
    np.testing.assert_allclose(twice["crop"], once["crop"], atol=1e-6)
    np.testing.assert_array_equal(twice["segmentation"], once["segmentation"])
    assert_consistent(twice, whole, 24, 24)


def test_mirror_and_crop_commute() -> None:
    whole = placed(40, 60)
    mirrored_last, mirrored_first = mirror(crop(whole, 10, 5, 20, 20)), crop(mirror(whole), 30, 5, 20, 20)
    for key in ("image", "segmentation", "mask", "boxes"):
        np.testing.assert_array_equal(mirrored_last[key], mirrored_first[key])
    np.testing.assert_allclose(mirrored_last["crop"], mirrored_first["crop"], atol=1e-6)
    np.testing.assert_allclose(mirrored_last["crop"], [30 / 60, 5 / 40, 50 / 60, 25 / 40], atol=1e-6)
    assert mirrored_last["crop"].dtype == np.float32
    np.testing.assert_allclose(mirror(mirrored_last)["crop"], crop(whole, 10, 5, 20, 20)["crop"], atol=1e-6)


def test_boxes_find_their_object_again_through_the_crop() -> None:
    """Of a drawn scene, cropped and mirrored: the box of an object, brought into the crop, holds the object's pixels."""
    found_objects = 0
    for index in range(8):
        rng = np.random.default_rng(index)
        example = mirror(random_crop(ShapesSource(8, resolution=128, counts=(1,))[index], 64, rng, 0.7))
        label, *corners = example["boxes"][0]
        x0, y0, x1, y1 = example["crop"]
        left, top, right, bottom = (np.array(corners) - [x0, y0, x0, y0]) / ([x1 - x0, y1 - y0] * 2) * 64
        rows, columns = np.nonzero(example["segmentation"] == 1 + label)
        assert np.all((rows >= top - 1.5) & (rows <= bottom + 0.5) & (columns >= left - 1.5) & (columns <= right + 0.5))
        if len(rows) and min(left, top) > 0 and max(right, bottom) < 64:
            found_objects += 1
            np.testing.assert_allclose([columns.min(), columns.max() + 1, rows.min(), rows.max() + 1], [left, right, top, bottom], atol=1.5)
    assert found_objects >= 3


@pytest.mark.parametrize("size", [(200, 200), (200, 300), (301, 150)])
def test_windows_are_uniform_and_inside(size: tuple[int, int]) -> None:
    rng, short = np.random.default_rng(0), min(size)
    windows = np.array([random_window(rng, *size, 0.5) for _ in range(3000)])
    left, top, side = windows.T
    assert left.min() >= 0 and top.min() >= 0 and (left + side).max() <= size[1] and (top + side).max() <= size[0]
    assert side.min() == short // 2 and side.max() == short
    # Whole pixels spread over their width, so that a continuous law can be compared with.
    jitter = rng.random(3000)
    assert stats.kstest((side - short / 2 + jitter) / (short / 2 + 1), "uniform").pvalue > 1e-3
    for at, room in ((left, size[1] - side + 1), (top, size[0] - side + 1)):
        assert stats.kstest((at + jitter) / room, "uniform").pvalue > 1e-3


def test_the_whole_short_side_and_tiny_pictures() -> None:
    rng = np.random.default_rng(0)
    assert random_window(rng, 30, 30, 1.0) == (0, 0, 30)
    assert random_window(rng, 1, 1, 0.1) == (0, 0, 1)
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(UserError, match="must be in \\(0, 1\\]"):
            random_window(rng, 30, 30, share)


def test_bad_windows_and_maps_of_another_size_are_refused() -> None:
    whole = placed(40, 60)
    for left, top, side in ((-1, 0, 10), (0, 31, 10), (51, 0, 10), (0, 0, 41), (0, 0, 0)):
        with pytest.raises(ValueError, match="not inside a picture of 60 x 40 pixels"):
            crop(whole, left, top, side, 8)
    for key in ("mask", "low_res"):
        for cut in (lambda e: crop(e, 0, 0, 10, 10), lambda e: center_crop_example(e, 16)):
            with pytest.raises(ValueError, match=f"'{key}' has the shape \\(20, 30\\), but the picture has 40 rows and 60 columns"):
                cut({**whole, key: np.zeros((20, 30), np.uint8)})


def test_nothing_is_changed_in_place() -> None:
    whole = placed(40, 60)
    copies = {key: np.copy(value) for key, value in whole.items() if key != "text"}
    for changed in (random_crop(whole, 16, np.random.default_rng(0), 0.5), fit(whole, 24, 16), mirror(whole)):
        changed["mask"] = ~changed["mask"]
    for key, value in copies.items():
        np.testing.assert_array_equal(whole[key], value)
