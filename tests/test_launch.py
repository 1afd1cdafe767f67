"""launch/evaluate.sh: each checkpoint of a run is evaluated once, here, under Slurm and on a TPU slice, whose tools are stood in for."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm_jax.config import WorkDir, first_stage_run
from ldm_jax.training.run import run as train
from tests import tiny

ROOT = Path(__file__).parent.parent
FLAGS = ("--num", "9", "--steps", "1", "--reference-num", "12")
# Each does what it is asked to on this machine, and notes how it was called.
SRUN = '#!/bin/bash\necho "srun $1 $2" >> "$CALLS"\nshift 2\nexec "$@"\n'
GCLOUD = """#!/bin/bash
for argument in "$@"; do
    case $argument in
        --worker=*) worker=${argument#--worker=} ;;
        --command=*) command=${argument#--command=} ;;
    esac
done
echo "gcloud $5 $worker" >> "$CALLS"
cd "$HOME_OF_WORKERS" && exec bash -c "${command/--coordinator auto/}"
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten updates with checkpoints after the 8th and the 10th."""
    path = tmp_path_factory.mktemp("runs") / "run"
    cfg = tiny.config()
    cfg.data.size = 32
    cfg.conditioning.text.enabled = False
    cfg.conditioning.label.update(enabled=True, num_classes=40, width=16)
    cfg.evaluate.update(prompts=2, held_out=0, guidance=(1.0,), guidance_prompts=1)
    assert first_stage_run(cfg).task == "autoencoder"
    with tiny.quick_compilation():
        train(cfg, WorkDir(path), [])
    return path


def evaluate(run: Path | str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess:
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("gcloud", GCLOUD)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    given = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.startswith("SLURM_")}
    given |= {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable, "CALLS": str(tmp_path / "calls"), "ONCE": "1"}
    given |= {"JAX_PLATFORMS": "cpu", "HOME_OF_WORKERS": str(ROOT), **env}
    command = [str(ROOT / "launch" / "evaluate.sh"), str(run), *FLAGS]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=600)


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.slow
def test_each_checkpoint_is_evaluated_once(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # one that is being written
    done = evaluate(run, tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("evaluating")]
    assert said == [f"evaluating {run}, {name}" for name in (8, "model")]  # which is that of the 10th update
    reports = {path.parent.name: json.loads(path.read_text()) for path in run.glob("reports/*/report.json")}
    assert {name: found["settings"]["updates of training"] for name, found in reports.items()} == {"8": 8, "model": 10}
    before = {path: path.stat().st_mtime_ns for path in run.glob("reports/*/report.json")}
    (run / "reports" / "8" / "report.json").unlink()
    again = evaluate(run, tmp_path, ONCE="", SLURM_JOB_ID="1", SLURM_SUBMIT_DIR=str(ROOT))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("evaluating") == 1 and calls(tmp_path) == ["srun --kill-on-bad-exit=0 --wait=60"]
    after = {path: path.stat().st_mtime_ns for path in run.glob("reports/*/report.json")}
    assert {path for path in after if after[path] != before[path]} == {run / "reports" / "8" / "report.json"}

    (run / "reports" / "model" / "report.json").unlink()
    slice_ = evaluate(run, tmp_path, TPU="pod", ZONE="zone", REPOSITORY=str(ROOT))
    assert slice_.returncode == 0, slice_.stderr
    assert calls(tmp_path)[1:] == ["gcloud pod 0", "gcloud pod all"]
    assert set(run.glob("reports/*/report.json")) == set(before)


def test_what_fails_is_tried_three_times(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "8").mkdir(parents=True)
    for tries in (1, 2, 3, 3):
        done = evaluate(run, tmp_path, PYTHON="/bin/false")
        assert done.returncode == 1
        assert (run / "reports" / "failed.txt").read_text() == "8 failed with exit code 1\n" * tries
    assert "evaluating" not in done.stdout


@pytest.mark.parametrize("code", [75, 255], ids=["stopped", "ssh"])
def test_what_was_stopped_has_not_failed(tmp_path: Path, code: int) -> None:
    run, python = tmp_path / "run", tmp_path / "python"
    (run / "checkpoints" / "8").mkdir(parents=True)
    python.write_text(f"#!/bin/bash\nexit {code}\n")
    python.chmod(stat.S_IRWXU)
    done = evaluate(run, tmp_path, PYTHON=str(python))
    assert done.returncode == 1 and "evaluating" in done.stdout and not (run / "reports" / "failed.txt").exists()


def test_a_slice_is_given_the_paths_of_weights(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    (run / "checkpoints" / "8").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$LDM_INCEPTION" "$@" > "$0.called"\nexit 1\n')
    python.chmod(stat.S_IRWXU)
    home = tmp_path / "the repository"
    home.mkdir()
    evaluate(run, tmp_path, TPU="pod", ZONE="zone", REPOSITORY=str(home), PYTHON=str(python), LDM_INCEPTION="/weights of/x.pth")
    called = (tmp_path / "python.called").read_text()
    assert called.startswith("/weights of/x.pth -m ldm_jax.evaluate --model") and f"--output {run}/reports/8 --step 8" in called


def test_the_signal_to_stop_reaches_what_is_running(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "8").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\ntrap \'touch "$0.stopped"; exit 1\' TERM\ntouch "$0.started"\nwhile :; do sleep 0.05; done\n')
    python.chmod(stat.S_IRWXU)
    command = [ROOT / "launch" / "evaluate.sh", tmp_path / "run"]
    job = subprocess.Popen(command, env={**os.environ, "PYTHON": str(python)}, stdout=subprocess.DEVNULL)
    for _ in range(200):
        if (tmp_path / "python.started").exists():
            break
        time.sleep(0.05)
    job.terminate()
    assert job.wait(20) == 143 and (tmp_path / "python.stopped").exists()


@pytest.mark.parametrize(
    "place", [{}, {"TPU": "pod", "ZONE": "zone"}, {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)}], ids=["here", "tpu", "slurm"]
)
def test_a_dry_run_prints_every_command_and_calls_nothing(tmp_path: Path, place: dict[str, str]) -> None:
    done = evaluate(tmp_path / "run", tmp_path, PYTHON="/bin/false", DRY_RUN="1", **place)
    assert done.returncode == 0 and not (tmp_path / "calls").exists() and not (tmp_path / "run").exists()
    commands = [line for line in done.stdout.splitlines() if line.startswith(("bash ", "gcloud ", "srun "))]
    assert len(commands) == 2 and f"--output {tmp_path}/run/reports/model" in commands[1]


def test_no_run_and_no_argument_are_refused(tmp_path: Path) -> None:
    assert "cannot be looked at" in evaluate(tmp_path / "nowhere", tmp_path).stderr
    for place in ({}, {"TPU": "pod", "ZONE": "zone"}):
        done = evaluate("gs://bucket/run", tmp_path, **place)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "calls").exists()
        assert "ldm_jax.evaluate --model gs://bucket/run --step N" in done.stderr
    help_ = subprocess.run([ROOT / "launch" / "evaluate.sh"], capture_output=True, text=True, check=False)
    assert help_.returncode == 2 and "launch/evaluate.sh RUN" in help_.stderr
