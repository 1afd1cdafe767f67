"""Samplers against theory, on a mixture of Gaussians whose score is known."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks import sampler_orders as theory


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


@pytest.mark.parametrize("kind", theory.STARTED_LOW)
def test_the_first_steps_limit_high_orders(kind: str, paths: tuple[np.ndarray, np.ndarray]) -> None:
    """Their error still falls at the order of the start, and is smaller than that of a solver of order 2."""
    counts = [80, 160, 320]
    with jax.enable_x64(True):
        errors = theory.path_errors(kind, counts, *paths)
        others = theory.path_errors("dpmpp_2m", counts, *paths)
    assert theory.slope(counts, errors) > theory.STARTED_LOW[kind] - 0.15
    assert errors[-1] < others[-1]


@pytest.mark.parametrize("kind", theory.STOCHASTIC)
def test_stochastic_samplers_reach_the_moments_at_their_order(kind: str) -> None:
    """Each doubling of the steps brings the error down by its order, until it is lost in that of 40,000 samples."""
    counts = [5, 10, 20, 40, 80, 160]
    errors, noise = theory.moment_errors(kind, counts, theory.starts(40_000))
    assert errors[-1] < noise
    for error, finer in itertools.pairwise(errors[1:]):
        if error > 2 * noise:
            assert finer < error * 2 ** (0.35 - theory.STOCHASTIC[kind]) + noise / 2
