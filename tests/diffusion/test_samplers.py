import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.prediction import target
from ldm_jax.diffusion.process import DiscreteProcess, FlowProcess, Process, expand
from ldm_jax.diffusion.samplers import SamplerSettings, image_keys, initial_noise, sample

DISCRETE, FLOW = DiscreteProcess(), FlowProcess()
MEAN, STD = 0.7, 0.4


def timesteps(process: Process, settings: SamplerSettings) -> np.ndarray:
    return make_grid(process, settings.spacing, settings.steps).t


def gaussian(process: Process, kind: str, x: jax.Array, t: jax.Array) -> jax.Array:
    """The optimal prediction for data N(MEAN, STD^2)."""
    alpha, sigma = expand(process.alpha(t), x), expand(process.sigma(t), x)
    residual = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    return target(kind, process, MEAN + alpha * STD**2 * residual, sigma * residual, t)


def exact_flow(noise: np.ndarray) -> np.ndarray:
    """Where the ODE of rectified flow takes pure noise for Gaussian data."""
    return MEAN + STD * noise


def network(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.tanh(1.3 * x + 0.2 * jnp.cos(t / 100).reshape(-1, *(1,) * (x.ndim - 1)))


@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        ("leading", 4, [750, 500, 250, 0, -1]),
        ("leading", 3, [666, 333, 0, -1]),
        ("trailing", 4, [999, 749, 499, 249, -1]),
        ("trailing", 1, [999, -1]),
        ("linspace", 4, [999, 666, 333, 0, -1]),
        ("linspace", 1, [999, -1]),
    ],
)
def test_discrete_grids(spacing: str, steps: int, expected: list[int]) -> None:
    np.testing.assert_array_equal(timesteps(DISCRETE, SamplerSettings(steps=steps, spacing=spacing)), expected)


