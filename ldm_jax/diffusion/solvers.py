"""Each sampler as a table of numbers.

Every solver here is linear in what it has seen: after the network's answer m_r at row r, the next state is

    x' = a x + b base + c_0 m_r + c_1 m_{r-1} + ... + s z,    z ~ N(0, 1),

where `base` is a state kept from an earlier row (a corrector or a second stage starts there again). The coefficients depend on the grid
alone, so they are computed once, in float64 on the host (differences like 1 - alpha^2/alpha'^2 cancel in float32), and one loop,
`samplers.sample`, serves all of them with one evaluation of the network a row.

Notation: lambda = log(alpha/sigma), h = lambda' - lambda the length of a step, primes are the level that the step leads to.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.diffusion.grid import Grid, Level, grid_at
from ldm_jax.diffusion.process import Process

Source = str | int  # "x", "base", or the number of the row whose answer it is
Combination = Mapping[Source, float]
X: Combination = {"x": 1.0}


@dataclass(frozen=True)
class Options:
    """What a solver may be told.

    Attributes:
      eta: share of the ancestral noise, of 'ddim'.
      churn, churn_interval, churn_noise: of 'heun' (arXiv 2206.00364, algorithm 2), S_churn, (S_tmin, S_tmax) and S_noise, in units of
        sigma/alpha.
    """

    eta: float = 0.0
    churn: float = 0.0
    churn_interval: tuple[float, float] = (0.0, math.inf)
    churn_noise: float = 1.0


class Row(NamedTuple):
    """One evaluation of the network at `level`, and what follows from it.

    `base` None leaves the base as it is; `done` is False where the step that the row belongs to goes on with the next.
    """

    level: Level
    x: Combination
    base: Combination | None = None
    noise: float = 0.0
    done: bool = True


@dataclass(frozen=True)
class Table:
    """A solver on a grid.

    Attributes:
      basis: what is kept of the network's answers, 'x0' or 'eps'.
      level: of each row, [R].
      x: [R, 2 + K], coefficients of (x, base, this row's answer, the one before, ...).
      base: the same for the next base; None where there is none.
      noise: [R], standard deviation of what is added to the state.
      done: [R], whether the row completes a step.
    """

    basis: str
    level: Level
    x: np.ndarray
    base: np.ndarray | None
    noise: np.ndarray
    done: np.ndarray

    @property
    def history(self) -> int:
        """K, how many answers are kept."""
        return self.x.shape[1] - 2


def compiled(basis: str, rows: list[Row]) -> Table:
    """Rows as arrays."""
    combinations = [c for row in rows for c in (row.x, row.base or {})]
    ages = [r // 2 - source for r, c in enumerate(combinations) for source in c if isinstance(source, int)]
    width = 3 + max(ages, default=0)

    def vector(number: int, combination: Combination) -> np.ndarray:
        found = np.zeros(width)
        for source, value in combination.items():
            found[{"x": 0, "base": 1}[source] if isinstance(source, str) else 2 + number - source] += value
        return found

    kept: Combination = {"base": 1.0}
    base = np.stack([vector(i, kept if row.base is None else row.base) for i, row in enumerate(rows)])
    level = Level(*(np.array([row.level[k] for row in rows], np.float64) for k in range(3)))
    return Table(
        basis,
        level,
        np.stack([vector(i, row.x) for i, row in enumerate(rows)]),
        base if any(row.base is not None for row in rows) else None,
        np.array([row.noise for row in rows], np.float64),
        np.array([row.done for row in rows]),
    )


def _sum(*terms: tuple[float, Mapping[Any, float]]) -> dict[Source, float]:
    total: dict[Source, float] = {}
    for factor, combination in terms:
        for source, value in combination.items():
            total[source] = total.get(source, 0.0) + factor * value
    return total


def _level(grid: Grid, i: int) -> Level:
    return Level(grid.t[i], grid.alpha[i], grid.sigma[i])


def _exponential_euler(grid: Grid, i: int) -> tuple[float, float]:
    """(factor of x, factor of x_0) of the step from level i that is exact for a constant x_0; the second is -alpha' (e^-h - 1)."""
    decay = grid.sigma[i + 1] / grid.sigma[i]
    return decay, grid.alpha[i + 1] - grid.alpha[i] * decay


def ancestral_noise(grid: Grid, eta: float) -> np.ndarray:
    """The noise [steps] of DDIM (arXiv 2010.02502, eq. 16) for any process: eta sigma' sigma_step/sigma, where
    sigma_step^2 = sigma^2 - (alpha/alpha')^2 sigma'^2 is the variance of q(x | x')."""
    alpha, sigma, alpha_next, sigma_next = grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:]
    variance = sigma**2 - (alpha / alpha_next * sigma_next) ** 2
    return eta * sigma_next * np.sqrt(np.maximum(variance, 0)) / sigma


