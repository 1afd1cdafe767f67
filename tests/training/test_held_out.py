"""Evaluation while training: what it measures, and that the weights are those of a run without it."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from ldm_jax.config import UserError, WorkDir, check
from ldm_jax.data.shapes import ShapesSource
from ldm_jax.diffusion.losses import noised, per_example
from ldm_jax.diffusion.samplers import initial_noise
from ldm_jax.errors import Stopped
from ldm_jax.evaluation.obedience import SEED
from ldm_jax.training.diffusion import model_info
from ldm_jax.training.held_out import DenoiserEvaluation, held_out_examples, losses_by_time
from ldm_jax.training.inputs import open_source
from ldm_jax.training.run import run
from tests import tiny


def settings(every: int = 0) -> tiny.ConfigDict:
    cfg = tiny.config()
    cfg.data.size = 40
    cfg.diffusion.update(process="flow", prediction="flow")
    cfg.sample.update(sampler="euler", guidance=1.0)
    cfg.evaluate.update(every=every, examples=7, samples=3, prompts=2, held_out=0, guidance=(1.0,), guidance_prompts=1)
    return cfg


def model_of(cfg: tiny.ConfigDict) -> tuple:
    stage = tiny.diffusion_stage(cfg)
    shapes = jax.eval_shape(lambda key: stage.denoiser.init(key, stage.latent_shape), jax.random.key(0))
    return stage, stage.model(tiny.random_like(shapes), model_info(cfg, 3))


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with tiny.quick_compilation():
        yield


def test_losses_are_those_of_training_at_fixed_times_and_noise() -> None:
    cfg = settings()
    stage, model = model_of(cfg)
    examples = held_out_examples(cfg, WorkDir("unused"), ShapesSource(40, seed=1, resolution=16))
    latents = model.encode(np.stack([example["image"] for example in examples]))
    found = losses_by_time(model, stage.loss, latents, examples, buckets=4)
    denoise, expected = jax.jit(stage.denoiser.denoise), np.zeros(4)
    for i, example in enumerate(examples):
        arrays = model.prepare({"text": [example["text"]]})
        noise = initial_noise(0, np.array([i]), latents.shape[1:])
        for bucket in range(4):
            t = stage.denoiser.process.time_at(np.array([(bucket + (i + 0.5) / 7) / 4], np.float32))
            x_t = noised(stage.denoiser.process, latents[i : i + 1], noise, t)
            prediction = denoise(model.params, x_t, t, stage.denoiser.condition(model.params, arrays))
            expected[bucket] += float(sum(per_example(stage.denoiser.process, stage.loss, prediction, latents[i : i + 1], noise, t))[0])
    np.testing.assert_allclose(found, expected / 7, rtol=2e-5)


def test_drawn_scenes_are_held_out_by_their_seed() -> None:
    cfg = settings()
    found = held_out_examples(cfg, WorkDir("unused"), ShapesSource(40, seed=1, resolution=16))
    assert [example["text"] for example in found] == [ShapesSource(7, SEED, 16).caption(i) for i in range(7)]


def test_files_are_held_out_where_there_are_some(tmp_path: Path) -> None:
    for name, number in (("train", 3), ("val", 10)):
        (tmp_path / name).mkdir()
        for i in range(number):
            image = np.full((20, 24, 3), 10 * i + (name == "val"), np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}")
    cfg = settings()
    cfg.data.update(source="folder", path=str(tmp_path / "train"))
    source = open_source(cfg, WorkDir(tmp_path / "run"))
    assert held_out_examples(cfg, WorkDir(tmp_path / "run"), source) == []
    cfg.evaluate.path = str(tmp_path / "val")
    found = held_out_examples(cfg, WorkDir(tmp_path / "run"), source)
    assert [example["text"] for example in found] == [f"val {i}" for i in np.linspace(0, 9, 7).astype(int)]
    assert all(example["image"].shape == (16, 16, 3) and example["image"].max() % 10 == 1 for example in found)
    cfg.evaluate.path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        held_out_examples(cfg, WorkDir(tmp_path / "run"), source)


@pytest.mark.slow
def test_scores_of_a_model(tmp_path: Path) -> None:
    cfg = settings()
    stage, model = model_of(cfg)
    workdir = WorkDir(tmp_path)
    evaluation = DenoiserEvaluation(cfg, workdir, open_source(cfg, workdir), stage.loss)
    found = evaluation(model)
    losses = [found[f"held_out/loss/t{i}"] for i in range(10)]
    assert found["held_out/loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["samples/MIND/colors"] > 0 and 0 <= found["samples/text/all_seen"] <= 1
    assert evaluation(model) == pytest.approx(found, rel=1e-5)


def stop_after(calls: Iterator[None]) -> None:
    for _ in calls:
        return
    raise Stopped


@pytest.mark.slow
def test_an_evaluation_is_left_between_any_two_batches(tmp_path: Path) -> None:
    cfg = settings()
    stage, model = model_of(cfg)
    evaluation = DenoiserEvaluation(cfg, WorkDir(tmp_path), open_source(cfg, WorkDir(tmp_path)), stage.loss)
    assert list((tmp_path / "evaluations").glob("reference-*/*.npz"))  # measured before training begins
    for number in (0, 1, 10):  # the pictures are encoded, losses measured in 10 parts, and samples drawn
        calls = iter([None] * number)
        with pytest.raises(Stopped):
            evaluation(model, lambda calls=calls: stop_after(calls))  # type: ignore[misc]
    calls = iter([None] * 11)  # the encoding is there already
    assert evaluation(model, lambda: stop_after(calls)).keys() >= {"held_out/loss", "samples/MIND/colors"}


def test_settings_out_of_range_are_refused() -> None:
    for name, value in (("every", -1), ("examples", 0), ("samples", 0)):
        cfg = settings()
        cfg.evaluate[name] = value
        with pytest.raises(UserError, match=f"evaluate.{name}"):
            check(cfg)


def losses_of(path: Path) -> list[dict]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in tiny.CLOCKED} for record in records if "loss" in record or "loss/nll" in record]


@pytest.mark.slow
def test_a_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    for every in (0, 4):
        run(settings(every), WorkDir(tmp_path / str(every)), [])
    files = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        one, other = load_file(tmp_path / "0" / file), load_file(tmp_path / "4" / file)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    for stage in ("", "first_stage"):
        assert losses_of(tmp_path / "0" / stage) == losses_of(tmp_path / "4" / stage)
        steps = sorted(path.name for path in (tmp_path / "4" / stage / "evaluations").glob("*.json"))
        assert steps == ["00000004.json", "00000008.json", "00000010.json"]
        assert not (tmp_path / "0" / stage / "evaluations").exists()
    first = json.loads((tmp_path / "4" / "first_stage" / "evaluations" / "00000004.json").read_text())
    assert set(first) == {"step", "held_out/PSNR", "held_out/SSIM", "held_out/bias"}