def test_flow_grids() -> None:
    for spacing in ("trailing", "linspace"):
        np.testing.assert_allclose(timesteps(FLOW, SamplerSettings(steps=4, spacing=spacing)), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(timesteps(FlowProcess(3.0), SamplerSettings(steps=2)), [1, 0.75, 0])


@settings(max_examples=200)
@given(steps=st.integers(1, 1000), spacing=st.sampled_from(["leading", "trailing", "linspace"]))
def test_any_step_count_is_honoured_and_grids_descend(steps: int, spacing: str) -> None:
    times = timesteps(DISCRETE, SamplerSettings(steps=steps, spacing=spacing))
    assert times.shape == (steps + 1,) and np.all(np.diff(times) < 0)
    assert times[0] <= 999 and times[-2] >= 0 and times[-1] == -1
    np.testing.assert_array_equal(times, np.round(times))


@pytest.mark.parametrize(("steps", "eta"), [(1, 0.0), (7, 0.6), (20, 0.0), (20, 1.0)])
def test_ddim_is_the_published_formula(steps: int, eta: float) -> None:
    """Song et al. (arXiv 2010.02502), eq. 12 and 16, written with alpha-bar in a plain loop."""
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    noise, keys = initial_noise(0, jnp.arange(2), (3, 3, 1)), image_keys(0, jnp.arange(2))
    config = SamplerSettings("ddim", steps, eta, "leading")
    x = np.asarray(noise, np.float64)
    times = list(range(0, 1000 // steps * steps, 1000 // steps))[::-1]
    for k, t in enumerate(times):
        a, a_next = alpha_bar[t], alpha_bar[times[k + 1]] if k + 1 < steps else 1.0
        eps = np.asarray(network(jnp.asarray(x, jnp.float32), jnp.full(2, float(t))), np.float64)
        std = eta * np.sqrt((1 - a_next) / (1 - a)) * np.sqrt(1 - a / a_next)
        fresh = np.stack([jax.random.normal(jax.random.fold_in(key, k), (3, 3, 1)) for key in keys])
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        x = np.sqrt(a_next) * x0 + np.sqrt(1 - a_next - std**2) * eps + std * fresh
    found = jax.jit(lambda noise: sample(network, DISCRETE, "eps", config, noise, keys))(noise)
    np.testing.assert_allclose(found, x, rtol=2e-4, atol=2e-4 * np.abs(x).max())


def test_ddim_and_euler_on_flow_are_the_plain_euler_loop() -> None:
    noise = initial_noise(1, jnp.arange(2), (4,))
    x, times = noise, np.linspace(1, 0, 11)
    for now, following in itertools.pairwise(times):
        x = x + (following - now) * network(x, jnp.full(2, now))
    for kind in ("ddim", "euler"):
        np.testing.assert_allclose(sample(network, FLOW, "flow", SamplerSettings(kind, 10), noise), x, rtol=1e-5, atol=1e-5)


def test_ddpm_is_ancestral_sampling_with_the_posterior() -> None:
    """One full-length step equals the posterior q(x_{t-1} | x_t, x_0) of Ho et al. (arXiv 2006.11239), eq. 6 and 7."""
    process = DiscreteProcess(num_steps=2, start=0.2, end=0.5)
    noise, keys = initial_noise(0, jnp.arange(3), (2,)), image_keys(0, jnp.arange(3))
    x0 = jnp.full((3, 2), 0.3)
    beta, alpha_bar = np.array([0.2, 0.5]), np.cumprod([0.8, 0.5])
    mean = np.sqrt(alpha_bar[0]) * beta[1] / (1 - alpha_bar[1]) * x0
    mean += np.sqrt(1 - beta[1]) * (1 - alpha_bar[0]) / (1 - alpha_bar[1]) * noise
    variance = (1 - alpha_bar[0]) / (1 - alpha_bar[1]) * beta[1]
    fresh = jnp.stack([jax.random.normal(jax.random.fold_in(key, 0), (2,)) for key in keys])
    expected = mean + np.sqrt(variance) * fresh

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.where(t[:, None] == 1, x0, x)  # the second answer shows what it was given

    found = sample(denoise, process, "x0", SamplerSettings("ddpm", 2), noise, keys)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def affine_moments(process: Process, times: np.ndarray, eta: float) -> tuple[float, float]:
    """Mean and standard deviation of generalised DDIM's samples of Gaussian data, whose steps are affine in x."""
    mean, variance = 0.0, 1.0
    for t, t_next in itertools.pairwise(times):
        alpha, sigma, alpha_next, sigma_next = (float(f(u)) for u in (t, t_next) for f in (process.alpha, process.sigma))
        std = eta * sigma_next / sigma * np.sqrt(sigma**2 - (alpha * sigma_next / alpha_next) ** 2)
        gain = alpha_next * alpha * STD**2 + np.sqrt(sigma_next**2 - std**2) * sigma
        gain /= alpha**2 * STD**2 + sigma**2
        mean, variance = alpha_next * MEAN + gain * (mean - alpha * MEAN), gain**2 * variance + std**2
    return mean, float(np.sqrt(variance))


@pytest.mark.parametrize(
    ("process", "kind", "config", "eta"),
    [
        *((DISCRETE, kind, SamplerSettings("ddpm", 100), 1.0) for kind in ("eps", "x0", "v", "flow")),
        (DISCRETE, "eps", SamplerSettings("ddim", 100), 0.0),
        (DISCRETE, "v", SamplerSettings("ddim", 100, eta=0.5, spacing="linspace"), 0.5),
        (FLOW, "flow", SamplerSettings("ddpm", 100), 1.0),
        (FlowProcess(shift=2.0), "v", SamplerSettings("ddim", 100, eta=0.7), 0.7),
    ],
)
def test_gaussian_data_come_out_with_the_moments_of_theory(process: Process, kind: str, config: SamplerSettings, eta: float) -> None:
    count = 20000
    noise, keys = initial_noise(0, jnp.arange(count), (1,)), image_keys(0, jnp.arange(count))
    run = jax.jit(lambda noise: sample(functools.partial(gaussian, process, kind), process, kind, config, noise, keys))
    x = np.asarray(run(noise), np.float64)
    mean, std = affine_moments(process, timesteps(process, config), eta)
    assert abs(x.mean() - mean) < 4 * std / count**0.5
    assert abs(x.std() - std) < 4 * std / (2 * count) ** 0.5
    errors = []
    for steps in (100, 1000):
        mean, std = affine_moments(process, timesteps(process, dataclasses.replace(config, steps=steps)), eta)
        errors.append(abs(std - STD))
        assert mean == pytest.approx(MEAN, abs=0.005)  # the discrete process keeps 1 % of signal at its last time
    assert errors[1] < errors[0] / 4 and errors[1] < 0.02 * STD


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("flow_heun", 2)])
@pytest.mark.parametrize("process", [FLOW, FlowProcess(shift=2.0)])
def test_error_falls_at_the_order_of_the_solver(sampler: str, order: int, process: FlowProcess) -> None:
    with jax.enable_x64(True):
        noise = jnp.asarray([[-1.5], [0.3], [2.0]])
        counts, errors = [64, 128, 256], []
        for steps in counts:
            found = sample(functools.partial(gaussian, process, "flow"), process, "flow", SamplerSettings(sampler, steps), noise)
            assert found.dtype == jnp.float64
            errors.append(np.abs(found - exact_flow(np.asarray(noise))).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


def test_zero_terminal_snr_starts_from_pure_noise() -> None:
    """With v-prediction and trailing spacing, the discrete process carries N(0, 1) exactly onto the data."""
    process = DiscreteProcess("linear", 0.00085, 0.012, zero_terminal_snr=True)
    noise = jnp.asarray([[-1.5], [0.3], [2.0]])
    found = sample(functools.partial(gaussian, process, "v"), process, "v", SamplerSettings("flow_heun", 1000), noise)
    np.testing.assert_allclose(found, exact_flow(np.asarray(noise)), atol=3e-3)


CALLS = {"ddim": 13, "ddpm": 13, "euler": 13, "heun": 25, "flow_heun": 25, "plms": 14, "lms": 13, "dpmpp_3m": 13, "unipc": 13}


@pytest.mark.parametrize(("sampler", "calls"), CALLS.items())
def test_number_of_network_calls(sampler: str, calls: int) -> None:
    seen: list[float] = []

    def counted(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return network(x, t)

    config = SamplerSettings(sampler, 13)
    result = sample(counted, DISCRETE, "eps", config, initial_noise(0, jnp.arange(2), (4,)), image_keys(0, jnp.arange(2)))
    result.block_until_ready()
    jax.effects_barrier()
    assert len(seen) == calls
    assert sorted(set(seen), reverse=True) == list(timesteps(DISCRETE, config)[:-1])


def test_it_is_one_scan_of_as_many_iterations_as_steps() -> None:
    config = SamplerSettings("ddim", 37)
    jaxpr = jax.make_jaxpr(lambda noise: sample(network, DISCRETE, "eps", config, noise))(jnp.zeros((2, 4)))
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [37]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun"])
def test_an_image_does_not_depend_on_its_batch(sampler: str) -> None:
    config = SamplerSettings(sampler, 6)

    @jax.jit
    def draw(indices: jax.Array) -> jax.Array:
        noise = initial_noise(5, indices, (2, 2, 3))
        return sample(network, DISCRETE, "v", config, noise, image_keys(5, indices))

    together = draw(jnp.arange(4))
    np.testing.assert_allclose(draw(jnp.asarray([2, 0])), together[jnp.asarray([2, 0])], rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(together[0] - together[1]).max()) > 0.1


def test_noise_on_the_way_is_independent_of_the_first() -> None:
    indices = jnp.arange(4000)
    first = np.asarray(initial_noise(0, indices, ()))
    later = np.asarray(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0)))(image_keys(0, indices)))
    assert abs(np.corrcoef(first, later)[0, 1]) < 4 / 4000**0.5
    assert not np.allclose(first, initial_noise(1, indices, ()))


