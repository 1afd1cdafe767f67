import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.diffusion import schedules
from ldm_jax.diffusion.process import CosineProcess, DiscreteProcess, FlowProcess, Process, SigmaProcess, expand, make_process

DISCRETE = [
    DiscreteProcess(),
    DiscreteProcess("linear", 0.00085, 0.012),
    DiscreteProcess("linear_beta", num_steps=100),
    DiscreteProcess("cosine"),
    DiscreteProcess("linear", 0.00085, 0.012, zero_terminal_snr=True),
]
ALL = [*DISCRETE, FlowProcess(), FlowProcess(shift=3.0), CosineProcess(), CosineProcess(0.25), SigmaProcess(), SigmaProcess(rho=0.0)]


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
def test_log_snr_falls_strictly_and_agrees_with_its_definition(process: Process) -> None:
    t = np.linspace(process.t_min, process.t_max, 2 * (process.num_times or 500) - 1)
    log_snr = process.log_snr(t)
    assert np.all(np.diff(log_snr) < 0)
    inner = slice(1, -1)
    np.testing.assert_allclose(log_snr[inner], np.log(process.alpha(t[inner]) ** 2 / process.sigma(t[inner]) ** 2), rtol=1e-9, atol=1e-12)


def test_log_snr_is_infinite_at_the_ends() -> None:
    assert FlowProcess().log_snr(0.0) == np.inf and FlowProcess().log_snr(1.0) == -np.inf
    assert DISCRETE[-1].log_snr(999.0) == -np.inf and DISCRETE[-1].alpha(999.0) == 0


@pytest.mark.parametrize("process", ALL)
def test_fractions_cover_the_times(process: Process) -> None:
    fraction = jnp.linspace(0, 1, 5001)
    t = process.time_at(fraction)
    assert t.dtype == jnp.float32
    np.testing.assert_allclose(t[jnp.asarray([0, -1])], [process.t_min, process.t_max], rtol=1e-6)
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
        ("flow", {"shift": math.inf}, "shift of the flow process must be a finite number"),
        ("cosine", {"shift": math.nan}, "shift of the cosine process must be a finite number"),
        ("sigma", {"sigma_max": math.inf}, "sigma_max of the process of sigmas must be a finite number"),
        ("sigma", {"rho": math.nan}, "rho of the process of sigmas must be a finite number"),
        ("discrete", {"end": math.nan}, "end of the discrete process must be a finite number"),
        ("discrete", {"schedule": "sqrt", "start": 0.2, "end": 0.9}, "leaves no signal before its last time"),
        ("discrete", {"schedule": "cosine", "end": 0.02}, "has no end"),
    ],
)
def test_bad_input(kind: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_process(kind, **settings)


def test_make_process() -> None:
    assert make_process("discrete", schedule="cosine", num_steps=50) == DiscreteProcess("cosine", num_steps=50)
    assert make_process("flow", shift=2.0) == FlowProcess(2.0)


@pytest.mark.parametrize("process", ALL)
@settings(deadline=None)  # the first example compiles
@given(position=st.floats(0.001, 0.999))
def test_the_time_of_a_ratio_is_where_that_ratio_is(process: Process, position: float) -> None:
    t = process.t_min + position * (process.t_max - process.t_min)
    ratio = process.sigma(t) / process.alpha(t)
    assert process.time_of_ratio(ratio) == pytest.approx(t, rel=1e-7, abs=1e-7)
    on_device = process.time_of_ratio(jnp.asarray([ratio], jnp.float32))
    np.testing.assert_allclose(process.sigma(on_device) / process.alpha(on_device), ratio, rtol=2e-4)


@pytest.mark.parametrize("process", ALL)
@given(fraction=st.floats(0, 1))
def test_inputs_have_unit_variance_where_the_data_has(process: Process, fraction: float) -> None:
    """Flow's need not: there x_t itself is what networks are fed."""
    t = process.time_at(fraction)
    data = getattr(process, "sigma_data", 1.0)
    if not isinstance(process, FlowProcess):
        assert process.input_scale(t) * np.hypot(process.alpha(t) * data, process.sigma(t)) == pytest.approx(1, abs=1e-12)


def test_the_cosine_process_is_the_cosine_and_its_shift_moves_log_snr() -> None:
    t = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(CosineProcess().alpha(t), np.cos(np.pi * t / 2), rtol=1e-12)
    np.testing.assert_allclose(CosineProcess(0.25).log_snr(t), CosineProcess().log_snr(t) + 2 * np.log(0.25), rtol=1e-9, atol=1e-9)
    assert CosineProcess().alpha(1.0) == 0 and CosineProcess().sigma(0.0) == 0


def test_sigmas_are_those_of_edm() -> None:
    """arXiv 2206.00364, eq. 5, for 18 steps."""
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(SigmaProcess().time_at(1 - i / 17), expected, rtol=1e-12)
    np.testing.assert_allclose(SigmaProcess(rho=0.0).time_at(np.array([0, 0.5, 1])), [0.002, 0.4, 80], rtol=1e-12)


def test_given_betas_are_the_schedule() -> None:
    process = DiscreteProcess("given", num_steps=3, betas=(0.1, 0.2, 1.0))
    np.testing.assert_allclose(process.alpha(np.arange(3)) ** 2, [0.9, 0.72, 0], atol=1e-15)
    again = dataclasses.replace(process, zero_terminal_snr=True)  # there is no signal at the end already
    np.testing.assert_allclose(again.alpha(np.arange(3)), process.alpha(np.arange(3)), rtol=1e-12)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"betas": (0.1, 0.2)}, "2 betas for schedule 'given' of 3 steps"),
        ({"betas": (0.1, 0.2, 1.5)}, "must lie between 0 and 1"),
        ({"betas": (0.1, 1.0, 0.2)}, "must lie between 0 and 1; the last may be 1"),
        ({"betas": (0.1, 1.0, 1.0), "zero_terminal_snr": True}, "must lie between 0 and 1; the last may be 1"),
        ({"betas": (0.1, float("nan"), 1.0)}, "betas of the discrete process must be a finite number"),
        ({"schedule": "linear", "betas": (0.1, 0.2, 0.3)}, "3 betas for schedule 'linear'"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            DiscreteProcess(**{"schedule": "given", "num_steps": 3} | arguments)


def test_the_fall_of_log_snr_is_its_derivative() -> None:
    """`turning` against differences of log-SNR over a little of the time, or a step of discrete time."""
    for process in ALL:
        u = np.linspace(0.05, 0.95, 37)
        t = process.time_at(u)
        if process.num_times is None:
            ends, span = (process.time_at(u - 1e-5), process.time_at(u + 1e-5)), 2e-5
        else:
            ends, span = (t - 0.5, t + 0.5), 1 / process.num_times
        fall = (process.log_snr(ends[0]) - process.log_snr(ends[1])) / span
        np.testing.assert_allclose(process.turning(t), process.alpha(t) * process.sigma(t) * fall, rtol=5e-3)
        both = process.turning(jnp.asarray([process.t_min, process.t_max]))
        assert both.dtype == jnp.float32 and bool(jnp.isfinite(both).all()) and float(both.min()) >= 0
