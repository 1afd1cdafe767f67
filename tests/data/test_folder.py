import json
import os
from pathlib import Path

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.reliable import Reliable
from tests.data.pictures import gray_png, save
from tests.data.test_boxes import coco


def test_folder_with_classes_and_sidecar_captions(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/deep/a.jpg", "dog/a.webp"):
        save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"a picture of {name}\n")
    save(tmp_path / ".hidden" / "x.png")
    source = FolderSource(tmp_path, ("text", "label"))
    assert source.names == ["cat/deep/a.jpg", "dog/a.webp", "dog/b.png"] and source.classes == ["cat", "dog"]
    assert [source[i]["label"] for i in range(3)] == [0, 1, 1]
    assert source[2]["text"] == source.caption(2) == "a picture of dog/b.png" and source.name(2) == "dog/b.png"
    assert source[0]["image"].shape == (12, 10, 3)
    assert list(FolderSource(tmp_path)[0]) == ["image"] and list(FolderSource(tmp_path, ("label",))[0]) == ["image", "label"]


def test_class_folders_that_are_numbers_count_from_0_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("10/a.png", "9/a.png"):
        save(tmp_path / name)
    source = FolderSource(tmp_path, ("label",))
    assert source.classes == ["10", "9"] and [source[i]["label"] for i in range(2)] == [0, 1]


