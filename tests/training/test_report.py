"""The tables of the end, on models whose answer is known: one that obeys, one that does not listen."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from ldm_jax.config import WorkDir
from ldm_jax.data.derive import Derive, Derived
from ldm_jax.data.shapes import ShapesSource
from ldm_jax.evaluation.obedience import SEED
from ldm_jax.training.report import obedience, report
from tests import tiny

NUMBER = 24
SCENES = ShapesSource(NUMBER, SEED, 32, (1,), "seen")  # what a report of `config` draws
HELD_OUT = ShapesSource(NUMBER, SEED, 32, (1,), "held_out")


def config(**data: Any) -> ConfigDict:
    cfg = tiny.config()
    cfg.data.update(resolution=32, counts=(1,), **data)
    cfg.evaluate.update(prompts=NUMBER, held_out=8)
    return cfg


def key(value: Any) -> Any:
    return value.tobytes() if isinstance(value, np.ndarray) else value


class Painter:
    """Draws the scene that has what it is told in `listens`; an autoencoder that loses nothing."""

    def __init__(self, inputs: tuple[str, ...], listens: str) -> None:
        self.inputs, self._listens, self.calls = inputs, listens, []
        self.info: dict[str, Any] = {"sample": {}}
        scenes = [source[i] for source in (SCENES, HELD_OUT) for i in range(NUMBER)]
        self._scenes = {key(scene.get(listens)): scene["image"] for scene in scenes}

    def sample(self, num: int, seed: int, **inputs: list[Any]) -> np.ndarray:
        self.calls.append(inputs)
        told = inputs.get(self._listens, [None] * num)
        return np.stack([self._scenes[key(value)] for value in told])

    def encode(self, images: np.ndarray) -> np.ndarray:
        return images / 127.5 - 1

    decode = staticmethod(lambda latents: latents)


def row(table: dict, metric: str) -> Any:
    return SimpleNamespace(**table["conditions of other scenes"][metric])


@pytest.mark.parametrize(
    ("condition", "metric"), [("label", "class"), ("text", "all seen"), ("boxes", "class"), ("segmentation", "pixels")]
)
def test_a_model_that_obeys_closes_the_gap(condition: str, metric: str) -> None:
    table = obedience(config(), Painter((condition,), condition), SCENES, condition)  # type: ignore[arg-type]
    found = row(table, metric)
    assert found.conditioned == found.ceiling > 0.95 and found.closed == 1.0
    assert found.control < 0.9 and found.n == NUMBER
    if condition == "text":
        assert row(table, "all held-out").n == 8


def test_a_model_that_does_not_listen_closes_nothing() -> None:
    class Deaf(Painter):
        def sample(self, num: int, seed: int, **inputs: list[Any]) -> np.ndarray:
            return np.stack([SCENES[seed]["image"]] * num)

    found = row(obedience(config(), Deaf(("label",), "label"), SCENES, "label"), "class")  # type: ignore[arg-type]
    assert found.conditioned == found.control < 0.3 and found.closed == 0 and found.z == 0


def test_a_hole_stays_where_it_is_and_other_pictures_surround_it_in_the_control() -> None:
    model = Painter(("mask", "image"), "image")
    source = Derived(SCENES, Derive(32, holes="wide"))
    table = obedience(config(), model, source, "mask")  # type: ignore[arg-type]
    own, other = model.calls
    np.testing.assert_array_equal(own["mask"], other["mask"])
    assert all((a != b).any() for a, b in zip(own["image"], other["image"], strict=True))
    change = row(table, "change")
    assert change.conditioned == change.control == change.ceiling == 0
    assert row(table, "psnr").closed == 1 and row(table, "psnr").control < 30


def test_small_pictures_are_held_against_interpolation_too() -> None:
    model = Painter(("low_res",), "low_res")
    source = Derived(SCENES, Derive(32, degradation="bicubic", factor=8))
    model._scenes = {key(source.derive(SCENES[i], 0, i)["low_res"]): SCENES[i]["image"] for i in range(NUMBER)}
    tables = obedience(config(), model, source, "low_res")  # type: ignore[arg-type]
    assert set(tables) == {"conditions of other scenes", "bicubic interpolation"}
    assert tables["bicubic interpolation"]["psnr"]["control"] < 30 < tables["bicubic interpolation"]["psnr"]["conditioned"]


def test_several_conditions_have_a_table_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(config(), WorkDir(tmp_path), Painter(("text", "label"), "text"), SCENES)  # type: ignore[arg-type]
    tables = json.loads((tmp_path / "obedience.json").read_text())
    assert set(tables) == {"text", "label"} and not (tmp_path / "oracle.json").exists()
    assert row(tables["label"], "class").closed == 1
    assert "label, against conditions of other scenes" in capsys.readouterr().out
