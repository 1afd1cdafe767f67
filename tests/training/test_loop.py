"""The loop: order of checkpoint and batch, stops, resumes, losses that are not finite, metrics and previews."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.pipeline import Batches
from ldm_jax.sharding.mesh import make_mesh
from ldm_jax.training import loop, optimizer
from ldm_jax.training import state as states
from tests import tiny
from tests.training.test_checkpoints import small_files

BATCH = 16


class Numbers:
    """Examples with the number of their index, NaN for those in `broken`."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": np.full(4, np.nan if index in self.broken else index / 64, np.float32)}


class LineStage:
    """A linear network that learns the mean of a batch with noise: small enough to compile at once.

    `on_batch(step)` is called in the loop's thread when the batch of a step is drawn; `seen` holds the steps whose batch was.
    """

    name = "line"
    initial = None

    def __init__(self, config: Any, source: Any, on_batch: Callable[[int], None] = lambda step: None, width: int = 4) -> None:
        self.config, self.source, self.on_batch, self.width = config, source, on_batch, width
        self.dtype, self.frozen, self.seen, self.previews = jnp.float32, None, [], 0
        self.optimizers = {"all": optimizer.from_config(config.optimizer, config.train.steps)}

    def notes(self) -> Any:
        yield "a note"

    def init(self, key: jax.Array) -> states.State:
        return states.create({"net": {"w": jax.random.normal(key, (4, self.width))}}, self.optimizers, ("net",), (0.9,))

    def phase(self, step: int) -> bool:
        return step >= 5

    def without_remat(self) -> "LineStage":
        return self

    def update(self, state: states.State, batch: Any, frozen: None, root: jax.Array, phase: bool) -> Any:
        noise = jax.random.normal(states.key_for(root, "noise", state.step), (self.width,))

        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.square(batch["x"] @ params["net"]["w"] - noise)) * (2 if phase else 1)

        value, grads = jax.value_and_grad(loss)(state.params)
        state, metrics = states.apply_updates(state, grads, value, self.optimizers, (0.9,), self.config.train.max_nan)
        return state, metrics | {"loss": value}

    def batches(self, **kwargs: Any) -> Batches:
        stage = self

        class Watched(Batches):
            def iterate(self, start_step: int = 0) -> Any:
                data = super().iterate(start_step)
                try:
                    for step, batch in enumerate(data, start_step):
                        stage.on_batch(step)
                        stage.seen.append(step)
                        yield batch
                finally:
                    data.close()

        return Watched(self.source, BATCH, self.config.seed, workers=1, **kwargs)

    def preview(self, state: states.State) -> tuple[np.ndarray, int, list[str] | None]:
        self.previews += 1
        return np.zeros((2, 8, 8, 3), np.uint8), 2, None


@pytest.fixture
def config() -> Any:
    cfg = tiny.config()
    cfg.train.update(steps=12, batch_size=BATCH, log_every=1, max_nan=3)
    cfg.optimizer.update(learning_rate=0.1, warmup=1)
    cfg.checkpoint.update(every=4, keep=3)
    cfg.sample.every = 6
    return cfg


@pytest.fixture(scope="module")
def mesh() -> Any:
    return make_mesh(1, 1, jax.devices()[:1])


def run(stage: Any, path: Path, mesh: Any) -> Any:
    return jax.device_get(loop.train(stage, WorkDir(path), mesh))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses(path: Path) -> dict[int, float]:
    return {line["step"]: line.get("loss", line.get("loss/nll")) for line in lines(path)}


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def kept(path: Path) -> list[int]:
    return sorted(int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit())


