import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.training.optimizer import decay_mask, make_optimizer, make_schedule

PEAK, WARMUP, STEPS, FINAL = 2e-4, 10, 110, 1e-5


def rate(schedule, n):
    return float(schedule(jnp.int32(n)))


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "inverse_sqrt"])
def test_warm_up_is_linear_to_the_peak(kind):
    schedule = make_schedule(kind, PEAK, WARMUP, STEPS, FINAL)
    for n in range(WARMUP):
        assert rate(schedule, n) == pytest.approx(PEAK * (n + 1) / WARMUP, rel=1e-6)
    assert rate(make_schedule(kind, PEAK, 0, STEPS), 0) == pytest.approx(PEAK)


CLOSED_FORMS = {
    "constant": lambda n: PEAK,
    "linear": lambda n: PEAK + (FINAL - PEAK) * (n - 10) / 100,
    "cosine": lambda n: FINAL + (PEAK - FINAL) * math.cos(math.pi * (n - 10) / 200) ** 2,
    "inverse_sqrt": lambda n: max(FINAL, PEAK * math.sqrt(10 / (n + 1))),
}


@pytest.mark.parametrize("kind", CLOSED_FORMS)
def test_closed_forms(kind):
    schedule = make_schedule(kind, PEAK, WARMUP, STEPS, FINAL)
    for n in (10, 11, 37, 60, 99, 110):
        assert rate(schedule, n) == pytest.approx(CLOSED_FORMS[kind](n), rel=1e-5)
    assert rate(schedule, 200) == pytest.approx(CLOSED_FORMS[kind](200 if kind == "inverse_sqrt" else 110), rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_start_holds_the_peak(kind):
    schedule = make_schedule(kind, PEAK, WARMUP, 100, decay_start=0.6)
    assert all(rate(schedule, n) == pytest.approx(PEAK) for n in range(WARMUP, 61))
    assert rate(schedule, 80) == pytest.approx(PEAK / 2, rel=1e-5)
    assert rate(schedule, 100) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("cosin", {}, "unknown learning-rate schedule 'cosin'; there are constant, cosine"),
        ("cosine", {"warmup": 5}, "needs more steps than warm-up"),
        ("linear", {"warmup": 5, "steps": 5}, "needs more steps than warm-up; steps=5, warmup=5"),
        ("constant", {"warmup": -1}, "may be negative"),
        ("linear", {"steps": 5, "decay_start": 1.0}, "decay_start must be below 1"),
    ],
)
def test_bad_schedules(kind, arguments, message):
    with pytest.raises(UserError, match=message):
        make_schedule(kind, 1e-3, **arguments)


PARAMS = {"dense": {"kernel": jnp.full((4, 3), 2.0), "bias": jnp.full((3,), 2.0)}, "norm": {"scale": jnp.full((2, 3), 2.0)}}


def test_decay_acts_on_kernels_only():
    assert decay_mask(PARAMS) == {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    tx = make_optimizer("adamw", make_schedule("constant", 0.1), weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    assert not np.any(updates["dense"]["bias"]) and not np.any(updates["norm"]["scale"])


def adamw_in_numpy(p, grads, rates, b1, b2, eps, decay, clip):
    m = v = np.zeros_like(p)
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        g = g * min(1.0, clip / np.linalg.norm(g))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p)
    return p


def test_adamw_equals_its_definition():
    rng = np.random.default_rng(0)
    p, grads = rng.normal(size=(5, 4)), rng.normal(size=(12, 5, 4))
    schedule = make_schedule("cosine", 1e-2, 4, 12)
    tx = make_optimizer("adamw", schedule, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, clip_norm=3.0)
    params = {"kernel": jnp.asarray(p, jnp.float32)}
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    expected = adamw_in_numpy(p, grads, [rate(schedule, n) for n in range(12)], 0.8, 0.95, 1e-6, 0.1, 3.0)
    np.testing.assert_allclose(params["kernel"], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("sgd", {}, "unknown optimiser 'sgd'; there are adamw, adam"),
        ("adam", {"weight_decay": 0.1}, "has no effect on 'adam'"),
        ("adamw", {"clip_norm": -1.0}, "must not be negative"),
    ],
)
def test_bad_optimizers(kind, arguments, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(kind, make_schedule("constant", 1e-3), **arguments)
