"""Files on a file system and on object storage, which a stand-in serves: the same results, and complete or not there."""

import importlib.util
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ldm_jax import paths
from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.kept import kept
from ldm_jax.data.latents import CacheWriter, LatentCache, begin, is_complete
from ldm_jax.data.sources import open_data
from ldm_jax.defaults import base
from ldm_jax.evaluation import parts
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.model_directory import FORMAT, WEIGHTS, find_model, load_params, read_info, writing
from ldm_jax.stages import FirstStage, build_autoencoder, init_autoencoder
from ldm_jax.training.metrics import MetricWriter
from tests import tiny
from tests.fake_gcs import Storage, serving_here

GS = "gs://bucket"


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    with serving_here("bucket", "closed") as found:
        found.forbidden.add("closed")
        yield found


@pytest.fixture(params=["local", "gs"])
def root(request: pytest.FixtureRequest, tmp_path: Path, storage: Storage) -> Any:
    """An empty directory of each kind."""
    return paths.resolve(tmp_path if request.param == "local" else f"{GS}/{tmp_path.name}")


def test_files_of_both_kinds(root: Any) -> None:
    assert paths.names(root / "sub") == []
    paths.make_directory(root / "sub")
    paths.write_json(root / "sub" / "a.json", {"a": 1})
    paths.write_bytes(root / "sub" / "b", b"old")
    paths.write_bytes(root / "sub" / "b", b"x" * 6_000_000)  # of several requests
    assert paths.names(root / "sub") == ["a.json", "b"]
    assert json.loads((root / "sub" / "a.json").read_text()) == {"a": 1}
    assert (root / "sub" / "b").read_bytes() == b"x" * 6_000_000
    for line in ("one\n", "two \udcff\n"):
        paths.append(root / "new" / "log", line)
    assert (root / "new" / "log").read_bytes() == b"one\ntwo \\udcff\n"
    paths.remove_tree(root / "sub")
    paths.remove_tree(root / "sub")
    assert not (root / "sub").exists() and (root / "new" / "log").exists()


def test_a_writing_is_whole_or_nothing(root: Any) -> None:
    paths.make_directory(root)
    for failure in (ValueError("no"), OSError(28, "No space left on device")):
        with pytest.raises((ValueError, UserError), match=r"no|cannot write .*file: No space"), paths.writing(root / "file") as temporary:
            temporary.write_bytes(b"half")
            raise failure
        assert paths.names(root) == [] and not temporary.exists()
    with paths.writing(root / "file") as temporary:
        temporary.write_bytes(b"whole")
    assert paths.names(root) == ["file"] and not temporary.exists() and (root / "file").read_bytes() == b"whole"


