"""Configurations: overriding, checking, comparing, and writing files whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from ldm_jax import config as configs
from ldm_jax.config import UserError, WorkDir
from ldm_jax.defaults import base

ROOT = Path(__file__).parent.parent
TXT2IMG = str(ROOT / "configs" / "txt2img.py")
PRESETS = ("shapes", "smoke", "gpu", "laion-1p4b")


def overridden(path: str, text: str) -> Any:
    config = base().lock()
    configs.override(config, path, text)
    return configs.flat(config)[path]


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("train.steps", "12", 12),
        ("train.dtype", "float64", "float64"),
        ("data.path", "2024", "2024"),
        ("data.flip", "true", True),
        ("data.flip", "False", False),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("denoiser.channel_mult", "(1,2)", [1, 2]),
        ("denoiser.channel_mult", "[1, 2, 3]", [1, 2, 3]),
        ("denoiser.attention_levels", "2", [2]),
        ("denoiser.attention_levels", "()", []),
        ("sample.guidance_interval", "(0.2, 5)", [0.2, 5.0]),
        ("sample.churn_interval", "[0.05,50]", [0.05, 50.0]),
        ("diffusion.betas", "(0.1,0.2)", [0.1, 0.2]),
        ("sample.prompts", "('a red circle',)", ["a red circle"]),
        ("first_stage.latent_scale", "channel", "channel"),
        ("first_stage.latent_scale", "0.18215", "0.18215"),
        ("first_stage.train.batch_size", "8", 8),
    ],
)
def test_override_takes_the_type_of_the_field(path: str, text: str, value: Any) -> None:
    result = overridden(path, text)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("train.steps", "1.5"),
        ("train.steps", "many"),
        ("train.steps", "True"),
        ("train.steps", ""),
        ("data.flip", "1"),
        ("data.flip", "yes"),
        ("optimizer.learning_rate", "fast"),
        ("optimizer.learning_rate", "True"),
        ("denoiser.channel_mult", "wide"),
        ("denoiser.channel_mult", "(1,'a')"),
        ("denoiser.channel_mult", "(1.5,2)"),
        ("ema.decays", "('a',)"),
        ("sample.prompts", "(1,2)"),
    ],
)
def test_override_refuses_another_type(path: str, text: str) -> None:
    with pytest.raises(UserError, match=path.replace(".", r"\.")) as raised:
        overridden(path, text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("train.step", "train.steps"),
        ("trian.batch_size", "train.batch_size"),
        ("optimizer.learning_rte", "optimizer.learning_rate"),
        ("first_stage.los.kl_weight", "first_stage.loss.kl_weight"),
        ("data.resolution.x", "data.resolution"),
        ("", None),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest(path: str, nearest: str | None) -> None:
    with pytest.raises(UserError, match="unknown configuration field") as raised:
        overridden(path, "1")
    assert repr(path) in str(raised.value)
    assert nearest is None or repr(nearest) in str(raised.value)


def test_a_group_is_not_a_field() -> None:
    with pytest.raises(UserError, match=r"first_stage\.loss is a group of fields: .*disc_start"):
        overridden("first_stage.loss", "1")


@given(steps=st.integers(1, 10**9), rate=st.floats(1e-12, 10.0), mult=st.lists(st.integers(1, 8), max_size=5), path=st.text(max_size=20))
def test_override_reads_back_what_python_writes(steps: int, rate: float, mult: list[int], path: str) -> None:
    assert overridden("train.steps", str(steps)) == steps
    assert overridden("optimizer.learning_rate", repr(rate)) == rate
    assert overridden("denoiser.channel_mult", repr(tuple(mult))) == mult
    assert overridden("data.path", path) == path


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_complete_and_pass_the_checks(preset: str) -> None:
    config = configs.load_file(f"{TXT2IMG}:{preset}")
    configs.check(config)
    assert configs.field_paths(config) == configs.field_paths(base())
    types = {path: type(value) for path, value in configs.flat(config).items()}
    assert types == {path: type(value) for path, value in configs.flat(base()).items()}


def test_the_default_preset_is_shapes() -> None:
    assert configs.flat(configs.load_file(TXT2IMG)) == configs.flat(configs.load_file(f"{TXT2IMG}:shapes"))


@pytest.mark.parametrize("preset", PRESETS)
def test_from_flat_inverts_flat_through_json(preset: str) -> None:
    config = configs.load_file(f"{TXT2IMG}:{preset}")
    again = configs.from_flat(json.loads(json.dumps(configs.flat(config))))
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(("path", "value"), [("train.stepz", 1), ("training.steps", 1), ("train.steps", "many"), ("seed.x", 1)])
def test_a_stored_configuration_of_another_version_is_bad_input(path: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"of another version: it has the field {path} = {value!r}"):
        configs.from_flat({**configs.flat(base()), path: value})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from ldm_jax.defaults import base\ndef get_config():\n    c = base().lock()\n    c.train.stepz = 1\n    return c", "stepz"),
        ("x = 1", "get_config"),
        ("def get_config():\n    return 3", "ConfigDict"),
        ("def get_config(:", "line 1"),
        ("steps = 3\ndef get_config():\n    return stepz", "stepz"),
        ("from ldm_jax.defaults import base\ndef get_config():\n    c = base()\n    c.x = 1\n    return c", 'Key "x"'),
        ("import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'seed': 1})", "task"),
        ("from ldm_jax.defaults import base\ndef get_config():\n    return base()", "positional"),
    ],
    ids=["locked", "no function", "no config", "syntax", "unknown name", "extra field", "missing fields", "takes no preset"],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(UserError) as raised:
        configs.load_file(f"{path}:smoke" if message == "positional" else str(path))
    assert str(path) in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert message == "task" or len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("task", "inpainting", "autoencoder, diffusion"),
        ("train.batch_size", "0", "train.batch_size"),
        ("first_stage.train.steps", "0", "first_stage.train.steps"),
        ("train.dtype", "int8", "train.dtype"),
        ("train.stall_after", "-1.0", "train.stall_after"),
        ("ema.decays", "()", "ema.decays"),
        ("ema.decays", "(1.0,)", "ema.decays"),
        ("optimizer.warmup", "1000000", "optimizer.warmup"),
        ("first_stage.latent_scale", "wide", "latent_scale"),
        ("first_stage.latent_scale", "0", "latent_scale"),
        ("first_stage.codebook.size", "0", "first_stage.codebook.size must be at least 1"),
        ("first_stage.codebook.ema", "1.0", "first_stage.codebook.ema is a decay"),
        ("first_stage.codebook.beta", "-0.1", "first_stage.codebook.beta must be"),
        ("data.resolution", "100", "not divisible by the autoencoder's factor 8"),
        ("data.resolution", "72", "cannot be halved"),
        ("data.resolution", "0", "data.resolution"),
        ("checkpoint.every", "0", "checkpoint.every"),
        ("sample.every", "0", "sample.every"),
        ("conditioning.text.drop_rate", "1.5", "drop_rate"),
        ("optimizer.learning_rate", "-1", "learning_rate"),
        ("evaluate.guidance", "()", "evaluate.guidance"),
        ("evaluate.held_out", "-1", "evaluate.held_out"),
    ],
)
def test_checks_before_anything_is_built(path: str, text: str, message: str) -> None:
    config = base().lock()
    configs.override(config, path, text)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        configs.check(config)


def test_numbers_as_latent_scale() -> None:
    config = base()
    for text in ("0.18215", "1", "1e-2", ".5", "1.5e3"):
        config.first_stage.latent_scale = text
        configs.check(config)


def test_pixels_as_latents_have_no_factor() -> None:
    config = base()
    config.data.resolution = 72  # KL-f8 would leave 9x9
    config.first_stage.kind = "identity"
    configs.check(config)


def test_the_first_stage_of_a_run_is_a_run() -> None:
    config = configs.load_file(f"{TXT2IMG}:smoke")
    run = configs.first_stage_run(config)
    configs.check(run)
    assert run.task == "autoencoder"
    assert run.train.to_dict() == config.first_stage.train.to_dict()
    assert run.optimizer.to_dict() == config.first_stage.optimizer.to_dict()
    assert config.task == "diffusion"


def changed(**fields: str) -> ConfigDict:
    config = base().lock()
    for path, text in fields.items():
        configs.override(config, path.replace("__", "."), text)
    return config


@pytest.mark.parametrize(
    "path_and_text",
    [
        {"seed": "1"},
        {"denoiser__channels": "64"},
        {"data__size": "7"},
        {"train__batch_size": "32"},
        {"train__dtype": "float32"},
        {"first_stage__train__batch_size": "32"},
        {"first_stage__loss__disc_start": "7"},
        {"ema__decays": "(0.5,)"},
    ],
)
def test_another_run_is_refused_with_the_difference(path_and_text: dict[str, str]) -> None:
    now = changed(**path_and_text)
    path = next(iter(path_and_text)).replace("__", ".")
    old, new = configs.flat(base())[path], configs.flat(now)[path]
    with pytest.raises(UserError) as raised:
        configs.check_same_run(configs.flat(base()), now, "runs/old")
    assert f"{path}: {old} there, {new} now" in str(raised.value)
    assert str(raised.value).count(" there, ") == 1
    assert "runs/old" in str(raised.value)


def test_the_same_run_may_change_what_defines_nothing() -> None:
    free = {
        "mesh__fsdp": "2",
        "train__steps": "5",
        "train__log_every": "3",
        "train__stall_after": "60.0",
        "first_stage__train__steps": "5",
        "checkpoint__every": "7",
        "sample__prompts": "('a',)",
        "evaluate__prompts": "7",
        "data__path": "elsewhere",
        "data__workers": "5",
        "data__latents": "shared",
        "first_stage__path": "first",
    }
    configs.check_same_run(configs.flat(base()), changed(**free), "runs/old")


def test_fields_that_one_of_the_two_lacks_are_differences() -> None:
    stored = configs.flat(base())
    stored["data.colour"] = stored.pop("data.flip")
    with pytest.raises(UserError, match=r"data\.colour: False there, absent now; data\.flip: absent there, False now"):
        configs.check_same_run(stored, base(), "runs/old")


def test_claim_writes_the_resolved_configuration_once(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path / "runs" / "new")
    workdir.claim(base(), ["train", "--config", "x"], {"jax": "0"})
    stored = json.loads(workdir.config.read_text())
    assert stored == {"config": configs.flat(base()), "command": ["train", "--config", "x"], "versions": {"jax": "0"}}
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        workdir.claim(changed(seed="1"), [], {})
    assert json.loads(workdir.config.read_text()) == stored
    workdir.claim(changed(train__steps="5"), [], {})
    assert json.loads(workdir.config.read_text())["config"]["train.steps"] == 5


def test_a_damaged_or_foreign_config_json_is_bad_input(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    for content in ("{", "{}", "[1]"):
        workdir.config.write_text(content)
        with pytest.raises(UserError, match=r"config\.json"):
            workdir.claim(base(), [], {})
        assert workdir.config.read_text() == content
