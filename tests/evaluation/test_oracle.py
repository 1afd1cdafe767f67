"""The oracle reads what was drawn, through blur and noise, and says no to everything else."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from ldm_jax.data import shapes
from ldm_jax.data.shapes import Object, Scene, Spec, draw, sample_scene
from ldm_jax.evaluation import oracle

LEFT, RIGHT, ABOVE, BELOW = range(4)


def _degrade(image: np.ndarray, sigma: float, noise: float, seed: int) -> np.ndarray:
    blurred = ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0), mode="nearest") if sigma else image
    noisy = blurred + np.random.default_rng(seed).normal(0, noise, image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("resolution", "scenes"), [(64, 150), (128, 60), (96, 60)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_clean_scene_is_right(count: int, resolution: int, scenes: int) -> None:
    for index in range(scenes):
        scene = sample_scene(21, index, (count,), "all")
        result = oracle.score(draw(scene, resolution)[0], scene.spec())
        assert result["relation"] is (True if count == 2 else None), scene
        assert all(value is not False for value in result.values()), scene


@pytest.mark.parametrize(("sigma", "noise", "least"), [(1, 10, 0.99), (1.5, 15, 0.98)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_blurred_and_noisy_scenes_are_right(count: int, sigma: float, noise: float, least: float) -> None:
    scenes = [sample_scene(22, index, (count,), "all") for index in range(120)]
    right = [
        oracle.score(_degrade(draw(scene, 64)[0], sigma, noise, i), scene.spec())["all_with_relation"] for i, scene in enumerate(scenes)
    ]
    assert np.mean(right) >= least


def test_readings_give_place_and_area() -> None:
    areas = {0: np.pi, 1: 3.24, 2: 1.89, 3: 0.7 * np.pi, 4: 2.2044}
    for resolution in (64, 128):
        for index in range(40):
            scene = sample_scene(23, index, (2,), "all")
            reading = oracle.read_scene(draw(scene, resolution)[0])
            for item in scene.objects:
                found = next(o for o in reading.objects if o.color == item.color)
                assert np.hypot(found.x - item.x, found.y - item.y) < 0.75
                assert found.area == pytest.approx(areas[item.shape] * item.radius**2, rel=0.1)


def _changed(scene: Scene, **change: int) -> Scene:
    return dataclasses.replace(scene, objects=(dataclasses.replace(scene.objects[0], **change), *scene.objects[1:]))


def _mirrored(scene: Scene) -> Scene:
    flipped = tuple(dataclasses.replace(o, x=64 - o.x, y=64 - o.y) for o in scene.objects)
    return dataclasses.replace(scene, objects=flipped)


def _swapped_shapes(scene: Scene) -> Scene:
    a, b, *rest = scene.objects
    swapped = (dataclasses.replace(a, shape=b.shape), dataclasses.replace(b, shape=a.shape), *rest)
    return dataclasses.replace(scene, objects=swapped)


WRONG: dict[str, tuple[Callable[[Scene], Scene], set[str]]] = {
    "another colour": (
        lambda s: _changed(s, color=next(c for c in range(8) if c not in {o.color for o in s.objects})),
        {"color", "binding", "relation", "all", "all_with_relation"},
    ),
    "another shape": (
        lambda s: _changed(s, shape=(s.objects[0].shape + 1) % 5),
        {"shape", "binding", "relation", "all", "all_with_relation"},
    ),
    "an object missing": (
        lambda s: dataclasses.replace(s, objects=s.objects[1:]),
        {"count", "color", "shape", "binding", "relation", "all", "all_with_relation"},
    ),
    "shapes swapped": (_swapped_shapes, {"binding", "relation", "all", "all_with_relation"}),
    "turned by half a turn": (_mirrored, {"relation", "all_with_relation"}),
    "another background": (
        lambda s: dataclasses.replace(s, background=(s.background + 1) % 3),
        {"background", "all", "all_with_relation"},
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_scene_fails_in_just_what_is_wrong(fault: str) -> None:
    change, expected = WRONG[fault]
    tried = 0
    for index in range(40):
        scene = sample_scene(24, index, (2,))
        if scene.objects[0].shape == scene.objects[1].shape:
            continue
        tried += 1
        result = oracle.score(_degrade(draw(change(scene), 64)[0], 0.7, 5, index), scene.spec())
        assert {name for name, value in result.items() if value is False} == expected, (scene, result)
    assert tried > 20


def test_faults_of_generated_pictures_are_no_objects_as_asked() -> None:
    spec = Spec(0, ((0, 0),))
    disc = draw(Scene(0, (Object(0, 0, 32, 32, 14),)), 64)[0]
    assert oracle.score(disc, spec)["all"]

    two_colors = disc.copy()
    blue = draw(Scene(0, (Object(2, 0, 32, 32, 14),)), 64)[0]
    two_colors[:, 32:] = blue[:, 32:]
    result = oracle.score(two_colors, spec)
    assert not result["count"] and not result["color"]

    half = disc.copy()
    half[:, 32:] = 128
    assert oracle.read_scene(half).objects[0].shape == -1
    assert not oracle.score(half, spec)["shape"] and oracle.score(half, spec)["color"]

    smeared = disc.copy()
    for shift in range(-16, 17):
        moved = np.roll(disc, shift, axis=1)
        smeared[moved[..., 1] < 80] = shapes.COLORS["red"]
    assert oracle.read_scene(smeared).objects[0].shape == -1 and not oracle.score(smeared, spec)["shape"]

    specks = disc.copy()
    specks[4:8, 4:9] = shapes.COLORS["blue"]
    assert oracle.score(specks, spec)["all"], "a speck of 20 px is no object"
    specks[4:10, 4:12] = shapes.COLORS["blue"]
    assert not oracle.score(specks, spec)["count"], "a patch of 48 px is one"

    empty = np.full((64, 64, 3), 128, np.uint8)
    assert oracle.read_scene(empty) == oracle.Reading(0, ())
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not oracle.score(noise, spec)["all"]


@pytest.mark.parametrize("background", range(3))
def test_rims_are_no_objects_for_any_two_colours(background: int) -> None:
    for color in range(8):
        for other in range(8):
            if color != other:
                scene = Scene(background, (Object(color, 3, 16, 30, 13), Object(other, 4, 48, 30, 13)))
                reading = oracle.read_scene(_degrade(draw(scene, 64)[0], 2.0, 0, 0))
                assert {o.color for o in reading.objects} == {color, other} and len(reading.objects) == 2


def test_two_equal_objects_stand_in_either_order() -> None:
    scene = Scene(0, (Object(0, 0, 16, 32, 10), Object(0, 0, 48, 32, 10)))
    pairs = ((0, 0), (0, 0))
    truth = [oracle.score(draw(scene, 64)[0], Spec(0, pairs, relation))["relation"] for relation in range(4)]
    assert truth == [True, True, False, False]
    assert oracle.score(draw(scene, 64)[0], Spec(0, pairs))["relation"] is None


@pytest.mark.parametrize(
    "image",
    [np.zeros((64, 64, 3)), *(np.zeros(shape, np.uint8) for shape in ((64, 32, 3), (64, 64), (8, 8, 3)))],
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="the oracle reads uint8"):
        oracle.read_scene(image)


def test_the_table_counts_by_objects_and_pairs() -> None:
    scenes = [sample_scene(25, i, (1, 2), pairs) for pairs in ("seen", "held_out") for i in range(30)]
    captions = [scene.caption() for scene in scenes]
    images = np.stack([draw(scene, 64)[0] for scene in scenes])
    wrong = [i for i, s in enumerate(scenes) if len(s.objects) == 1 and not s.spec().held_out][:3]
    images[wrong] = 128
    table = oracle.score_table(images, captions)
    assert list(table) == ["1 seen", "1 held-out", "1 all", "2 seen", "2 held-out", "2 all"]
    n, others = table["1 seen"]["n"], table["1 held-out"]["n"]
    assert table["1 all"]["n"] == n + others == sum(len(s.objects) == 1 for s in scenes)
    assert table["1 seen"]["all"] == pytest.approx(1 - 3 / n)
    assert table["1 seen"]["all_se"] == pytest.approx(np.sqrt((1 - 3 / n) * 3 / n / n))
    assert table["1 held-out"]["all"] == table["2 all"]["all_with_relation"] == 1
    assert "relation" not in table["1 seen"] and table["2 seen"]["relation"] == 1

    lines = oracle.format_table(table).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 1 + 6 + 2
    assert lines[1].startswith("1 seen") and lines[4].startswith("1 chance")
    with pytest.raises(ValueError, match="60 images for 59 captions"):
        oracle.score_table(images, captions[1:])


def test_chance_is_that_of_the_counting_argument() -> None:
    """35 seen pairs, of which five colours have 4 shapes and three have 5."""
    one = oracle.chance(1)
    assert one["color"] == pytest.approx(5 * (4 / 35) ** 2 + 3 * (5 / 35) ** 2, rel=0.05)
    assert one["shape"] == pytest.approx(1 / 5, rel=0.05)
    assert one["binding"] == pytest.approx(1 / 35, rel=0.05)
    assert one["all"] == pytest.approx(1 / 105, rel=0.1)
    assert one["count"] == 1 and one["background"] == pytest.approx(1 / 3, rel=0.05) and "relation" not in one
    two = oracle.chance(2)
    sets = sum(
        not shapes.held_out(a, s) and not shapes.held_out(b, t)
        for a in range(8) for b in range(a) for s in range(5) for t in range(5)
    )  # fmt: skip
    assert two["binding"] == pytest.approx(1 / sets, rel=0.1)
    assert two["relation"] == pytest.approx(1 / sets / 4, rel=0.15)
    assert two["all_with_relation"] == pytest.approx(1 / sets / 12, rel=0.25)