def test_copies_for_readers_that_need_a_file(root: Any) -> None:
    paths.make_directory(root / "folder" / "in")
    paths.write_bytes(root / "folder" / "a", b"1")
    paths.write_bytes(root / "folder" / "in" / "b", b"2")
    with paths.local_copy(root / "folder") as copy, paths.local_copy(root / "folder" / "a") as file:
        assert {p.relative_to(copy).as_posix(): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == {"a": b"1", "in/b": b"2"}
        assert file.read_bytes() == b"1" and file.name == "a"
    assert copy.exists() == (not paths.is_remote(root))
    with pytest.raises((UserError, FileNotFoundError)), paths.local_copy(root / "none") as missing:
        missing.read_bytes()


def test_arrays_that_are_kept(root: Any) -> None:
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(5)

    for _ in range(2):
        np.testing.assert_array_equal(kept(root / "kept" / "a.npy", make), np.arange(5))
    assert len(made) == 1
    parts.claim(root / "parts", {"of": [1]})
    parts.save(parts.part_file(root / "parts", (0, 2)), {"x": np.arange(2)})
    assert parts.missing(root / "parts", 4, 2) == [(2, 4)]
    with parts.load(parts.part_file(root / "parts", (0, 2))) as found:
        np.testing.assert_array_equal(found["x"], np.arange(2))
    with pytest.raises(UserError, match="of another job"):
        parts.claim(root / "parts", {"of": [2]})
    with pytest.raises(UserError, match=r"holds a.npy"):
        parts.claim(root / "kept", {"of": [1]})


def test_a_log_goes_on_where_it_was_and_is_cut_to_the_step_that_is_gone_on_from(root: Any) -> None:
    for restored, steps in ((0, range(1, 5)), (2, range(3, 6))):
        with MetricWriter(root, restored) as writer:
            for step in steps:
                writer.write(step, {"loss": step + restored / 10})
            writer.flush()
            events = [name for name in paths.names(root) if name.startswith("events.")]
    records = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == [1.0, 2.0, 3.2, 4.2, 5.2]
    assert events  # of the same second they have the same name


def test_a_log_that_grows_is_put_seldom(storage: Storage) -> None:
    mirror = paths.Mirror(f"{GS}/log")
    for line in range(50):
        with (mirror.folder / "log").open("a") as file:
            file.write(f"{line}\n")
        mirror.push(now=False)
    assert storage.read("bucket", "log/log") == b"0\n"
    mirror.close()
    assert storage.read("bucket", "log/log").splitlines()[-1] == b"49" and not mirror.folder.exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("s3://bucket/run", "or gs://BUCKET"),
        ("gs://", "or gs://BUCKET"),
        ("gs://nowhere/run", "cannot reach gs://nowhere: there is no such bucket or object"),
        ("gs://closed/run", "cannot reach gs://closed: .*does not have storage.objects access"),
    ],
)
def test_storage_that_is_not_to_be_had(path: str, reason: str, storage: Storage) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        WorkDir(path)
    assert "\n" not in str(raised.value)


def test_without_gcsfs(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name))
    with pytest.raises(UserError, match=r"needs the package gcsfs: pip install -r requirements-gcs.txt"):
        WorkDir("gs://without/run")


def test_what_passes_is_no_wrong_input() -> None:
    from gcsfs.retry import HttpError
    from requests.exceptions import ProxyError

    for error in (HttpError({"code": 503, "message": "busy"}), HttpError({"code": 429}), ProxyError(), TimeoutError(), KeyError()):
        with pytest.raises(type(error)), paths.reported("write", "gs://bucket/x"):
            raise error
    with pytest.raises(UserError, match="cannot write gs://bucket/x: Anonymous caller"), paths.reported("write", "gs://bucket/x"):
        raise HttpError({"code": 401, "message": "Anonymous caller\nhas no access"})


def test_a_bucket_that_takes_nothing_any_more(storage: Storage) -> None:
    work = WorkDir(f"{GS}/refused")
    storage.forbidden.add("bucket")
    try:
        with pytest.raises(UserError, match=r"cannot write gs://bucket/refused/config.json: .*storage.objects access"):
            paths.write_json(work.config, {})
    finally:
        storage.forbidden.remove("bucket")


def test_data_are_of_a_file_system(storage: Storage) -> None:
    data = base().data
    data.source, data.path = "folder", f"{GS}/pictures"
    with pytest.raises(UserError, match=r"gs://bucket/pictures: data.* on a file system: .* mount the bucket"):
        open_data(data)


