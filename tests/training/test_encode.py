"""Latent statistics and the latent cache against the moments computed one by one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.latents import MARKER, weights_fingerprint
from ldm_jax.training import encode
from ldm_jax.training.encode import Encoder, ensure_cache, fingerprint, latent_scale, latent_statistics
from tests import tiny

SOURCE = tiny.Pictures()  # 64 examples: batches of 24 leave a last one of 16


@pytest.fixture(scope="module")
def encoder() -> Iterator[Encoder]:
    with tiny.quick_compilation():
        stage, params = tiny.first_stage(tiny.config())
        made = Encoder(stage, params, 23)
        made(np.zeros((made.batch_size, 16, 16, 3), np.uint8))
        yield made


@pytest.fixture(scope="module")
def moments(encoder: Encoder) -> np.ndarray:
    """Of every example in the order of the source, float32 [64,4,4,8], by one batch on one device."""
    images = np.stack([SOURCE[i]["image"] for i in range(64)])
    stage, params = tiny.first_stage(tiny.config())
    return np.asarray(jax.jit(stage.moments)(params, images / np.float32(127.5) - 1))


def test_an_encoder_pads_its_batch_to_the_devices(encoder: Encoder, moments: np.ndarray) -> None:
    assert encoder.batch_size == 24 and encoder.mesh.size == 8
    images = np.stack([SOURCE[i]["image"] for i in range(24)])
    result = encoder(images)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, moments[:24], atol=1e-5)


def test_statistics_are_those_of_samples_of_the_whole_set(encoder: Encoder, moments: np.ndarray) -> None:
    center, spread = latent_statistics(encoder, SOURCE, limit=0, workers=1)
    mean, log_var = np.split(moments.astype(np.float64), 2, axis=-1)
    np.testing.assert_allclose(center, mean.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(spread, np.sqrt(np.exp(log_var).mean((0, 1, 2)) + mean.var((0, 1, 2))), rtol=1e-6)
    rng = np.random.default_rng(0)
    drawn = mean + np.exp(0.5 * log_var) * rng.normal(size=(200, *mean.shape))
    np.testing.assert_allclose(drawn.std((0, 1, 2, 3)), spread, rtol=0.01)


@pytest.mark.parametrize("kind", ["vq", "identity"])
def test_statistics_of_latents_that_are_certain_are_their_own(kind: str) -> None:
    cfg = tiny.config()
    cfg.first_stage.kind = kind
    with tiny.quick_compilation():
        stage, params = tiny.first_stage(cfg)
        images = np.stack([SOURCE[i]["image"] for i in range(64)])
        latents = np.asarray(jax.jit(stage.moments)(params, images / np.float32(127.5) - 1), np.float64)
        center, spread = latent_statistics(Encoder(stage, params, 24), SOURCE, limit=0, workers=1)
    assert latents.shape == {"vq": (64, 4, 4, 4), "identity": (64, 16, 16, 3)}[kind]
    np.testing.assert_allclose(center, latents.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(spread, latents.std((0, 1, 2)), rtol=1e-5)


def test_statistics_of_a_part_are_those_of_other_examples(encoder: Encoder) -> None:
    whole, part = latent_statistics(encoder, SOURCE, 0, 1), latent_statistics(encoder, SOURCE, 24, 1)
    assert not np.allclose(whole[0], part[0])
    np.testing.assert_allclose(latent_statistics(encoder, SOURCE, 1000, 1), whole)


def test_the_scale_is_one_number_or_one_for_each_channel() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(5000, 3)) * [1.0, 2.0, 3.0] + [0.5, -1.0, 2.0]
    mean, std = latents.mean(0), latents.std(0)
    shift, scale = latent_scale("std", mean, std)
    assert shift == (0.0,) and scale == pytest.approx((latents.std(),))
    shift, scale = latent_scale("channel", mean, std)
    np.testing.assert_allclose(((latents - shift) / scale).mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(((latents - shift) / scale).std(0), 1)
    assert latent_scale("0.18215", mean, std) == ((0.0,), (1 / 0.18215,))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_SHARD", 24)


@pytest.mark.usefixtures("small_shards")
def test_the_cache_holds_the_moments_of_each_example(encoder: Encoder, moments: np.ndarray, tmp_path: Path) -> None:
    cache = ensure_cache(tiny.config(), WorkDir(tmp_path), encoder, SOURCE)
    assert len(cache) == 64 and len(list(cache.directory.glob("*.array_record"))) == 3
    examples = cache.read(np.arange(64))
    np.testing.assert_allclose([e["moments"] for e in examples], moments, atol=1e-5)
    assert [e["text"] for e in examples] == [SOURCE[i]["text"] for i in range(64)] and "image" not in examples[0]


@pytest.mark.slow
def test_a_stage_sees_the_same_moments_cached_or_not(encoder: Encoder, moments: np.ndarray, tmp_path: Path) -> None:
    cfg = tiny.config()
    cfg.data.flip = True
    cache = ensure_cache(cfg, WorkDir(tmp_path), encoder, SOURCE)
    cached = tiny.DiffusionStage(cfg, *tiny.first_stage(cfg), cache, tiny.tokenizer(cfg)).batches().batch(3)
    cfg.data.cache = False
    direct = tiny.diffusion_stage(cfg).batches().batch(3)
    np.testing.assert_array_equal(cached["tokens"], direct["tokens"])
    padded = np.concatenate([direct["image"], direct["image"][:8]])
    np.testing.assert_allclose(cached["moments"], encoder(padded)[:16], atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_what_a_killed_writer_left_is_finished_and_only_that(
    encoder: Encoder, moments: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, workdir = tiny.config(), WorkDir(tmp_path)
    directory = ensure_cache(cfg, workdir, encoder, SOURCE).directory
    shards = sorted(directory.glob("*.array_record"))
    content = [shard.read_bytes() for shard in shards]
    (directory / MARKER).unlink()
    shards[1].unlink()
    shards[2].write_bytes(content[2][:-100])
    (leftover := directory / ".shard-00001-of-00003.array_record.1.tmp").write_bytes(b"half")
    os.utime(leftover, (0, 0))

    written: list[int] = []
    shard = encode.CacheWriter.shard
    monkeypatch.setattr(encode.CacheWriter, "shard", lambda self, number: [written.append(number), shard(self, number)][1])
    ensure_cache(cfg, workdir, encoder, SOURCE)
    assert written == [1, 2]
    assert [s.read_bytes() for s in shards] == content and not list(directory.glob(".*.tmp"))
    ensure_cache(cfg, workdir, encoder, SOURCE)
    assert written == [1, 2]

    (directory / MARKER).unlink()
    shards[0].unlink()
    stage, params = tiny.first_stage(cfg)
    cache = ensure_cache(cfg, workdir, Encoder(stage, params, 16), SOURCE)  # with another batch
    assert written == [1, 2, 0] and sorted(directory.glob("*.array_record")) == shards
    np.testing.assert_allclose([e["moments"] for e in cache.read(np.arange(64))], moments, atol=1e-5)


def test_other_weights_data_or_settings_are_another_cache(encoder: Encoder) -> None:
    cfg = tiny.config()
    mark = fingerprint(cfg, encoder.fingerprint, SOURCE)
    assert (
        weights_fingerprint(tiny.first_stage(cfg)[1]) == encoder.fingerprint == weights_fingerprint(encoder.params)
    )  # the same weights, wherever they lie

    def nudged(path: Any, leaf: Any) -> Any:
        return leaf.at[0].add(1e-6) if jax.tree_util.keystr(path) == "['conv_out']['bias']" else leaf

    others = [fingerprint(cfg, weights_fingerprint(jax.tree_util.tree_map_with_path(nudged, encoder.params)), SOURCE)]
    for name, value in {"flip": True, "resolution": 32}.items():
        changed = tiny.config()
        changed.data[name] = value
        others.append(fingerprint(changed, encoder.fingerprint, SOURCE))

    class Other(tiny.Pictures):
        def fingerprint(self) -> str:
            return "other pictures"

    others.append(fingerprint(cfg, encoder.fingerprint, Other()))
    assert len({mark, *others}) == 5


def test_a_shared_place_for_caches(encoder: Encoder, tmp_path: Path) -> None:
    cfg = tiny.config()
    cfg.data.latents = str(tmp_path / "shared")
    first = ensure_cache(cfg, WorkDir(tmp_path / "a"), encoder, SOURCE)
    assert first.directory.parent == tmp_path / "shared"
    stamp = os.stat(first.directory / MARKER).st_mtime_ns
    assert ensure_cache(cfg, WorkDir(tmp_path / "b"), encoder, SOURCE).directory == first.directory
    assert os.stat(first.directory / MARKER).st_mtime_ns == stamp
    cfg.data.latents = str(tmp_path / "file")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ensure_cache(cfg, WorkDir(tmp_path / "a"), encoder, SOURCE)
