"""launch/encode.sh with real processes: each shard is written once, by whose it is, and a job that was killed goes on where it was."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm_jax.data.latents import MARKER, LatentCache
from ldm_jax.latent_diffusion import LatentDiffusion
from tests import tiny
from tests.launching import Cloud, until

CONFIG = """
from tests import tiny

def get_config():
    config = tiny.config()
    config.data.size = 13_000  # four shards
    return config
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with a first stage of random weights, and config.py beside it."""
    path = tmp_path_factory.mktemp("encode")
    (path / "config.py").write_text(CONFIG)
    cfg = tiny.config()
    with tiny.quick_compilation():
        stage, params = tiny.first_stage(cfg)
        info = {"task": "autoencoder", "step": 10, "resolution": cfg.data.resolution}
        LatentDiffusion(stage, None, {"first_stage": params}, info).save(path / "run" / "first_stage" / "model")
    return path / "run"


def shards(run: Path) -> dict[str, tuple[int, int]]:
    """Of each whole shard what changes when it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in run.glob("latents/*/shard-*")}


@pytest.mark.slow
def test_two_processes_write_each_shard_once_and_go_on_where_they_were_killed(run: Path, tmp_path: Path) -> None:
    cloud = Cloud(tmp_path / "cloud", {})
    cloud.script("bin/python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    flags = ("--config", str(run.parent / "config.py"), "--workdir", str(run))
    env = {"PROCESSES": "2", "PORT": str(20_000 + os.getpid() % 10_000), "RETRIES": "0"}
    killed = cloud.start("encode.sh", *flags, **env)
    until(lambda: shards(run) or killed.poll() is not None, 300)
    os.killpg(killed.pid, signal.SIGKILL)
    said, _ = killed.communicate(timeout=60)
    before = shards(run)
    assert before, said

    done = cloud.run("encode.sh", *flags, **env)
    assert done.returncode == 0, done.stderr
    after = shards(run)
    assert len(after) == 4 and {name: after[name] for name in before} == before
    (directory,) = (run / "latents").iterdir()
    assert done.stdout.count(f"latents: {directory}") == 2 and (directory / MARKER).exists()
    (directory / MARKER).unlink()
    (directory / sorted(after)[2]).unlink()
    assert cloud.run("encode.sh", *flags, **env | {"PROCESSES": "1"}).returncode == 0
    again = shards(run)
    assert {name for name in again if again[name] != after[name]} == {sorted(after)[2]}
    cache = LatentCache(directory, directory.name)
    assert len(cache) == 13_000 and all(np.isfinite(cache[i]["moments"]).all() for i in range(0, 13_000, 999))
