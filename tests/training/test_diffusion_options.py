"""Processes, weightings and noise as configurations set them: one update each, and what makes no sense."""

import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.defaults import base
from ldm_jax.diffusion.process import DiscreteProcess
from ldm_jax.diffusion.schedules import ENDS
from ldm_jax.sharding import rules
from ldm_jax.sharding.mesh import make_mesh, replicated, to_global
from ldm_jax.stages import build_process
from ldm_jax.training import diffusion, loop
from ldm_jax.training.diffusion import DiffusionStage, with_log_variance
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


def stage_of(**settings: Any) -> DiffusionStage:
    config = tiny.config()
    sample = settings.pop("sample", {})
    config.diffusion.update(settings)
    config.sample.update(sample)
    return tiny.diffusion_stage(config)


def updated(stage: DiffusionStage, steps: int = 2) -> tuple[Any, Any, list[float]]:
    """(first state, last state, losses) of some updates on one batch."""
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        first = state = loop.init_state(stage, mesh)
        first = jax.device_get(first)
        step = loop.make_step(stage, mesh, state)
        batch = to_global(stage.batches().batch(0), mesh)
        root = jax.device_put(jax.random.key(0), replicated(mesh))
        losses = []
        for _ in range(steps):
            state, metrics = step(state, batch, root, False)
            losses.append(float(metrics["loss"]))
    return first, jax.device_get(state), losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {
            "prediction": "eps",
            "vlb_weight": 0.001,
            "learn_log_variance": True,
            "offset_noise": 0.1,
            "input_perturbation": 0.1,
            "loss": "huber",
        },
        {"process": "sigma", "prediction": "edm", "weighting": "edm", "time_sampling": "edm"},
        {"process": "cosine", "prediction": "v", "weighting": "sigmoid", "weight_offset": -1.0, "shift": 0.5},
        {"schedule": "linear", "prediction": "v", "zero_terminal_snr": True, "weighting": "soft_min_snr"},
        {"schedule": "given", "num_steps": 4, "betas": (0.1, 0.2, 0.3, 0.5), "sample": {"steps": 2}},
        {"process": "flow", "prediction": "flow", "time_sampling": "mode", "mode_scale": 1.29, "learn_log_variance": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_configuration_trains_and_previews(settings: dict[str, Any]) -> None:
    stage = stage_of(**settings)
    first, last, losses = updated(stage)
    assert np.all(np.isfinite(losses)) and int(last.skipped) == 0
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), first.params["denoiser"], last.params["denoiser"])
    assert any(jax.tree.leaves(moved))
    with jax.set_mesh(make_mesh()):
        images, _, _ = stage.preview(last)
    assert images.dtype == np.uint8 and images.std() > 0


@pytest.mark.slow
def test_previews_are_the_same_on_any_mesh() -> None:
    stage, pictures = stage_of(), []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(2, 4)):
        with mock.patch.object(rules, "MIN_SPLIT_ELEMENTS", 128), jax.set_mesh(mesh):
            state = loop.init_state(stage, mesh)
            pictures.append(stage.preview(state)[0].astype(int))
    assert pictures[0].shape == pictures[1].shape and pictures[0].std() > 0
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.slow
def test_the_learned_log_variance_is_of_the_loss_and_not_of_the_model() -> None:
    first, last, _ = updated(stage_of(learn_log_variance=True))
    assert not first.params["log_variance"].any() and last.params["log_variance"].any()
    assert all("log_variance" not in trees for trees in last.ema.values())


@pytest.mark.slow
def test_the_bound_stays_outside_of_the_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the paper's code: loss/exp(u) + u and then the bound, which is all that is left where the likelihood is made nothing."""
    monkeypatch.setattr(diffusion, "with_log_variance", lambda loss, table, fraction: 0 * loss)
    assert updated(stage_of(learn_log_variance=True, vlb_weight=10.0), 1)[2][0] > 1e-3


