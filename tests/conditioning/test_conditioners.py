"""Every kind of condition: shapes and routes, what stands for its absence, what it does not depend on, and bad input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.conditioning.build import KINDS, Model, build_conditioning
from ldm_jax.conditioning.conditioner import Conditioner, Conditioning
from ldm_jax.conditioning.conditioners import BoxesConditioner, TextConditioner
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.defaults import base
from ldm_jax.nn.embedders import BoxEmbedder
from ldm_jax.nn.text_encoder import TextTransformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

RESOLUTION, FACTOR, CHANNELS = 16, 4, 3
SIZE = RESOLUTION // FACTOR
TOKENIZER = Tokenizer.train(["a red circle", "a blue square"] * 9, vocab_size=300, max_length=8)
TRANSFORMER = {"width": 16, "depth": 1, "num_heads": 2, "head_dim": 8}
GROUPS: dict[str, dict[str, Any]] = {
    "text": {"vocab_size": 300, "max_length": 8, **TRANSFORMER},
    "label": {"num_classes": 5, "width": 16},
    "boxes": {"max_objects": 3, "vocab_size": 101, **TRANSFORMER},
    "segmentation": {"num_classes": 7, "stages": 2, "channels": 3},
    "low_res": {},
    "mask": {},
    "neighbors": {"count": 4, "width": 16},
}
RNG = np.random.default_rng(0)
BATCH: dict[str, Any] = {
    "text": ["a red circle", "a blue square"],
    "label": [4, 0],
    "boxes": [np.array([[2, 0.1, 0.2, 0.6, 0.9]]), np.zeros((0, 5))],
    "segmentation": RNG.integers(0, 7, (2, RESOLUTION, RESOLUTION), dtype=np.uint8),
    "low_res": RNG.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8),
    "mask": RNG.normal(size=(2, SIZE, SIZE, CHANNELS + 1)).astype(np.float32),
    "neighbors": RNG.normal(size=(2, 4, 16)).astype(np.float32),
}
ROUTES = {
    "text": ("crossattn", (8, 16)),
    "label": ("crossattn", (1, 16)),
    "boxes": ("crossattn", (11, 16)),
    "segmentation": ("concat", (SIZE, SIZE, 3)),
    "low_res": ("concat", (SIZE, SIZE, 3)),
    "mask": ("concat", (SIZE, SIZE, CHANNELS + 1)),
    "neighbors": ("crossattn", (4, 16)),
}


def conditioning(*names: str, dtype: Any = jnp.float32, **fields: Any) -> Conditioning:
    """The conditioners of these names, as a configuration builds them; `fields` are set in all of their groups."""
    group = base().conditioning.to_dict()
    for name in KINDS:
        group[name] |= GROUPS[name] | {"enabled": name in names} | (fields if name in names else {})
    return build_conditioning(group, Model(RESOLUTION, FACTOR, CHANNELS, dtype, TOKENIZER))


def only(name: str, **fields: Any) -> Conditioner:
    return conditioning(name, **fields).conditioners[0]


def applied(c: Any, arrays: Any = None, seed: int = 0) -> dict[str, np.ndarray]:
    """What fresh parameters make of the arrays, by default those of `BATCH`."""
    arrays = c.prepare(BATCH) if arrays is None else arrays
    return jax.device_get(jax.jit(lambda key, arrays: c.apply(c.init(key), arrays))(jax.random.key(seed), arrays))


# --- every kind ---


def test_every_kind_is_tested() -> None:
    assert GROUPS.keys() == ROUTES.keys() == BATCH.keys() == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_routes_and_shapes(name: str) -> None:
    c = only(name)
    assert c.name == name
    route, shape = ROUTES[name]
    found = applied(c)
    assert {kind: value.shape for kind, value in found.items()} == {route: (2, *shape)}
    assert np.isfinite(found[route]).all() and np.abs(found[route][0] - found[route][1]).max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_null_arrays_are_like_those_of_a_batch_and_the_same_for_each(name: str) -> None:
    c = only(name)
    arrays, null = c.prepare(BATCH), c.null(2)
    assert {k: (v.shape, v.dtype) for k, v in null.items()} == {k: (v.shape, v.dtype) for k, v in arrays.items()}
    for value in null.values():
        np.testing.assert_array_equal(value[0], value[1])
    route, _ = ROUTES[name]
    assert np.isfinite(applied(c, null)[route]).all()
    assert np.abs(applied(c, null)[route][0] - applied(c)[route][0]).max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_an_example_does_not_depend_on_its_neighbours(name: str) -> None:
    c, (route, _) = only(name), ROUTES[name]
    alone = applied(c, c.prepare({name: BATCH[name][1:]}))[route]
    np.testing.assert_allclose(alone, applied(c)[route][1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_without_the_field(name: str) -> None:
    with pytest.raises(UserError, match=f"^the data gives no {name}, which conditioning.{name} needs$"):
        conditioning(name).prepare({"image": np.zeros((2, 16, 16, 3))})


def test_all_at_once_are_joined_in_the_order_of_their_kinds() -> None:
    both = conditioning(*KINDS)
    params = jax.jit(both.init)(jax.random.key(0))
    found = jax.jit(both.apply)(params, both.prepare(BATCH))
    assert params.keys() == KINDS.keys()
    assert {route: value.shape for route, value in found.items()} == {"crossattn": (2, 24, 16), "concat": (2, SIZE, SIZE, 10)}
    parts = [jax.jit(c.apply)(params[c.name], c.prepare(BATCH)) for c in both.conditioners]
    for route, axis in {"crossattn": 1, "concat": -1}.items():
        np.testing.assert_array_equal(found[route], np.concatenate([part[route] for part in parts if route in part], axis))


def test_guidance_moves_away_from_what_training_dropped_alone() -> None:
    """A condition that was never dropped has no null that the network knows: each image keeps its own."""
    both = Conditioning((*conditioning("text", drop_rate=0.1).conditioners, *conditioning("mask", "label", drop_rate=0.0).conditioners))
    arrays = both.prepare(BATCH)
    away, null = both.unconditional(arrays), both.null(2)
    assert away.keys() == null.keys() == arrays.keys()
    np.testing.assert_array_equal(away["tokens"], null["tokens"])
    for name in ("mask", "label"):
        np.testing.assert_array_equal(away[name], arrays[name])
        assert (null[name] != arrays[name]).any()
    assert Conditioning(()).unconditional({}) == {}


def test_conditions_are_dropped_apart_from_each_other() -> None:
    both, n = conditioning("label", "neighbors", drop_rate=0.5), 400
    arrays = {"label": jnp.zeros(n, jnp.int32), "neighbors": jnp.ones((n, 4, 16))}
    dropped = both.drop(arrays, jax.random.key(0))
    label, neighbors = np.asarray(dropped["label"] == 5), np.asarray((dropped["neighbors"] == 0).all((1, 2)))
    assert set(np.unique(dropped["label"])) == {0, 5} and ((dropped["neighbors"] == 1).all((1, 2)) == ~neighbors).all()
    counts = np.array([[(label & neighbors).sum(), (label & ~neighbors).sum()], [(~label & neighbors).sum(), (~label & ~neighbors).sum()]])
    assert np.abs(counts - n / 4).max() < 5 * np.sqrt(n * 3 / 16)


# --- text ---


def padded(length: int, pad_id: int = 0) -> Tokenizer:
    """`TOKENIZER`, whose texts are filled up to another length or by another token."""
    inner = tokenizers.Tokenizer.from_str(TOKENIZER.to_json())
    inner.enable_padding(pad_id=pad_id)
    return Tokenizer(inner, length)


def embedded(kind: str, tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of texts by fresh parameters, and which of them are of padding."""
    group = base().conditioning.to_dict()
    group["text"] |= {**GROUPS["text"], "kind": kind, "ff_width": 24, "max_length": 8 if kind == "t5" else 20, "enabled": True}
    (c,) = build_conditioning(group, Model(RESOLUTION, FACTOR, CHANNELS, jnp.float32, tokenizer)).conditioners
    arrays = c.prepare({"text": texts})
    return applied(c, arrays)["crossattn"], arrays["tokens"] == tokenizer.pad_id