def ddim(process: Process, grid: Grid, options: Options) -> Table:
    """Song et al., arXiv 2010.02502, eq. 12: x' = alpha' x_0 + sqrt(sigma'^2 - s^2) eps + s z.

    With eta = 0 it is Euler's method in sigma/alpha and, on rectified flow, in t; with eta = 1 the ancestral sampler of DDPM
    (arXiv 2006.11239, eq. 7), which in sigma/alpha is the ancestral Euler method.
    """
    noise = ancestral_noise(grid, options.eta)
    rows: list[Row] = []
    for i in range(grid.steps):
        back = math.sqrt(max(grid.sigma[i + 1] ** 2 - noise[i] ** 2, 0)) / grid.sigma[i]
        rows.append(Row(_level(grid, i), {"x": back, i: grid.alpha[i + 1] - grid.alpha[i] * back}, noise=noise[i]))
    return compiled("x0", rows)


_MOST_NOISE = 1e4


def _check_signal(kind: str, grid: Grid) -> None:
    """Trapezoids in sigma/alpha do not hold far above 1: a step down from 2e4 (the discrete cosine schedule) to 30 weighs the difference
    of two answers with hundreds, which is wrong in exact arithmetic, and in float32 loses what is left."""
    if not grid.ratio[0] <= _MOST_NOISE:
        raise ValueError(
            f"sampler {kind!r} needs some signal at the first time, and there noise is {grid.ratio[0]:.3g} times as large (at most"
            f" {_MOST_NOISE:g}): use 'flow_heun'"
        )


def heun(process: Process, grid: Grid, options: Options) -> Table:
    """Karras et al., arXiv 2206.00364, algorithms 1 and 2, in sigma/alpha: two evaluations a step, but for the step to clean data.

    With churn, the state is noised up before a step, never beyond the process's noisiest time.
    """
    _check_signal("heun", grid)
    ratio, alpha = grid.ratio, grid.alpha
    low, high = options.churn_interval
    up = np.where((ratio >= low) & (ratio <= high), min(options.churn / grid.steps, math.sqrt(2) - 1), 0.0)
    start = grid
    if np.any(up):
        limit = float(grid_at(process, np.array([process.t_max])).ratio[0])
        raised = np.maximum(ratio, np.minimum(ratio * (1 + up), limit))
        times = np.where(raised > ratio, process.time_of_ratio(np.where(ratio > 0, raised, 1.0)), grid.t)
        start = grid_at(process, times)
    rows: list[Row] = []
    for i in range(grid.steps):
        keep, span = alpha[i + 1] / start.alpha[i], alpha[i + 1] * (ratio[i + 1] - start.ratio[i])
        rows.append(Row(_level(start, i), {"x": keep, len(rows): span}, base=X, done=ratio[i + 1] == 0))
        if ratio[i + 1] > 0:
            first = len(rows) - 1
            corrected = {"base": keep, first: span / 2, first + 1: span / 2}
            again = 1.0 if i + 1 == grid.steps else start.alpha[i + 1] / alpha[i + 1]
            fresh = 0.0 if i + 1 == grid.steps else max(start.ratio[i + 1] ** 2 - ratio[i + 1] ** 2, 0.0)
            noise = options.churn_noise * start.alpha[i + 1] * math.sqrt(fresh)
            rows.append(Row(_level(grid, i + 1), _sum((again, corrected)), noise=noise))
    return compiled("eps", rows)


