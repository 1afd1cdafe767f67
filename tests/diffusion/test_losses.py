import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import prediction
from ldm_jax.diffusion.losses import (
    WEIGHTINGS,
    DiffusionLoss,
    bound_weight,
    bucketed,
    loss_weight,
    noised,
    per_example,
    training_noise,
)
from ldm_jax.diffusion.process import CosineProcess, DiscreteProcess, FlowProcess, Process, SigmaProcess
from ldm_jax.diffusion.times import TimeSampling, sample_times

ZERO_SNR = DiscreteProcess("linear", 0.00085, 0.012, zero_terminal_snr=True)
NUMBERS, NOT_FINITE = ("gamma", "weight_offset", "vlb_weight", "huber_delta"), (float("nan"), float("inf"))
KINDS = ["eps", "x0", "v", "flow", "edm"]


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
        np.testing.assert_allclose(per_example(process, DiffusionLoss("eps", loss), pred, x0, eps, t)[0], value, rtol=1e-6)
    assert per_example(process, DiffusionLoss(), pred.astype(jnp.bfloat16), x0, eps, t)[0].dtype == jnp.float32


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
    assert at_zero_snr == {"eps": 1.0, "x0": 0.0, "v": 0.0, "flow": 0.0, "edm": 0.0}[kind]
    ends = loss_weight(FlowProcess(), settings, jnp.asarray([0.0, 1.0]))
    assert bool(jnp.isfinite(ends).all())
    assert float(ends[0]) == {"eps": 0.0, "x0": 5.0, "v": 0.0, "flow": 0.0, "edm": 0.0}[kind]
    near = loss_weight(FlowProcess(), settings, jnp.asarray([1e-6, 1 - 1e-6]))
    np.testing.assert_allclose(near, ends, atol=1e-4)


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "none"])
def test_a_weighting_makes_all_predictions_one_objective(weighting: str) -> None:
    """The same x_0 estimate costs the same and has the same gradient whatever the network predicts."""
    process = DiscreteProcess()
    x0, eps, estimate = (jax.random.normal(key, (4, 6)) for key in jax.random.split(jax.random.key(0), 3))
    t = jnp.asarray([5.0, 200.0, 600.0, 900.0])
    x_t = noised(process, x0, eps, t)

    def loss(estimate: jax.Array, kind: str) -> jax.Array:
        implied = prediction.to_eps("x0", process, estimate, x_t, t)
        pred = prediction.target(kind, process, estimate, implied, t)
        return per_example(process, DiffusionLoss(kind, weighting=weighting), pred, x0, eps, t)[0].sum()

    with jax.enable_x64(True):
        x0, eps, estimate, t, x_t = (jnp.asarray(value, jnp.float64) for value in (x0, eps, estimate, t, x_t))
        x_t = noised(process, x0, eps, t)
        values, gradients = zip(*(jax.value_and_grad(loss)(estimate, kind) for kind in KINDS), strict=True)
    np.testing.assert_allclose(values, values[0], rtol=1e-5)
    for gradient in gradients[1:]:
        np.testing.assert_allclose(gradient, gradients[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow", "edm"])
def test_every_prediction_has_the_same_minimiser(kind: str) -> None:
    """For data of two values the best constant prediction given (x_t, t), found by least squares, is the posterior mean of x_0."""
    process, t = DiscreteProcess(), 500.0
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    with jax.enable_x64(True):
        x_t, values = jnp.asarray([[0.3]]), jnp.asarray([[1.0], [-1.0]])
        noise = (x_t - alpha * values) / sigma
        weight = jax.nn.softmax(-0.5 * noise[:, 0] ** 2)  # p(x_0 | x_t)

        def loss(pred: jax.Array) -> jax.Array:
            both = jnp.broadcast_to(pred, values.shape)
            return (weight * per_example(process, DiffusionLoss(kind), both, values, noise, jnp.full(2, t))[0]).sum()

        start = jnp.zeros((1, 1))
        best = start - jax.grad(loss)(start) / jax.hessian(loss)(start).reshape(1, 1)
        found = prediction.to_x0(kind, process, best, x_t, jnp.asarray([t]))
        np.testing.assert_allclose(found, (weight * values[:, 0]).sum(), rtol=1e-9)


def test_weightings_are_the_published_ones() -> None:
    process, t = DiscreteProcess(), jnp.arange(1.0, 1000.0, 37.0)
    snr = np.exp(np.asarray(process.log_snr(np.asarray(t))))
    on_eps = {
        "soft_min_snr": (DiffusionLoss(weighting="soft_min_snr"), 5 / (snr + 5)),
        "p2": (DiffusionLoss(weighting="p2", gamma=1.5, weight_offset=2.0), (2 + snr) ** -1.5),
    }
    for settings, expected in on_eps.values():
        np.testing.assert_allclose(loss_weight(process, settings, t), expected, rtol=2e-4)
    edm = SigmaProcess(sigma_data=0.5)
    sigma = jnp.asarray([0.002, 0.5, 80.0])
    expected = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    np.testing.assert_allclose(loss_weight(edm, DiffusionLoss("x0", weighting="edm"), sigma), expected, rtol=1e-5)
    np.testing.assert_allclose(loss_weight(edm, DiffusionLoss("edm", weighting="edm"), sigma), 1.0, rtol=1e-5)


def test_the_bound_has_the_weights_of_the_published_code() -> None:
    """beta^2/(2 posterior variance alpha (1 - alpha-bar)) on eps, the first as the second, added to what is there."""
    process = DiscreteProcess(num_steps=20)
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 20) ** 2
    bar = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], bar[:-1]])
    with np.errstate(divide="ignore"):
        expected = betas**2 / (2 * betas * (1 - before) / (1 - bar) * (1 - betas) * (1 - bar))
    settings = DiffusionLoss(vlb_weight=0.1)
    with jax.enable_x64(True):
        weight = bound_weight(process, settings, jnp.arange(20.0))
    np.testing.assert_allclose(weight[1:], 0.1 * expected[1:], rtol=1e-8)
    assert np.isfinite(weight[0])
    t, x0 = jnp.asarray([3.0, 9.0]), jnp.ones((2, 4))
    weighted, bound = per_example(process, settings, 3 * x0, x0, x0, t)
    np.testing.assert_allclose(weighted, 4.0, rtol=1e-6)
    np.testing.assert_allclose(bound, 0.4 * expected[[3, 9]], rtol=1e-4)
    np.testing.assert_array_equal(per_example(FlowProcess(), DiffusionLoss(), x0, x0, x0, t / 20)[1], 0)
    with pytest.raises(ValueError, match="vlb_weight is of discrete processes"):
        bound_weight(FlowProcess(), settings, jnp.asarray([0.5]))


