"""The training loop of both stages.

The order of things in one turn, which resuming relies on:
  1. a checkpoint, if one is due or a stop was asked for, before the next batch is drawn;
  2. the preview, if one is due (step 0 included);
  3. the batch of this step, a function of (seed, step);
  4. the update, started and not waited for;
  5. the metrics of the update before, fetched and written while this one runs.
"""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from ldm_jax.config import WorkDir, write_json
from ldm_jax.data.pipeline import Batches
from ldm_jax.sharding.mesh import batch_sharding, check_batch, local_rows, replicated, to_global
from ldm_jax.sharding.processes import from_first
from ldm_jax.sharding.rules import shardings
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.flops import count_flops
from ldm_jax.training.metrics import MetricWriter, Throughput, peak_flops
from ldm_jax.training.optimizer import schedule_from_config
from ldm_jax.training.preview import save_grid
from ldm_jax.training.signals import Stopped, StopSignals
from ldm_jax.training.state import Metrics, State, with_params

logger = logging.getLogger(__name__)


class Stage(Protocol):
    """What the loop asks of a stage. `update` and `init` are pure and traced."""

    name: str
    config: ConfigDict
    dtype: Any
    initial: dict[str, Any] | None  # parameters of networks that do not start untrained
    frozen: Any  # arrays that the update reads and that never change; an argument, as captured they would be copied into the program

    def init(self, key: jax.Array) -> State: ...
    def update(self, state: State, batch: Mapping[str, jax.Array], frozen: Any, root: jax.Array, phase: bool) -> tuple[State, Metrics]: ...
    def phase(self, step: int) -> bool:
        """Which of the programs of `update` runs after `step` updates; static."""
        ...

    def batches(self, **kwargs: Any) -> Batches: ...
    def preview(self, state: State) -> tuple[np.ndarray, int, list[str] | None]:
        """(images uint8 [N,H,W,3], columns of the grid, captions)."""
        ...

    def evaluate(self, state: State) -> dict[str, float]:
        """Scores on what the stage is not trained on."""
        ...

    def notes(self) -> Iterator[str]: ...


class TrainingFailed(Exception):
    """The run cannot go on (losses that are not finite); a front door exits with 1."""


def abstract_state(stage: Stage, mesh: Mesh) -> State:
    """Shapes, types and placement of a stage's state."""
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings(shapes, mesh))


def make_step(stage: Stage, mesh: Mesh, state: State) -> Callable[..., tuple[State, Metrics]]:
    """`step(state, batch, root, phase) -> (state, metrics)`: jitted, sharded over the mesh, its state donated."""
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    whole = replicated(mesh)
    update = jax.jit(
        stage.update,
        static_argnums=4,
        in_shardings=(placement, batch_sharding(mesh), whole, whole),
        out_shardings=(placement, whole),
        donate_argnums=0,
    )
    frozen = jax.device_put(stage.frozen, whole)
    return lambda state, batch, root, phase: update(state, batch, frozen, root, phase)


def init_state(stage: Stage, mesh: Mesh) -> State:
    """A fresh state, made where its parts belong."""
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(stage, mesh))
    state = jax.jit(stage.init, out_shardings=placement)(jax.random.fold_in(jax.random.key(stage.config.seed), 0))
    return with_params(state, stage.initial) if stage.initial else state


def restore_or_init(stage: Stage, mesh: Mesh, checkpoints: Checkpoints) -> tuple[State, int]:
    """The newest good checkpoint's state and step, or a fresh state and 0."""
    if checkpoints.latest() is None:
        return init_state(stage, mesh), 0
    state = checkpoints.restore(abstract_state(stage, mesh))
    return state, int(state.step)


def train(stage: Stage, workdir: WorkDir, mesh: Mesh) -> State:
    """Runs a stage to its last step, from the newest checkpoint if there is one, and returns the final state, saved.

    Raises:
      Stopped: after SIGTERM or SIGINT.
      TrainingFailed: after `train.max_nan` skipped updates in a row.
      UserError: the batch does not fit the mesh.
    """
    config = stage.config
    check_batch(config.train.batch_size, mesh, config.train.accumulation)
    with Checkpoints(workdir.checkpoints, config.checkpoint.every, config.checkpoint.keep) as checkpoints, jax.set_mesh(mesh):
        state, start = restore_or_init(stage, mesh, checkpoints)
        if start <= config.train.steps:
            with MetricWriter(workdir.path, start) as writer, StopSignals() as signals:
                run = _Run(stage, workdir, mesh, checkpoints, writer, signals)
                if start < config.train.steps:
                    state = run.steps(state, start)
                    writer.flush()
                    checkpoints.save(config.train.steps, state, wait=True)  # before anything that may fail
                run.finish(state)
                if signals.requested:
                    raise Stopped(f"stopped after the last step of the {stage.name}; the same command goes on from there")
    return state


