from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ldm_jax.config import UserError
from ldm_jax.data.array_record import ArrayRecordSource, write_records
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.records import encode_example
from ldm_jax.data.reliable import Reliable
from tests.data.pictures import gray_png, png, save


def examples(count: int) -> list[dict[str, Any]]:
    labels = np.arange(120, dtype=np.uint8).reshape(12, 10)
    return [
        {
            "image": png(i), "text": f"number {i}", "label": i, "boxes": np.array([[i, 0, 0, 0.5, 1]], np.float32),
            "segmentation": gray_png(labels), "mask": labels > i,
        }
        for i in range(count)
    ]  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert write_records(tmp_path / "set", iter(examples(7)), shard_size=3) == 7
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [f"data-{i:05d}.array_record" for i in range(3)]
    source = ArrayRecordSource(tmp_path / "set", ("text", "label", "boxes", "segmentation", "mask"))
    assert len(source) == 7 and source.name(4) == "data-00001.array_record:1"
    for i in (6, 0, 3, 2):
        example, given = source[i], examples(7)[i]
        assert example["text"] == f"number {i}" and example["label"] == i and example["image"].shape == (12, 10, 3)
        assert example["image"][0, 0, 0] == i
        np.testing.assert_array_equal(example["boxes"], given["boxes"])
        np.testing.assert_array_equal(example["mask"], given["mask"])
        np.testing.assert_array_equal(example["segmentation"], np.arange(120).reshape(12, 10))
    assert list(ArrayRecordSource(tmp_path / "set")[0]) == ["image"]
    assert source.fingerprint() != ArrayRecordSource(tmp_path / "set").fingerprint()
    write_records(tmp_path / "other", iter(examples(6)), shard_size=3)
    assert ArrayRecordSource(tmp_path / "other").fingerprint() != ArrayRecordSource(tmp_path / "set").fingerprint()


def test_pictures_may_be_arrays_and_captions_several(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    write_records(tmp_path / "set", [{"image": pixels, "text": ["a", "b"]}, {"image": pixels, "text": ["c"]}])
    source = ArrayRecordSource(f"{tmp_path}/set/*.array_record", ("text",))
    np.testing.assert_array_equal(source[1]["image"], pixels)
    assert [source[i]["text"] for i in range(2)] == [["a", "b"], ["c"]]


def test_any_reader_is_copied_without_decoding(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "data" / "cat" / f"{i}.png", value=i)
        (tmp_path / "data" / "cat" / f"{i}.txt").write_text(f"{i}")
    folder = FolderSource(tmp_path / "data", ("text", "label"))
    write_records(tmp_path / "set", (folder.read(i, ("image", *folder.needs)) for i in range(len(folder))))
    copy = ArrayRecordSource(tmp_path / "set", ("text", "label"))
    assert copy.read(1, ("image",)) == folder.read(1, ("image",))
    assert [copy[i]["text"] for i in range(3)] == ["0", "1", "2"]


def test_examples_must_be_alike(tmp_path: Path) -> None:
    for wrong in ({"image": png(1)}, {"image": png(1), "text": ["a"]}, {"image": png(1), "text": "a", "label": 1}):
        with pytest.raises(UserError, match="example 1 has image"):
            write_records(tmp_path / "set", [{"image": png(0), "text": "a"}, wrong])
    for wrong in ({"text": "a"}, {"image": png(1), "tags": "a"}):
        with pytest.raises(UserError, match="example 0 has"):
            write_records(tmp_path / "set", [wrong])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="is there already"):
        write_records(tmp_path / "set", examples(1))


def test_records_of_another_kind_are_refused(tmp_path: Path) -> None:
    for number, record in enumerate((b"\xff\x00 no example", encode_example({"moments": np.zeros(3)}), msgpack.packb([1, 2]))):
        writer = ArrayRecordWriter(str(tmp_path / f"{number}.array_record"), "group_size:1")
        writer.write(record)
        writer.close()
        with pytest.raises(UserError, match="holds no examples that write_records wrote"):
            ArrayRecordSource(tmp_path / f"{number}.array_record")


def test_what_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ArrayRecord files"):
        ArrayRecordSource(tmp_path)
    write_records(tmp_path / "set", [{"image": png(i), "text": "" if i == 1 else "a"} for i in range(3)])
    with pytest.raises(UserError, match=r"the 3 records in .* have no class, the first is .*record:0'; they hold image, text"):
        ArrayRecordSource(tmp_path / "set", ("label",))
    source = Reliable(ArrayRecordSource(tmp_path / "set", ("text",)), tmp_path / "log", max_broken=0.5)
    assert source[1]["image"][0, 0, 0] == 2 and "ValueError: it has no caption" in (tmp_path / "log").read_text()
    file = tmp_path / "set" / "data-00000.array_record"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2], b"", b"no records" * 1000):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"data-00000.array_record is no whole ArrayRecord file"):
            ArrayRecordSource(tmp_path / "set")
