"""Training that starts from the weights of a model, and text encoders that stay as they were given."""

from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import ldm_jax
from ldm_jax.config import UserError, WorkDir, check
from ldm_jax.sharding.mesh import make_mesh, to_global
from ldm_jax.training import loop
from ldm_jax.training.run import run
from tests import tiny


@pytest.fixture(autouse=True)
def quick() -> None:
    with tiny.quick_compilation():
        yield  # type: ignore[misc]


def random_like(tree: dict) -> dict:
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)


def given(stage: loop.Stage) -> dict:
    return random_like(jax.eval_shape(stage.init, jax.random.key(0)).params)


def test_a_denoiser_starts_from_given_weights() -> None:
    stage = tiny.diffusion_stage(tiny.config())
    params = given(stage)
    stage.start_from({**params, "first_stage": {}})
    state = loop.init_state(stage, make_mesh())
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    jax.tree.map(np.testing.assert_array_equal, state.ema["0.9"], params)
    assert int(state.step) == 0


def test_an_autoencoder_starts_from_given_weights_and_its_discriminator_does_not() -> None:
    for cfg in (tiny.config(), tiny.quantised(tiny.config(), ema=0.9)):
        stage = tiny.autoencoder_stage(cfg)
        fresh = loop.init_state(stage, make_mesh())
        params = random_like(stage.autoencoder(fresh.params))
        stage.start_from(params)
        state = loop.init_state(stage, make_mesh())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), stage.autoencoder(state.params), params)
        jax.tree.map(np.testing.assert_array_equal, state.params["discriminator"], fresh.params["discriminator"])


def test_weights_of_another_network_are_refused() -> None:
    stage, params = tiny.diffusion_stage(tiny.config()), given(tiny.diffusion_stage(tiny.config(width=16)))
    difference = r"train.init_from does not fit .*denoiser\.out_conv\.kernel: \(3, 3, 16, 4\) there, \(3, 3, 8, 4\)"
    with pytest.raises(UserError, match=difference):
        stage.start_from(params)
    with pytest.raises(UserError, match="missing there"):
        stage.start_from({"denoiser": given(stage)["denoiser"]})


def test_a_frozen_text_encoder_stays_and_has_no_moments() -> None:
    cfg = tiny.config()
    cfg.denoiser.attention_levels = (1,)
    free, cfg.conditioning.text.frozen = tiny.diffusion_stage(cfg), True
    frozen = tiny.diffusion_stage(cfg)
    params = given(frozen)
    mesh = make_mesh()
    moments = {}
    for name, stage in {"free": free, "frozen": frozen}.items():
        stage.start_from(params)
        with jax.set_mesh(mesh):
            state = loop.init_state(stage, mesh)
            moments[name] = sum(leaf.size for leaf in jax.tree.leaves(state.opt))
            step, root = loop.make_step(stage, mesh, state), jax.random.key(0)
            for i in range(2):
                state, _ = step(state, to_global(stage.batches().batch(i), mesh), root, False)
        moved = {part: not same(state.params[part], params[part]) for part in params}
        assert moved == {"denoiser": True, "conditioner": name == "free"}
    size = sum(leaf.size for leaf in jax.tree.leaves(params["conditioner"]))
    assert moments["free"] - moments["frozen"] == 2 * size


def same(a: dict, b: dict) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_run_starts_from_a_model_and_takes_its_first_stage_and_tokenizer(tmp_path: Path) -> None:
    def config() -> ConfigDict:
        cfg = tiny.config()
        cfg.denoiser.attention_levels = (1,)
        cfg.data.update(source="shapes", size=16, resolution=32)
        cfg.evaluate.update(prompts=1, held_out=0, guidance=(1.0,), guidance_prompts=1)
        for group in (cfg, cfg.first_stage):
            group.train.steps, group.optimizer.warmup = 2, 1
        return cfg

    cache = jax.config.jax_compilation_cache_dir
    try:
        first = run(config(), WorkDir(tmp_path / "first"), ["train"])
        again = config()
        again.train.init_from = again.first_stage.path = str(first.path)
        again.optimizer.learning_rate = 0.0
        again.conditioning.text.update(frozen=True, vocab_size=290)  # which would be another tokenizer, were one trained
        check(again)
        second = run(again, WorkDir(tmp_path / "second"), ["train"])
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    assert not second.first_stage.path.exists()
    assert (second.path / "tokenizer.json").read_text() == (first.path / "tokenizer.json").read_text()
    one, two = (ldm_jax.load(str(workdir.path)).params for workdir in (first, second))
    jax.tree.map(np.testing.assert_array_equal, one, two)

    again.denoiser.channels = 16
    with pytest.raises(UserError, match=r"train.init_from: .*first does not fit its configuration"):
        run(again, WorkDir(tmp_path / "third"), ["train"])
    assert not (tmp_path / "third").exists()


def test_a_frozen_encoder_needs_weights() -> None:
    cfg = tiny.config()
    cfg.conditioning.text.frozen = True
    with pytest.raises(UserError, match=r"give its weights with train\.init_from"):
        check(cfg)
