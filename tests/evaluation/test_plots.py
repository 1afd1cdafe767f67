"""Ticks are round, few and cover the data; thinning loses no extreme; plots are XML whose lines lie where the numbers say."""

import math
import re
from fractions import Fraction
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.evaluation.plots import finite, legend, line_plot, log_ticks, significant, thin, tick_labels, ticks

_VALUES = st.floats(-1e100, 1e100, allow_nan=False).map(lambda v: 0.0 if abs(v) < 1e-100 else v)
_POSITIVE = st.floats(-90, 90).map(lambda power: 10**power)


@settings(deadline=None)
@given(_VALUES, _VALUES, st.integers(3, 12))
def test_ticks_cover_are_few_and_round(a: float, b: float, most: int) -> None:
    low, high = sorted((a, b))
    found = ticks(low, high, most)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= most
    mantissa, power = f"{(found[-1] - found[0]) / (len(found) - 1):.0e}".split("e")
    assert int(mantissa) in (1, 2, 5)
    step = int(mantissa) * Fraction(10) ** int(power)
    assert all(tick == float(round(Fraction(tick) / step) * step) for tick in found)


def test_ticks_by_hand() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(3.94, 15.02) == [0, 5, 10, 15, 20]
    assert ticks(-0.3, 0.1, 5) == [-0.3, -0.2, -0.1, 0.0, 0.1]
    assert ticks(7, 7, 6)[0] < 7 < ticks(7, 7, 6)[-1] and ticks(0, 0)[0] == -1
    with pytest.raises(ValueError, match="at least 3"):
        ticks(0, 1, 2)
    with pytest.raises(ValueError, match="low <= high"):
        ticks(1, 0)


@settings(deadline=None)
@given(_POSITIVE, _POSITIVE, st.integers(4, 12))
def test_log_ticks_cover_are_few_and_positive(a: float, b: float, most: int) -> None:
    low, high = sorted((a, b))
    found = log_ticks(low, high, most)
    assert 0 < found[0] <= low and found[-1] >= high and 2 <= len(found) <= most and found == sorted(set(found))
    if high > 2 * low:
        assert all(f"{tick:.12e}".partition("e")[0].rstrip("0").rstrip(".") in ("1", "2", "5") for tick in found)


def test_log_ticks_by_hand() -> None:
    assert log_ticks(0.03, 0.9) == [0.02, 0.05, 0.1, 0.2, 0.5, 1]
    assert log_ticks(1e-5, 1) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])
    assert log_ticks(1e-9, 1) == pytest.approx([1e-9, 1e-7, 1e-5, 1e-3, 0.1, 10])
    below = math.nextafter(1000, 0)  # its logarithm is 3 in floating point
    assert log_ticks(below, 1e9)[0] < below


def test_labels() -> None:
    assert tick_labels([0, 0.5, 1]) == ["0", "0.5", "1.0"] and tick_labels([-1, 0, 1]) == ["−1", "0", "1"]
    assert tick_labels([0, 5000, 10000]) == ["0", "5k", "10k"] and tick_labels([1e6, 1.5e6]) == ["1.0M", "1.5M"]
    assert tick_labels([1, 1000, 2000]) == ["1", "1000", "2000"] and tick_labels([0, 2e-7])[1] == "2e−07"


@settings(deadline=None)
@given(_VALUES)
def test_four_digits(value: float) -> None:
    text = significant(value)
    assert float(text.replace("−", "-").replace(",", "")) == pytest.approx(value, rel=5.001e-4)
    assert re.fullmatch(r"0|−?(\d{1,3}(,\d{3})+|\d+(\.\d+)?(e−?\d+)?)", text)


def test_four_digits_by_hand() -> None:
    cases = {3.94: "3.940", 9.9996: "10.00", -0.0123: "−0.01230", 51234.4: "51,234", 1.2e-7: "1.200e−7", 0.0: "0", 4e9: "4.000e9"}
    assert [significant(value) for value in cases] == list(cases.values()) and significant(0.0213, 2) == "0.021"


