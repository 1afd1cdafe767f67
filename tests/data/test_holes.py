"""Holes: their shares by kind, their bounds, and that a figure is the same at any resolution."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ldm_jax.data.holes import HOLES, Bands, Boxes, HoleSettings, Strokes, draw_hole

COUNT = 150


def holes(kind: str, size: int = 128) -> np.ndarray:
    return np.stack([draw_hole(np.random.default_rng(seed), size, size, HOLES[kind]) for seed in range(COUNT)])


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(HOLES)), st.integers(1, 70), st.integers(2, 70), st.integers(0, 2**32))
def test_a_hole_is_some_of_the_picture_and_not_all(kind: str, height: int, width: int, seed: int) -> None:
    hole = draw_hole(np.random.default_rng(seed), height, width, HOLES[kind])
    assert hole.shape == (height, width) and hole.dtype == np.bool_
    assert 0 < hole.sum() < height * width
    np.testing.assert_array_equal(hole, draw_hole(np.random.default_rng(seed), height, width, HOLES[kind]))


@pytest.mark.parametrize("kind", HOLES)
def test_shares_are_within_the_bounds_and_vary(kind: str) -> None:
    shares = holes(kind).mean((1, 2))
    assert shares.min() >= HOLES[kind].min_share and shares.max() <= HOLES[kind].max_share
    if kind == "half":
        np.testing.assert_array_equal(shares, 0.5)
    else:
        assert shares.std() > 0.08 and len(np.unique(shares)) > COUNT / 3


def test_shares_by_kind() -> None:
    """Means of 150 holes, whose standard error is about 0.01; the ranges are those of the kinds' first published numbers."""
    mean = {kind: holes(kind).mean() for kind in HOLES}
    for kind, low, high in (("thin", 0.26, 0.34), ("medium", 0.19, 0.27), ("wide", 0.24, 0.33), ("boxes", 0.17, 0.25)):
        assert low < mean[kind] < high, (kind, mean)
    assert 0.4 < mean["outpaint"] < 0.6


def test_wide_holes_are_wider_than_medium_and_these_than_thin_ones() -> None:
    """The distance to the nearest known pixel, which is what makes a hole hard to fill, in pixels of 128."""
    depth = {kind: np.mean([ndimage.distance_transform_edt(hole).max() for hole in holes(kind)[:60]]) for kind in HOLES}
    assert 1.5 * depth["thin"] < depth["medium"] and 1.3 * depth["medium"] < depth["wide"]


@pytest.mark.parametrize("kind", HOLES)
def test_the_same_generator_draws_the_same_hole_at_any_resolution(kind: str) -> None:
    agree = []
    for seed in range(60):
        small, large = (draw_hole(np.random.default_rng(seed), size, size, HOLES[kind]) for size in (64, 256))
        reduced = large.reshape(64, 4, 64, 4).mean((1, 3)) > 0.5
        agree.append((small & reduced).sum() / (small | reduced).sum())
    # Only a figure whose share lies at a bound may be taken at one resolution and drawn anew at the other.
    assert np.median(agree) > 0.93 and np.sum(np.array(agree) < 0.8) <= 2


@pytest.mark.parametrize("figure", [figure for name in ("thin", "medium", "wide", "outpaint") for _, figure in HOLES[name].figures])
def test_figures_scale_with_the_short_side_of_a_long_picture(figure: Strokes | Boxes | Bands) -> None:
    for seed in range(20):
        small, large = (figure.draw(np.random.default_rng(seed), height, 2 * height) for height in (64, 256))
        reduced = large.reshape(64, 4, 128, 4).mean((1, 3)) > 0.5
        assert (small ^ reduced).mean() < 0.03


def test_a_single_line_is_a_capsule() -> None:
    """Its area is that of a rectangle and two half discs, wherever it lies inside the picture."""
    figure, areas = Strokes(count=(1, 1), width=(20, 20), length=(60, 60), lines=(1, 1)), []
    for seed in range(40):
        hole = figure.draw(np.random.default_rng(seed), 256, 256)
        if not (hole[0].any() or hole[-1].any() or hole[:, 0].any() or hole[:, -1].any()):
            areas.append(hole.sum())
            # A disc of the line's width fits everywhere along it, the rounded ends included.
            y, x = np.mgrid[-9:10, -9:10]
            opened = ndimage.binary_opening(hole, x * x + y * y <= 81)
            assert (hole ^ opened).sum() < 0.03 * hole.sum()
    assert len(areas) > 10
    np.testing.assert_allclose(areas, 60 * 20 + np.pi * 100, rtol=0.01)


