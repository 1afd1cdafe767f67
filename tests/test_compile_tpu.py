"""Compiled for TPU slices that are not here, by libtpu. One process at a time may load it, so none of this runs beside others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.tpu

ROOT = Path(__file__).parents[1]
SMALL = (
    "--config.denoiser.channels=64",
    "--config.denoiser.channel_mult=(1,2)",
    "--config.denoiser.attention_levels=(2,)",
    "--config.denoiser.num_res_blocks=1",
    "--config.conditioning.text.depth=1",
    "--config.conditioning.text.width=128",
)


def compiled(tmp_path: Path, topology: str, *flags: str, spec: str = "configs/txt2img.py:laion-1p4b") -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and output of the command; with the flags of libtpu that every command sets."""
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "ldm_jax.compile", "--config", spec, "--topology", topology, "--json", str(out), *flags]
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=1800)
    return done.returncode, json.loads(out.read_text()) if out.exists() else {}, done.stdout + done.stderr


def test_split_parameters_on_a_slice(tmp_path: Path) -> None:
    """Parameters are gathered, gradients scattered as they are summed, and no activation crosses the network."""
    code, found, said = compiled(
        tmp_path, "v5e:4x4", *SMALL, "--programs", "step,sampler", "--config.mesh.fsdp=4", "--config.train.batch_size=128"
    )
    assert code == 0, said
    step, sampler = found["programs"]
    assert found["fits"] and found["mesh"] == {"slices": 1, "data": 4, "fsdp": 4}
    assert set(step["traffic"]) <= {"all-gather", "reduce-scatter", "all-reduce", "collective-permute"}
    assert step["traffic"]["reduce-scatter"]["count"] > 0 and step["traffic"]["all-gather"]["count"] > 20
    # A chip of four sends its quarter on three times: of kernels in bfloat16, half of their bytes, of the table of words in float32.
    parameters, table = step["memory"]["parameters"], 30522 * 128 * 4 // 4
    kernels = step["traffic"]["all-gather"]["ici_bytes"] - 3 * table
    assert 0.9 < kernels / (3 * (parameters - table) / 2) <= 1
    assert step["traffic"].get("collective-permute", {"ici_bytes": 0})["ici_bytes"] < 0.05 * parameters
    assert step["roofs"]["step"] > 0 and 0 < step["mfu_bound"] <= 1 and step["images_per_second"] > 0
    assert sampler["chips"] == 1 and sampler["traffic"] == {}


def test_two_slices_talk_over_the_data_centre(tmp_path: Path) -> None:
    code, found, said = compiled(tmp_path, "v5e:2x2*2", *SMALL, "--programs", "step", "--config.train.batch_size=64")
    assert code == 0, said
    assert found["mesh"] == {"slices": 2, "data": 4, "fsdp": 1}
    assert sum(kind["dcn_bytes"] for kind in found["programs"][0]["traffic"].values()) > 0


def test_what_does_not_fit_is_said_with_what_does(tmp_path: Path) -> None:
    code, found, said = compiled(
        tmp_path, "v5e:2x2", *SMALL, "--programs", "step", "--advise", "6", "--config.train.batch_size=1024", "--config.data.resolution=512"
    )
    assert code == 1 and "DOES NOT FIT" in said, said
    assert not found["fits"] and found["programs"][0]["exceeded"] > 0
    assert found["advice"]["step"] is not None and found["advice"]["step"]["program"]["fits"]


@pytest.mark.parametrize(("topology", "words"), [("v5e:3x5", "v5e:3x5"), ("v9z:2x2", "v9z")])
def test_slices_that_do_not_exist(tmp_path: Path, topology: str, words: str) -> None:
    code, _, said = compiled(tmp_path, topology, *SMALL)
    last = said.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: --topology") and words in last
