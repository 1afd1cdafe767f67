"""Runs of several processes, on CPUs that gloo connects: their numbers, and how they end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
LIMIT = 900  # seconds for what never takes as long
BOUND = 120  # seconds within which the loss of a process must end the others


class Job:
    """Processes of `tests.worker` that share a run."""

    def __init__(self, logs: Path, number: int, devices: int, *arguments: object, **variables: str) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{time.time_ns()}-{which}.txt" for which in range(number)]
        head = [sys.executable, "-m", "tests.worker", address if number > 1 else "-", str(number)]
        self.processes = []
        for which, log in enumerate(self.logs):
            with log.open("w") as file:
                command = [*head, str(which), *map(str, arguments)]
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=env | variables, stdout=file, stderr=file))

    def codes(self, limit: float = LIMIT) -> list[int]:
        """Exit codes of all, which end within that many seconds."""
        until = time.monotonic() + limit
        try:
            return [process.wait(max(until - time.monotonic(), 0.01)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def finish(self) -> None:
        codes = self.codes()
        assert codes == [0] * len(codes), [log.read_text()[-3000:] for log in self.logs]

    def signal(self, which: int, number: int, when: Callable[[], bool]) -> None:
        """Sends a signal to one process once that is so."""
        until = time.monotonic() + LIMIT
        while not when():
            assert all(process.poll() is None for process in self.processes), [log.read_text()[-3000:] for log in self.logs]
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(self.processes[which].pid, number)

    def last_line(self, which: int) -> str:
        return self.logs[which].read_text().splitlines()[-1]


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def final(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "final.npz") as file:
        return dict(file)


def left(run: Path) -> list[str]:
    """What a run leaves but for its checkpoints; the latents' directory has the name of the weights, bit for bit."""
    kinds = (".json", ".jsonl", ".safetensors", ".png", ".array_record")
    files = [path.relative_to(run) for path in run.rglob("*") if path.suffix in kinds and "checkpoints" not in path.parts]
    return sorted(re.sub(r"^latents/\w+/", "latents/*/", str(file)) for file in files)


def losses(run: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])