def test_a_run_leaves_every_metric_its_checkpoints_and_previews(config: Any, mesh: Any, tmp_path: Path) -> None:
    config.train.log_every = 5
    stage = LineStage(config, Numbers())
    state = run(stage, tmp_path, mesh)
    assert int(state.step) == 12 and stage.seen == list(range(12))
    assert [line["step"] for line in lines(tmp_path)] == [5, 10, 12]
    for line in lines(tmp_path):
        assert {"loss", "gradient_norm", "parameter_norm", "learning_rate", "skipped"} <= line.keys()
        assert line.keys() >= tiny.CLOCKED - {"mfu", "hbm_gib", "hbm_peak_gib"}  # of what is known on this device
        assert line["loss"] > 0 and line["learning_rate"] == pytest.approx(0.1)
        assert 0 <= line["data_wait"] <= 1 and 0 < line["goodput"] < 1 and line["step_time"] > 0
    assert line["parameter_norm"] == pytest.approx(float(np.linalg.norm(state.params["net"]["w"])), rel=1e-6)
    assert json.loads((tmp_path / "goodput.json").read_text())["productive"].keys() == {"0", "4", "8", "12"}
    assert kept(tmp_path) == [4, 8, 12]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["00000000.png", "00000006.png", "00000012.png"]
    assert list(tmp_path.glob("events.*"))


def test_the_checkpoint_comes_before_the_next_batch(config: Any, mesh: Any, tmp_path: Path) -> None:
    """A process that dies while it draws batch 8 has left the checkpoint of 8 updates."""

    def die(step: int) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(LineStage(config, Numbers(), die), tmp_path, mesh)
    assert kept(tmp_path) == [4, 8]
    again = LineStage(config, Numbers())
    resumed = run(again, tmp_path, mesh)
    assert again.seen == [8, 9, 10, 11] and again.previews == 1  # the grids of steps 0 and 6 are there already
    assert_same(resumed, run(LineStage(config, Numbers()), tmp_path / "undisturbed", mesh))