def test_metadata_gives_captions_and_classes(tmp_path: Path) -> None:
    for name in ("a.png", "b.PNG"):
        save(tmp_path / name)
    lines = [json.dumps({"file_name": name, "text": name.upper(), "label": label}) for name, label in (("a.png", 3), ("b.PNG", 0))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    source = FolderSource(tmp_path, ("text", "label"))
    assert [(source[i]["text"], source[i]["label"]) for i in range(2)] == [("A.PNG", 3), ("B.PNG", 0)] and source.classes == []
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"2 of 2 pictures in .* have no class, the first is 'a.png'"):
        FolderSource(tmp_path, ("label",))
    (tmp_path / "metadata.csv").write_text('﻿file_name,text,label\na.png,"one, two",sky\nb.PNG,x,cat\n', encoding="utf-8")
    source = FolderSource(tmp_path, ("text", "label"))
    assert source[0]["text"] == "one, two" and source.classes == ["cat", "sky"] and source[0]["label"] == 1
    (tmp_path / "metadata.jsonl").write_text(lines[0])
    with pytest.raises(UserError, match=r"both metadata.jsonl and metadata.csv"):
        FolderSource(tmp_path, ("text",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png"}\n', "line 2 is not"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": \n', r"line 2 \(Expecting value\) is not"),
        ('["a.png", "x"]', "line 1 is not"),
        ('{"file_name": "a.png", "text": 3}', r"line 1 \(text is int\)"),
        ('{"file_name": "a.png", "label": 1}\n{"file_name": "a.png", "label": 2}', "line 2 .*another class"),
    ],
)
def test_wrong_metadata_is_refused_by_its_line(content: str, message: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        FolderSource(tmp_path, ("text",))


def test_several_captions_of_one_picture_make_the_text_of_all_a_list(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"{name}\n")
    assert FolderSource(tmp_path, ("text",))[0]["text"] == "a.png"
    (tmp_path / "b.txt").write_text("first\n\n  second \n")
    source = FolderSource(tmp_path, ("text",))
    assert [source[i]["text"] for i in range(3)] == [["a.png"], ["first", "second"], ["c.png"]]
    entries = [{"file_name": "a.png", "text": ["x", "y"]}, {"file_name": "b.png", "text": "z"}, {"file_name": "b.png", "text": "w"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    source = FolderSource(tmp_path, ("text",))
    assert [source[i]["text"] for i in range(3)] == [["x", "y"], ["z", "w"], ["c.png"]]


def test_an_arabic_caption_and_file_name_stay_as_they_are(tmp_path: Path) -> None:
    name, text = "قطة سوداء.png", "قطة سوداء على كرسي — ٣ ألوان"
    save(tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text(f"\ufeff{text}\n", encoding="utf-8")
    source = FolderSource(tmp_path, ("text",))
    assert source[0]["text"] == text and source.name(0) == name and len(source.fingerprint()) == 23
    (tmp_path / name).with_suffix(".txt").write_bytes(text.encode("cp1256", errors="ignore"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        FolderSource(tmp_path, ("text",))


def test_maps_masks_and_boxes_lie_beside_the_pictures(tmp_path: Path) -> None:
    labels = np.arange(120, dtype=np.uint8).reshape(12, 10)
    for name in ("a.png", "sub/b.png"):
        save(tmp_path / name)
        for folder in ("segmentation", "masks"):
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gray_png(labels if folder == "segmentation" else (labels > 100) * 255))
    (tmp_path / "boxes.json").write_text(coco())
    source = FolderSource(tmp_path, ("mask", "segmentation", "boxes"))
    assert source.names == ["a.png", "sub/b.png"] and source.box_classes == ["car", "dog", "brush"]
    example = source[1]
    assert list(example) == ["image", "boxes", "segmentation", "mask"]
    np.testing.assert_array_equal(example["segmentation"], labels)
    np.testing.assert_array_equal(example["mask"], labels > 100)
    np.testing.assert_allclose(example["boxes"], [[2, 0.75, 0.5, 1, 0.75]], atol=1e-7)
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 pictures .* have no mask, the first is 'a.png'; put it into masks/"):
        FolderSource(tmp_path, ("mask",))
    save(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"1 of 3 pictures .* have no boxes, the first is 'c.png'; list"):
        FolderSource(tmp_path, ("boxes",))
    (tmp_path / "boxes.json").unlink()
    with pytest.raises(UserError, match=r"has no boxes.json"):
        FolderSource(tmp_path, ("boxes",))


def test_folder_errors_name_the_first_and_the_count(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        FolderSource(tmp_path / "none")
    with pytest.raises(UserError, match="no pictures"):
        FolderSource(tmp_path)
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"2 of 3 pictures .* have no caption, the first is 'b.png'"):
        FolderSource(tmp_path, ("text",))
    save(tmp_path / "cat" / "d.png")
    with pytest.raises(UserError, match=r"3 of 4 pictures .* have no class, the first is 'a.png'"):
        FolderSource(tmp_path, ("label",))


def test_folder_fingerprint_follows_names_content_and_what_is_asked_for(tmp_path: Path) -> None:
    def fingerprint(*needs: str) -> str:
        return FolderSource(tmp_path, needs or ("text", "segmentation", "boxes")).fingerprint()

    save(tmp_path / "a.png")
    save(tmp_path / "segmentation" / "a.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "boxes.json").write_text(coco())
    seen = [fingerprint()]
    assert fingerprint() == seen[0] and fingerprint("boxes", "segmentation", "text") == seen[0]
    (tmp_path / "a.txt").write_text("two")
    seen.append(fingerprint())
    os.utime(tmp_path / "a.png", ns=(1, 1))
    seen.append(fingerprint())
    os.utime(tmp_path / "segmentation" / "a.png", ns=(1, 1))
    seen.append(fingerprint())
    (tmp_path / "boxes.json").write_text(coco(annotations=[]))
    seen += [fingerprint(), fingerprint("text"), fingerprint("boxes")]
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    seen.append(fingerprint("text"))
    assert len(set(seen)) == 8


def test_a_link_to_nothing_is_a_broken_picture(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    (tmp_path / "1.png").symlink_to(tmp_path / "gone.png")
    source = FolderSource(tmp_path)
    assert source.names == ["0.png", "1.png"]
    reliable = Reliable(source, tmp_path / "log")
    assert reliable[1]["image"].shape == reliable[0]["image"].shape and reliable.broken == {1}
