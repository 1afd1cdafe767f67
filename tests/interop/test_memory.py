"""Models pass from file to file without being in memory: the paper's text model of 1.45 billion parameters, read from sparse files."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import ldm_jax
from ldm_jax.interop import compvis, diffusers, text_encoders
from ldm_jax.interop.keymap import KeyMap, their_shapes, under
from ldm_jax.interop.pipelines import denoiser_map
from ldm_jax.interop.safetensors_file import Spec
from ldm_jax.model_directory import PARTS, WEIGHTS, stored_name
from tests.interop import compvis_files as files
from tests.interop import torch_files
from tests.interop.test_published_keys import published_by_diffusers

GIB = 2**30
PARAMETERS = 1.45e9
ROOM = 16 * GIB  # both files, and what the system keeps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's anonymous memory"),
]


@pytest.fixture(autouse=True)
def room(tmp_path: Path) -> object:
    free = shutil.disk_usage(tmp_path).free
    if free < ROOM:
        pytest.skip(f"needs {ROOM >> 30} GiB of free disk, not {free >> 30}")
    yield
    shutil.rmtree(tmp_path)


def anonymous_peak(folder: Path, *arguments: str) -> int:
    """Bytes of anonymous memory that a conversion has at most, looked at every few milliseconds."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(ldm_jax.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    with (folder / "log").open("w+") as log:
        command = [sys.executable, "-m", "ldm_jax.convert", *arguments]
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            peak = 0
            while process.poll() is None:
                found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                peak = max(peak, int(found[1]) * 1024 if found else 0)
                time.sleep(0.003)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, (folder / "log").read_text()
    return peak


def is_small(peak: int, specs: Mapping[str, Spec]) -> None:
    largest = max(spec.nbytes for spec in specs.values())
    total = sum(spec.nbytes for spec in specs.values())
    assert total > 4 * PARAMETERS
    print(f"anonymous memory {peak / GIB:.3f} GiB, largest tensor {largest / GIB:.3f} GiB, model {total / GIB:.3f} GiB")
    assert largest < peak < GIB + 2 * largest


def numbers(keys: KeyMap, specs: Mapping[str, Spec]) -> dict[str, int]:
    """The number of the tensor that each of our parameters is, as it is stored; all layouts keep the first element first."""
    places = {name: i + 1 for i, name in enumerate(specs)}
    split = {t.leaves[0].partition("/")[::2]: places[t.name] for t in keys}
    return {f"{part}/{stored_name(leaf)}": number for (part, leaf), number in split.items()}


def corners(model: Path) -> dict[str, float]:
    """The first element of each parameter, whose next ones are 0."""
    found = {}
    for part in PARTS:
        with safe_open(str(model / part / WEIGHTS), framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dict)
                entry = weights.get_slice(name)
                corner = entry[tuple(slice(0, min(2, size)) for size in entry.get_shape())]
                assert corner.dtype == np.float32 and np.count_nonzero(corner) == 1
                found[f"{part}/{name}"] = corner.flat[0]
    return found


def test_a_checkpoint_of_the_paper(tmp_path: Path) -> None:
    path = files.write_yaml(tmp_path, files.RELEASED["txt2img:laion-1p4b"])
    networks = files.networks(path)
    keys = compvis.model_map(networks)
    specs = {name: Spec(shape, np.dtype(np.float32)) for name, shape in their_shapes(keys, networks.params).items()}
    torch_files.write(tmp_path / "model.ckpt", {"state_dict": specs, "global_step": 390_000})
    arguments = ("--checkpoint", "model.ckpt", "--yaml", path.name, "--output", "out")
    is_small(anonymous_peak(tmp_path, "--from", "compvis", *arguments), specs)
    assert corners(tmp_path / "out") == numbers(keys, specs)


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    lists = {
        "unet": "diffusers_unet2dcond_ldm_text2im_large256",
        "vqvae": "diffusers_autoencoderkl_f8",
        "bert": "diffusers_ldmbert",
    }
    index = {
        "_class_name": "LDMTextToImagePipeline",
        "bert": ["latent_diffusion", "LDMBertModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vqvae": ["diffusers", "AutoencoderKL"],
    }
    specs: dict[str, dict[str, Spec]] = {}
    for part, name in lists.items():
        config, shapes = published_by_diffusers(name)
        specs[part] = {tensor: Spec(shape, np.dtype(np.float32)) for tensor, shape in shapes.items()}
        file = "model.safetensors" if part == "bert" else "diffusion_pytorch_model.safetensors"
        torch_files.write_safetensors(tmp_path / "folder" / part / file, specs[part])
        (tmp_path / "folder" / part / "config.json").write_text(json.dumps(config))
    (tmp_path / "folder" / "scheduler").mkdir()
    (tmp_path / "folder" / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    )
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps(index))
    whole = {f"{part}/{name}": spec for part, tensors in specs.items() for name, spec in tensors.items()}
    is_small(anonymous_peak(tmp_path, "--from", "diffusers", "--checkpoint", "folder", "--output", "out"), whole)

    networks = files.networks(files.write_yaml(tmp_path, files.RELEASED["txt2img:laion-1p4b"]))
    params = networks.params
    maps = {
        "unet": denoiser_map(networks, False),
        "vqvae": under("first_stage", diffusers.autoencoder_map(4, params["first_stage"])),
        "bert": under("conditioner/text", text_encoders.ldmbert_map(params["conditioner"]["text"])),
    }
    assert corners(tmp_path / "out") == {k: v for part in maps for k, v in numbers(maps[part], specs[part]).items()}
