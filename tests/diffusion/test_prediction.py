import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.diffusion import prediction
from ldm_jax.diffusion.losses import noised
from ldm_jax.diffusion.process import CosineProcess, DiscreteProcess, FlowProcess, Process, SigmaProcess

PROCESSES = [DiscreteProcess(), DiscreteProcess("linear", 0.00085, 0.012, zero_terminal_snr=True), FlowProcess()]
PROCESSES += [CosineProcess(0.5), SigmaProcess(sigma_data=0.5)]
KINDS = ["eps", "x0", "v", "flow", "edm"]


def _data(shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, jax.Array]:
    return tuple(jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0)))


@pytest.mark.parametrize("process", PROCESSES)
def test_targets_are_their_definitions(process: Process) -> None:
    x0, eps = _data((3, 4, 4, 2))
    t = process.time_at(jnp.asarray([0.0, 0.4, 1.0]))
    alpha, sigma = (f(t).reshape(3, 1, 1, 1) for f in (process.alpha, process.sigma))
    s = getattr(process, "sigma_data", 1.0)
    size = jnp.sqrt(sigma**2 + alpha**2 * s**2)
    expected = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0, "edm": (sigma * x0 / s - alpha * s * eps) / size}
    for kind in KINDS:
        np.testing.assert_allclose(prediction.target(kind, process, x0, eps, t), expected[kind], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", PROCESSES)
@settings(max_examples=12, deadline=None)
@given(fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**30))
def test_conversions_invert(kind: str, process: Process, fraction: float, seed: int) -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x0, eps = jnp.asarray(rng.normal(size=(2, 3))), jnp.asarray(rng.normal(size=(2, 3)))
        t = process.time_at(jnp.asarray([fraction, fraction]))
        pred = prediction.target(kind, process, x0, eps, t)
        x_t = noised(process, x0, eps, t)
        assert x_t.dtype == jnp.float64
        regular = float(process.alpha(t)[0]) > 0 or kind != "eps"
        np.testing.assert_allclose(prediction.to_x0(kind, process, pred, x_t, t), x0 if regular else 0 * x0, atol=1e-8)
        np.testing.assert_allclose(prediction.to_eps(kind, process, pred, x_t, t), eps, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_are_finite_and_have_the_documented_limits(kind: str) -> None:
    process = FlowProcess()
    x0, eps = _data((2, 5))
    t = jnp.asarray([0.0, 1.0])
    x_t = noised(process, x0, eps, t)
    pred = prediction.target(kind, process, x0, eps, t)
    found_x0, found_eps = prediction.solve(kind, process.alpha(t), process.sigma(t), pred, x_t)
    expected_x0 = x0.at[1].set(0) if kind == "eps" else x0
    expected_eps = eps.at[0].set(0) if kind == "x0" else eps
    np.testing.assert_allclose(found_x0, expected_x0, atol=1e-6)
    np.testing.assert_allclose(found_eps, expected_eps, atol=1e-6)

    def total(pred: jax.Array) -> jax.Array:
        return sum(part.sum() for part in prediction.solve(kind, process.alpha(t), process.sigma(t), pred, x_t))

    assert bool(jnp.isfinite(jax.grad(total)(pred)).all())


def test_half_precision_is_lifted_and_unknown_names_refused() -> None:
    x0, eps = _data((2, 5), jnp.bfloat16)
    process = DiscreteProcess()
    t = jnp.asarray([3.0, 900.0])
    assert prediction.target("v", process, x0, eps, t).dtype == jnp.float32
    assert prediction.to_x0("v", process, x0, eps, t).dtype == jnp.float32
    with pytest.raises(ValueError, match="unknown prediction 'score': choose one of eps, x0, v, flow, edm"):
        prediction.target("score", process, x0, eps, t)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 80.0])
def test_edm_is_the_network_inside_the_preconditioning(sigma: float) -> None:
    """arXiv 2206.00364, table 1: D(x) = c_skip x + c_out F(c_in x), and F's target has unit variance."""
    s = 0.5
    process = SigmaProcess(sigma_data=s)
    x0, eps = _data((20000, 1))
    x0, t = s * x0, jnp.full(20000, sigma)
    x_t, pred = noised(process, x0, eps, t), prediction.target("edm", process, x0, eps, t)
    c_skip, c_out = s**2 / (sigma**2 + s**2), sigma * s / np.hypot(sigma, s)
    np.testing.assert_allclose(c_skip * x_t + c_out * pred, x0, atol=3e-5)
    assert float(pred.std()) == pytest.approx(1, rel=0.03)
    assert float((process.input_scale(t)[:, None] * x_t).std()) == pytest.approx(1, rel=0.03)


def test_edm_is_minus_v_where_variance_is_preserved() -> None:
    process, (x0, eps), t = DiscreteProcess(), _data((2, 5)), jnp.asarray([3.0, 900.0])
    np.testing.assert_allclose(prediction.target("edm", process, x0, eps, t), -prediction.target("v", process, x0, eps, t), atol=1e-6)
