"""How fast each sampler's error falls with its steps, where the truth is known: `python -m benchmarks.sampler_orders` writes
docs/samplers.png and the table of docs/samplers.md.

Data are a mixture of Gaussians in two dimensions, so the best x_0, the marginal at every noise level and, to the accuracy of an integrator
of order 8, the paths of the probability-flow ODE are known. Grids are even in log-SNR from the exact marginal at log-SNR -6 to +6.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from ldm_jax.diffusion import solvers
from ldm_jax.diffusion.grid import Grid, Level, grid_at
from ldm_jax.diffusion.process import CosineProcess
from ldm_jax.diffusion.samplers import image_keys, integrate

PROCESS = CosineProcess()
ENDS = (-3.0, 3.0)  # log(alpha/sigma)
WEIGHTS = np.array([0.3, 0.5, 0.2])
MEANS = np.array([[-1.5, 0.5], [0.4, -1.0], [2.0, 1.2]])
STDS = np.array([0.3, 0.5, 0.4])
UNIP = "unip"  # 'unipc' without its corrector
DETERMINISTIC = {"ddim": 1, "euler": 1, "heun": 2, "flow_heun": 2, "plms": 2, "dpmpp_2m": 2, UNIP: 2, "unipc": 3}
# Multistep solvers whose first steps are of lower order than the rest, and win in the end: their order shows from an exact history.
FROM_HISTORY = {"dpmpp_3m": 3, "lms": 4}
FINE = [160, 320, 640]
STOCHASTIC = {"ddpm": 1, "euler_ancestral": 1, "ddim with eta 0.5": 1, "dpmpp_2m_sde": 2, "heun with churn": 2}
MEAN, STD = 0.7, 0.4  # of the Gaussian data of `gaussian_error`


def best_x0(namespace: Any, x: Any, alpha: Any, sigma: Any) -> Any:
    """E[x_0 | x_t] of the mixture, for states [N, 2]."""
    variance = alpha**2 * STDS**2 + sigma**2
    offset = x[:, None, :] - alpha * MEANS
    logits = namespace.log(WEIGHTS / variance) - 0.5 * (offset**2).sum(-1) / variance
    share = namespace.exp(logits - logits.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    return (share[..., None] * (MEANS + (alpha * STDS**2 / variance)[:, None] * offset)).sum(1)


def grid_of(steps: int) -> Grid:
    return grid_at(PROCESS, PROCESS.time_of_ratio(np.exp(-np.linspace(*ENDS, steps + 1))))


def starts(count: int, seed: int = 0) -> np.ndarray:
    """States [count, 2] of the exact marginal at the first level."""
    rng, grid = np.random.default_rng(seed), grid_of(1)
    part = rng.choice(len(WEIGHTS), p=WEIGHTS, size=count)
    data = MEANS[part] + STDS[part, None] * rng.normal(size=(count, 2))
    return grid.alpha[0] * data + grid.sigma[0] * rng.normal(size=(count, 2))


def exact_ends(start: np.ndarray) -> np.ndarray:
    """Where the probability-flow ODE takes states from the first level to the last."""
    return exact_states(start, grid_of(1))[-1]


def exact_states(start: np.ndarray, grid: Grid) -> np.ndarray:
    """Where it takes them at every level, [steps + 1, N, 2]."""

    def slope(lam: float, flat: np.ndarray) -> np.ndarray:
        ratio = np.exp(-lam)
        alpha = 1 / np.hypot(1, ratio)
        x = alpha * flat.reshape(start.shape)
        return (-(x - alpha * best_x0(np, x, alpha, ratio * alpha)) / alpha).ravel()

    times = np.linspace(*ENDS, grid.steps + 1)
    solution = solve_ivp(slope, ENDS, (start / grid.alpha[0]).ravel(), t_eval=times, rtol=1e-11, atol=1e-12, method="DOP853")
    return grid.alpha[:, None, None] * solution.y.T.reshape(-1, *start.shape)


def table_of(kind: str, grid: Grid) -> solvers.Table:
    if kind == UNIP:
        return solvers.unipc(PROCESS, grid, solvers.Options(), corrects=False)
    solver = solvers.SOLVERS[kind.split()[0]]
    eta, churn = 0.5 if "eta" in kind else solver.eta or 0.0, 4.0 if "churn" in kind else 0.0
    return solver.table(PROCESS, grid, solvers.Options(eta=eta, churn=churn, churn_interval=(0.1, 5.0)))


def sampled(kind: str, steps: int, start: np.ndarray) -> np.ndarray:
    """The sampler's ends. Under `jax.enable_x64` in float64."""
    table = table_of(kind, grid_of(steps))

    def answer(x: jax.Array, level: Level, memory: Any) -> tuple[jax.Array, Any]:
        x0 = best_x0(jnp, x, level.alpha, level.sigma)
        return (x0 if table.basis == "x0" else (x - level.alpha * x0) / level.sigma), memory

    keys = image_keys(1, np.arange(len(start))) if table.noise.any() else None
    run = jax.jit(lambda x: integrate((answer, lambda x: ()), table, x, keys, None, 0).x0)
    return np.asarray(run(jnp.asarray(start)))


def path_errors(kind: str, counts: list[int], start: np.ndarray, exact: np.ndarray) -> list[float]:
    """Root mean square distance of the ends from the ODE's, by steps."""
    return [float(np.sqrt(np.mean((sampled(kind, steps, start) - exact) ** 2))) for steps in counts]


