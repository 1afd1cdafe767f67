"""What the tests of launch/ share: stand-ins for the tools of clouds and clusters, which note their calls, and a way to run a launcher."""

import os
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Whatever a launcher calls beyond the stand-ins of its test must not reach a real cloud.
TOOLS = ("gcloud", "kubectl", "srun", "sbatch", "scontrol", "scancel", "xpk", "docker", "apptainer", "nvidia-smi")
_UNKNOWN = '#!/bin/bash\necho "$(basename "$0") is not to be called: $*" >&2\nexit 99\n'
NOTED = 'printf "%s\\n" "$(basename "$0") ${*@Q}" >> "$CLOUD/calls"\n'

# `gcloud storage ls` of the objects that are listed in a file: it ends at the first URL without any.
STORAGE_LS = r"""
[ "$1 $2" = "storage ls" ] || exit 1
shift 2
for url; do
    case $url in
        *'*'*) found=$(while read -r object; do [[ $object == $url ]] && echo "$object"; done < "$CLOUD/bucket") ;;
        *) found=$(sed -n "s|^\($url/[^/]*/\).*|\1|p" "$CLOUD/bucket" | sort -u) ;;
    esac
    [ -n "$found" ] || { echo "ERROR: (gcloud.storage.ls) One or more URLs matched no objects." >&2; exit 1; }
    echo "$found"
done
"""


class Cloud:
    """A directory with the stand-ins first on PATH, and whatever they keep. `tools` are bash scripts by name; each call is noted."""

    def __init__(self, path: Path, tools: dict[str, str]) -> None:
        self.path = path
        self.bin = path / "bin"
        self.bin.mkdir(parents=True)
        for name in {*TOOLS, *tools}:
            self.script(f"bin/{name}", f"#!/bin/bash\n{NOTED}{tools[name]}" if name in tools else _UNKNOWN)

    def script(self, name: str, text: str) -> Path:
        path = self.path / name
        path.write_text(text)
        path.chmod(stat.S_IRWXU)
        return path

    def env(self, **given: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LDM_", "XLA_", "CUDA_"))}
        return kept | {"PATH": f"{self.bin}:{os.environ['PATH']}", "CLOUD": str(self.path), "WAIT": "0", "POLL": "0.1", **given}

    def run(self, launcher: str, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess:
        """The launcher to its end, with its output."""
        command = [ROOT / "launch" / launcher, *arguments]
        return subprocess.run(
            command, env=self.env(**env), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL
        )

    def start(self, launcher: str, *arguments: str | Path, **env: str) -> subprocess.Popen:
        """The launcher in the background, in a group of its own."""
        command = [ROOT / "launch" / launcher, *arguments]
        return subprocess.Popen(
            command, env=self.env(**env), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def calls(self) -> list[list[str]]:
        """The words of each call, in order."""
        path = self.path / "calls"
        return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []

    def lines(self, name: str) -> list[str]:
        path = self.path / name
        return path.read_text().splitlines() if path.exists() else []


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.02)


def interrupt(job: subprocess.Popen) -> None:
    """What Ctrl-C in a terminal does: SIGINT to the whole group."""
    os.killpg(job.pid, signal.SIGINT)
