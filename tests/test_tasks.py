"""Every task of the paper, from its file under configs/ to a table that says whether the condition is obeyed: `smoke` runs on one first
stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ldm_jax
from ldm_jax.evaluation.obedience import fresh_examples

pytestmark = pytest.mark.slow

# What each task's samples are told, and a score that its table has.
TASKS = {
    "unconditional": ((), "valid"),
    "class_cond": (("label",), "class"),
    "txt2img": (("text",), "all seen"),
    "layout2img": (("boxes",), "iou"),
    "semantic": (("segmentation",), "pixels"),
    "superres": (("low_res",), "psnr"),
    "inpaint": (("mask", "image"), "change"),
    "retrieval": (("neighbors",), "nearer"),
}


def train(file: str, workdir: Path, *more: str) -> str:
    command = [sys.executable, "-m", "ldm_jax.train", "--config", f"configs/{file}.py:smoke", "--workdir", str(workdir), *more]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # programs that compile quickly and run a few times
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parent.parent, env=quick)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "first_stage"
    train("txt2img", path, "--config.train.steps=8", "--config.optimizer.warmup=1")
    return path / "first_stage"


@pytest.mark.parametrize("file", TASKS)
def test_a_task_from_its_configuration_to_its_table(file: str, first_stage: Path, tmp_path: Path) -> None:
    said = train(file, tmp_path / "run", f"--config.first_stage.path={first_stage}")
    inputs, metric = TASKS[file]
    model = ldm_jax.load(str(tmp_path / "run"))
    assert model.inputs == inputs and (tmp_path / "run" / "samples").exists()
    if file == "txt2img":
        assert "all" in json.loads((tmp_path / "run" / "oracle.json").read_text())["table"]["1 seen"]
    tables = json.loads((tmp_path / "run" / "obedience.json").read_text())[inputs[0] if inputs else ""]
    assert ("noise" if not inputs else "conditions of other scenes") in tables and metric in said
    rows = next(iter(tables.values()))
    assert rows[metric]["control"] >= 0 and rows[metric]["n"] > 0
    if file == "inpaint":
        assert rows["change"]["conditioned"] == rows["change"]["ceiling"] == 0
        example = fresh_examples(32, 1, (1,), "seen")[0]
        hole = example["segmentation"] > 0
        drawn = model.sample(image=[example["image"]], mask=[hole])[0]
        assert (drawn[~hole] == example["image"][~hole]).all()
