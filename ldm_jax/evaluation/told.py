"""What each sample of an evaluation is told: sample i is told the same whatever the number of samples, devices and restarts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm_jax.data.derive import one_caption

Example = Mapping[str, Any]
Told = Callable[[int], Example]


def balanced(classes: int) -> Told:
    """Every class as often as another, up to one: sample i is of class i modulo their number."""
    return lambda i: {"label": i % classes}


def at_random(classes: int, seed: int) -> Told:
    """A class drawn for each sample, a function of (seed, i)."""
    return lambda i: {"label": int(np.random.Generator(np.random.Philox(key=(seed, i))).integers(classes))}


def prompts(texts: Sequence[str]) -> Told:
    """One text after another, and then again from the first."""
    return lambda i: {"text": texts[i % len(texts)]}


class FromData:
    """Examples of a source in an order of their own, the same each time, so that the first are not all of one class; again from the start
    where there are more samples. `[i]` is what sample i is told, with one of its captions."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._order = np.random.Generator(np.random.Philox(0)).permutation(len(source))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return one_caption(self._source[int(self._order[index % len(self)])], 0, index)

    def fingerprint(self) -> str:
        """That of the source, whose order is another here."""
        return f"{self._source.fingerprint()}-shuffled"
