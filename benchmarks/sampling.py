"""Speed of guided sampling, from noise to latents: one compiled loop against a loop in Python, and against diffusers.

    python -m benchmarks.sampling [--sampler ddim] [--steps 50] [--batch 4] [--channels 64] [--size 16] [--compare diffusers]

The network is the paper's text UNet, narrower. Prints one line of JSON with seconds a run (the best block, contenders by turns): `scan`
is our program; `python` the same step jitted and called from Python; `network` the scan with the network's evaluations and nothing else;
`diffusers` UNet2DConditionModel with the same weights and DDIMScheduler, eager. `outside_network` is the scan with a network that costs
nothing, in milliseconds and as a share of the whole.
"""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.train_step import Contender, measure
from ldm_jax.cli import keep_freed_memory
from ldm_jax.diffusion.grid import Level, make_grid
from ldm_jax.diffusion.guidance import guided
from ldm_jax.diffusion.prediction import solve
from ldm_jax.diffusion.process import DiscreteProcess
from ldm_jax.diffusion.samplers import SamplerSettings, sample
from ldm_jax.diffusion.solvers import SOLVERS, Options
from ldm_jax.nn.unet import UNet

_PROCESS = DiscreteProcess("linear", 0.00085, 0.012)
_SCALE = 5.0


