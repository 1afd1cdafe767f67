from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from ldm_jax import defaults
from ldm_jax.config import UserError
from ldm_jax.data.array_record import write_records
from ldm_jax.data.reader import FIELDS
from ldm_jax.data.sources import SOURCES, make_source, needed_fields
from ldm_jax.data.transforms import center_crop, mirror
from tests.data.pictures import gray_png, png, save
from tests.data.test_table import table, write_parquet
from tests.data.test_tar import captioned, shard


@pytest.mark.parametrize("size", [(64, 64), (65, 200), (300, 131), (20, 30), (128, 64)])
def test_center_crop_is_square_and_central(size: tuple[int, int]) -> None:
    height, width = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    result = center_crop(image, 64)
    assert result.shape == (64, 64, 3) and result.dtype == np.uint8
    # A smooth ramp keeps its centre and its symmetry, whatever the size.
    ramp = np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (height, width, 3)).astype(np.uint8)
    cropped = center_crop(ramp, 64).astype(float)
    assert abs(cropped.mean() - 127.5) < 3
    if size == (64, 64):
        assert result is image


def test_center_crop_averages_when_it_halves() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mean = image.reshape(16, 4, 16, 4, 3).astype(float).mean(axis=(1, 3))
    # Pillow rounds halves up after each of the four passes (two halvings, two axes), so the error is in [0, 2].
    np.testing.assert_allclose(center_crop(image, 16), mean + 1, atol=1)


def test_mirror_is_an_involution_and_moves_boxes_with_the_picture() -> None:
    image = np.zeros((10, 20, 3), np.uint8)
    image[2:5, 3:9] = 255
    boxes = np.array([[1, 3 / 20, 2 / 10, 9 / 20, 5 / 10]], np.float32)
    example = {"image": image, "boxes": boxes, "segmentation": image[..., 0], "text": "a box"}
    flipped = mirror(example)
    _, x0, y0, x1, y1 = flipped["boxes"][0] * [1, 20, 10, 20, 10]
    inside = np.zeros((10, 20), bool)
    inside[round(y0) : round(y1), round(x0) : round(x1)] = True
    np.testing.assert_array_equal(flipped["segmentation"] > 0, inside)
    np.testing.assert_array_equal(flipped["image"][..., 0] > 0, inside)
    for key, value in mirror(flipped).items():
        np.testing.assert_allclose(value, example[key], atol=1e-6) if key != "text" else None
    assert mirror({"image": image, "boxes": np.zeros((0, 5), np.float32)})["boxes"].shape == (0, 5)


def data_config(**fields: object) -> ConfigDict:
    data = defaults.base().data
    data.update({"source": "folder", "resolution": 16, "size": 4, **fields})
    return data


def test_every_kind_of_source_by_its_name(tmp_path: Path) -> None:
    for name in ("folder/a.png", "folder/b.png"):
        save(tmp_path / name, size=(40, 20))
        (tmp_path / name).with_suffix(".txt").write_text("words")
    shard(tmp_path / "tar" / "0.tar", captioned(2))
    write_records(tmp_path / "array_record", [{"image": png(i), "text": "words"} for i in range(2)])
    (tmp_path / "table").mkdir()
    write_parquet(tmp_path / "table" / "0.parquet", table(0, 2))
    seen = set()
    for kind in sorted(set(SOURCES) - {"tfds"}):
        config = data_config(source=kind, path=str(tmp_path / kind))
        if kind == "table":
            config.text_key = "caption"
        if kind == "shapes":
            config.size = 2
        source = make_source(config, ("text",))
        assert len(source) == 2 and source[1]["image"].shape == (16, 16, 3) and source[1]["text"], kind
        assert source[1].keys() - {"crop"} == {"image", "text"} and make_source(config)[1].keys() - {"crop"} == {"image"}, kind
        marks = [make_source(config, needs).fingerprint() for needs in ((), ("text",))]
        config.resolution = 8
        marks.append(make_source(config).fingerprint())
        assert len(set(marks)) == 3 and source.fingerprint() == marks[1]
        seen |= set(marks)
    assert len(seen) == 3 * 5


def test_maps_are_cropped_with_the_picture(tmp_path: Path) -> None:
    save(tmp_path / "a.png", size=(32, 16))
    (tmp_path / "segmentation").mkdir()
    (tmp_path / "segmentation" / "a.png").write_bytes(gray_png(np.tile(np.arange(32), (16, 1))))
    example = make_source(data_config(path=str(tmp_path)), ("segmentation",))[0]
    np.testing.assert_array_equal(example["segmentation"], np.tile(np.arange(8, 24), (16, 1)))
    np.testing.assert_allclose(example["crop"], [0.25, 0, 0.75, 1])


def test_scenes_give_what_is_asked_for() -> None:
    source = make_source(data_config(source="shapes"), FIELDS[:4], pairs="held_out")
    assert list(source[3]) == ["image", "text", "label", "boxes", "segmentation"]
    assert list(make_source(data_config(source="shapes"))[0]) == ["image"]
    assert source.caption(3) == source[3]["text"]
    with pytest.raises(UserError, match="this source gives no mask"):
        make_source(data_config(source="shapes"), ("mask",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "web"}, "'web'; it must be one of shapes, folder, tfds, array_record, tar, table"),
        ({}, "data.path is empty; data.source=folder"),
        ({"source": "tar"}, "data.path is empty; data.source=tar"),
        ({"source": "tfds"}, "data.name is empty"),
    ],
)
def test_what_cannot_be_opened(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_source(data_config(**fields))
    with pytest.raises(UserError, match="no data gives low_res"):
        make_source(data_config(**fields), ("low_res",))


def test_more_broken_pictures_than_the_configuration_allows_stop_the_run(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / f"{i}.png", value=i)
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 4 examples are broken, 25.00%, and data.max_broken allows 0.10%; the first is '1.png'"):
        make_source(data_config(path=str(tmp_path)))[1]
    assert make_source(data_config(path=str(tmp_path), max_broken=0.25))[1]["image"][0, 0, 0] == 2


def test_a_run_asks_for_what_its_conditioners_read() -> None:
    config = defaults.base()
    assert needed_fields(config) == ("text",)
    for name in ("label", "boxes", "segmentation", "mask", "low_res", "neighbors"):
        config.conditioning[name].enabled = True
    config.conditioning.mask.holes = "mixed"
    assert needed_fields(config) == ("text", "label", "boxes", "segmentation")
    config.conditioning.mask.holes = ""
    assert needed_fields(config) == FIELDS
    config.task = "autoencoder"
    assert needed_fields(config) == ()
