"""A run of the `smoke` preset that is killed again and again ends with the bytes of one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import tiny

KILLS = int(os.environ.get("LDM_JAX_KILLS", "20"))  # in all, at least 11
STEPS = 32
LIMIT = 600  # seconds a process may take to reach the moment of its kill
ROOT = Path(__file__).parents[1]


def command(workdir: Path, *overrides: str) -> list[str]:
    often = ["--config.train.log_every=1", "--config.first_stage.train.log_every=1"]  # so that each step shows
    return [sys.executable, "-m", "ldm_jax.train", "--config", "configs/txt2img.py:smoke", "--workdir", str(workdir), *often, *overrides]


def start(workdir: Path, log: Path, *overrides: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device
    env |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with log.open("a") as file:
        return subprocess.Popen(command(workdir, *overrides), cwd=ROOT, env=env, stdout=file, stderr=file)


def finish(workdir: Path, log: Path, *overrides: str, code: int = 0) -> None:
    process = start(workdir, log, *overrides)
    try:
        assert process.wait(LIMIT) == code, log.read_text()[-3000:]
    finally:
        process.kill()


def kill_at(workdir: Path, log: Path, reached: Callable[[float], bool], delay: float) -> None:
    """Starts the run and kills it `delay` seconds after `reached(its start)`, with a signal that it cannot answer."""
    since = time.time()
    process = start(workdir, log)
    try:
        while not reached(since):
            assert process.poll() is None, f"ended before the moment of its kill: {log.read_text()[-3000:]}"
            assert time.time() < since + LIMIT, f"never came to the moment of its kill: {log.read_text()[-3000:]}"
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def last_step(run: Path, since: float) -> int:
    """The last step that metrics.jsonl shows, 0 where it was not opened after `since`: what a killed process wrote is cut at the resume."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() and file.stat().st_mtime > since else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def unfinished(run: Path) -> set[Path]:
    """What a checkpoint is called while it is written."""
    return set(run.glob("checkpoints/*.orbax-checkpoint-tmp"))


def writing(run: Path, since: float) -> bool:
    """Whether a checkpoint is being written that was begun after `since`."""
    try:
        return any(path.stat().st_mtime > since and (run / "metrics.jsonl").stat().st_mtime > since for path in unfinished(run))
    except FileNotFoundError:  # it has its name now
        return False


def moments(workdir: Path, rng: random.Random) -> list[tuple[str, Callable[[float], bool], float]]:
    """Where the run is killed, in the order in which it comes there, and seconds at most between that moment and the kill."""

    def of_stage(run: Path, number: int) -> list[tuple[str, Callable[[float], bool], float]]:
        half = STEPS // 2
        early, late = sorted(rng.sample(range(1, half), number - number // 2)), sorted(rng.sample(range(half, STEPS), number // 2))
        inside = [(f"{run.name} step {step}", lambda since, step=step: last_step(run, since) >= step, 0.2) for step in (*early, *late)]
        write = (f"{run.name} writes a checkpoint", lambda since: writing(run, since), 0.02)
        inside.insert(len(early), write)
        inside.insert(1, write)
        return [*inside, (f"{run.name} before its model", lambda since: (run / "checkpoints" / str(STEPS)).exists(), 0.3)]

    encoding = ("encode", lambda since: any(workdir.glob("latents/*/.shard*.tmp")), 0.3)
    number = KILLS - 7  # those after a step, in both stages
    return [*of_stage(workdir / "first_stage", number // 2), encoding, *of_stage(workdir, number - number // 2)]


def checkpoint(run: Path) -> dict[str, np.ndarray]:
    """Every leaf of the last checkpoint, by its path."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(run / "checkpoints", item_handlers=ocp.StandardCheckpointHandler()) as manager:
        assert manager.latest_step() == STEPS
        tree = manager.restore(STEPS)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def losses(run: Path) -> list[tuple[int, dict[str, float]]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], {k: v for k, v in record.items() if k not in tiny.CLOCKED | {"step"}}) for record in records]


def assert_same_run(run: Path, expected: Path, files: list[Path]) -> None:
    """The same bytes in those files and in the last checkpoints, and the same losses."""
    for file in files:
        assert (run / file).read_bytes() == (expected / file).read_bytes(), file
    for stage in ("first_stage", ""):
        one, other = checkpoint(expected / stage), checkpoint(run / stage)
        assert one.keys() == other.keys() and len(one) > 100
        for path, leaf in one.items():
            assert leaf.dtype == other[path].dtype and leaf.tobytes() == other[path].tobytes(), path
        assert losses(run / stage) == losses(expected / stage)


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    undisturbed, killed, log = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "log.txt"
    finish(undisturbed, log)
    killed.mkdir()
    (killed / "compilation_cache").symlink_to(undisturbed / "compilation_cache")

    rng = random.Random(0)
    cut_short = 0
    for name, reached, longest in moments(killed, rng):
        begun = time.time()
        kill_at(killed, log, reached, rng.uniform(0, longest))
        inside = unfinished(killed / "first_stage") | unfinished(killed)
        cut_short += bool(inside)
        print(f"{time.time() - begun:5.1f} s  {name}  {sorted(path.name for path in inside) or ''}", flush=True)
    assert cut_short >= 2  # kills inside a write; those before had been removed at the next start
    finish(killed, log)
    assert not unfinished(killed / "first_stage") | unfinished(killed)

    files = sorted(p.relative_to(undisturbed) for p in undisturbed.rglob("*.safetensors"))
    assert len(files) == 4  # the first stage's model, and the three parts of the model
    files += [Path("oracle.json"), Path("tokenizer.json"), Path("model/model.json"), Path("samples/00000032.png")]
    files += [p.relative_to(undisturbed) for p in undisturbed.glob("latents/*/*.array_record")]
    assert_same_run(killed, undisturbed, files)
    # What a killed writer left may be another run's for an hour, but is never part of the cache (tests/data/test_latents.py).
    assert len(list(killed.glob("latents/*/*.array_record"))) == len(list(undisturbed.glob("latents/*/*.array_record")))

    check_more_steps(undisturbed, log)


def check_more_steps(finished: Path, log: Path) -> None:
    """A finished run goes on when it is given more steps, and its first stage does not move under the denoiser that learnt its latents."""
    before = {p: p.read_bytes() for p in finished.rglob("*.safetensors")}
    finish(finished, log, f"--config.first_stage.train.steps={STEPS + 4}", code=2)
    assert "choose another --workdir" in log.read_text().splitlines()[-1]
    assert before == {p: p.read_bytes() for p in finished.rglob("*.safetensors")}

    other = finished.parent / "other_first_stage"
    shutil.copytree(finished / "first_stage" / "model", other)
    weights = load_file(other / "first_stage" / "weights.safetensors")
    weights["conv_out.bias"] = weights["conv_out.bias"] + 1
    save_file(weights, other / "first_stage" / "weights.safetensors")
    finish(finished, log, f"--config.first_stage.path={other}", f"--config.train.steps={STEPS + 4}", code=2)
    assert "latents of another first stage" in log.read_text().splitlines()[-1]

    finish(finished, log, f"--config.train.steps={STEPS + 4}")
    moved = {str(p.relative_to(finished)) for p, old in before.items() if p.read_bytes() != old}
    assert moved == {"model/denoiser/weights.safetensors", "model/conditioner/weights.safetensors"}
    assert json.loads((finished / "model" / "model.json").read_text())["step"] == STEPS + 4
