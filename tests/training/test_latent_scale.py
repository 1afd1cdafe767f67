"""The scale of the latents of a first stage that was trained elsewhere."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import ldm_jax
from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.sources import make_source
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.stages import FirstStage
from ldm_jax.training.encode import Encoder, latent_scale, latent_statistics
from ldm_jax.training.run import check_scale, run, settle_latents
from tests import tiny


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    """Two updates on eight pictures without captions, with the first stage `model`."""
    (tmp_path / "data").mkdir()
    for i in range(8):
        Image.fromarray(tiny.Pictures()[i]["image"]).save(tmp_path / "data" / f"{i}.png")
    cfg = tiny.config()
    cfg.data.update(source="folder", path=str(tmp_path / "data"))
    cfg.conditioning.text.enabled = False
    cfg.sample.guidance = 1.0
    cfg.train.update(steps=2, batch_size=8)
    cfg.optimizer.warmup = 1
    cfg.first_stage.path = str(tmp_path / "model")
    return cfg


def save_first_stage(config: ConfigDict, shift: float = 0.0, scale: float = 1.0, **info: object) -> FirstStage:
    network, params = tiny.first_stage(config)
    stage = FirstStage(network.network, (shift,), (scale,))
    LatentDiffusion(stage, None, {"first_stage": params}, {"task": "autoencoder", "resolution": 16, **info}).save(config.first_stage.path)
    return stage


ALONE = {"origin": {"format": "compvis"}}


def settled(config: ConfigDict, workdir: WorkDir, stage: FirstStage) -> FirstStage:
    workdir.path.mkdir(exist_ok=True)
    encoder = Encoder(stage, tiny.first_stage(config)[1], 8)
    return settle_latents(config, workdir, make_source(config.data), config.first_stage.path, stage, encoder)


def test_a_process_that_does_not_see_the_scale_yet_takes_what_the_first_has_found(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS, where a file that somebody has looked for before it was there is missed for a while."""
    config.first_stage.latent_scale, told = "std", []
    stage = save_first_stage(config, **ALONE)
    with monkeypatch.context() as patch:
        patch.setattr("ldm_jax.training.run.from_first", lambda find: told.append(json.loads(json.dumps(find()))) or told[-1])
        found = settled(config, WorkDir(tmp_path / "of the first"), stage)
    monkeypatch.setattr("ldm_jax.training.run.from_first", lambda find: told[0])
    assert settled(config, WorkDir(tmp_path / "of another"), stage) == found != stage
    assert not list((tmp_path / "of another").iterdir())


@pytest.mark.parametrize("kind", ["0.18215", "std", "channel"])
def test_one_without_a_scale_gets_what_is_asked_for_and_keeps_it(kind: str, config: ConfigDict, tmp_path: Path) -> None:
    config.first_stage.latent_scale = kind
    stage, workdir = save_first_stage(config, **ALONE), WorkDir(tmp_path / "run")
    check_scale(config, workdir, config.first_stage.path, stage)
    found = settled(config, workdir, stage)
    mean, std = latent_statistics(Encoder(stage, tiny.first_stage(config)[1], 8), make_source(config.data), 0, 1)
    assert (found.shift, found.scale) == latent_scale(kind, mean, std) and found.scale != stage.scale
    config.data.path = "gone"  # nothing is measured again
    config.first_stage.latent_scale = "std"
    assert settle_latents(config, workdir, None, None, stage, Encoder(stage, tiny.first_stage(config)[1], 8)) == found  # type: ignore[arg-type]


@pytest.mark.parametrize("origin", [{}, {"origin": {"format": "diffusers"}}])
def test_one_with_a_scale_keeps_it_and_another_number_is_refused(origin: dict, config: ConfigDict, tmp_path: Path) -> None:
    stage = save_first_stage(config, scale=1 / 0.18215, **origin)
    for kind in ("std", "channel", "0.18215"):
        config.first_stage.latent_scale = kind
        check_scale(config, WorkDir(tmp_path / "run"), config.first_stage.path, stage)
        assert settled(config, WorkDir(tmp_path / f"run-{kind}"), stage).scale == stage.scale
    config.first_stage.latent_scale = "0.5"
    with pytest.raises(UserError, match=r"^first_stage.latent_scale=0.5, but the first stage in .* multiplies its latents by 0.18215: "):
        run(config, WorkDir(tmp_path / "new"), ["train"])
    assert not (tmp_path / "new").exists()
    config.first_stage.latent_scale = "0.18215"
    with pytest.raises(UserError, match=r"by 0.18215 after a shift by -0.3: "):
        check_scale(config, WorkDir(tmp_path / "new"), config.first_stage.path, save_first_stage(config, 0.3, 1 / 0.18215))


@pytest.mark.slow
def test_a_run_learns_samples_and_goes_on_in_the_measured_scale(config: ConfigDict, tmp_path: Path) -> None:
    stage, cache = save_first_stage(config, **ALONE), jax.config.jax_compilation_cache_dir
    with tiny.quick_compilation():
        try:
            workdir = run(config, WorkDir(tmp_path / "run"), ["train"])
            config.train.steps = 3
            run(config, WorkDir(tmp_path / "run"), ["train"])
        finally:
            jax.config.update("jax_compilation_cache_dir", cache)
        expected = tuple(json.loads((workdir.path / "latents_of.json").read_text())["scale"])
        assert expected != stage.scale
        for model in (ldm_jax.load(str(workdir.path)), ldm_jax.load(str(workdir.path), step=3)):
            assert model.first_stage.scale == expected
            pictures = np.stack([tiny.Pictures()[i]["image"] for i in range(8)])
            np.testing.assert_allclose(model.encode(pictures, jax.random.key(0)).std(), 1, rtol=0.3)
