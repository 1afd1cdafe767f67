"""Small settings and sources that several tests build their stages from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import first_stage_run
from ldm_jax.defaults import base
from ldm_jax.stages import FirstStage, build_autoencoder, init_autoencoder
from ldm_jax.training.autoencoder import AutoencoderStage
from ldm_jax.training.diffusion import DiffusionStage, model_info

# Metrics that differ from run to run; the others are the same to the bit.
CLOCKED = {"time", "step_time", "data_wait", "goodput", "mfu", "hbm_gib", "hbm_peak_gib", "images_per_second", "images_per_second_per_chip"}
CLOCKED |= {"tflops_per_second", "tflops_per_second_per_chip"}

CAPTIONS = ("a red circle", "a blue square", "a green ring", "a black cross")


def config(width: int = 8) -> ConfigDict:
    """Pictures of 16 px, latents of 4x4x4, networks of `width` and 2 `width` channels; 10 updates of 16 examples a stage."""
    cfg = base()
    cfg.data.update(resolution=16, size=64, workers=1)
    first = cfg.first_stage
    first.update(channels=width, channel_mult=(1, 2), num_res_blocks=1, mid_attention=False, patch_size=2, statistics_examples=0)
    first.loss.update(disc_start=5)
    first.discriminator.update(features=8, num_layers=1, norm="group")
    first.optimizer.update(kind="adam", learning_rate=2e-4, warmup=2, weight_decay=0.0, clip_norm=0.0)
    first.ema.decays = (0.9,)
    cfg.denoiser.update(channels=width, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), head_channels=8)
    cfg.conditioning.text.update(vocab_size=300, max_length=8, width=16, depth=1, num_heads=2, head_dim=8, drop_rate=0.3)
    cfg.optimizer.update(learning_rate=2e-4, warmup=2)
    cfg.ema.decays = (0.9,)
    for train in (cfg.train, first.train):
        train.update(steps=10, batch_size=16, log_every=1, dtype="float32")
    cfg.sample.update(every=100, steps=2, batch_size=8)
    cfg.checkpoint.update(every=4)
    return cfg


def quantised(cfg: ConfigDict, ema: float = 0.0) -> ConfigDict:
    """The configuration with a VQ first stage of 32 entries, that follow moving averages where `ema` is given."""
    cfg.first_stage.update(kind="vq")
    cfg.first_stage.codebook.update(size=32, ema=ema)
    cfg.first_stage.loss.reduction = "mean"
    return cfg


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Programs that compile in a fraction of the time and run slower: for networks that run a few times only."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Pictures:
    """Random captioned pictures, uint8 [16,16,3]."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        return {"image": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), "text": self.caption(index)}

    def caption(self, index: int) -> str:
        return CAPTIONS[index % len(CAPTIONS)]

    def fingerprint(self) -> str:
        return "pictures"


class Moments(Pictures):
    """Random captioned moments, float32 [4,4,8]."""

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        return {"moments": rng.normal(size=(4, 4, 8)).astype(np.float32), "text": self.caption(index)}


def tokenizer(cfg: ConfigDict) -> Tokenizer:
    return Tokenizer.train(CAPTIONS, cfg.conditioning.text.vocab_size, cfg.conditioning.text.max_length)


def first_stage(cfg: ConfigDict, seed: int = 1) -> tuple[FirstStage, dict]:
    """An untrained first stage with a shift and a scale, and its parameters."""
    network = build_autoencoder(cfg.first_stage.to_dict(), jax.numpy.dtype(cfg.train.dtype).type)
    params = jax.jit(lambda key: init_autoencoder(network, key, cfg.data.resolution))(jax.random.key(seed))
    return FirstStage(network, (0.1,), (0.7,)), params


def random_like(shapes: Any) -> Any:
    """Parameters without a compiled initialisation, large enough for conditions to matter."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: (rng.normal(size=s.shape) / max(1, np.prod(s.shape[:-1])) ** 0.5).astype(np.float32), shapes)


def save_untrained(cfg: ConfigDict, path: Path) -> Path:
    """Leaves a whole model of random weights in a directory."""
    stage = FirstStage(build_autoencoder(cfg.first_stage.to_dict(), np.float32))
    params = random_like(jax.eval_shape(lambda k: init_autoencoder(stage.network, k, cfg.data.resolution), jax.random.key(0)))
    denoiser = DiffusionStage(cfg, stage, params, Moments(), tokenizer(cfg))
    shapes = jax.eval_shape(lambda key: denoiser.denoiser.init(key, denoiser.latent_shape), jax.random.key(0))
    denoiser.model(random_like(shapes), model_info(cfg, 0)).save(path)
    return path


def autoencoder_stage(cfg: ConfigDict) -> AutoencoderStage:
    return AutoencoderStage(first_stage_run(cfg), Pictures())


def diffusion_stage(cfg: ConfigDict) -> DiffusionStage:
    """From moments, or from pictures where nothing is cached."""
    return DiffusionStage(cfg, *first_stage(cfg), Moments() if cfg.data.cache else Pictures(), tokenizer(cfg))
