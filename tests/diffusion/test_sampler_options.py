"""Starting from data, holes, thresholds, states on the way, inversion, and invariances of every sampler."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.defaults import base
from ldm_jax.diffusion.grid import SPACINGS, make_grid
from ldm_jax.diffusion.guidance import Guidance, guided
from ldm_jax.diffusion.process import CosineProcess, DiscreteProcess, FlowProcess, Process, SigmaProcess
from ldm_jax.diffusion.samplers import Known, SamplerSettings, image_keys, initial_noise, invert, sample, sampling_grid, trajectory
from ldm_jax.diffusion.solvers import SOLVERS, Options
from ldm_jax.sampling import make_sampling

DISCRETE = DiscreteProcess()
NUMBERS = ("eta", "strength", "churn", "churn_noise", "threshold_max", "threshold_quantile")
NOISE, KEYS = initial_noise(0, jnp.arange(4), (3, 3, 2)), image_keys(0, jnp.arange(4))
DATA = 0.5 * jax.random.normal(jax.random.key(9), NOISE.shape)


def network(x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.tanh(1.3 * x + 0.2 * jnp.cos(t / 100).reshape(-1, *(1,) * (x.ndim - 1)))


class Request(NamedTuple):
    """What may be asked of a sampler besides its kind."""

    config: SamplerSettings
    guidance: Guidance
    prediction: str
    known: bool
    from_data: bool


@st.composite
def requests(draw: st.DrawFn, kind: str) -> Request:
    """Everything that goes together."""
    eta = draw(st.sampled_from([0.0, 0.5, 1.0])) if kind == "ddim" else 0.0
    guidances = [Guidance(), Guidance(rescale=0.5), Guidance("apg", interval=(0.1, 10.0), radius=1.0, momentum=-0.5)]
    guidance = draw(st.sampled_from([*guidances, *([Guidance("cfg++")] if kind in ("ddim", "euler") else [])]))
    threshold = "none" if guidance.kind == "cfg++" else draw(st.sampled_from(["none", "static", "dynamic"]))
    from_data = draw(st.booleans())
    churn = draw(st.sampled_from([0.0, 3.0])) if kind == "heun" else 0.0
    config = SamplerSettings(kind, 4, eta, strength=0.6 if from_data else 1.0, churn=churn, threshold=threshold)
    return Request(config, guidance, draw(st.sampled_from(["eps", "v", "x0"])), draw(st.booleans()), from_data)


def answered(request: Request, indices: jax.Array) -> jax.Array:
    """Images of these indices, with conditions, scales, data and holes of their own."""
    data, hole = DATA[indices % 4], jnp.zeros((4, 3, 3, 1)).at[:, 1].set(1)[indices % 4]
    cond, scale = indices / 8, 0.1 + indices / 10
    grid = sampling_grid(DISCRETE, request.config, request.from_data)

    def conditional(x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        return network(x + cond[:, None, None, None], t)

    null = jnp.zeros_like(cond)
    denoise = guided(conditional, cond, null, scale, request.guidance, DISCRETE, request.prediction, grid, request.config.eta)
    noise, keys = initial_noise(3, indices, (3, 3, 2)), image_keys(3, indices)
    known = Known(data, hole) if request.known else None
    return sample(denoise, DISCRETE, request.prediction, request.config, noise, keys, data if request.from_data else None, known)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("kind", SOLVERS)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_image_depends_on_its_own_index_alone(kind: str, data: st.DataObject) -> None:
    """Whatever is asked for, and wherever the batch is split."""
    draw = jax.jit(functools.partial(answered, data.draw(requests(kind))))
    split = data.draw(st.integers(1, 5))
    together = draw(jnp.arange(6))
    assert bool(jnp.isfinite(together).all())
    apart = jnp.concatenate([draw(jnp.arange(split)), draw(jnp.arange(split, 6))])
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-4 * float(jnp.abs(together).max()))


@pytest.mark.parametrize("kind", SOLVERS)
def test_it_is_one_scan(kind: str) -> None:
    """One trace of the network, whatever the steps and the solver."""
    config = SamplerSettings(kind, 9)
    equations = jax.make_jaxpr(lambda x: sample(network, DISCRETE, "eps", config, x, KEYS))(NOISE).eqns
    scans = [equation for equation in equations if equation.primitive.name == "scan"]
    assert len(scans) == 1 and scans[0].params["length"] in (9, 10, 17)
    inner = str(scans[0].params["jaxpr"])
    assert inner.count(" tanh ") == 1


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 998), spacing=st.sampled_from(list(SPACINGS)))
def test_every_grid_descends_and_has_its_steps(steps: int, spacing: str) -> None:
    grid = make_grid(DISCRETE, spacing, steps)
    assert grid.steps == steps and np.all(np.diff(grid.t) < 0)
    assert grid.t[0] <= 999 and grid.t[-1] == (0 if spacing == "legacy_ldm" else -1)


@pytest.mark.parametrize("process", [DISCRETE, SigmaProcess()])
def test_karras_and_exponential_grids_are_even_in_their_measure(process: DiscreteProcess | SigmaProcess) -> None:
    for spacing, measure in (("karras", lambda r: r ** (1 / 7)), ("exponential", np.log)):
        grid = make_grid(process, spacing, 12)
        steps = np.diff(measure(grid.ratio[:-1]))
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
        assert grid.t[0] == pytest.approx(process.t_max) and grid.t[-2] == pytest.approx(process.t_min, abs=1e-9)
    with pytest.raises(ValueError, match="need noise between 0 and infinity"):
        make_grid(FlowProcess(), "karras", 5)


def test_the_legacy_grid_is_the_published_code() -> None:
    grid = make_grid(DISCRETE, "legacy_ldm", 50)
    np.testing.assert_array_equal(grid.t[:-1], (np.arange(0, 1000, 20) + 1)[::-1])
    assert grid.alpha[-1] == DISCRETE.alpha(0.0)
    with pytest.raises(ValueError, match="visits time 1000"):
        make_grid(DISCRETE, "legacy_ldm", 1000)


def test_from_data_only_the_last_steps_are_run() -> None:
    """What is left of the grid from there is what a sampler on that grid does; all of it is a start at the first level."""
    config = SamplerSettings("ddim", 10, strength=0.3)
    grid = make_grid(DISCRETE, "trailing", 10)
    x = grid.alpha[7] * DATA + grid.sigma[7] * NOISE
    for i in (7, 8, 9):
        eps = network(x, jnp.full(4, grid.t[i]))
        x = grid.alpha[i + 1] * (x - grid.sigma[i] * eps) / grid.alpha[i] + grid.sigma[i + 1] * eps
    found = trajectory(network, DISCRETE, "eps", config, NOISE, init=DATA, record_every=1)
    np.testing.assert_allclose(found.x0, x, rtol=1e-4, atol=1e-5)
    assert len(found.states) == 3
    with pytest.raises(ValueError, match="without data to start from"):
        sample(network, DISCRETE, "eps", config, NOISE)
    with pytest.raises(ValueError, match=r"strength must be in \(0, 1\]"):
        SamplerSettings(strength=0.0)


@pytest.mark.parametrize(
    ("strength", "steps", "run"),
    [(0.5, 1, 1), (0.5, 3, 2), (0.5, 5, 3), (0.5, 7, 4), (0.25, 10, 3), (0.1, 30, 3), (0.01, 4, 1), (1.0, 9, 9)],
)
def test_a_strength_is_rounded_up_to_whole_steps(strength: float, steps: int, run: int) -> None:
    assert sampling_grid(DISCRETE, SamplerSettings("ddim", steps, strength=strength), from_data=True).steps == run


@pytest.mark.parametrize("process", [SigmaProcess(sigma_data=0.5), SigmaProcess(0.01, 3.0, sigma_data=2.0), DISCRETE, FlowProcess()])
def test_the_start_has_the_variance_of_the_processs_own_data(process: Process) -> None:
    """A network that knows nothing but the data's variance then ends with that variance, at the first order of the steps."""
    seen: list[np.ndarray] = []

    def watching(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return jnp.zeros_like(x)

    sample(watching, process, "x0", SamplerSettings("ddim", 1), jnp.ones((1, 1))).block_until_ready()
    jax.effects_barrier()
    expected = np.hypot(process.alpha(process.t_max) * process.sigma_data, process.sigma(process.t_max))
    np.testing.assert_allclose(seen[0], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["ddim", "heun", "plms", "unipc"])
def test_states_on_the_way_are_those_of_every_k_th_step(kind: str) -> None:
    config = SamplerSettings(kind, 7)
    every = trajectory(network, DISCRETE, "eps", config, NOISE, record_every=1)
    third = trajectory(network, DISCRETE, "eps", config, NOISE, record_every=3)
    assert every.states.shape == (7, *NOISE.shape) and third.states.shape == (2, *NOISE.shape)
    np.testing.assert_allclose(third.states, every.states[jnp.asarray([2, 5])], rtol=1e-5, atol=1e-5)
    if kind == "ddim":  # a predictor's last state is the sample, a corrector's too
        np.testing.assert_array_equal(every.states[-1], every.x0)
    assert trajectory(network, DISCRETE, "eps", config, NOISE).states.shape[0] == 0


@pytest.mark.parametrize("kind", ["ddim", "dpmpp_2m", "heun"])
def test_outside_the_hole_the_data_stay(kind: str) -> None:
    hole = jnp.zeros((4, 3, 3, 1)).at[:, 1, :].set(1)
    config = SamplerSettings(kind, 6)
    found = sample(network, DISCRETE, "eps", config, NOISE, KEYS, known=Known(DATA, hole))
    outside = jnp.broadcast_to(hole == 0, DATA.shape)
    np.testing.assert_array_equal(found[outside], DATA[outside])
    other = sample(network, DISCRETE, "eps", config, NOISE, KEYS, known=Known(DATA + 1, hole))
    inside = ~outside
    assert float(jnp.abs(found[inside] - DATA[inside]).max()) > 0.1
    np.testing.assert_array_equal(found[inside], other[inside])  # this network sees one pixel at a time
    with pytest.raises(ValueError, match="give keys"):
        sample(network, DISCRETE, "eps", config, NOISE, known=Known(DATA, hole))


def test_the_known_part_has_the_noise_of_its_level() -> None:
    seen: list[np.ndarray] = []

    def watching(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x, t: seen.append((float(t[0]), np.asarray(x))), x, t)
        return network(x, t)

    noise, keys = initial_noise(0, jnp.arange(4000), (2,)), image_keys(0, jnp.arange(4000))
    known = Known(jnp.full((4000, 2), 2.0), jnp.asarray([[0.0, 1.0]]))
    sample(watching, DISCRETE, "eps", SamplerSettings("ddim", 4), noise, keys, known=known).block_until_ready()
    jax.effects_barrier()
    assert len(seen) == 4
    for t, x in seen:
        alpha, sigma = float(DISCRETE.alpha(t)), float(DISCRETE.sigma(t))
        assert abs(x[:, 0].mean() - 2 * alpha) < 4 * sigma / 4000**0.5 and x[:, 0].std() == pytest.approx(sigma, rel=0.06)


def test_thresholds() -> None:
    x0 = jnp.asarray([[3.0, -0.5, 0.2, 1.5], [0.3, -0.2, 0.1, 0.05]])
    noise = jnp.zeros((2, 4))

    def drawn(**options: float | str) -> jax.Array:
        return sample(lambda x, t: x0, DISCRETE, "x0", SamplerSettings("ddim", 1, **options), noise)

    np.testing.assert_allclose(drawn(threshold="static"), jnp.clip(x0, -1, 1), atol=1e-6)
    dynamic = drawn(threshold="dynamic", threshold_quantile=0.9)
    size = np.quantile(np.abs(x0[0]), 0.9)
    np.testing.assert_allclose(dynamic[0], np.clip(x0[0], -size, size) / size, rtol=1e-5)
    np.testing.assert_allclose(dynamic[1], x0[1], rtol=1e-6)  # within the bound: as it is
    np.testing.assert_allclose(drawn(), x0, rtol=1e-6)


@pytest.mark.parametrize("process", [DISCRETE, DiscreteProcess("linear", 0.00085, 0.012, zero_terminal_snr=True), CosineProcess()])
def test_inversion_comes_back(process: DiscreteProcess | CosineProcess) -> None:
    errors = []
    for steps in (20, 80, 320):
        config = SamplerSettings("ddim", steps)
        noise = invert(lambda x, t: 0.3 * network(x, t), process, "v", config, DATA)
        again = sample(lambda x, t: 0.3 * network(x, t), process, "v", config, noise)
        errors.append(float(jnp.abs(again - DATA).max()))
    assert errors[2] < errors[1] / 2 < errors[0] / 4 and errors[2] < 0.05
    with pytest.raises(ValueError, match="only sampler 'ddim' with eta 0 is inverted"):
        invert(network, process, "v", SamplerSettings("heun", 5), DATA)
    with pytest.raises(ValueError, match="does not determine x_0"):
        invert(network, process, "x0", SamplerSettings("ddim", 5), DATA)


@pytest.mark.parametrize("kind", ["ddim", "flow_heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc"])
def test_pure_noise_is_a_start(kind: str) -> None:
    """Without signal at the first time, and with data of one value, every step lands on the way to it."""
    for process in (FlowProcess(), CosineProcess()):
        found = sample(lambda x, t: jnp.full_like(x, 0.7), process, "x0", SamplerSettings(kind, 5), NOISE, KEYS)
        np.testing.assert_allclose(found, 0.7, atol=1e-5)


@pytest.mark.parametrize("kind", ["heun", "plms", "lms"])
def test_samplers_in_units_of_the_signal_need_some(kind: str) -> None:
    with pytest.raises(ValueError, match="needs some signal at the first time"):
        sample(network, FlowProcess(), "flow", SamplerSettings(kind, 5), NOISE)


def test_churn_is_of_heun() -> None:
    with pytest.raises(ValueError, match="'ddim' has no churn"):
        SamplerSettings("ddim", churn=5.0)
    drawn = [sample(network, DISCRETE, "eps", SamplerSettings("heun", 8, churn=churn), NOISE, KEYS) for churn in (0.0, 4.0)]
    assert float(jnp.abs(drawn[0] - drawn[1]).max()) > 1e-2
    outside = SamplerSettings("heun", 8, churn=4.0, churn_interval=(1e3, 1e4))
    np.testing.assert_allclose(sample(network, DISCRETE, "eps", outside, NOISE, KEYS), drawn[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interval", [(0.0, 79.0), (0.5, 20.0)])
def test_churn_is_algorithm_2(interval: tuple[float, float]) -> None:
    """Karras et al., arXiv 2206.00364, algorithm 2, in a plain loop; noise of step i is that of the row before it. Above the process's own
    noise, where theirs would go from sigma_max, ours does not: the intervals leave that out."""
    process, steps, churn, loud = SigmaProcess(), 9, 3.0, 1.007
    config = SamplerSettings("heun", steps, spacing="karras", churn=churn, churn_interval=interval, churn_noise=loud)
    times = np.append((80 ** (1 / 7) + np.arange(steps) / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0.0)
    with jax.enable_x64(True):
        keys, noise = image_keys(0, jnp.arange(4)), np.asarray(NOISE, np.float64)
        x, churned = np.hypot(80.0, 1.0) * noise, 0

        def ideal(x: Any, sigma: Any) -> Any:
            return jnp.tanh(x / (1 + sigma) ** 2)

        for i in range(steps):
            gamma = min(churn / steps, 2**0.5 - 1) if interval[0] <= times[i] <= interval[1] else 0.0
            churned += gamma > 0
            raised = times[i] * (1 + gamma)
            fresh = (
                np.asarray(jax.vmap(lambda key, row=2 * i - 1: jax.random.normal(jax.random.fold_in(key, row), (3, 3, 2)))(keys))
                if i
                else 0.0
            )
            x = x + np.sqrt(raised**2 - times[i] ** 2) * loud * fresh
            first = (x - ideal(x, raised)) / raised
            following = x + (times[i + 1] - raised) * first
            if times[i + 1] > 0:
                second = (following - ideal(following, times[i + 1])) / times[i + 1]
                following = x + (times[i + 1] - raised) * (first + second) / 2
            x = np.asarray(following)
        found = sample(lambda x, t: ideal(x, t.reshape(-1, 1, 1, 1)), process, "x0", config, jnp.asarray(noise), keys)
    assert churned > 2
    np.testing.assert_allclose(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["heun", "plms"])
def test_trapezoids_do_not_hold_in_noise_alone(kind: str) -> None:
    """The discrete cosine schedule leaves 1/20,000 of the signal; the others stand it in float32, 'lms' to 4e-4."""
    process = DiscreteProcess("cosine")
    with pytest.raises(ValueError, match=f"sampler '{kind}' needs some signal at the first time, and there noise is 2.*times as large"):
        sample(network, process, "v", SamplerSettings(kind, 10), NOISE)
    sample(network, process, "v", SamplerSettings(kind, 10, strength=0.9), NOISE, init=DATA)  # that is below
    for other in ("ddim", "flow_heun", "lms", "dpmpp_2m", "dpmpp_3m", "unipc"):
        config = SamplerSettings(other, 20)
        single = sample(network, process, "v", config, NOISE)
        with jax.enable_x64(True):
            double = np.asarray(sample(network, process, "v", config, jnp.asarray(np.asarray(NOISE), jnp.float64)))
        np.testing.assert_allclose(single, double, atol=(1e-3 if other == "lms" else 5e-5) * np.abs(double).max())


@pytest.mark.parametrize("steps", [4, 14, 15])
@pytest.mark.parametrize("spacing", ["trailing", "legacy_ldm"])
def test_the_orders_of_3m(spacing: str, steps: int) -> None:
    """How many answers each step uses: it begins with 1 and 2, and ends with 2 and 1 where there are few steps; at clean data with 1."""
    table = SOLVERS["dpmpp_3m"].table(DISCRETE, make_grid(DISCRETE, spacing, steps), Options())
    last = {True: [2, 1], False: [3, 1 if spacing == "trailing" else 3]}[steps < 15]
    np.testing.assert_array_equal((table.x[:, 2:] != 0).sum(1), [1, 2, *[3] * (steps - 4), *last])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: value}, rf"{name} of the sampler must be a finite number") for name in NUMBERS for value in (math.nan, math.inf)),
        ({"churn": 1.0, "churn_interval": (math.nan, 1.0)}, "churn_interval of the sampler must be a finite number"),
        ({"churn": 1.0, "churn_interval": (0.0, math.nan)}, "0 <= low < high"),
        ({"churn_interval": (0.1, 1.0)}, "no effect with a churn of 0"),
        ({"churn_noise": 1.1}, "no effect with a churn of 0"),
        ({"churn": 1.0, "churn_interval": (2.0, 1.0)}, "0 <= low < high"),
        ({"threshold_max": 2.0}, "no effect without a threshold"),
        ({"threshold": "static", "threshold_quantile": 0.9}, "is of threshold 'dynamic'"),
    ],
)
def test_options_without_effect(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerSettings("heun", 8, **options)


def test_every_setting_of_a_sampler_is_a_field_of_the_configuration() -> None:
    group = {**base().sample.to_dict(), "sampler": "heun", "churn": 4.0, "churn_interval": (0.1, 5.0), "churn_noise": 1.01}
    group |= {"threshold": "dynamic", "threshold_max": 2.0, "threshold_quantile": 0.9}
    made = make_sampling(group).sampler
    assert made == SamplerSettings("heun", 50, 0.0, "trailing", 1.0, 4.0, (0.1, 5.0), 1.01, "dynamic", 2.0, 0.9)
    other = make_sampling(group, sampler="ddim").sampler  # churn is of heun
    assert (other.kind, other.churn, other.churn_interval, other.threshold) == ("ddim", 0.0, (0.0, math.inf), "dynamic")


@pytest.mark.parametrize("kind", SOLVERS)
def test_the_number_of_devices_does_not_matter(kind: str) -> None:
    config = SamplerSettings(kind, 6)
    noise, keys = initial_noise(0, jnp.arange(8), (3, 3, 2)), image_keys(0, jnp.arange(8))
    draw = jax.jit(lambda noise, keys: sample(network, DISCRETE, "eps", config, noise, keys))
    split = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    one, eight = draw(noise, keys), draw(jax.device_put(noise, split), jax.device_put(keys, split))
    assert eight.sharding.is_equivalent_to(split, noise.ndim)
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5 * float(jnp.abs(one).max()))
