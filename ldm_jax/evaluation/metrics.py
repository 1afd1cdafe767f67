"""Distances between two sets of pictures, by their features: float64 on the host, no pictures and no networks here.

Features are rows of numbers, [n,d] or [m,d]; but for the Inception score, and for what is drawn from them, their order does not matter.
"""

from collections.abc import Iterator

import numpy as np
from scipy import linalg

_BLOCK = 2048  # rows whose distances are held at once
_DIRECTIONS = 100  # projected on at once


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Between two Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (arXiv 1706.08500, eq. 6); on Inception's features the FID.

    The trace of the root is that of the symmetric (C1^(1/2) C2 C1^(1/2))^(1/2), whose eigenvalues are real, be the matrices regular or not.

    Args:
      mean1, mean2: [d].
      cov1, cov2: symmetric, positive semi-definite, [d,d].

    Raises ValueError for other shapes, and where a number is not finite.
    """
    arrays = [np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2)]
    d = arrays[0].shape[-1]
    if [a.shape for a in arrays] != [(d,), (d, d), (d,), (d, d)]:
        raise ValueError(f"means and covariances have shapes {', '.join(str(list(a.shape)) for a in arrays)}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("means and covariances must be finite")
    mean1, cov1, mean2, cov2 = arrays
    values, vectors = linalg.eigh(cov1)
    # Of fewer rows than features most values are rounding of zero, whose roots would add up.
    kept = values > d * np.finfo(np.float64).eps * values[-1]
    root = vectors[:, kept] * np.sqrt(values[kept])
    product = linalg.eigvalsh(root.T @ cov2 @ root)
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(product.clip(0)).sum())


def inception_score(probabilities: np.ndarray, split: int = 5000) -> tuple[float, float]:
    """exp of the mean KL divergence of p(y|x) from p(y) (arXiv 1606.03498) in parts of `split` rows: mean and deviation over the parts.

    As in ADM's evaluator (arXiv 2105.05233) the parts are in order, and the last one is what is left where `split` does not divide n.

    Args:
      probabilities: [n,classes], rows that sum to 1.
    """
    scores = []
    for start in range(0, len(probabilities), split):
        part = np.asarray(probabilities[start : start + split], np.float64)
        divergence = _plogp(part).sum(1).mean() - _plogp(part.mean(0)).sum()
        scores.append(np.exp(divergence))
    return float(np.mean(scores)), float(np.std(scores))


def _plogp(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1))


def kernel_distance(
    features1: np.ndarray, features2: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """KID (Binkowski et al., arXiv 1801.01401): the unbiased squared MMD with the kernel (x.y / d + 1)^3, mean and standard deviation over
    random subsets of both.

    Raises ValueError where a set has fewer rows than a subset.
    """
    if min(len(features1), len(features2)) < size:
        raise ValueError(f"sets of {len(features1)} and {len(features2)} rows have no subsets of {size}")
    rng = np.random.RandomState(seed)  # the generator of the published implementations, so that subsets are the same
    values = []
    for _ in range(subsets):
        x = np.asarray(features1[rng.choice(len(features1), size, replace=False)], np.float64)
        y = np.asarray(features2[rng.choice(len(features2), size, replace=False)], np.float64)
        values.append(_squared_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Of as many rows each, [m,d]."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple[float, float]:
    """The share of samples within the reference's manifold, and of the reference within the samples' (arXiv 1904.06991, eqs. 1 and 2).

    A manifold is the union of balls around its points, each as large as the distance to its k-th nearest other.
    """
    reference, samples = (np.asarray(a, np.float64) for a in (reference, samples))
    return _inside(samples, reference, k), _inside(reference, samples, k)


def _inside(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    radii = _radii(manifold, k)
    return float(np.concatenate([(squares <= radii).any(1) for squares in squared_distances(points, manifold)]).mean())


def density_coverage(reference: np.ndarray, samples: np.ndarray, k: int = 5) -> tuple[float, float]:
    """How many of the reference's balls a sample lies in, over k; and the share of balls with a sample in them (arXiv 2002.09797)."""
    reference, samples = (np.asarray(a, np.float64) for a in (reference, samples))
    radii, number, hit = _radii(reference, k), 0, np.zeros(len(reference), bool)
    for squares in squared_distances(samples, reference):
        within = squares < radii
        number, hit = number + int(within.sum()), hit | within.any(0)
    return number / (k * len(samples)), float(hit.mean())


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Squared distances [n] to the k-th nearest other point. Raises ValueError where there are not so many."""
    if len(points) <= k:
        raise ValueError(f"{len(points)} points have no {k} neighbours each")
    # Each point is its own nearest.
    return np.concatenate([np.partition(squares, k, axis=1)[:, k] for squares in squared_distances(points, points)])


def squared_distances(points: np.ndarray, others: np.ndarray) -> Iterator[np.ndarray]:
    """[block,m] for blocks of points [n,d], in order; of a point to itself exactly 0."""
    squares = (others**2).sum(1)
    for start in range(0, len(points), _BLOCK):
        block = points[start : start + _BLOCK]
        distances = ((block**2).sum(1)[:, None] + squares - 2 * block @ others.T).clip(0)
        if points is others:
            np.fill_diagonal(distances[:, start:], 0)
        yield distances


def monge_distance(features1: np.ndarray, features2: np.ndarray, projections: int = 1000, seed: int = 0) -> float:
    """MIND (arXiv 2605.06797): 3 d times the mean squared difference of as many sorted values each, over random directions.

    No covariance is estimated, so 5,000 pictures say as much as FID's 50,000. Of the larger set as many rows are drawn as the smaller has.
    """
    rng = np.random.default_rng(seed)
    n = min(len(features1), len(features2))
    sets = [np.asarray(a if len(a) == n else a[np.sort(rng.choice(len(a), n, replace=False))], np.float64) for a in (features1, features2)]
    d = sets[0].shape[1]
    directions = rng.normal(size=(projections, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    total = 0.0
    for block in np.array_split(directions, -(-projections // _DIRECTIONS)):
        first, second = (np.sort(a @ block.T, axis=0) for a in sets)
        total += float(((first - second) ** 2).mean(0).sum())
    return 3 * d * total / projections
