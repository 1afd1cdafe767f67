"""From features to metrics: which can be had of what is there, and why the others cannot."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ldm_jax.evaluation import metrics
from ldm_jax.evaluation.features import Features
from ldm_jax.evaluation.statistics import Gaussian, gaussian_of

ENOUGH = 10_000  # samples, below which a Fréchet distance says more of their number than of their quality
_REFERENCE_ROWS, _SAMPLE_ROWS = 10_000, 50_000  # that neighbours are searched among, as in ADM's evaluation
_SUBSET = 1000  # rows of KID's subsets
_SPLIT = 5000  # rows of the Inception score's parts
_NAMES = {"inception": ("FID", ""), "dino": ("FD-DINOv2", "-DINOv2"), "clip": ("FD-CLIP", "-CLIP"), "colors": ("FD-colors", "-colors")}
_SPATIAL, _LOGITS = "inception_spatial", "inception_logits"


@dataclass(frozen=True)
class Metric:
    """A number with what it is of. `error` is what the metric's definition gives: of KID and IS the deviation over their subsets."""

    name: str
    value: float
    n: int
    n_reference: int | None
    features: str
    better: str | None
    error: float | None = None


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of values [n]; None of a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


@dataclass(frozen=True)
class Missing:
    """A metric that is not given, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Side:
    """One of the two sets that are compared.

    Attributes:
      measured: features of its pictures, None where there are none.
      gaussians, stored_rows: what stored statistics bring; a Gaussian that is stored is taken before one that is measured.
      foreign: networks whose stored features are by other weights than those that measure now.
    """

    measured: Features | None
    gaussians: Mapping[str, Gaussian] = field(default_factory=dict)
    stored_rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    foreign: frozenset[str] = frozenset()
    _known: dict[str, Gaussian | None] = field(default_factory=dict, compare=False)

    def gaussian(self, name: str) -> Gaussian | None:
        """Of at least two rows, else None; computed once."""
        if name not in self._known:
            self._known[name] = self._gaussian(name)
        return self._known[name]

    def _gaussian(self, name: str) -> Gaussian | None:
        if name in self.gaussians:
            return self.gaussians[name]
        if name in self.stored_rows and len(self.stored_rows[name]) > 1:
            return gaussian_of([self.stored_rows[name]])
        if self.measured is not None and name in self.measured.names and len(self.measured) > 1:
            return gaussian_of(self.measured.blocks(name))
        return None

    def rows(self, name: str, most: int | None = None) -> np.ndarray | None:
        """Rows float32 [n,d] in an order that does not depend on that of files."""
        if name in self.stored_rows:
            return self.stored_rows[name][:most]
        if self.measured is not None and name in self.measured.names:
            return self.measured.rows(name, most)
        return None


Found = tuple[list[Metric], list[Missing]]


def score(samples: Features, reference: Side | None, allow_small: bool = False) -> Found:
    """All metrics of the samples' features; without a reference those that need none.

    Where there are not more samples than features, a Fréchet distance is not given unless `allow_small`.
    """
    found: Found = ([], [])
    if _LOGITS in samples.names:
        _add(found, [partial(_inception_score, samples)], "IS")
    ours = Side(samples)
    for name in (name for name in _NAMES if name in samples.names):
        frechet, suffix = _NAMES[name]
        if reference is None:
            found[1].append(Missing(f"{frechet}, KID{suffix}, ...", "no reference: give --reference or --config"))
            continue
        if name in reference.foreign:
            found[1].append(Missing(f"{frechet}, KID{suffix}, ...", f"the reference was measured with other weights of {name}"))
            continue
        _add(found, [partial(_frechet, frechet, name, ours, reference, allow_small)], frechet)
        if name == "inception":
            _add(found, [partial(_frechet, "sFID", _SPATIAL, ours, reference, allow_small)], "sFID")
        for make, title in _OF_ROWS.items():
            _add(found, [partial(make, suffix, name, ours, reference)], title.format(suffix))
    return found


class _Unavailable(Exception):
    """Why a metric cannot be had."""


def _add(found: Found, makers: list[Callable[[], list[Metric]]], name: str) -> None:
    try:
        for make in makers:
            found[0].extend(make())
    except _Unavailable as reason:
        found[1].append(Missing(name, str(reason)))


def _inception_score(samples: Features) -> list[Metric]:
    logits = samples.rows(_LOGITS).astype(np.float64)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    # A last part of few rows would count as much as one of 5,000, and say little: such are left out.
    whole = len(odds) if len(odds) < _SPLIT else len(odds) // _SPLIT * _SPLIT
    mean, deviation = metrics.inception_score((odds / odds.sum(1, keepdims=True))[:whole], _SPLIT)
    return [Metric("IS", mean, whole, None, _LOGITS, "higher", deviation if whole > _SPLIT else None)]


def _frechet(title: str, name: str, samples: Side, reference: Side, allow_small: bool) -> list[Metric]:
    ours, theirs = samples.gaussian(name), reference.gaussian(name)
    if ours is None or theirs is None:
        raise _Unavailable(f"the {'samples have' if ours is None else 'reference has'} no statistics of {name}")
    if ours.mean.shape != theirs.mean.shape:
        raise _Unavailable(f"the reference has {len(theirs.mean)} features of {name}, the samples {len(ours.mean)}")
    for what, one in (("samples", ours), ("pictures of the reference", theirs)):
        if 0 < one.number <= len(one.mean) and not allow_small:
            raise _Unavailable(f"{one.number} {what} have no covariance of {len(one.mean)} features; --allow-small gives it all the same")
    value = metrics.frechet_distance(ours.mean, ours.cov, theirs.mean, theirs.cov)
    return [Metric(title, value, ours.number, theirs.number or None, name, "lower")]


def _rows(name: str, samples: Side, reference: Side) -> tuple[np.ndarray, np.ndarray]:
    """Of both. Raises _Unavailable."""
    ours, theirs = samples.rows(name, _SAMPLE_ROWS), reference.rows(name, _SAMPLE_ROWS)
    if ours is None or theirs is None:
        raise _Unavailable("the reference has statistics alone, and no pictures")
    if ours.shape[1] != theirs.shape[1]:
        raise _Unavailable(f"the reference has {theirs.shape[1]} features of {name}, the samples {ours.shape[1]}")
    return ours, theirs


def _kernel(suffix: str, name: str, samples: Side, reference: Side) -> list[Metric]:
    ours, theirs = _rows(name, samples, reference)
    size = min(_SUBSET, len(ours), len(theirs))
    if size < 2:
        raise _Unavailable(f"{len(ours)} samples and {len(theirs)} pictures of the reference are too few")
    mean, deviation = metrics.kernel_distance(ours, theirs, size=size)
    error = deviation if size < max(len(ours), len(theirs)) else None  # all subsets are the whole sets
    return [Metric(f"KID{suffix}", mean, len(ours), len(theirs), name, "lower", error)]


def _neighbours(suffix: str, name: str, samples: Side, reference: Side) -> list[Metric]:
    ours, theirs = _rows(name, samples, reference)
    theirs = theirs[:_REFERENCE_ROWS]
    if min(len(ours), len(theirs)) <= 5:
        raise _Unavailable(f"{len(ours)} samples and {len(theirs)} pictures of the reference have too few neighbours")
    named = zip(
        ("precision", "recall", "density", "coverage"),
        (*metrics.precision_recall(theirs, ours), *metrics.density_coverage(theirs, ours)),
        strict=True,
    )
    return [Metric(f"{title}{suffix}", value, len(ours), len(theirs), name, "higher") for title, value in named]


def _monge(suffix: str, name: str, samples: Side, reference: Side) -> list[Metric]:
    ours, theirs = _rows(name, samples, reference)
    return [Metric(f"MIND{suffix}", metrics.monge_distance(ours, theirs), len(ours), len(theirs), name, "lower")]


_OF_ROWS = {_kernel: "KID{0}", _neighbours: "precision{0}, recall{0}, density{0}, coverage{0}", _monge: "MIND{0}"}