@pytest.mark.parametrize("offset", [-800.0, -1.0, 0.0, 2.0, 800.0])
def test_the_sigmoid_weight_counts_every_log_snr_alike(offset: float) -> None:
    """On eps it is sigmoid(b - lambda) over the density of lambda: so a function of lambda has one mean, whatever the process."""
    settings = DiffusionLoss(weighting="sigmoid", weight_offset=offset)
    fractions = (np.arange(200_000) + 0.5) / 200_000
    expected = np.trapezoid(lambdas_weight := _sigmoid(np.clip(offset, -60, 60) - (grid := np.linspace(-4, 4, 20_001))), grid)
    assert lambdas_weight.min() >= 0
    processes: list[Process] = [FlowProcess(), FlowProcess(3.0), CosineProcess(), CosineProcess(0.5), SigmaProcess(), SigmaProcess(rho=0.0)]
    for process in [*processes, DiscreteProcess(), ZERO_SNR, DiscreteProcess("cosine")]:
        t = process.time_at(fractions)
        within = np.abs(process.log_snr(t)) < 4
        with jax.enable_x64(True):
            mean = float((jnp.asarray(loss_weight(process, settings, t)) * within).mean())
        assert mean == pytest.approx(expected, rel=5e-3, abs=1e-12)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [-800.0, 800.0])