@pytest.mark.parametrize("pad_id", [0, 7])
def test_t5_gives_a_text_the_same_embeddings_whatever_it_is_padded_to(pad_id: int) -> None:
    texts = ["", "a red circle", "blue"]
    (short, padding), (long, more) = (embedded("t5", padded(length, pad_id), texts) for length in (9, 20))
    np.testing.assert_array_equal(more[:, :9], padding)
    assert padding.any(1).all() and not padding.all(1).any()
    np.testing.assert_allclose(long[:, :9][~padding], short[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["transformer", "clip"])
def test_the_encoders_of_the_paper_and_of_clip_are_not_told_of_padding(kind: str) -> None:
    """CLIP's sees only what came before, and the paper's attends to padding too, as they were trained to."""
    (first, padding), (second, _) = (embedded(kind, padded(20, pad_id), ["a red circle"]) for pad_id in (0, 7))
    before = np.abs(first - second)[~padding].max()
    assert before < 1e-5 if kind == "clip" else before > 1e-3
    assert np.abs(first - second)[padding].max() > 1e-3


def test_weights_that_are_frozen_have_no_gradient() -> None:
    for frozen in (False, True):
        c = only("text", frozen=frozen)

        def loss(params: Any, c: Any = c) -> jax.Array:
            return (c.apply(params, c.prepare(BATCH))["crossattn"] ** 2).sum()

        gradient = jax.jit(lambda key, c=c, loss=loss: jax.grad(loss)(c.init(key)))(jax.random.key(0))
        assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient)) != frozen


