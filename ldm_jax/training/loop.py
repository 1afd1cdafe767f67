"""The training loop of both stages.

The order of things in one turn, which resuming relies on:
  1. a checkpoint, if one or an evaluation is due, or a stop was asked for, before the next batch is drawn;
  2. the preview, if one is due (step 0 included), and the evaluation;
  3. the batch of this step, a function of (seed, step);
  4. the update, started and not waited for;
  5. the metrics of the update before, fetched and written while this one runs.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from ldm_jax.config import WorkDir
from ldm_jax.data.pipeline import Batches
from ldm_jax.errors import Stopped, TrainingFailed
from ldm_jax.paths import make_directory, write_json
from ldm_jax.sharding.chips import find_chip
from ldm_jax.sharding.mesh import batch_sharding, check_batch, local_rows, replicated, to_global
from ldm_jax.sharding.processes import exchange, from_first
from ldm_jax.sharding.rules import from_config, shardings
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.flops import count_flops
from ldm_jax.training.metrics import Goodput, MetricWriter, Throughput, memory_in_use
from ldm_jax.training.optimizer import schedule_from_config
from ldm_jax.training.preview import save_grid
from ldm_jax.training.profile import Profiler
from ldm_jax.training.signals import StopSignals
from ldm_jax.training.state import Metrics, State, before_skipped, with_params

logger = logging.getLogger(__name__)
_NAMED = 16  # examples of a batch that a message names; the file that it points to has all


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
    def without_remat(self) -> "Stage": ...
    def preview(self, state: State) -> tuple[np.ndarray, int, list[str] | None]:
        """(images uint8 [N,H,W,3], columns of the grid, captions)."""
        ...

    def evaluate(self, state: State, between: Callable[[], None]) -> dict[str, float]:
        """Scores on what the stage is not trained on; `between` is called before each batch, and raises where the run is to stop."""
        ...

    def notes(self) -> Iterator[str]: ...


def abstract_state(stage: Stage, mesh: Mesh) -> State:
    """Shapes, types and placement of a stage's state."""
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    placement = shardings(shapes, mesh, from_config(stage.config.mesh.rules))
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placement)


def jit_update(stage: Stage, mesh: Mesh, state: State) -> Any:
    """`stage.update`, jitted, sharded over the mesh like `state` (arrays or their abstract likes), its state donated."""
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    whole = replicated(mesh)
    return jax.jit(
        stage.update,
        static_argnums=4,
        in_shardings=(placement, batch_sharding(mesh), whole, whole),
        out_shardings=(placement, whole),
        donate_argnums=0,
    )


def make_step(stage: Stage, mesh: Mesh, state: State) -> Callable[..., tuple[State, Metrics]]:
    """`step(state, batch, root, phase) -> (state, metrics)` of a stage on a mesh."""
    update, whole = jit_update(stage, mesh, state), replicated(mesh)
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
    config, began = stage.config, time.time()
    check_batch(config.train.batch_size, mesh, config.train.accumulation)
    with Checkpoints(workdir.checkpoints, config.checkpoint.every, config.checkpoint.keep) as checkpoints, jax.set_mesh(mesh):
        state, start = restore_or_init(stage, mesh, checkpoints)
        if start <= config.train.steps:
            with MetricWriter(workdir.path, start) as writer, StopSignals(config.train.stall_after) as signals:
                run = _Run(stage, workdir, mesh, checkpoints, writer, signals, Goodput(workdir.path, start, began))
                if start < config.train.steps:
                    state = run.steps(state, start)
                    run.save(config.train.steps, state, wait=True)  # before anything that may fail
                run.finish(state)
                if signals.requested:
                    raise Stopped(f"stopped after the last step of the {stage.name}; the same command goes on from there")
    return state


