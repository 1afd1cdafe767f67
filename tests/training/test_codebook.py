"""Training with a codebook: what moves it, what is reported of it, and that a stopped run goes on as it was."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ldm_jax.config import WorkDir
from ldm_jax.data.sources import make_source
from ldm_jax.nn import quantize
from ldm_jax.sharding.mesh import make_mesh
from ldm_jax.stages import apply, to_float
from ldm_jax.training import loop
from ldm_jax.training.autoencoder import AutoencoderStage
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


def one_update(ema: float) -> tuple[AutoencoderStage, Any, Any, Any, Any]:
    """(stage, state before, state after, metrics, moments of the batch under the weights before)."""
    stage = tiny.autoencoder_stage(tiny.quantised(tiny.config(), ema))
    state = jax.jit(stage.init)(jax.random.key(0))
    images = stage.batches().batch(0)["image"]
    after, metrics = jax.jit(stage.update, static_argnums=4)(state, {"image": images}, None, jax.random.key(1), False)
    moments = jax.jit(lambda p: apply(stage.network, stage.autoencoder(p), to_float(images), method="moments"))(state.params)
    return stage, state, after, metrics, moments


@pytest.mark.slow
def test_averages_move_the_codebook_by_the_clusters_of_the_batch() -> None:
    stage, state, after, metrics, z = one_update(ema=0.8)
    assert "quantize" not in state.params["autoencoder"] and "quantize" not in after.params["autoencoder"]
    entries = stage.autoencoder(state.params)["quantize"]["embedding"]
    indices = np.asarray(quantize.nearest(z, entries))
    counts = np.bincount(indices.ravel(), minlength=32)
    sums = np.stack([np.asarray(z)[indices == k].sum(0) for k in range(32)])
    expected = {"size": 0.8 + 0.2 * counts * 32 / indices.size, "sum": 0.8 * entries + 0.2 * sums * 32 / indices.size}
    for name, value in expected.items():
        np.testing.assert_allclose(after.params["codebook"][name], value, rtol=1e-5, atol=1e-7)
    rate = max(1 - 0.9, 9 / 11)  # of the average over weights, which the codebook takes part in
    np.testing.assert_allclose(after.ema["0.9"]["codebook"]["size"], 1 + rate * (expected["size"] - 1), rtol=1e-5)
    assert float(metrics["codebook/usage"]) == pytest.approx((counts > 0).mean())
    shares = counts[counts > 0] / indices.size
    assert float(metrics["codebook/perplexity"]) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert float(metrics["codebook/loss"]) == pytest.approx(1.25 * np.square(z - entries[indices]).mean(), rel=1e-4)


def test_gradients_move_only_the_entries_that_were_taken() -> None:
    _, state, after, metrics, z = one_update(ema=0.0)
    assert "codebook" not in state.params and "codebook" not in state.opt
    before, moved = (np.asarray(s.params["autoencoder"]["quantize"]["embedding"]) for s in (state, after))
    taken = np.unique(quantize.nearest(z, before))
    assert 1 <= len(taken) < 32
    assert sorted(np.flatnonzero((before != moved).any(1))) == taken.tolist()
    assert float(metrics["codebook/usage"]) == len(taken) / 32


def test_a_state_without_codebook_has_the_form_it_had() -> None:
    state = jax.eval_shape(tiny.autoencoder_stage(tiny.config()).init, jax.random.key(0))
    assert set(state.params) == set(state.opt) == {"autoencoder", "discriminator"} and set(state.ema["0.9"]) == {"autoencoder"}


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_it_learns_to_draw_shapes(ema: float) -> None:
    cfg = tiny.quantised(tiny.config(), ema)
    cfg.first_stage.loss.disc_start = 1000
    cfg.first_stage.optimizer.update(learning_rate=5e-3)
    cfg.first_stage.train.update(steps=60)
    run = tiny.first_stage_run(cfg)
    stage = AutoencoderStage(run, make_source(run.data))
    state = jax.jit(stage.init)(jax.random.key(0))
    step = jax.jit(stage.update, static_argnums=4, donate_argnums=0)
    batches, losses, perplexities = stage.batches(), [], []
    for i in range(60):
        state, metrics = step(state, {"image": batches.batch(i)["image"]}, None, jax.random.key(1), False)
        losses.append(float(metrics["loss/nll"]))
        perplexities.append(float(metrics["codebook/perplexity"]))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert all(1 <= p <= 32 for p in perplexities) and max(perplexities[-5:]) > 1.5
    pictures, columns, _ = stage.preview(state)
    assert pictures.shape == (32, 16, 16, 3) and columns == 8


@pytest.mark.slow
def test_a_run_with_averages_resumes_bit_identically(tmp_path: Path) -> None:
    """Also over the discriminator's start, at step 3."""
    cfg = tiny.quantised(tiny.config(), ema=0.9)
    cfg.first_stage.loss.disc_start = 3
    cfg.checkpoint.every = 2

    def run(steps: int, path: Path) -> Any:
        cfg.first_stage.train.steps = steps
        return jax.device_get(loop.train(tiny.autoencoder_stage(cfg), WorkDir(path), make_mesh()))

    run(2, tmp_path / "resumed")
    for a, b in zip(jax.tree.leaves(run(5, tmp_path / "resumed")), jax.tree.leaves(run(5, tmp_path / "at once")), strict=True):
        np.testing.assert_array_equal(a, b)
