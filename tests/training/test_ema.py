import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.training import ema

DECAYS = (0.999, 0.5, 0.0)


def test_equals_the_definition_with_warm_up():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(40, 3, 2))
    emas = ema.init({"w": jnp.asarray(weights[0], jnp.float32)}, DECAYS)
    assert set(emas) == {"0.999", "0.5", "0.0"}
    expected = dict.fromkeys(emas, weights[0])
    step = jax.jit(lambda e, p, n: ema.update(e, p, n, DECAYS))
    for n in range(1, 40):
        emas = step(emas, {"w": jnp.asarray(weights[n], jnp.float32)}, n)
        for decay in DECAYS:
            d = min(decay, (1 + n) / (10 + n))
            expected[str(decay)] = d * expected[str(decay)] + (1 - d) * weights[n]
    for key, value in expected.items():
        assert emas[key]["w"].dtype == jnp.float32
        np.testing.assert_allclose(emas[key]["w"], value, rtol=2e-5, atol=1e-6)


def test_copies_may_be_donated_with_the_parameters():
    params = {"w": jnp.ones(3)}
    step = jax.jit(lambda p, e: (p, ema.update(e, p, 1, (0.9, 0.99))), donate_argnums=(0, 1))
    _, emas = step(params, ema.init(params, (0.9, 0.99)))
    np.testing.assert_array_equal(emas["0.9"]["w"], 1.0)


@pytest.mark.parametrize("decays", [(1.0,), (-0.1,), (0.9, 0.9)])
def test_bad_decays(decays):
    with pytest.raises(UserError, match="EMA decays"):
        ema.init({}, decays)
