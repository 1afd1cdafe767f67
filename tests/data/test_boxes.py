import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.data.boxes import read_coco, tidy_boxes


def coco(**changes: Any) -> str:
    """Two pictures of 200x100; the categories' ids are neither in order nor without gaps."""
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 200, "height": 100},
            {"id": 8, "file_name": "sub/b.png", "width": 200, "height": 100},
            {"id": 9, "file_name": "none.png", "width": 10, "height": 10},
        ],
        "annotations": [
            {"image_id": 8, "category_id": 90, "bbox": [150, 50, 100, 25]},  # juts out on the right
            {"image_id": 7, "category_id": 3, "bbox": [20, 10, 40, 50], "iscrowd": 0},
            {"image_id": 7, "category_id": 18, "bbox": [0, 0, 200, 100]},
            {"image_id": 7, "category_id": 3, "bbox": [0, 0, 99, 99], "iscrowd": 1},
            {"image_id": 7, "category_id": 3, "bbox": [5, 5, 0, 10]},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}, {"id": 18, "name": "dog"}],
    }
    return json.dumps({**content, **changes})


def test_coco_boxes_are_shares_and_classes_follow_the_ids(tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text(coco())
    boxes, names = read_coco(tmp_path / "boxes.json")
    assert names == ["car", "dog", "brush"] and list(boxes) == ["a.png", "sub/b.png", "none.png"]
    np.testing.assert_allclose(boxes["a.png"], [[0, 0.1, 0.1, 0.3, 0.6], [1, 0, 0, 1, 1]], atol=1e-7)
    np.testing.assert_allclose(boxes["sub/b.png"], [[2, 0.75, 0.5, 1, 0.75]], atol=1e-7)
    assert boxes["none.png"].shape == (0, 5) and all(rows.dtype == np.float32 for rows in boxes.values())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        coco(annotations=[{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1]}]),
        coco(annotations=[{"image_id": 7, "category_id": 4, "bbox": [0, 0, 1, 1]}]),
        coco(annotations=[{"image_id": 7, "category_id": 3, "bbox": [0, 0, 1]}]),
        coco(annotations=[{"image_id": 7, "category_id": 3, "bbox": [0, 0, "1", 1]}]),
        coco(images=[{"id": 7, "file_name": "a.png"}]),
        coco(images=[{"id": i, "file_name": "a.png", "width": 0, "height": 0} for i in (7, 8)]),
    ],
)
def test_what_is_not_cocos_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(UserError, match=r"boxes.json is not in COCO's form"):
        read_coco(tmp_path / "boxes.json")


def test_boxes_are_cut_to_the_picture_and_empty_ones_left_out() -> None:
    rows = [[1, -0.5, 0.2, 0.5, 1.5], [2, 1.2, 0, 1.5, 1], [3, 0.4, 0.4, 0.4, 0.9], [4, 0.6, 0.1, 0.5, 0.9]]
    np.testing.assert_allclose(tidy_boxes(rows), [[1, 0, 0.2, 0.5, 1]])
    assert tidy_boxes([]).shape == (0, 5)
    for wrong in ([[1, 2, 3]], [1, 0, 0, 1, 1], [[1, 0, 0, float("nan"), 1]], [[1, 10, 20, 40, 80]], {"bbox": [[0, 0, 1, 1]]}, [{}]):
        with pytest.raises(ValueError, match="its boxes are not"):
            tidy_boxes(wrong)