def test_models(root: Any) -> None:
    cfg = tiny.config()
    stage = FirstStage(build_autoencoder(cfg.first_stage.to_dict(), np.float32))
    shapes = jax.eval_shape(lambda key: init_autoencoder(stage.network, key, cfg.data.resolution), jax.random.key(0))
    params = tiny.random_like(shapes)
    model = LatentDiffusion(stage, None, {"first_stage": params}, {"task": "autoencoder", "resolution": 16})
    model.save(root / "run" / "first_stage" / "model")
    found = find_model(root / "run")
    for name, value in load_params(found / "first_stage")["conv_out"].items():
        np.testing.assert_array_equal(value, params["conv_out"][name])

    with pytest.raises(RuntimeError), writing(found, {}) as begun:
        paths.write_bytes(begun / "weights", b"1")
        raise RuntimeError
    assert find_model(root / "run") == found and (found / "first_stage" / WEIGHTS).exists()  # the old one stays
    with writing(found, {"step": 2}) as begun:
        paths.make_directory(begun / "denoiser")
        paths.write_bytes(begun / "denoiser" / WEIGHTS, b"2")
    assert read_info(found) == {"step": 2, "format": FORMAT} and paths.names(found) == ["denoiser", "model.json"]
    with pytest.raises(RuntimeError), writing(root / "half", {}) as begun:
        paths.make_directory(begun)
        paths.write_bytes(begun / "weights", b"1")
        raise RuntimeError
    with pytest.raises(UserError, match="no model at"):
        find_model(root / "half")


def example(index: int) -> dict[str, Any]:
    return {"moments": np.full((2, 2, 4), index, np.float32), "label": index}


def write_shards(writer: CacheWriter, shards: list[int]) -> None:
    for shard in shards:
        with writer.shard(shard) as add:
            for index in writer.examples(shard):
                add(example(index))


def test_latents_on_object_storage(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, copies = f"{GS}/latents/mark", str(tmp_path / "copies")

    def writer() -> CacheWriter:
        return CacheWriter(directory, begin(directory, {"fingerprint": "mark"}, 10, shard_size=4))

    write_shards(writer(), [0, 2])
    with pytest.raises(RuntimeError), writer().shard(1) as add:
        add(example(4))
        raise RuntimeError  # as a kill: what is begun is not there
    assert writer().missing_shards() == [1] and writer().missing_shards(0, 2) == []
    assert not is_complete(directory, "mark")
    with pytest.raises(UserError, match="is not complete"):
        LatentCache(directory, "mark", copies)
    with pytest.raises(ValueError, match="1 shards are not written"):
        writer().finish()
    write_shards(writer(), [1])
    writer().finish()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10))
        with pytest.raises(UserError, match=r"0.0 GB free: give data.copies=DIR"):
            LatentCache(directory, "mark", copies)
    cache = LatentCache(directory, "mark", copies)
    assert [record["label"] for record in cache.read([9, 0, 5])] == [9, 0, 5]
    np.testing.assert_array_equal(cache[7]["moments"], example(7)["moments"])

    shard = next((tmp_path / "copies" / "mark").glob("shard-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])  # of a copy that was cut short
    before = len(storage.requests)
    assert [record["label"] for record in LatentCache(directory, "mark", copies).read(range(10))] == list(range(10))
    fetched = {request for request in storage.requests[before:] if "/download/" in request and "array_record" in request}
    assert len(fetched) == 1 and "shard-00001" in fetched.pop()
    assert sorted(os.listdir(tmp_path / "copies" / "mark")) == [".lock", *(f"shard-0000{i}-of-00003.array_record" for i in range(3))]


def test_latents_on_object_storage_begun_with_other_shards(storage: Storage, tmp_path: Path) -> None:
    directory = f"{GS}/latents/other"
    write_shards(CacheWriter(directory, begin(directory, {"fingerprint": "mark"}, 100, 40)), [1])
    writer = CacheWriter(directory, begin(directory, {"fingerprint": "mark"}, 100, 36))
    assert writer.missing_shards() == [0, 2]
    write_shards(writer, [0, 2])
    writer.finish()
    assert [record["label"] for record in LatentCache(directory, "mark", str(tmp_path)).read(range(100))] == list(range(100))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    paths.write_json(path, {"a": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*value\.json: No space left on device"):
            patch.setattr(os, call, full)
            paths.write_json(path, {"a": 2})
        assert json.loads(path.read_text()) == {"a": 1}
        assert os.listdir(tmp_path) == ["value.json"]
    paths.write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}


def test_a_write_into_a_missing_folder_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        paths.write_bytes(tmp_path / "missing" / "x", b"1")