def history_errors(kind: str, counts: list[int], start: np.ndarray) -> list[float]:
    """As `path_errors`, from states that are exact at the first four levels."""
    errors = []
    for steps in counts:
        grid = grid_of(steps)
        table, exact = table_of(kind, grid), exact_states(start, grid)
        x, answers = start, list[np.ndarray]()
        for i in range(steps):
            x = exact[i] if i < 4 else x
            x0 = best_x0(np, x, grid.alpha[i], grid.sigma[i])
            answers = [x0 if table.basis == "x0" else (x - grid.alpha[i] * x0) / grid.sigma[i], *answers[: table.history - 1]]
            x = table.x[i, 0] * x + sum(weight * m for weight, m in zip(table.x[i, 2:], answers, strict=False))
        errors.append(float(np.sqrt(np.mean((x - exact[-1]) ** 2))))
    return errors


def moment_errors(kind: str, counts: list[int], start: np.ndarray) -> tuple[list[float], float]:
    """Largest error of the mean and the covariance of stochastic ends, by steps, and four standard errors of the worst of them."""
    grid = grid_of(1)
    alpha, sigma = grid.alpha[-1], grid.sigma[-1]
    mean = alpha * WEIGHTS @ MEANS
    spread = np.einsum("k,ki,kj->ij", WEIGHTS, MEANS, MEANS) + (WEIGHTS @ STDS**2) * np.eye(2)
    covariance = alpha**2 * spread - np.outer(mean, mean) + sigma**2 * np.eye(2)
    errors, noise = [], 0.0
    for steps in counts:
        x = sampled(kind, steps, start)
        products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
        found = np.concatenate([x.mean(0) - mean, (products.mean(0) - covariance).ravel()])
        errors.append(float(np.abs(found).max()))
        noise = max(x.std(0).max(), products.std(0).max()) * 4 / len(x) ** 0.5
    return errors, float(noise)


def gaussian_error(table: solvers.Table, grid: Grid) -> float:
    """The larger error of mean and standard deviation of a sampler's ends for Gaussian data, without drawing any.

    Answers then are affine in the state, so a sampler is an affine map of what it holds (state, base, older answers) row by row, and the
    first two moments of that follow exactly.
    """
    held = 2 + table.history - 1
    mean, covariance = np.zeros(held), np.zeros((held, held))
    mean[:2], covariance[:2, :2] = grid.alpha[0] * MEAN, (grid.alpha[0] * STD) ** 2 + grid.sigma[0] ** 2
    for row, (alpha, sigma) in enumerate(zip(table.level.alpha, table.level.sigma, strict=True)):
        gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
        offset = MEAN - gain * alpha * MEAN
        if table.basis == "eps":
            gain, offset = (1 - alpha * gain) / sigma, -alpha * offset / sigma
        # What a row sees: state, base, this answer, older ones.
        seen = np.insert(np.eye(held), 2, gain * np.eye(held)[0], axis=0)
        kept = np.eye(held + 1)[[0, 1, *range(2, held)]]
        kept[0] = table.x[row]
        if table.base is not None:
            kept[1] = table.base[row]
        mean, covariance = kept @ (seen @ mean + offset * np.eye(held + 1)[2]), kept @ seen @ covariance @ seen.T @ kept.T
        covariance[0, 0] += table.noise[row] ** 2
    std = np.hypot(grid.alpha[-1] * STD, grid.sigma[-1])
    return float(max(abs(mean[0] - grid.alpha[-1] * MEAN), abs(covariance[0, 0] ** 0.5 - std)))


def slope(counts: list[int], errors: list[float]) -> float:
    """Of -log error against log steps over the finest three."""
    return float(-np.polyfit(np.log(counts[-3:]), np.log(errors[-3:]), 1)[0])


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = [5, 10, 20, 40, 80, 160, 320]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    lines = ["| sampler | order | slope | error at " + " | ".join(str(n) for n in counts) + " steps |", "|---" * (3 + len(counts)) + "|"]
    with jax.enable_x64(True):
        start = starts(256)
        exact = exact_ends(start)
        for kind, order in (DETERMINISTIC | FROM_HISTORY).items():
            errors = path_errors(kind, counts, start, exact)
            axes[0].loglog(counts, errors, "o-", label=kind, markersize=3)
            shown = slope(FINE, history_errors(kind, FINE, start)) if kind in FROM_HISTORY else slope(counts, errors)
            lines.append(f"| {kind} | {order} | {shown:.2f} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")
        lines += [
            "",
            "| sampler | order | slope | error at " + " | ".join(str(n) for n in counts) + " steps | 4 standard errors |",
            "|---" * (4 + len(counts)) + "|",
        ]
        many = starts(100_000)
        for kind, order in STOCHASTIC.items():
            errors, noise = moment_errors(kind, counts, many)
            axes[1].loglog(counts, errors, "o-", label=kind, markersize=3)
            exactly = [gaussian_error(table_of(kind, grid_of(steps)), grid_of(steps)) for steps in counts]
            row = " | ".join(f"{e:.1e}" for e in errors)
            lines.append(f"| {kind} | {order} | {slope(counts, exactly):.2f} | {row} | {noise:.1e} |")
    axes[1].axhline(noise, color="gray", linestyle=":", label="4 standard errors")
    for axis, title in zip(axes, ("distance from the exact path", "mean and covariance, 100,000 samples"), strict=True):
        axis.set(xlabel="steps", ylabel="error", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    docs = Path(__file__).parent.parent / "docs"
    figure.savefig(docs / "samplers.png", dpi=110)
    page = docs / "samplers.md"
    marked = re.sub(r"(?s)(<!-- table -->\n).*(<!-- end -->)", lambda m: m[1] + "\n".join(lines) + "\n" + m[2], page.read_text())
    page.write_text(marked)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
