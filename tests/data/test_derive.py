"""What is drawn for an example: a pure function of (seed, position), each kind with a stream of its own."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.config import UserError
from ldm_jax.data.degradations import degrade
from ldm_jax.data.derive import Derive, Derived, derived, one_caption, stream
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.shapes import ShapesSource
from ldm_jax.data.transforms import mirror
from ldm_jax.defaults import base

SOURCE = ShapesSource(size=12, resolution=32)
ALL = Derive(16, min_window=0.5, degradation="bsr_light", factor=4, holes="medium")


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), position=st.integers(0, 2**40))
def test_it_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    drawn = ALL(SOURCE[0], seed, position)
    assert equal(drawn, ALL(SOURCE[0], seed, position))
    other = ALL(SOURCE[0], seed, position + 1)
    assert not np.array_equal(drawn["low_res"], other["low_res"]) and not np.array_equal(drawn["mask"], other["mask"])
    assert drawn["image"].shape == (16, 16, 3) and drawn["low_res"].shape == (4, 4, 3) and drawn["segmentation"].shape == (16, 16)
    assert drawn["mask"].shape == (16, 16) and 0 < drawn["mask"].mean() < 1


def test_one_kind_changes_no_other() -> None:
    everything = ALL(SOURCE[0], 3, 4)
    assert np.array_equal(everything["mask"], Derive(16, min_window=0.5, holes="medium")(SOURCE[0], 3, 4)["mask"])
    window = Derive(16, min_window=0.5)(SOURCE[0], 3, 4)
    assert np.array_equal(everything["image"], window["image"])
    small = degrade("bsr_light", window["image"], 4, stream("low_res", 3, 4))
    assert np.array_equal(everything["low_res"], small)


def test_a_source_and_its_batches() -> None:
    """An example by its index is as at that position of seed 0; a batch draws by its own seed and positions, after mirroring."""
    source = Derived(SOURCE, ALL)
    assert equal(source[5], ALL(SOURCE[5], 0, 5)) and len(source) == 12
    batches = Batches(source, 4, seed=7, flip=True)
    batch, indices = batches.batch(2), batches.indices(2)
    for row, (index, position) in enumerate(zip(indices, range(8, 12), strict=True)):
        views = [ALL(view, 7, position)["mask"] for view in (SOURCE[int(index)], mirror(SOURCE[int(index)]))]
        assert any(np.array_equal(batch["mask"][row], view) for view in views)
    whole = Batches(source, 8, seed=7).batch(1)
    parts = [Batches(source, 8, seed=7, rows=range(4 * p, 4 * p + 4)).batch(1) for p in (0, 1)]
    assert np.array_equal(whole["low_res"], np.concatenate([part["low_res"] for part in parts]))


def test_what_a_configuration_asks_for() -> None:
    cfg = base()
    assert derived(SOURCE, cfg.data, cfg.conditioning) is SOURCE
    cfg.conditioning.mask.enabled = cfg.conditioning.low_res.enabled = True
    made = derived(SOURCE, cfg.data, cfg.conditioning, 8)
    assert made.derive == Derive(64, 0.0, "bicubic", 8, "medium")
    assert SOURCE.fingerprint() in made.fingerprint() != derived(SOURCE, cfg.data, cfg.conditioning, 4).fingerprint()
    cfg.conditioning.mask.holes = ""  # the data has masks
    assert derived(SOURCE, cfg.data, cfg.conditioning, 8).derive.holes == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"degradation": "jpeg"}, "conditioning.low_res.degradation 'jpeg' is not one of bicubic, bsr, bsr_light"),
        ({"holes": "round"}, "conditioning.mask.holes 'round' is not one of thin, "),
        ({"min_window": 1.5}, r"data.min_window is a share in \[0, 1\], not 1.5"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Derive(16, **fields)


def test_one_of_several_captions() -> None:
    example = {"text": ["a", "b", "c"]}
    drawn = [one_caption(example, 1, position)["text"] for position in range(300)]
    counts = [drawn.count(text) for text in "abc"]
    assert min(counts) > 60 and drawn == [one_caption(example, 1, position)["text"] for position in range(300)]
    assert one_caption({"text": "a"}, 1, 0) == {"text": "a"} and one_caption({"label": 1}, 1, 0) == {"label": 1}