@pytest.mark.parametrize("process", [DISCRETE, FLOW])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "flow_heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc"])
def test_the_last_step_lands_on_x0(process: Process, sampler: str) -> None:
    x0 = jnp.asarray([[0.25, -2.0], [1.0, 0.125]])
    noise, keys = initial_noise(0, jnp.arange(2), (2,)), image_keys(0, jnp.arange(2))
    found = sample(lambda x, t: x0, process, "x0", SamplerSettings(sampler, 5), noise, keys)
    np.testing.assert_allclose(found, x0, rtol=3e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dimm"}, "unknown sampler 'dimm': choose one of ddim, ddpm, euler, euler_ancestral, heun, "),
        ({"spacing": "karass"}, "unknown spacing 'karass': choose one of leading, trailing, linspace, "),
        ({"steps": 0}, "at least 1 step"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\]"),
        ({"kind": "euler", "eta": 0.5}, "sampler 'euler' has no eta"),
        ({"kind": "ddpm", "eta": 0.5}, "sampler 'ddpm' has no eta"),
    ],
)
def test_settings_that_make_no_sense(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerSettings(**arguments)


def test_combinations_that_make_no_sense() -> None:
    noise = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="1001 sampling steps, but the process has only 1000 times"):
        timesteps(DISCRETE, SamplerSettings(steps=1001))
    with pytest.raises(ValueError, match="'leading' never visits pure noise on a continuous process"):
        timesteps(FLOW, SamplerSettings(spacing="leading"))
    with pytest.raises(ValueError, match="'eps' does not determine x_0 at t=1"):
        sample(network, FLOW, "eps", SamplerSettings(), noise)
    with pytest.raises(ValueError, match="sampler 'ddpm' adds noise: give keys, one per image"):
        sample(network, DISCRETE, "eps", SamplerSettings("ddpm"), noise)
    with pytest.raises(ValueError, match="one per image"):
        sample(network, DISCRETE, "eps", SamplerSettings("ddim", eta=1.0), noise, image_keys(0, jnp.arange(3)))