def test_what_is_a_number() -> None:
    assert [finite(v) for v in (1, 2.5, True, None, "3", "nan", math.nan, -math.inf)] == [1, 2.5, *[None] * 6]


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(-10, 10), max_size=300), st.integers(4, 60))
def test_thinning_keeps_order_ends_and_extremes(ys: list[float | None], most: int) -> None:
    points = [(float(x), y) for x, y in enumerate(ys)]
    kept = thin(points, most)
    assert len(kept) <= max(most, 0) and [p for p in points if p in set(kept)] == kept
    if points:
        assert kept[0] == points[0] and kept[-1] == points[-1]
    known = [y for y in ys if y is not None]
    if known:
        left = [y for _, y in kept if y is not None]
        assert (min(left), max(left)) == (min(known), max(known))


def test_thinning_keeps_a_spike_and_a_gap() -> None:
    points = [(float(x), None if 4000 <= x < 5000 else 1.0) for x in range(10_000)]
    points[7777] = (7777.0, 100.0)
    kept = thin(points)
    assert 300 < len(kept) <= 400 and points[7777] in kept
    assert any(y is None and 4000 <= x < 5000 for x, y in kept)


def _path(svg: str) -> list[list[tuple[float, float]]]:
    data = next(ElementTree.fromstring(svg).iter("path")).get("d") or ""
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", run)] for run in data.split("M")[1:]]


def test_a_line_lies_where_its_axes_say() -> None:
    """Positions of ticks and of points are one linear map."""
    svg = line_plot("t", "x", "y", {"a": [[1, 2.0], [2, 6.0], [3, 3.0]]})
    root = ElementTree.fromstring(svg)
    rules = [float(e.get("y1") or "") for e in root.iter("line") if e.get("class") == "rule"]
    assert [e.text for e in root.iter("text") if e.get("class") == "tick"][:5] == ["2", "3", "4", "5", "6"]
    (line,) = _path(svg)
    assert [y for _, y in line] == [rules[0], rules[4], rules[1]]
    assert line[2][0] - line[1][0] == pytest.approx(line[1][0] - line[0][0], abs=0.11)


def test_a_log_axis_is_logarithmic() -> None:
    (line, last) = _path(line_plot("t", "x", "y", {"a": [[0, 1.0], [1, 0.1], [2, 0.01], [3, 0.0], [4, 0.001]]}, log=True))
    assert line[1][1] - line[0][1] == pytest.approx(line[2][1] - line[1][1], abs=0.11) and len(last) == 1
    linear = line_plot("t", "x", "y", {"a": [[0, -1.0], [1, 0.0]]})
    assert line_plot("t", "x", "y", {"a": [[0, -1.0], [1, 0.0]]}, log=True) == linear


def test_gaps_break_the_line() -> None:
    runs = _path(line_plot("t", "x", "y", {"a": [[0, 1], [1, "nan"], [2, 2], [3, 3], [None, 9], [4, None]]}))
    assert [len(run) for run in runs] == [1, 2]


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [[0, None], [1, "inf"]]}])
def test_nothing_to_draw_is_said(series: dict[str, list[list[object]]]) -> None:
    root = ElementTree.fromstring(line_plot("t", "x", "y", series))
    assert "no finite values" in [e.text for e in root.iter("text")] and not list(root.iter("path"))


@settings(deadline=None)
@given(
    st.dictionaries(st.text("ab<&'\"", max_size=4), st.lists(st.tuples(_VALUES, st.none() | _VALUES), max_size=6), max_size=8),
    st.booleans(),
)
def test_any_numbers_make_a_plot_within_its_frame(series: dict[str, list[tuple[float, float | None]]], log: bool) -> None:
    svg = line_plot("<t>", "x&", '"y"', series, log=log)
    root = ElementTree.fromstring(svg)
    assert root[0].tag == "title" and root[0].text == "<t>"
    for circle in root.iter("circle"):
        assert 0 <= float(circle.get("cx") or "") <= 420 and 0 <= float(circle.get("cy") or "") <= 250


def test_the_legend_has_the_lines_of_the_plot() -> None:
    names = [f"s{i} <" for i in range(8)]
    root = ElementTree.fromstring(legend(names))
    plot = ElementTree.fromstring(line_plot("t", "x", "y", {name: [[0, 1], [1, i]] for i, name in enumerate(names)}))
    classes = [e.get("class") for e in root.iter("line")]
    assert classes == [e.get("class") for e in plot.iter("path")] and len(set(classes)) == 8
    assert ["".join(item.itertext()) for item in root] == names
