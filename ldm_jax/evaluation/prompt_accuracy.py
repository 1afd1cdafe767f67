"""How well a text model obeys: samples of fresh captions, read back by the oracle."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ldm_jax.data.shapes import Pairs, ShapesSource
from ldm_jax.evaluation.oracle import score_table

# Seeds of scenes: none is drawn for training, which uses `data.seed`, below them.
_SEED_REPORT, _SEED_CHOICE = 1_000_001, 1_000_002


class Sampler(Protocol):
    """`LatentDiffusion.sample`, as far as it is needed here."""

    def __call__(self, *, prompts: Sequence[str], guidance: float, seed: int) -> np.ndarray: ...


def captions(count: int, number: int, resolution: int, seed: int, pairs: Pairs) -> list[str]:
    """Captions of `number` fresh scenes with `count` objects."""
    source = ShapesSource(size=number, seed=seed, resolution=resolution, counts=(count,), pairs=pairs)
    return [source.caption(i) for i in range(number)]


def choose_guidance(
    sample: Sampler, scales: Sequence[float], number: int, counts: Sequence[int], resolution: int
) -> tuple[float, dict[float, float]]:
    """The scale with the highest mean of `all` over the numbers of objects, on prompts of its own; and every scale's mean."""
    prompts = [c for count in sorted(set(counts)) for c in captions(count, number, resolution, _SEED_CHOICE, "seen")]
    means: dict[float, float] = {}
    for scale in scales:
        rows = score_table(sample(prompts=prompts, guidance=scale, seed=1), prompts)
        means[scale] = float(np.mean([row["all"] for name, row in rows.items() if name.endswith("all")]))
    return max(means, key=lambda scale: means[scale]), means


def prompt_accuracy(
    sample: Sampler, guidance: float, number: int, held_out: int, counts: Sequence[int], resolution: int
) -> dict[str, dict[str, Any]]:
    """The oracle's table: `number` prompts of seen pairs for each number of objects, and `held_out` of one object with a held-out pair."""
    counts = sorted(set(counts))
    prompts = [c for count in counts for c in captions(count, number, resolution, _SEED_REPORT, "seen")]
    if held_out and 1 in counts:
        prompts += captions(1, held_out, resolution, _SEED_REPORT, "held_out")
    return score_table(sample(prompts=prompts, guidance=guidance, seed=2), prompts)
