import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import prediction
from ldm_jax.diffusion.guidance import guided
from ldm_jax.diffusion.process import DiscreteProcess

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
T = jnp.asarray([5.0, 300.0, 990.0])
COND = {"vector": jnp.arange(6.0).reshape(3, 2), "crossattn": jnp.ones((3, 5, 2))}
NULL = {"vector": jnp.full((3, 2), -1.0), "crossattn": jnp.zeros((3, 5, 2))}


class Network:
    """A stand-in that depends on every input of its own row, and records the batches it is called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: jax.Array, t: jax.Array, cond: dict) -> jax.Array:
        self.batches.append(x.shape[0])
        bias = cond["vector"] + cond["crossattn"].sum(axis=1) + t[:, None] / 1000
        return jnp.sin(x + bias[:, None, None, :])


@pytest.mark.parametrize("scale", [3.0, -1.0, jnp.asarray(1.0), jnp.asarray([0.0, 1.0, 7.5])])
def test_guidance_is_its_formula_in_one_doubled_batch(scale: float | jax.Array) -> None:
    network = Network()
    result = guided(network, COND, NULL, scale)(X, T)
    assert network.batches == [6]
    conditional, unconditional = Network()(X, T, COND), Network()(X, T, NULL)
    per_image = jnp.broadcast_to(scale, 3).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(result, unconditional + per_image * (conditional - unconditional), atol=1e-6)


@pytest.mark.parametrize(("scale", "cond"), [(1.0, COND), (1, COND), (0.0, NULL), (0, NULL)])
def test_trivial_scales_do_no_doubled_work(scale: float, cond: dict) -> None:
    network = Network()
    np.testing.assert_array_equal(guided(network, COND, NULL, scale)(X, T), Network()(X, T, cond))
    assert network.batches == [3]


def test_guiding_eps_or_v_or_x0_is_the_same() -> None:
    process = DiscreteProcess()
    eps = {name: Network()(X, T, cond) for name, cond in (("cond", COND), ("null", NULL))}
    expected = prediction.to_x0("eps", process, guided(Network(), COND, NULL, 4.0)(X, T), X, T)
    for kind in ("v", "x0", "flow"):

        def network(x: jax.Array, t: jax.Array, cond: dict, kind: str = kind) -> jax.Array:
            pred = Network()(x, t, cond)
            return prediction.target(kind, process, prediction.to_x0("eps", process, pred, x, t), pred, t)

        found = prediction.to_x0(kind, process, guided(network, COND, NULL, 4.0)(X, T), X, T)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert not np.allclose(eps["cond"], eps["null"])


def test_combination_is_in_float32_and_t_may_be_a_scalar() -> None:
    def network(x: jax.Array, t: jax.Array, cond: dict) -> jax.Array:
        return Network()(x, t, cond).astype(jnp.bfloat16)

    for scale in (0.0, 1.0, 2.0):
        assert guided(network, COND, NULL, scale)(X, T).dtype == jnp.float32
    per_image = guided(Network(), COND, NULL, 2.0)(X, jnp.full(3, 5.0))
    np.testing.assert_array_equal(guided(Network(), COND, NULL, 2.0)(X, jnp.asarray(5.0)), per_image)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="one structure"):
        guided(Network(), COND, {"vector": NULL["vector"]}, 2.0)
    with pytest.raises(ValueError, match=r"cond\['vector'\] has shape \(3, 2\), null \(1, 2\)"):
        guided(Network(), COND, {**NULL, "vector": NULL["vector"][:1]}, 2.0)
    with pytest.raises(ValueError, match=r"scalar or one per image \[3\]"):
        guided(Network(), COND, NULL, jnp.ones(2))(X, T)