def test_a_far_offset_is_finite_at_both_ends(kind: str, offset: float) -> None:
    settings = DiffusionLoss(kind, weighting="sigmoid", weight_offset=offset)
    for process in (ZERO_SNR, FlowProcess(), CosineProcess(), SigmaProcess()):
        weight = loss_weight(process, settings, jnp.asarray([process.t_min, process.t_max]))
        assert bool(jnp.isfinite(weight).all()) and float(weight.min()) >= 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_finite_at_both_ends(weighting: str, kind: str) -> None:
    for process, ends in ((ZERO_SNR, [0.0, 999.0]), (FlowProcess(), [0.0, 1.0])):
        weight = loss_weight(process, DiffusionLoss(kind, weighting=weighting), jnp.asarray(ends))
        assert bool(jnp.isfinite(weight).all()) and float(weight.min()) >= 0


def test_offset_and_perturbation_of_the_noise() -> None:
    key, shape = jax.random.key(0), (2000, 4, 4, 3)
    plain, same = training_noise(key, shape, jnp.float32, 0.0, 0.0)
    np.testing.assert_array_equal(plain, jax.random.normal(key, shape))
    np.testing.assert_array_equal(plain, same)
    eps, in_state = training_noise(key, shape, jnp.float32, 0.5, 0.1)
    means = np.asarray(eps.mean(axis=(1, 2)))
    assert means.std() == pytest.approx((0.25 + 1 / 16) ** 0.5, rel=0.05)
    assert abs(np.corrcoef(means.T)[0, 1]) < 0.1  # each channel has its own
    extra = np.asarray(in_state - eps)
    assert extra.std() == pytest.approx(0.1, rel=0.02) and abs(np.corrcoef(extra.ravel(), eps.ravel())[0, 1]) < 0.02


def test_mode_and_log_normal_times() -> None:
    u = np.asarray(sample_times(TimeSampling("mode", mode_scale=1.29), FlowProcess(), jax.random.key(0), 20000))
    v = np.sort(np.linspace(0, 1, 20001))
    expected = 1 - v - 1.29 * (np.cos(np.pi / 2 * v) ** 2 - 1 + v)
    assert abs(np.quantile(u, [0.1, 0.5, 0.9]) - np.quantile(expected, [0.1, 0.5, 0.9])).max() < 0.02
    sigma = sample_times(TimeSampling("log_normal", -1.5, 1.1), SigmaProcess(), jax.random.key(0), 20000)
    log = np.log(np.asarray(sigma))
    assert abs(log.mean() + 1.5) < 4 * 1.1 / 20000**0.5 and abs(log.std() - 1.1) < 0.03
    t = np.asarray(sample_times(TimeSampling("log_normal", -1.2, 1.2), DiscreteProcess(), jax.random.key(0), 20000))
    ratio = DiscreteProcess().sigma(t) / DiscreteProcess().alpha(t)
    assert abs(np.median(np.log(ratio)) + 1.2) < 0.05
    np.testing.assert_array_equal(t, np.round(t))
    assert t.min() >= 0 and t.max() <= 999


@pytest.mark.parametrize(("kind", "mean", "std"), [("edm", -1.2, 1.2), ("edm2", -0.4, 1.0)])
def test_published_laws_of_noise_follow_the_data(kind: str, mean: float, std: float) -> None:
    """Their numbers for data of standard deviation 0.5, and the same law in units of the data for any other."""
    for data in (0.5, 1.0, 2.0):
        process = SigmaProcess(1e-4, 1e4, sigma_data=data)
        log = np.log(np.asarray(sample_times(TimeSampling(kind), process, jax.random.key(0), 20000)) * 0.5 / data)
        assert abs(log.mean() - mean) < 4 * std / 20000**0.5 and abs(log.std() - std) < 0.03


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
        ({"weighting": "snr"}, "unknown weighting 'snr': choose one of none, min_snr, soft_min_snr, p2, edm, sigmoid"),
        ({"gamma": 0.0}, "gamma of the diffusion loss must be positive"),
        *(({name: value}, f"{name} of the diffusion loss must be a finite number") for name in NUMBERS for value in NOT_FINITE),
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
    for name in ("mean", "std", "mode_scale"):
        for value in NOT_FINITE:
            with pytest.raises(ValueError, match=f"{name} of the time sampling must be a finite number"):
                TimeSampling(**{name: value})
