"""What makes people's FIDs wrong, found before the numbers are believed: warnings about samples and reference."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldm_jax.evaluation.pictures import CENTRAL, Pictures
from ldm_jax.evaluation.scores import ENOUGH

__all__ = ["CENTRAL", "CROP", "Facts", "duplicates", "facts_of", "truncation", "warnings"]

CROP = "crop"  # in provenances: how pictures of other shapes became ones of one size


@dataclass(frozen=True)
class Facts:
    """What is known of a set of pictures, or of the statistics that stand for it.

    Attributes:
      number: 0 where it is not known.
      size: (height, width), None where it is not known.
      labels: classes [N], None where there are none.
      jpegs: how many of the files are JPEG.
      provenance: how they were made, as far as it was written down.
      statistics: there are no pictures.
    """

    number: int
    size: tuple[int, int] | None
    labels: np.ndarray | None = None
    jpegs: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    statistics: bool = False


def facts_of(pictures: Pictures) -> Facts:
    return Facts(len(pictures), pictures.size, pictures.labels, pictures.jpegs, pictures.provenance)


def warnings(samples: Facts, reference: Facts | None, reconstructions: bool = False) -> list[str]:
    """What to know before the numbers are compared with others', a line each.

    `reconstructions`: the samples are the reference's own pictures, gone through an autoencoder.
    """
    lines = []
    if samples.number < ENOUGH:
        lines.append(
            f"{samples.number} samples: FID and its like fall as samples are added, and published ones are of 50,000; below {ENOUGH}"
            " they compare only with numbers of as many samples"
        )
    lines += _labels(samples)
    if samples.jpegs:
        lines.append(f"{samples.jpegs} of the samples are JPEG files, whose blocks the FID sees: write PNG")
    if reference is not None:
        lines += _of_both(samples, reference, reconstructions)
    return lines


def _labels(samples: Facts) -> list[str]:
    if samples.labels is None:
        return []
    present, counts = np.unique(samples.labels, return_counts=True)
    if int(present[-1]) - int(present[0]) >= len(present) and int(present[-1]) < samples.number:
        counts = np.append(counts, 0)  # a class between the others has none
    if counts.max() - counts.min() <= 1:
        return []
    return [
        f"classes are not balanced: between {counts.min()} and {counts.max()} samples each. Published numbers of ImageNet are mostly of"
        " equal ones, which lowers FID by some tenths"
    ]


def _of_both(samples: Facts, reference: Facts, reconstructions: bool) -> list[str]:
    lines = []
    if 0 < reference.number < ENOUGH and not reconstructions:
        lines.append(f"a reference of {reference.number} pictures: published numbers are mostly against a whole training set")
    if samples.size and reference.size and samples.size != reference.size:
        lines.append(f"samples are {_by(samples.size)} and the reference {_by(reference.size)}: blur of resizing counts as a difference")
    crops = [one.provenance.get(CROP) for one in (samples, reference)]
    if crops[0] and crops[1] and crops[0] != crops[1]:
        lines.append(f"another crop: samples are {crops[0]}, the reference is {crops[1]}. Use the statistics of one loader for both")
    known = reference.provenance.get("jpegs")
    jpegs = reference.jpegs or (known if isinstance(known, int) else 0)
    if jpegs:
        lines.append(f"{jpegs} pictures of the reference are JPEG files: samples without JPEG's blocks are held against them")
    if reconstructions and reference.statistics:
        lines.append(
            "reconstructions are held against stored statistics, most likely of a training set, and not against their originals: published"
            " rFIDs are of these, and lower. Give the originals as --reference"
        )
    return lines


def _by(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def truncation(bias: float, error: float) -> list[str]:
    """A warning where pairs are darker by half a level, as uint8 made by cutting off instead of rounding is; `error` is the bias's own."""
    if abs(bias + 0.5) > 0.1 + 3 * error or bias > -3 * error:  # what may be chance is no sign of it
        return []
    return [
        f"reconstructions are {-bias:.2f} levels darker than their originals, as pictures are that were cast to uint8 without rounding:"
        " write np.clip(np.rint(127.5 * x + 127.5), 0, 255)"
    ]


def duplicates(keys: np.ndarray) -> list[str]:
    """A warning where samples are equal to the last pixel, by the keys of their pixels."""
    distinct = len(np.unique(keys))
    return [] if distinct == len(keys) else [f"of {len(keys)} samples only {distinct} differ: was a seed used twice?"]