def test_lines_of_a_chain_hang_together_even_thinner_than_a_pixel() -> None:
    figure = Strokes(count=(1, 1), width=(5, 5), length=(100, 200), lines=(5, 5))
    for seed in range(30):
        hole = figure.draw(np.random.default_rng(seed), 16, 16)
        assert hole.any() and ndimage.label(hole, np.ones((3, 3)))[1] == 1


def test_directions_of_lines_are_uniform() -> None:
    """The moments of the directions in which single lines from the same law point, by the covariance of their pixels."""
    figure, doubled = Strokes(count=(1, 1), width=(5, 5), length=(40, 40), lines=(1, 1)), []
    for seed in range(300):
        hole = figure.draw(np.random.default_rng(seed), 256, 256)
        y, x = np.nonzero(hole)
        if min(x.min(), y.min()) > 0 and max(x.max(), y.max()) < 255:
            (xx, xy), (_, yy) = np.cov(x, y)
            doubled.append(np.array([xx - yy, 2 * xy]) / np.hypot(xx - yy, 2 * xy))
    assert len(doubled) > 150
    assert np.hypot(*np.mean(doubled, axis=0)) < 3 / len(doubled) ** 0.5


def test_boxes_keep_their_margin_and_sides() -> None:
    figure = Boxes(count=(1, 1), side=(30, 150), margin=10)
    sides = []
    for seed in range(400):
        hole = figure.draw(np.random.default_rng(seed), 256, 256)
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert rows[0] >= 10 and columns[0] >= 10 and rows[-1] < 246 and columns[-1] < 246
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        sides += [len(rows), len(columns)]
    assert min(sides) >= 29 and max(sides) <= 151
    np.testing.assert_allclose(np.mean(sides), 90, atol=4)
    np.testing.assert_allclose(np.var(sides), 120**2 / 12, rtol=0.1)


def test_a_box_larger_than_the_picture_is_cut_to_what_the_margin_leaves() -> None:
    hole = Boxes(count=(1, 1), side=(400, 400), margin=16).draw(np.random.default_rng(0), 64, 128)
    expected = np.zeros((64, 128), bool)
    expected[4:60, 14:114] = True
    assert hole.any(1).sum() == 56 and hole.any(0).sum() == 100 and hole.sum() == expected.sum()


def test_bands_lie_along_the_sides() -> None:
    seen = set()
    for seed in range(60):
        hole = Bands(count=(1, 1), depth=(0.25, 0.25)).draw(np.random.default_rng(seed), 40, 80)
        sides = {"upper": hole[:10].all(), "lower": hole[30:].all(), "left": hole[:, :20].all(), "right": hole[:, 60:].all()}
        assert hole.mean() == 0.25 and sum(sides.values()) == 1
        seen |= {side for side, covered in sides.items() if covered}
    assert seen == {"upper", "lower", "left", "right"}
    frame = Bands(count=(4, 4), depth=(0.25, 0.25)).draw(np.random.default_rng(0), 40, 80)
    assert not frame[10:30, 20:60].any() and frame.mean() == 0.75


def test_figures_are_drawn_by_weight() -> None:
    upper, whole_boxes = Bands(count=(1, 1), depth=(0.5, 0.5)), Boxes(count=(1, 1), side=(64, 64))
    mixed = HoleSettings(((3.0, upper), (1.0, whole_boxes)))
    shares = np.array([draw_hole(np.random.default_rng(seed), 64, 64, mixed).mean() for seed in range(600)])
    assert abs((shares == 0.5).mean() - 0.75) < 0.06


def test_the_nearest_share_is_taken_where_none_is_within_the_bounds() -> None:
    boxes = Boxes(count=(1, 1), side=(64, 128))
    impossible = HoleSettings(((1.0, boxes),), min_share=0.9, max_share=0.95)
    rng = np.random.default_rng(0)
    shares = [draw_hole(rng, 64, 64, impossible).mean() for _ in range(20)]
    assert min(shares) > 0.12  # the largest of twenty boxes, of shares up to a quarter
    everything = dataclasses.replace(impossible, figures=((1.0, Bands((4, 4), (0.5, 0.5))),))
    assert 0 < draw_hole(rng, 8, 8, everything).mean() < 1
    nothing = dataclasses.replace(impossible, figures=((1.0, Boxes((0, 0), (1, 1))),))
    assert 0 < draw_hole(rng, 8, 8, nothing).mean() < 1


def test_a_single_pixel_has_no_hole() -> None:
    with pytest.raises(ValueError, match="1 x 1 pixels"):
        draw_hole(np.random.default_rng(0), 1, 1, HOLES["wide"])
