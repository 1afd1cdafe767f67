import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ldm_jax.config import UserError
from ldm_jax.data import latents
from ldm_jax.data.latents import CacheWriter, LatentCache, begin, cache_fingerprint, is_complete, weights_fingerprint
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.records import decode_example, encode_example

DTYPES = st.sampled_from([np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_])


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_dims=4)), st.text(), st.integers(-(2**63), 2**63 - 1))
def test_records_round_trip(array: np.ndarray, text: str, number: int) -> None:
    found = decode_example(encode_example({"moments": array, "text": text, "nested": {"n": [number, None]}}))
    assert found["text"] == text and found["nested"] == {"n": [number, None]}
    np.testing.assert_array_equal(found["moments"], array)
    assert found["moments"].dtype == array.dtype and found["moments"].shape == array.shape


def test_records_refuse_what_they_cannot_give_back() -> None:
    for value in (object(), np.array([None]), np.array(["a"])):
        with pytest.raises(ValueError, match="cannot store"):
            encode_example({"x": value})


def example(index: int, mirrored: bool = False) -> dict[str, Any]:
    moments = np.full((4, 4, 2), index, np.float32)
    moments[:, 0] += 0.5
    moments = moments[:, ::-1] if mirrored else moments
    return {"image": np.zeros((8, 8, 3), np.uint8), "moments": moments, "text": f"number {index}", "label": index % 3}


def write(writer: CacheWriter, shard: int) -> None:
    with writer.shard(shard) as add:
        for index in writer.examples(shard):
            for view in range(writer.views):
                add(example(index, mirrored=view == 1))


def make(directory: Path, num: int = 23, fingerprint: str = "f", flips: bool = False) -> LatentCache:
    writer = CacheWriter(directory, begin(directory, {"fingerprint": fingerprint, "flips": flips}, num, 5))
    for shard in writer.missing_shards():
        write(writer, shard)
    writer.finish()
    return LatentCache(directory, fingerprint)


def test_cache_gives_back_what_was_written(tmp_path: Path) -> None:
    cache = make(tmp_path / "cache")
    assert len(cache) == 23 and cache.fingerprint() == "f" and cache.meta["num_shards"] == 5
    order = np.random.default_rng(0).permutation(23).tolist()
    for index, found in zip([*order, 22], cache.__getitems__([*order, 22]), strict=True):
        assert found.keys() == {"moments", "text", "label"}
        np.testing.assert_array_equal(found["moments"], example(index)["moments"])
        assert found["text"] == f"number {index}" and cache[index]["label"] == index % 3
    for wrong in (23, -1):
        with pytest.raises(IndexError):
            cache[wrong]
    names = sorted(os.listdir(tmp_path / "cache"))
    assert names == ["COMPLETE", "cache.json", *(f"shard-{i:05d}-of-00005.array_record" for i in range(5))]


def test_flips_are_read_from_the_mirrored_records(tmp_path: Path) -> None:
    cache = make(tmp_path, flips=True)
    batches = Batches(cache, 23, seed=1, flip=True)
    indices, batch = batches.indices(0), batches.batch(0)
    left, right = batch["moments"][:, 0, 0, 0] - indices, batch["moments"][:, 0, -1, 0] - indices
    assert set(left.tolist()) == {0.0, 0.5} and np.array_equal(left + right, np.full(23, 0.5))
    assert np.array_equal(Batches(cache, 23, seed=1).batch(0)["moments"][:, 0, 0, 0] - indices, np.full(23, 0.5))
    with pytest.raises(UserError, match="mirrored"):
        Batches(make(tmp_path / "plain"), 4, seed=0, flip=True)


def test_resume_writes_only_missing_and_damaged_shards(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "COMPLETE").unlink()
    shard = [tmp_path / f"shard-{i:05d}-of-00005.array_record" for i in range(5)]
    shard[0].unlink()
    shard[1].write_bytes(shard[1].read_bytes()[:-1000])
    shard[2].write_bytes(b"")
    shard[3].rename(shard[3].with_name(f".{shard[3].name}.123.tmp"))  # as a kill before the rename leaves it
    os.utime(tmp_path / f".{shard[3].name}.123.tmp", (0, 0))
    (tmp_path / ".shard-00000-of-00005.array_record.7.tmp").write_bytes(b"what another run is writing")
    untouched = shard[4].stat().st_mtime_ns
    writer = CacheWriter(tmp_path, begin(tmp_path, {"fingerprint": "f"}, 23, 5))
    assert writer.missing_shards() == [0, 1, 2, 3]
    assert writer.missing_shards(1, 2) == [1, 3] and writer.missing_shards(0, 2) == [0, 2]
    with pytest.raises(ValueError, match="4 shards"):
        writer.finish()
    assert not is_complete(tmp_path, "f")
    with pytest.raises(UserError, match="not complete"):
        LatentCache(tmp_path, "f")
    cache = make(tmp_path)
    assert is_complete(tmp_path, "f") and [path.name for path in tmp_path.glob(".*")] == [".shard-00000-of-00005.array_record.7.tmp"]
    assert shard[4].stat().st_mtime_ns == untouched
    assert [found["label"] for found in cache.__getitems__(range(23))] == [i % 3 for i in range(23)]


