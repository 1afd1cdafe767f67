"""The model directory: `model.json` beside `first_stage/`, `denoiser/` and `conditioner/`, each `config.json` and `weights.safetensors`.

`model.json` is written last and makes the directory complete; one that is there stays until the next is whole.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from ldm_jax import paths
from ldm_jax.errors import UserError

FORMAT = 1
PARTS = ("first_stage", "denoiser", "conditioner")
WEIGHTS, SETTINGS, TOKENIZER = "weights.safetensors", "config.json", "tokenizer.json"
Params = dict[str, Any]


@contextmanager
def writing(path: str | Path, info: Mapping[str, Any]) -> Iterator[Any]:
    """Gives the directory to write the parts into; on leaving, `model.json` with `info` follows, and all of it takes its place.

    Where the writing fails, nothing of it stays. Object storage has no rename: there the old model ends when all of the new one has been
    written on the local disk, and a kill while it is sent leaves none.
    """
    described, root = dict(info, format=FORMAT), paths.resolve(path)
    if not paths.is_remote(root):
        with paths.replacing(Path(root)) as new:
            yield epath.Path(new)
            paths.write_json(new / "model.json", described)
        return
    with TemporaryDirectory(prefix="ldm_jax_") as folder:
        yield epath.Path(folder)
        (root / "model.json").unlink(missing_ok=True)
        paths.remove_tree(root)
        paths.send_tree(folder, root)
    paths.write_json(root / "model.json", described)


def module_settings(module: nn.Module, table: Mapping[str, type]) -> dict[str, Any]:
    """A network's fields and its `kind`, the name that it has in `table`."""
    kind = next(kind for kind, made in table.items() if type(module) is made)
    return {"kind": kind, **{f.name: getattr(module, f.name) for f in fields(module) if f.name not in ("parent", "name", "dtype")}}


def save_part(path: Any, settings: Mapping[str, Any], params: Params) -> None:
    """Writes one part: its settings, and its parameters as they are."""
    paths.make_directory(path)
    arrays = {stored_name(leaf): np.asarray(jax.device_get(value)) for leaf, value in flatten(params).items()}
    paths.write_bytes(path / WEIGHTS, save_safetensors(arrays))
    paths.write_json(path / SETTINGS, settings)


def load_settings(path: Any) -> dict[str, Any]:
    """The settings of a part. Raises UserError."""
    try:
        return json.loads((path / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete part of a model: {error}") from error


def load_params(path: Any) -> Params:
    """The parameters of a part, float32. Raises UserError."""
    try:
        stored = {name.replace(".", "/"): value.astype(np.float32, copy=False) for name, value in _tensors(path / WEIGHTS)}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a complete part of a model: {error}") from error
    return unflatten(stored)


def _tensors(file: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, one at a time, without the file in memory besides."""
    with paths.local_copy(file) as local, safe_open(str(local), framework="numpy") as stored:
        for name in stored.keys():  # noqa: SIM118 (no mapping)
            yield name, stored.get_tensor(name)


def read_info(path: str | Path) -> dict[str, Any]:
    """What `model.json` of a model directory says. Raises UserError where it is missing, damaged or of another format."""
    file = paths.resolve(path) / "model.json"
    if not file.exists():
        raise UserError(f"{path} is not a complete model directory: it has no model.json")
    try:
        info = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    found = info.get("format") if isinstance(info, dict) else None
    if found != FORMAT:
        raise UserError(f"{file} has format {found}; this version reads format {FORMAT}")
    return info


def find_model(path: str | Path) -> Any:
    """The model directory that a path means: itself, or that of a work directory, be it its first stage's. Raises UserError."""
    root = paths.resolve(path)
    for place in (root, root / "model", _first_stage_of(root)):
        if (place / "model.json").exists():
            return place
    raise UserError(f"no model at {path}: it is neither a complete model directory nor a work directory that has one")


def find_finished(path: str | Path) -> Any:
    """As `find_model`, but a first stage does not stand for a run that has no more yet. Raises UserError."""
    found = find_model(path)
    if found == _first_stage_of(epath.Path(path)):
        raise UserError(f"the run in {path} is not finished: it has its first stage ({found}) and no model yet")
    return found


def _first_stage_of(root: Any) -> Any:
    return root / "first_stage" / "model"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by their path, "/" between its parts."""
    flat: dict[str, Any] = {}
    for name, value in sorted(tree.items()):
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, leaf = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


def stored_name(leaf: str) -> str:
    """The name under which a part's file keeps the leaf at that path."""
    return leaf.replace("/", ".")


def check_shapes(params: Params, expected: Params, where: str) -> None:
    """Raises UserError with one list of every missing, unexpected or mis-shaped tensor."""
    there = {stored_name(leaf): v.shape for leaf, v in flatten(params).items()}
    wanted = {stored_name(leaf): v.shape for leaf, v in flatten(expected).items()}
    wrong = [
        f"{name}: {there.get(name, 'missing')} there, {wanted.get(name, 'not expected')} wanted"
        for name in sorted({*there, *wanted})
        if there.get(name) != wanted.get(name)
    ]
    if wrong:
        raise UserError(f"{where} does not fit its configuration: {'; '.join(wrong)}")