def test_without_a_tokenizer_only_shapes_are_known() -> None:
    c = TextConditioner(None, TextTransformer(300, 8, 16, 1, 2, 8), 8, 0.1)
    assert applied(c, c.null(2))["crossattn"].shape == (2, 8, 16)
    with pytest.raises(UserError, match="no tokenizer; convert it again with --tokenizer"):
        c.prepare({"text": ["a"]})


# --- label ---


@pytest.mark.parametrize(("to", "shape"), [("crossattn", (5, 1, 16)), ("vector", (5, 16))])
def test_a_label_is_a_row_of_the_table(to: str, shape: tuple[int, ...]) -> None:
    c = only("label", to=to)
    params = c.init(jax.random.key(0))
    found = c.apply(params, c.prepare({"label": np.arange(5)}))
    assert found.keys() == {to} and found[to].shape == shape
    np.testing.assert_array_equal(np.reshape(found[to], (5, 16)), params["embedding"][:5])
    np.testing.assert_array_equal(np.reshape(c.apply(params, c.null(1))[to], 16), params["embedding"][5])


def test_a_table_without_a_null_class() -> None:
    c = only("label", null_class=False, drop_rate=0.0)
    assert c.init(jax.random.key(0))["embedding"].shape == (5, 16)
    np.testing.assert_array_equal(c.null(2)["label"], [0, 0])


# --- boxes ---

UNIT = st.floats(0, 1)
CORNERS = st.tuples(UNIT, UNIT, UNIT, UNIT).map(lambda p: (min(p[0], p[2]), min(p[1], p[3]), max(p[0], p[2]), max(p[1], p[3])))
OBJECTS = st.lists(st.tuples(st.integers(0, 99), CORNERS), max_size=5)


def boxes_conditioner(vocab_size: int = 101, max_objects: int = 3) -> Any:
    network = TextTransformer(vocab_size, 3 * max_objects + 2, 16, 1, 2, 8)
    return BoxesConditioner(network, max_objects, 0.1)


def tokens_of(rows: Any, **sizes: int) -> np.ndarray:
    return boxes_conditioner(**sizes).prepare({"boxes": [rows]})["box_tokens"][0]


def test_an_object_is_its_class_and_two_corners() -> None:
    """On the grid of 10 x 10 of 100 tokens; the last, 100, is nothing, and the picture's corners come last."""
    rows = [[2, 0.0, 0.0, 1.0, 1.0], [7, 1 / 9, 2 / 9, 0.45, 5 / 9]]
    np.testing.assert_array_equal(tokens_of(rows), [2, 0, 99, 7, 21, 54, 100, 100, 100, 0, 99])
    np.testing.assert_array_equal(tokens_of([]), [100] * 9 + [0, 99])


def test_the_released_sentence() -> None:
    """92 tokens of 8192, of which 90 x 90 are places (Rombach et al. 2022, table 17)."""
    c = boxes_conditioner(8192, 30)
    tokens = c.prepare({"boxes": [[[8, 0.5, 0.25, 1, 1]]]})["box_tokens"][0]
    assert c.sections == 90 and tokens.shape == (92,)
    np.testing.assert_array_equal(tokens[:3], [8, 22 * 90 + 44, 8099])
    assert (tokens[3:-2] == 8191).all() and tokens[-2:].tolist() == [0, 8099]