class _Run:
    """A compiled or Python function of nothing, run to its end."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self._draw = draw
        self.result = np.asarray(draw())

    def run(self, updates: int) -> None:
        for _ in range(updates):
            jax.block_until_ready(self._draw())


def _random(rng: np.random.Generator, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    spread = 0.5 * float(np.prod(leaf.shape[:-1])) ** -0.5 if len(leaf.shape) > 1 else 0.05
    return jnp.asarray(spread * rng.normal(size=leaf.shape) + ("scale" in name), leaf.dtype)


class Ours:
    """The guided network with random weights, and the ways to run it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.network = UNet(4, args.channels, (1, 2, 4, 4), 2, (1, 2, 4), 8, 0, norm_groups=32)
        rng, shape = np.random.default_rng(0), (args.batch, args.size, args.size, 4)
        self.noise = jnp.asarray(rng.normal(size=shape), jnp.float32)
        self.cond, self.null = (jnp.asarray(rng.normal(size=(args.batch, 77, args.context)), jnp.float32) for _ in range(2))
        shapes = jax.eval_shape(self.network.init, jax.random.key(0), self.noise, jnp.zeros(1), self.cond)["params"]
        # Matrices keep the size of what they map and norms are near 1, so that the network is smooth and rounding stays rounding.
        self.params = jax.tree.map_with_path(lambda path, s: _random(rng, jax.tree_util.keystr(path), s), shapes)
        self.settings = SamplerSettings(args.sampler, args.steps)

    def denoise(self, params: Any, x: jax.Array, t: jax.Array, cond: jax.Array) -> Any:
        return self.network.apply({"params": params}, x, t, cond)

    def guided(self, params: Any) -> Any:
        return guided(lambda x, t, cond: self.denoise(params, x, t, cond), self.cond, self.null, _SCALE)

    def scan(self) -> _Run:
        @jax.jit
        def draw(params: Any, noise: jax.Array) -> jax.Array:
            return sample(self.guided(params), _PROCESS, "eps", self.settings, noise)

        return _Run(lambda: draw(self.params, self.noise))

    def network_alone(self) -> _Run:
        """As many evaluations of the doubled batch, and next to nothing between them."""
        times = make_grid(_PROCESS, self.settings.spacing, self.settings.steps).t[:-1].astype(np.float32)
        both = jnp.concatenate([self.cond, self.null])

        @jax.jit
        def draw(params: Any, noise: jax.Array) -> jax.Array:
            def body(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
                return self.denoise(params, x, jnp.broadcast_to(t, len(x)), both), None

            return jax.lax.scan(body, jnp.concatenate([noise, noise]), jnp.asarray(times))[0]

        return _Run(lambda: draw(self.params, self.noise))

    def free(self) -> _Run:
        """The scan with a network that costs next to nothing and depends on all that it is given."""

        def network(x: jax.Array, t: jax.Array, cond: jax.Array) -> jax.Array:
            return 0.5 * x + (t / 1000 + cond[:, 0, 0])[:, None, None, None]

        @jax.jit
        def draw(noise: jax.Array, cond: jax.Array, null: jax.Array) -> jax.Array:
            return sample(guided(network, cond, null, _SCALE), _PROCESS, "eps", self.settings, noise)

        return _Run(lambda: draw(self.noise, self.cond, self.null))

    def python(self) -> _Run:
        """One step jitted, and the loop in Python; of samplers with one evaluation a step and no memory."""
        table = SOLVERS[self.settings.kind].table(_PROCESS, make_grid(_PROCESS, self.settings.spacing, self.settings.steps), Options())
        if table.history > 1 or table.base is not None:
            raise SystemExit("the loop in Python is for --sampler ddim or euler")

        @jax.jit
        def step(params: Any, x: jax.Array, level: Level, weights: jax.Array) -> jax.Array:
            pred = self.guided(params)(x, jnp.broadcast_to(level.t, len(x)))
            x0 = solve("eps", level.alpha, level.sigma, pred, x)[0]
            return weights[0] * x + weights[2] * x0

        def draw() -> jax.Array:
            x = self.noise
            for i in range(self.settings.steps):
                level = Level(*(np.float32(values[i]) for values in table.level))
                x = step(self.params, x, level, table.x[i].astype(np.float32))
            return x

        return _Run(draw)


def diffusers_loop(ours: Ours, args: argparse.Namespace) -> _Run:
    """Their loop, as StableDiffusionPipeline has it."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from ldm_jax.interop import diffusers, keymap
    from ldm_jax.model_directory import flatten

    config = diffusers.unet_config(ours.network, 4, args.context, args.size, 32)
    unet = UNet2DConditionModel.from_config(config).eval()
    leaves = flatten(ours.params)
    keys = diffusers.unet_map(ours.network, ours.params)
    unet.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in keymap.write(keys, lambda leaf: np.asarray(leaves[leaf]))})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet.to(device)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(args.steps)
    context = torch.from_numpy(np.concatenate([ours.null, ours.cond])).to(device)
    noise = torch.from_numpy(np.moveaxis(np.asarray(ours.noise), -1, 1).copy()).to(device)

    @torch.no_grad()
    def draw() -> np.ndarray:
        x = noise
        for t in scheduler.timesteps:
            null, cond = unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(null + _SCALE * (cond - null), t, x).prev_sample
        return np.moveaxis(x.cpu().numpy(), 1, -1)

    return _Run(draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", default="ddim")
    for name, value in (("steps", 50), ("batch", 4), ("channels", 64), ("size", 16), ("context", 256), ("blocks", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--compare", choices=("diffusers",))
    args = parser.parse_args()
    ours = Ours(args)
    runs = {"scan": ours.scan(), "python": ours.python(), "network": ours.network_alone()}
    if args.compare:
        runs["diffusers"] = diffusers_loop(ours, args)
    contenders: dict[str, Contender] = dict(runs)
    seconds = measure(contenders, 1, args.blocks)
    free = measure({"free": ours.free()}, 20, 20)["free"]
    differences = {
        name: float(np.abs(run.result - runs["scan"].result).max() / np.abs(runs["scan"].result).max())
        for name, run in runs.items()
        if name in ("python", "diffusers")
    }
    record = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(ours.params)),
        **vars(args),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratios": {name: round(value / seconds["scan"], 3) for name, value in seconds.items() if name != "scan"},
        "outside_network": {"free_ms": round(1000 * free, 2), "share": round(free / seconds["scan"], 6)},
        "largest_difference": differences,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    keep_freed_memory()
    main()
