"""Samplers against theory: on a mixture of Gaussians whose score is known, and in exact moments on one Gaussian."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import numpy as np
import pytest

from benchmarks import sampler_orders as theory
from ldm_jax.diffusion import solvers
from ldm_jax.diffusion.grid import Grid, Level
from ldm_jax.diffusion.solvers import Options, Table


@pytest.fixture(scope="module")
def paths() -> tuple[np.ndarray, np.ndarray]:
    start = theory.starts(32)
    return start, theory.exact_ends(start)


@pytest.mark.parametrize("kind", theory.DETERMINISTIC)
def test_paths_approach_the_ode_at_the_order_of_the_solver(kind: str, paths: tuple[np.ndarray, np.ndarray]) -> None:
    counts = [80, 160, 320]
    with jax.enable_x64(True):
        errors = theory.path_errors(kind, counts, *paths)
    assert theory.slope(counts, errors) == pytest.approx(theory.DETERMINISTIC[kind], abs=0.15)


@pytest.mark.parametrize("kind", theory.FROM_HISTORY)
def test_a_multistep_solver_has_its_order_from_an_exact_history(kind: str) -> None:
    errors = theory.history_errors(kind, theory.FINE, theory.starts(32))
    assert theory.slope(theory.FINE, errors) == pytest.approx(theory.FROM_HISTORY[kind], abs=0.15)


@pytest.mark.parametrize("kind", theory.FROM_HISTORY)
def test_from_their_own_start_they_are_better_than_order_2(kind: str, paths: tuple[np.ndarray, np.ndarray]) -> None:
    """The first step, of order 1, errs by h^2: so little that with these steps it hardly shows, but in the end the order is 2."""
    counts = [80, 160, 320]
    with jax.enable_x64(True):
        errors = theory.path_errors(kind, counts, *paths)
        others = theory.path_errors("dpmpp_2m", counts, *paths)
    assert theory.slope(counts, errors) > 2.5
    assert errors[-1] < others[-1] / 20


def test_order_3_is_exact_for_what_is_quadratic_and_its_published_form_is_not() -> None:
    """x_0 = 1 + lambda + lambda^2 along the path, whatever the state: the step from exact answers is the integral of the exact solution."""
    rng = np.random.default_rng(0)
    lam = np.cumsum(rng.uniform(0.1, 0.4, 20)) - 2
    ratio = np.exp(-lam)
    grid = Grid(np.arange(20.0)[::-1], 1 / np.hypot(1, ratio), ratio / np.hypot(1, ratio))
    # x/sigma moves by the integral of exp(lambda) x_0.
    primitive = np.exp(lam) * (lam**2 - lam + 2)
    step = grid.sigma[1:] * np.diff(primitive)
    misses = []
    for published in (False, True):
        table = solvers.dpmpp_3m(theory.PROCESS, grid, Options(), published)
        quadratic = 1 + lam + lam**2
        found = [table.x[i, 2:] @ quadratic[i::-1][:3] for i in range(2, 19)]
        misses.append(float(np.abs(found - step[2:]).max()))
    assert misses[0] < 1e-13 and misses[1] > 1e-4


@pytest.mark.parametrize("kind", theory.STOCHASTIC)
def test_stochastic_samplers_reach_the_moments_of_a_mixture(kind: str) -> None:
    """From 10 steps on each doubling brings the error down, until it is lost in that of 40,000 samples."""
    counts = [5, 10, 20, 40, 80, 160]
    errors, noise = theory.moment_errors(kind, counts, theory.starts(40_000))
    assert errors[-1] < noise
    for error, finer in itertools.pairwise(errors[1:]):
        if error > 2 * noise:
            assert finer < error * 2 ** (0.35 - theory.STOCHASTIC[kind]) + noise / 2


@pytest.mark.parametrize("kind", theory.STOCHASTIC)
def test_the_moments_of_a_gaussian_are_reached_at_the_order_of_the_solver(kind: str) -> None:
    """Exactly, without samples: noise that is wrong by a two-hundredth is seen."""
    assert gaussian_slope(lambda grid: theory.table_of(kind, grid)) == pytest.approx(theory.STOCHASTIC[kind], abs=0.1)

    def louder(grid: Grid) -> Table:
        table = theory.table_of(kind, grid)
        return dataclasses.replace(table, noise=table.noise * 1.005)

    assert abs(gaussian_slope(louder) - theory.STOCHASTIC[kind]) > 0.15


def gaussian_slope(table_of: Callable[[Grid], Table]) -> float:
    counts = [80, 160, 320, 640]
    return theory.slope(counts, [theory.gaussian_error(table_of(theory.grid_of(steps)), theory.grid_of(steps)) for steps in counts])


def test_exact_moments_are_those_of_samples() -> None:
    """The affine map of `gaussian_error` against the loop itself, on the sampler that holds the most: answers, a base and noise."""
    for kind in ("heun with churn", "dpmpp_2m_sde", "unipc"):
        grid = theory.grid_of(6)
        table, count = theory.table_of(kind, grid), 40_000
        noise = np.random.default_rng(0).normal(size=(count, 1))
        start = grid.alpha[0] * theory.MEAN + np.hypot(grid.alpha[0] * theory.STD, grid.sigma[0]) * noise

        def answer(x: jax.Array, level: Level, memory: tuple[()], basis: str = table.basis) -> tuple[jax.Array, tuple[()]]:
            gain = level.alpha * theory.STD**2 / ((level.alpha * theory.STD) ** 2 + level.sigma**2)
            x0 = theory.MEAN + gain * (x - level.alpha * theory.MEAN)
            return (x0 if basis == "x0" else (x - level.alpha * x0) / level.sigma), memory

        keys = theory.image_keys(1, np.arange(count)) if table.noise.any() else None
        ends = np.asarray(theory.integrate((answer, lambda x: ()), table, jax.numpy.asarray(start), keys, None, 0).x0)
        std = math.hypot(grid.alpha[-1] * theory.STD, grid.sigma[-1])
        found = max(abs(ends.mean() - grid.alpha[-1] * theory.MEAN), abs(ends.std() - std))
        assert abs(found - theory.gaussian_error(table, grid)) < 4 * std / count**0.5
