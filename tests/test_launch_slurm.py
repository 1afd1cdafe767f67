"""launch/slurm.sbatch as the batch script of a job, with srun and scontrol stood in for; launch/encode.sh that submits it."""

import shlex
import signal
from pathlib import Path

import pytest

from tests.launching import ROOT, Cloud, until

# The first words that are no flags of its own are the command, once for each of two processes; its own code is the highest.
SRUN = """
trap 'kill -TERM $pids 2>/dev/null' TERM
while [ "${1#--}" != "$1" ]; do shift; done
for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@" & pids="$pids $!"; done
for pid in $pids; do while :; do wait $pid; code=$?; kill -0 $pid 2>/dev/null || break; done; [ $code -le ${worst:-0} ] || worst=$code; done
exit ${worst:-0}
"""
JOB = """#!/bin/bash
echo "$SLURM_PROCID $XLA_FLAGS" >> "$CLOUD/started"
attempt=$(grep -c "^$SLURM_PROCID" "$CLOUD/started")
"""


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path / "cloud", {"srun": SRUN, "scontrol": "", "sbatch": ""})


JOB_ENV = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}


def tools(cloud: Cloud) -> list[str]:
    """What was called, without the command of srun."""
    return [" ".join(call[:2]) if call[0] == "srun" else " ".join(call) for call in cloud.calls()]


def test_it_asks_for_a_process_a_gpu_a_warning_and_requeueing() -> None:
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--signal=B:USR1@120", "--requeue", "--open-mode=append"} < set(asked)
    assert text.index("#SBATCH") < text.index("set -euo")  # sbatch reads no further than the first command


def test_a_job_that_finishes(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB)
    done = cloud.run("slurm.sbatch", "job", **JOB_ENV, XLA_FLAGS="--x")
    assert done.returncode == 0 and tools(cloud) == ["srun --kill-on-bad-exit=1"], done.stderr
    assert sorted(cloud.lines("started")) == ["0 --x", "1 --x"]


def test_a_stop_with_a_checkpoint_goes_back_to_the_queue(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB + "exit 75\n")
    done = cloud.run("slurm.sbatch", "job", **JOB_ENV)
    assert done.returncode == 75 and tools(cloud) == ["srun --kill-on-bad-exit=1", "scontrol requeue 7"]
    done = cloud.run("slurm.sbatch", "job", **JOB_ENV, SLURM_RESTART_COUNT="10")
    assert "given up" in done.stderr and tools(cloud)[2:] == ["srun --kill-on-bad-exit=1"]
    cloud.script("bin/job", JOB + 'mkdir -p "$CLOUD/run/checkpoints/8"\nexit 75\n')
    cloud.run("slurm.sbatch", "job", "--workdir", str(cloud.path / "run"), **JOB_ENV, SLURM_RESTART_COUNT="10")
    assert tools(cloud)[-1] == "scontrol requeue 7"


def test_bad_input_is_final_and_faults_are_tried_again_on_the_same_nodes(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB + "[ $SLURM_PROCID = 0 ] || exit 2\n")
    assert cloud.run("slurm.sbatch", "job", **JOB_ENV).returncode == 2 and len(tools(cloud)) == 1
    cloud.script("bin/job", JOB + "exit 3\n")
    assert cloud.run("slurm.sbatch", "job", **JOB_ENV, RETRIES="2").returncode == 3
    assert tools(cloud)[1:] == ["srun --kill-on-bad-exit=1"] * 3


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["warning", "scancel"])
def test_a_warning_reaches_all_processes_and_requeues_but_scancel_does_not(cloud: Cloud, number: signal.Signals, requeued: bool) -> None:
    """The second process was killed when the first ended with 75, as --kill-on-bad-exit does; what srun returns then is no 75."""
    trap = "\ntrap 'exit $((SLURM_PROCID == 0 ? 75 : 143))' TERM\n"
    cloud.script("bin/job", JOB.replace("\n", trap, 1) + "while :; do sleep 0.02; done\n")
    job = cloud.start("slurm.sbatch", "job", **JOB_ENV)
    until(lambda: len(cloud.lines("started")) == 2)
    job.send_signal(number)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 143 and ("scontrol requeue 7" in tools(cloud)) == requeued, said


def test_containers(cloud: Cloud) -> None:
    shown = cloud.run("slurm.sbatch", "job", "-m", DRY_RUN="1", CONTAINER="x.sif", MOUNTS="/data:/data").stdout
    assert shown == f"srun --kill-on-bad-exit=1 apptainer exec --nv --pwd {ROOT} --bind {ROOT},/data:/data x.sif job -m\n"
    shown = cloud.run("slurm.sbatch", "job", DRY_RUN="1", CONTAINER="registry#ldm_jax:cuda").stdout
    assert "--container-image=registry#ldm_jax:cuda" in shown and f"--container-mounts={ROOT}:{ROOT} job" in shown
    assert cloud.calls() == []


def test_outside_of_slurm_and_of_the_repository_it_says_so(cloud: Cloud, tmp_path: Path) -> None:
    assert "sbatch launch/slurm.sbatch" in cloud.run("slurm.sbatch", "job").stderr
    assert "call sbatch there" in cloud.run("slurm.sbatch", "job", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path)).stderr


def test_encode_goes_where_it_is_told(cloud: Cloud) -> None:
    flags = ("--config", "configs/txt2img.py:smoke", "--workdir", "/shared/run")
    done = cloud.run("encode.sh", *flags, SLURM="--nodes=2 --partition=gpu")
    command = ["python", "-m", "ldm_jax.encode", *flags]
    assert done.returncode == 0 and cloud.calls() == [["sbatch", "--nodes=2", "--partition=gpu", "launch/slurm.sbatch", *command]]
    here = cloud.run("encode.sh", *flags, DRY_RUN="1", PROCESSES="2").stdout.splitlines()
    joined = [*command, "--coordinator", "localhost:12321", "--num-processes", "2", "--process-id"]
    assert sorted(shlex.split(line)[2:] for line in here) == [[*joined, "0"], [*joined, "1"]]
    slice_ = cloud.run("encode.sh", *flags, DRY_RUN="1", TPU="pod", ZONE="zone", TYPE="v6e-64").stdout
    assert "python -m ldm_jax.encode --config configs/txt2img.py:smoke --workdir /shared/run --coordinator auto" in slice_
    assert len(cloud.calls()) == 1
