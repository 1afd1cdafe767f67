"""Configurations: reading, overriding, checking and comparing them, and the layout of a work directory.

A configuration is an `ml_collections.ConfigDict`. A file under `configs/` starts from `defaults.base()`, changes fields, and returns it
from `get_config(preset)`; a field that `base()` does not know is an error wherever it appears.
"""

import ast
import difflib
import importlib.util
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from ldm_jax import defaults, paths
from ldm_jax.errors import UserError

TASKS = ("autoencoder", "diffusion")


def load_file(spec: str) -> ConfigDict:
    """Reads `path.py[:preset]`. Raises UserError where the file, its `get_config` or the preset is missing."""
    path, _, preset = spec.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"no configuration file at {path}")
    module_spec = importlib.util.spec_from_file_location("ldm_jax_config_file", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} has no get_config(preset)")
        config = module.get_config(preset) if preset else module.get_config()
    except (AttributeError, KeyError, TypeError, ValueError, NameError, SyntaxError, ImportError) as error:
        # a ConfigDict's own errors name the field
        reason = " ".join(str(error).split()).partition(". Other fields present")[0].lstrip("'")  # a KeyError's text is quoted
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config gives {type(config).__name__}, not a ConfigDict")
    given, known = field_paths(config), field_paths(defaults.base())
    if extra := [name for name in given if name not in known]:
        raise UserError(f"{path}: {_unknown(extra[0], defaults.base())}")
    if missing := [name for name in known if name not in given]:
        raise UserError(f"{path}: the fields {', '.join(missing)} are missing; start from ldm_jax.defaults.base()")
    return config.lock()


def _unknown(path: str, config: ConfigDict) -> str:
    nearest = difflib.get_close_matches(path, sorted(field_paths(config)), n=1, cutoff=0)[0]
    return f"unknown configuration field {path!r}; the nearest is {nearest!r}"


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets the field `a.b.c` from its text form; the field must exist and the value have its type. Raises UserError."""
    *groups, name = path.split(".")
    group = config
    for depth, part in enumerate([*groups, name]):
        if not isinstance(group, ConfigDict) or part not in group:
            raise UserError(_unknown(path, config))
        group = group[part] if depth < len(groups) else group
    old = group[name]
    if isinstance(old, ConfigDict):
        raise UserError(f"{path} is a group of fields: {', '.join(sorted(old))}")
    group[name] = _parse(path, text, old)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
# what tuples that are empty by default hold, where it is not whole numbers
_OF_EMPTY = {
    "data.buckets": str,
    "mesh.rules": str,
    "sample.prompts": str,
    "sample.guidance_interval": float,
    "sample.churn_interval": float,
    "diffusion.betas": float,
}


def _parse(path: str, text: str, old: Any) -> Any:
    """The value that `text` means for a field whose value was `old`."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if not isinstance(old, tuple):
        parsed = _as_kind(value, type(old))
        if parsed is None:
            raise UserError(f"{path} takes {_KINDS[type(old)]}, not {text!r}")
        return parsed
    kind = type(old[0]) if old else _OF_EMPTY.get(path, int)
    values = [_as_kind(element, kind) for element in (value if isinstance(value, tuple | list) else (value,))]
    if None in values:
        raise UserError(f"{path} takes a tuple, each element {_KINDS[kind]}, not {text!r}")
    return tuple(values)


def _as_kind(value: Any, kind: type) -> Any:
    """The value as that type where this changes nothing, else None."""
    if kind is float and type(value) is int:
        value = float(value)
    return value if type(value) is kind else None


