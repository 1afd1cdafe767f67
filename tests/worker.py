"""One of several processes of a test: `python -m tests.worker ADDRESS NUMBER WHICH JOB ...` (ADDRESS "-": alone).

updates OUT NAME ...        the runs of `tests/training/test_invariance.py` of these names, their numbers into OUT.npz by process 0
stage KIND WORKDIR FSDP     `loop.train` of a tiny stage of a kind of that module, 20 updates; the state into WORKDIR/final.npz
signals READY KIND ...      no work at all, but hearing signals as `KINDS` says of each process's kind; READY0, READY1, ... when it begins
train WORKDIR [--config...] the front door, `ldm_jax.train`, with the configuration `tests/tiny_run.py`
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_jax import cli

LONG = 600.0  # seconds, as for ever
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def updates(out: str, *names: str) -> int:
    import jax
    import numpy as np

    from tests.training.test_invariance import LOSSES, updates

    found = {}
    for name in names:
        kind, dtype, *mesh = name.split("-")
        metrics, ema = updates(kind, dtype, *map(int, mesh))
        found |= {f"{name}/{key}": metrics[key] for key in LOSSES[kind]} | {f"{name}/ema{i}": leaf for i, leaf in enumerate(ema)}
    if jax.process_index() == 0:
        np.savez(out, **found)
    return cli.OK


def stage(workdir: str, fsdp: str) -> int:
    """With TEST_FAIL_AT=P:STEP process P finds its data broken there, with TEST_HANG_AT=P:STEP it waits for them for ever, and TEST_STALL
    seconds are the limit; with TEST_PAUSE each batch takes that many seconds to draw, with TEST_SLOW each preview;
    with TEST_EVALUATE an evaluation after 5 updates takes 600 batches of a second, and says so by the file WORKDIR/evaluating;
    with TEST_FULL_AT=P:STEP process P cannot write large files from there on, and the state is large; with TEST_ALONE process 0 is alone at
    work afterwards, and says so by the file WORKDIR/alone."""
    import resource

    import jax
    import numpy as np

    from ldm_jax.config import UserError, WorkDir
    from ldm_jax.sharding.mesh import make_mesh, on_host
    from ldm_jax.sharding.processes import from_first
    from ldm_jax.training import loop
    from ldm_jax.training.signals import stopping_at_once
    from tests import tiny
    from tests.training.test_loop import LineStage, Numbers

    config = tiny.config()
    config.train.steps = 20
    config.optimizer.update(learning_rate=0.1)
    config.checkpoint.update(every=6)
    config.train.stall_after = float(os.environ.get("TEST_STALL", "0"))
    full = os.environ.get("TEST_FULL_AT", "")

    def draw(step: int) -> None:
        here = f"{jax.process_index()}:{step}"
        if here == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
        time.sleep(float(os.environ.get("TEST_PAUSE", "0")))
        if here == os.environ.get("TEST_HANG_AT"):
            time.sleep(LONG)
        if here == os.environ.get("TEST_FAIL_AT"):
            raise UserError(f"the data of batch {step} cannot be read")

    class SlowStage(LineStage):
        def preview(self, state: Any) -> Any:
            time.sleep(float(os.environ.get("TEST_SLOW", "0")))
            return super().preview(state)

    def work_alone() -> None:
        (Path(workdir) / "alone").touch()
        time.sleep(float(os.environ["TEST_ALONE"]))

    def evaluate(state: Any, between: Callable[[], None]) -> dict[str, float]:
        (Path(workdir) / "evaluating").touch()
        for _ in range(600):
            between()
            time.sleep(1 + 0.3 * jax.process_index())
        return {}

    config.evaluate.every = 5 if "TEST_EVALUATE" in os.environ else 0
    line = SlowStage(config, Numbers(), draw, width=200_000 if full else 64)
    line.evaluate = evaluate  # type: ignore[attr-defined]
    try:
        with stopping_at_once():
            state = loop.train(line, WorkDir(workdir), make_mesh(-1, int(fsdp)))
            if "TEST_ALONE" in os.environ:
                from_first(work_alone)
    except loop.Stopped as stop:
        sys.stderr.write(f"{stop}\n")
        return cli.STOPPED
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert len(split) == (4 if int(fsdp) > 1 else 0)  # parameters, average and the optimiser's two moments
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(on_host(state))}
    if jax.process_index() == 0:
        np.savez(Path(workdir) / "final.npz", **leaves)
    return cli.OK


def outside() -> None:
    time.sleep(LONG)


def deaf() -> None:
    """The main thread is in a long call, which no signal ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    time.sleep(LONG)


def turns(seconds: float, before: float = 0.0) -> None:
    """A loop whose turns take so long, begun so late."""
    from ldm_jax.errors import Stopped
    from ldm_jax.training.signals import StopSignals

    with StopSignals() as stop:
        time.sleep(before)
        for turn in range(1000):
            if stop.stops_before(turn):
                raise Stopped(f"stopped before turn {turn}")
            time.sleep(seconds)


def quits() -> None:
    """A loop that a stop ends before the step that was agreed on."""
    from ldm_jax.errors import Stopped
    from ldm_jax.training.signals import StopSignals

    with StopSignals() as stop:
        assert not stop.stops_before(0)
        while not stop.requested:
            time.sleep(0.1)
        time.sleep(4)
        raise Stopped("stopped too soon")


KINDS = {
    "outside": outside,
    "deaf": deaf,
    "turns": lambda: turns(10),
    "late": lambda: turns(10, before=4),
    "long": lambda: turns(LONG),
    "quits": quits,
}


def signals(ready: str, *kinds: str) -> int:
    """Each process as its kind says, inside of `stopping_at_once`."""
    import jax

    from ldm_jax.training.signals import stopping_at_once

    with stopping_at_once():
        Path(f"{ready}{jax.process_index()}").touch()
        KINDS[kinds[jax.process_index()]]()
    return cli.OK


def front_door(address: str, number: str, which: str, workdir: str, *overrides: str) -> int:
    """With TEST_FLAGS_P process P has further flags."""
    from ldm_jax import train

    group = [] if address == "-" else ["--coordinator", address, "--num-processes", number, "--process-id", which]
    sys.argv = ["train", "--config", "tests/tiny_run.py", "--workdir", workdir, *group, *overrides]
    sys.argv += os.environ.get(f"TEST_FLAGS_{which}", "").split()
    return train.main()


def main() -> int:
    address, number, which, job, *arguments = sys.argv[1:]
    from ldm_jax.sharding import rules

    rules.MIN_SPLIT_ELEMENTS = 128  # so that fsdp splits what is tiny
    if job == "train":
        return front_door(address, number, which, *arguments)
    cli.start("float32", *(() if address == "-" else (address, int(number), int(which))))
    return {"updates": updates, "stage": stage, "signals": signals}[job](*arguments)


if __name__ == "__main__":
    cli.guarded(main)
