"""One of several processes of a test: `python -m tests.worker ADDRESS NUMBER WHICH JOB ...` (ADDRESS "-": alone).

updates OUT NAME ...        the runs of `tests/training/test_invariance.py` of these names, their numbers into OUT.npz by process 0
stage KIND WORKDIR FSDP     `loop.train` of a tiny stage of a kind of that module, 20 updates; the state into WORKDIR/final.npz
train WORKDIR [--config...] the front door, `ldm_jax.train`, with the configuration `tests/tiny_run.py`
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_jax import cli


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
    """With TEST_FAIL_AT=P:STEP process P finds its data broken there; with TEST_PAUSE each batch takes that many seconds to draw;
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
    process, _, broken = os.environ.get("TEST_FAIL_AT", "").partition(":")
    full = os.environ.get("TEST_FULL_AT", "")

    def draw(step: int) -> None:
        if full == f"{jax.process_index()}:{step}":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
        time.sleep(float(os.environ.get("TEST_PAUSE", "0")))
        if process == str(jax.process_index()) and step == int(broken):
            raise UserError(f"the data of batch {step} cannot be read")

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
    line = LineStage(config, Numbers(), draw, width=200_000 if full else 64)
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
    return {"updates": updates, "stage": stage}[job](*arguments)


if __name__ == "__main__":
    cli.guarded(main)
