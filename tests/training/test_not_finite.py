"""A NaN in one example of both real stages: the update is skipped or the run stops, and nothing of the state has moved."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ldm_jax.config import WorkDir
from ldm_jax.data.pipeline import Batches
from ldm_jax.sharding.mesh import make_mesh
from ldm_jax.training import loop
from ldm_jax.training.checkpoints import Checkpoints
from tests import tiny

GOOD = 3  # updates before the one whose batch holds the NaN


class Planted:
    """A source whose example `bad` holds a NaN; all its arrays are floats."""

    def __init__(self, source: Any, bad: int | None) -> None:
        self.source, self.bad = source, bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        (name,) = {"image", "moments"} & example.keys()
        array = example[name].astype(np.float32)
        if index == self.bad:
            array[1, 2, 0] = np.nan
        return {**example, name: array}


def bad_example() -> int:
    """An example of the batch after `GOOD` updates that comes again, but not in the next one: an epoch has 4 batches."""
    batches = Batches(tiny.Pictures(), 16, tiny.config().seed)
    return int(np.setdiff1d(batches.indices(GOOD), batches.indices(GOOD + 1))[0])


def make(kind: str, steps: int, max_nan: int = 2, bad: int | None = None) -> Any:
    cfg = tiny.config()
    cfg.checkpoint.every = 2
    cfg.first_stage.loss.disc_start = GOOD  # the discriminator acts in the update with the NaN
    for group in (cfg, cfg.first_stage):
        group.train.update(steps=steps, max_nan=max_nan)
        group.optimizer.clip_norm = 1e-4
    stage = tiny.autoencoder_stage(cfg) if kind == "autoencoder" else tiny.diffusion_stage(cfg)
    stage.source = Planted(stage.source, bad)
    stage.preview = lambda state: (np.zeros((1, 8, 8, 3), np.uint8), 1, None)  # pictures of floats have no preview
    return stage


MESH = make_mesh(1, 1, jax.devices()[:1])


def run(stage: Any, path: Path) -> Any:
    return jax.device_get(loop.train(stage, WorkDir(path), MESH))


def stored(stage: Any, path: Path, step: int) -> Any:
    with Checkpoints(path / "checkpoints", every=2, read_only=True) as checkpoints:
        return jax.device_get(checkpoints.restore(loop.abstract_state(stage, MESH), step))


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_a_planted_nan_is_skipped_or_stops_the_run(kind: str, tmp_path: Path, caplog: Any) -> None:
    bad, stopped, skipping = bad_example(), tmp_path / "stopped", tmp_path / "skipping"
    with tiny.quick_compilation():
        before = run(make(kind, GOOD), tmp_path / "before")

        for _ in range(2):  # the same command finds the same at once
            with pytest.raises(loop.TrainingFailed) as failure:
                run(make(kind, 8, 1, bad), stopped)
            assert f"1 updates in a row were not finite, up to step {GOOD + 1}" in str(failure.value)
            assert f"the parameters before them are in the checkpoint of step {GOOD}" in str(failure.value)
        report = json.loads((stopped / "not_finite" / f"{GOOD + 1:08d}.json").read_text())
        assert report["step"] == GOOD + 1 and bad in report["examples"]
        assert str(report["examples"]) in str(failure.value) and str(report["examples"]) in caplog.text
        assert_same(stored(make(kind, 8), stopped, GOOD), before)

        skipped = run(make(kind, GOOD + 1, bad=bad), skipping)
        assert (skipped.step, skipped.skipped, skipped.skipped_in_a_row) == (GOOD + 1, 1, 1)
        assert_same((skipped.params, skipped.ema, skipped.opt), (before.params, before.ema, before.opt))

        assert_same(run(make(kind, 8, bad=bad), stopped), run(make(kind, 8, bad=bad), skipping))
    records = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records][GOOD - 1 : GOOD + 2] == [0, 1, 1] and records[-1]["skipped"] == 2
    assert all(record["gradient_norm"] is None or record["gradient_norm"] > 1e-2 for record in records)  # before clipping
