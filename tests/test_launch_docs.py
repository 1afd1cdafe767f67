"""The commands that docs/scale.md and the headers of launch/ show are ones that training takes, on the machines that they name."""

import math
import re
import shlex

import pytest
from jax.sharding import AbstractMesh

from ldm_jax import config as configs
from ldm_jax.sharding.mesh import AXES
from ldm_jax.training.run import check_batches
from tests.launching import ROOT

SOURCES = (
    "docs/scale.md",
    *(f"launch/{name}" for name in ("tpu_vm.sh", "gke.sh", "slurm.sbatch", "gpu_host.sh", "encode.sh", "Dockerfile")),
)


def commands(name: str) -> list[str]:
    """Those of ldm_jax that are written out, on one line each, with the variables and the launcher before it."""
    text = (ROOT / name).read_text()
    if name.endswith(".md"):
        text = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    else:
        text = "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    exported, found = "", []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("export "):
            exported = line
        if re.search(r"ldm_jax\.train|encode\.sh", line) and "--workdir" in line and "..." not in line:
            found.append(f"{exported if 'tpu_vm.sh' in line else ''} {line}")
    return found


def devices(command: str) -> list[int]:
    """The numbers of chips that the command is for: those of the slice, eight GPUs a host, or any number of GPUs of one host."""

    def given(pattern: str) -> str:
        return (re.findall(pattern + r"([\w:-]+)", command) or [""])[-1]

    if "tpu_vm.sh" in command:
        kind, _, number = given("TYPE=").rpartition("-")
        return [int(number) // (2 if kind in ("v4", "v5p") else 1)]
    if given("SLICE="):
        return [math.prod(map(int, given("SLICE=").partition(":")[2].split("x")))]
    if hosts := given("HOSTS=") or given("--nodes=") or given("--num-processes "):
        return [8 * int(hosts)]
    return [1, 2, 4, 8]


FOUND = [(name, command) for name in SOURCES for command in commands(name)]


def test_all_of_them_are_looked_at() -> None:
    assert {name for name, _ in FOUND} == set(SOURCES) and sum(name == "docs/scale.md" for name, _ in FOUND) == 9


@pytest.mark.parametrize(("name", "command"), FOUND, ids=[f"{name}-{i}" for i, (name, _) in enumerate(FOUND)])
def test_training_takes_it(name: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.partition("#")[0].replace('"', " "))
    config = configs.from_command(words[words.index("--config") + 1], [word for word in words if word.startswith("--config.")])
    assert config.data.source == "shapes" or config.data.path
    if "encode.sh" in command:
        assert config.first_stage.path
        return
    for number in devices(command):
        fsdp = config.mesh.fsdp
        assert number % fsdp == 0
        check_batches(config, AbstractMesh((1, number // fsdp, fsdp), AXES))
        if ":laion-1p4b" in command and number == 256:  # as the table of docs/scale.md has it; with fsdp 1 it does not fit
            assert (config.train.batch_size, fsdp) == (2048, 8)
