"""Whole runs, from pictures to samples, with each kind of first stage but the one that every other test has."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file

import ldm_jax
from ldm_jax.config import WorkDir
from ldm_jax.training.run import run
from tests import tiny


@pytest.fixture(autouse=True)
def quick_compilation() -> Iterator[None]:
    """A run takes a compilation cache of its own, which is given back here."""
    cache = jax.config.jax_compilation_cache_dir
    with tiny.quick_compilation():
        yield
    jax.config.update("jax_compilation_cache_dir", cache)
    compilation_cache.reset_cache()


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    """A run of two updates a stage on sixteen pictures without captions."""
    for i in range(16):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(tiny.Pictures()[i]["image"]).save(tmp_path / "data" / f"{i}.png")
    cfg = tiny.config()
    cfg.data.update(source="folder", path=str(tmp_path / "data"))
    cfg.conditioning.text.enabled = False
    cfg.sample.guidance = 1.0
    for train in (cfg.train, cfg.first_stage.train):
        train.steps = 2
    cfg.first_stage.optimizer.warmup = cfg.optimizer.warmup = 1
    return cfg


def pixels() -> np.ndarray:
    return np.stack([tiny.Pictures()[i]["image"] for i in range(16)]) / 127.5 - 1


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_quantised_first_stage(ema: float, config: ConfigDict, tmp_path: Path) -> None:
    tiny.quantised(config, ema)
    workdir = run(config, WorkDir(tmp_path / "run"), ["train"])
    weights = load_file(workdir.model / "first_stage" / "weights.safetensors")
    assert weights["quantize.embedding"].shape == (32, 4) and not any(name.startswith("codebook") for name in weights)
    lines = [json.loads(line) for line in (workdir.first_stage.path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(1 / 32 <= line["codebook/usage"] <= 1 <= line["codebook/perplexity"] <= 32 for line in lines)

    model = ldm_jax.load(str(workdir.path))
    latents = model.encode(pixels().astype(np.float32))
    assert latents.shape == (16, 4, 4, 4)
    np.testing.assert_allclose(latents.std(), 1, rtol=0.3)  # by statistics over the whole set, about zero
    assert model.sample(num=3, seed=1).shape == (3, 16, 16, 3)

    written = tmp_path / "run" / "model" / "model.json"
    before = written.stat().st_mtime_ns
    run(config, WorkDir(tmp_path / "run"), ["train"])
    assert written.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
def test_pixels_as_latents_need_no_training(cache: bool, config: ConfigDict, tmp_path: Path) -> None:
    config.first_stage.update(kind="identity", latent_scale="channel")
    config.first_stage.train.batch_size = 12  # of no use, as nothing is trained
    config.data.cache = cache
    workdir = run(config, WorkDir(tmp_path / "run"), ["train"])
    assert not workdir.first_stage.checkpoints.exists() and workdir.latents.exists() == cache
    model = ldm_jax.load(str(workdir.path))
    np.testing.assert_allclose(model.first_stage.shift, pixels().mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(model.first_stage.scale, pixels().std((0, 1, 2)), rtol=1e-5)
    assert model.latent_shape == (16, 16, 3) and model.denoiser is not None
    assert model.sample(num=3, seed=1).shape == (3, 16, 16, 3)

    config.first_stage.train.steps = 5  # which would mean more training of a first stage that has any
    config.train.steps = 3
    run(config, WorkDir(tmp_path / "run"), ["train"])
    assert json.loads((workdir.model / "model.json").read_text())["step"] == 3
