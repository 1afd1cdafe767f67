"""launch/gpu_host.sh: restarts by exit code, and signals that reach the job."""

import re
import signal
import socket
from pathlib import Path

import pytest

from tests.launching import STORAGE_LS, Cloud, until

JOB = '#!/bin/bash\necho "$*" >> "$CLOUD/started"\nattempt=$(wc -l < "$CLOUD/started")\n'
STOPS = JOB.replace("\n", '\ntrap "echo stopped >> $CLOUD/stopped; exit 75" TERM\n', 1) + "while :; do sleep 0.02; done\n"


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path / "cloud", {})


@pytest.mark.parametrize(("codes", "starts", "end"), [((75, 75, 0), 3, 0), ((2,), 1, 2), ((75, 1, 0), 3, 0), ((1, 139, 75, 3), 4, 3)])
def test_what_is_started_again(cloud: Cloud, codes: tuple[int, ...], starts: int, end: int) -> None:
    cloud.script("bin/job", JOB + f"codes=({' '.join(map(str, codes))})\nexit ${{codes[attempt - 1]:-{codes[-1]}}}\n")
    done = cloud.run("gpu_host.sh", "job", "--workdir", str(cloud.path / "run"))
    assert done.returncode == end and len(cloud.lines("started")) == starts, done.stderr


def test_a_stop_without_progress_is_not_repeated_for_ever(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB + "exit 75\n")
    done = cloud.run("gpu_host.sh", "job", RESTARTS="4")
    assert done.returncode == 75 and len(cloud.lines("started")) == 5
    assert "exit code 75 after 4 restarts without a new checkpoint: given up" in done.stderr


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        (("--workdir=gs://b/run",), "gs://b/run/checkpoints/{}/metrics/data"),
        (("--workdir", "gs://b/run"), "gs://b/run/first_stage/checkpoints/{}/state"),
        (("--workdir", "gs://b/run"), "gs://b/run/latents/a1b2/shard-0000{}-of-00009.records"),
        (("--workdir=run", "--config.data.latents=gs://b/latents"), "gs://b/latents/a1b2/shard-0000{}-of-00009.records"),
        (("--workdir", "{cloud}/run"), "{cloud}/run/first_stage/checkpoints/{}/state"),
        (("--workdir=gs://b/run", "--config.data.latents={cloud}/the latents"), "{cloud}/the latents/a1b2/shard-0000{}-of-00009.records"),
    ],
    ids=["checkpoints", "first_stage", "latents", "latents_elsewhere", "local", "latents_mounted"],
)
def test_what_is_new_anywhere_is_progress(cloud: Cloud, flags: tuple[str, ...], made: str) -> None:
    cloud.script("bin/gcloud", f"#!/bin/bash\n{STORAGE_LS}")
    path = made.replace("{cloud}", str(cloud.path)).replace("{}", "$attempt")
    writes = f'path="{path}"\ncase $path in gs:*) echo "$path" >> "$CLOUD/bucket" ;; *) mkdir -p "${{path%/*}}" && touch "$path" ;; esac\n'
    cloud.script("bin/job", JOB + writes + "[ $attempt = 5 ] || exit 1\n")
    done = cloud.run("gpu_host.sh", "job", *(flag.replace("{cloud}", str(cloud.path)) for flag in flags), RETRIES="1")
    assert done.returncode == 0 and len(cloud.lines("started")) == 5, done.stderr


def test_what_has_gone_is_no_progress(cloud: Cloud) -> None:
    """Old checkpoints are removed, and a look at a bucket may fail."""
    swaps = 'cd "$CLOUD" && mkdir -p run/checkpoints/1$((attempt % 2)) && rm -rf run/checkpoints/1$((1 - attempt % 2))\nexit 1\n'
    cloud.script("bin/job", JOB + swaps)
    done = cloud.run("gpu_host.sh", "job", "--workdir", str(cloud.path / "run"), RETRIES="3")
    assert done.returncode == 1 and len(cloud.lines("started")) == 5, done.stderr


