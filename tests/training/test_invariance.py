"""Twenty updates do not depend on the number of devices, on how the parameters are split, or on how a batch is accumulated."""

from functools import cache
from unittest import mock

import jax
import numpy as np
import pytest

from ldm_jax.sharding import rules
from ldm_jax.sharding.mesh import local_rows, make_mesh, on_host, replicated, to_global
from ldm_jax.training import loop
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 20
LOSSES = {
    "autoencoder": ("loss/nll", "loss/kl", "loss/discriminator", "loss/generator", "adaptive_weight", "gradient_norm"),
    "vq": ("loss/nll", "codebook/loss", "codebook/perplexity", "codebook/usage", "adaptive_weight", "gradient_norm"),
    "vq-ema": ("loss/nll", "codebook/loss", "codebook/perplexity", "codebook/usage", "adaptive_weight", "gradient_norm"),
    "moments": ("loss", "gradient_norm"),
    "images": ("loss", "gradient_norm"),
}
MESHES = {
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "mixed": (2, 4, 1),
    "two": (1, 2, 1),
    "accumulated": (1, 1, 4),
    "mixed-accumulated": (2, 2, 4),
}


@cache
def updates(kind: str, dtype: str, data: int, fsdp: int, accumulation: int = 1) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The metrics of every update, and the leaves of the first EMA after the last."""
    cfg = tiny.config()
    cfg.data.cache = kind != "images"
    if kind in ("vq", "vq-ema"):
        tiny.quantised(cfg, ema=0.8 if kind == "vq-ema" else 0.0)
    for train in (cfg.train, cfg.first_stage.train):
        train.update(dtype=dtype, accumulation=accumulation)
    with jax.enable_x64(dtype == "float64"), mock.patch.object(rules, "MIN_SPLIT_ELEMENTS", 128):
        stage = tiny.diffusion_stage(cfg) if kind in ("moments", "images") else tiny.autoencoder_stage(cfg)
        mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
        with jax.set_mesh(mesh):
            state = loop.init_state(stage, mesh)
            split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
            assert len(split) > (50 if fsdp > 1 else -1) and (fsdp > 1 or not split)
            assert all(leaf.addressable_shards[0].data.size == leaf.size // fsdp for leaf in split)
            step_fn = loop.make_step(stage, mesh, state)
            batches = stage.batches(rows=local_rows(stage.config.train.batch_size, mesh))
            root = jax.device_put(jax.random.key(0), replicated(mesh))
            history = []
            for step in range(STEPS):
                state, metrics = step_fn(state, to_global(batches.batch(step), mesh), root, stage.phase(step))
                history.append(on_host(metrics))
        decay = str(stage.config.ema.decays[0])
        ema = jax.tree.leaves(on_host(state.ema[decay]))
    assert all(leaf.dtype == dtype for leaf in ema) and int(state.skipped) == 0
    return {name: np.array([m[name] for m in history if name in m]) for name in LOSSES[kind]}, ema


def assert_equal_runs(kind: str, dtype: str, run: tuple, other: tuple) -> None:
    tolerance = 1e-8 if dtype == "float64" else 1e-5
    for name in LOSSES[kind]:
        assert len(run[0][name]) == len(other[0][name]) >= 5 and run[0][name].dtype == dtype
        np.testing.assert_allclose(other[0][name], run[0][name], rtol=tolerance, err_msg=name)
    for a, b in zip(run[1], other[1], strict=True):
        # Adam turns rounding into an update of up to the learning rate wherever a gradient vanishes, hence a bound for the mean in float32.
        difference = np.abs(a - b)
        assert (difference.max() if dtype == "float64" else difference.mean()) < tolerance


# A quantised first stage differs by its codebook's sums alone; rounding to float32 would take a latent now to one entry, now to another.
OF_KIND = {
    ("autoencoder", "float64"): tuple(MESHES),
    ("autoencoder", "float32"): ("data", "fsdp", "mixed"),
    ("vq", "float64"): ("mixed", "accumulated"),
    ("vq-ema", "float64"): ("mixed", "accumulated"),
    ("moments", "float64"): tuple(MESHES),
    ("moments", "float32"): ("data", "fsdp", "mixed"),
}
RUNS = [  # of one device in one piece, by: kind, dtype, data, fsdp, accumulation
    pytest.param(*kind, *MESHES[name], id=f"{'-'.join(kind)}-{name}") for kind, names in OF_KIND.items() for name in names
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "data", "fsdp", "accumulation"), RUNS)
def test_updates_equal_those_of_one_device_in_one_piece(kind: str, dtype: str, data: int, fsdp: int, accumulation: int) -> None:
    assert_equal_runs(kind, dtype, updates(kind, dtype, 1, 1), updates(kind, dtype, data, fsdp, accumulation))


@cache
def first_update(dropout: float, data: int, fsdp: int, accumulation: int) -> tuple[float, list[np.ndarray]]:
    """The loss of an update from random parameters, by which dropout matters at once, and the leaves of Adam's means of its gradients."""
    cfg = tiny.config()
    cfg.denoiser.dropout = dropout
    cfg.train.update(dtype="float64", accumulation=accumulation)
    with jax.enable_x64(True), mock.patch.object(rules, "MIN_SPLIT_ELEMENTS", 128):
        stage = tiny.diffusion_stage(cfg)
        stage.start_from(tiny.random_like(stage.abstract_params))
        mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
        with jax.set_mesh(mesh):
            state = loop.init_state(stage, mesh)
            batch = to_global(stage.batches(rows=local_rows(cfg.train.batch_size, mesh)).batch(0), mesh)
            root = jax.device_put(jax.random.key(0), replicated(mesh))
            state, metrics = loop.make_step(stage, mesh, state)(state, batch, root, False)
        return float(metrics["loss"]), jax.tree.leaves(on_host(state.opt))


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp", "accumulation"), [(1, 1, 4), (8, 1, 1), (2, 2, 4)], ids=["quarters", "devices", "both"])
def test_an_example_is_masked_alike_wherever_it_lies(data: int, fsdp: int, accumulation: int) -> None:
    whole, parted = first_update(0.5, 1, 1, 1), first_update(0.5, data, fsdp, accumulation)
    assert parted[0] == pytest.approx(whole[0], rel=1e-12)
    for a, b in zip(whole[1], parted[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10 * np.abs(a).max())


@pytest.mark.slow
def test_dropout_acts_on_an_update() -> None:
    assert abs(first_update(0.5, 1, 1, 1)[0] - first_update(0.0, 1, 1, 1)[0]) > 1e-2


@pytest.mark.slow
def test_encoding_in_every_step_too() -> None:
    assert_equal_runs("images", "float64", updates("images", "float64", 1, 1), updates("images", "float64", 2, 4))
