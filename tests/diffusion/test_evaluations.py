"""How often samplers evaluate the network, counted while they do."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ldm_jax.diffusion.guidance import Guidance, evaluations, guided
from ldm_jax.diffusion.process import DiscreteProcess, FlowProcess, Process
from ldm_jax.diffusion.samplers import SamplerSettings, image_keys, sample, sampling_grid
from ldm_jax.diffusion.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("quick_compilation")

DISCRETE, FLOW = DiscreteProcess(), FlowProcess()
IMAGES = 2


def counted(process: Process, config: SamplerSettings, guidance: Guidance | None = None, scale: Any = 2.0) -> float:
    """Evaluations a sample: rows that a network of nothing but its input was given, over the images."""
    rows: list[int] = []

    def denoise(x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
        jax.debug.callback(partial(rows.append, len(x)))
        return 0.1 * x + 0 * cond

    cond = jnp.zeros((IMAGES, 1))

    def run(noise: jax.Array, scale: Any) -> jax.Array:
        grid = sampling_grid(process, config)
        one = partial(denoise, cond=cond)
        both = one if guidance is None else guided(denoise, cond, cond, scale, guidance, process, "v", grid, config.eta)
        return sample(both, process, "v", config, noise, image_keys(0, jnp.arange(IMAGES)))

    jax.block_until_ready(jax.jit(run)(jnp.ones((IMAGES, 1)), scale))
    jax.effects_barrier()
    return sum(rows) / IMAGES


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("kind", sorted(SOLVERS))
def test_evaluations_are_those_that_are_made(kind: str, steps: int) -> None:
    config = SamplerSettings(kind, steps)
    expected = {"heun": 2 * steps - 1, "flow_heun": 2 * steps - 1, "plms": steps + (steps > 1)}.get(kind, steps)
    assert evaluations(DISCRETE, config) == expected == counted(DISCRETE, config)
    assert evaluations(DISCRETE, config, (0.0, math.inf)) == 2 * expected


@pytest.mark.parametrize("kind", ["ddim", "heun", "plms", "unipc"])
@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.3, 3.0), (0.0, 1.5), (2.0, math.inf), (200.0, 300.0)])
def test_guided_evaluations_are_those_that_are_made(kind: str, interval: tuple[float, float]) -> None:
    config = SamplerSettings(kind, 6, spacing="karras")
    found = counted(DISCRETE, config, Guidance(interval=interval))
    assert evaluations(DISCRETE, config, interval) == found
    once = evaluations(DISCRETE, config)
    assert {(0.0, math.inf): found == 2 * once, (200.0, 300.0): found == once}.get(interval, once < found < 2 * once)


def test_an_interval_is_open_below_and_closed_above_also_where_there_is_no_signal() -> None:
    """Of rectified flow from pure noise, where sigma/alpha is infinite, 3, 1 and 1/3."""
    config = SamplerSettings("euler", 4)
    np.testing.assert_allclose(sampling_grid(FLOW, config).ratio[:4], [np.inf, 3, 1, 1 / 3])
    for interval, more in (((1.0, 3.0), 1), ((0.0, 1.0), 2), ((1.0, math.inf), 2), ((0.0, 1e9), 3), ((0.0, math.inf), 4), ((3.0, 1e9), 0)):
        found = counted(FLOW, config, Guidance(interval=interval))
        assert evaluations(FLOW, config, interval) == found == 4 + more, interval


@pytest.mark.parametrize(
    ("kind", "steps", "interval"), [("euler", 50, (0.2, 2.0)), ("euler", 7, (0.0, 1.5)), ("flow_heun", 10, (0.25, 2.0))]
)
def test_a_level_at_an_end_of_the_interval_counts_as_it_is_run(kind: str, steps: int, interval: tuple[float, float]) -> None:
    """These levels are equal to an end but for rounding, to the other side in float32 than in float64."""
    config = SamplerSettings(kind, steps)
    assert evaluations(FLOW, config, interval) == counted(FLOW, config, Guidance(interval=interval))


def test_churn_moves_levels_into_and_out_of_an_interval() -> None:
    config = SamplerSettings("heun", 8, spacing="karras", churn=4.0)
    plain = SamplerSettings("heun", 8, spacing="karras")
    intervals = [(low, 1.15 * low) for low in np.geomspace(0.05, 5, 5)]
    found = [counted(DISCRETE, config, Guidance(interval=interval)) for interval in intervals]
    assert [evaluations(DISCRETE, config, interval) for interval in intervals] == found
    assert [evaluations(DISCRETE, plain, interval) for interval in intervals] != found


@pytest.mark.parametrize(("kind", "scale"), [("cfg", 0.0), ("cfg", 1.0), ("cfg++", 0.6), ("apg", 3.0)])
def test_every_kind_of_guidance_evaluates_twice(kind: str, scale: float) -> None:
    """Scales are arguments of the jitted program, so that 0 and 1 are no special cases there; at 1 a model is not guided at all."""
    config, guidance = SamplerSettings("ddim", 3), Guidance(kind, radius=1.0 if kind == "apg" else 0.0)
    assert counted(DISCRETE, config, guidance, scale) == evaluations(DISCRETE, config, guidance.interval) == 6


@given(
    kind=st.sampled_from(["ddim", "heun", "dpmpp_2m", "plms"]),
    steps=st.integers(1, 12),
    low=st.just(0.0) | st.floats(1e-3, 5),
    width=st.floats(0.01, 20),
    spacing=st.sampled_from(["trailing", "karras", "exponential", "leading"]),
)
@settings(max_examples=12, deadline=None)
def test_guided_evaluations_of_any_interval(kind: str, steps: int, low: float, width: float, spacing: str) -> None:
    config, interval = SamplerSettings(kind, steps, spacing=spacing), (low, low + width)
    ratios = sampling_grid(DISCRETE, config).ratio
    assume(all(np.abs(ratios / edge - 1).min() > 1e-4 for edge in interval if edge > 0))  # float32 decides there
    assert evaluations(DISCRETE, config, interval) == counted(DISCRETE, config, Guidance(interval=interval))
