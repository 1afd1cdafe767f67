import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_jax.diffusion import schedules
from ldm_jax.diffusion.process import DiscreteProcess, FlowProcess, expand, make_process

DISCRETE = [
    DiscreteProcess(),
    DiscreteProcess("linear", 0.00085, 0.012),
    DiscreteProcess("linear_beta", num_steps=100),
    DiscreteProcess("cosine"),
    DiscreteProcess("linear", 0.00085, 0.012, zero_terminal_snr=True),
]
ALL = [*DISCRETE, FlowProcess(), FlowProcess(shift=3.0)]


@pytest.mark.parametrize("process", DISCRETE)
def test_discrete_is_the_table_at_integers(process: DiscreteProcess) -> None:
    betas = schedules.make_betas(process.schedule, process.num_steps, process.start, process.end)
    if process.zero_terminal_snr:
        betas = schedules.rescale_zero_terminal_snr(betas)
    alpha_bar = np.cumprod(1 - betas)
    t = np.arange(process.num_steps)
    np.testing.assert_allclose(process.alpha(t), np.sqrt(alpha_bar), rtol=1e-14)
    np.testing.assert_allclose(process.sigma(t), np.sqrt(1 - alpha_bar), rtol=1e-14)
    assert process.alpha(process.t_clean) == 1 and process.sigma(process.t_clean) == 0
    on_device = process.alpha(jnp.asarray(t, jnp.float32))
    assert on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, np.sqrt(alpha_bar), rtol=3e-7)


@pytest.mark.parametrize("process", DISCRETE)
@given(t=st.floats(-1, 999))
def test_discrete_preserves_variance_between_integers_too(process: DiscreteProcess, t: float) -> None:
    assert process.alpha(t) ** 2 + process.sigma(t) ** 2 == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("process", ALL)
def test_log_snr_falls_strictly_and_agrees_with_its_definition(process: DiscreteProcess | FlowProcess) -> None:
    t = np.linspace(process.t_min, process.t_max, 2 * (process.num_times or 500) - 1)
    log_snr = process.log_snr(t)
    assert np.all(np.diff(log_snr) < 0)
    inner = slice(1, -1)
    np.testing.assert_allclose(log_snr[inner], np.log(process.alpha(t[inner]) ** 2 / process.sigma(t[inner]) ** 2), rtol=1e-9, atol=1e-12)


def test_log_snr_is_infinite_at_the_ends() -> None:
    assert FlowProcess().log_snr(0.0) == np.inf and FlowProcess().log_snr(1.0) == -np.inf
    assert DISCRETE[-1].log_snr(999.0) == -np.inf and DISCRETE[-1].alpha(999.0) == 0


@pytest.mark.parametrize("process", ALL)
def test_fractions_cover_the_times(process: DiscreteProcess | FlowProcess) -> None:
    fraction = jnp.linspace(0, 1, 5001)
    t = process.time_at(fraction)
    assert t.dtype == jnp.float32
    assert float(t[0]) == process.t_min and float(t[-1]) == process.t_max
    assert bool(jnp.all(jnp.diff(t) >= 0))
    np.testing.assert_allclose(process.time_at(process.fraction_of(t)), t, rtol=1e-5)
    if process.num_times:
        np.testing.assert_array_equal(np.unique(t), np.arange(process.num_times))


def test_flow_shift_and_features() -> None:
    process = FlowProcess(shift=3.0)
    assert process.time_at(0.5) == pytest.approx(0.75)
    assert process.alpha(0.25) == 0.75 and process.sigma(0.25) == 0.25
    assert process.time_features(0.25) == 250
    assert DiscreteProcess().time_features(17) == 17


def test_dtypes_on_device() -> None:
    for process in (DiscreteProcess(), FlowProcess()):
        assert process.sigma(jnp.asarray([0.5], jnp.bfloat16)).dtype == jnp.float32
        assert process.alpha(jnp.asarray([0], jnp.int32)).dtype == jnp.float32
        with jax.enable_x64(True):
            t = jnp.asarray([0.3, 0.7])
            assert process.alpha(t).dtype == jnp.float64
            np.testing.assert_allclose(process.alpha(t), process.alpha(np.asarray(t)), rtol=1e-15)


def test_a_process_is_a_static_argument() -> None:
    alpha = jax.jit(lambda process, t: process.alpha(t), static_argnums=0)
    assert float(alpha(DiscreteProcess(), 10.0)) == pytest.approx(float(DiscreteProcess().alpha(10.0)), rel=1e-6)
    assert hash(DiscreteProcess()) == hash(DiscreteProcess()) and DiscreteProcess() == dataclasses.replace(DISCRETE[0])


def test_expand() -> None:
    x = jnp.zeros((2, 3, 4))
    assert expand(jnp.ones(2), x).shape == (2, 1, 1) and expand(1.0, x).shape == ()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("continuous", {}, "unknown process 'continuous': choose one of discrete, flow"),
        ("flow", {"schedule": "linear"}, "process 'flow' has no setting 'schedule': it has shift"),
        ("flow", {"shift": 0.0}, "shift of the flow process must be positive"),
        ("discrete", {"schedule": "cosine", "end": 0.02}, "has no end"),
    ],
)
def test_bad_input(kind: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_process(kind, **settings)


def test_make_process() -> None:
    assert make_process("discrete", schedule="cosine", num_steps=50) == DiscreteProcess("cosine", num_steps=50)
    assert make_process("flow", shift=2.0) == FlowProcess(2.0)