def test_waits_grow_and_are_set_back_by_a_new_checkpoint(cloud: Cloud) -> None:
    cloud.script("bin/sleep", '#!/bin/bash\necho "$1" >> "$CLOUD/slept"\n')
    steps = 'if [ $attempt = 4 ]; then mkdir -p "$CLOUD/run/checkpoints/8"; fi\nexit 1\n'
    cloud.script("bin/job", JOB + steps)
    cloud.run("gpu_host.sh", "job", "--workdir", str(cloud.path / "run"), WAIT="100", RETRIES="4")
    assert [int(seconds) for seconds in cloud.lines("slept")] == [100, 200, 400, 100, 200, 400, 600]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_job_and_nothing_is_started_again(cloud: Cloud, number: signal.Signals) -> None:
    cloud.script("bin/job", STOPS)
    job = cloud.start("gpu_host.sh", "job")
    until(lambda: cloud.lines("started"))
    job.send_signal(number)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 75 and cloud.lines("stopped") == ["stopped"] and len(cloud.lines("started")) == 1, said


def test_a_signal_while_waiting_ends_the_wait(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB + "exit 9\n")
    cloud.script("bin/sleep", '#!/bin/bash\ntouch "$CLOUD/waits"\nexec /bin/sleep 30\n')
    job = cloud.start("gpu_host.sh", "job")
    until((cloud.path / "waits").exists)
    job.terminate()
    until(lambda: job.poll() is not None, 10)
    assert job.returncode == 9 and len(cloud.lines("started")) == 1


def test_several_processes_join_and_end_together(cloud: Cloud) -> None:
    ends = 'case $* in *"-id 1") exit 75 ;; *) exit 1 ;; esac\n'
    cloud.script("bin/job", f'#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES $*" >> "$CLOUD/started"\n{ends}')
    done = cloud.run("gpu_host.sh", "job", "--a b", PROCESSES="2", CUDA_VISIBLE_DEVICES="4,6,7", RESTARTS="0")
    assert done.returncode == 75
    port = re.findall(r"localhost:(2\d{4}) ", cloud.lines("started")[0])[0]
    joined = f"--a b --coordinator localhost:{port} --num-processes 2 --process-id"
    assert sorted(cloud.lines("started")) == [f"4 {joined} 0", f"6 {joined} 1"]
    few = cloud.run("gpu_host.sh", "job", PROCESSES="2", CUDA_VISIBLE_DEVICES="4")
    assert few.returncode == 2 and "CUDA_VISIBLE_DEVICES=4 has 1" in few.stderr


def test_processes_do_not_join_another_job(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB)
    with socket.create_server(("localhost", 0)) as other:
        port = str(other.getsockname()[1])
        done = cloud.run("gpu_host.sh", "job", PROCESSES="2", PORT=port)
        assert done.returncode == 2 and f"PORT={port}: another program listens there" in done.stderr
        assert not cloud.lines("started")
        assert cloud.run("gpu_host.sh", "job", PROCESSES="2").returncode == 0
    assert len(cloud.lines("started")) == 2


@pytest.mark.parametrize("number", ["0", "-1", "all"])
def test_a_number_of_processes_is_one_or_more(cloud: Cloud, number: str) -> None:
    done = cloud.run("gpu_host.sh", "false", PROCESSES=number)
    assert done.returncode == 2 and f"PROCESSES={number}" in done.stderr


def test_a_signal_reaches_every_process(cloud: Cloud) -> None:
    cloud.script("bin/job", STOPS)
    job = cloud.start("gpu_host.sh", "job", PROCESSES="3")
    until(lambda: len(cloud.lines("started")) == 3)
    job.terminate()
    job.communicate(timeout=60)
    assert job.returncode == 75 and cloud.lines("stopped") == ["stopped"] * 3


def test_a_dry_run_prints_every_command_and_calls_nothing(cloud: Cloud) -> None:
    cloud.script("bin/job", JOB)
    done = cloud.run("gpu_host.sh", "job", "it's", "--workdir", "gs://bucket/run", DRY_RUN="1")
    assert done.returncode == 0 and not cloud.lines("started") and cloud.calls() == []
    assert "job 'it'\\''s' --workdir gs://bucket/run" in done.stdout.splitlines()
