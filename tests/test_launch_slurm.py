"""launch/slurm.sbatch as the batch script of a job, with srun and scontrol stood in for; launch/encode.sh that submits it."""

import os
import shlex
import signal
import time
from pathlib import Path

import pytest

from tests.launching import ROOT, Cloud, until

# As the real one: two tasks, the highest of whose codes is its own (128 and the number of the signal for one that was killed); SIGTERM is
# not passed on, but kills them, as does the first that fails where it is told so.
SRUN = """
trap 'echo "srun: forcing job termination" >&2; kill -KILL $pids' TERM
for word; do case $word in --kill-on-bad-exit=1) kills=1 ;; --*) ;; *) break ;; esac; shift; done
for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@" & pids="$pids $!"; done
echo $pids > "$CLOUD/tasks"
left=$pids
while [ -n "$left" ]; do
    still=
    for pid in $left; do
        if kill -0 $pid 2>/dev/null; then still="$still $pid"; continue; fi
        wait $pid
        code=$?
        [ $code -le ${worst:-0} ] || worst=$code
        if [ $code != 0 ] && [ -n "$kills" ]; then kill -KILL $pids 2>/dev/null; fi
    done
    left=$still
    sleep 0.02
done
exit ${worst:-0}
"""
# Signals the tasks, and neither srun nor the batch script.
SCANCEL = """
[ "$2" = 7 ] && kill -s "${1#--signal=}" $(cat "$CLOUD/tasks")
"""
JOB = """#!/bin/bash
echo "$SLURM_PROCID $XLA_FLAGS" >> "$CLOUD/started"
attempt=$(grep -c "^$SLURM_PROCID" "$CLOUD/started")
"""


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    made = Cloud(tmp_path / "cloud", {"srun": SRUN, "scancel": SCANCEL, "scontrol": "", "sbatch": ""})
    (made.path / "submitted").mkdir()
    (made.path / "submitted" / "launch").symlink_to(ROOT / "launch")
    return made


STEP = "srun --kill-on-bad-exit=0 --wait=60"


def job_env(cloud: Cloud) -> dict[str, str]:
    """What Slurm sets, in a job that was submitted from a directory of the test."""
    return {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(cloud.path / "submitted")}


def tools(cloud: Cloud) -> list[str]:
    """What was called, without the command of srun."""
    return [" ".join(call[: call.index("job")] if call[0] == "srun" else call) for call in cloud.calls()]


def test_it_asks_for_a_process_a_gpu_a_warning_and_requeueing() -> None:
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=8",
        "--signal=B:USR1@120",
        "--requeue",
        "--open-mode=append",
    } < set(asked)
    assert text.index("#SBATCH") < text.index("set -euo")  # sbatch reads no further than the first command


def test_a_job_that_finishes(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB)
    done = cloud.run("slurm.sbatch", "job", **job_env(cloud), XLA_FLAGS="--x")
    assert done.returncode == 0 and tools(cloud) == [STEP], done.stderr
    assert sorted(cloud.lines("started")) == ["0 --x", "1 --x"]


def test_a_stop_with_a_checkpoint_goes_back_to_the_queue(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB + "exit 75\n")
    done = cloud.run("slurm.sbatch", "job", **job_env(cloud))
    assert done.returncode == 75 and tools(cloud) == [STEP, "scontrol requeue 7"]


def test_only_starts_without_a_new_checkpoint_are_counted(cloud: Cloud) -> None:
    def starts(number: int) -> list[str]:
        """What the job was said to do after each of some starts, which Slurm counts too."""
        run = ("job", "--workdir", str(cloud.path / "run"))
        done = [cloud.run("slurm.sbatch", *run, **job_env(cloud), RESTARTS="2", SLURM_RESTART_COUNT=str(i)) for i in range(number)]
        assert {one.returncode for one in done} == {75}
        return [one.stderr.rpartition(": ")[2].strip() for one in done]

    cloud.script("bin/job", JOB + 'mkdir -p "$CLOUD/run/checkpoints/$attempt"\nexit 75\n')
    assert starts(4) == ["back to the queue"] * 4
    cloud.script("bin/job", JOB + "exit 75\n")
    assert starts(2) == ["back to the queue", "given up"]  # the last of the four was the first without a successor
    assert not list((cloud.path / "submitted").glob("slurm-*"))


