"""Training on pictures of several aspect ratios: the latent cache, and a run from a folder to a model."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax.config import WorkDir, check
from ldm_jax.data.buckets import Bucketed
from ldm_jax.training.encode import Encoder, ensure_cache, latent_statistics
from ldm_jax.training.run import run
from tests import tiny

SIZES = ((16, 16), (24, 8), (8, 24))


class Shapes(tiny.Pictures):
    """Random captioned pictures, a third each of 16x16, 24x8 and 8x24, and maps of their size."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        height, width = SIZES[index % 3]
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return {"image": image, "text": self.caption(index), "segmentation": rng.integers(0, 3, (height, width), dtype=np.uint8)}


def bucketed(directory: Path) -> Bucketed:
    return Bucketed(Shapes(), SIZES, 4, directory, workers=1)


@pytest.mark.usefixtures("quick_compilation")
def test_the_cache_holds_the_moments_of_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_jax.training.encode._SHARD", 24)  # the second shard has two sizes
    cfg = tiny.config()
    cfg.data.flip = True
    source = bucketed(tmp_path)
    stage, params = tiny.first_stage(cfg)
    encoder = Encoder(stage, params, 8)
    cache = ensure_cache(cfg, WorkDir(tmp_path), encoder, source)
    assert [tuple(bucket) for bucket in cache.buckets] == [(16, 16, 0, 22), (24, 8, 22, 43), (8, 24, 43, 64)]
    for flip in (False, True):
        examples = cache.read(np.arange(64), np.full(64, flip))
        for bucket in source.buckets:
            own = range(bucket.start, bucket.stop)
            images = np.stack([source[i]["image"][:, :: -1 if flip else 1] for i in own])
            expected = np.asarray(stage.moments(params, images / np.float32(127.5) - 1))
            np.testing.assert_allclose([examples[i]["moments"] for i in own], expected, atol=1e-5)
            np.testing.assert_array_equal(examples[own[3]]["segmentation"], source[own[3]]["segmentation"][:, :: -1 if flip else 1])
    batches = tiny.DiffusionStage(cfg, stage, params, cache, tiny.tokenizer(cfg)).batches()
    assert {batches.batch(step)["moments"].shape[1:3] for step in range(5)} == {(4, 4), (6, 2), (2, 6)}
    assert all(np.isfinite(part).all() for part in latent_statistics(encoder, source, 0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
def test_a_run_on_a_folder_of_all_shapes(cache: bool, tmp_path: Path) -> None:
    source, data = Shapes(), tmp_path / "data"
    (data / "segmentation").mkdir(parents=True)
    for i in range(len(source)):
        example = source[i]
        Image.fromarray(example["image"]).resize(example["image"].shape[1::-1]).save(data / f"{i:02}.png")
        Image.fromarray(example["segmentation"]).save(data / "segmentation" / f"{i:02}.png")
    cfg = tiny.config()
    cfg.data.update(source="folder", path=str(data), buckets=tuple(f"{h}x{w}" for h, w in SIZES), cache=cache, flip=True)
    cfg.denoiser.channel_mult = (1,)
    cfg.conditioning.text.enabled = False
    cfg.conditioning.segmentation.update(enabled=True, num_classes=3, stages=2, channels=2)
    for group in (cfg, cfg.first_stage):
        group.train.update(steps=4, batch_size=8)
    check(cfg)
    before = jax.config.jax_compilation_cache_dir
    try:
        run(cfg, WorkDir(tmp_path / "run"), ["train"])
        cfg.train.steps = 6
        workdir = run(cfg, WorkDir(tmp_path / "run"), ["train"])  # goes on
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    losses = [json.loads(line)["loss"] for line in (workdir.path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and np.isfinite(losses).all()
    model = ldm_jax.load(str(workdir.path))
    drawn = model.sample(segmentation=[source[1]["segmentation"]])
    assert drawn.shape == (1, 24, 8, 3)
    grid = Image.open(workdir.path / "samples" / "00000006.png")
    assert grid.size[0] > grid.size[1]
