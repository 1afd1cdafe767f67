"""Noise schedules of discrete-time diffusion, as float64 tables of beta_1..beta_T on the host.

q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t), so q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t)
with abar_t = prod_{s <= t} (1 - beta_s) (Ho et al., arXiv 2006.11239, eq. 2 and 4).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

Entry = TypeVar("Entry")


def lookup(what: str, table: Mapping[str, Entry], kind: str) -> Entry:
    """The entry `kind` of an explicit table; raises ValueError that names `what` and the known kinds."""
    if kind not in table:
        raise ValueError(f"unknown {what} {kind!r}: choose one of {', '.join(table)}")
    return table[kind]


def linear(num_steps: int, start: float, end: float) -> np.ndarray:
    """The paper's "linear" schedule: linear in sqrt(beta), from `start` to `end` (arXiv 2112.10752, published code)."""
    return np.linspace(np.sqrt(start), np.sqrt(end), num_steps, dtype=np.float64) ** 2


def linear_beta(num_steps: int, start: float, end: float) -> np.ndarray:
    """Linear in beta, from `start` to `end` (Ho et al., arXiv 2006.11239, section 4)."""
    return np.linspace(start, end, num_steps, dtype=np.float64)


def sqrt(num_steps: int, start: float, end: float) -> np.ndarray:
    """Square roots of what is linear from `start` to `end`: the "sqrt" of the paper's code. `start` and `end` are betas squared."""
    return np.linspace(start, end, num_steps, dtype=np.float64) ** 0.5


def cosine(num_steps: int) -> np.ndarray:
    """abar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), s = 0.008, beta <= 0.999 (arXiv 2102.09672, eq. 17)."""
    offset = 0.008
    time = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    alpha_bar = np.cos((time + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


SCHEDULES: dict[str, Callable[..., np.ndarray]] = {"linear": linear, "linear_beta": linear_beta, "sqrt": sqrt, "cosine": cosine}
GIVEN = "given"
ENDS = {"linear": (0.0015, 0.0195), "linear_beta": (1e-4, 0.02), "sqrt": (1e-4, 0.02)}  # of the schedules that have them
_LOG_LEAST_ALPHA = -85.0  # of what float32 holds


def make_betas(kind: str, num_steps: int, start: float | None = None, end: float | None = None, betas: Sequence[float] = ()) -> np.ndarray:
    """Betas of a named schedule.

    Args:
      kind: a key of `SCHEDULES`, or 'given'.
      num_steps: T, at least 2.
      start, end: first and last beta, 0 < start <= end < 1; None or 0 takes the schedule's own default.
      betas: for 'given' alone, [T], each in (0, 1), but for the last, which may be 1 and leaves no signal.

    Returns: float64 [T].
    Raises: ValueError for an unknown kind, ends out of range, ends given to a schedule that has none, or no signal before the last time.
    """
    make = lookup("schedule", {**SCHEDULES, GIVEN: lambda num_steps: np.asarray(betas, np.float64)}, kind)
    if num_steps < 2:
        raise ValueError(f"a schedule needs at least 2 steps, got num_steps={num_steps}")
    given = {name: value for name, value in (("start", start), ("end", end)) if value}
    if given and kind not in ENDS:
        raise ValueError(f"schedule {kind!r} has no {' or '.join(given)}: leave them at 0")
    if len(betas) != (num_steps if kind == GIVEN else 0):
        raise ValueError(f"{len(betas)} betas for schedule {kind!r} of {num_steps} steps: 'given' takes one a step, others none")
    ends = dict(zip(("start", "end"), ENDS[kind], strict=True)) if kind in ENDS else {}
    table = make(num_steps, **(ends | given))
    if kind == GIVEN and not (np.all((table > 0) & (table <= 1)) and np.all(table[:-1] < 1)):
        raise ValueError("the betas of schedule 'given' must lie between 0 and 1; the last may be 1, and then no signal is left")
    if kind != GIVEN and (not np.all((table > 0) & (table < 1)) or table[0] > table[-1]):
        raise ValueError(f"schedule {kind!r} needs 0 < start <= end < 1, got start={table[0]:g}, end={table[-1]:g}")
    if np.sum(np.log1p(-table[:-1])) < 2 * _LOG_LEAST_ALPHA:
        raise ValueError(f"schedule {kind!r} leaves no signal before its last time: take smaller betas, or fewer")
    return table


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas [T] with abar_T = 0 exactly and abar_1 unchanged; the last is 1 (Lin et al., arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    return 1 - np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