class _Run:
    """One session of a run: what the turns of the loop share."""

    def __init__(
        self, stage: Stage, workdir: WorkDir, mesh: Mesh, checkpoints: Checkpoints, writer: MetricWriter, signals: StopSignals
    ) -> None:
        self.stage, self.config, self.workdir, self.mesh = stage, stage.config, workdir, mesh
        self.checkpoints, self.writer, self.signals = checkpoints, writer, signals
        self.root = jax.device_put(jax.random.key(self.config.seed), replicated(mesh))
        self.batches = stage.batches(rows=local_rows(self.config.train.batch_size, mesh))
        self.schedule = schedule_from_config(self.config.optimizer, self.config.train.steps)
        self.meter: Throughput | None = None
        self.metered: bool | None = None
        self.pending: tuple[int, Metrics] | None = None

    def steps(self, state: State, start: int) -> State:
        """The turns of the loop, in the order that the module's docstring gives."""
        total = self.config.train.steps
        step_fn = make_step(self.stage, self.mesh, state)
        for note in self.stage.notes() if start == 0 else ():
            logger.warning(note)
        with closing(self.batches.iterate(start)) as data, self._progress(start) as bar:
            for step in range(start, total):
                self._between(state, step)
                self._meter_for(step, state)
                assert self.meter is not None
                with self.meter.waiting():
                    batch = next(data)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, to_global(batch, self.mesh), self.root, self.stage.phase(step))
                self.meter.step()
                self._record(step + 1, metrics, bar)
        self._check_finite()
        return state

    def finish(self, state: State) -> None:
        """Preview and evaluation after the last update."""
        total = self.config.train.steps
        self._preview(state, total)
        if self.config.evaluate.every:
            self._evaluate(state, total)

    def _between(self, state: State, step: int) -> None:
        """Checkpoint and preview before the batch of `step` is drawn."""
        stopping = self.signals.stops_before(step)
        if self.checkpoints.due(step) or stopping:
            with self._pause():
                self.writer.flush()  # who goes on from this checkpoint keeps what is written of the updates before it
                self.checkpoints.save(step, state, wait=stopping)
        if stopping:
            raise Stopped(f"stopped at step {step} with a complete checkpoint; the same command goes on from there")
        if step % self.config.sample.every == 0:
            with self._pause():
                self._preview(state, step)
        if step and self.config.evaluate.every and step % self.config.evaluate.every == 0:
            with self._pause():
                self._evaluate(state, step)

    def _pause(self) -> AbstractContextManager[None]:
        return self.meter.paused() if self.meter else nullcontext()

    def _preview(self, state: State, step: int) -> None:
        path = self.workdir.samples / f"{step:08d}.png"
        if from_first(path.exists):
            return
        images, columns, captions = self.stage.preview(state)
        if jax.process_index() == 0:
            save_grid(path, images, columns, captions)

    def _evaluate(self, state: State, step: int) -> None:
        """Leaves the scores after `step` updates in a file, once."""
        path = self.workdir.evaluations / f"{step:08d}.json"
        found = from_first(lambda: json.loads(path.read_text()) if path.exists() else None)  # of before a restart, cut from the metrics
        if found is None:
            scores = self.stage.evaluate(state)
            found = {"step": step, **{name: value if math.isfinite(value) else None for name, value in scores.items()}}
            if jax.process_index() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, found)
        known = {name: value for name, value in found.items() if name != "step" and value is not None}
        self.writer.write(step, {f"evaluation/{name}": value for name, value in known.items()})

    def _meter_for(self, step: int, state: State) -> None:
        """A fresh meter at the start and where the program changes: its operations are counted from its own trace."""
        phase = self.stage.phase(step)
        if self.meter is None or phase != self.metered:
            flops = step_flops(self.stage, self.batches, state, phase)
            peak = peak_flops(jax.devices()[0].device_kind, self.stage.dtype)
            self.meter = Throughput(self.config.train.batch_size, flops, peak * self.mesh.size if peak else None)
            self.metered = phase

    def _record(self, step: int, metrics: Metrics, bar: Any) -> None:
        self._check_finite()
        self.pending = (step, metrics)
        metrics["skipped_in_a_row"].copy_to_host_async()
        bar.update()
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            assert self.meter is not None
            speed = self.meter.report()
            self.writer.write(step, {**metrics, **speed, "learning_rate": self.schedule(step - 1)})
            bar.set_postfix_str(f"{speed['images_per_second']:.0f} images/s, data wait {100 * speed['data_wait']:.1f} %")

    def _check_finite(self) -> None:
        """Looks at the update before: the one at hand is still running."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        in_a_row = int(jax.device_get(metrics["skipped_in_a_row"]))
        if in_a_row:
            logger.warning("update %d skipped: its loss or a gradient is not finite", step)
        if in_a_row >= self.config.train.max_nan:
            indices = self.batches.indices(step - 1).tolist()
            raise TrainingFailed(f"{in_a_row} updates in a row were not finite, up to step {step}; its batch held the examples {indices}")

    def _progress(self, start: int) -> Any:
        return tqdm(
            total=self.config.train.steps,
            initial=start,
            desc=self.stage.name,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 15,
            disable=jax.process_index() > 0,
        )


def step_flops(stage: Stage, batches: Batches, state: State, phase: bool) -> int:
    """Operations of one update on the global batch, counted from its trace."""
    rows = stage.config.train.batch_size
    example = batches.batch(0)
    batch = {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in example.items() if isinstance(v, np.ndarray)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return count_flops(lambda s, b, f, r: stage.update(s, b, f, r, phase), abstract, batch, stage.frozen, jax.random.key(0))
