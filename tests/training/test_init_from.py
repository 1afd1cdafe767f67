"""Training that starts from the weights of a model, and text encoders that stay as they were given."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import ldm_jax
from ldm_jax.config import UserError, WorkDir, check
from ldm_jax.diffusion.process import DiscreteProcess
from ldm_jax.diffusion.schedules import make_betas
from ldm_jax.sharding.mesh import make_mesh, to_global
from ldm_jax.stages import Denoiser
from ldm_jax.training import init_from, loop
from ldm_jax.training.run import run
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


@pytest.mark.slow
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


def denoiser(change: Callable[[ConfigDict], None] = lambda cfg: None, base: str = "unet") -> Denoiser:
    cfg = tiny.config()
    cfg.denoiser.attention_levels = (1, 2)
    cfg.conditioning.text.update(kind="clip")
    if base == "dit":
        cfg.conditioning.text.enabled = False
        cfg.conditioning.label.update(enabled=True, num_classes=3, width=8, to="vector")
        cfg.denoiser.update(kind="dit", width=8, depth=1, num_heads=2)
    change(cfg)
    return tiny.diffusion_stage(cfg).denoiser


def shapes(denoiser: Denoiser) -> dict:
    params = jax.eval_shape(lambda key: denoiser.init(key, (4, 4, 4)), jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf.shape, params)


WRONG: list[tuple[str, Callable[[ConfigDict], None], str]] = [
    ("unet", lambda c: c.denoiser.update(head_channels=4), "denoiser.num_heads: [1, 2] there, [2, 4] here"),
    ("unet", lambda c: c.denoiser.update(norm_groups=4), "denoiser.norm_groups: [2, 4] there, [4, 4] here"),
    ("unet", lambda c: c.conditioning.text.update(num_heads=4), "conditioning.text.num_heads: 2 there, 4 here"),
    ("unet", lambda c: c.conditioning.text.update(activation="gelu"), "conditioning.text.activation: quick_gelu there, gelu here"),
    ("unet", lambda c: c.diffusion.update(end=0.012), "diffusion.end: 0.0195 there, 0.012 here"),
    ("unet", lambda c: c.diffusion.update(schedule="linear_beta"), "diffusion.schedule: linear there, linear_beta here"),
    ("dit", lambda c: c.denoiser.update(num_heads=4), "denoiser.num_heads: 2 there, 4 here"),
    ("dit", lambda c: c.denoiser.update(legacy_frequencies=True), "denoiser.legacy_frequencies: False there, True here"),
    (
        "dit",
        lambda c: c.conditioning.label.update(num_classes=4, null_class=False, drop_rate=0.0),
        "conditioning.label.num_classes: 3 there",
    ),
]


@pytest.mark.parametrize(("base", "change", "message"), WRONG, ids=[message.split(":")[0] for _, _, message in WRONG])
def test_settings_that_shapes_do_not_show_are_differences(base: str, change: Callable[[ConfigDict], None], message: str) -> None:
    there, here = denoiser(base=base), denoiser(change, base)
    assert shapes(there) == shapes(here)
    found = init_from.denoiser_differences(there, here)
    assert any(line.startswith(message) for line in found.wrong) and not found.noted


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.denoiser.update(num_heads=1, head_channels=0, attention_levels=(1,)),
        lambda c: (c.denoiser.update(dropout=0.3), c.train.update(remat="blocks")),
        lambda c: c.conditioning.text.update(drop_rate=0.5, frozen=True),
        lambda c: c.diffusion.update(weighting="min_snr", loss="huber", offset_noise=0.1),
        lambda c: c.train.update(dtype="bfloat16"),
    ],
    ids=["heads in another form", "remat, dropout", "drop rate, frozen", "loss", "dtype"],
)
def test_settings_that_leave_the_function_are_none(change: Callable[[ConfigDict], None]) -> None:
    one_head = denoiser(lambda c: c.denoiser.update(attention_levels=(1,), num_heads=1, head_channels=0))
    there = one_head if denoiser(change).network.attention_levels == (1,) else denoiser()  # type: ignore[union-attr]
    assert init_from.denoiser_differences(there, denoiser(change)) == ([], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.diffusion.update(prediction="v"), "diffusion.prediction: eps there, v here"),
        (lambda c: c.diffusion.update(zero_terminal_snr=True, prediction="v"), "diffusion.zero_terminal_snr: False there, True here"),
        (lambda c: c.diffusion.update(process="flow", prediction="flow"), "diffusion.process: DiscreteProcess there, FlowProcess here"),
    ],
)
def test_what_fine_tuning_changes_on_purpose_is_noted(change: Callable[[ConfigDict], None], message: str) -> None:
    found = init_from.denoiser_differences(denoiser(), denoiser(change))
    assert not found.wrong and message in found.noted
    stage = tiny.diffusion_stage(tiny.config())
    stage.start_from(given(stage), found.noted)
    assert set(found.noted) <= set(stage.notes())


def test_a_schedule_is_its_betas() -> None:
    there = denoiser()
    betas = make_betas("linear", 1000, 0.0015, 0.0195)
    given, other = (replace(there, process=DiscreteProcess("given", betas=tuple(b.tolist()))) for b in (betas, betas[::-1]))
    assert init_from.denoiser_differences(there, given) == ([], [])
    assert "diffusion.schedule: linear there, given here" in init_from.denoiser_differences(there, other).wrong


def test_an_autoencoder_of_other_norms_is_another() -> None:
    stages = [tiny.autoencoder_stage(tiny.config()).network for _ in range(2)]
    assert init_from.autoencoder_differences(*stages) == []
    other = replace(stages[1], norm_groups=4)
    assert init_from.autoencoder_differences(stages[0], other) == ["first_stage.norm_groups: [2, 4] there, [4, 4] here"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_starts_from_a_model_and_takes_its_first_stage_and_tokenizer(tmp_path: Path) -> None:
    def config() -> ConfigDict:
        cfg = tiny.config()
        cfg.denoiser.attention_levels = (1,)
        cfg.data.update(source="shapes", size=16, resolution=32)
        cfg.evaluate.update(prompts=2, held_out=0, guidance=(1.0,), guidance_prompts=1)
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

    for field, value, message in (("channels", 16, "first does not fit its configuration"), ("head_channels", 4, "denoiser.num_heads")):
        other = ConfigDict(again.to_dict())
        other.denoiser[field] = value
        with pytest.raises(UserError, match=rf"train.init_from: .*{message}"):
            run(other, WorkDir(tmp_path / "third"), ["train"])
        assert not (tmp_path / "third").exists()

    # What has begun needs the model no more that it began with, wherever that is now.
    first.path.rename(tmp_path / "moved")
    again.first_stage.path, again.train.steps = str(tmp_path / "moved"), 3
    try:
        run(again, WorkDir(second.path), ["train"])
        again.train.update(init_from=str(tmp_path / "moved"), steps=4)
        run(again, WorkDir(second.path), ["train"])
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    three = ldm_jax.load(str(second.path))
    assert three.info["step"] == 4
    jax.tree.map(np.testing.assert_array_equal, one, three.params)


def test_a_frozen_encoder_needs_weights() -> None:
    cfg = tiny.config()
    cfg.conditioning.text.frozen = True
    with pytest.raises(UserError, match=r"give its weights with train\.init_from"):
        check(cfg)
