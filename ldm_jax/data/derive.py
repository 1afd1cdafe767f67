"""What is made of an example besides what its source gives: a random window, a hole, a small picture, one of several captions.

Each is a pure function of (seed, position in the order), with a stream of random numbers of its own: asking for one more thing changes
none of the others.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import UserError
from ldm_jax.data.degradations import DEGRADATIONS, degrade
from ldm_jax.data.holes import HOLES, draw_hole
from ldm_jax.data.reliable import Layer
from ldm_jax.data.transforms import random_crop

Example = dict[str, Any]


@dataclass(frozen=True)
class Derive:
    """Examples with what is drawn for them.

    Attributes:
      resolution: of the pictures that come out, in pixels.
      min_window: the smallest share of the short side that a random square window has; 0 takes pictures as they are.
      degradation: a key of `DEGRADATIONS` by which `low_res` is made of `image`, smaller by `factor`; "" makes none.
      holes: a key of `HOLES` by which `mask` is drawn; "" draws none.

    Raises UserError at construction for unknown names.
    """

    resolution: int
    min_window: float = 0.0
    degradation: str = ""
    factor: int = 1
    holes: str = ""

    def __post_init__(self) -> None:
        for field, value, known in (("low_res.degradation", self.degradation, DEGRADATIONS), ("mask.holes", self.holes, HOLES)):
            if value and value not in known:
                raise UserError(f"conditioning.{field} {value!r} is not one of {', '.join(known)}")
        if not 0 <= self.min_window <= 1:
            raise UserError(f"data.min_window is a share in [0, 1], not {self.min_window}")

    @property
    def idle(self) -> bool:
        """Whether examples stay as they are."""
        return not (self.min_window or self.degradation or self.holes)

    def __call__(self, example: Example, seed: int, position: int) -> Example:
        """The example [H,W] with a window of it, `low_res` uint8 [H/f,W/f,3] and `mask` bool [H,W], as far as they are asked for."""
        if self.min_window:
            example = random_crop(example, self.resolution, stream("window", seed, position), self.min_window)
        image = example["image"]
        if self.degradation:
            small = degrade(self.degradation, image, self.factor, stream("low_res", seed, position))
            example = {**example, "low_res": small}
        if self.holes:
            example = {**example, "mask": draw_hole(stream("mask", seed, position), image.shape[0], image.shape[1], HOLES[self.holes])}
        return example


class Derived(Layer):
    """A source with what is drawn for its examples: `source[i]` is as at position i of seed 0; `Batches` draws anew at each position."""

    def __init__(self, below: Any, derive: Derive) -> None:
        super().__init__(below)
        self.derive = derive

    def __getitem__(self, index: int) -> Example:
        return self.derive(self.below[index], 0, index)

    def fingerprint(self) -> str:
        """That of the source below, with what is drawn."""
        return f"{self.below.fingerprint()}-{self.derive!r}"


def derived(source: Any, data: ConfigDict, conditioning: ConfigDict | None = None, factor: int = 1) -> Any:
    """The source with what a configuration's groups draw for its examples; `factor` is the first stage's, for small pictures."""
    small, holes = (conditioning.low_res, conditioning.mask) if conditioning else ({}, {})
    degradation = small["degradation"] if small.get("enabled") else ""
    derive = Derive(data.resolution, data.min_window, degradation, factor, holes["holes"] if holes.get("enabled") else "")
    return source if derive.idle else Derived(source, derive)


def one_caption(example: Example, seed: int, position: int) -> Example:
    """The example with one of its captions, and of its captions' `embeddings`, where it has several."""
    if not isinstance(example.get("text"), list):
        return example
    chosen = stream("caption", seed, position).integers(len(example["text"]))
    return {**example, **{name: example[name][chosen] for name in ("text", "embeddings") if name in example}}


def stream(name: str, seed: int, position: int) -> np.random.Generator:
    """Random numbers that are a function of these three alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([zlib.crc32(name.encode()), seed, position])))
