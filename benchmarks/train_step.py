"""Speed and memory of one training update of either stage, on batches that are there already.

    python -m benchmarks.train_step --stage 2 --preset scaled --batch 16 --steps 10 [--compare diffusers] [--config.group.field=value ...]

Presets are those of configs/txt2img.py, and `scaled`: the paper's text model with narrower networks. Stage 1 runs with the discriminator.
`--compare diffusers` runs the same update with diffusers' networks in torch (eager) in the same process, by turns with ours.
Prints one line of JSON: images a second (of the best block, as what else runs only slows down), TFLOP a second, peak memory, seconds of
compilation, the peer's rate and the ratio.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks may have to share the memory

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.cli import keep_freed_memory
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import first_stage_run, from_command
from ldm_jax.sharding.mesh import make_mesh, replicated, to_global
from ldm_jax.stages import FirstStage, build_autoencoder, compute_dtype
from ldm_jax.training import loop
from ldm_jax.training.autoencoder import AutoencoderStage
from ldm_jax.training.diffusion import DiffusionStage

_CONFIG = str(Path(__file__).parents[1] / "configs" / "txt2img.py")
_SCALED = (
    "data.resolution=128",
    "first_stage.channels=32",
    "first_stage.discriminator.features=32",
    "denoiser.channels=64",
    "denoiser.channel_mult=(1, 2, 4)",
    "denoiser.num_heads=0",
    "denoiser.head_channels=32",
    "conditioning.text.width=256",
    "conditioning.text.depth=4",
    "conditioning.text.num_heads=4",
    "conditioning.text.head_dim=64",
)


class Contender(Protocol):
    """One side of a comparison; `run` returns when its updates are done."""

    def run(self, updates: int) -> None: ...


class Ours:
    """The update of a stage as the training loop compiles it."""

    def __init__(self, stage: loop.Stage, batch: dict[str, np.ndarray], phase: bool) -> None:
        self.mesh, self.phase = make_mesh(), phase
        with jax.set_mesh(self.mesh):
            self.state = loop.init_state(stage, self.mesh)
            self.step = loop.make_step(stage, self.mesh, self.state)
        self.root = jax.device_put(jax.random.key(0), replicated(self.mesh))
        self.batch = to_global(batch, self.mesh)
        self.flops = loop.step_flops(stage, batch, self.state, phase)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def run(self, updates: int) -> None:
        with jax.set_mesh(self.mesh):
            for _ in range(updates):
                self.state, _ = self.step(self.state, self.batch, self.root, self.phase)
            jax.block_until_ready(self.state)


class _NoPictures:
    """A source of nothing: the batches are made here."""

    def __len__(self) -> int:
        return 1


def random_batch(config: ConfigDict, stage: int, vocab_size: int, latent_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A batch of noise: pictures for stage 1, moments and tokens for stage 2."""
    rng, size = np.random.default_rng(0), config.train.batch_size
    if stage == 1:
        return {"image": rng.integers(0, 256, (size, config.data.resolution, config.data.resolution, 3), dtype=np.uint8)}
    h, w, c = latent_shape
    moments = rng.standard_normal((size, h, w, 2 * c), np.float32)
    tokens = rng.integers(0, vocab_size, (size, config.conditioning.text.max_length), dtype=np.int32)
    return {"moments": moments, "tokens": tokens}


def make_stage(config: ConfigDict, stage: int, tokenizer: Tokenizer) -> Any:
    if stage == 1:
        return AutoencoderStage(config, _NoPictures())  # type: ignore[arg-type]
    network = build_autoencoder(config.first_stage.to_dict(), compute_dtype(config.train.dtype))
    return DiffusionStage(config, FirstStage(network), {}, _NoPictures(), tokenizer)  # type: ignore[arg-type]


def timed(run: Callable[[int], None], updates: int) -> float:
    start = time.perf_counter()
    run(updates)
    return time.perf_counter() - start


def peak_memory() -> float:
    """GiB: of the first device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30


def measure(contenders: dict[str, Contender], updates: int, blocks: int) -> dict[str, float]:
    """Seconds an update of each in its best block; blocks are taken by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(blocks):
        for name, contender in contenders.items():
            seconds[name].append(timed(contender.run, updates) / updates)
    return {name: min(values) for name, values in seconds.items()}


def configuration(preset: str, stage: int, batch: int, overrides: list[str]) -> ConfigDict:
    spec, given = (f"{_CONFIG}:laion-1p4b", _SCALED) if preset == "scaled" else (f"{_CONFIG}:{preset}", ())
    fields = [*given, "conditioning.text.tokenizer=train", f"train.batch_size={batch}", f"first_stage.train.batch_size={batch}"]
    config = from_command(spec, [*(f"--config.{field}" for field in fields), *overrides])
    return first_stage_run(config) if stage == 1 else config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--preset", default="scaled")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="updates in a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--compare", choices=("diffusers",))
    parser.add_argument("--channels-last", action="store_true", help="let torch keep its feature maps as NHWC")
    args, overrides = parser.parse_known_args()

    config = configuration(args.preset, args.stage, args.batch, overrides)
    text = config.conditioning.text
    tokenizer = Tokenizer.train(["a red circle", "a blue square"], text.vocab_size, text.max_length)
    stage = make_stage(config, args.stage, tokenizer)
    latent_shape = stage.latent_shape if args.stage == 2 else ()
    batch = random_batch(config, args.stage, tokenizer.vocab_size, latent_shape)
    ours = Ours(stage, batch, phase=args.stage == 1)
    first, second = timed(ours.run, 1), timed(ours.run, 1)
    record = {
        "stage": args.stage,
        "preset": args.preset,
        "batch": args.batch,
        "dtype": np.dtype(stage.dtype).name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "parameters": ours.parameters,
        "compile_seconds": round(first - second, 1),
        "peak_memory_gib": round(peak_memory(), 2),
    }
    contenders: dict[str, Contender] = {"ours": ours}
    if args.compare:
        from benchmarks import diffusers_steps as peers

        peer: Any = peers.FirstStageStep(config, batch) if args.stage == 1 else peers.DenoiserStep(config, batch, tokenizer.vocab_size)
        if args.channels_last:
            peer.use_channels_last()
        peer.run(1)
        contenders["diffusers"] = peer
    seconds = measure(contenders, args.steps, args.blocks)
    record["images_per_second"] = round(args.batch / seconds["ours"], 2)
    record["tflops_per_second"] = round(ours.flops / seconds["ours"] / 1e12, 3)
    if args.compare:
        rate = round(args.batch / seconds["diffusers"], 2)
        record["diffusers"] = {"images_per_second": rate, "parameters": peer.parameters, "differences": peer.differences}
        record["ratio"] = round(seconds["diffusers"] / seconds["ours"], 2)
    print(json.dumps(record))


if __name__ == "__main__":
    keep_freed_memory()
    main()