def assert_same_end(run: Path, other: Path) -> None:
    one, two = final(run), final(other)
    assert one.keys() == two.keys() and len(one) > 5
    for name, leaf in one.items():
        assert leaf.tobytes() == two[name].tobytes(), name
    assert losses(run).tobytes() == losses(other).tobytes() and len(losses(run)) == 20


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, each with a half of all parameters and of every batch, to their end."""
    path = tmp_path_factory.mktemp("processes") / "undisturbed"
    Job(path, 2, 1, "stage", path, 2).finish()
    return path


@pytest.fixture
def stopped(undisturbed: Path, tmp_path: Path) -> Path:
    """The same run, stopped by a signal to the second process."""
    path = tmp_path / "stopped"
    job = Job(path, 2, 1, "stage", path, 2, TEST_PAUSE="0.3")
    job.signal(1, signal.SIGTERM, lambda: steps(path) >= 3)
    assert job.codes() == [75, 75], [log.read_text()[-3000:] for log in job.logs]
    said = [job.last_line(which) for which in (0, 1)]
    assert said[0] == said[1] and "with a complete checkpoint" in said[0]
    assert f"step {checkpoints(path)[-1]} " in said[0] and 3 < checkpoints(path)[-1] < 20
    return path


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_stopped_run_goes_on_in_any_number_of_processes(undisturbed: Path, stopped: Path, number: int) -> None:
    Job(stopped, number, 1, "stage", stopped, number).finish()
    if number == 2:
        assert_same_end(undisturbed, stopped)
    else:
        np.testing.assert_allclose(losses(stopped), losses(undisturbed), rtol=1e-5)
        for name, leaf in final(undisturbed).items():
            assert np.abs(leaf.astype(float) - final(stopped)[name]).mean() < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_and_a_restart_changes_nothing(undisturbed: Path, tmp_path: Path, victim: int) -> None:
    job = Job(tmp_path, 2, 1, "stage", tmp_path, 2, TEST_PAUSE="0.3")
    job.signal(victim, signal.SIGKILL, lambda: steps(tmp_path) >= 8)
    codes = job.codes(BOUND)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert f"process {victim} " in job.last_line(1 - victim) and "is lost" in job.last_line(1 - victim)
    assert checkpoints(tmp_path) == [6]
    Job(tmp_path, 2, 1, "stage", tmp_path, 2).finish()
    assert_same_end(undisturbed, tmp_path)


@pytest.mark.slow
def test_a_process_that_is_frozen_is_as_good_as_lost(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, 1, "stage", tmp_path, 2, TEST_PAUSE="0.3")
    job.signal(1, signal.SIGSTOP, lambda: steps(tmp_path) >= 3)
    try:
        assert job.processes[0].wait(BOUND) == 1
    finally:
        job.processes[1].kill()
    assert job.last_line(0).startswith("error: process 1 of 2 is lost, nothing is heard of it")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_lives_and_waits_for_ever_ends_all(tmp_path: Path, victim: int) -> None:
    """For its data, here. A preview may take longer than that."""
    job = Job(tmp_path, 2, 1, "stage", tmp_path, 2, TEST_HANG_AT=f"{victim}:5", TEST_STALL="12", TEST_SLOW="25")
    assert job.codes(BOUND) == [1, 1], [log.read_text()[-3000:] for log in job.logs]
    line = f"error: no process has begun an update for 12 s (train.stall_after); still in update 6: process {victim} of 2;"
    assert all(job.last_line(which).startswith(line) for which in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stop_while_one_process_works_alone_is_heard_by_all(tmp_path: Path, victim: int) -> None:
    job = Job(tmp_path, 2, 1, "stage", tmp_path, 1, TEST_ALONE="600")
    job.signal(victim, signal.SIGTERM, (tmp_path / "alone").exists)
    assert job.codes(BOUND) == [75, 75]
    assert {job.last_line(which) for which in (0, 1)} == {"stopped; the same command goes on from there"}


@pytest.mark.slow
def test_a_stop_during_an_evaluation_is_heard_by_all_between_two_batches(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, 1, "stage", tmp_path, 2, TEST_EVALUATE="1")
    job.signal(1, signal.SIGTERM, (tmp_path / "evaluating").exists)
    assert job.codes(BOUND) == [75, 75], [log.read_text()[-3000:] for log in job.logs]
    assert {job.last_line(which) for which in (0, 1)} == {
        "stopped at step 5 with a complete checkpoint; the same command goes on from there"
    }
    assert checkpoints(tmp_path) == [5] and not (tmp_path / "evaluations").exists()


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_in_one_process_ends_all_with_its_reason(tmp_path: Path, broken: int) -> None:
    job = Job(tmp_path, 2, 1, "stage", tmp_path, 1, TEST_FAIL_AT=f"{broken}:5")
    assert job.codes() == [2, 2]
    assert job.last_line(broken) == "error: the data of batch 5 cannot be read"
    assert job.last_line(1 - broken) == f"error: process {broken} of 2 has ended: the data of batch 5 cannot be read"


def signalled(tmp_path: Path, *kinds: str) -> Job:
    """A job of processes of those kinds of `tests.worker`, all at it."""
    job = Job(tmp_path, len(kinds), 1, "signals", tmp_path / "ready", *kinds)
    for which in range(len(kinds)):
        job.signal(which, 0, (tmp_path / f"ready{which}").exists)
    return job


@pytest.mark.slow
def test_a_signal_to_all_ends_all_as_stopped_however_long_one_of_them_takes(tmp_path: Path) -> None:
    """Process 0 stays for the last one, as the store goes with it."""
    job = signalled(tmp_path, "outside", "outside", "deaf")
    for which in range(3):
        job.signal(which, signal.SIGTERM, lambda: True)
    assert job.codes(BOUND) == [75, 75, 75], [log.read_text()[-3000:] for log in job.logs]
    assert {job.last_line(which) for which in (0, 1)} == {"stopped; the same command goes on from there"}


@pytest.mark.slow
def test_a_process_that_hears_of_a_stop_before_its_loop_stops_with_the_others(tmp_path: Path) -> None:
    """And is not ended in the midst of an update that takes long."""
    job = signalled(tmp_path, "turns", "late")
    job.signal(0, signal.SIGTERM, lambda: True)
    assert job.codes(BOUND) == [75, 75], [log.read_text()[-3000:] for log in job.logs]
    assert {job.last_line(which) for which in (0, 1)} == {"stopped before turn 1"}


@pytest.mark.slow
def test_who_waits_for_a_process_that_has_left_too_soon_ends_as_stopped(tmp_path: Path) -> None:
    job = signalled(tmp_path, "long", "quits")
    job.signal(1, signal.SIGTERM, lambda: True)
    assert job.codes(BOUND) == [75, 75], [log.read_text()[-3000:] for log in job.logs]
    assert job.last_line(0) == "stopped; the same command goes on from the last checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_an_interrupt_that_waits_for_no_checkpoint_ends_all(tmp_path: Path, victim: int) -> None:
    """The second SIGINT to a process in its loop."""
    job = signalled(tmp_path, "long", "long")
    job.signal(victim, signal.SIGINT, lambda: True)
    time.sleep(3)
    job.signal(victim, signal.SIGINT, lambda: True)
    assert job.codes(BOUND) == [130, 130], [log.read_text()[-3000:] for log in job.logs]
    assert job.last_line(victim) == "interrupted"
    assert job.last_line(1 - victim) == f"error: process {victim} of 2 has ended: interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("full", [0, 1])
def test_a_checkpoint_that_one_process_cannot_write_ends_all(tmp_path: Path, full: int) -> None:
    """Soon, and not when a barrier of Orbax gives up after 20 minutes."""
    job = Job(tmp_path, 2, 1, "stage", tmp_path, 2, TEST_FULL_AT=f"{full}:8", TEST_PAUSE="0.3")
    assert job.codes(BOUND) == [2, 2], [log.read_text()[-3000:] for log in job.logs]
    reason = f"no disk space left for checkpoints in {tmp_path}/checkpoints"
    assert job.last_line(full).startswith(f"error: {reason}")
    assert job.last_line(1 - full).startswith(f"error: process {full} of 2 has ended: {reason}")
    assert checkpoints(tmp_path) == [6]


@pytest.mark.slow
def test_processes_with_other_configurations_do_not_begin(tmp_path: Path) -> None:
    job = Job(tmp_path, 2, 1, "train", tmp_path / "run", TEST_FLAGS_1="--config.optimizer.learning_rate=0.5")
    assert job.codes(BOUND) == [2, 2], [log.read_text()[-3000:] for log in job.logs]
    assert "process 1 of 2 has optimizer.learning_rate=0.5, and process 0 optimizer.learning_rate=" in job.last_line(0)
    assert not (tmp_path / "run").exists()


DEVICES = 4
MESHES = {"data": "4-1", "fsdp": "1-4", "mixed": "2-2"}
KINDS = ("autoencoder", "moments")
NAMES = [f"{kind}-float64-{mesh}" for kind in KINDS for mesh in MESHES.values()] + [f"{kind}-float32-{MESHES['mixed']}" for kind in KINDS]


NAMES_OF = {2: NAMES, 4: [name for name in NAMES if name.endswith(MESHES["mixed"])]}  # whose programs have the collectives of both others


@pytest.fixture(scope="module")
def numbers_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, np.ndarray]]:
    """By the number of processes, which make them once."""

    @cache
    def made(number: int) -> dict[str, np.ndarray]:
        path = tmp_path_factory.mktemp("updates")
        Job(path, number, DEVICES // number, "updates", path / "numbers.npz", *NAMES_OF[number]).finish()
        with np.load(path / "numbers.npz") as file:
            return dict(file)

    return made


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("number", "name"),
    [pytest.param(number, name, id=f"{number}-processes-{name}") for number, names in NAMES_OF.items() for name in names],
)
def test_twenty_updates_equal_those_of_one_device(numbers_of: Callable[[int], dict[str, np.ndarray]], number: int, name: str) -> None:
    from tests.training.test_invariance import LOSSES, assert_equal_runs, updates

    numbers, (kind, dtype, *_) = numbers_of(number), name.split("-")
    metrics = {key: numbers[f"{name}/{key}"] for key in LOSSES[kind]}
    ema = [numbers[f"{name}/ema{i}"] for i in range(sum(key.startswith(f"{name}/ema") for key in numbers))]
    assert_equal_runs(kind, dtype, updates(kind, dtype, 1, 1), (metrics, ema))


@pytest.mark.slow
def test_a_whole_run_of_two_processes_leaves_the_model_of_one(tmp_path: Path) -> None:
    """Stopped while the first process is alone at the report, and started again."""
    alone, two = tmp_path / "alone", tmp_path / "two"
    Job(tmp_path, 1, 1, "train", alone).finish()
    two.mkdir()
    shutil.copytree(alone / "compilation_cache", two / "compilation_cache")
    fsdp = ("--config.mesh.data=1", "--config.mesh.fsdp=2")
    job = Job(tmp_path, 2, 1, "train", two, *fsdp)
    job.signal(1, signal.SIGTERM, lambda: (two / "samples" / "00000020.png").exists())
    assert job.codes() == [75, 75], [log.read_text()[-3000:] for log in job.logs]
    assert not (two / "model").exists()
    Job(tmp_path, 2, 1, "train", two, *fsdp).finish()

    assert left(alone) == left(two)
    files = sorted(alone.rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        one, other = load_file(file), load_file(two / file.relative_to(alone))
        assert one.keys() == other.keys()
        for name, leaf in one.items():
            assert np.abs(leaf - other[name]).mean() < 1e-4, name  # 20 updates of Adam in float32 against a discriminator
    for run, name in (("first_stage", "loss/nll"), (".", "loss")):
        lines = [[json.loads(line) for line in (path / run / "metrics.jsonl").read_text().splitlines()] for path in (alone, two)]
        found = [[(line["step"], line[name]) for line in own if name in line] for own in lines]
        assert [step for step, _ in found[1]] == list(range(1, 21))
        np.testing.assert_allclose(*found, rtol=1e-4)
