"""Which times a sampler visits: from (process, spacing, steps) to the noise levels of its grid, float64 on the host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.diffusion.process import Array, Process
from ldm_jax.diffusion.schedules import lookup

_RHO = 7.0  # of 'karras'


class Grid(NamedTuple):
    """Noise levels, each [steps + 1], noisiest first; the last is where sampling ends.

    Networks are asked at all others, and never for clean data; where some noise is left at the last ('legacy_ldm'), 'heun' and 'flow_heun'
    ask there too.

    Attributes:
      t: times in the process's units.
      alpha, sigma: scale of x_0 and standard deviation of the noise there.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.t) - 1

    @property
    def ratio(self) -> np.ndarray:
        """sigma/alpha, noise in units of the signal: infinite where nothing of it is left."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    @property
    def half_log_snr(self) -> np.ndarray:
        """log(alpha/sigma), the lambda of DPM-Solver."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    def after(self, start: int) -> "Grid":
        """What is left of the grid from its level `start` on."""
        return Grid(self.t[start:], self.alpha[start:], self.sigma[start:])


def grid_at(process: Process, times: np.ndarray) -> Grid:
    """The levels of a process at these times."""
    times = np.asarray(times, np.float64)
    return Grid(times, np.asarray(process.alpha(times)), np.asarray(process.sigma(times)))


def _leading(process: Process, steps: int) -> np.ndarray:
    if process.num_times is None:
        raise ValueError("spacing 'leading' never visits pure noise on a continuous process: use 'trailing'")
    return np.arange(steps)[::-1] * (process.num_times // steps)


def _legacy_ldm(process: Process, steps: int) -> np.ndarray:
    if process.num_times is None:
        raise ValueError("spacing 'legacy_ldm' is of the discrete process alone: use 'trailing'")
    times = _leading(process, steps) + 1
    if times[0] >= process.num_times:
        raise ValueError(
            f"spacing 'legacy_ldm' with {steps} steps visits time {times[0]}, and the process has only {process.num_times}: use 'leading'"
        )
    return times


def _trailing(process: Process, steps: int) -> np.ndarray:
    remaining = np.arange(steps, 0, -1)
    if process.num_times is None:
        return process.time_at(remaining / steps)
    return np.round(remaining * process.num_times / steps) - 1


def _linspace(process: Process, steps: int) -> np.ndarray:
    if process.num_times is None:
        return _trailing(process, steps)
    return np.round(np.linspace(process.t_max, process.t_min, steps))


def _by_ratio(process: Process, steps: int, forward: Callable[[Any], Any], back: Callable[[Any], Any]) -> np.ndarray:
    """Times whose noise in units of the signal is even after `forward`, from the noisiest time to the least noisy."""
    ends = grid_at(process, np.array([process.t_max, process.t_min])).ratio
    if not np.all((ends > 0) & np.isfinite(ends)):
        raise ValueError(
            f"spacings 'karras' and 'exponential' need noise between 0 and infinity, and this process goes from {ends[1]:g} to {ends[0]:g}"
            " times the signal: use 'trailing'"
        )
    first, last = forward(ends)
    return process.time_of_ratio(np.clip(back(np.linspace(first, last, steps)), ends[1], ends[0]))


def _karras(process: Process, steps: int) -> np.ndarray:
    return _by_ratio(process, steps, lambda ratio: ratio ** (1 / _RHO), lambda root: root**_RHO)


def _exponential(process: Process, steps: int) -> np.ndarray:
    return _by_ratio(process, steps, np.log, np.exp)


SPACINGS: dict[str, Callable[[Process, int], np.ndarray]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "karras": _karras,
    "exponential": _exponential,
    "legacy_ldm": _legacy_ldm,
}


def make_grid(process: Process, spacing: str, steps: int) -> Grid:
    """The grid of a spacing, which ends with clean data.

    Spacings (arXiv 2305.08891, table 2): 'leading' 0, T/n, 2T/n, ..., of discrete processes only; 'trailing' ends at the noisiest time,
    best for few steps; 'linspace' visits both ends of a discrete process; on a continuous one both are the uniform grid of fractions
    1, 1 - 1/n, ..., 0. 'karras' is even in (sigma/alpha)^(1/7) (arXiv 2206.00364, eq. 5), 'exponential' in log(sigma/alpha).
    'legacy_ldm' is the published code's own: 'leading' one time later, and it ends at t=0, where a little noise is left.

    Raises ValueError where the process has fewer times than steps, or does not go with the spacing.
    """
    if process.num_times is not None and steps > process.num_times and spacing not in ("karras", "exponential"):
        raise ValueError(f"{steps} sampling steps, but the process has only {process.num_times} times")
    times = lookup("spacing", SPACINGS, spacing)(process, steps)
    return grid_at(process, np.append(times, process.t_min if spacing == "legacy_ldm" else process.t_clean))


class Level(NamedTuple):
    """One time and the process there, scalars (or one per row of a table)."""

    t: Array
    alpha: Array
    sigma: Array