def test_shard_with_another_number_of_records_is_redone(tmp_path: Path) -> None:
    make(tmp_path, num=20)
    make(tmp_path / "other", num=19)
    name = "shard-00003-of-00004.array_record"
    (tmp_path / "other" / name).replace(tmp_path / name)
    assert CacheWriter(tmp_path, begin(tmp_path, {"fingerprint": "f"}, 20, 5)).missing_shards() == [3]


def test_a_cache_that_was_begun_keeps_its_sizes(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, begin(tmp_path, {"fingerprint": "f"}, 23, 5))
    write(writer, 1)
    again = CacheWriter(tmp_path, begin(tmp_path, {"fingerprint": "f"}, 23, 7))
    assert again.meta == writer.meta and again.missing_shards() == [0, 2, 3, 4]
    with pytest.raises(UserError, match=r"was begun with num_examples=23, and now it is 24: give another data.latents or delete it"):
        begin(tmp_path, {"fingerprint": "f"}, 24, 5)
    with pytest.raises(UserError, match=r"was begun with flips=False, and now it is True"):
        begin(tmp_path, {"fingerprint": "f", "flips": True}, 23, 5)


def test_stale_fingerprint_is_refused(tmp_path: Path) -> None:
    make(tmp_path, fingerprint="old")
    assert is_complete(tmp_path, "old") and not is_complete(tmp_path, "new")
    with pytest.raises(UserError, match=r"old.*new"):
        LatentCache(tmp_path, "new")
    with pytest.raises(UserError, match=r"old.*new"):
        CacheWriter(tmp_path, begin(tmp_path, {"fingerprint": "new"}, 23, 5))


def test_failed_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, begin(tmp_path, {"fingerprint": "f"}, 23, 5))
    with pytest.raises(ZeroDivisionError), writer.shard(0) as add:
        add(example(0))
        _ = 1 / 0
    with pytest.raises(ValueError, match="takes 5"), writer.shard(1) as add:
        add(example(0))
    assert os.listdir(tmp_path) == ["cache.json"]


def test_full_disk_is_one_line_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CacheWriter(tmp_path, begin(tmp_path, {"fingerprint": "f"}, 23, 5))

    class FullDevice(latents.ArrayRecordWriter):
        def __init__(self, path: str, options: str) -> None:
            super().__init__("/dev/full", options)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "ArrayRecordWriter", FullDevice)
        with pytest.raises(UserError, match=f"no space left .*{tmp_path}"):
            write(writer, 0)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left"):
            write(writer, 0)
    assert os.listdir(tmp_path) == ["cache.json"]


def test_damage_inside_a_shard_is_reported(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "shard-00000-of-00005.array_record"
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00000-of-00005.* cannot be read"):
        LatentCache(tmp_path, "f").__getitems__(range(5))


_KILLED_WRITER = """
import sys
import numpy as np
from ldm_jax.data.latents import CacheWriter, begin
writer = CacheWriter(sys.argv[1], begin(sys.argv[1], {"fingerprint": "k"}, 4000, 200))
for shard in writer.missing_shards():
    with writer.shard(shard) as add:
        for index in writer.examples(shard):
            add({"moments": np.full((16, 16, 8), index, np.float32)})
    print(shard, flush=True)
writer.finish()
"""


def test_killed_writers_are_continued(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", _KILLED_WRITER, str(tmp_path / "cache")]
    for delay in (0.0, 0.02, 0.05):
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
    assert subprocess.run(arguments, check=True, capture_output=True).returncode == 0
    found = LatentCache(tmp_path / "cache", "k").__getitems__(range(4000))
    np.testing.assert_array_equal([record["moments"][0, 0, 0] for record in found], np.arange(4000))


def test_cache_fingerprint_follows_every_part() -> None:
    parts = {"weights": "w", "source": "s", "resolution": 64, "flips": False}
    base = cache_fingerprint(**parts)
    assert len(base) == 16 and base == cache_fingerprint(**dict(reversed(parts.items())))
    changed = [cache_fingerprint(**{**parts, key: "other"}) for key in parts]
    assert len({base, *changed}) == 5


def test_weights_fingerprint_follows_names_shapes_dtypes_and_bytes() -> None:
    base = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": [np.float32(1)]}
    variants: list[Any] = [
        base,
        {"a": {"weight": base["a"]["kernel"]}, "b": base["b"]},
        {"a": {"kernel": base["a"]["kernel"].reshape(3, 2)}, "b": base["b"]},
        {"a": {"kernel": base["a"]["kernel"].astype(ml_dtypes.bfloat16)}, "b": base["b"]},
        {"a": {"kernel": np.nextafter(base["a"]["kernel"], np.float32(9))}, "b": base["b"]},
    ]
    assert len({weights_fingerprint(tree) for tree in variants}) == len(variants)
    shuffled = {"b": base["b"], "a": {"kernel": np.asfortranarray(base["a"]["kernel"])}}
    assert weights_fingerprint(shuffled) == weights_fingerprint(base)
    json.dumps(weights_fingerprint(base))
