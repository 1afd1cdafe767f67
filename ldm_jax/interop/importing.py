"""Models of other programs into model directories, tensor by tensor: memory is that of the largest, however large the model."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.build import Model, build_conditioning
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.defaults import base
from ldm_jax.interop.architecture import Architecture
from ldm_jax.interop.keymap import KeyMap, problems, read
from ldm_jax.interop.safetensors_file import Spec, Weights, write_safetensors
from ldm_jax.model_directory import PARTS, SETTINGS, TOKENIZER, WEIGHTS, Params, flatten, module_settings, stored_name, writing
from ldm_jax.nn.layers import norm_groups
from ldm_jax.paths import make_directory, write_bytes, write_json
from ldm_jax.stages import AUTOENCODERS, DENOISERS, Denoiser, FirstStage, abstract_params, build_autoencoder, build_denoiser


@dataclass(frozen=True)
class Networks:
    """A model's networks without weights, and what `model.json` will say of it.

    Attributes:
      leaves: shape and type of every parameter, by its path from `first_stage/`, `denoiser/` or `conditioner/` on.
    """

    first_stage: FirstStage
    denoiser: Denoiser | None
    info: dict[str, Any]

    @cached_property
    def params(self) -> Params:
        return abstract_params(self.first_stage, self.denoiser, self.info["resolution"])

    @cached_property
    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        return flatten(self.params)

    def groups_of_norms(self, part: str) -> dict[int, int]:
        """Channels and groups of the group norms in the network of a part, "first_stage" or "denoiser"."""
        network: Any = self.denoiser.network if part == "denoiser" and self.denoiser else self.first_stage.network
        norms = re.compile(rf"{part}/(?!.*block_\d+/norm)(.*/)?(norm\d?|norm_out|out_norm)/scale")  # those of transformer blocks have none
        widths = {shape.shape[0] for leaf, shape in self.leaves.items() if norms.fullmatch(leaf)}
        return {width: norm_groups(width, network.norm_groups) for width in sorted(widths)}


class Part(NamedTuple):
    """Tensors of one file: `keys` maps them to our parameters (paths as in `Networks.leaves`), `ignored` are patterns of the rest."""

    where: str
    keys: KeyMap
    weights: Weights
    ignored: Sequence[str] = ()


def build_networks(
    architecture: Architecture, shift: float, scale: float, tokenizer: Tokenizer | None, origin: Mapping[str, Any]
) -> Networks:
    """The networks of an architecture, scaled latents being (raw - shift) / scale; `origin` is kept in `model.json`, for whoever writes the
    model back. Raises UserError."""
    first_stage = FirstStage(build_autoencoder(architecture.first_stage, jnp.float32), (shift,), (scale,))
    info = {"step": 0, "resolution": architecture.resolution, "shift": [shift], "scale": [scale], "origin": dict(origin)}
    if architecture.denoiser is None:
        return _checked(Networks(first_stage, None, {"task": "autoencoder", **info}))
    defaults = base()
    conditioning = defaults.conditioning.to_dict()
    conditioning["text"]["enabled"] = False
    for name, group in architecture.conditioning.items():
        conditioning[name] |= {"enabled": True, **group}
    diffusion = defaults.diffusion.to_dict() | architecture.diffusion
    guided = any(conditioning[name]["enabled"] and conditioning[name]["drop_rate"] > 0 for name in ("text", "label", "neighbors"))
    ours = {"spacing": "legacy_ldm", "guidance": 5.0 if guided else 1.0, "batch_size": 8}
    sample = defaults.sample.to_dict() | ours | architecture.sample
    network = first_stage.network
    about = Model(architecture.resolution, network.factor, network.latent_channels, jnp.float32, tokenizer)
    conditioners = build_conditioning(conditioning, about)
    denoiser = build_denoiser(architecture.denoiser, diffusion, conditioners, network.latent_channels, jnp.float32)
    groups = {"diffusion": diffusion, "sample": sample, "conditioning": conditioning}
    return _checked(Networks(first_stage, denoiser, {"task": "diffusion", **info, **copy.deepcopy(groups)}))


def _checked(networks: Networks) -> Networks:
    """Raises UserError for sizes that are each well, and together make no network: a width that the groups do not divide, say."""
    try:
        networks.leaves  # noqa: B018 (kept: the shapes are wanted soon)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise UserError(f"no network can be built of these sizes: {' '.join(str(error).split())[:400]}") from error
    return networks


def check_parts(networks: Networks, parts: Sequence[Part]) -> None:
    """Raises UserError with one list of every tensor that is missing, unexpected, of another shape or of no real numbers, in all files."""
    leaves = networks.leaves
    wrong = [f"{part.where}: {line}" for part in parts for line in problems(part.keys, leaves, part.weights.shapes(), part.ignored)]
    for part in parts:
        types = {name: spec.dtype for name, spec in part.weights.specs().items()}
        strange = [t.name for t in part.keys if t.name in types and not jnp.issubdtype(types[t.name], jnp.floating)]
        wrong += [f"{part.where}: {name} is of {types[name]}" for name in strange]
    given = {leaf for part in parts for t in part.keys for leaf in t.leaves}
    wrong += [f"nothing gives {leaf}" for leaf in leaves if leaf not in given]
    if wrong:
        raise UserError(f"the weights do not fit the architecture ({len(wrong)} tensors): {'; '.join(wrong)}")


def write_model(networks: Networks, parts: Sequence[Part], tokenizer: Tokenizer | None, output: str | Path, dtype: Any) -> None:
    """Writes the model directory `output`, complete or not at all, its weights in `dtype`. Raises UserError."""
    check_parts(networks, parts)
    leaves = networks.leaves
    settings: dict[str, Any] = {"first_stage": module_settings(networks.first_stage.network, AUTOENCODERS)}
    if networks.denoiser is not None:
        settings["denoiser"] = module_settings(networks.denoiser.network, DENOISERS)
        settings["conditioner"] = networks.info["conditioning"]
    with writing(output, networks.info) as root:
        for name in PARTS[: len(settings)]:
            make_directory(root / name)
            specs = {_stored(leaf): Spec(tuple(value.shape), dtype) for leaf, value in leaves.items() if leaf.startswith(f"{name}/")}
            write_safetensors(Path(root) / name / WEIGHTS, _arrays(name, parts, dtype), specs)
            write_json(root / name / SETTINGS, settings[name])
        if tokenizer is not None:
            write_bytes(root / "conditioner" / TOKENIZER, tokenizer.to_json().encode())


def _stored(leaf: str) -> str:
    return stored_name(leaf.partition("/")[2])


def _arrays(name: str, parts: Sequence[Part], dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of one of our parts, from wherever they are."""
    for part in parts:
        keys = [t for t in part.keys if t.leaves[0].startswith(f"{name}/")]
        for leaf, array in read(keys, part.weights.__getitem__):
            yield _stored(leaf), np.asarray(array, dtype)
