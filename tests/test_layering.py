"""Who may import whom (docs/architecture.md), read from the sources; and what the commands load before they have work to do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ldm_jax"
FLOORS = {
    "defaults": 0,
    "errors": 0,
    "paths": 0.5,
    "config": 1,
    "nearest": 1,
    "nn": 1,
    "diffusion": 1,
    "interop.torch_file": 1,
    "conditioning": 2,
    "data": 2,
    "sharding": 2,
    "model_directory": 2,
    "presets": 2,
    "sampling": 2,
    "stages": 2.5,
    "latent_diffusion": 3,
    "interop": 4,
    "evaluation": 5,
    "training": 6,
    "front doors": 7,
}


def module_name(path: Path) -> str:
    """`ldm_jax/nn/unet.py` is "ldm_jax.nn.unet", a package its own name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
    """The longest entry of `FLOORS` that holds the module; the package itself and what lies beside the rooms are front doors."""
    name = module.removeprefix("ldm_jax").removeprefix(".")
    holding = [entry for entry in FLOORS if name == entry or name.startswith(f"{entry}.")]
    return max(holding, key=len, default="front doors")


def imports(module: str) -> Iterator[str]:
    """Absolute names of every module that the source imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            submodules = [f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES]
            yield from submodules or [node.module]


def own(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "ldm_jax"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_come_from_floors_below(module: str) -> None:
    here = room(module)
    for name in own(module):
        there = room(name)
        assert there == here or FLOORS[there] < FLOORS[here], f"{module} ({here}) imports {name} ({there})"


def test_every_room_has_a_floor() -> None:
    beside = {module for module in MODULES if room(module) == "front doors"}
    commands = ("train", "encode", "sample", "evaluate", "compile", "convert", "check_data", "neighbors")
    assert beside == {"ldm_jax", "ldm_jax.cli", *(f"ldm_jax.{name}" for name in commands)}
    assert {room(module) for module in MODULES} | {"interop"} == set(FLOORS)


def test_the_ground_floor_stands_alone() -> None:
    for module in MODULES:
        if FLOORS[room(module)] == 1:
            beside = {"ldm_jax.config": {"defaults", "errors", "paths"}, "ldm_jax.interop.torch_file": {"paths"}}.get(module, set())
            assert {room(name) for name in own(module)} <= {room(module)} | beside


@pytest.mark.parametrize(("where", "forbidden"), [("", {"torch", "tensorflow", "torchvision"}), ("data", {"jax", "flax", "optax"})])
def test_packages_that_must_stay_out(where: str, forbidden: set[str]) -> None:
    for module in MODULES:
        if where in ("", room(module)):
            found = {name.split(".")[0] for name in imports(module)} & forbidden
            assert not found, f"{module} imports {found}"


@pytest.mark.parametrize(
    "command",
    [
        "import ldm_jax",
        "import runpy; sys.argv = ['train', '--help']; runpy.run_module('ldm_jax.train', run_name='__main__')",
        "import runpy; sys.argv = ['encode', '--help']; runpy.run_module('ldm_jax.encode', run_name='__main__')",
        "import runpy; sys.argv = ['sample', '--help']; runpy.run_module('ldm_jax.sample', run_name='__main__')",
        "import runpy; sys.argv = ['evaluate', '--help']; runpy.run_module('ldm_jax.evaluate', run_name='__main__')",
        "import runpy; sys.argv = ['convert', '--help']; runpy.run_module('ldm_jax.convert', run_name='__main__')",
        "import runpy; sys.argv = ['check_data', '--help']; runpy.run_module('ldm_jax.check_data', run_name='__main__')",
        "import runpy; sys.argv = ['neighbors', '--help']; runpy.run_module('ldm_jax.neighbors', run_name='__main__')",
    ],
    ids=["import", "train", "encode", "sample", "evaluate", "convert", "check_data", "neighbors"],
)
def test_help_loads_nothing_heavy(command: str) -> None:
    heavy = "{'jax', 'jaxlib', 'flax', 'numpy', 'tensorflow', 'tensorflow_datasets', 'torch', 'transformers', 'orbax', 'grain'}"
    program = (
        f"import sys\ntry:\n    {command}\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"found = {{name.split('.')[0] for name in sys.modules}} & {heavy}\nassert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