def field_paths(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all fields."""
    paths: list[str] = []
    for name, value in config.items():
        paths += field_paths(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return paths


def flat(config: ConfigDict) -> dict[str, Any]:
    """Dotted name to value; sequences as lists, so that it equals what JSON gives back."""
    values = {}
    for path in field_paths(config):
        value: Any = config
        for part in path.split("."):
            value = value[part]
        values[path] = list(value) if isinstance(value, tuple) else value
    return values


def from_flat(values: dict[str, Any]) -> ConfigDict:
    """The inverse of `flat`. Raises UserError for fields that this version does not have."""
    config = defaults.base()
    for path, value in values.items():
        *groups, name = path.split(".")
        group = config
        try:
            for part in groups:
                group = group[part]
            group[name] = tuple(value) if isinstance(value, list) else value
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"the stored configuration is of another version: it has the field {path} = {value!r}") from error
    return config


def from_command(spec: str, overrides: list[str], weights: bool = True) -> ConfigDict:
    """The configuration of a command line: a file and `--config.a.b=v` arguments. Raises UserError."""
    return overridden(load_file(spec), overrides, weights)


def overridden(config: ConfigDict, overrides: list[str], weights: bool = True) -> ConfigDict:
    """The configuration, changed by `--config.a.b=v` arguments and checked; `weights` as of `check`. Raises UserError."""
    for argument in overrides:
        match = re.fullmatch(r"--config\.([\w.]+)=(.*)", argument, re.DOTALL)
        if not match:
            raise UserError(f"unknown argument {argument!r}; fields of the configuration are set by --config.group.field=value")
        override(config, match[1], match[2])
    if config.task == "diffusion" and not config.first_stage.path:
        config.first_stage.path = config.train.init_from
    check(config, weights)
    return config


def check(config: ConfigDict, weights: bool = True) -> None:
    """What can be said without building anything; without `weights`, those that a run starts from may be missing. Raises UserError."""
    if config.task not in TASKS:
        raise UserError(f"task {config.task!r} is not one of {', '.join(TASKS)}")
    stages = {"": config} if config.task == "autoencoder" or config.first_stage.path else {"": config, "first_stage.": config.first_stage}
    for prefix, group in stages.items():
        _check_positive(group.train, f"{prefix}train.", ("steps", "batch_size", "accumulation", "max_nan", "log_every"))
        if not 0 <= group.optimizer.learning_rate < math.inf:
            raise UserError(f"{prefix}optimizer.learning_rate must be a finite number from 0 up, not {group.optimizer.learning_rate}")
        if group.train.dtype not in ("auto", "bfloat16", "float32", "float64"):
            raise UserError(f"{prefix}train.dtype {group.train.dtype!r} is not one of auto, bfloat16, float32, float64")
        if not 0 <= group.train.stall_after < math.inf:
            raise UserError(f"{prefix}train.stall_after must be a finite number of seconds from 0 up, not {group.train.stall_after}")
        _check_profile(group.train, f"{prefix}train.")
        if not group.ema.decays or any(not 0 < d < 1 for d in group.ema.decays):
            raise UserError(f"{prefix}ema.decays must be numbers between 0 and 1, not {group.ema.decays}")
        if group.optimizer.warmup > group.train.steps:
            raise UserError(f"{prefix}optimizer.warmup ({group.optimizer.warmup}) is longer than {prefix}train.steps ({group.train.steps})")
    for name, fields in _POSITIVE.items():
        _check_positive(config[name], f"{name}.", fields)
    _check_buckets(config)
    for name, fields in _POSITIVE_CONDITIONING.items():
        _check_positive(config.conditioning[name], f"conditioning.{name}.", fields)
    shares = {f"conditioning.{name}.drop_rate": group.drop_rate for name, group in config.conditioning.items()}
    for name, share in {**shares, "denoiser.dropout": config.denoiser.dropout}.items():
        if not 0 <= share <= 1:
            raise UserError(f"{name} is a share in [0, 1], not {share}")
    text = config.conditioning.text
    if weights and text.enabled and text.frozen and not config.train.init_from:
        raise UserError("conditioning.text.frozen leaves the text encoder as it is: give its weights with train.init_from")
    neighbors = config.conditioning.neighbors
    if neighbors.queries and (config.data.buckets or config.data.source == "shapes"):
        raise UserError("conditioning.neighbors.queries are of files in their order: not for data.buckets, nor for drawn scenes")
    scale = config.first_stage.latent_scale
    if scale not in ("std", "channel") and not _is_positive_number(scale):
        raise UserError(f"first_stage.latent_scale {scale!r} is not std, channel or a positive number")
    codebook = config.first_stage.codebook
    _check_positive(codebook, "first_stage.codebook.", ("size",))
    if not 0 <= codebook.ema < 1:
        raise UserError(f"first_stage.codebook.ema is a decay in [0, 1), not {codebook.ema}")
    if not 0 <= codebook.beta < math.inf:
        raise UserError(f"first_stage.codebook.beta must be a finite number from 0 up, not {codebook.beta}")
    if config.evaluate.prompts < 2:
        raise UserError(f"evaluate.prompts must be at least 2, as scenes exchange their conditions, not {config.evaluate.prompts}")
    _check_held_out(config)
    if config.evaluate.every < 0:
        raise UserError(f"evaluate.every must be 0 (no evaluations while training) or more, not {config.evaluate.every}")
    if not config.evaluate.guidance or config.evaluate.held_out < 0:
        raise UserError("evaluate.guidance needs at least one scale, and evaluate.held_out may not be negative")
    if config.task == "autoencoder" or not config.first_stage.path:
        check_resolution(config, latent_factor(config.first_stage))


def _check_held_out(config: ConfigDict) -> None:
    """Raises UserError where `evaluate.path` and `evaluate.split` name no other pictures than those of the training."""
    group, data = config.evaluate, config.data
    if not (group.path or group.split):
        return
    if data.source == "shapes":
        raise UserError("evaluate.path and evaluate.split are of files; held-out scenes are drawn")
    if group.split and data.source not in ("tfds", "table"):
        raise UserError(f"evaluate.split has no meaning for data.source={data.source}: give evaluate.path")
    if (group.path or data.path, group.split or data.split) == (data.path, data.split):
        raise UserError("evaluate.path and evaluate.split name the pictures of the training: held-out ones are others")
    if config.conditioning.neighbors.enabled:
        raise UserError("evaluate.path: neighbours of held-out pictures are not searched; leave evaluate.path and evaluate.split empty")


def bucket_sizes(data: ConfigDict) -> list[tuple[int, int]]:
    """Height and width of each of `data.buckets`. Raises UserError."""
    sizes = []
    for text in data.buckets:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text) if isinstance(text, str) else None
        if not match:
            raise UserError(f"data.buckets are heights and widths in pixels, such as ('512x512', '448x576'), not {text!r}")
        sizes.append((int(match[1]), int(match[2])))
    return sizes


def _check_buckets(config: ConfigDict) -> None:
    data = config.data
    if data.buckets and data.min_window:
        raise UserError("data.buckets fits whole pictures, data.min_window takes square windows of them: give one of the two")
    if data.buckets and config.task == "autoencoder":
        raise UserError("data.buckets are sizes for the denoiser; an autoencoder learns from squares")


def latent_factor(first_stage: ConfigDict) -> int:
    """Pixels a latent position stands for, along each axis."""
    return 1 if first_stage.kind == "identity" else first_stage.patch_size * 2 ** (len(first_stage.channel_mult) - 1)


_POSITIVE = {
    "data": ("resolution", "size", "encode_batch", "workers"),
    "sample": ("every", "steps", "batch_size"),
    "evaluate": ("guidance_prompts", "examples", "samples"),
    "checkpoint": ("every", "keep"),
}


_POSITIVE_CONDITIONING = {
    "text": ("vocab_size", "max_length", "width", "depth", "num_heads", "head_dim"),
    "label": ("num_classes", "width"),
    "boxes": ("max_objects", "vocab_size", "width", "depth", "num_heads", "head_dim"),
    "neighbors": ("count", "width"),
}


def _check_positive(group: ConfigDict, prefix: str, names: Sequence[str]) -> None:
    for name in names:
        if group[name] < 1:
            raise UserError(f"{prefix}{name} must be at least 1, not {group[name]}")


def _check_profile(train: ConfigDict, prefix: str) -> None:
    if train.profile and not (len(train.profile) == 2 and 2 <= train.profile[0] <= train.profile[1] <= train.steps):
        raise UserError(
            f"{prefix}profile is () or the first and the last update of a trace, from 2 (the first one compiles) to {prefix}steps"
            f" ({train.steps}), not {train.profile}"
        )


def check_resolution(config: ConfigDict, factor: int) -> None:
    """Raises UserError where the pictures do not go through an autoencoder of this factor, or its latents through the denoiser."""
    halvings = len(config.denoiser.channel_mult) - 1
    named = {"data.resolution": (config.data.resolution,), **{f"data.buckets: {h}x{w}": (h, w) for h, w in bucket_sizes(config.data)}}
    for name, sides in named.items():
        for side in sides:
            if side % factor:
                raise UserError(f"{name}: {side} pixels are not divisible by the autoencoder's factor {factor}")
            if config.task == "diffusion" and side // factor % 2**halvings:
                raise UserError(f"{name}: a side of {side // factor} latents cannot be halved {halvings} times by the denoiser")


def _is_positive_number(text: str) -> bool:
    return re.fullmatch(r"\d*\.?\d+(e-?\d+)?", text) is not None and 0 < float(text) < math.inf


def first_stage_run(config: ConfigDict) -> ConfigDict:
    """The configuration of the first stage's own run, as a diffusion run starts it: its `train`, `optimizer` and `ema` move to the top."""
    run = ConfigDict(config.to_dict())
    run.task = "autoencoder"
    run.data.buckets = ()
    for name in ("train", "optimizer", "ema"):
        run[name] = ConfigDict(config.first_stage[name].to_dict())
    return run.lock()


# Fields that may differ between the first run and the one that resumes it: they change neither the form of the state nor what data comes
# when. (`steps` stretches a schedule that decays; `init_from` is read once, at the start; whose first stage a denoiser has is looked at
# when it goes on: `learnt_latents`.)
_FREE = re.compile(
    r"(mesh|checkpoint|sample|evaluate)\..*|(first_stage\.)?train\.(steps|log_every|profile|max_nan|stall_after|init_from|remat|accumulation)"
    r"|data\.(path|latents|copies|encode_batch|workers|max_broken)"
    r"|first_stage\.(path|loss\.(vgg|linear))"
)


def check_same_run(stored: dict[str, Any], config: ConfigDict, where: str) -> None:
    """Raises UserError with the differences where `config` would go on with another run's work directory."""
    now = flat(config)
    free = re.compile(_FREE.pattern + (r"|first_stage\.(train|optimizer|ema)\..*" if config.task == "autoencoder" else ""))
    different = [
        f"{name}: {stored.get(name, 'absent')} there, {now.get(name, 'absent')} now"
        for name in sorted({*stored, *now})
        if stored.get(name) != now.get(name) and not free.fullmatch(name)
    ]
    if different:
        raise UserError(f"{where} belongs to another configuration ({'; '.join(different)}); choose another --workdir or undo the change")


class WorkDir:
    """Where a run keeps what it makes; see the README for the layout."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Of a file system or gs://. Raises as `paths.resolve`."""
        self.path = paths.resolve(path)
        self.config = self.path / "config.json"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.evaluations = self.path / "evaluations"
        self.not_finite = self.path / "not_finite"
        self.profile = self.path / "profile"
        self.model = self.path / "model"
        self.latents = self.path / "latents"

    @property
    def first_stage(self) -> "WorkDir":
        return WorkDir(self.path / "first_stage")

    def stored(self) -> dict[str, Any]:
        """The run's configuration, flat. Raises UserError where config.json is damaged or another program's."""
        try:
            content = json.loads(self.config.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.config}: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
            raise UserError(f"{self.config} holds no configuration of a run: {self.path} is no work directory")
        return content["config"]

    def check(self, config: ConfigDict) -> None:
        """Raises UserError where the directory belongs to another run."""
        if self.config.exists():
            check_same_run(self.stored(), config, str(self.path))

    def claim(self, config: ConfigDict, command: list[str], versions: dict[str, str]) -> None:
        """Creates the directory and its config.json, or checks that it belongs to the same run. Raises UserError."""
        paths.make_directory(self.path, "create the work directory")
        self.check(config)
        paths.write_json(self.config, {"config": flat(config), "command": command, "versions": versions})
