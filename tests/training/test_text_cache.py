"""Frozen text encoders: embeddings computed once are those of every step, with the empty caption's for dropping."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.latents import CacheWriter, LatentCache, begin
from ldm_jax.model_directory import Params
from ldm_jax.sharding.mesh import make_mesh, to_global
from ldm_jax.training import loop
from ldm_jax.training.diffusion import DiffusionStage
from ldm_jax.training.run import model_info
from ldm_jax.training.text_cache import Embedded, TextEncoder, with_embeddings
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

KINDS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "clip": {"kind": "clip", "num_heads": 2},
    "t5": {"kind": "t5", "ff_width": 24},
}


class Several(tiny.Moments):
    """Moments with one to three captions each."""

    def __getitem__(self, index: int) -> dict:
        texts = [f"{tiny.CAPTIONS[(index + i) % 4]} {i}" for i in range(1 + index % 3)]
        return {**super().__getitem__(index), "text": texts}


def frozen(**text: Any) -> ConfigDict:
    cfg = tiny.config()
    cfg.denoiser.attention_levels = (1,)
    cfg.conditioning.text.update(frozen=True, **text)
    cfg.data.flip = True
    return cfg


def cached(source: tiny.Moments, path: Path, number: int = 40) -> LatentCache:
    """The source in a cache with mirrored views."""
    writer = CacheWriter(path, begin(path, {"fingerprint": "latents", "flips": True}, number, number))
    with writer.shard(0) as add:
        for i in range(number):
            example = source[i]
            add(example)
            add({**example, "moments": example["moments"][:, ::-1]})
    writer.finish()
    return LatentCache(path, "latents")


def run_in(path: Path) -> WorkDir:
    path.mkdir()
    return WorkDir(path)


def saved(cfg: ConfigDict, path: Path, seed: int = 0) -> Params:
    """A model with random weights in a directory, that `train.init_from` names; its parameters."""
    stage = DiffusionStage(cfg, *tiny.first_stage(cfg), tiny.Moments(), tiny.tokenizer(cfg))
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(stage.init, jax.random.key(0)).params
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    stage.model(params, model_info(cfg, 1)).save(path)
    cfg.train.init_from = str(path)
    return params


def both(kind: str, source: tiny.Moments, tmp_path: Path) -> tuple[Params, list[DiffusionStage]]:
    """Weights, and the stages that read captions and embeddings of them."""
    cfg = frozen(**KINDS[kind])
    params = saved(cfg, tmp_path / "model")
    latents = cached(source, tmp_path / "cache")
    first, tokenizer = tiny.first_stage(cfg), tiny.tokenizer(cfg)
    plain = DiffusionStage(cfg, *first, latents, tokenizer)
    embedded = with_embeddings(cfg, run_in(tmp_path / "run"), plain.denoiser.conditioning, latents, True)
    return params, [plain, DiffusionStage(cfg, *first, embedded, tokenizer)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [tiny.Moments(), Several()], ids=("one", "several"))
def test_the_denoiser_is_told_the_same(kind: str, source: tiny.Moments, tmp_path: Path) -> None:
    params, stages = both(kind, source, tmp_path)
    told = []
    for stage, name in zip(stages, ("tokens", "embeddings"), strict=True):
        batch = stage.batches().batch(1)
        assert set(batch) == {"moments", name}
        arrays = stage.trained.conditioning.drop({name: batch[name]}, jax.random.key(5))
        told.append([batch["moments"], stage.trained.condition(params, arrays)["crossattn"]])
    np.testing.assert_array_equal(told[0][0], told[1][0])
    assert told[1][1].shape == (16, 8, 16)
    np.testing.assert_allclose(told[0][1], told[1][1], atol=2e-5)
    assert len({row.tobytes() for row in np.asarray(told[1][1])}) > 4


@pytest.mark.slow
def test_training_on_embeddings_is_training_on_captions(tmp_path: Path) -> None:
    params, stages = both("clip", Several(), tmp_path)
    states, mesh = [], make_mesh()
    for stage in stages:
        stage.start_from(params)
        with jax.set_mesh(mesh):
            state = loop.init_state(stage, mesh)
            step = loop.make_step(stage, mesh, state)
            for i in range(2):
                state, metrics = step(state, to_global(stage.batches().batch(i), mesh), jax.random.key(0), False)
        states.append((jax.device_get(state.params), float(metrics["loss"])))
    assert states[0][1] == pytest.approx(states[1][1], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), states[0][0], states[1][0])
    assert not np.allclose(states[0][0]["denoiser"]["out_conv"]["kernel"], params["denoiser"]["out_conv"]["kernel"], atol=1e-6)


def test_dropped_captions_are_empty_ones(tmp_path: Path) -> None:
    cfg = frozen(drop_rate=1.0)
    params = saved(cfg, tmp_path / "model")
    conditioning = DiffusionStage(cfg, *tiny.first_stage(cfg), tiny.Moments(), tiny.tokenizer(cfg)).denoiser.conditioning
    source = with_embeddings(cfg, run_in(tmp_path / "run"), conditioning, cached(tiny.Moments(), tmp_path / "cache"), True)
    stage = DiffusionStage(cfg, *tiny.first_stage(cfg), source, tiny.tokenizer(cfg))
    dropped = stage.trained.conditioning.drop({"embeddings": np.ones((16, 8, 16), np.float32)}, jax.random.key(0))["embeddings"]
    empty = TextEncoder(conditioning.conditioners[0], params["conditioner"]["text"])([""])
    np.testing.assert_allclose(dropped, np.repeat(empty, 16, axis=0), atol=1e-6)


def test_embeddings_are_kept_in_the_dtype_of_the_network(tmp_path: Path) -> None:
    cfg = frozen()
    cfg.train.dtype = "bfloat16"
    saved(cfg, tmp_path / "model")
    latents = cached(Several(), tmp_path / "cache")
    stage = DiffusionStage(cfg, *tiny.first_stage(cfg), latents, tiny.tokenizer(cfg))
    source = with_embeddings(cfg, run_in(tmp_path / "run"), stage.denoiser.conditioning, latents, True)
    assert source[2]["embeddings"].dtype == jax.numpy.bfloat16 and source[2]["embeddings"].shape == (3, 8, 16)
    batch = DiffusionStage(cfg, *tiny.first_stage(cfg), source, tiny.tokenizer(cfg)).batches().batch(0)
    assert batch["embeddings"].dtype == jax.numpy.bfloat16


def test_a_run_that_goes_on_needs_no_weights_but_the_same(tmp_path: Path) -> None:
    cfg = frozen()
    saved(cfg, tmp_path / "model")
    latents, workdir = cached(tiny.Moments(), tmp_path / "cache"), run_in(tmp_path / "run")
    conditioning = DiffusionStage(cfg, *tiny.first_stage(cfg), latents, tiny.tokenizer(cfg)).denoiser.conditioning

    def opened(starts: bool = False) -> Embedded:
        return with_embeddings(cfg, workdir, conditioning, latents, starts)

    before = opened(starts=True)
    (tmp_path / "model").rename(tmp_path / "moved")
    np.testing.assert_array_equal(opened()[7]["embeddings"], before[7]["embeddings"])
    for directory in (tmp_path / "run" / "latents").iterdir():
        directory.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="model"):
        opened()
    saved(cfg, tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"has another text encoder than .*run has learnt with"):
        opened()
    cfg.train.init_from = str(tmp_path / "moved")
    np.testing.assert_array_equal(opened()[7]["embeddings"], before[7]["embeddings"])

    # What starts once more with other weights has those.
    cfg.train.init_from = str(tmp_path / "other")
    again = opened(starts=True)
    assert np.abs(again[7]["embeddings"] - before[7]["embeddings"]).max() > 0.1
    np.testing.assert_array_equal(opened()[7]["embeddings"], again[7]["embeddings"])
