"""A small run as a command, for tests that take the disk away from it.

    python -m tests.training.line_run WORKDIR STEPS [EVERY [PAUSE]]

Checkpoints of 4 MB every EVERY (4) updates, two of them kept; PAUSE: seconds before each batch. Exit codes are those of the commands.
"""

import sys
import time

import jax

from ldm_jax import cli
from ldm_jax.config import WorkDir
from ldm_jax.sharding.mesh import make_mesh
from ldm_jax.training import loop
from tests import tiny
from tests.training.test_loop import BATCH, LineStage, Numbers


def main() -> int:
    workdir, steps, every, pause = [*sys.argv[1:], "4", "0"][:4] if len(sys.argv) == 3 else [*sys.argv[1:], "0"][:4]
    cli.start()
    config = tiny.config()
    config.train.update(steps=int(steps), batch_size=BATCH, log_every=1)
    config.checkpoint.update(every=int(every), keep=2)
    stage = LineStage(config, Numbers(), lambda step: time.sleep(float(pause)), width=100_000)
    loop.train(stage, WorkDir(workdir), make_mesh(1, 1, jax.devices()[:1]))
    return cli.OK


if __name__ == "__main__":
    cli.guarded(main)