def test_its_best_value_is_the_log_of_the_mean_loss() -> None:
    """d/du (l exp(-u) + u) = 0 at u = log l, for each noise level by itself."""
    loss, fraction = jnp.asarray([1.0, 3.0, 5.0]), jnp.asarray([0.1, 0.12, 0.9])
    table = jnp.zeros(4).at[0].set(jnp.log(2.0)).at[3].set(jnp.log(5.0))
    gradient = jax.grad(lambda table: with_log_variance(loss, table, fraction).sum())(table)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    np.testing.assert_allclose(with_log_variance(loss, jnp.zeros(4), fraction), loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"process": "flow", "vlb_weight": 0.1, "prediction": "flow"}, "vlb_weight is of discrete processes"),
        ({"process": "flow", "prediction": "eps"}, "'eps' does not determine x_0 at t=1"),
        ({"zero_terminal_snr": True, "prediction": "eps"}, "'eps' does not determine x_0 at t=999"),
        ({"process": "sigma", "sigma_min": 2.0, "sigma_max": 1.0}, "0 < sigma_min < sigma_max"),
        ({"schedule": "given"}, "0 betas for schedule 'given'"),
        ({"prediction": "v", "sample": {"spacing": "karras", "sampler": "plms", "eta": 0.5}}, "'plms' has no eta"),
        ({"prediction": "v", "sample": {"guidance_kind": "cfg++"}}, "takes a scale from 0 to 1"),
        ({"process": "flow", "prediction": "flow", "sample": {"spacing": "karras"}}, "need noise between 0 and infinity"),
        ({"process": "flow", "prediction": "flow", "sample": {"sampler": "heun"}}, "needs some signal at the first time"),
        ({"schedule": "cosine", "sample": {"sampler": "plms"}}, "needs some signal at the first time, and there noise is 2.*e.04 times"),
        ({"offset_noise": -0.1}, "offset_noise is a standard deviation, a finite number from 0 up, not -0.1"),
        ({"offset_noise": float("nan")}, "offset_noise is a standard deviation"),
        ({"input_perturbation": -0.1}, "input_perturbation is a standard deviation"),
        ({"vlb_weight": float("nan")}, "diffusion: vlb_weight of the diffusion loss must be a finite number, got nan"),
        ({"time_sampling": "log_normal", "time_mean": float("nan")}, "mean of the time sampling must be a finite number, got nan"),
        ({"process": "flow", "prediction": "flow", "shift": float("inf")}, "shift of the flow process must be a finite number, got inf"),
        ({"sample": {"sampler": "heun", "churn": float("nan")}}, "churn of the sampler must be a finite number"),
        ({"sample": {"guidance_kind": "cfg++", "guidance": 0.5, "guidance_rescale": 0.5}}, "has no rescale"),
    ],
)
def test_what_makes_no_sense_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stage_of(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 3.0}, "shift=3.0 has no effect with process=discrete: it is of flow, cosine"),
        ({"process": "flow", "schedule": "cosine"}, "schedule=cosine has no effect with process=flow: it is of discrete"),
        ({"process": "flow", "zero_terminal_snr": True}, "zero_terminal_snr=True has no effect with process=flow"),
        ({"process": "flow", "num_steps": 10}, "num_steps=10 has no effect with process=flow"),
        ({"sigma_max": 10.0}, "sigma_max=10.0 has no effect with process=discrete: it is of sigma"),
        ({"schedule": "cosine", "start": 0.1}, "start=0.1 has no effect with schedule=cosine: it is of linear, linear_beta, sqrt"),
        ({"huber_delta": 0.1}, "huber_delta=0.1 has no effect with loss=l2: it is of huber"),
        ({"gamma": 2.0}, "gamma=2.0 has no effect with weighting=none: it is of min_snr, soft_min_snr, p2"),
        ({"weight_offset": -3.0, "weighting": "min_snr"}, "weight_offset=-3.0 has no effect with weighting=min_snr: it is of p2, sigmoid"),
        ({"time_mean": -1.2}, "time_mean=-1.2 has no effect with time_sampling=uniform: it is of logit_normal, log_normal"),
        ({"time_std": 2.0, "time_sampling": "edm"}, "time_std=2.0 has no effect with time_sampling=edm"),
        ({"mode_scale": 1.0}, "mode_scale=1.0 has no effect with time_sampling=uniform: it is of mode"),
    ],
)
def test_a_field_without_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    group = base().diffusion
    group.update(settings)
    with pytest.raises(UserError, match=f"^diffusion: {re.escape(message)}"):
        diffusion.build_loss(group, build_process(group))


@pytest.mark.parametrize("process", ["discrete", "flow", "cosine", "sigma"])
@pytest.mark.parametrize("schedule", ["linear", "linear_beta", "sqrt", "cosine"])
def test_what_earlier_versions_stored_is_no_setting(process: str, schedule: str) -> None:
    """Ends of 0.0015 and 0.0195 stood in every configuration, and 0 means the schedule's own."""
    for start, end in ((0.0015, 0.0195), (0.0, 0.0)):
        group = base().diffusion
        group.update(process=process, prediction="v", start=start, end=end)
        if process == "discrete":
            group.schedule = schedule
        built = build_process(group)
        assert diffusion.build_loss(group, built).prediction == "v"
        if isinstance(built, DiscreteProcess) and not start:
            assert (built.start, built.end) == ENDS.get(schedule, (None, None))
