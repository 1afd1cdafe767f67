import json
import os
import tarfile
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.data import tar_index
from ldm_jax.data.reliable import Reliable
from ldm_jax.data.tar import TarSource
from tests.data.pictures import encoded, gray_png, noise, png


def shard(path: Path, members: Mapping[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path


def captioned(count: int, first: int = 0) -> dict[str, bytes | str]:
    """Pictures whose red says which they are, each before its caption."""
    members: dict[str, bytes | str] = {}
    for i in range(first, first + count):
        members |= {f"{i:03d}.png": png(i, (40, 30)), f"{i:03d}.txt": f"number {i}"}
    return members


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_member_is_read_at_its_place(form: int, tmp_path: Path) -> None:
    labels = np.arange(120, dtype=np.uint8).reshape(12, 10)
    long = "a/" + "very_long_" * 9 + "name"  # more than a header's 100 bytes with its folder
    shard(
        tmp_path / "b-1.tar",
        {
            "x.PNG": png(1), "x.cls": "7\n", "x.txt": "one x\n", "x.seg.png": gray_png(labels), "x.mask.png": gray_png((labels > 60) * 255),
            "x.json": json.dumps({"boxes": [[3, 0.1, 0.2, 0.5, 0.6]], "caption": "not taken: .txt is there"}),
            "y.json": json.dumps({"caption": "two y", "label": 5, "boxes": []}), "y.seg.png": gray_png(labels + 1),
            "y.mask.png": gray_png(labels * 0), "y.png": png(2), "README.md": "no example", "z.txt": "no picture",
        },
        form,
    )  # fmt: skip
    shard(tmp_path / "a-0.tar", {f"{long}.jpg": encoded(noise(12), "JPEG").getvalue(), f"{long}.txt": "زهرة"}, form)
    every = ("text", "label", "boxes", "segmentation", "mask")
    source = TarSource(tmp_path / "b-1.tar", every)
    assert source.keys == ["x", "y"] and source.name(1) == "b-1.tar:y"
    first, second = source[0], source[1]
    assert list(first) == ["image", "segmentation", "mask", "text", "label", "boxes"]
    assert (first["text"], first["label"], second["text"], second["label"]) == ("one x", 7, "two y", 5)
    assert (first["image"][0, 0, 0], second["image"][0, 0, 0]) == (1, 2)
    np.testing.assert_allclose(first["boxes"], [[3, 0.1, 0.2, 0.5, 0.6]])
    assert second["boxes"].shape == (0, 5)
    np.testing.assert_array_equal(second["segmentation"], labels + 1)
    np.testing.assert_array_equal(first["mask"], labels > 60)

    both = TarSource(tmp_path, ("text",))
    assert both.keys == [long, "x", "y"] and both[0]["text"] == "زهرة" and both[2]["text"] == both.caption(2) == "two y"
    assert list(TarSource(f"{tmp_path}/a-*.tar")[0]) == ["image"] and len(TarSource(f"{tmp_path}/a-*.tar")) == 1
    with pytest.raises(UserError, match=rf"1 of 3 pictures .* have no class, the first is '{long}'; a .cls"):
        TarSource(tmp_path, ("label",))


@pytest.mark.parametrize("about", [{"label": [1]}, {"label": "cat"}, {"boxes": {"bbox": [1]}}, {"boxes": [[1, 10, 20, 30, 40]]}])
def test_an_example_whose_json_makes_no_sense_is_broken(about: dict[str, object], tmp_path: Path) -> None:
    field = next(iter(about))
    good = {"label": 1, "boxes": [[0, 0, 0, 1, 1]]}
    shard(tmp_path / "0.tar", {"a.png": png(1), "a.json": json.dumps(about), "b.png": png(2), "b.json": json.dumps(good)})
    source = Reliable(TarSource(tmp_path, (field,)), None, max_broken=0.5)
    assert source[0]["image"][0, 0, 0] == 2 and source.broken == {0}


def test_several_captions_make_all_texts_lists(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {**captioned(1), "b.png": png(9), "b.json": json.dumps({"text": ["u", " ", "v"]})})
    source = TarSource(tmp_path, ("text",))
    assert [source[i]["text"] for i in range(2)] == [["number 0"], ["u", "v"]]


def test_missing_captions_are_named_before_training(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {**captioned(3), "b.png": png(1), "c.png": png(1), "c.txt": " \n", "d.png": png(1), "d.json": "{"})
    with pytest.raises(UserError, match=r"3 of 6 pictures in .* have no caption, the first is 'b'"):
        TarSource(tmp_path, ("text",))
    assert len(TarSource(tmp_path)) == 6


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def offset(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset_data


@pytest.mark.parametrize("where", ["in the picture", "before its caption", "in the caption's header", "in the caption"])
def test_a_shard_that_is_cut_is_read_up_to_the_cut(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shard(tmp_path / "0.tar", captioned(4))
    shard(tmp_path / "1.tar", captioned(2, first=4))
    picture, caption = offset(path, "002.png"), offset(path, "002.txt")
    size = {
        "in the picture": picture + 40,
        "before its caption": caption - 512,
        "in the caption's header": caption - 300,
        "in the caption": caption + 3,
    }
    cut(path, size[where])
    log = tmp_path / "log"
    for _ in range(2):  # the second time from the index that was kept
        caplog.clear()
        reader = TarSource(tmp_path, ("text",))
        assert list(reader.damaged) == [path] and "0.tar is damaged" in caplog.text
        source = Reliable(reader, log, max_broken=0.2)
        texts = [source[i]["text"] for i in range(len(source))]
        assert texts == ["number 0", "number 1", "number 4", "number 4", "number 5"]  # the third is broken
        assert all(source[i]["image"][0, 0, 0] == int(text.split()[1]) for i, text in enumerate(texts))
        assert source.broken == {2}
    assert log.read_text().startswith("2\t0.tar:002\t") and log.read_text().count("\n") == 1


def test_a_shard_without_an_end_mark_is_whole_where_nothing_is_missing(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", captioned(2))
    cut(path, offset(path, "001.txt") + 512)
    source = TarSource(tmp_path, ("text",))
    assert source[1]["text"] == "number 1" and "without an end mark" in source.damaged[path]


def test_what_follows_a_broken_header_is_not_read(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", captioned(4))
    content = bytearray(path.read_bytes())
    start = offset(path, "002.png") - 512
    content[start : start + 512] = b"\xff" * 512
    path.write_bytes(content)
    source = TarSource(tmp_path, ("text",))
    assert source.keys == ["000", "001"] and path in source.damaged


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\x1f\x8b\x08" + b"\0" * 600])
def test_no_tar_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"0.tar is not a tar archive"):
        TarSource(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", f"{tmp_path}/*.tar"):
        with pytest.raises(UserError, match="no tar shards"):
            TarSource(path)
    shard(tmp_path / "0.tar", {"a.txt": "no picture"})
    with pytest.raises(UserError, match="no pictures in the tar shards"):
        TarSource(tmp_path)


def test_the_index_is_made_once_and_again_when_the_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = tar_index.make_index
    monkeypatch.setattr(tar_index, "make_index", lambda path: made.append(path) or make(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = shard(tmp_path / "data" / "0.tar", captioned(2))
    marks = [TarSource(path).fingerprint(), TarSource(path, ("text",)).fingerprint()]
    assert len(made) == 1 and (path.parent / ".0.tar.index.npz").is_file()
    assert TarSource(path, ("text",))[1]["text"] == "number 1"
    shard(path, captioned(3))
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert len(TarSource(path)) == 3 and len(made) == 2
    marks.append(TarSource(path).fingerprint())
    assert len(set(marks)) == 3 and marks[2] == TarSource(path).fingerprint()
    (path.parent / ".0.tar.index.npz").write_bytes(b"damaged")
    assert len(TarSource(path)) == 3 and len(made) == 3
    # Where the data cannot be written beside, the index goes to the user's cache.
    (path.parent / ".0.tar.index.npz").unlink()
    refuse = tar_index.write_bytes

    def write(place: Path, data: bytes) -> None:
        if place.parent == path.parent:
            raise UserError("read-only")
        refuse(place, data)

    monkeypatch.setattr(tar_index, "write_bytes", write)
    assert len(TarSource(path)) == len(TarSource(path)) == 3 and len(made) == 4
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1


def test_a_member_that_is_there_twice_counts_as_its_last(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", captioned(1))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("000.txt")
        info.size = 5
        tar.addfile(info, BytesIO(b"later"))
    assert TarSource(path, ("text",))[0]["text"] == "later"


def test_a_caption_that_is_no_text_takes_nothing_else_with_it(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"0.png": png(0), "0.txt": "a cat", "0.cls": "2", "1.png": png(1), "1.txt": b"caf\xe9", "1.cls": "3"})
    assert [TarSource(tmp_path, ["label"])[i]["label"] for i in range(2)] == [2, 3]
    with pytest.raises(UserError, match=r"1 of 2 pictures .* have no caption"):
        TarSource(tmp_path, ["text"])