def test_what_a_kill_after_the_last_checkpoint_left_undone_is_done(config: Any, mesh: Any, tmp_path: Path) -> None:
    """The last checkpoint comes before the last grid and the last evaluation."""
    scores = {"score": 0.5, "broken": float("nan")}
    config.evaluate.every = 5
    stage = LineStage(config, Numbers())
    stage.evaluate = lambda state, between: scores  # type: ignore[attr-defined]
    state = run(stage, tmp_path, mesh)
    evaluations = tmp_path / "evaluations"
    assert sorted(p.name for p in evaluations.iterdir()) == ["00000005.json", "00000010.json", "00000012.json"]
    assert json.loads((evaluations / "00000012.json").read_text()) == {"step": 12, "score": 0.5, "broken": None}
    (tmp_path / "samples" / "00000012.png").unlink()
    (evaluations / "00000012.json").unlink()
    again = LineStage(config, Numbers())
    again.evaluate = lambda state, between: scores  # type: ignore[attr-defined]
    assert_same(run(again, tmp_path, mesh), state)
    assert again.seen == [] and (tmp_path / "samples" / "00000012.png").exists() and (evaluations / "00000012.json").exists()
    assert [line["step"] for line in lines(tmp_path) if "evaluation/score" in line][:3] == [5, 10, 12]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint_and_the_resume_is_bit_identical(config: Any, mesh: Any, tmp_path: Path, signum: int) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def stop(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signum)

    with pytest.raises(loop.Stopped, match="step 7 with a complete checkpoint"):
        run(LineStage(config, Numbers(), stop), tmp_path, mesh)
    assert 7 in kept(tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = run(LineStage(config, Numbers()), tmp_path, mesh)
    assert_same(resumed, run(LineStage(config, Numbers()), tmp_path / "undisturbed", mesh))
    assert losses(tmp_path) == losses(tmp_path / "undisturbed") and len(losses(tmp_path)) == 12


def test_a_checkpoint_that_failed_in_the_background_is_made_up_for_at_once(
    config: Any, mesh: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full when the checkpoint of step 4 is written, and has space again when that is noticed; a stop loses nothing by it."""

    def fill(step: int) -> None:
        if step == 3:
            limits.enter_context(small_files())
        if step == 4:
            while any(thread.name == "save_finalize" for thread in threading.enumerate()):
                time.sleep(0.01)
            limits.close()
        if step == signalled:
            os.kill(os.getpid(), signal.SIGTERM)

    for signalled in (-1, 4):
        path, limits = tmp_path / str(signalled), ExitStack()
        with limits, pytest.raises(loop.Stopped) if signalled > 0 else nullcontext():
            run(LineStage(config, Numbers(), fill, width=200_000), path, mesh)
        assert kept(path) == ([5] if signalled > 0 else [5, 8, 12])
        assert "the last checkpoint was not written (no disk space left" in caplog.text


@pytest.mark.parametrize(("at", "batches"), [(5, 3), (12, 1)])
def test_a_signal_stops_an_evaluation_between_its_batches(config: Any, mesh: Any, tmp_path: Path, at: int, batches: int) -> None:
    """The checkpoint is there already; the evaluation is made when the run goes on."""
    config.evaluate.every = 5
    seen: list[int] = []

    def evaluate(state: Any, between: Callable[[], None]) -> dict[str, float]:
        for batch in range(4):
            between()
            seen.append(batch)
            if (int(state.step), batch + 1) == (at, batches):
                assert at in kept(tmp_path) or at == 5  # of 5 it may still be on its way
                os.kill(os.getpid(), signal.SIGTERM)
        return {"score": float(state.step)}

    first, again = (LineStage(config, Numbers()) for _ in range(2))
    first.evaluate = evaluate  # type: ignore[attr-defined]
    with pytest.raises(loop.Stopped, match=f"step {at} with a complete checkpoint"):
        run(first, tmp_path, mesh)
    assert len(seen) % 4 == batches % 4 and kept(tmp_path)[-1] == at
    at, evaluations = -1, tmp_path / "evaluations"
    again.evaluate = evaluate  # type: ignore[attr-defined]
    resumed = run(again, tmp_path, mesh)
    assert [json.loads(p.read_text())["score"] for p in sorted(evaluations.iterdir())] == [5, 10, 12]
    config.evaluate.every = 0
    assert_same(resumed, run(LineStage(config, Numbers()), tmp_path / "undisturbed", mesh))


def test_a_signal_during_the_last_update_stops_the_run_after_its_checkpoint(config: Any, mesh: Any, tmp_path: Path) -> None:
    """What comes after the stage, which knows nothing of this signal, is not begun."""

    def stop(step: int) -> None:
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Stopped, match="after the last step"):
        run(LineStage(config, Numbers(), stop), tmp_path, mesh)
    assert kept(tmp_path) == [4, 8, 12]
    again = LineStage(config, Numbers())
    assert int(run(again, tmp_path, mesh).step) == 12 and not again.seen


def test_metrics_after_the_restored_step_are_cut_and_written_again(config: Any, mesh: Any, tmp_path: Path) -> None:
    def die(step: int) -> None:
        if step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(LineStage(config, Numbers(), die), tmp_path, mesh)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 123')  # half a line, as a kill leaves it
    run(LineStage(config, Numbers()), tmp_path, mesh)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 13))
    run(LineStage(config, Numbers()), tmp_path / "undisturbed", mesh)
    assert losses(tmp_path) == losses(tmp_path / "undisturbed")


def test_an_update_that_is_not_finite_is_skipped_and_counted(config: Any, mesh: Any, tmp_path: Path, caplog: Any) -> None:
    bad = int(Batches(Numbers(), BATCH, config.seed).indices(2)[3])  # an example of step 2

    class Spying(LineStage):
        def update(self, state: Any, batch: Any, frozen: None, root: Any, phase: bool) -> Any:
            new, metrics = super().update(state, batch, frozen, root, phase)
            moved = [jnp.any(a["net"]["w"] != b["net"]["w"]) for a, b in ((new.params, state.params), (new.ema["0.9"], state.ema["0.9"]))]
            return new, metrics | {"moved": sum(m.astype(jnp.float32) for m in moved)}

    config.train.steps = 4
    state = run(Spying(config, Numbers((bad,))), tmp_path, mesh)
    assert [line["moved"] for line in lines(tmp_path)] == [2, 2, 0, 2]
    assert [line["loss"] is None for line in lines(tmp_path)] == [False, False, True, False]
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 0, 1, 1] and int(state.skipped) == 1
    assert int(state.step) == 4 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert "update 3 skipped" in caplog.text


def test_the_gradient_norm_is_that_before_clipping(config: Any, mesh: Any, tmp_path: Path) -> None:
    config.train.steps = 1
    norms = []
    for clip in (0.0, 1e-6):
        config.optimizer.clip_norm = clip
        run(LineStage(config, Numbers()), tmp_path / str(clip), mesh)
        norms += [lines(tmp_path / str(clip))[0]["gradient_norm"]]
    assert norms[0] == norms[1] > 1e-3


def test_too_many_in_a_row_end_the_run_and_name_the_examples(config: Any, mesh: Any, tmp_path: Path) -> None:
    stage = LineStage(config, Numbers(tuple(range(64))))
    with pytest.raises(loop.TrainingFailed, match="3 updates in a row") as failure:
        run(stage, tmp_path, mesh)
    indices = stage.batches().indices(2).tolist()
    assert f"up to step 3; its batch held the examples {indices}" in str(failure.value)
    assert kept(tmp_path) == []


def test_the_last_updates_count_too(config: Any, mesh: Any, tmp_path: Path) -> None:
    config.train.update(steps=3)
    with pytest.raises(loop.TrainingFailed, match="up to step 3"):
        run(LineStage(config, Numbers(tuple(range(64)))), tmp_path, mesh)
    assert kept(tmp_path) == []


def test_more_steps_go_on_and_a_finished_run_does_nothing(config: Any, mesh: Any, tmp_path: Path) -> None:
    config.train.steps = 6
    first = run(LineStage(config, Numbers()), tmp_path, mesh)
    idle = LineStage(config, Numbers())
    assert_same(run(idle, tmp_path, mesh), first)
    assert idle.seen == []
    config.train.steps = 12
    longer = LineStage(config, Numbers())
    state = run(longer, tmp_path, mesh)
    assert longer.seen == list(range(6, 12))
    assert_same(state, run(LineStage(config, Numbers()), tmp_path / "at once", mesh))


def test_a_checkpoint_of_another_shape_is_bad_input(config: Any, mesh: Any, tmp_path: Path) -> None:
    run(LineStage(config, Numbers()), tmp_path, mesh)
    with pytest.raises(UserError, match=r"params/net/w: stored float32\[4, 4\], wanted float32\[4, 5\]"):
        run(LineStage(config, Numbers(), width=5), tmp_path, mesh)


def test_a_batch_that_does_not_divide_is_found_before_anything_is_written(config: Any, tmp_path: Path) -> None:
    config.train.accumulation = 3
    with pytest.raises(UserError, match="batch size 16 is not divisible by 8 devices x 3"):
        run(LineStage(config, Numbers()), tmp_path / "run", make_mesh())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_a_real_stage_resumes_bit_identically_on_eight_devices(kind: str, tmp_path: Path) -> None:
    """It dies in update 7, after the discriminator's start, and goes on from the checkpoint of step 4, before it."""
    cfg, mesh = tiny.config(), make_mesh()
    cfg.sample.every = 1000
    make = tiny.autoencoder_stage if kind == "autoencoder" else tiny.diffusion_stage
    stage = make(cfg)
    phase = stage.phase

    def dying(step: int) -> bool:
        if step == 7:
            raise KeyboardInterrupt
        return phase(step)

    with tiny.quick_compilation(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "phase", dying)
        with pytest.raises(KeyboardInterrupt):
            run(stage, tmp_path / "killed", mesh)
        assert kept(tmp_path / "killed") == [4]
        resumed = run(make(cfg), tmp_path / "killed", mesh)
        assert_same(resumed, run(make(cfg), tmp_path / "undisturbed", mesh))
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    assert {p.name for p in (tmp_path / "killed" / "samples").iterdir()} == {"00000000.png", "00000010.png"}
