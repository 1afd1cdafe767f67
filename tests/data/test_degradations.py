"""Degradations: what is drawn against the laws it is said to follow, and what the steps do against independent implementations."""

import io
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from ldm_jax.config import UserError
from ldm_jax.data.degradations import (
    BSR,
    BSR_LIGHT,
    DEGRADATIONS,
    FILTERS,
    Blur,
    Chain,
    Jpeg,
    Noise,
    Pick,
    Resize,
    convolve,
    degrade,
    draw_blur,
    draw_noise,
    draw_order,
    draw_rescale,
    draw_steps,
    gaussian_kernel,
    mod_crop,
    resize,
)

CHAINS = {"bsr": BSR, "bsr_light": BSR_LIGHT}
COUNT = 3000


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture without extremes, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(60, 196, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def noisy(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (height, width, 3)).astype(np.float32)


def probability_uniform(values: list[float], low: float, high: float) -> float:
    return stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue


def probability_even(values: list[int], possible: range) -> float:
    counts = Counter(values)
    assert set(counts) == set(possible)
    return stats.chisquare([counts[value] for value in possible]).pvalue


# Results


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(DEGRADATIONS)), st.integers(1, 9), st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**32))
def test_any_size_and_factor_gives_a_picture(kind: str, factor: int, height: int, width: int, seed: int) -> None:
    height, width = factor + height, factor + width
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    low = degrade(kind, image, factor, np.random.default_rng(seed))
    assert low.shape == (height // factor, width // factor, 3) and low.dtype == np.uint8
    np.testing.assert_array_equal(low, degrade(kind, image, factor, np.random.default_rng(seed)))


@pytest.mark.parametrize("kind", DEGRADATIONS)
@pytest.mark.parametrize("size", [(37, 50), (50, 37), (36, 51)])
def test_what_the_factor_does_not_divide_is_cut_off_at_the_right_and_below(kind: str, size: tuple[int, int]) -> None:
    image = smooth(*size)
    cut = image[: size[0] // 4 * 4, : size[1] // 4 * 4]
    np.testing.assert_array_equal(mod_crop(image, 4), cut)
    found = degrade(kind, image, 4, np.random.default_rng(1))
    assert found.shape == (size[0] // 4, size[1] // 4, 3)
    np.testing.assert_array_equal(found, degrade(kind, cut, 4, np.random.default_rng(1)))


def test_only_the_seed_decides_and_bicubic_draws_nothing() -> None:
    image = smooth(64, 64)
    for kind in ("bsr", "bsr_light"):
        results = [degrade(kind, image, 4, np.random.default_rng(seed)) for seed in range(8)]
        assert all((a != b).any() for a, b in itertools.combinations(results, 2))
    rng = np.random.default_rng(0)
    degrade("bicubic", image, 4, rng)
    assert rng.random() == np.random.default_rng(0).random()


def test_bicubic_is_the_cubic_of_keys_stretched_by_the_factor() -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)

    def weights(length: int, factor: int) -> np.ndarray:
        at = np.abs((np.arange(length) + 0.5) / factor - (np.arange(length // factor)[:, None] + 0.5))
        inner, outer = 1.5 * at**3 - 2.5 * at**2 + 1, -0.5 * at**3 + 2.5 * at**2 - 4 * at + 2
        table = np.where(at <= 1, inner, np.where(at < 2, outer, 0))
        return table / table.sum(1, keepdims=True)

    expected = np.einsum("ih,jw,hwc->ijc", weights(24, 4), weights(40, 4), image.astype(float)).clip(0, 255)
    np.testing.assert_allclose(degrade("bicubic", image, 4, np.random.default_rng(0)), expected, atol=1.01)


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_small_picture_lies_on_the_large_one(kind: str, factor: int) -> None:
    """Of a ramp, each cell keeps its value through blurs and resizes: half a pixel's shift of any step would show as an offset of 1."""
    line = 2 * np.arange(120, dtype=np.float32)
    image = np.stack(np.broadcast_arrays(line, line[:, None], 128), axis=-1).astype(np.float32)
    cells = image.reshape(120 // factor, factor, 120 // factor, factor, 3).mean((1, 3))
    inner = slice(30 // factor, -(30 // factor))
    for seed in range(40):
        low = image
        for step in draw_steps(np.random.default_rng(seed), 120, 120, factor, CHAINS[kind]):
            if isinstance(step, Blur | Resize | Pick):
                low = step(low, np.random.default_rng(0))
        assert np.abs((low - cells)[inner, inner].mean((0, 1))).max() < 0.25
    # Noise and compression keep the mean of a picture, and bicubic lies as the others do.
    for name in (kind, "bicubic"):
        found = [degrade(name, np.rint(image).astype(np.uint8), factor, np.random.default_rng(seed)) - cells for seed in range(16)]
        assert np.abs(np.mean([f[inner, inner].mean((0, 1)) for f in found], 0)).max() < 1


@pytest.mark.parametrize("kind", CHAINS)
def test_a_plain_picture_stays_plain_but_for_noise_and_compression(kind: str) -> None:
    for seed in range(30):
        steps = draw_steps(np.random.default_rng(seed), 48, 48, 4, CHAINS[kind])
        image = np.full((48, 48, 3), (20.0, 130.0, 250.0), np.float32)
        for step in steps:
            if isinstance(step, Blur | Resize | Pick):
                image = step(image, np.random.default_rng(0))
        assert image.shape == (12, 12, 3)
        np.testing.assert_allclose(image, np.broadcast_to((20.0, 130.0, 250.0), image.shape), atol=1e-3)
    levels = [degrade(kind, np.full((48, 48, 3), 130, np.uint8), 4, np.random.default_rng(seed)).mean() for seed in range(30)]
    assert np.abs(np.array(levels) - 130).max() < 12 and abs(np.mean(levels) - 130) < 2


def test_the_light_chain_is_lighter() -> None:
    image = smooth(96, 96)
    target = degrade("bicubic", image, 4, np.random.default_rng(0)).astype(float)
    error = {
        kind: np.mean([((degrade(kind, image, 4, np.random.default_rng(seed)) - target) ** 2).mean() for seed in range(30)])
        for kind in CHAINS
    }
    assert 0 < 4 * error["bsr_light"] < error["bsr"]


def test_bad_requests_are_one_line() -> None:
    image = smooth(16, 16)
    with pytest.raises(UserError, match=r"'cubic' is unknown; it must be one of bicubic, bsr, bsr_light"):
        degrade("cubic", image, 4, np.random.default_rng(0))
    for factor in (0, 17):
        with pytest.raises(UserError, match=f"16 x 16 .* factor of {factor}"):
            degrade("bsr", image, factor, np.random.default_rng(0))


# What is drawn


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_every_order_is_as_likely_and_the_final_resize_comes_second(chain: Chain) -> None:
    rng = np.random.default_rng(0)
    orders = Counter(tuple(draw_order(rng, chain)) for _ in range(6 * COUNT))
    names = ["blur"] * chain.blurs + ["rescale", "resize", "noise", "jpeg"]
    allowed = {order for order in itertools.permutations(names) if order.index("rescale") < order.index("resize")}
    assert set(orders) == allowed and len(allowed) == {1: 60, 2: 180}[chain.blurs]
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("name", CHAINS)
def test_blur_widths(name: str, factor: int) -> None:
    chain, rng = CHAINS[name], np.random.default_rng(0)
    blurs = [draw_blur(rng, factor, chain) for _ in range(COUNT)]
    round_ones = [blur for blur in blurs if blur.variances[0] == blur.variances[1]]
    oval = [blur for blur in blurs if blur.variances[0] != blur.variances[1]]
    assert stats.binomtest(len(round_ones), COUNT, 0.5).pvalue > 1e-3
    deviation, variance = {2: (2.4, 6), 4: (2.8, 8)}[factor]
    share = {"bsr": 1, "bsr_light": 0.25}[name]
    assert probability_uniform([blur.variances[0] ** 0.5 for blur in round_ones], 0, share * deviation) > 1e-3
    for axis in range(2):
        assert probability_uniform([blur.variances[axis] for blur in oval], 0, share * variance) > 1e-3
    assert probability_uniform([blur.angle for blur in oval], 0, np.pi) > 1e-3
    assert probability_even([blur.side for blur in oval], range(7, 26, 2)) > 1e-3
    assert probability_even([blur.side for blur in round_ones], range(7, {"bsr": 26, "bsr_light": 12}[name], 2)) > 1e-3


@pytest.mark.parametrize("name", CHAINS)
def test_noise_levels_and_kinds(name: str) -> None:
    chain, rng = CHAINS[name], np.random.default_rng(0)
    covariances = [mix @ mix.T for mix in (np.array(draw_noise(rng, chain).mix) for _ in range(COUNT))]
    low, high = {"bsr": (2, 25), "bsr_light": (1, 2)}[name]
    gray = [cov for cov in covariances if np.allclose(cov, cov[0, 0])]
    each = [cov for cov in covariances if np.allclose(cov, cov[0, 0] * np.eye(3))]
    other = [cov for cov in covariances if not any(np.allclose(cov, cov[0, 0] * kind) for kind in (np.eye(3), np.ones((3, 3))))]
    assert len(gray) + len(each) + len(other) == COUNT
    for kind, share in ((gray, 0.4), (each, 0.4), (other, 0.2)):
        assert stats.binomtest(len(kind), COUNT, share).pvalue > 1e-3
    for kind in (gray, each):
        assert probability_even([round(cov[0, 0] ** 0.5) for cov in kind], range(low, high + 1)) > 1e-3
    # Of a random covariance the variances along its axes are uniform, and no channel is preferred.
    variances = np.concatenate([np.linalg.eigvalsh(cov) for cov in other])
    assert probability_uniform(variances.tolist(), 0, high**2) > 1e-3
    np.testing.assert_allclose(np.mean(other, axis=0), high**2 / 2 * np.eye(3), atol=0.05 * high**2)


@pytest.mark.parametrize("name", CHAINS)
def test_qualities_and_shares_of_a_whole_chain(name: str) -> None:
    chain, rng = CHAINS[name], np.random.default_rng(0)
    plans = [draw_steps(rng, 512, 384, 4, chain) for _ in range(COUNT)]
    low = {"bsr": 30, "bsr_light": 80}[name]
    assert all(isinstance(plan[-1], Jpeg) for plan in plans)
    first = [step for plan in plans for step in plan[:-1] if isinstance(step, Jpeg)]
    assert stats.binomtest(len(first), COUNT, 0.9).pvalue > 1e-3
    for compressions in (first, [plan[-1] for plan in plans]):
        assert probability_even([step.quality for step in compressions if isinstance(step, Jpeg)], range(low, 96)) > 1e-3
    for kind, count in ((Blur, chain.blurs), (Noise, 1)):
        assert all(sum(isinstance(step, kind) for step in plan) == count for plan in plans)

    halved = [plan for plan in plans if sum(isinstance(step, Resize | Pick) for step in plan) == 3]
    assert all(plan[0] in [Resize(256, 192, kind) for kind in (*FILTERS, "antialiased")] for plan in halved)
    assert stats.binomtest(len(halved), COUNT, chain.halve_share).pvalue > 1e-3
    antialiased = sum(isinstance(plan[0], Resize) and plan[0].filter == "antialiased" for plan in halved)
    assert stats.binomtest(antialiased, len(halved), 0.5).pvalue > 1e-3
    # After halving the rest of the chain is one of half the factor: narrower blurs.
    widest = {True: 6 * chain.blur_share, False: 8 * chain.blur_share}
    for is_halved, limit in widest.items():
        chosen = halved if is_halved else [plan for plan in plans if plan not in halved]
        ovals = [step.variances for plan in chosen for step in plan if isinstance(step, Blur) and step.variances[0] != step.variances[1]]
        assert 0.9 * limit < np.max(ovals) <= limit
    for plan in plans:
        resizes = [step for step in plan if isinstance(step, Resize)]
        assert (resizes[-1].height, resizes[-1].width) == (128, 96)


@pytest.mark.parametrize("name", CHAINS)
def test_the_first_resize(name: str) -> None:
    rng, share = np.random.default_rng(0), {"bsr": 0.75, "bsr_light": 0.8}[name]
    drawn = [draw_rescale(rng, 40000, 20000, 4, CHAINS[name]) for _ in range(COUNT)]
    resizes = [step for step in drawn if isinstance(step, Resize)]
    assert stats.binomtest(len(resizes), COUNT, share).pvalue > 1e-3
    assert probability_uniform([40000 / step.height for step in resizes], 1, 8) > 1e-3
    np.testing.assert_allclose([step.height / step.width for step in resizes], 2, rtol=1e-3)
    assert probability_even([FILTERS.index(step.filter) for step in resizes], range(3)) > 1e-3
    picks = [step for step in drawn if isinstance(step, Pick)]
    assert {step.factor for step in picks} == {4}
    assert probability_uniform([step.deviation for step in picks], 0.1, 2.4) > 1e-3


def test_odd_factors_are_not_halved() -> None:
    rng = np.random.default_rng(0)
    for factor in (1, 2, 3, 5):
        for _ in range(100):
            resizes = [step for step in draw_steps(rng, 60, 60, factor, BSR) if isinstance(step, Resize)]
            assert all(step.filter != "antialiased" for step in resizes) and resizes[-1].height == 60 // factor


# What the steps do


def test_convolution_is_the_direct_one() -> None:
    image = noisy(23, 31)
    for seed in range(4):
        kernel = np.random.default_rng(seed).random((7, 7)).astype(np.float32)
        expected = ndimage.convolve(image.astype(np.float64), kernel[..., None].astype(np.float64), mode="mirror")
        np.testing.assert_allclose(convolve(image, kernel), expected, rtol=1e-5, atol=1e-2)


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 8), st.floats(1, 8), st.floats(0, np.pi))
def test_a_blurred_point_has_the_drawn_covariance(first: float, second: float, angle: float) -> None:
    point = np.zeros((41, 41, 3), np.float32)
    point[20, 20] = 1
    spread = Blur(37, (first, second), angle)(point, np.random.default_rng(0))[..., 0].astype(float)
    at = np.arange(41) - 20
    xx, yy, xy = (np.sum(spread * a) for a in (at[None] ** 2, at[:, None] ** 2, at[None] * at[:, None]))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(spread.sum(), 1, atol=1e-5)
    np.testing.assert_allclose([[xx, xy], [xy, yy]], turn @ np.diag([first, second]) @ turn.T, atol=1e-2)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([7, 11, 25]), st.floats(1e-12, 9), st.floats(1e-12, 9), st.floats(0, np.pi), st.sampled_from([0, 0.5, 1.5, 3.5]))
def test_kernels_sum_to_one_however_narrow(side: int, first: float, second: float, angle: float, offset: float) -> None:
    kernel = gaussian_kernel(side, (first, second), angle, offset)
    assert kernel.min() >= 0
    np.testing.assert_allclose(kernel.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("deviation", [0.1, 1.0, 2.4])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 16])
def test_picking_reads_the_centre_of_each_cell(factor: int, deviation: float) -> None:
    line = np.arange(factor * 12, dtype=np.float32)
    image = np.stack(np.broadcast_arrays(line, line[:, None], 7), axis=-1).astype(np.float32)
    found = Pick(factor, deviation)(image, np.random.default_rng(0))
    centers = (np.arange(12) + 0.5) * factor - 0.5
    inner = slice(8, -8) if factor == 1 else slice(5, -5)
    np.testing.assert_allclose(found[inner, inner, 0], np.broadcast_to(centers, (12, 12))[inner, inner], atol=1e-2)
    np.testing.assert_allclose(found[inner, inner, 1].T, np.broadcast_to(centers, (12, 12))[inner, inner], atol=1e-2)


@pytest.mark.parametrize("size", [(7, 9), (30, 12), (64, 64), (1, 1)])
def test_bilinear_reads_between_four_pixels(size: tuple[int, int]) -> None:
    image = noisy(21, 33)
    at = [((np.arange(n) + 0.5) * length / n - 0.5).clip(0, length - 1) for n, length in zip(size, image.shape, strict=False)]
    grid = np.meshgrid(*at, indexing="ij")
    expected = np.stack([ndimage.map_coordinates(image[..., i], grid, order=1, mode="nearest") for i in range(3)], -1)
    np.testing.assert_allclose(resize(image, *size, "bilinear"), expected, atol=1e-2)


def test_area_averages_and_points_alias() -> None:
    image = noisy(24, 36)
    mean = image.reshape(6, 4, 9, 4, 3).mean((1, 3))
    np.testing.assert_allclose(resize(image, 6, 9, "area"), mean, atol=1e-2)
    stripes = np.zeros((64, 64, 3), np.float32)
    stripes[:, ::4] = 255  # one of four columns
    spread = {method: np.ptp(resize(stripes, 64, 12, method)[:, 2:-2]) for method in (*FILTERS, "antialiased")}
    assert spread["bilinear"] > 100 and spread["bicubic"] > 100
    assert spread["area"] < 60 and spread["antialiased"] < 60


def test_noise_has_the_drawn_covariance() -> None:
    plain = np.full((200, 200, 3), 128, np.float32)
    for mix in (((5.0,), (5.0,), (5.0,)), ((9.0, 0.0, 0.0), (0.0, 9.0, 0.0), (0.0, 0.0, 9.0)), ((3.0, 1.0), (0.0, 4.0), (2.0, -2.0))):
        values = (Noise(mix)(plain, np.random.default_rng(0)) - plain).reshape(-1, 3)
        expected = np.array(mix) @ np.array(mix).T
        np.testing.assert_allclose(np.cov(values.T), expected, atol=0.03 * expected.max())
        np.testing.assert_allclose(values.mean(0), 0, atol=0.2)


def test_compression_loses_more_at_lower_quality_and_is_that_of_a_file() -> None:
    image = noisy(32, 32)
    errors = [np.square(Jpeg(quality)(image, np.random.default_rng(0)) - image).mean() for quality in (30, 50, 70, 90)]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    written = io.BytesIO()
    Image.fromarray(np.rint(image).astype(np.uint8)).save(written, "JPEG", quality=50)
    np.testing.assert_array_equal(Jpeg(50)(image, np.random.default_rng(0)), np.asarray(Image.open(written), np.float32))
