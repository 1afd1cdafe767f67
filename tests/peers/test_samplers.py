"""The samplers against diffusers' schedulers, with the same stand-in for a network: whole trajectories, float32."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ldm_jax.diffusion import solvers
from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.process import DiscreteProcess, FlowProcess, SigmaProcess
from ldm_jax.diffusion.samplers import SamplerSettings, image_keys, initial_noise, sample, trajectory

pytestmark = pytest.mark.peers

STEPS = (1, 2, 3, 7, 20, 50, 250, 999, 1000)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (4, 4, 3)


def network(namespace: Any, x: Any, t: Any) -> Any:
    """A smooth stand-in of state and time, for jax and torch alike."""
    return namespace.tanh(1.3 * x) * (0.7 + 0.2 * np.cos(t / 300) if isinstance(t, float) else 0.7 + 0.2 * namespace.cos(t / 300))


class Case(NamedTuple):
    """A scheduler and our settings."""

    kind: str
    scheduler: Callable[[], Any]
    prediction: str = "eps"
    spacing: str = "trailing"
    eta: float = 0.0


def ddim(spacing: str = "trailing", **more: Any) -> Any:
    return diffusers.DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing=spacing, **more)


def on(scheduler: Any, **more: Any) -> Callable[[], Any]:
    return lambda: scheduler(**BETAS, **{"timestep_spacing": "trailing"} | more)


CASES = {
    "DDIM": Case("ddim", ddim),
    "DDIM, v": Case("ddim", lambda: ddim(prediction_type="v_prediction"), "v"),
    "DDIM, x0": Case("ddim", lambda: ddim(prediction_type="sample"), "x0"),
    "DDIM, leading": Case("ddim", lambda: ddim("leading"), spacing="leading"),
    "DDIM, linspace": Case("ddim", lambda: ddim("linspace"), spacing="linspace"),
    "DDIM, legacy": Case("ddim", lambda: ddim("leading", steps_offset=1, set_alpha_to_one=False), spacing="legacy_ldm"),
    "DDIM, no signal at the end": Case("ddim", lambda: ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True), "v"),
    "DDIM, eta": Case("ddim", ddim, eta=0.6),
    "DDPM": Case("ddpm", on(diffusers.DDPMScheduler, clip_sample=False)),
    "PLMS": Case("plms", on(diffusers.PNDMScheduler, skip_prk_steps=True, set_alpha_to_one=True)),
    "PLMS, legacy": Case(
        "plms",
        on(diffusers.PNDMScheduler, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"),
        spacing="legacy_ldm",
    ),
    "LMS": Case("lms", on(diffusers.LMSDiscreteScheduler)),
    "Euler": Case("euler", on(diffusers.EulerDiscreteScheduler)),
    "Euler, karras": Case(
        "euler", on(diffusers.EulerDiscreteScheduler, use_karras_sigmas=True, timestep_spacing="linspace"), spacing="karras"
    ),
    "Euler, exponential": Case(
        "euler", on(diffusers.EulerDiscreteScheduler, use_exponential_sigmas=True, timestep_spacing="linspace"), spacing="exponential"
    ),
    "Euler, ancestral": Case("euler_ancestral", on(diffusers.EulerAncestralDiscreteScheduler)),
    "Heun": Case("heun", on(diffusers.HeunDiscreteScheduler)),
    "DPM-Solver++ 2M": Case("dpmpp_2m", on(diffusers.DPMSolverMultistepScheduler)),
    "DPM-Solver++ 2M, SDE": Case("dpmpp_2m_sde", on(diffusers.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++")),
    "DPM-Solver++ 2M, karras": Case(
        "dpmpp_2m", on(diffusers.DPMSolverMultistepScheduler, use_karras_sigmas=True, timestep_spacing="linspace"), spacing="karras"
    ),
    "DPM-Solver++ 3M": Case("dpmpp_3m", on(diffusers.DPMSolverMultistepScheduler, solver_order=3)),
    "UniPC": Case("unipc", on(diffusers.UniPCMultistepScheduler)),
    "UniPC, karras": Case(
        "unipc", on(diffusers.UniPCMultistepScheduler, use_karras_sigmas=True, timestep_spacing="linspace"), spacing="karras"
    ),
}
IN_RATIO = ("Euler", "Heun", "LMS")  # these hold x/alpha


def process_of(scheduler: Any) -> DiscreteProcess:
    """Ours, with the peer's own table: its float32 product of 1 - beta alone moves sigma by 1e-5."""
    alpha_bar = scheduler.alphas_cumprod.double().numpy().copy()
    betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return DiscreteProcess("given", betas=tuple(betas))


