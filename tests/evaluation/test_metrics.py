"""The distances against closed forms, plain loops and scipy's root of a matrix."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from ldm_jax.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    monge_distance,
    precision_recall,
)


def cloud(seed: int, n: int, d: int, shift: float = 0.0, decay: float = 4.0) -> np.ndarray:
    """Rows whose directions have variances from 1 down to exp(-2 decay), along axes that are none of the coordinates'."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * np.exp(-decay * np.arange(d) / d)) @ np.linalg.qr(rng.normal(size=(d, d)))[0] + shift


def gaussian(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(0), np.cov(rows, rowvar=False)


def by_nuclear_norm(x: np.ndarray, y: np.ndarray) -> float:
    """The Fréchet distance of rows' Gaussians without any root: tr (C1 C2)^(1/2) is the sum of the singular values of X1 X2^T, centred."""
    (a, b), (n, m) = (rows - rows.mean(0) for rows in (x, y)), (len(x) - 1, len(y) - 1)
    shift = x.mean(0) - y.mean(0)
    return float(shift @ shift + (a**2).sum() / n + (b**2).sum() / m - 2 * np.linalg.norm(a @ b.T, "nuc") / np.sqrt(n * m))


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_frechet_distance_of_gaussians_with_the_same_axes(seed: int, d: int) -> None:
    """The squared shift and the squared differences of the deviations."""
    rng = np.random.default_rng(seed)
    shift, deviations = rng.normal(size=d), rng.uniform(0, 2, (2, d)) * (rng.random((2, d)) > 0.2)
    axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
    first, second = ((axes * s**2) @ axes.T for s in deviations)
    expected = (shift**2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    found = frechet_distance(np.zeros(d), first, shift, second)
    assert found == pytest.approx(expected, rel=1e-6, abs=5e-6)  # a zero is rounded to 1e-15, and its root to 3e-8


@pytest.mark.parametrize(("n", "m", "d"), [(300, 100, 20), (12, 200, 20), (9, 7, 20), (100, 100, 300), (1000, 100, 300), (100, 1000, 300)])
def test_frechet_distance_where_there_are_few_rows(n: int, m: int, d: int) -> None:
    x, y = cloud(1, n, d), cloud(2, m, d, 0.05)
    expected = by_nuclear_norm(x, y)
    there, back = (frechet_distance(*gaussian(a), *gaussian(b)) for a, b in ((x, y), (y, x)))
    assert there == pytest.approx(expected, rel=1e-6) and back == pytest.approx(expected, rel=1e-6)
    assert there == pytest.approx(back, rel=1e-6)


def test_frechet_distance_is_scipys() -> None:
    x, y = cloud(1, 200, 16), cloud(2, 150, 16, 0.3)
    (mean1, cov1), (mean2, cov2) = gaussian(x), gaussian(y)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * np.real(linalg.sqrtm(cov1 @ cov2)))
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [40, 400])
def test_frechet_distance_of_a_set_and_itself_and_of_a_shift(n: int) -> None:
    mean, cov = gaussian(cloud(1, n, 64))
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-7 * np.trace(cov)
    shift = np.random.default_rng(0).normal(size=64)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx((shift**2).sum(), rel=1e-7)


def test_frechet_distance_from_and_to_a_point() -> None:
    mean, cov = gaussian(cloud(1, 30, 5))
    point = np.ones(5), np.zeros((5, 5))
    expected = ((mean - 1) ** 2).sum() + np.trace(cov)
    assert frechet_distance(*point, mean, cov) == pytest.approx(expected) == frechet_distance(mean, cov, *point)


def test_frechet_distance_refuses_what_is_no_gaussian() -> None:
    mean, cov = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match=r"shapes \[3\], \[3, 3\], \[4\], \[4, 4\]"):
        frechet_distance(mean, cov, np.zeros(4), np.eye(4))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="must be finite"):
            frechet_distance(mean, cov, mean, np.diag([1, 1, bad]))


def test_inception_score_where_it_is_known() -> None:
    assert inception_score(np.full((100, 7), 1 / 7)) == pytest.approx((1, 0))
    same = np.tile([[0.2, 0.5, 0.3, 0.0]], (60, 1))
    assert inception_score(same) == pytest.approx((1, 0))
    assert inception_score(np.eye(9)[np.arange(90) % 9]) == pytest.approx((9, 0))


def test_inception_score_takes_parts_in_order_and_the_rest() -> None:
    """As ADM's evaluator: 12,000 rows are parts of 5,000, 5,000 and 2,000."""
    classes = np.concatenate([np.arange(5000) % 2, np.arange(5000) % 4, np.zeros(2000, int)])
    assert inception_score(np.eye(4)[classes]) == pytest.approx((np.mean([2, 4, 1]), np.std([2, 4, 1])))
    rows = np.random.default_rng(0).dirichlet(np.ones(5), 130)
    parts = []
    for part in (rows[:50], rows[50:100], rows[100:]):
        marginal = [sum(row[c] for row in part) / len(part) for c in range(5)]
        divergence = sum(row[c] * np.log(row[c] / marginal[c]) for row in part for c in range(5)) / len(part)
        parts.append(np.exp(divergence))
    assert inception_score(rows, 50) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-10)
    assert inception_score(rows.astype(np.float32), 50)[0] == pytest.approx(np.mean(parts), rel=1e-6)


