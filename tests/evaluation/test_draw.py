"""Samples of a model for its evaluation: the same whatever kills the job, and what the report says of how they were drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.evaluation.draw import classes_of, draw, settings
from ldm_jax.evaluation.pictures import open_pictures
from ldm_jax.evaluation.told import balanced, prompts
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.stages import FirstStage, build_autoencoder, init_autoencoder
from ldm_jax.training.diffusion import DiffusionStage, model_info
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


def untrained(**changes: Any) -> LatentDiffusion:
    cfg = tiny.config()
    cfg.sample.update(guidance=2.0, batch_size=8, seed=4)
    for name, change in changes.items():
        cfg[name].update(change)
    first = FirstStage(build_autoencoder(cfg.first_stage.to_dict(), np.float32))
    shapes = jax.eval_shape(lambda key: init_autoencoder(first.network, key, cfg.data.resolution), jax.random.key(0))
    stage = DiffusionStage(cfg, first, tiny.random_like(shapes), tiny.Moments(), tiny.tokenizer(cfg))
    shapes = jax.eval_shape(lambda key: stage.denoiser.init(key, stage.latent_shape), jax.random.key(0))
    return stage.model(tiny.random_like(shapes), model_info(cfg, 7))


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return untrained(conditioning={"text": {"enabled": False}, "label": {"enabled": True, "num_classes": 3, "width": 16}})


@pytest.fixture(scope="module")
def of_text() -> LatentDiffusion:
    return untrained()


class Killed(Exception):
    pass


def counted(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, kill_after: int = 1000) -> list[tuple[int, int]]:
    """The (first, num) that the model is asked for from now on, until it is killed."""
    asked: list[tuple[int, int]] = []
    sample: Callable[..., np.ndarray] = LatentDiffusion.sample

    def counting(**options: Any) -> np.ndarray:
        if len(asked) == kill_after:
            raise Killed
        asked.append((options["first"], options["num"]))
        return sample(model, **options)

    monkeypatch.setattr(model, "sample", counting)
    return asked


def near(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def test_samples_are_the_models_and_survive_kills(model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [i % 3 for i in range(21)]
    whole = model.sample(num=21, label=labels)
    draw(model, balanced(3), 21, {}, tmp_path / "whole", "x")
    undisturbed = open_pictures(tmp_path / "whole")
    assert undisturbed.labels is not None and undisturbed.labels.tolist() == labels
    assert near(undisturbed.read(0, 21), whole) and whole.std() > 10

    for _ in range(2):
        with monkeypatch.context() as patch:
            asked = counted(model, patch, kill_after=1)
            with pytest.raises(Killed):
                draw(model, balanced(3), 21, {}, tmp_path / "killed", "x")
        assert len(asked) == 1
    (tmp_path / "killed" / ".00000016-00000021.tmp.npz").write_bytes(b"half a file")
    with monkeypatch.context() as patch:
        asked = counted(model, patch)
        draw(model, balanced(3), 21, {}, tmp_path / "killed", "x")
        assert asked == [(16, 5)]  # nothing that is there is drawn again
        draw(model, balanced(3), 21, {}, tmp_path / "killed", "x")
        assert asked == [(16, 5)]
    again = open_pictures(tmp_path / "killed")
    np.testing.assert_array_equal(again.read(0, 21), undisturbed.read(0, 21))
    np.testing.assert_array_equal(again.labels, undisturbed.labels)


def test_samples_do_not_depend_on_the_parts(model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counted(model, monkeypatch)
    draw(model, balanced(3), 20, {"batch_size": 16}, tmp_path / "a", "x")
    assert asked == [(0, 16), (16, 4)]
    draw(model, balanced(3), 20, {}, tmp_path / "b", "x")
    draw(model, balanced(3), 9, {}, tmp_path / "c", "x")
    a, b, c = (open_pictures(tmp_path / name) for name in "abc")
    assert near(a.read(0, 20), b.read(0, 20)) and near(a.read(0, 9), c.read(0, 9))


def test_options_and_prompts_reach_the_model(of_text: LatentDiffusion, tmp_path: Path) -> None:
    options: dict[str, Any] = {"seed": 9, "steps": 3, "guidance": 1.0}
    draw(of_text, prompts(tiny.CAPTIONS), 6, options, tmp_path, "x")
    drawn = open_pictures(tmp_path)
    assert drawn.labels is None
    told = [tiny.CAPTIONS[i % len(tiny.CAPTIONS)] for i in range(6)]
    assert near(drawn.read(0, 6), of_text.sample(prompts=told, **options))
    assert not near(drawn.read(0, 6), of_text.sample(prompts=told, **options | {"seed": 10}))


def test_a_directory_of_other_samples_is_refused(model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counted(model, monkeypatch)
    draw(model, balanced(3), 8, {}, tmp_path, "classes")
    other = LatentDiffusion(model.first_stage, model.denoiser, jax.tree.map(lambda x: x + 1, jax.device_get(model.params)), model.info)
    retold = LatentDiffusion(model.first_stage, model.denoiser, jax.device_get(model.params), {**model.info, "sample": {"batch_size": 8}})
    cases: dict[str, tuple[Any, ...]] = {
        "model": (other, 8, {}, "classes"),
        "defaults": (retold, 8, {}, "classes"),
        "number": (model, 9, {}, "classes"),
        "options": (model, 8, {"guidance": 1.5}, "classes"),
        "told": (model, 8, {}, "other classes"),
        "options, part": (model, 8, {"batch_size": 4}, "classes"),
    }
    for what, (one, number, options, about) in cases.items():
        with pytest.raises(UserError, match=rf"holds the work of another job \({what} differ\)"):
            draw(one, balanced(3), number, options, tmp_path, about)
    assert asked == [(0, 8)]


def test_settings_are_the_models_own_and_what_is_asked_for(model: LatentDiffusion) -> None:
    own = settings(model, {})
    assert own["network evaluations a sample"] == 2 * own["steps"] == 4
    assert own | {"sampler": "ddim"} == own and (own["guidance"], own["guidance kind"], own["guidance interval"]) == (2.0, "cfg", None)
    assert (own["seed"], own["updates of training"], own["prediction"]) == (4, 7, model.denoiser and model.denoiser.prediction)
    changed = settings(model, {"steps": 6, "sampler": "dpmpp_2m", "guidance": 3.0, "guidance_rescale": 0.5, "seed": 0})
    assert changed["network evaluations a sample"] == 12 and changed["guidance rescale"] == 0.5 and changed["seed"] == 0
    plain = settings(model, {"steps": 6, "guidance": 1.0})
    assert plain["network evaluations a sample"] == 6 and (plain["guidance"], plain["guidance kind"]) == (1.0, "none")
    part = settings(model, {"steps": 6, "guidance_interval": (0.5, 3.0)})
    assert 6 < part["network evaluations a sample"] < 12 and part["guidance interval"] == [0.5, 3.0]
    assert not any("radius" in name for name in own)
    apg = settings(model, {"guidance_kind": "apg", "guidance_radius": 2.5, "guidance_momentum": -0.5})
    assert (apg["guidance kind"], apg["guidance radius"], apg["guidance momentum"], apg["guidance parallel"]) == ("apg", 2.5, -0.5, 1.0)
    with pytest.raises(UserError, match="sample: "):
        settings(model, {"steps": 0})


def test_settings_of_a_model_without_guidance(tmp_path: Path) -> None:
    """Its training dropped no condition: a scale has no effect, and costs nothing."""
    unguided = untrained(conditioning={"text": {"enabled": False}})
    found = settings(unguided, {"steps": 5})
    assert found["network evaluations a sample"] == 5 and found["guidance"] == 1.0
    with pytest.raises(UserError, match="this model is told no classes"):
        classes_of(unguided)


def test_classes_of_a_model(model: LatentDiffusion, of_text: LatentDiffusion) -> None:
    assert classes_of(model) == 3
    with pytest.raises(UserError, match="told no classes"):
        classes_of(of_text)
