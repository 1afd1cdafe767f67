"""How much of the gap between a control and a ceiling is closed, by scores of single pictures: `obedience.scores` of three sets of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Comparison = dict[str, dict[str, Any]]
_SETS = ("conditioned", "control", "ceiling")


def compare(conditioned: Mapping[str, np.ndarray], control: Mapping[str, np.ndarray], ceiling: Mapping[str, np.ndarray]) -> Comparison:
    """Holds scores under a condition against those of a control (the condition of another scene) and of a ceiling (the scenes themselves).

    Arrays of one length are scores of the same scenes, and compared scene by scene over those where none is NaN. Others are taken as
    independent, each without its NaN.

    Args:
      conditioned, control, ceiling: float [N] for each metric; of equal metrics.

    Returns:
      {metric: row} of Python's numbers; a metric that has no number for one of the three is left out. A row has
        n: how many scores `conditioned` is the mean of;
        conditioned, control, ceiling: means, and their standard errors as `<name>_se` (0 for a single score);
        z: conditioned - control in standard errors;
        closed: (conditioned - control) / (ceiling - control), and its standard error to first order (the delta method) as `closed_se`;
        half_z: closed - 1/2 in standard errors.
      The last three are None where control and ceiling have one mean. Scores that are all equal have no spread, and yet prove no more than
      their number: |z| and |half_z| are at most the smallest number of scores.

    Raises:
      ValueError: for sets of other metrics.
    """
    if not set(conditioned) == set(control) == set(ceiling):
        raise ValueError(f"metrics differ: {sorted(conditioned)}, {sorted(control)} and {sorted(ceiling)}")
    table: Comparison = {}
    for metric in conditioned:
        sets = [np.asarray(scores[metric], np.float64) for scores in (conditioned, control, ceiling)]
        paired = len({len(values) for values in sets}) == 1
        known = [~np.isnan(values) for values in sets]
        sets = [values[np.logical_and.reduce(known) if paired else k] for values, k in zip(sets, known, strict=True)]
        if min(map(len, sets)):
            table[metric] = _row(sets, paired)
    return table


def _row(sets: list[np.ndarray], paired: bool) -> dict[str, Any]:
    least = min(map(len, sets))
    means = [float(values.mean()) for values in sets]
    row: dict[str, Any] = {"n": len(sets[0])}
    for name, mean, values in zip(_SETS, means, sets, strict=True):
        row |= {name: mean, f"{name}_se": _error([values], [1.0], paired)}
    gain, gap = means[0] - means[1], means[2] - means[1]
    row |= {"z": _in_errors(gain, _error(sets, [1.0, -1.0, 0.0], paired), least), "closed": None, "closed_se": None, "half_z": None}
    if gap:
        closed = gain / gap
        # Derivatives of `closed` by the three means.
        error = _error(sets, [1 / gap, (closed - 1) / gap, -closed / gap], paired)
        row |= {"closed": closed, "closed_se": error, "half_z": _in_errors(closed - 0.5, error, least)}
    return row


def _error(sets: list[np.ndarray], weights: list[float], paired: bool) -> float:
    """The standard error of a weighted sum of means, of the same scenes or of independent ones."""
    terms = [weight * values for weight, values in zip(weights, sets, strict=True)]
    parts = [np.sum(terms, axis=0)] if paired else terms
    return float(sum(part.var(ddof=1) / len(part) for part in parts if len(part) > 1) ** 0.5)


def _in_errors(value: float, error: float, most: int) -> float:
    return float(np.clip(value / error, -most, most)) if error else float(np.sign(value) * most)


def format_comparison(table: Comparison) -> str:
    """The table as aligned text, a line for each metric."""
    width = max(map(len, table), default=0) + 2
    lines = [f"{'':<{width}}{'n':>6}" + "".join(f"{head:>18}" for head in (*_SETS, "closed")) + f"{'z':>8}{'half z':>8}"]
    for metric, row in table.items():
        cells = "".join(f"{_cell(row, name):>18}" for name in (*_SETS, "closed"))
        zs = "".join(f"{'-' if row[name] is None else format(row[name], '.1f'):>8}" for name in ("z", "half_z"))
        lines.append(f"{metric:<{width}}{row['n']:>6}{cells}{zs}")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], name: str) -> str:
    return "-" if row[name] is None else f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}"