@pytest.mark.slow
def test_a_warning_between_two_starts_requeues_too(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB + "exit 3\n")
    cloud.script("bin/sleep", '#!/bin/bash\n[ "$1" = 7 ] || exec /bin/sleep "$@"\ntouch "$CLOUD/waits"\nexec /bin/sleep 30\n')
    job = cloud.start("slurm.sbatch", "job", **job_env(cloud), WAIT="7")
    until((cloud.path / "waits").exists)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 3 and tools(cloud)[-1] == "scontrol requeue 7", said


def test_bad_input_is_final_and_faults_are_tried_again_on_the_same_nodes(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB + "[ $SLURM_PROCID = 0 ] || exit 2\n")
    assert cloud.run("slurm.sbatch", "job", **job_env(cloud)).returncode == 2 and len(tools(cloud)) == 1
    cloud.script("bin/job", JOB + "exit 3\n")
    assert cloud.run("slurm.sbatch", "job", **job_env(cloud), RETRIES="2").returncode == 3
    assert tools(cloud)[1:] == [STEP] * 3


def test_the_first_to_end_does_not_cut_the_others_short(cloud: Cloud) -> None:
    """Process 0 says the reason last, as the others find it in its memory; nobody may kill it before."""
    cloud.script("bin/job", JOB + "[ $SLURM_PROCID = 1 ] || { sleep 0.5; echo 'error: no such file'; }\nexit 2\n")
    done = cloud.run("slurm.sbatch", "job", **job_env(cloud))
    assert done.returncode == 2 and "error: no such file" in done.stdout and tools(cloud) == [STEP]


TRAINS = JOB.replace("\n", "\ntrap 'echo $SLURM_PROCID >> \"$CLOUD/checkpoint\"; exit 75' TERM\n", 1) + "while :; do sleep 0.02; done\n"


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGINT, False)], ids=["warning", "stop"])
def test_a_warning_leads_to_a_checkpoint_in_all_processes(cloud: Cloud, number: signal.Signals, requeued: bool) -> None:
    cloud.script("bin/job", TRAINS)
    job = cloud.start("slurm.sbatch", "job", **job_env(cloud))
    until(lambda: len(cloud.lines("started")) == 2 and cloud.lines("tasks"))
    job.send_signal(number)
    said, _ = job.communicate(timeout=60)
    assert sorted(cloud.lines("checkpoint")) == ["0", "1"], said
    assert job.returncode == 75 and tools(cloud) == [STEP, "scancel --signal=TERM 7", *["scontrol requeue 7"] * requeued]


def test_the_end_of_the_job_is_left_to_slurm(cloud: Cloud) -> None:
    """After `scancel JOB`, or where a preemption gives time, the processes have had their SIGTERM and are not to be hurried."""
    cloud.script("bin/job", TRAINS)
    job = cloud.start("slurm.sbatch", "job", **job_env(cloud))
    until(lambda: len(cloud.lines("started")) == 2 and cloud.lines("tasks"))
    job.terminate()
    time.sleep(0.5)  # nothing is to happen
    assert job.poll() is None and not cloud.lines("checkpoint")
    for pid in cloud.lines("tasks")[0].split():
        os.kill(int(pid), signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert sorted(cloud.lines("checkpoint")) == ["0", "1"] and "forcing job termination" not in said
    assert job.returncode == 75 and tools(cloud) == [STEP]


def test_processes_have_the_cores_that_the_job_was_given(cloud: Cloud) -> None:
    """srun does not take them from sbatch by itself, and would give one core to each."""
    cloud.script("bin/job", JOB)
    cloud.run("slurm.sbatch", "job", **job_env(cloud), SLURM_CPUS_PER_TASK="12")
    assert tools(cloud) == [f"{STEP} --cpus-per-task=12"]


def test_containers(cloud: Cloud) -> None:
    shown = cloud.run("slurm.sbatch", "job", "-m", DRY_RUN="1", CONTAINER="x.sif", MOUNTS="/data:/data").stdout
    assert shown == f"{STEP} apptainer exec --nv --pwd {ROOT} --bind {ROOT},/data:/data x.sif job -m\n"
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
    here = cloud.run("encode.sh", *flags, DRY_RUN="1", PROCESSES="2", PORT="12321").stdout.splitlines()
    joined = [*command, "--coordinator", "localhost:12321", "--num-processes", "2", "--process-id"]
    assert sorted(shlex.split(line)[2:] for line in here) == [[*joined, "0"], [*joined, "1"]]
    slice_ = cloud.run("encode.sh", *flags, DRY_RUN="1", TPU="pod", ZONE="zone", TYPE="v6e-64").stdout
    assert "python -m ldm_jax.encode --config configs/txt2img.py:smoke --workdir /shared/run --coordinator auto" in slice_
    assert len(cloud.calls()) == 1
