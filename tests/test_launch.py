"""launch/evaluate.sh: each checkpoint of a run is evaluated once, here, under Slurm and on a TPU slice, whose tools are stood in for."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_jax.config import WorkDir, first_stage_run
from ldm_jax.training.run import run as train
from tests import tiny

ROOT = Path(__file__).parent.parent
FLAGS = ("--num", "9", "--steps", "1", "--reference-num", "12")
# Each does what it is asked to on this machine, and notes how it was called.
SRUN = '#!/bin/bash\necho "srun $1" >> "$CALLS"\nshift\nexec "$@"\n'
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


def evaluate(run: Path, tmp_path: Path, **env: str) -> subprocess.CompletedProcess:
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("gcloud", GCLOUD)):
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    given = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
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
    assert said == [f"evaluating {run}, {name}" for name in (8, 10, "model")]
    reports = {path.parent.name: json.loads(path.read_text()) for path in run.glob("reports/*/report.json")}
    assert {name: found["settings"]["updates of training"] for name, found in reports.items()} == {"8": 8, "10": 10, "model": 10}
    before = {path: path.stat().st_mtime_ns for path in run.glob("reports/*/report.json")}
    (run / "reports" / "8" / "report.json").unlink()
    again = evaluate(run, tmp_path, ONCE="", SLURM_JOB_ID="1", SLURM_SUBMIT_DIR=str(ROOT))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("evaluating") == 1 and calls(tmp_path) == ["srun --kill-on-bad-exit=1"]
    after = {path: path.stat().st_mtime_ns for path in run.glob("reports/*/report.json")}
    assert {path for path in after if after[path] != before[path]} == {run / "reports" / "8" / "report.json"}

    (run / "reports" / "10" / "report.json").unlink()
    slice_ = evaluate(run, tmp_path, TPU="pod", ZONE="zone", REPOSITORY=str(ROOT))
    assert slice_.returncode == 0, slice_.stderr
    assert calls(tmp_path)[1:] == ["gcloud pod 0", "gcloud pod all"]
    assert set(run.glob("reports/*/report.json")) == set(before)


def test_what_fails_is_tried_three_times(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "8").mkdir(parents=True)
    for tries, code in ((1, 1), (2, 1), (3, 1), (3, 0)):
        done = evaluate(run, tmp_path, PYTHON="/bin/false")
        assert done.returncode == code
        assert (run / "reports" / "failed.txt").read_text() == "8 failed with exit code 1\n" * tries
    assert "evaluating" not in done.stdout


def test_no_run_and_no_argument_are_refused(tmp_path: Path) -> None:
    assert "cannot be looked at" in evaluate(tmp_path / "nowhere", tmp_path).stderr
    help_ = subprocess.run([ROOT / "launch" / "evaluate.sh"], capture_output=True, text=True, check=False)
    assert help_.returncode == 2 and "launch/evaluate.sh RUN" in help_.stderr
