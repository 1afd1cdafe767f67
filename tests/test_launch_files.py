"""The files of launch/ as their tools read them: shellcheck, the Dockerfile's rules, what goes into the image."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])


def test_shellcheck_finds_nothing() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert tool is not None, "shellcheck is not installed: requirements-dev.txt"
    done = subprocess.run([tool, "--external-sources", *SCRIPTS], capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.name not in ("common.sh", "tpu_slice.sh")])
def test_each_script_stops_at_errors_and_says_how_it_is_used(script: str) -> None:
    text = (ROOT / "launch" / script).read_text()
    assert os.access(ROOT / "launch" / script, os.X_OK) and text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text and f"launch/{script}" in text
    assert "XLA_FLAGS=" not in text and "LIBTPU_INIT_ARGS=" not in text  # they are set in one place, and that is Python


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, without comments, with joined lines."""
    text = (ROOT / "launch" / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines.splitlines() if line.strip())]


def test_the_dockerfile() -> None:
    found = instructions()
    words = [word for word, _ in found]
    assert set(words) <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD"}
    version = dict(rest.split("=") for word, rest in found if word == "ARG")
    base = next(rest for word, rest in found if word == "FROM").replace("${PYTHON}", version["PYTHON"])
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base), "the base is pinned"
    copies = [rest.split() for word, rest in found if word == "COPY"]
    source = words.index("COPY", words.index("COPY") + 1)
    install = next(i for i, (word, rest) in enumerate(found) if "pip install" in rest)
    assert copies[0] == ["requirements.txt", "requirements-gcs.txt", "./"]
    assert "-r requirements.txt -r requirements-gcs.txt" in found[install][1]  # a work directory is on gs:// there
    assert words.index("COPY") < install < source  # a new source installs nothing anew
    assert {name for name, _ in copies[1:]} == {"configs", "ldm_jax"}
    assert all((ROOT / name).exists() for names in copies for name in names[:-1])
    user = next(rest for word, rest in found if word == "USER")
    assert user not in ("0", "root") and words.index("USER") > source
    assert json.loads(next(rest for word, rest in found if word == "ENTRYPOINT")) == ["tini", "--"]
    assert json.loads(next(rest for word, rest in found if word == "CMD"))[0] == "python"
    for extra in ("cuda12", "cuda13", "tpu"):
        assert extra in found[install][1]


@pytest.mark.parametrize(
    ("accelerator", "packages"), [("tpu", ["jax[tpu]", "-r", "requirements-gcs.txt"]), ("cuda", ["jax[cuda13]"]), ("cpu", ["jax"])]
)
def test_what_make_installs(tmp_path: Path, accelerator: str, packages: list[str]) -> None:
    """On the workers of a slice launch/worker.sh calls make, and the work directory is on gs://."""
    asked = ["make", "--dry-run", f"ACCELERATOR={accelerator}", f"VENV={tmp_path}", f"{tmp_path}/.{accelerator}"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    (install,) = [shlex.split(line) for line in done.stdout.splitlines() if "-r requirements.txt" in line]
    assert install[install.index("requirements.txt") + 1 :] == packages


def test_the_image_gets_what_is_copied_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def excluded(path: str) -> bool:
        result = False
        for rule in rules:  # the last that matches the path or a directory above it decides
            pattern = rule.removeprefix("!").removeprefix("**/")
            parts = path.split("/")
            if any(fnmatch.fnmatch("/".join(parts[:n]), pattern) for n in range(1, len(parts) + 1)) or (
                rule.startswith("**/") and any(fnmatch.fnmatch(part, pattern) for part in parts)
            ):
                result = not rule.startswith("!")
        return result

    for path in ("requirements.txt", "requirements-gcs.txt", "configs/txt2img.py", "ldm_jax/training/loop.py"):
        assert not excluded(path) and (ROOT / path).exists()
    for path in (".git/config", ".venv/bin/python", "runs/x/model", "tests/tiny.py", "ldm_jax/__pycache__/cli.pyc", ".env", "key.json"):
        assert excluded(path)