def flow_heun(process: Process, grid: Grid, options: Options) -> Table:
    """The trapezoidal rule on straight paths: with y = x/(alpha + sigma) and u = sigma/(alpha + sigma) every process is
    y = (1 - u) x_0 + u eps, whose ODE dy/du = eps - x_0 is finite at both ends; on rectified flow u is t and y is x."""
    total = grid.alpha + grid.sigma
    u = grid.sigma / total
    rows: list[Row] = []

    def slope(number: int, level: int, state: str) -> Combination:
        """eps - x_0 = (x - (alpha + sigma) x_0)/sigma."""
        return {state: 1 / grid.sigma[level], number: -total[level] / grid.sigma[level]}

    for i in range(grid.steps):
        span, keep = total[i + 1] * (u[i + 1] - u[i]), total[i + 1] / total[i]
        rows.append(Row(_level(grid, i), _sum((keep, X), (span, slope(len(rows), i, "x"))), base=X, done=u[i + 1] == 0))
        if grid.sigma[i + 1] > 0:
            halves = (span / 2, slope(len(rows) - 1, i, "base")), (span / 2, slope(len(rows), i + 1, "x"))
            rows.append(Row(_level(grid, i + 1), _sum((keep, {"base": 1.0}), *halves)))
    return compiled("x0", rows)


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(process: Process, grid: Grid, options: Options) -> Table:
    """Pseudo linear multistep (Liu et al., arXiv 2202.09778, eq. 12): Adams-Bashforth on eps, moved along as DDIM would.

    The first step is a trapezoidal one and costs one evaluation more.
    """
    _check_signal("plms", grid)

    def moved(i: int, state: str, eps: Combination) -> Combination:
        keep = grid.alpha[i + 1] / grid.alpha[i]
        return _sum((keep, {state: 1.0}), (grid.sigma[i + 1] - keep * grid.sigma[i], eps))

    rows = [Row(_level(grid, 0), moved(0, "x", {0: 1.0}), base=X, done=grid.steps == 1)]
    seen: list[Source] = [0]
    if grid.steps > 1:
        rows.append(Row(_level(grid, 1), moved(0, "base", {0: 0.5, 1: 0.5})))  # this answer is used once
    for i in range(1, grid.steps):
        seen = [len(rows), *seen][:4]
        weights = _ADAMS_BASHFORTH[len(seen) - 1]
        rows.append(Row(_level(grid, i), moved(i, "x", dict(zip(seen, weights, strict=True)))))
    return compiled("eps", rows)


def lms(process: Process, grid: Grid, options: Options) -> Table:
    """Linear multistep of order 4 in sigma/alpha: eps is the polynomial through the last answers, integrated exactly."""
    ratio, rows = grid.ratio, list[Row]()
    for i in range(grid.steps):
        span = ratio[i + 1] - ratio[i]
        nodes = (ratio[max(0, i - 3) : i + 1][::-1] - ratio[i]) / span
        weights = [_lagrange_integral(nodes, j) * span * grid.alpha[i + 1] for j in range(len(nodes))]
        rows.append(Row(_level(grid, i), {"x": grid.alpha[i + 1] / grid.alpha[i], **{i - j: w for j, w in enumerate(weights)}}))
    return compiled("eps", rows)


def _lagrange_integral(nodes: np.ndarray, j: int) -> float:
    """The integral over [0, 1] of the polynomial that is 1 at node j and 0 at the others."""
    others = np.delete(nodes, j)
    integral = np.polynomial.Polynomial(np.polynomial.polynomial.polyfromroots(others) / np.prod(nodes[j] - others)).integ()
    return float(integral(1.0) - integral(0.0))


def dpmpp_2m(process: Process, grid: Grid, options: Options) -> Table:
    """DPM-Solver++(2M), Lu et al., arXiv 2211.01095, algorithm 2; the step to clean data is of first order."""
    h, rows = np.diff(grid.half_log_snr), list[Row]()
    for i in range(grid.steps):
        decay, gain = _exponential_euler(grid, i)
        change = _slope(h, i) if _order(grid, i, 2) > 1 else {}
        rows.append(Row(_level(grid, i), _sum((decay, X), (gain, {i: 1.0}), (gain / 2, change))))
    return compiled("x0", rows)


def dpmpp_2m_sde(process: Process, grid: Grid, options: Options) -> Table:
    """SDE-DPM-Solver++(2M), arXiv 2211.01095, appendix: the same for the reverse SDE, with the noise of a step drawn exactly."""
    h, rows = np.diff(grid.half_log_snr), list[Row]()
    for i in range(grid.steps):
        decay, _ = _exponential_euler(grid, i)
        left = grid.alpha[i] * decay / grid.alpha[i + 1]  # e^-h
        gain = grid.alpha[i + 1] * (1 - left**2)
        change = _slope(h, i) if _order(grid, i, 2) > 1 else {}
        noise = grid.sigma[i + 1] * math.sqrt(1 - left**2)
        rows.append(Row(_level(grid, i), _sum((decay * left, X), (gain, {i: 1.0}), (gain / 2, change)), noise=noise))
    return compiled("x0", rows)


