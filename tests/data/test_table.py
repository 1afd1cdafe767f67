import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from ldm_jax.config import UserError
from ldm_jax.data import table_files
from ldm_jax.data.reliable import Reliable
from ldm_jax.data.table import TableSource
from tests.data.pictures import gray_png, png, save

KEYS = {"image": "image", "text": "caption", "label": "label", "boxes": "objects", "segmentation": "map", "mask": "hole"}
LABELS = np.arange(120, dtype=np.uint8).reshape(12, 10)
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(first: int, count: int, **columns: Any) -> pa.Table:
    """Rows as `datasets` stores them, whose red says which they are."""
    rows = range(first, first + count)
    content: dict[str, Any] = {
        "image": pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in rows], PICTURE),
        "caption": [f"number {i}" for i in rows],
        "label": [i % 3 for i in rows],
        "objects": [[[i, 0.0, 0.0, 0.5, 1.0]] for i in rows],
        "map": [gray_png(LABELS) for _ in rows],
        "hole": [gray_png((i < LABELS) * 255) for i in rows],
    }
    return pa.table({**content, **columns})


def write_parquet(path: Path, rows: pa.Table) -> None:
    parquet.write_table(rows, path, row_group_size=2)


def write_stream(path: Path, rows: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=2)


def write_file(path: Path, rows: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=2)


@pytest.mark.parametrize(("write", "suffix"), [(write_parquet, "parquet"), (write_stream, "arrow"), (write_file, "arrow")])
def test_rows_of_several_files_in_any_order(write: Callable[[Path, pa.Table], None], suffix: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / f"data/train-00000-of-00002.{suffix}", table(0, 5))
    write(tmp_path / f"data/train-00001-of-00002.{suffix}", table(5, 2))
    write(tmp_path / f"data/test-00000-of-00001.{suffix}", table(100, 1))
    source = TableSource(tmp_path, "train", KEYS, ("text", "label", "boxes", "segmentation", "mask"))
    assert len(source) == 7 and source.name(5) == f"train-00001-of-00002.{suffix}:0"
    for i in (6, 0, 4, 1, 5, 4):
        example = source[i]
        assert (example["image"][0, 0, 0], example["text"], example["label"]) == (i, f"number {i}", i % 3)
        np.testing.assert_allclose(example["boxes"], [[i, 0, 0, 0.5, 1]])
        np.testing.assert_array_equal(example["segmentation"], LABELS)
        np.testing.assert_array_equal(example["mask"], i < LABELS)
    assert source.caption(3) == "number 3" and list(TableSource(tmp_path, "train", KEYS)[0]) == ["image"]
    assert TableSource(tmp_path, "test", KEYS, ("text",))[0]["text"] == "number 100"
    with pytest.raises(UserError, match=r"named after the split 'validation'; there is test-"):
        TableSource(tmp_path, "validation", KEYS)
    marks = [TableSource(tmp_path, split, KEYS, needs).fingerprint() for split in ("train", "test") for needs in ((), ("text",))]
    assert len(set(marks)) == 4
    write(tmp_path / f"data/train-00001-of-00002.{suffix}", table(5, 3))
    assert TableSource(tmp_path, "train", KEYS).fingerprint() != marks[0]


def test_files_that_are_named_after_no_split_are_all_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0000.parquet", table(0, 2))
    write_parquet(tmp_path / "trainer.parquet", table(2, 1))
    assert len(TableSource(tmp_path, "train", KEYS)) == 3
    (tmp_path / "train").mkdir()
    write_stream(tmp_path / "train" / "data-00000-of-00001.arrow", table(3, 1))  # as `DatasetDict.save_to_disk` has it
    assert len(TableSource(tmp_path, "train", KEYS)) == 1
    assert len(TableSource(f"{tmp_path}/*.parquet", "train", KEYS)) == 3