class _Run:
    """One session of a run: what the turns of the loop share."""

    def __init__(
        self,
        stage: Stage,
        workdir: WorkDir,
        mesh: Mesh,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        signals: StopSignals,
        goodput: Goodput,
    ) -> None:
        self.stage, self.config, self.workdir, self.mesh = stage, stage.config, workdir, mesh
        self.checkpoints, self.writer, self.signals, self.goodput = checkpoints, writer, signals, goodput
        self.root = jax.device_put(jax.random.key(self.config.seed), replicated(mesh))
        self.batches = stage.batches(rows=local_rows(self.config.train.batch_size, mesh))
        self.schedule = schedule_from_config(self.config.optimizer, self.config.train.steps)
        chip = find_chip(jax.devices()[0].device_kind)
        self.meter = Throughput(self.config.train.batch_size, mesh.size, chip.peak_bf16 if chip else None)
        self.norm = jax.jit(optax.tree.norm)
        self.flops: dict[tuple[Any, ...], int] = {}  # of one update, by its program
        self.pending: tuple[int, Metrics] | None = None

    def steps(self, state: State, start: int) -> State:
        """The turns of the loop, in the order that the module's docstring gives."""
        total = self.config.train.steps
        step_fn = make_step(self.stage, self.mesh, state)
        for note in self.stage.notes() if start == 0 else ():
            logger.warning(note)
        profiler = Profiler(self.workdir.profile, self.config.train.profile, start)
        self.meter.begin()
        with closing(self.batches.iterate(start)) as data, self._progress(start) as bar, profiler:
            for step in range(start, total):
                self._between(state, step)
                if profiler.starts(step + 1):
                    jax.block_until_ready(state)
                with profiler.update(step + 1):
                    with self.meter.waiting():
                        batch = next(data)
                    program = (self.stage.phase(step), *(v.shape for v in batch.values() if isinstance(v, np.ndarray)))
                    with self._compiling(program, state, batch), jax.transfer_guard("disallow"):
                        state, metrics = step_fn(state, to_global(batch, self.mesh), self.root, program[0])
                self.meter.step(self.flops[program])
                profiler.started(step + 1, metrics)
                self._record(step + 1, state, metrics, bar)
        self._check_finite(state)
        return state

    def save(self, step: int, state: State, wait: bool = False) -> None:
        """A checkpoint, after what is written of the updates before it: who goes on from it keeps that."""
        self.writer.flush()
        self.goodput.save(step, self.meter.productive)
        self.checkpoints.save(step, state, wait=wait)

    def finish(self, state: State) -> None:
        """Preview and evaluation after the last update."""
        total = self.config.train.steps
        self._preview(state, total)
        if self.config.evaluate.every:
            self._evaluate(state, total)

    def _between(self, state: State, step: int) -> None:
        """Checkpoint, preview and evaluation before the batch of `step` is drawn."""
        stopping, every = self.signals.stops_before(step), self.config.evaluate.every
        evaluates = step > 0 and every > 0 and step % every == 0  # which takes long, so that a checkpoint comes before it
        if self.checkpoints.due(step) or stopping or evaluates or self.checkpoints.failed:
            self._check_finite(state)
            with self._pause(state):
                self.save(step, state, wait=stopping)
        if stopping:
            raise _stopped_at(step)
        if step % self.config.sample.every == 0:
            with self._pause(state):
                self._preview(state, step)
        if evaluates:
            with self._pause(state):
                self._evaluate(state, step)

    @contextmanager
    def _pause(self, state: State) -> Iterator[None]:
        """Around what is no training and begins by waiting for the state anyway."""
        jax.block_until_ready(state)
        with self.meter.paused():
            yield

    def _preview(self, state: State, step: int) -> None:
        path = self.workdir.samples / f"{step:08d}.png"
        if from_first(path.exists):
            return
        with self.signals.paused():
            images, columns, captions = self.stage.preview(state)
        if jax.process_index() == 0:
            save_grid(path, images, columns, captions)

    def _evaluate(self, state: State, step: int) -> None:
        """Leaves the scores after `step` updates in a file, once."""
        path = self.workdir.evaluations / f"{step:08d}.json"
        found = from_first(lambda: json.loads(path.read_text()) if path.exists() else None)  # of before a restart, cut from the metrics
        if found is None:
            with self.signals.paused():
                scores = self.stage.evaluate(state, lambda: self._stop_if_asked(state, step))
            found = {"step": step, **{name: value if math.isfinite(value) else None for name, value in scores.items()}}
            if jax.process_index() == 0:
                make_directory(path.parent)
                write_json(path, found)
        known = {name: value for name, value in found.items() if name != "step" and value is not None}
        self.writer.write(step, {f"evaluation/{name}": value for name, value in known.items()})

    def _stop_if_asked(self, state: State, step: int) -> None:
        """Of an evaluation after `step` updates, asked by all processes together: it is begun anew when the run goes on."""
        if any(exchange(self.signals.requested)):
            self.save(step, state, wait=True)
            raise _stopped_at(step)

    @contextmanager
    def _compiling(self, program: tuple[Any, ...], state: State, batch: Mapping[str, Any]) -> Iterator[None]:
        """Around the start of an update: the first one of each program, that is phase and shapes, waits for its compilation. Its operations
        are counted from its own trace."""
        if program in self.flops:
            yield
            return
        with self.meter.paused(), self.signals.paused():
            self.flops[program] = step_flops(self.stage, batch, state, program[0])
            yield

    def _record(self, step: int, state: State, metrics: Metrics, bar: Any) -> None:
        self._check_finite(state)
        self.pending = (step, metrics)
        metrics["skipped_in_a_row"].copy_to_host_async()
        bar.update()
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            speed = self.meter.report() | memory_in_use() | {"goodput": self.goodput.share(self.meter.productive)}
            self.writer.write(
                step, {**metrics, **speed, "parameter_norm": self.norm(state.params), "learning_rate": self.schedule(step - 1)}
            )
            bar.set_postfix_str(f"{speed['images_per_second']:.0f} images/s, data wait {100 * speed['data_wait']:.1f} %")

    def _check_finite(self, state: State) -> None:
        """Looks at the update before, as the one at hand, whose `state` this is, is still running."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        in_a_row = int(jax.device_get(metrics["skipped_in_a_row"]))
        if not in_a_row:
            return
        indices, path = self.batches.indices(step - 1).tolist(), self.workdir.not_finite / f"{step:08d}.json"
        if jax.process_index() == 0:
            make_directory(path.parent)
            write_json(path, {"step": step, "examples": indices})
        examples = f"{indices[:_NAMED]}" + (f" and {len(indices) - _NAMED} more" if len(indices) > _NAMED else "") + f" ({path})"
        logger.warning("update %d skipped: its loss or a gradient is not finite; its batch held the examples %s", step, examples)
        if in_a_row >= self.config.train.max_nan:
            raise TrainingFailed(
                f"{in_a_row} updates in a row were not finite, up to step {step}; its batch held the examples {examples};"
                f" {self._keep_good(state)}; a larger max_nan skips more"
            )

    def _keep_good(self, state: State) -> str:
        """Leaves a checkpoint of the state before the updates skipped in a row, where none holds it, and says what there is."""
        good = before_skipped(state)
        step, kept = int(good.step), self.checkpoints.latest() or 0
        if step > kept:
            self.save(step, good, wait=True)
        at = max(step, kept)
        return f"the parameters before them are in the checkpoint of step {at}" if at else "there was no update before them"

    def _progress(self, start: int) -> Any:
        return tqdm(
            total=self.config.train.steps,
            initial=start,
            desc=self.stage.name,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 15,
            disable=jax.process_index() > 0,
        )


def _stopped_at(step: int) -> Stopped:
    return Stopped(f"stopped at step {step} with a complete checkpoint; the same command goes on from there")


def step_flops(stage: Stage, batch: Mapping[str, Any], state: State, phase: bool) -> int:
    """Operations of one update on a global batch of whose examples `batch` has some, counted from its trace, without what is computed
    anew to save memory."""
    rows = stage.config.train.batch_size
    whole = {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in batch.items() if isinstance(v, np.ndarray)}
    return update_flops(stage.without_remat(), state, whole, phase)


def update_flops(stage: Stage, state: State, batch: Mapping[str, Any], phase: bool) -> int:
    """Operations of one update of a stage, on a state and a global batch that may be abstract; what it computes anew counts."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, dict(batch), stage.frozen))
    return count_flops(lambda s, b, f, r: stage.update(s, b, f, r, phase), *abstract, jax.random.key(0))
