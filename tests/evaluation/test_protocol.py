"""Warnings: each where it should be, and nowhere else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm_jax.evaluation.pictures import crop, open_pictures
from ldm_jax.evaluation.protocol import Facts, duplicates, facts_of, truncation, warnings
from tests.data.pictures import encoded, noise

GOOD = Facts(50_000, (256, 256), np.arange(50_000) % 1000, 0, {"crop": "centre 256x256", "seed": 1})
REFERENCE = Facts(1_281_167, (256, 256), None, 0, {"crop": "centre 256x256", "jpegs": 0})
STATISTICS = replace(REFERENCE, statistics=True)


@pytest.mark.parametrize(
    ("samples", "reference", "reconstructions"),
    [
        (GOOD, REFERENCE, False),
        (GOOD, None, False),
        (GOOD, STATISTICS, False),
        (GOOD, REFERENCE, True),
        (replace(GOOD, number=10_000, labels=None), REFERENCE, False),
        (replace(GOOD, labels=np.arange(10_001, dtype=np.uint64) % np.uint64(7) + np.uint64(3)), REFERENCE, False),  # balanced up to one
        (replace(GOOD, labels=np.full(50_000, 7)), REFERENCE, False),  # of one class alone
        (replace(GOOD, size=None, provenance={}), REFERENCE, False),  # what is not known is not complained of
        (GOOD, replace(STATISTICS, size=None, provenance={}), False),
    ],
)
def test_there_is_no_warning_without_a_reason(samples: Facts, reference: Facts | None, reconstructions: bool) -> None:
    assert warnings(samples, reference, reconstructions) == []


@pytest.mark.parametrize(
    ("samples", "reference", "reconstructions", "expected"),
    [
        (replace(GOOD, number=9_999), REFERENCE, False, "9999 samples: FID and its like fall"),
        (replace(GOOD, number=9_999), None, False, "9999 samples"),
        (replace(GOOD, labels=np.array([4, 4, 4, 5])), None, False, "not balanced: between 1 and 3 samples each"),
        (replace(GOOD, labels=np.array([0, 2, 0, 2], np.uint8)), REFERENCE, False, "not balanced: between 0 and 2"),
        (replace(GOOD, labels=np.array([1, 1, 1, 0], np.uint64)), REFERENCE, False, "not balanced: between 1 and 3"),
        (replace(GOOD, jpegs=12), REFERENCE, False, "12 of the samples are JPEG"),
        (GOOD, replace(REFERENCE, jpegs=5), False, "5 pictures of the reference are JPEG"),
        (GOOD, replace(STATISTICS, provenance={"jpegs": 9}), False, "9 pictures of the reference are JPEG"),
        (GOOD, replace(REFERENCE, size=(512, 256)), False, "samples are 256x256 and the reference 256x512"),
        (GOOD, replace(REFERENCE, provenance={"crop": "squeezed"}), False, "another crop: samples are centre 256x256, the ref"),
        (GOOD, STATISTICS, True, "reconstructions are held against stored statistics"),
        (GOOD, replace(REFERENCE, number=9_999), False, "a reference of 9999 pictures"),
    ],
)
def test_each_warning_comes_alone_where_it_has_a_reason(
    samples: Facts, reference: Facts | None, reconstructions: bool, expected: str
) -> None:
    (line,) = warnings(samples, reference, reconstructions)
    assert expected in line and "\n" not in line


def test_warnings_add_up() -> None:
    bad = Facts(20, (8, 8), np.array([0, 0, 1, 1, 1, 1]), 3, {"crop": "a"})
    assert len(warnings(bad, Facts(30, (16, 16), None, 3, {"crop": "b"}, statistics=True), True)) == 7


def test_facts_of_pictures(tmp_path: Path) -> None:
    for i, kind in enumerate(("JPEG", "PNG")):
        (tmp_path / f"{i}.png").write_bytes(encoded(noise(8), kind).getvalue())
    pictures = open_pictures(tmp_path)
    assert facts_of(pictures) == Facts(2, pictures.size, None, 1, {})
    lines = warnings(facts_of(crop(pictures, (4, 4))), facts_of(crop(pictures, (6, 4))))
    expected = ("2 samples", "JPEG files, whose", "a reference of 2 pictures", "4x4 and the reference 4x6", "another crop", "held against")
    assert [part in line for part, line in zip(expected, lines, strict=True)] == [True] * 6


@pytest.mark.parametrize(
    ("bias", "error", "warned"),
    [
        (-0.5, 0.01, True),
        (-0.55, 0.0, True),
        (-0.42, 0.02, True),
        (-0.5, 0.1, True),
        (0.0, 0.0, False),
        (0.0, 0.05, False),
        (0.5, 0.01, False),
        (-1.5, 0.1, False),
        (-0.3, 0.01, False),
        (0.0, 0.3, False),  # of a few pairs nothing is known
        (-0.1, 0.15, False),
    ],
)
def test_pictures_that_were_cut_off_to_uint8(bias: float, error: float, warned: bool) -> None:
    found = truncation(bias, error)
    assert bool(found) == warned
    assert not found or (f"{-bias:.2f} levels darker" in found[0] and "np.rint" in found[0])


def test_real_casts_of_pictures_are_told_from_rounding() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (200, 8, 8, 3))
    levels = 127.5 * x + 127.5
    rounded, cut = np.clip(np.rint(levels), 0, 255), levels.astype(np.uint8).astype(float)
    for made, warned in ((rounded, False), (cut, True)):
        bias = (made - levels).mean((1, 2, 3))
        assert bool(truncation(bias.mean(), bias.std(ddof=1) / np.sqrt(200))) == warned


def test_samples_that_are_equal() -> None:
    assert duplicates(np.array([3, 1, 2], np.uint64)) == []
    assert "of 4 samples only 3 differ" in duplicates(np.array([3, 1, 3, 2], np.uint64))[0]