def test_lists_of_captions_names_of_classes_and_files_beside_the_table(tmp_path: Path) -> None:
    save(tmp_path / "pictures" / "a.png", value=77)
    rows = table(0, 2, caption=[["a", " ", "b"], ["c"]], label=["sky", "cat"], image=["pictures/a.png"] * 2)
    write_parquet(tmp_path / "0.parquet", rows)
    source = TableSource(tmp_path, "train", KEYS, ("text", "label"))
    assert [source[i]["text"] for i in range(2)] == [["a", "b"], ["c"]]
    assert source.classes == ["cat", "sky"] and [source[i]["label"] for i in range(2)] == [1, 0] and source[1]["image"][0, 0, 0] == 77
    about = {"info": {"features": {"label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}}}}
    write_parquet(tmp_path / "0.parquet", table(0, 2).replace_schema_metadata({"huggingface": json.dumps(about)}))
    assert TableSource(tmp_path, "train", KEYS, ("label",)).classes == ["ant", "bee", "cow"]


def test_rows_that_lack_what_is_asked_for_are_named(tmp_path: Path) -> None:
    rows = table(0, 4, caption=["a", " ", None, "d"], label=[0, None, 2, 1], hole=[gray_png(LABELS), None, gray_png(LABELS), None])
    write_parquet(tmp_path / "0.parquet", rows)
    with pytest.raises(UserError, match=r"2 of 4 pictures in .* have no caption, the first is '0.parquet:1'; fill the column 'caption'"):
        TableSource(tmp_path, "train", KEYS, ("text",))
    with pytest.raises(UserError, match=r"1 of 4 pictures in .* have no class, the first is '0.parquet:1'"):
        TableSource(tmp_path, "train", KEYS, ("label",))
    with pytest.raises(UserError, match=r"data.text_key: .* has no column 'text', only image, caption"):
        TableSource(tmp_path, "train", {**KEYS, "text": ""}, ("text",))
    source = Reliable(TableSource(tmp_path, "train", KEYS, ("mask",)), tmp_path / "log", max_broken=0.5)
    assert [int(source[i]["image"][0, 0, 0]) for i in range(4)] == [0, 2, 2, 0]
    assert "0.parquet:1\tValueError: it has no mask" in (tmp_path / "log").read_text()


def test_damaged_files_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no tables"):
        TableSource(tmp_path, "train", KEYS)
    for name, write in (("0.parquet", write_parquet), ("0.arrow", write_file)):
        write(tmp_path / name, table(0, 4))
        whole = (tmp_path / name).read_bytes()
        for damaged in (whole[:-30], b""):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name} is no whole"):
                TableSource(tmp_path / name, "train", KEYS)
    write_parquet(tmp_path / "0.parquet", table(0, 4))
    real = builtins.__import__

    def without_pyarrow(name: str, *rest: Any) -> Any:
        if name == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(UserError, match="pip install pyarrow"):
        TableSource(tmp_path / "0.parquet", "train", KEYS)


def damage(path: Path, group: int, column: str) -> None:
    """Overwrites a column of a row group."""
    parts = parquet.ParquetFile(path).metadata.row_group(group)
    chosen = next(part for part in map(parts.column, range(parts.num_columns)) if part.path_in_schema == column)
    content, start = bytearray(path.read_bytes()), chosen.dictionary_page_offset or chosen.data_page_offset
    content[start : start + chosen.total_compressed_size] = b"\xff" * chosen.total_compressed_size
    path.write_bytes(content)


def test_a_damaged_row_group_breaks_its_rows_alone(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", table(0, 6))
    damage(tmp_path / "0.parquet", 1, "image.bytes")
    source = Reliable(TableSource(tmp_path, "train", KEYS), None, max_broken=0.5)
    assert [int(source[i]["image"][0, 0, 0]) for i in range(6)] == [0, 1, 4, 4, 4, 5]


def test_row_groups_are_kept_up_to_a_limit_and_read_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = table_files._Groups(100)
    reads: list[int] = []

    class Block:
        nbytes = 40

    def get(key: int) -> None:
        groups.table(key, lambda: reads.append(key) or Block())

    for key in (0, 0, 1, 0, 2, 0, 1):  # 2 drives out 1, which was used before 0
        get(key)
    assert reads == [0, 1, 2, 1]
    write_parquet(tmp_path / "0.parquet", table(0, 6))
    read = table_files.ParquetTable._read
    taken: list[int] = []
    monkeypatch.setattr(table_files.ParquetTable, "_read", lambda self, group, columns: taken.append(group) or read(self, group, columns))
    source = TableSource(tmp_path, "train", KEYS)
    assert [int(source[i]["image"][0, 0, 0]) for i in range(6)] == list(range(6)) and taken == [0, 1, 2]


def test_what_map_left_beside_the_data_is_not_read(tmp_path: Path) -> None:
    write_stream(tmp_path / "data-00000-of-00001.arrow", table(0, 3))
    write_stream(tmp_path / "cache-1234abcd.arrow", table(0, 3))
    assert len(TableSource(tmp_path, "train", {"image": "image"})) == 3


def test_a_cell_without_a_picture_is_broken(tmp_path: Path) -> None:
    rows = table(0, 3)
    cells = rows.column("image").to_pylist()
    write_parquet(tmp_path / "a.parquet", rows.set_column(rows.schema.get_field_index("image"), "image", [[cells[0], None, cells[2]]]))
    source = TableSource(tmp_path, "train", {"image": "image"})
    for read in (source.__getitem__, source.size):
        with pytest.raises(ValueError, match="it has no image"):
            read(1)
    assert Reliable(source).size(1) == source.size(2)


def test_a_column_of_no_pictures_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", table(0, 3, number=[1, 2, 3]))
    with pytest.raises(ValueError, match="its image is no picture but int"):
        TableSource(tmp_path, "train", {"image": "number"})[0]


def test_a_damaged_column_of_captions_is_one_line(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", table(0, 3))
    damage(tmp_path / "a.parquet", 0, "caption")
    with pytest.raises(UserError, match=r"the column 'caption' of .*a\.parquet is damaged \("):
        TableSource(tmp_path, "train", KEYS, ["text"])
