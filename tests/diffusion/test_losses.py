import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import prediction
from ldm_jax.diffusion.losses import DiffusionLoss, TimeSampling, bucketed, loss_weight, noised, per_example, sample_times
from ldm_jax.diffusion.process import DiscreteProcess, FlowProcess

ZERO_SNR = DiscreteProcess("linear", 0.00085, 0.012, zero_terminal_snr=True)
KINDS = ["eps", "x0", "v", "flow"]


def test_stratified_times_fill_every_stratum() -> None:
    process = FlowProcess()
    for seed in range(5):
        u = sample_times(TimeSampling("stratified"), process, jax.random.key(seed), 64)
        np.testing.assert_allclose(np.diff(np.sort(u)), 1 / 64, atol=1e-6)
    first = jnp.stack([sample_times(TimeSampling("stratified"), process, jax.random.key(i), 8)[3] for i in range(200)])
    assert abs(float(first.mean()) - 0.5) < 4 * (1 / 12 / 200) ** 0.5


def test_uniform_times_hit_all_discrete_times_evenly() -> None:
    t = sample_times(TimeSampling(), DiscreteProcess(num_steps=10), jax.random.key(0), 20000)
    counts = np.bincount(np.asarray(t, int), minlength=10)
    assert counts.shape == (10,) and np.all(np.abs(counts - 2000) < 4 * (2000 * 0.9) ** 0.5)


def test_logit_normal_has_its_moments_and_the_shift_acts() -> None:
    settings = TimeSampling("logit_normal", mean=-0.5, std=0.8)
    t = sample_times(settings, FlowProcess(), jax.random.key(0), 20000)
    logit = np.log(t / (1 - t))
    assert abs(logit.mean() + 0.5) < 4 * 0.8 / 20000**0.5 and abs(logit.std() - 0.8) < 0.02
    shifted = sample_times(settings, FlowProcess(shift=3.0), jax.random.key(0), 20000)
    np.testing.assert_allclose(np.log(shifted / (1 - shifted)), logit + np.log(3), atol=2e-3)


def test_elementwise_losses_are_means_over_the_example() -> None:
    process, t = FlowProcess(), jnp.asarray([0.2, 0.9])
    x0, eps = jnp.zeros((2, 2, 2)), jnp.zeros((2, 2, 2))
    pred = jnp.asarray([[[0.5, -0.5], [0.5, 0.5]], [[2.0, 0.0], [0.0, -3.0]]])
    expected = {"l1": [0.5, 1.25], "l2": [0.25, 3.25], "huber": [0.25, (3 + 5) / 4]}
    for loss, value in expected.items():
        np.testing.assert_allclose(per_example(process, DiffusionLoss("eps", loss), pred, x0, eps, t), value, rtol=1e-6)
    assert per_example(process, DiffusionLoss(), pred.astype(jnp.bfloat16), x0, eps, t).dtype == jnp.float32


def test_min_snr_weights_are_the_published_ones() -> None:
    process, t = DiscreteProcess(), jnp.arange(0.0, 1000.0, 37.0)
    snr = np.exp(np.asarray(process.log_snr(np.asarray(t))))
    capped = np.minimum(snr, 5)
    for kind, expected in {"eps": capped / snr, "x0": capped, "v": capped / (snr + 1)}.items():
        weight = loss_weight(process, DiffusionLoss(kind, weighting="min_snr"), t)
        np.testing.assert_allclose(weight, expected, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_is_finite_at_both_ends(kind: str) -> None:
    settings = DiffusionLoss(kind, weighting="min_snr")
    at_zero_snr = float(loss_weight(ZERO_SNR, settings, jnp.asarray([999.0]))[0])
    assert at_zero_snr == {"eps": 1.0, "x0": 0.0, "v": 0.0, "flow": 0.0}[kind]
    ends = loss_weight(FlowProcess(), settings, jnp.asarray([0.0, 1.0]))
    assert bool(jnp.isfinite(ends).all())
    assert float(ends[0]) == {"eps": 0.0, "x0": 5.0, "v": 0.0, "flow": 0.0}[kind]
    near = loss_weight(FlowProcess(), settings, jnp.asarray([1e-6, 1 - 1e-6]))
    np.testing.assert_allclose(near, ends, atol=1e-4)


def test_min_snr_makes_all_predictions_one_objective() -> None:
    """The same x_0 estimate costs the same and has the same gradient whatever the network predicts."""
    process = DiscreteProcess()
    x0, eps, estimate = (jax.random.normal(key, (4, 6)) for key in jax.random.split(jax.random.key(0), 3))
    t = jnp.asarray([5.0, 200.0, 600.0, 900.0])
    x_t = noised(process, x0, eps, t)

    def loss(estimate: jax.Array, kind: str) -> jax.Array:
        implied = prediction.to_eps("x0", process, estimate, x_t, t)
        pred = prediction.target(kind, process, estimate, implied, t)
        return per_example(process, DiffusionLoss(kind, weighting="min_snr"), pred, x0, eps, t).sum()

    values, gradients = zip(*(jax.value_and_grad(loss)(estimate, kind) for kind in KINDS), strict=True)
    np.testing.assert_allclose(values, values[0], rtol=1e-4)
    for gradient in gradients[1:]:
        np.testing.assert_allclose(gradient, gradients[0], rtol=1e-3, atol=1e-4)


def test_noised_has_the_forward_marginal() -> None:
    process = DiscreteProcess()
    eps = jax.random.normal(jax.random.key(0), (20000, 1))
    t = jnp.full(20000, 400.0)
    x_t = noised(process, jnp.full((20000, 1), 2.0), eps, t)
    alpha, sigma = float(process.alpha(400.0)), float(process.sigma(400.0))
    assert abs(float(x_t.mean()) - 2 * alpha) < 4 * sigma / 20000**0.5
    assert float(x_t.std()) == pytest.approx(sigma, rel=0.03)


def test_buckets_partition_the_batch_and_contain_a_nan() -> None:
    loss = jnp.asarray([1.0, 2.0, 4.0, 8.0, jnp.nan])
    sums, counts = jax.jit(bucketed, static_argnums=2)(loss, jnp.asarray([0.0, 0.24, 0.25, 1.0, 0.6]), 4)
    np.testing.assert_array_equal(counts, [2, 1, 1, 1])
    np.testing.assert_array_equal(sums, [3, 4, np.nan, 8])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction": "noise"}, "unknown prediction 'noise'"),
        ({"loss": "mse"}, "unknown loss 'mse': choose one of l1, l2, huber"),
        ({"weighting": "snr"}, "unknown weighting 'snr': choose one of none, min_snr"),
        ({"gamma": 0.0}, "gamma of the diffusion loss must be positive"),
    ],
)
def test_bad_input(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(**settings)


def test_bad_time_sampling() -> None:
    with pytest.raises(ValueError, match="unknown time sampling 'lognormal'"):
        TimeSampling("lognormal")
    with pytest.raises(ValueError, match="std of the time sampling must be positive"):
        TimeSampling("logit_normal", std=0.0)