@settings(deadline=None)
@given(objects=OBJECTS, vocab_size=st.sampled_from([101, 128, 145, 1024]))
def test_boxes_are_read_back_up_to_a_cell_of_the_grid(objects: list[Any], vocab_size: int) -> None:
    """No place has the token of "nothing", also where a square of places would fill all tokens."""
    rows = [(label, *corners) for label, corners in objects]
    tokens = tokens_of(rows, vocab_size=vocab_size, max_objects=5)
    cells = boxes_conditioner(vocab_size).sections
    assert tokens.max() < vocab_size and (tokens == vocab_size - 1).sum() == 3 * (5 - len(rows))
    for (label, *corners), (token, *places) in zip(rows, tokens[:15].reshape(5, 3), strict=False):
        assert token == label
        points = np.array([[place % cells, place // cells] for place in places]) / (cells - 1)
        np.testing.assert_allclose(points.ravel(), corners, atol=0.5 / (cells - 1) + 1e-6)


def test_of_too_many_objects_the_largest_stay_in_their_order() -> None:
    rows = [[i, 0, 0, side, side] for i, side in enumerate((0.5, 0.1, 0.9, 0.7))]
    assert tokens_of(rows)[:9:3].tolist() == [0, 2, 3]


# --- maps ---


def test_a_semantic_map_is_the_share_of_each_class_times_a_matrix() -> None:
    c = only("segmentation")
    params, maps = c.init(jax.random.key(0)), BATCH["segmentation"]
    shares = (maps[..., None] == np.arange(7)).reshape(2, SIZE, FACTOR, SIZE, FACTOR, 7).mean((2, 4))
    found = c.apply(params, c.prepare(BATCH))["concat"]
    np.testing.assert_allclose(found, shares @ params["channel_mapper"]["kernel"], rtol=1e-4, atol=1e-5)


def test_pixels_of_no_class_are_nothing() -> None:
    c = only("segmentation")
    assert not applied(c, c.null(1))["concat"].any()
    maps = np.where(np.arange(RESOLUTION) < 8, 255, BATCH["segmentation"]).astype(np.uint8)
    found = applied(c, c.prepare({"segmentation": maps}))["concat"]
    assert not found[:, :, :2].any() and found[:, :, 2:].any()


def test_small_pictures_lie_in_minus_one_to_one() -> None:
    picture = np.array([0, 255, 51], np.uint8)[:, None, None, None] * np.ones((1, SIZE, SIZE, 3), np.uint8)
    c = only("low_res")
    np.testing.assert_allclose(applied(c, c.prepare({"low_res": picture}))["concat"][:, 0, 0, 0], [-1, 1, -0.6], atol=1e-6)
    assert np.abs(applied(c, c.null(1))["concat"]).max() < 0.01


@pytest.mark.parametrize("style", ["ldm", "sd"])
def test_what_is_left_of_a_picture_with_a_hole(style: str) -> None:
    latents, hole = BATCH["mask"][..., :-1], np.sign(BATCH["mask"][..., -1:])
    found = applied(only("mask", style=style), {"mask": np.concatenate([latents, hole], -1)})["concat"]
    expected = [latents, hole] if style == "ldm" else [(hole > 0), latents]
    np.testing.assert_array_equal(found, np.concatenate(expected, -1))


def test_neighbours_are_attended_to_as_they_are() -> None:
    c = only("neighbors")
    np.testing.assert_array_equal(applied(c)["crossattn"], BATCH["neighbors"])
    assert not applied(c, c.null(2))["crossattn"].any()


@pytest.mark.parametrize("count", [1, 3, 4])
def test_fewer_neighbours_than_there_may_be(count: int) -> None:
    """What replaces them, in guidance and in training, is as many."""
    c = conditioning("neighbors", drop_rate=0.5)
    arrays = c.prepare({"neighbors": list(BATCH["neighbors"][:, :count])})
    np.testing.assert_array_equal(c.apply({}, arrays)["crossattn"], BATCH["neighbors"][:, :count])
    away = c.unconditional(arrays)["neighbors"]
    assert away.shape == (2, count, 16) and not away.any()
    dropped = c.drop({"neighbors": jnp.ones((64, count, 16))}, jax.random.key(0))["neighbors"]
    assert dropped.shape == (64, count, 16) and {0.0, 1.0} == set(np.unique(dropped))


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_tokens_of_boxes_read_back_to_half_a_cell(data: st.DataObject) -> None:
    c = only("boxes")
    share = st.floats(0, 1)
    rows = [
        (data.draw(st.integers(0, 98)), *sorted((data.draw(share), data.draw(share))), *sorted((data.draw(share), data.draw(share))))
        for _ in range(data.draw(st.integers(0, c.max_objects)))
    ]
    boxes = np.array([(label, x0, y0, x1, y1) for label, x0, x1, y0, y1 in rows]).reshape(-1, 5)
    crop = np.array([0.1, 0.2, data.draw(st.floats(0.3, 1)), 0.9])
    tokens = c.prepare({"boxes": [boxes], "crop": [crop]})["box_tokens"][0]
    found, window = c.boxes_of(tokens)
    cell = 0.5 / (c.sections - 1) + 1e-9
    np.testing.assert_array_equal(found[:, 0], boxes[:, 0])
    np.testing.assert_allclose(found[:, 1:], boxes[:, 1:], atol=cell)
    np.testing.assert_allclose(window, crop, atol=cell)
    np.testing.assert_array_equal(c.prepare({"boxes": [found], "crop": [window]})["box_tokens"][0], tokens)


@pytest.mark.parametrize(("name", "larger"), [("segmentation", (12, 20)), ("low_res", (3, 5, 3)), ("mask", (3, 5, CHANNELS + 1))])
def test_pictures_of_any_size_have_no_condition_of_that_size(name: str, larger: tuple[int, ...]) -> None:
    c = conditioning(name, drop_rate=0.5)
    given_ = c.prepare({name: np.zeros((2, *larger), np.float32 if name == "mask" else np.uint8)})
    away = c.unconditional(given_)[name]
    assert away.shape == (2, *larger) and len(np.unique(away)) == 1
    dropped = np.asarray(c.drop({name: jnp.zeros((64, *larger), away.dtype)}, jax.random.key(0))[name])
    assert {0, away.flat[0].item()} == set(np.unique(dropped).tolist())


# --- bad input ---

BOXES = "boxes are rows of"
WRONG: list[tuple[str, Any, str]] = [
    ("text", [3], "texts must be str"),
    ("label", [5], r"labels must lie in \[0, 5\), not 5 to 5"),
    ("label", [-1, 0], r"labels must lie in \[0, 5\), not -1 to 0"),
    ("label", [0.5], "labels must be int32 numbers, not float64 from 0.5 to 0.5"),
    ("label", [float("nan")], "labels must be int32 numbers"),
    ("label", ["dog"], "labels must be int32 numbers, not <U3"),
    ("label", [[1, 2]], r"labels must be one number for each image, not \[2\]"),
    ("label", 3, "labels must be one number for each image"),
    ("label", [[1], [2, 3]], "labels must be one number for each image, not arrays of different shapes"),
    ("boxes", [[[1, 0, 0, 1]]], rf"{BOXES} five numbers for each image, class, x0, y0, x1, y1, not an array of \[1, 4\]"),
    ("boxes", [[1, 0, 0, 1, 1]], rf"{BOXES} five numbers .* not an array of \[5\]"),
    ("boxes", [["dog"]], f"{BOXES} five numbers"),
    ("boxes", [[[1, 0, 0, 1, 1], [2]]], f"{BOXES} five numbers"),
    ("boxes", [[[1, -0.1, 0, 1, 1]]], r"with coordinates in \[0, 1\]"),
    ("boxes", [[[1, 0, 0, 64, 64]]], r"with coordinates in \[0, 1\]"),
    ("boxes", [[[1, 0, 0, float("nan"), 1]]], r"with coordinates in \[0, 1\]"),
    ("boxes", [[[1, 0.5, 0, 0.2, 1]]], "with x0 <= x1 and y0 <= y1"),
    ("boxes", [[[100, 0, 0, 1, 1]]], r"classes of boxes must be whole numbers in \[0, 100\)"),
    ("boxes", [[[1.5, 0, 0, 1, 1]]], "classes of boxes must be whole numbers"),
    ("segmentation", np.full((1, 16, 16), 7), r"classes of a segmentation must lie in \[0, 7\), or be 255 for none"),
    ("segmentation", np.zeros((1, 8, 8, 1), np.uint8), r"segmentation must be \[H, W\] for each image, not \[8, 8, 1\]"),
    ("segmentation", np.full((1, 16, 16), 300), "segmentation must be uint8 numbers, not int64 from 300 to 300"),
    ("low_res", np.zeros((1, 16, 16, 4), np.uint8), r"low_res must be \[h, w, 3\] for each image, not \[16, 16, 4\]"),
    ("low_res", np.full((1, 4, 4, 3), 0.5), "low_res must be uint8 numbers"),
    ("mask", np.zeros((1, 4, 4, 3)), r"mask must be \[h, w, 4\] for each image, not \[4, 4, 3\]"),
    ("mask", [np.zeros((4, 4, 4)), np.zeros((4, 4, 3))], "not arrays of different shapes"),
    ("neighbors", np.zeros((1, 5, 16)), "neighbors must be 1 to 4 embeddings for each image, as many for all, not 5$"),
    ("neighbors", np.zeros((1, 0, 16)), "neighbors must be 1 to 4 embeddings for each image, as many for all, not 0$"),
    ("neighbors", [np.zeros((2, 16)), np.zeros((3, 16))], "as many for all, not 2 and 3$"),
    ("neighbors", np.zeros((1, 3, 8)), r"neighbors must be \[3, 16\] for each image, not \[3, 8\]"),
    ("neighbors", [1.0], "neighbors must be 1 to 4 embeddings for each image, as many for all, not 0$"),
    ("neighbors", [[["a"] * 16] * 4], "neighbors must be float32 numbers, not <U1"),
]


@pytest.mark.parametrize(("name", "values", "message"), WRONG)
def test_wrong_values_are_one_clear_line(name: str, values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        only(name).prepare({name: values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("text", {"kind": "bert"}, "conditioning.text.kind 'bert' is not one of transformer, clip, t5"),
        ("text", {"kind": "t5", "vocab_size": 100}, "tokens, conditioning.text.vocab_size is 100"),
        ("label", {"to": "concat"}, "conditioning.label.to 'concat' is not one of crossattn, vector"),
        ("label", {"null_class": False}, "conditioning.label.drop_rate needs conditioning.label.null_class"),
        ("segmentation", {"stages": 3}, "conditioning.segmentation.stages 3 must halve the map to the latents' size, by 4"),
        ("segmentation", {"num_classes": 256}, r"num_classes must lie in \[1, 255\], not 256"),
        ("mask", {"style": "xl"}, "conditioning.mask.style 'xl' is not one of ldm, sd"),
    ],
)
def test_wrong_settings_are_one_clear_line(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        conditioning(name, **fields)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=30)
@given(label=st.integers(-(2**40), 2**40))
def test_any_label_is_taken_or_refused(label: int) -> None:
    c = only("label")
    if 0 <= label < 5:
        assert c.prepare({"label": [label]})["label"].tolist() == [label]
    else:
        with pytest.raises(UserError, match="labels must"):
            c.prepare({"label": [label]})


def test_an_embedding_for_each_box_tells_class_and_place() -> None:
    c = BoxesConditioner(BoxEmbedder(1024, 14, 32), 4, 0.1)
    params = jax.jit(c.init)(jax.random.key(0))
    one, two = [7, 0.1, 0.2, 0.4, 0.6], [3, 0.5, 0.5, 0.9, 0.8]

    def embedded(rows: list, **crop: Any) -> np.ndarray:
        return np.asarray(c.apply(params, c.prepare({"boxes": [rows], **crop}))["crossattn"])[0]

    both = embedded([one, two])
    assert both.shape == (5, 32)
    np.testing.assert_allclose(both[[1, 0, 2, 3, 4]], embedded([two, one]), atol=1e-6)
    np.testing.assert_allclose(both[[0, 2, 3, 4]], embedded([one])[[0, 1, 3, 4]], atol=1e-6)  # one box does not change another
    np.testing.assert_allclose(both[2], both[3], atol=1e-6)  # no boxes, whatever place their tokens would have
    for other in ([8, *one[1:]], [7, 0.3, 0.2, 0.6, 0.6], [7, 0.1, 0.2, 0.4, 0.9]):
        assert np.abs(embedded([other, two])[0] - both[0]).max() > 0.01
    moved = embedded([one, two], crop=[[0.0, 0.0, 0.5, 1.0]])
    np.testing.assert_allclose(moved[:4], both[:4], atol=1e-6)
    assert np.abs(moved[4] - both[4]).max() > 0.01 and np.abs(both[4] - both[3]).max() > 0.01