def plain_mmd(x: np.ndarray, y: np.ndarray) -> float:
    m, d = x.shape

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / d + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(m) for j in range(m) if i != j)
    return within / (m * (m - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / m**2


def test_kernel_distance_is_the_plain_double_sum_over_the_published_subsets() -> None:
    x, y = cloud(1, 30, 6), cloud(2, 22, 6, 0.4)
    rng, values = np.random.RandomState(2020), []
    for _ in range(4):
        first, second = (rows[rng.choice(len(rows), 9, replace=False)] for rows in (x, y))
        values.append(plain_mmd(first, second))
    assert kernel_distance(x, y, subsets=4, size=9) == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)
    assert kernel_distance(x[:9], y[:9], subsets=3, size=9) == pytest.approx((plain_mmd(x[:9], y[:9]), 0), rel=1e-9, abs=1e-12)


def test_kernel_distance_has_no_bias() -> None:
    """Small subsets of equal distributions: a biased estimate would be about 2 E[k(x,x) - k(x,y)] / m, some thirty errors from 0."""
    x, y = np.random.default_rng(0).normal(size=(2, 20000, 8))
    mean, deviation = kernel_distance(x, y, subsets=1000, size=20)
    assert abs(mean) < 4 * deviation / np.sqrt(1000)
    bias = 2 / 20 * (np.mean(((x**2).mean(1) + 1) ** 3) - np.mean(((x * y).mean(1) + 1) ** 3))
    assert bias > 20 * deviation / np.sqrt(1000)


def test_kernel_distance_refuses_sets_without_subsets() -> None:
    with pytest.raises(ValueError, match="sets of 5 and 12 rows have no subsets of 6"):
        kernel_distance(np.zeros((5, 2)), np.zeros((12, 2)), size=6)


def plain_radii(points: np.ndarray, k: int) -> list[float]:
    return [sorted(np.linalg.norm(p - q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]


def plain_neighbours(reference: np.ndarray, samples: np.ndarray, k: int, nearest: int) -> tuple[float, ...]:
    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = plain_radii(manifold, k)
        return float(np.mean([any(np.linalg.norm(p - q) <= r for q, r in zip(manifold, radii, strict=True)) for p in points]))

    radii = plain_radii(reference, nearest)
    within = np.array([[np.linalg.norm(p - q) < r for q, r in zip(reference, radii, strict=True)] for p in samples])
    return inside(samples, reference), inside(reference, samples), within.sum() / (nearest * len(samples)), within.any(0).mean()


@pytest.mark.parametrize(("n", "m", "d", "shift"), [(40, 30, 2, 0.0), (25, 45, 2, 0.8), (30, 30, 16, 0.2), (20, 60, 1, 0.0)])
def test_neighbours_are_those_of_plain_loops(n: int, m: int, d: int, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_jax.evaluation.metrics._BLOCK", 13)
    reference, samples = cloud(3, n, d), cloud(4, m, d, shift)
    found = *precision_recall(reference, samples), *density_coverage(reference, samples)
    assert found == pytest.approx(plain_neighbours(reference, samples, 3, 5), abs=1e-12)
    assert 0 < found[0] < 1 or shift == 0


def test_neighbours_of_far_sets_equal_sets_and_one_mode() -> None:
    x = cloud(1, 50, 4)
    assert precision_recall(x, x + 100) == (0, 0) and density_coverage(x, x + 100) == (0, 0)
    assert precision_recall(x, x) == (1, 1) and density_coverage(x, x)[1] == 1
    both = np.concatenate([x, x + 100])
    assert precision_recall(both, x) == (1, 0.5)  # half of the modes are missed
    assert density_coverage(both, x)[1] == 0.5
    assert precision_recall(x, both) == (0.5, 1)


def test_neighbours_need_enough_points() -> None:
    with pytest.raises(ValueError, match="3 points have no 3 neighbours each"):
        precision_recall(np.zeros((9, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="5 points have no 5 neighbours each"):
        density_coverage(np.zeros((5, 2)), np.zeros((9, 2)))


def test_monge_distance_is_the_plain_sum() -> None:
    x, y = cloud(1, 25, 3), cloud(2, 25, 3, 0.5)
    rng = np.random.default_rng(0)
    total = 0.0
    for direction in rng.normal(size=(150, 3)):
        u = direction / np.sqrt((direction**2).sum())
        pairs = zip(sorted(u @ a for a in x), sorted(u @ b for b in y), strict=True)
        total += sum((a - b) ** 2 for a, b in pairs) / 25
    assert monge_distance(x, y, projections=150) == pytest.approx(3 * 3 * total / 150, rel=1e-10)


def test_monge_distance_between_two_rows_is_that_of_the_best_pairing() -> None:
    """Of sorted values no other pairing is nearer."""
    x, y = np.random.default_rng(0).normal(size=(2, 4, 1))
    best = min(sum((a - b) ** 2 for a, b in zip(x[:, 0], order, strict=True)) / 4 for order in itertools.permutations(y[:, 0]))
    assert monge_distance(x, y) == pytest.approx(3 * best)


def test_monge_distance_of_a_set_a_shift_and_other_sizes() -> None:
    x = cloud(1, 300, 24)
    assert monge_distance(x, x) == 0 and monge_distance(x, x[::-1]) < 1e-24
    shift = np.random.default_rng(1).normal(size=24)
    found, expected = monge_distance(x, x + shift, projections=20000), 3 * (shift**2).sum()
    # (s.u)^2 d / |s|^2 has the mean 1 and the variance 2 (d - 1) / (d + 2) over directions u
    assert found == pytest.approx(expected, rel=4 * np.sqrt(2 / 20000))
    assert monge_distance(x, x + shift) == pytest.approx(expected, rel=4 * np.sqrt(2 / 1000))
    more = np.concatenate([x, cloud(2, 200, 24)])
    for sets in ((x, more), (more, x)):
        assert 0 < monge_distance(*sets) < 0.2 * x.var(0).sum()
        assert monge_distance(*sets) == monge_distance(*sets)
