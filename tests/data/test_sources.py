import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.config import UserError
from ldm_jax.data.sources import Cropped, FolderSource, Reliable, TfdsSource, decode_image, make_source
from ldm_jax.data.transforms import center_crop, mirror


def save(path: Path, value: int = 100, size: tuple[int, int] = (10, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value // 2, 255 - value)).save(path)


def encoded(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def test_decoding_of_every_mode_gives_rgb() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    deep = decode_image(encoded(Image.fromarray(ramp), "PNG"))
    assert deep.shape == (8, 8, 3) and deep.dtype == np.uint8
    np.testing.assert_array_equal(deep[..., 1], ramp // 257)

    half_red = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    np.testing.assert_allclose(decode_image(encoded(half_red, "PNG"))[0, 0], [255, 127, 127], atol=1)
    clear_gray = Image.new("LA", (2, 2), (0, 0))
    np.testing.assert_array_equal(decode_image(encoded(clear_gray, "PNG"))[0, 0], [255, 255, 255])

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode_image(encoded(palette, "PNG"))[0], [[10, 20, 30], [40, 50, 60]])
    np.testing.assert_array_equal(decode_image(encoded(palette, "PNG", transparency=0))[0], [[255, 255, 255], [40, 50, 60]])
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(decode_image(encoded(cmyk, "JPEG"))[4, 4], [255, 0, 0], atol=12)
    np.testing.assert_array_equal(decode_image(encoded(Image.new("1", (2, 2), 1), "BMP")), 255)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    upright = decode_image(encoded(image, "PNG", exif=exif))
    assert upright.shape == (4, 2, 3)
    np.testing.assert_array_equal(upright[0, 1], [255, 0, 0])


def test_folder_with_classes_and_sidecar_captions(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/deep/a.jpg", "dog/a.webp"):
        save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"a picture of {name}\n")
    save(tmp_path / ".hidden" / "x.png")
    source = FolderSource(tmp_path, needs_text=True, needs_label=True)
    assert source.names == ["cat/deep/a.jpg", "dog/a.webp", "dog/b.png"] and source.classes == ["cat", "dog"]
    assert [source[i]["label"] for i in range(3)] == [0, 1, 1]
    assert source[2]["text"] == "a picture of dog/b.png"
    assert source[0]["image"].shape == (12, 10, 3)


def test_flat_folder_with_metadata(tmp_path: Path) -> None:
    for name in ("a.png", "b.PNG"):
        save(tmp_path / name)
    lines = [json.dumps({"file_name": name, "text": name.upper()}) for name in ("a.png", "b.PNG")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    source = FolderSource(tmp_path, needs_text=True)
    assert source[0]["text"] == "A.PNG" and "label" not in source[0]
    assert "text" not in FolderSource(tmp_path)[0]
    with pytest.raises(UserError, match=r"2 pictures .*no class.*'a.png'"):
        FolderSource(tmp_path, needs_label=True)
    (tmp_path / "metadata.jsonl").write_text(lines[0] + '\n{"file_name": "b.PNG"}\n')
    with pytest.raises(UserError, match="line 2"):
        FolderSource(tmp_path, needs_text=True)


def test_folder_errors_name_the_first_and_the_count(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        FolderSource(tmp_path / "none")
    with pytest.raises(UserError, match="no pictures"):
        FolderSource(tmp_path)
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"2 of 3 .* first is 'b.png'"):
        FolderSource(tmp_path, needs_text=True)


def test_folder_fingerprint_follows_names_content_and_captions(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return FolderSource(tmp_path, needs_text=True).fingerprint()

    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (tmp_path / "a.txt").write_text("two")
    seen.append(fingerprint())
    os.utime(tmp_path / "a.png", ns=(1, 1))
    seen.append(fingerprint())
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    seen.append(fingerprint())
    assert len(set(seen)) == 4


def test_broken_examples_are_replaced_counted_and_named_once(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "data" / f"{i}.png", value=40 * i, size=(16, 16))
    (tmp_path / "data" / "2.png").write_bytes(b"")
    (tmp_path / "data" / "3.png").write_bytes(b"not a picture")
    whole = (tmp_path / "data" / "5.png").read_bytes()
    (tmp_path / "data" / "5.png").write_bytes(whole[: len(whole) // 2])
    log = tmp_path / "logs" / "broken.tsv"
    for _ in range(2):  # the second round is a restart
        source = Reliable(FolderSource(tmp_path / "data"), log)
        for i, expected in enumerate((0, 1, 4, 4, 4, 0)):
            assert source[i]["image"][0, 0, 0] == 40 * expected
        assert source.broken == {2, 3, 5}
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    assert sorted(row[:2] for row in rows) == [["2", "2.png"], ["3", "3.png"], ["5", "5.png"]]
    assert all(row[2] for row in rows)


def test_all_broken_is_an_error(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    source = Reliable(FolderSource(tmp_path), tmp_path / "log")
    with pytest.raises(UserError, match=r"all 2 examples are broken.*a.png.*log"):
        source[1]


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
    defaults = {
        "source": "folder", "path": "", "name": "", "split": "train", "resolution": 16, "size": 4, "seed": 0,
        "counts": (1,), "flip": False, "text_key": "text", "label_key": "label", "image_key": "image",
    }  # fmt: skip
    return ConfigDict({**defaults, **fields})


def test_make_source(tmp_path: Path) -> None:
    save(tmp_path / "a.png", size=(40, 20))
    source = make_source(data_config(path=str(tmp_path)))
    assert source[0]["image"].shape == (16, 16, 3)
    assert source.fingerprint() != make_source(data_config(path=str(tmp_path), resolution=8)).fingerprint()
    shapes = make_source(data_config(source="shapes"), pairs="held_out")
    assert len(shapes) == 4 and shapes[3]["image"].shape == (16, 16, 3)
    for fields, message in (({"source": "web"}, "shapes, folder, tfds"), ({}, "data.path"), ({"source": "tfds"}, "name")):
        with pytest.raises(UserError, match=message):
            make_source(data_config(**fields))


_MAKE_TFDS = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class TinyScenes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"picture": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text(),
                    "kind": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 9, 3), i * 10, np.uint8)).save(file, "PNG")
            file.seek(0)
            yield i, {"picture": file, "caption": f"value {i * 10}", "kind": i % 3}

TinyScenes(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_tfds_without_tensorflow(tmp_path: Path) -> None:
    script = tmp_path / "make.py"
    script.write_text(_MAKE_TFDS)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    directory = str(tmp_path)
    source = TfdsSource("tiny_scenes", directory, "train", "picture", "caption", "kind")
    assert "tensorflow" not in sys.modules
    examples = [source[i] for i in range(len(source))]
    assert sorted(e["text"] for e in examples) == [f"value {v}" for v in (0, 10, 20, 30, 40)]
    for example in examples:
        value = int(example["text"].split()[1])
        np.testing.assert_array_equal(example["image"], np.full((8, 9, 3), value, np.uint8))
        assert example["label"] == value // 10 % 3
    assert source.fingerprint() != TfdsSource("tiny_scenes", directory, "train[:3]", "picture").fingerprint()
    assert Cropped(source, 8)[0]["image"].shape == (8, 8, 3)
    with pytest.raises(UserError, match="no feature 'image'"):
        TfdsSource("tiny_scenes", directory, "train")
    with pytest.raises(UserError, match=r"test.*tfds build tiny_scenes"):
        TfdsSource("tiny_scenes", directory, "test", "picture")
    with pytest.raises(UserError, match="not found"):
        TfdsSource("no_such_set", directory, "train")
    with pytest.raises(UserError, match="tfds build mnist"):
        TfdsSource("mnist", directory, "train")
