"""A scene's own picture obeys every condition of it, another's as often as the two scenes agree, and a fault shows where it lies."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from ldm_jax.config import UserError
from ldm_jax.data import shapes
from ldm_jax.data.shapes import Object, Scene, ShapesSource, draw
from ldm_jax.evaluation import obedience, oracle
from ldm_jax.evaluation.obedience import box_iou, scores

RED, GREEN, BLUE = 0, 1, 2
CIRCLE, SQUARE = 0, 1
CONDITIONS = ("label", "boxes", "segmentation", "low_res", "mask", "text", "neighbors", "")


def example_of(scene: Scene, **more: Any) -> dict[str, Any]:
    image, segmentation = draw(scene, 64)
    label, boxes = scene.label(), shapes.boxes(scene)
    return {"image": image, "text": scene.caption(), "label": label, "boxes": boxes, "segmentation": segmentation, **more}


def one(color: int, shape: int, x: float = 32, y: float = 32, radius: float = 12, background: int = 0) -> Scene:
    return Scene(background, (Object(color, shape, x, y, radius),))


def score(condition: str, image: np.ndarray, example: dict[str, Any]) -> dict[str, float]:
    return {name: float(values[0]) for name, values in scores(condition, image[None], [example]).items()}


def degraded(images: np.ndarray) -> np.ndarray:
    """Blurred by .8 px, and with noise of 8 levels: worse than what a trained decoder makes."""
    blurred = ndimage.gaussian_filter(images.astype(float), (0, 0.8, 0.8, 0), mode="nearest")
    return np.clip(np.rint(blurred + np.random.default_rng(0).normal(0, 8, images.shape)), 0, 255).astype(np.uint8)


def complete(counts: tuple[int, ...], number: int) -> list[dict[str, Any]]:
    """Fresh examples with what every condition needs; the hole is a square of a quarter of the picture."""
    examples = obedience.fresh_examples(64, number, counts, "all")
    corners = np.random.default_rng(1).integers(0, 33, (number, 2))
    for example, (top, left) in zip(examples, corners, strict=True):
        hole = np.zeros((64, 64), np.uint8)
        hole[top : top + 32, left : left + 32] = 1
        example |= {"mask": hole, "query": example["image"], "low_res": example["image"][4::8, 4::8]}
    return examples


EXAMPLES = complete((1, 2, 3), 60)
IMAGES = np.stack([example["image"] for example in EXAMPLES])
MASKS = np.stack([example["mask"] for example in EXAMPLES])[..., None] == 1
# What a map loses at corners and rims, and the object of largest radius where the next is about as large.
LEAST = {"iou": 0.95, "object_pixels": 0.95, "pixels": 0.99, "background": 0.999, "color": 0.95, "shape": 0.95, "class": 0.95}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_scenes_own_picture_scores_one_even_degraded(condition: str) -> None:
    for images in (IMAGES, degraded(IMAGES)):
        pasted = np.where(MASKS, images, IMAGES) if condition == "mask" else images
        for name, values in scores(condition, pasted, EXAMPLES).items():
            assert values.shape == (60,) and values.dtype == np.float64
            mean = np.nanmean(values)
            if name == "psnr":
                assert mean == pytest.approx(10 * np.log10(12 * 255**2)) if images is IMAGES else 26 < mean < 32
            elif name == "change":
                assert mean == 0
            else:
                assert LEAST.get(name, 1) <= mean <= 1, name


def test_another_scenes_picture_scores_as_often_as_the_scenes_agree() -> None:
    source = ShapesSource(60, obedience.SEED, 64, (1, 2, 3), "all")
    own = [source.scene(i) for i in range(60)]
    turned = [own[i] for i in np.roll(np.arange(60), -30)]
    other = np.stack([example["image"] for example in obedience.shuffled(EXAMPLES)])
    np.testing.assert_array_equal(other[0], IMAGES[30])

    background = [a.background == b.background for a, b in zip(own, turned, strict=True)]
    colors = [({o.color for o in a.objects}, {o.color for o in b.objects}) for a, b in zip(own, turned, strict=True)]
    result = scores("neighbors", other, EXAMPLES)
    np.testing.assert_array_equal(result["background"], background)
    np.testing.assert_allclose(result["colors"], [len(a & b) / len(a | b) for a, b in colors])
    assert abs(result["nearer"].mean() - 0.5) < 4 / (12 * 60) ** 0.5

    np.testing.assert_array_equal(scores("boxes", other, EXAMPLES)["count"], [len(a) == len(b) for a, b in colors])
    specs = [(scene.background, sorted(scene.spec().objects)) for scene in own]
    agree = [a == b for a, b in zip(specs, specs[30:] + specs[:30], strict=True)]
    np.testing.assert_array_equal(scores("low_res", other, EXAMPLES)["all"], agree)
    masked = scores("mask", np.where(MASKS, other, IMAGES), EXAMPLES)
    assert np.nanmean(masked["object"]) < 0.3 and np.nanmean(masked["color"]) < 0.3 and masked["background"].mean() < 0.5


def test_another_class_scores_by_colour_and_shape() -> None:
    examples = obedience.fresh_examples(64, 80, (1,), "seen")
    labels = np.array([example["label"] for example in examples])
    other = np.array([example["label"] for example in obedience.shuffled(examples)])
    result = scores("label", np.stack([example["image"] for example in obedience.shuffled(examples)]), examples)
    np.testing.assert_array_equal(result["class"], labels == other)
    np.testing.assert_array_equal(result["color"], labels // 5 == other // 5)
    np.testing.assert_array_equal(result["shape"], labels % 5 == other % 5)
    assert result["class"].mean() < 0.15 and 0 < result["color"].mean() < 0.4 and 0 < result["shape"].mean() < 0.5


def test_the_class_is_that_of_the_largest_radius() -> None:
    """A ring of radius 12 covers less than a square of radius 11."""
    scene = Scene(0, (Object(RED, 3, 16, 16, 12), Object(BLUE, SQUARE, 46, 46, 11)))
    assert score("label", draw(scene, 64)[0], example_of(scene)) == {"class": 1, "color": 1, "shape": 1, "count": 1}
    assert score("label", np.full((64, 64, 3), 128, np.uint8), example_of(scene)) == {"class": 0, "color": 0, "shape": 0, "count": 0}


@pytest.mark.parametrize("shape", range(5))
@pytest.mark.parametrize("shift", [0, 4, 9, 15, 25])
def test_a_moved_object_has_the_overlap_of_the_boxes(shape: int, shift: int) -> None:
    asked, drawn = one(RED, shape, x=20), one(RED, shape, x=20 + shift)
    result = score("boxes", draw(drawn, 64)[0], example_of(asked))
    width = 12 * {1: 1.8, 2: 2.1}.get(shape, 2)
    common = max(width - shift, 0)
    assert result["iou"] == pytest.approx(common / (2 * width - common), abs=0.08 if shape == 4 else 0.06)
    assert result["count"] == 1 and result["class"] == result["color"] == result["shape"] == (shift < width / 2)


def test_what_is_read_in_a_box() -> None:
    asked = example_of(Scene(1, (Object(RED, CIRCLE, 16, 16, 11), Object(BLUE, SQUARE, 46, 46, 11))))

    def result(*objects: Object) -> dict[str, float]:
        return score("boxes", draw(Scene(1, objects), 64)[0], asked)

    first, second = Object(RED, CIRCLE, 16, 16, 11), Object(BLUE, SQUARE, 46, 46, 11)
    green = result(dataclasses.replace(first, color=GREEN), second)
    assert green["iou"] > 0.95 and green["color"] == green["class"] == 0.5 and green["shape"] == 1
    swapped = result(dataclasses.replace(first, color=BLUE), dataclasses.replace(second, color=RED))
    assert swapped["iou"] > 0.95 and swapped["color"] == swapped["class"] == 0 and swapped["shape"] == 1
    missing = result(second)
    assert missing["iou"] == pytest.approx(0.5, abs=0.03) and missing["class"] == 0.5 and missing["count"] == 0
    added = result(first, second, Object(GREEN, CIRCLE, 46, 14, 10))
    assert added["iou"] == pytest.approx(2 / 3, abs=0.03) and added["class"] == 1 and added["count"] == 0
    assert result() == {"iou": 0, "count": 0, "color": 0, "shape": 0, "class": 0}


corners = st.tuples(*[st.integers(0, 12)] * 4).map(lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])))


@settings(max_examples=60, deadline=None)
@given(st.lists(corners, min_size=1, max_size=3), st.lists(corners, max_size=3))
def test_overlaps_of_boxes_are_those_of_their_cells(first: list, second: list) -> None:
    def cells(box: tuple[int, int, int, int]) -> np.ndarray:
        grid = np.zeros((12, 12), bool)
        grid[box[1] : box[3], box[0] : box[2]] = True
        return grid

    expected = [[(cells(a) & cells(b)).sum() / max((cells(a) | cells(b)).sum(), 1) for b in second] for a in first]
    ours = box_iou(np.array(first, float), np.array(second, float).reshape(-1, 4))
    np.testing.assert_allclose(ours, np.array(expected).reshape(len(first), len(second)))


def test_maps_of_classes() -> None:
    example = example_of(one(RED, SQUARE))
    asked = example["segmentation"] != 0
    empty = score("segmentation", np.full((64, 64, 3), 128, np.uint8), example)
    assert empty == {"pixels": pytest.approx(1 - asked.mean()), "object_pixels": 0, "iou": 0}
    other = score("segmentation", draw(one(GREEN, SQUARE), 64)[0], example)
    assert other["pixels"] == pytest.approx(1 - asked.mean(), abs=0.01) and other["object_pixels"] == other["iou"] == 0

    added = draw(Scene(0, (Object(RED, SQUARE, 32, 32, 12), Object(BLUE, CIRCLE, 9, 9, 7))), 64)[0]
    result = score("segmentation", added, example)
    assert result["iou"] == pytest.approx(0.5, abs=0.02) and result["object_pixels"] > 0.97

    half = draw(one(RED, CIRCLE), 64)[0]
    half[:, 32:] = 128
    assert set(np.unique(obedience.segment(half))) == {0, obedience.UNKNOWN}


@pytest.mark.parametrize("resolution", [32, 48, 96, 128])
def test_maps_have_the_size_of_the_picture(resolution: int) -> None:
    image, expected = draw(one(BLUE, SQUARE, 20, 40, 14), resolution)
    ours = obedience.segment(image)
    assert ours.dtype == np.uint8 and ours.shape == expected.shape
    assert (ours == expected).mean() > 0.98 and set(np.unique(ours)) == set(np.unique(expected))


def test_signal_to_noise_and_bicubic() -> None:
    example = example_of(one(RED, SQUARE))
    image = example["image"].astype(int)
    brighter = np.where(image < 128, image + 10, image - 10).astype(np.uint8)
    assert score("low_res", brighter, example)["psnr"] == pytest.approx(20 * np.log10(25.5))

    gray = obedience.bicubic(np.full((8, 8, 3), (10, 128, 250), np.uint8), 64)
    assert gray.shape == (64, 64, 3) and gray.dtype == np.uint8 and (gray == (10, 128, 250)).all()
    np.testing.assert_array_equal(obedience.bicubic(image.astype(np.uint8), 64), image)
    small = [np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BOX)) for i in IMAGES[:30]]
    smooth = scores("low_res", np.stack([obedience.bicubic(i, 64) for i in small]), EXAMPLES[:30])
    blocks = scores("low_res", np.stack([i.repeat(4, 0).repeat(4, 1) for i in small]), EXAMPLES[:30])
    assert (smooth["psnr"] > blocks["psnr"]).all() and smooth["color"].mean() > 0.9
    assert list(smooth) == ["psnr", "background", "count", "color", "shape", "binding", "all"]


def test_what_a_hole_is_filled_with() -> None:
    hole = np.zeros((64, 64), bool)
    hole[:, 32:] = True
    example = example_of(one(RED, CIRCLE), mask=hole)
    image, other = example["image"], draw(one(BLUE, CIRCLE), 64)[0]
    filled = np.where(hole[..., None], other, image)
    blue = score("mask", filled, example)
    assert (blue["color"], blue["shape"], blue["object"], blue["background"], blue["change"]) == (0, 0, 0, 1, 0)
    error = ((other.astype(float) - image)[hole] ** 2).mean()
    assert blue["psnr"] == pytest.approx(10 * np.log10(255**2 / error))

    empty = score("mask", np.where(hole[..., None], np.uint8(128), image), example)
    assert (empty["color"], empty["object"], empty["background"]) == (0, 0, 1)
    pink = score("mask", np.where(hole[..., None], np.uint8(shapes.BACKGROUNDS["pink"]), image), example)
    assert pink["background"] == 0

    square = np.where(hole[..., None], draw(one(RED, SQUARE, radius=14), 64)[0], image)
    assert score("mask", square, example)["color"] > 0.95
    outside = image.copy()
    outside[0, 0, 2] += 7
    outside[0, 63] += 60
    result = score("mask", outside, example)
    assert result["change"] == 7 and result["object"] == 1 and 0.99 < result["background"] < 1


@pytest.mark.parametrize(("edge", "counted"), [(24, False), (28, True), (36, True), (40, False)])
def test_only_partly_hidden_objects_count(edge: int, counted: bool) -> None:
    """A square from x = 21.2 to 42.8 is hidden from `edge` on: by 87, 69, 31 and 13 %."""
    hole = np.zeros((64, 64), np.uint8)
    hole[:, edge:] = 1
    example = example_of(one(RED, SQUARE), mask=hole)
    result = score("mask", example["image"], example)
    assert np.isnan(result["object"]) != counted and np.isnan(result["color"]) != counted and np.isnan(result["shape"]) != counted
    assert result["background"] == 1


def test_an_empty_hole_has_no_scores_inside() -> None:
    example = example_of(one(RED, SQUARE), mask=np.zeros((64, 64), np.uint8))
    result = score("mask", example["image"], example)
    assert {name for name, value in result.items() if np.isnan(value)} == {"psnr", "background", "color", "shape", "object"}


def test_texts_count_by_their_pairs() -> None:
    examples = obedience.fresh_examples(64, 12, (1, 2), "seen") + obedience.fresh_examples(64, 12, (1, 2), "held_out")
    images = np.stack([example["image"] for example in examples])[::-1]
    result = scores("text", images, examples)
    assert list(result) == [f"{metric} {kind}" for kind in ("seen", "held-out") for metric in oracle.METRICS]
    for metric in oracle.METRICS:
        expected = [oracle.score(i, shapes.parse_caption(e["text"]))[metric] for i, e in zip(images, examples, strict=True)]
        values = np.array([np.nan if value is None else value for value in expected], float)
        np.testing.assert_array_equal(result[f"{metric} seen"], np.where(np.arange(24) < 12, values, np.nan))
        np.testing.assert_array_equal(result[f"{metric} held-out"], np.where(np.arange(24) < 12, np.nan, values))


def test_nearer_is_the_share_of_queries_farther_away() -> None:
    """Pictures of one gray each: how near they are is the difference of the grays."""
    grays = np.array([0, 40, 60, 200], np.uint8)
    queries = [{"query": np.full((64, 64, 3), gray, np.uint8)} for gray in grays]
    images = np.stack([np.full((64, 64, 3), gray, np.uint8) for gray in (10, 59, 20, 0)])
    np.testing.assert_allclose(scores("neighbors", images, queries)["nearer"], [1, 2 / 3, 1 / 3, 0])
    tied = scores("neighbors", images[[2, 2]], [queries[0], queries[1]])["nearer"]
    np.testing.assert_allclose(tied, [0.5, 0.5])
    assert np.isnan(scores("neighbors", images[:1], queries[:1])["nearer"]).all()


def test_embeddings_average_parts_of_any_size() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 3), dtype=np.uint8)
    expected = image.reshape(1, 8, 6, 8, 6, 3).mean((2, 4)).reshape(1, -1)
    np.testing.assert_allclose(obedience._embedding(image), expected)
    np.testing.assert_allclose(obedience._embedding(np.full((1, 50, 50, 3), 7, np.uint8)), np.full((1, 192), 7))


def test_valid_scenes() -> None:
    def result(image: np.ndarray) -> dict[str, float]:
        return score("", image, {})

    clean = draw(one(RED, CIRCLE), 64)[0]
    assert result(clean) == {"background": 1, "count": 1, "shapes": 1, "valid": 1}
    empty = np.full((64, 64, 3), 128, np.uint8)
    assert result(empty) == {"background": 1, "count": 0, "shapes": 1, "valid": 0}
    corners = ((12, 12), (12, 50), (50, 12), (50, 50))
    many = Scene(0, tuple(Object(color, CIRCLE, x, y, 9) for color, (x, y) in enumerate(corners)))
    assert result(draw(many, 64)[0]) == {"background": 1, "count": 0, "shapes": 1, "valid": 0}
    half = clean.copy()
    half[:, 32:] = 128
    assert result(half) == {"background": 1, "count": 1, "shapes": 0, "valid": 0}
    two = clean.copy()
    two[:10] = (180, 128, 128)
    assert result(two) == {"background": 0, "count": 1, "shapes": 1, "valid": 0}
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert result(noise)["valid"] == 0


def test_spread_is_that_of_the_drawn_scenes() -> None:
    whole = obedience.total_variation(IMAGES, (1, 2, 3), "all")
    assert set(whole) == {"background", "color", "shape", "count"} and max(whole.values()) < 0.2
    gray = [image for image, example in zip(IMAGES, EXAMPLES, strict=True) if example["text"].endswith("gray background")]
    narrow = obedience.total_variation(np.stack(gray), (1, 2, 3), "all")
    assert narrow["background"] == pytest.approx(2 / 3, abs=0.02)
    same = obedience.total_variation(np.stack([draw(one(RED, SQUARE), 64)[0]] * 3), (1,), "seen")
    assert same["color"] == pytest.approx(1 - 4 / 35, abs=0.02) and same["shape"] == pytest.approx(4 / 5, abs=0.02)
    assert same["count"] == 0
    assert obedience.total_variation(np.full((2, 64, 64, 3), 128, np.uint8), (1,), "seen")["count"] == 1


def test_fresh_examples_are_those_of_their_seed() -> None:
    again = obedience.fresh_examples(64, 5, (2,), "held_out", seed=7)
    source = ShapesSource(5, 7, 64, (2,), "held_out")
    for i, example in enumerate(again):
        np.testing.assert_array_equal(example["image"], source[i]["image"])
        assert example["text"] == source.caption(i)
    assert obedience.fresh_examples(64, 1, (2,), "held_out")[0]["text"] != again[0]["text"]
    with pytest.raises(UserError, match="counts must be"):
        obedience.fresh_examples(64, 5, (4,), "seen")


@pytest.mark.parametrize("number", [2, 3, 8, 9])
def test_no_example_keeps_its_place(number: int) -> None:
    examples = [{"label": i} for i in range(number)]
    turned = [example["label"] for example in obedience.shuffled(examples)]
    assert sorted(turned) == list(range(number)) and all(i != label for i, label in enumerate(turned))
    assert turned == [(i + number // 2) % number for i in range(number)]


def test_what_cannot_be_scored_is_refused() -> None:
    example = example_of(one(RED, CIRCLE))
    with pytest.raises(ValueError, match="no scores for condition 'depth'"):
        scores("depth", IMAGES[:1], [example])
    with pytest.raises(ValueError, match="2 images for 1 examples"):
        scores("label", IMAGES[:2], [example])
    with pytest.raises(ValueError, match="0 images for 0 examples"):
        scores("", IMAGES[:0], [])
    with pytest.raises(ValueError, match="'mask' is scored on examples with 'mask'"):
        scores("mask", IMAGES[:1], [example])
    with pytest.raises(ValueError, match="the oracle reads uint8"):
        scores("label", IMAGES[:1].astype(float), [example])
    with pytest.raises(ValueError, match="1 examples cannot change places"):
        obedience.shuffled([example])
