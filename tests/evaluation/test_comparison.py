"""Comparisons agree with numbers worked out by hand, with the bootstrap, and with the law of their z under the null hypothesis."""

import json

import numpy as np
import pytest

from ldm_jax.evaluation.comparison import compare, format_comparison


def test_paired_scores_by_hand() -> None:
    """Differences 1, 1, 0, 1: mean 3/4, variance 1/4; the gap is 1 in every scene, so that the share closed has their variance."""
    sets = [np.array(values, float) for values in ([1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1])]
    row = compare(*({"m": values} for values in sets))["m"]
    assert (row["n"], row["conditioned"], row["control"], row["ceiling"], row["closed"]) == (4, 0.75, 0, 1, 0.75)
    assert row["conditioned_se"] == pytest.approx(0.25) and row["control_se"] == row["ceiling_se"] == 0
    assert row["z"] == pytest.approx(3) and row["closed_se"] == pytest.approx(0.25) and row["half_z"] == pytest.approx(1)


def test_pairing_takes_out_what_the_scenes_share() -> None:
    """Conditioned and ceiling differ by a constant, whatever the scene."""
    rng = np.random.default_rng(0)
    scene, control = rng.normal(0, 1, 200), rng.normal(-4, 0.1, 200)
    row = compare({"m": scene - 1}, {"m": control}, {"m": scene})["m"]
    gap = row["ceiling"] - row["control"]
    assert row["closed"] == pytest.approx(1 - 1 / gap)
    assert row["closed_se"] == pytest.approx((scene - control).std(ddof=1) / gap**2 / 200**0.5)
    apart = compare({"m": scene - 1}, {"m": control}, {"m": scene[:-1]})["m"]
    assert apart["closed_se"] > 3 * row["closed_se"]


def test_other_scenes_by_hand() -> None:
    row = compare({"m": np.array([2.0, 4.0])}, {"m": np.array([0.0, 1.0, 2.0])}, {"m": np.array([4.0, 6.0, np.nan, 5.0])})["m"]
    assert (row["n"], row["conditioned"], row["control"], row["ceiling"]) == (2, 3, 1, 5)
    variance = 1 + 1 / 3  # of the means: 2 / 2 and 1 / 3; the ceiling's is 1 / 3
    assert row["z"] == pytest.approx(min(2 / variance**0.5, 2))
    assert row["closed"] == 0.5 and row["half_z"] == 0
    assert row["closed_se"] == pytest.approx((1 / 16 + 1 / 64 / 3 + 1 / 64 / 3) ** 0.5)


@pytest.mark.parametrize("paired", [True, False])
def test_the_error_of_the_share_is_the_bootstraps(paired: bool) -> None:
    rng = np.random.default_rng(3)
    scene = rng.normal(0, 0.5, 300)
    sets = [scene + rng.normal(mean, 0.5, 300) for mean in (1.6, 0, 2)]
    if not paired:
        sets[1] = sets[1][:150]
    draws = []
    for _ in range(4000):
        index = rng.integers(0, 300, 300)
        a, b, c = (s[index] if paired else s[rng.integers(0, len(s), len(s))] for s in sets)
        draws.append((a.mean() - b.mean()) / (c.mean() - b.mean()))
    row = compare(*({"m": values} for values in sets))["m"]
    assert row["closed_se"] == pytest.approx(np.std(draws), rel=0.06)


def test_z_is_standard_normal_where_nothing_is_to_be_found() -> None:
    rng = np.random.default_rng(4)
    zs, halves = [], []
    for _ in range(600):
        control, same, half = ((rng.random(200) < rate).astype(float) for rate in (0.2, 0.2, 0.55))
        zs.append(compare({"m": same}, {"m": control}, {"m": np.full(200, 0.9)})["m"]["z"])
        halves.append(compare({"m": half}, {"m": control}, {"m": np.full(200, 0.9)})["m"]["half_z"])
    for values in (zs, halves):
        assert abs(np.mean(values)) < 0.2
        assert np.std(values) == pytest.approx(1, abs=0.12)


def test_scores_without_spread_prove_no_more_than_their_number() -> None:
    row = compare({"m": np.ones(30)}, {"m": np.zeros(30)}, {"m": np.ones(30)})["m"]
    assert row["z"] == 30 and row["half_z"] == 30 and row["closed"] == 1 and row["closed_se"] == 0
    worse = compare({"m": np.zeros(30)}, {"m": np.full(30, 0.5)}, {"m": np.ones(30)})["m"]
    assert worse["z"] == -30 and worse["half_z"] == -30 and worse["closed"] == -1
    single = compare({"m": np.array([1.0])}, {"m": np.array([0.0])}, {"m": np.array([1.0])})["m"]
    assert single["z"] == 1 and single["conditioned_se"] == 0


def test_what_does_not_apply_is_left_out() -> None:
    some = {"a": np.array([1.0, np.nan, 0.0]), "b": np.full(3, np.nan), "c": np.zeros(3)}
    low = {"a": np.array([0.0, np.nan, 0.0]), "b": np.full(3, np.nan), "c": np.zeros(3)}
    high = {"a": np.array([1.0, 1.0, 1.0]), "b": np.ones(3), "c": np.zeros(3)}
    table = compare(some, low, high)
    assert list(table) == ["a", "c"] and table["a"]["n"] == 2 and table["a"]["closed"] == 0.5
    assert table["c"]["closed"] is None and table["c"]["half_z"] is None and table["c"]["z"] == 0
    assert json.loads(json.dumps(table, allow_nan=False)) == table

    lines = format_comparison(table).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert " ".join(lines[1].split()) == "a 2 0.500 ± 0.500 0.000 ± 0.000 1.000 ± 0.000 0.500 ± 0.500 1.0 0.0"
    assert lines[2].split()[-3:] == ["-", "0.0", "-"]


def test_sets_of_other_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics differ: \['a'\], \['b'\] and \['a'\]"):
        compare({"a": np.ones(2)}, {"b": np.ones(2)}, {"a": np.ones(2)})
