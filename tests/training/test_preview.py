"""Grids for people: what a model is told in pictures, above what it draws."""

import io

import numpy as np
from PIL import Image

from ldm_jax.data.shapes import ShapesSource
from ldm_jax.training.preview import alternating, grid, png_bytes, shown

EXAMPLES = [ShapesSource(size=3, resolution=32)[i] for i in range(3)]


def test_a_grid_alternates() -> None:
    above, below = np.zeros((5, 2, 2, 3), np.uint8), np.ones((5, 2, 2, 3), np.uint8)
    assert alternating(above, below, 2)[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 1]


def test_what_is_told_in_pictures() -> None:
    images, holes = [e["image"] for e in EXAMPLES], [e["segmentation"] > 0 for e in EXAMPLES]
    masked = shown({"image": images, "mask": holes}, 32, 32)
    assert masked is not None and masked.dtype == np.uint8
    assert (masked[0][holes[0]] == 128).all() and (masked[0][~holes[0]] == images[0][~holes[0]]).all()
    small = shown({"low_res": [image[::8, ::8] for image in images]}, 32, 32)
    assert small is not None and (small[:, ::8, ::8] == np.stack(images)[:, ::8, ::8]).all() and small.shape == (3, 32, 32, 3)
    maps = shown({"segmentation": [e["segmentation"] for e in EXAMPLES]}, 32, 32)
    assert maps is not None
    assert (maps[0][EXAMPLES[0]["segmentation"] == 0] == 0).all() and (maps[0][holes[0]].max(-1) > 100).all()
    colours = {
        tuple(maps[i][segment == value][0]) for i in range(3) for segment in [EXAMPLES[i]["segmentation"]] for value in set(segment.flat)
    }
    assert len(colours) == len({value for e in EXAMPLES for value in set(e["segmentation"].flat)})
    frames = shown({"boxes": [e["boxes"] for e in EXAMPLES]}, 32, 32)
    assert frames is not None
    _, x0, y0, _, _ = EXAMPLES[0]["boxes"][0]
    assert frames[0, round(31 * float(y0)), round(31 * float(x0))].any()
    assert shown({"text": ["a"], "label": [1]}, 32, 32) is None


def test_metadata_of_a_picture() -> None:
    picture = grid(np.zeros((2, 8, 8, 3), np.uint8), 2)
    opened = Image.open(io.BytesIO(png_bytes(picture, {"parameters": '{"prompt": "قط"}'})))
    assert opened.info["parameters"] == '{"prompt": "قط"}'