def dpmpp_3m(process: Process, grid: Grid, options: Options, published: bool = False) -> Table:
    """DPM-Solver++ multistep of order 3 (arXiv 2211.01095, appendix B): the first two derivatives of x_0 in lambda from three answers.

    It begins with orders 1 and 2; with fewer than 15 steps it also ends with 2 and 1, and the step to clean data is always of order 1.

    As `published`, in the paper's code and in diffusers, the second divided difference, which is half of h^2 x_0'', stands where the whole
    belongs: the step then is not exact for a quadratic x_0, and the order is 2.
    """
    h, rows = np.diff(grid.half_log_snr), list[Row]()
    for i in range(grid.steps):
        decay, gain = _exponential_euler(grid, i)
        order = _order(grid, i, min(3, grid.steps - i) if grid.steps < 15 else 3)
        terms: list[tuple[float, Combination]] = [(decay, X), (gain, {i: 1.0})]
        if order == 2:
            terms.append((gain / 2, _slope(h, i)))
        elif order == 3:
            last, before = h[i - 1] / h[i], h[i - 2] / h[i]
            older = {i - 1: 1 / before, i - 2: -1 / before}
            weight = last / (last + before)
            first = _sum((1 + weight, _slope(h, i)), (-weight, older))
            bend = (1 if published else 2) / (last + before)
            second = _sum((bend, _slope(h, i)), (-bend, older))
            phi = math.expm1(-h[i])
            terms += [(grid.alpha[i + 1] * (phi / h[i] + 1), first), (-grid.alpha[i + 1] * ((phi + h[i]) / h[i] ** 2 - 0.5), second)]
        rows.append(Row(_level(grid, i), _sum(*terms)))
    return compiled("x0", rows)


def _order(grid: Grid, i: int, highest: int) -> int:
    """The order that step i can have: as many answers as there are, and 1 to clean data, where lambda is infinite."""
    return 1 if grid.sigma[i + 1] == 0 else min(highest, i + 1)


def _slope(h: np.ndarray, i: int) -> Combination:
    """The change of x_0 over step i if it goes on as over the step before."""
    return {i: h[i] / h[i - 1], i - 1: -h[i] / h[i - 1]}


def unipc(process: Process, grid: Grid, options: Options, order: int = 2, corrects: bool = True) -> Table:
    """UniPC in its B_2 form (Zhao et al., arXiv 2302.04867, algorithms 5 and 6), predicting x_0.

    An answer first corrects the state that it was given for, then predicts the next one: no evaluation more than 'dpmpp_2m'.
    """
    rows: list[Row] = []
    used = 0  # order of the last prediction
    for i in range(grid.steps):
        state = X
        if corrects and i and np.isfinite(grid.half_log_snr[i - 1]):
            state = _unified(grid, i - 1, used, "base", correcting=True)
        highest = min(order, grid.steps - i) if grid.sigma[-1] == 0 else order
        used = max(1, int(np.sum(np.isfinite(grid.half_log_snr[max(0, i + 1 - highest) : i + 1]))))
        predicted = _unified(grid, i, used, "x", correcting=False)
        keep = predicted.pop("x")
        rows.append(Row(_level(grid, i), _sum((1.0, predicted), (keep, state)), base=state))
    return compiled("x0", rows)


def _unified(grid: Grid, i: int, order: int, state: str, correcting: bool) -> dict[Source, float]:
    """UniP (or UniC, with the answer at the end of the step too) of an order over step i, from `state` at its beginning."""
    lam = grid.half_log_snr
    h = lam[i + 1] - lam[i]
    decay, gain = _exponential_euler(grid, i)
    terms: list[tuple[float, Combination]] = [(decay, {state: 1.0}), (gain, {i: 1.0})]
    places = [(lam[i - k] - lam[i]) / h for k in range(1, order)]
    differences: list[Combination] = [{i - k: 1 / place, i: -1 / place} for k, place in zip(range(1, order), places, strict=True)]
    if correcting:
        places, differences = [*places, 1.0], [*differences, {i + 1: 1.0, i: -1.0}]
    for weight, difference in zip(_unified_weights(h, places), differences, strict=True):
        terms.append((gain * weight, difference))
    return _sum(*terms)


def _unified_weights(h: float, places: list[float]) -> list[float]:
    """Weights that make the step exact for polynomials of x_0 in lambda; with one place the published 1/2."""
    if len(places) < 2:
        return [0.5] * len(places)
    shrink = math.expm1(-h)
    phi, factorial, wanted = shrink / -h - 1, 1.0, []
    for k in range(1, len(places) + 1):
        wanted.append(phi * factorial / shrink)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return list(np.linalg.solve(np.vander(places, increasing=True).T, wanted))


class Solver(NamedTuple):
    """How a sampler's table is made, and what may be said about it.

    Attributes:
      eta: the sampler's own, None where it is the user's choice.
      churns: whether it knows the churn of `Options`.
    """

    table: Callable[[Process, Grid, Options], Table]
    eta: float | None = 0.0
    churns: bool = False


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, None),
    "ddpm": Solver(ddim, 1.0),
    "euler": Solver(ddim),
    "euler_ancestral": Solver(ddim, 1.0),
    "heun": Solver(heun, churns=True),
    "flow_heun": Solver(flow_heun),
    "plms": Solver(plms),
    "lms": Solver(lms),
    "dpmpp_2m": Solver(dpmpp_2m),
    "dpmpp_2m_sde": Solver(dpmpp_2m_sde),
    "dpmpp_3m": Solver(dpmpp_3m),
    "unipc": Solver(unipc),
}
