"""Mean and covariance of rows that come in parts."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.evaluation.statistics import Moments, gaussian_of

ROOT = Path(__file__).parents[2]


def far(seed: int, n: int, d: int, dtype: type = np.float32) -> np.ndarray:
    """Rows about 10,000, a hundredth apart: of float32 squares nothing would be left of the variance."""
    rng = np.random.default_rng(seed)
    return (1e4 + 1e-2 * rng.normal(size=(n, d)) @ rng.normal(size=(d, d))).astype(dtype)


def assert_gaussian_of(found: Moments, rows: np.ndarray, tolerance: float = 1e-12) -> None:
    rows = rows.astype(np.float64)
    centred = rows - rows.mean(0)  # np.cov of the rows as they are has the same value, and more rounding
    gaussian, expected = found.gaussian(), np.cov(centred, rowvar=False)
    assert gaussian.number == len(rows)
    np.testing.assert_allclose(gaussian.mean, rows.mean(0), rtol=tolerance)
    np.testing.assert_allclose(gaussian.cov, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_are_numpys(dtype: type) -> None:
    rows = far(0, 200, 7, dtype)
    moments = Moments(7)
    moments.add(rows)
    assert_gaussian_of(moments, rows)
    np.testing.assert_allclose(moments.gaussian().cov, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-6)


@given(st.lists(st.integers(0, 80), max_size=6), st.integers(0, 5), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=60, deadline=None)
def test_moments_do_not_depend_on_how_rows_are_split_and_joined(cuts: list[int], seed: int, random: object, near: bool) -> None:
    rows = far(seed, 80, 5) - np.float32(1e4 if near else 0)
    parts = np.split(rows, sorted(cuts))  # empty ones among them
    joined = []
    for part in parts:
        joined.append(Moments(5))
        for block in np.array_split(part, 2):
            joined[-1].add(block)
    random.shuffle(joined)  # type: ignore[attr-defined]
    while len(joined) > 1:  # as a tree of any shape
        other = joined.pop(random.randrange(len(joined)))  # type: ignore[attr-defined]
        joined[random.randrange(len(joined))].merge(other)  # type: ignore[attr-defined]
    # Next to deviations of 0.01 float64 holds means of 10,000 to 2e-10 only, and so what is between the parts; np.cov does no better.
    assert_gaussian_of(joined[0], rows, 1e-12 if near else 1e6 * np.finfo(float).eps)


def test_gaussian_of_parts_and_of_too_few_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 4))
    found = gaussian_of(iter([rows[:1], rows[1:13], rows[13:13], rows[13:]]))
    np.testing.assert_allclose(found.cov, np.cov(rows, rowvar=False), rtol=1e-12)
    assert found.number == 30 and found.mean.dtype == found.cov.dtype == np.float64
    with pytest.raises(ValueError, match="1 rows have no covariance"):
        gaussian_of([rows[:1]])
    with pytest.raises(ValueError, match="no rows have no covariance"):
        gaussian_of([])


PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from ldm_jax.evaluation.statistics import gaussian_of
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
def blocks(number):
    rng = np.random.default_rng(0)
    for start in range(0, number, 512):
        yield rng.random((min(512, number - start), 2048), np.float32)
peaks = []
for number in map(int, sys.argv[1:]):
    assert gaussian_of(blocks(number)).number == number
    peaks.append(peak())
print(*peaks)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's own peak of memory")
def test_memory_does_not_grow_with_the_rows() -> None:
    """All 50,000 at once would be 410 MB in float32, and the double in float64."""
    done = subprocess.run([sys.executable, "-c", PEAK, "2000", "50000"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    few, many = map(int, re.findall(r"\d+", done.stdout))
    assert many < 1024 and many - few < 64, done.stdout
