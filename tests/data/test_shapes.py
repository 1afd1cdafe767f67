"""The scenes against an independent dense renderer, and the promises that captions, layouts and sources make."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.config import UserError
from ldm_jax.data import shapes
from ldm_jax.data.shapes import COLORS, SHAPES, Object, Scene, ShapesSource, Spec

indices = st.integers(0, 2**40)
counts = st.sampled_from([(1,), (2,), (3,)])


def _dense(scene: Scene, resolution: int, factor: int = 16) -> np.ndarray:
    """The definition of each shape, on a full canvas of factor x factor samples a pixel; float [r, r, 3]."""
    at = (np.arange(resolution * factor) + 0.5) / factor * 64 / resolution
    X, Y = np.meshgrid(at, at)
    canvas = np.empty((*X.shape, 3))
    canvas[:] = list(shapes.BACKGROUNDS.values())[scene.background]
    for item in scene.objects:
        x, y, r = X - item.x, Y - item.y, item.radius
        mask = {
            "circle": np.hypot(x, y) <= r,
            "square": np.maximum(abs(x), abs(y)) <= 0.9 * r,
            "triangle": (y >= -r) & (y <= 0.8 * r) & (abs(x) <= 1.05 * r * (y / r + 1) / 1.8),
            "ring": (np.hypot(x, y) <= r) & ((x / r) ** 2 + (y / r) ** 2 >= 0.3),
            "cross": (np.minimum(abs(x), abs(y)) <= 0.33 * r) & (np.maximum(abs(x), abs(y)) <= r),
        }[SHAPES[item.shape]]
        canvas[mask] = list(COLORS.values())[item.color]
    return canvas.reshape(resolution, factor, resolution, factor, 3).mean((1, 3))


@pytest.mark.parametrize("resolution", [32, 64, 100])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_pictures_are_those_of_the_definition(shape: int, resolution: int) -> None:
    scene = Scene(1, (Object(2, shape, 20.3, 41.9, 11.7), Object(7, shape, 47.2, 14.6, 9.1)))
    picture, dense = shapes.draw(scene, resolution)[0], _dense(scene, resolution)
    error = np.abs(picture - dense).max(-1)
    # 4 x 4 samples may miss a whole column of samples of a pixel's rim: 1/4 of the contrast of 230, and no more.
    assert error.max() <= 0.27 * 230
    assert error.mean() < 1.2
    assert abs(picture.astype(float).mean() - dense.mean()) < 0.5


def test_colours_far_from_rims_are_exact() -> None:
    for color, rgb in enumerate(COLORS.values()):
        for background, back in enumerate(shapes.BACKGROUNDS.values()):
            picture = shapes.draw(Scene(background, (Object(color, 1, 32, 32, 10),)), 64)[0]
            assert tuple(picture[32, 32]) == rgb and tuple(picture[2, 2]) == back


@settings(max_examples=150, deadline=None)
@given(index=indices, count=counts)
def test_objects_are_inside_apart_and_of_different_colours(index: int, count: tuple[int, ...]) -> None:
    scene = shapes.sample_scene(3, index, count)
    assert len(scene.objects) == count[0]
    assert len({o.color for o in scene.objects}) == count[0]
    for o in scene.objects:
        assert 9 <= o.radius <= (20 if count == (1,) else 13)
    box = shapes.boxes(scene)
    assert box.dtype == np.float32 and box.shape == (count[0], 5)
    assert (box[:, 1:] > 0).all() and (box[:, 1:] < 1).all()
    for i, a in enumerate(scene.objects):
        for b in scene.objects[:i]:
            assert np.hypot(a.x - b.x, a.y - b.y) >= (a.radius + b.radius) * 1.3 + 1
    drawn = [shapes.draw(Scene(0, (o,)), 64)[1] > 0 for o in scene.objects]
    assert np.sum(drawn, axis=0).max() == 1, "two objects overlap"
    assert Counter(np.unique(shapes.draw(scene, 64)[1]).tolist()) == Counter([0, *(1 + o.label for o in scene.objects)])


@settings(max_examples=150, deadline=None)
@given(index=indices)
def test_relations_are_clear_and_true(index: int) -> None:
    scene = shapes.sample_scene(0, index, (2,))
    first, second = scene.objects
    dx, dy = second.x - first.x, second.y - first.y
    assert abs(abs(dx) - abs(dy)) >= 8
    truth = ("left of" if dx > 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy > 0 else "below")
    assert f" {truth} " in scene.caption()
    assert scene.spec().relation == shapes.RELATIONS.index(truth)


@settings(max_examples=200, deadline=None)
@given(index=indices, pairs=st.sampled_from(["seen", "held_out", "all"]))
def test_captions_are_read_back(index: int, pairs: shapes.Pairs) -> None:
    scene = shapes.sample_scene(5, index, pairs=pairs)
    assert shapes.parse_caption(scene.caption()) == scene.spec()
    assert shapes.parse_caption(f"  {scene.caption().upper()}. ") == scene.spec()


def test_captions_are_english() -> None:
    assert Spec(0, ((0, 0),)).caption() == "a red circle on a gray background"
    assert Spec(1, ((0, 0), (2, 1)), 0).caption() == "a red circle left of a blue square on a pink background"
    three = Spec(2, ((5, 0), (2, 1), (1, 3))).caption()
    assert three == "an orange circle, a blue square and a green ring on a cyan background"
    listed = shapes.parse_caption("a red circle and an orange cross on a gray background")
    assert listed == Spec(0, ((0, 0), (5, 4)), None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red circle on a green background",
        "a crimson circle on a gray background",
        "a red blob on a gray background",
        "red circle on a gray background",
        "a red circle above a blue square and a green ring on a gray background",
        "a red circle above a blue square below a green ring on a gray background",
        "a red circle left of on a gray background",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        shapes.parse_caption(text)


def test_held_out_pairs_are_the_five_and_never_seen() -> None:
    pairs = {(c, s) for c in range(8) for s in range(5) if shapes.held_out(c, s)}
    assert pairs == {(3, 0), (2, 1), (1, 2), (0, 3), (7, 4)}
    for index in range(2000):
        assert not shapes.sample_scene(1, index).spec().held_out
    drawn = Counter()
    for index in range(500):
        scene = shapes.sample_scene(1, index, pairs="held_out")
        assert scene.spec().held_out
        if len(scene.objects) == 1:
            drawn[scene.spec().objects[0]] += 1
    assert set(drawn) == pairs


def test_the_distribution_is_uniform_over_what_is_allowed() -> None:
    n = 4000
    scenes = [shapes.sample_scene(11, i, (1, 1, 2), "all") for i in range(n)]
    single = [s for s in scenes if len(s.objects) == 1]
    assert abs(len(single) / n - 2 / 3) < 4 * (2 / 9 / n) ** 0.5
    labels = np.bincount([s.label() for s in single], minlength=40)
    expected = len(single) / 40
    assert ((labels - expected) ** 2 / expected).sum() < 80  # chi-squared of 39 degrees: 80 is p = 1e-4
    backgrounds = np.bincount([s.background for s in scenes], minlength=3)
    assert np.abs(backgrounds / n - 1 / 3).max() < 0.03
    radii = [s.objects[0].radius for s in single]
    assert abs(np.mean(radii) - 14.5) < 0.3


def test_the_scene_is_pure_and_does_not_depend_on_resolution() -> None:
    small, again, large = (ShapesSource(50, 4, resolution) for resolution in (64, 64, 128))
    order = np.random.default_rng(0).permutation(50)
    seen = {int(i): small[int(i)] for i in order}
    for i in range(50):
        other, big = again[i], large[i]
        for key in ("image", "segmentation", "boxes"):
            assert seen[i][key].tobytes() == other[key].tobytes()
        assert big["text"] == other["text"] and big["label"] == other["label"]
        np.testing.assert_array_equal(big["boxes"], other["boxes"])
        halved = big["image"].reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(halved - other["image"]).mean() < 1.5
    assert small.scene(3) != ShapesSource(50, 5).scene(3)


def test_examples_follow_the_source_protocol() -> None:
    source = ShapesSource(20, 2, 48)
    assert len(source) == 20
    for i in range(20):
        example, scene = source[np.int64(i)], source.scene(i)
        assert set(example) == {"image", "text", "label", "boxes", "segmentation"}
        assert example["image"].dtype == np.uint8 and example["image"].shape == (48, 48, 3)
        assert example["segmentation"].dtype == np.uint8 and example["segmentation"].shape == (48, 48)
        assert example["text"] == source.caption(i) == scene.caption()
        largest = max(scene.objects, key=lambda o: o.radius)
        assert example["label"] == largest.color * 5 + largest.shape and isinstance(example["label"], int)
        for label, *corners in example["boxes"]:
            rows, columns = np.nonzero(example["segmentation"] == 1 + label)
            tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            np.testing.assert_allclose(np.array(corners) * 48, tight, atol=1.5)
    for index in (-1, 20):
        with pytest.raises(IndexError):
            source[index]


def test_the_fingerprint_names_every_setting() -> None:
    base = ShapesSource(10)
    others = [
        dataclasses.replace(base, **change)
        for change in ({"size": 11}, {"seed": 1}, {"resolution": 32}, {"counts": (1,)}, {"pairs": "all"})
    ]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 6
    assert base.fingerprint() == ShapesSource(10, counts=[1, 2, 3]).fingerprint()


@pytest.mark.parametrize("change", [{"size": 0}, {"seed": -1}, {"resolution": 0}, {"counts": ()}, {"counts": (4,)}, {"pairs": "some"}])
def test_bad_settings_are_one_clear_line(change: dict) -> None:
    with pytest.raises(UserError, match=r"^shapes: .* got .*$"):
        ShapesSource(**{"size": 5, **change})
