import numpy as np
import pytest

from ldm_jax.diffusion import schedules


@pytest.mark.parametrize(
    ("start", "end", "terminal"),
    [(0.0015, 0.0195, 0.0119), (0.0015, 0.0155, 0.0259), (0.0015, 0.0205, 0.0098), (0.00085, 0.012, 0.0683)],
)
def test_published_terminal_signal(start: float, end: float, terminal: float) -> None:
    betas = schedules.make_betas("linear", 1000, start, end)
    assert betas.dtype == np.float64 and betas.shape == (1000,)
    np.testing.assert_allclose([betas[0], betas[-1]], [start, end], rtol=1e-12)
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), (end**0.5 - start**0.5) / 999, rtol=1e-9)
    assert np.sqrt(np.prod(1 - betas)) == pytest.approx(terminal, abs=5e-5)


def test_linear_beta_and_defaults() -> None:
    np.testing.assert_allclose(schedules.make_betas("linear_beta", 5), [1e-4, 0.005075, 0.01005, 0.015025, 0.02])
    np.testing.assert_array_equal(schedules.make_betas("linear", 1000), schedules.make_betas("linear", 1000, 0.0015, 0.0195))


@pytest.mark.parametrize("kind", schedules.ENDS)
def test_no_ends_are_the_schedules_own(kind: str) -> None:
    own = schedules.make_betas(kind, 50, *schedules.ENDS[kind])
    for ends in ((), (None, None), (0.0, 0.0)):
        np.testing.assert_array_equal(schedules.make_betas(kind, 50, *ends), own)
    assert schedules.make_betas(kind, 50, 0.0, 0.03)[0] == own[0]


def test_cosine_follows_its_formula() -> None:
    alpha_bar = np.cumprod(1 - schedules.make_betas("cosine", 1000))
    f = np.cos((np.arange(1, 990) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alpha_bar[:989], f / np.cos(0.008 / 1.008 * np.pi / 2) ** 2, rtol=1e-9)
    assert schedules.make_betas("cosine", 1000)[-1] == 0.999


def test_zero_terminal_snr_keeps_the_first_and_zeroes_the_last() -> None:
    betas = schedules.make_betas("linear", 1000, 0.00085, 0.012)
    rescaled = schedules.rescale_zero_terminal_snr(betas)
    assert rescaled[-1] == 1.0
    assert rescaled[0] == pytest.approx(betas[0], rel=1e-12)
    before, after = np.sqrt(np.cumprod(1 - betas)), np.sqrt(np.cumprod(1 - rescaled))
    # One affine map of sqrt(abar).
    slope = (after[0] - after[500]) / (before[0] - before[500])
    np.testing.assert_allclose(after, after[0] + slope * (before - before[0]), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lineer", 1000), "unknown schedule 'lineer': choose one of linear, linear_beta, sqrt, cosine, given"),
        (("linear", 1), "at least 2 steps"),
        (("linear", 1000, 0.02, 0.01), "start <= end"),
        (("linear_beta", 1000, 0.1, 1.5), "end < 1"),
        (("cosine", 1000, 0.1), "has no start"),
    ],
)
def test_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedules.make_betas(*arguments)
