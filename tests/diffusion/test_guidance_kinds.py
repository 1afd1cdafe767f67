"""The kinds of guidance beyond the plain formula, against their definitions written out."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import prediction
from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.guidance import Guidance, autoguided, classifier_guided, guided
from ldm_jax.diffusion.process import CosineProcess, DiscreteProcess
from ldm_jax.diffusion.samplers import Remembering, SamplerSettings, image_keys, initial_noise, sample

PROCESS = DiscreteProcess()
COND, NULL = jnp.asarray([0.5, -1.0, 2.0]), jnp.zeros(3)
X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))


def network(x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
    return jnp.tanh(x + cond.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000)


def plain(scale: float, x: jax.Array, t: jax.Array) -> jax.Array:
    return network(x, t, NULL) + scale * (network(x, t, COND) - network(x, t, NULL))


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_cfg_plus_plus_renoises_with_the_unguided_eps(eta: float) -> None:
    """arXiv 2406.08070, algorithm 2: x' = alpha' x_0(scale) + d eps(none) + s z."""
    settings, scale = SamplerSettings("ddim", 7, eta), 0.6
    grid = make_grid(PROCESS, settings.spacing, settings.steps)
    noise, keys = initial_noise(0, jnp.arange(3), (4, 4, 2)), image_keys(0, jnp.arange(3))
    denoise = guided(network, COND, NULL, scale, Guidance("cfg++"), PROCESS, "eps", grid, eta)
    found = sample(denoise, PROCESS, "eps", settings, noise, keys)
    x = noise
    for k, (i, j) in enumerate(itertools.pairwise(range(8))):
        a, s, b, r = grid.alpha[i], grid.sigma[i], grid.alpha[j], grid.sigma[j]
        std = eta * r * np.sqrt(max(s**2 - (a / b * r) ** 2, 0)) / s
        t = jnp.full(3, grid.t[i])
        x0 = (x - s * plain(scale, x, t)) / a
        fresh = jax.vmap(lambda key, k=k: jax.random.normal(jax.random.fold_in(key, k), (4, 4, 2)))(keys)
        x = b * x0 + np.sqrt(r**2 - std**2) * network(x, t, NULL) + std * fresh
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4 * float(jnp.abs(x).max()))


def test_outside_the_interval_there_is_no_guidance_and_no_doubled_work() -> None:
    low, high = 0.5, 5.0
    denoise: Any = guided(network, COND, NULL, 3.0, Guidance(interval=(low, high)), PROCESS)
    for t in (5.0, 400.0, 990.0):
        ratio = float(PROCESS.sigma(t) / PROCESS.alpha(t))
        times = jnp.full(3, t)
        expected = plain(3.0, X, times) if low < ratio <= high else network(X, times, COND)
        np.testing.assert_allclose(denoise(X, times), expected, atol=1e-6)
    branches = [e for e in jax.make_jaxpr(denoise)(X, jnp.full(3, 5.0)).eqns if e.primitive.name == "cond"]
    assert len(branches) == 1


def test_rescaling_brings_the_deviation_back() -> None:
    t = jnp.full(3, 500.0)
    wanted = network(X, t, COND)
    for share in (0.3, 1.0):
        denoise: Any = guided(network, COND, NULL, 5.0, Guidance(rescale=share))
        result = plain(5.0, X, t)
        factor = wanted.std(axis=(1, 2, 3), keepdims=True) / result.std(axis=(1, 2, 3), keepdims=True)
        np.testing.assert_allclose(denoise(X, t), share * factor * result + (1 - share) * result, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_projected_guidance_is_its_algorithm(kind: str) -> None:
    """arXiv 2410.02416, algorithm 1, over two calls, with momentum and a bound."""
    settings = Guidance("apg", parallel=0.2, radius=2.5, momentum=-0.5)
    denoise = guided(network, COND, NULL, 4.0, settings, PROCESS, kind)
    assert isinstance(denoise, Remembering)
    memory, running = denoise.initial(X), np.zeros(X.shape)
    for t in (700.0, 400.0):
        times = jnp.full(3, t)
        pred, memory = denoise.denoise(X, times, memory)
        good, other = (np.asarray(prediction.to_x0(kind, PROCESS, network(X, times, c), X, times), np.float64) for c in (COND, NULL))
        running = (good - other) - 0.5 * running
        for i in range(3):
            change = running[i] * min(1, 2.5 / np.linalg.norm(running[i]))
            unit = good[i] / np.linalg.norm(good[i])
            parallel = (change * unit).sum() * unit
            expected = good[i] + 3.0 * (change - parallel + 0.2 * parallel)
            found = prediction.to_x0(kind, PROCESS, pred, X, times)[i]
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_without_its_extras_projected_guidance_is_the_plain_one() -> None:
    t = jnp.full(3, 500.0)
    denoise: Any = guided(network, COND, NULL, 4.0, Guidance("apg"), PROCESS, "v")
    np.testing.assert_allclose(denoise(X, t), plain(4.0, X, t), rtol=1e-4, atol=1e-4)


def test_momentum_lives_through_the_sampler() -> None:
    noise, settings = initial_noise(0, jnp.arange(3), (4, 4, 2)), SamplerSettings("ddim", 6)

    def drawn(momentum: float) -> jax.Array:
        denoise = guided(network, COND, NULL, 4.0, Guidance("apg", momentum=momentum), PROCESS, "v")
        return sample(denoise, PROCESS, "v", settings, noise)

    assert float(jnp.abs(drawn(-0.5) - drawn(0.0)).max()) > 1e-2


def test_a_weak_model_guides() -> None:
    t = jnp.full(3, 300.0)
    denoise: Any = autoguided(lambda x, t: network(x, t, COND), lambda x, t: 0.5 * network(x, t, COND), 2.0)
    np.testing.assert_allclose(denoise(X, t), 1.5 * network(X, t, COND), rtol=1e-6)


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_a_classifier_moves_the_mean_to_that_of_the_class(kind: str) -> None:
    """Data N(0, 1) with a class seen through noise, p(y | x_0) = N(y; x_0, s^2): the guided x_0 is the posterior mean of both."""
    process, s, y, t = CosineProcess(), 0.7, 1.5, jnp.asarray([0.3, 0.6, 1.0])
    with jax.enable_x64(True):
        t = t.astype(jnp.float64)
        x = jax.random.normal(jax.random.key(1), (3, 2), jnp.float64)
        alpha, sigma = (f(t)[:, None] for f in (process.alpha, process.sigma))

        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            return prediction.target(kind, process, alpha * x, sigma * x, t)

        def log_prob(x: jax.Array, t: jax.Array) -> jax.Array:
            return (-0.5 * (y - alpha * x) ** 2 / (sigma**2 + s**2)).sum(axis=1)

        guided_pred = classifier_guided(denoise, log_prob, 1.0, process, kind)(x, t)
        found = prediction.to_x0(kind, process, guided_pred, x, t)
    alpha, sigma = (np.asarray(value, np.float64) for value in (alpha, sigma))
    expected = (alpha * np.asarray(x) / sigma**2 + y / s**2) / (1 + alpha**2 / sigma**2 + 1 / s**2)
    np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-8)
    assert bool(jnp.isfinite(guided_pred).all())


def test_settings_that_make_no_sense() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kind": "cgf"}, "unknown guidance 'cgf'"),
        ({"interval": (2.0, 1.0)}, "0 <= low < high"),
        ({"rescale": 1.5}, r"rescale must be in \[0, 1\]"),
        ({"momentum": -0.5}, "of guidance 'apg', not of 'cfg'"),
        ({"kind": "apg", "radius": -1.0}, "radius of 'apg'"),
        ({"kind": "apg", "momentum": -1.0}, "momentum between -1 and 1"),
        ({"kind": "cfg++", "rescale": 0.5}, r"guidance 'cfg\+\+' has no rescale"),
        ({"kind": "apg", "parallel": float("nan")}, "parallel of the guidance must be a finite number"),
        ({"kind": "apg", "momentum": float("nan")}, "momentum of the guidance must be a finite number"),
        ({"kind": "apg", "radius": float("inf")}, "radius of the guidance must be a finite number"),
        ({"rescale": float("nan")}, "rescale of the guidance must be a finite number"),
        ({"interval": (float("nan"), 1.0)}, "interval of the guidance must be a finite number"),
        ({"interval": (1.0, float("nan"))}, "0 <= low < high"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            Guidance(**arguments)
    with pytest.raises(ValueError, match="needs the process"):
        guided(network, COND, NULL, 3.0, Guidance("apg"))
    with pytest.raises(ValueError, match=r"'cfg\+\+' needs the grid"):
        guided(network, COND, NULL, 0.5, Guidance("cfg++"), PROCESS)