def fresh_noise(keys: jax.Array, rows: int) -> np.ndarray:
    """What is added in each row of a table, [rows, B, *SHAPE]."""
    draw = jax.vmap(lambda row: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, row), SHAPE))(keys))
    return np.asarray(draw(jnp.arange(rows)))


def theirs(name: str, scheduler: Any, steps: int, noise: np.ndarray, fresh: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Their loop. Four differences are taken out of it, and named here:

    - DDIM and PNDM step by T // steps, not to the next time of their own grid, which is elsewhere where steps does not divide T: they are
      told the distance.
    - Euler, Heun and LMS begin with alpha_T sigma_T/alpha_T z, the noise without the data's own variance: they begin with ours.
    - Noise on the way is drawn from one generator for the batch: they are given ours.
    - With karras sigmas DPM-Solver and UniPC ask the network for whole times, nearest to where those sigmas are (which alone moves a
      trajectory by 1e-3): they are told the times themselves.
    """
    scheduler.set_timesteps(steps)
    if name.endswith("karras") and not name.startswith(IN_RATIO):
        logs = np.log(((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().numpy())
        scheduler.timesteps = torch.tensor([float(scheduler._sigma_to_t(np.asarray(sigma), logs)) for sigma in scheduler.sigmas[:-1]])
    times = [float(t) for t in scheduler.timesteps]
    x = torch.from_numpy(noise)
    if name.startswith(IN_RATIO):
        x = x * float((scheduler.sigmas[0] ** 2 + 1) ** 0.5)
    now = [0]
    monkeypatch.setattr(inspect.getmodule(type(scheduler)), "randn_tensor", lambda *a, **b: torch.from_numpy(fresh[now[0]]), raising=False)
    clean = 1.0 - 1000 // steps if CASES[name].spacing == "legacy_ldm" else -1.0
    plms = name.startswith("PLMS")
    more = {"eta": CASES[name].eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    for i, t in enumerate(scheduler.timesteps):
        now[0] = i
        if name.startswith("DDIM") or plms:
            following = next((u for u in times[i + 1 :] if u < times[i]), clean)
            before, after = (times[0], times[1]) if plms and i == 1 else (times[i], following)
            scheduler.register_to_config(num_train_timesteps=round(before - after) * steps)
        x = scheduler.step(network(torch, scheduler.scale_model_input(x, t), float(t)), t, x, **more).prev_sample
    return x.numpy()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_trajectories(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    scheduler = case.scheduler()
    process = process_of(scheduler)
    noise, keys = np.asarray(initial_noise(0, jnp.arange(2), SHAPE)), image_keys(0, jnp.arange(2))
    settings = SamplerSettings(case.kind, steps, case.eta, case.spacing)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        return network(jnp, x, t[0])

    if case.spacing == "legacy_ldm" and steps == 1000:
        with pytest.raises(ValueError, match="visits time 1000"):  # theirs, like the paper's code, reads beyond its table
            trajectory(denoise, process, case.prediction, settings, noise, keys)
        return
    if case.spacing in ("linspace", "karras", "exponential") and steps == 1 and case.kind not in ("dpmpp_2m", "unipc"):
        assert make_grid(process, case.spacing, 1).t[0] == pytest.approx(999)
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [0]  # they take pure noise for clean data
        return
    if case.kind == "dpmpp_3m":  # theirs has half of the second derivative's weight, and order 2
        table = functools.partial(solvers.dpmpp_3m, published=True)
        monkeypatch.setitem(solvers.SOLVERS, "dpmpp_3m", solvers.Solver(table))
    expected = theirs(name, scheduler, steps, noise, fresh_noise(keys, steps + 1), monkeypatch)
    found = jax.jit(lambda noise: trajectory(denoise, process, case.prediction, settings, noise, keys).x0)(noise)
    np.testing.assert_allclose(found, expected, rtol=0, atol=(1e-5 if steps <= 50 else 1e-4) * np.abs(expected).max())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("kind", "shift"), [("euler", 1.0), ("euler", 3.0), ("flow_heun", 1.0)])
def test_rectified_flow(kind: str, shift: float, steps: int) -> None:
    """Their Heun has no last time but its least sigma: both are given the same times, ours ending at 0 as theirs does after them."""
    sigmas = np.linspace(1, 0, steps + 1)[:-1]
    noise = np.asarray(initial_noise(0, jnp.arange(2), SHAPE))
    process = FlowProcess(shift)
    settings = SamplerSettings(kind, steps)
    if kind == "euler":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=list(sigmas))
    else:
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(steps)
        scheduler.sigmas = torch.from_numpy(np.concatenate([[1.0], np.repeat(sigmas[1:], 2), [0.0]])).float()
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    x = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        x = scheduler.step(network(torch, x, float(t)), t, x).prev_sample
    found = sample(lambda x, t: network(jnp, x, 1000 * t[0]), process, "flow", settings, jnp.asarray(noise))
    np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=(1e-5 if steps <= 50 else 1e-4) * np.abs(x.numpy()).max())


@pytest.mark.parametrize("steps", STEPS)
def test_edm(steps: int) -> None:
    """Two differences: their Euler begins with sqrt(sigma^2 + 1) z whatever the data, and is given our start; it asks the network for
    log(sigma)/4. One or two steps from sigma 80 to clean data leave a rounding of the start in theirs, and none in ours."""
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(steps)
    noise = np.asarray(initial_noise(0, jnp.arange(2), SHAPE))
    start = noise * np.float32(np.hypot(80.0, 0.5))
    x = torch.from_numpy(start)
    for t in scheduler.timesteps:
        x = scheduler.step(network(torch, scheduler.scale_model_input(x, t), float(t)), t, x).prev_sample
    process = SigmaProcess(sigma_data=0.5)

    def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return network(jnp, process.input_scale(sigma[0]) * x, 0.25 * jnp.log(sigma[0]))

    settings = SamplerSettings("euler", steps, spacing="karras")
    found = sample(denoise, process, "edm", settings, jnp.asarray(noise))
    with jax.enable_x64(True):
        exact = np.asarray(sample(denoise, process, "edm", settings, jnp.asarray(noise, jnp.float64)))
    tolerance = (1e-5 if steps <= 50 else 1e-4) * np.abs(exact).max()
    np.testing.assert_allclose(found, exact, rtol=0, atol=tolerance)
    np.testing.assert_allclose(x.numpy(), found, rtol=0, atol=tolerance + (np.abs(start).max() * 2**-24 if steps <= 2 else 0))


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_tables(name: str) -> None:
    """Ours are float64 products, theirs float32: sigma differs by up to 5e-5."""
    ours = {"scaled_linear": "linear", "linear": "linear_beta", "squaredcos_cap_v2": "cosine"}[name]
    ends = {} if ours == "cosine" else {"beta_start": 0.00085, "beta_end": 0.012}
    theirs = diffusers.DDIMScheduler(beta_schedule=name, **ends).alphas_cumprod.double().numpy()
    process = DiscreteProcess(ours, *ends.values())
    times = np.arange(1000)
    np.testing.assert_allclose(process.sigma(times), np.sqrt(1 - theirs), atol=5e-5)
    np.testing.assert_allclose(process.alpha(times), np.sqrt(theirs), atol=5e-5)
    rescaled = diffusers.DDIMScheduler(beta_schedule=name, **ends, rescale_betas_zero_snr=True).alphas_cumprod.double().numpy()
    zero = DiscreteProcess(ours, *ends.values(), zero_terminal_snr=True)
    np.testing.assert_allclose(zero.alpha(times), np.sqrt(rescaled), atol=5e-5)
