"""Key maps: layouts and rules in both directions, and every disagreement between a file and a network in one list."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_jax.config import UserError
from ldm_jax.interop import keymap
from ldm_jax.interop.keymap import CONV, LINEAR, POINTWISE, POINTWISE_1D, SAME, Layout, Rule, Tensor, fused, key_map, nest

SIZES = st.integers(1, 5)
# Layout, shape of ours and shape of theirs for I, O and a window of K x K.
SINGLE: dict[str, tuple[Layout, Any, Any]] = {
    "same": (SAME, lambda i, o, k: (i, o), lambda i, o, k: (i, o)),
    "linear": (LINEAR, lambda i, o, k: (i, o), lambda i, o, k: (o, i)),
    "conv": (CONV, lambda i, o, k: (k, k, i, o), lambda i, o, k: (o, i, k, k)),
    "pointwise": (POINTWISE, lambda i, o, k: (i, o), lambda i, o, k: (o, i, 1, 1)),
    "pointwise 1d": (POINTWISE_1D, lambda i, o, k: (i, o), lambda i, o, k: (o, i, 1)),
}


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("name", SINGLE)
@given(i=SIZES, o=SIZES, k=SIZES)
def test_a_layout_turns_shapes_and_back(name: str, i: int, o: int, k: int) -> None:
    layout, our_shape, their_shape = SINGLE[name]
    ours, theirs = numbered(*our_shape(i, o, k)), numbered(*their_shape(i, o, k))
    assert layout.write(ours).shape == theirs.shape
    np.testing.assert_array_equal(layout.read(layout.write(ours))[0], ours)
    np.testing.assert_array_equal(layout.write(*layout.read(theirs)), theirs)


@given(i=SIZES, o=SIZES, k=SIZES)
def test_input_and_output_channels_stay_what_they_are(i: int, o: int, k: int) -> None:
    kernel, matrix = numbered(k, k, i, o), numbered(i, o)
    for index in np.ndindex(k, k, i, o):
        row, column, source, target = index
        assert CONV.write(kernel)[target, source, row, column] == kernel[index]
    for source, target in np.ndindex(i, o):
        assert LINEAR.write(matrix)[target, source] == POINTWISE.write(matrix)[target, source, 0, 0] == matrix[source, target]
        assert POINTWISE_1D.write(matrix)[target, source, 0] == matrix[source, target]


@given(heads=SIZES, size=SIZES, width=SIZES, kernel=st.sampled_from([LINEAR, POINTWISE, POINTWISE_1D]))
def test_fused_rows_are_by_head_then_part_then_channel(heads: int, size: int, width: int, kernel: Layout) -> None:
    layout, n = fused(heads, kernel), heads * size
    matrices = [numbered(width, n) + 1000 * part for part in range(3)]
    biases = [numbered(n) + 1000 * part for part in range(3)]
    weight, bias = layout.write(*matrices), layout.write(*biases)
    assert weight.shape == (3 * n, width, *kernel.write(matrices[0]).shape[2:]) and bias.shape == (3 * n,)
    flat = weight.reshape(3 * n, width)
    for head, part, channel in np.ndindex(heads, 3, size):
        row = (head * 3 + part) * size + channel
        np.testing.assert_array_equal(flat[row], matrices[part][:, head * size + channel])
        assert bias[row] == biases[part][head * size + channel]
    for written, leaves in ((weight, matrices), (bias, biases)):
        back = layout.read(written)
        np.testing.assert_array_equal(np.stack(back), np.stack(leaves))
        np.testing.assert_array_equal(layout.write(*back), written)


ATTENTION = Rule("(?P<part>[qkv])", "qkv", fused(2), ("q", "k", "v"))
RULES = [
    Rule("table", "embedding.weight"),
    Rule("conv", "stem.0", CONV),
    *nest(r"block_(?P<i>\d+)", r"blocks.\g<i>", (Rule("norm", "ln"), ATTENTION, Rule("out", lambda m: f"proj{m['i']}", LINEAR))),
]
OURS: dict[str, Any] = {
    "table": np.zeros((5, 4)),
    "conv": {"kernel": np.zeros((3, 3, 2, 4)), "bias": np.zeros(4)},
    "block_11": {
        "norm": {"scale": np.zeros(4), "bias": np.zeros(4)},
        **{part: {"kernel": np.zeros((4, 6)), "bias": np.zeros(6)} for part in "qkv"},
        "out": {"kernel": np.zeros((6, 4))},
    },
}
THEIRS = {
    "embedding.weight": (5, 4),
    "stem.0.weight": (4, 2, 3, 3),
    "stem.0.bias": (4,),
    "blocks.11.ln.weight": (4,),
    "blocks.11.ln.bias": (4,),
    "blocks.11.qkv.weight": (18, 4),
    "blocks.11.qkv.bias": (18,),
    "blocks.11.proj11.weight": (4, 6),
}


def test_rules_name_every_tensor() -> None:
    keys = key_map(OURS, RULES)
    assert keymap.their_shapes(keys, OURS) == THEIRS
    by_name = {t.name: t.leaves for t in keys}
    assert by_name["blocks.11.qkv.weight"] == ("block_11/q/kernel", "block_11/k/kernel", "block_11/v/kernel")  # in the order of the rule
    assert by_name["embedding.weight"] == ("table",)
    assert [t.name for t in key_map(OURS, RULES, "net.")] == [f"net.{t.name}" for t in keys]
    assert [t.leaves for t in keymap.under("denoiser", keys)] == [tuple(f"denoiser/{leaf}" for leaf in t.leaves) for t in keys]


def test_the_first_rule_wins_and_a_leaf_without_one_has_no_place() -> None:
    tree = {"a": {"kernel": np.zeros((2, 3))}}
    assert [t.name for t in key_map(tree, [Rule("a", "first"), Rule("[a-z]", "second")])] == ["first.weight"]
    for other in ({"b": {"kernel": np.zeros(1)}}, {"a": {"other": np.zeros(1)}}, {"aa": {"kernel": np.zeros(1)}}):
        with pytest.raises(ValueError, match=f"^{next(iter(other))}/.* has no counterpart there$"):
            key_map(other, [Rule("a", "first")])


def test_a_map_reads_what_it_writes() -> None:
    keys, rng = key_map(OURS, RULES), np.random.default_rng(0)
    theirs = {name: rng.normal(size=shape) for name, shape in THEIRS.items()}
    ours = dict(keymap.read(keys, theirs.__getitem__))
    assert {leaf: array.shape for leaf, array in ours.items()} == {leaf: array.shape for leaf, array in keymap.flatten(OURS).items()}
    again = dict(keymap.write(keys, ours.__getitem__))
    assert list(again) == [t.name for t in keys]
    for name, array in theirs.items():
        np.testing.assert_array_equal(again[name], array)


def test_shapes_of_a_large_network_take_no_memory() -> None:
    class Huge:
        shape = (2**20, 2**20)

    keys = key_map({"a": {"kernel": Huge}}, [Rule("a", "a", LINEAR)])
    assert keymap.their_shapes(keys, {"a": {"kernel": Huge}}) == {"a.weight": (2**20, 2**20)}


def test_every_disagreement_is_in_one_list() -> None:
    keys = key_map(OURS, RULES)
    assert keymap.problems(keys, OURS, THEIRS) == []
    theirs = {**THEIRS, "blocks.11.qkv.weight": (18, 4, 1), "stem.0.bias": (5,), "extra": (1,), "extra.ignored": (2,)}
    del theirs["embedding.weight"], theirs["blocks.11.ln.bias"]
    wrong = {
        "embedding.weight is missing",
        "blocks.11.ln.bias is missing",
        "blocks.11.qkv.weight is [18, 4, 1], not [18, 4]",
        "stem.0.bias is [5], not [4]",
        "extra is not expected",
    }
    found = keymap.problems(keys, OURS, theirs, [r"extra\.\w+", "embedding.*"])
    assert len(found) == len(wrong) and set(found) == wrong
    with pytest.raises(UserError, match=r"^file\.pt does not fit its configuration \(5 tensors\): ") as error:
        keymap.check(keys, OURS, theirs, "file.pt", [r"extra\.\w+"])
    assert all(line in str(error.value) for line in wrong) and "\n" not in str(error.value)
    keymap.check(keys, OURS, THEIRS | {"extra.ignored": (2,)}, "file.pt", [r"extra\.\w+"])


@given(name=st.text("ab.", min_size=1, max_size=4))
def test_a_pattern_ignores_whole_names_only(name: str) -> None:
    expected = [] if re.fullmatch(r"a\.b", name) else [f"{name} is not expected"]
    assert keymap.problems([], {}, {name: (1,)}, [r"a\.b"]) == expected


def test_two_tensors_that_are_one_here_must_agree() -> None:
    keys = [Tensor("table", ("embedding",), SAME), Tensor("copy", ("embedding",), SAME), Tensor("other", ("bias",), SAME)]
    theirs = {"table": numbered(2, 3), "copy": numbered(2, 3), "other": numbered(2)}
    assert [leaf for leaf, _ in keymap.read(keys, theirs.__getitem__)] == ["embedding", "bias"]
    assert dict(keymap.write(keys, {"embedding": theirs["table"], "bias": theirs["other"]}.__getitem__)).keys() == theirs.keys()
    theirs["copy"] = theirs["copy"] + 1
    with pytest.raises(UserError, match=r"^copy differs from table: "):
        list(keymap.read(keys, theirs.__getitem__))
