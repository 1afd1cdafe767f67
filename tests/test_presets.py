"""Every preset of every configuration file: complete, of the published size, with the published settings, and honest about what it lacks.

Networks are built abstractly: shapes without memory.
"""

import importlib.util
import math
import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax import config as configs
from ldm_jax.conditioning.build import KINDS, Model, build_conditioning
from ldm_jax.conditioning.conditioner import Conditioning
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.pipeline import Batches
from ldm_jax.defaults import base
from ldm_jax.diffusion.samplers import image_keys
from ldm_jax.interop import exporting
from ldm_jax.interop.compvis import model_map
from ldm_jax.interop.compvis_yaml import to_yaml
from ldm_jax.interop.importing import Networks
from ldm_jax.model_directory import flatten
from ldm_jax.nn.autoencoder import Autoencoder
from ldm_jax.presets import FIRST_STAGES
from ldm_jax.sampling import make_sampling
from ldm_jax.stages import Denoiser, FirstStage, GenerateInputs, build_autoencoder, build_denoiser, generate, init_autoencoder
from ldm_jax.training.inputs import open_source
from ldm_jax.training.run import check_components

FILES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py"))}


def presets_of(file: str) -> list[str]:
    """What a file says that it has."""
    with pytest.raises(UserError) as refusal:
        configs.load_file(f"{FILES[file]}:no such preset")
    return str(refusal.value).partition("it has ")[2].split(", ")


PRESETS = [f"{file}:{name}" for file in FILES for name in presets_of(file)]


@cache
def preset(name: str) -> ConfigDict:
    file, _, row = name.partition(":")
    return configs.load_file(f"{FILES[file]}:{row}")


def docstring(file: str) -> str:
    spec = importlib.util.spec_from_file_location(file, FILES[file])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return " ".join((module.__doc__ or "").split())


# --- networks ---


@cache
def stages(name: str) -> tuple[Autoencoder, Denoiser | None]:
    config = preset(name)
    autoencoder = build_autoencoder(config.first_stage.to_dict(), np.float32)
    if config.task == "autoencoder":
        return autoencoder, None
    about = Model(config.data.resolution, autoencoder.factor, autoencoder.latent_channels, np.float32)
    conditioning = build_conditioning(config.conditioning.to_dict(), about)
    return autoencoder, build_denoiser(config.denoiser.to_dict(), config.diffusion, conditioning, autoencoder.latent_channels, np.float32)


@cache
def abstract_first_stage(network: Autoencoder, resolution: int) -> Any:
    return jax.eval_shape(partial(init_autoencoder, network, resolution=resolution), jax.random.key(0))


@cache
def abstract_denoiser(denoiser: Denoiser, latent_shape: tuple[int, ...]) -> Any:
    return jax.eval_shape(partial(denoiser.init, latent_shape=latent_shape), jax.random.key(0))


def latent_shape(name: str) -> tuple[int, int, int]:
    autoencoder, size = stages(name)[0], preset(name).data.resolution // stages(name)[0].factor
    return size, size, autoencoder.latent_channels


def abstract(name: str) -> dict[str, Any]:
    """Shapes of a preset's parameters, by part. Presets that differ in their process alone share them."""
    autoencoder, denoiser = stages(name)
    if denoiser is None:
        return {"first_stage": abstract_first_stage(autoencoder, preset(name).data.resolution)}
    any_process = replace(denoiser, process=stages("unconditional:shapes")[1].process, prediction="eps")  # type: ignore[union-attr]
    return abstract_denoiser(any_process, latent_shape(name))


def millions(tree: Any) -> float:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) / 1e6


# Millions of parameters, counted in the reference code.
FIRST_STAGE_SIZES = {
    "kl-f4": 55.31,
    "kl-f8": 83.65,
    "kl-f16": 69.61,
    "kl-f32": 103.88,
    "vq-f4": 55.32,
    "vq-f4-noattn": 53.22,
    "vq-f8": 67.72,
    "vq-f8-n256": 67.65,
    "vq-f16": 69.59,
}
DENOISER_SIZES = {
    "unconditional:celeba256": 274.06,
    "unconditional:ffhq256": 274.06,
    "unconditional:bedrooms256": 274.06,
    "unconditional:churches256": 294.97,
    "class_cond:imagenet-f8": 394.98,
    "class_cond:imagenet-f4": 400.92,
    "txt2img:cc-f4": 403.62,
    "txt2img:laion-1p4b": 872.30,
    "txt2img:sd1": 859.52,
    "layout2img:openimages": 246.28,
    "semantic:landscapes256": 215.23,
    "semantic:landscapes512": 215.23,
    "superres:bsr": 113.62,
    "inpaint:places-big": 387.25,
    "retrieval:openimages768": 1335.48,
    # as their authors say
    "txt2img:sd2": 865.91,
    "txt2img:sd2-v": 865.91,
    "txt2img:sd1-inpainting": 859.54,
}
# The text encoders of the paper there, of (tokens, width): each with a matrix and a bias to tokens that nothing reads.
TEXT_SIZES = {
    "txt2img:cc-f4": (186.15, 30_522, 640),
    "txt2img:laion-1p4b": (581.99, 30_522, 1280),
    "layout2img:openimages": (58.86, 8192, 512),
}
# Whole millions of denoiser and conditioners, as the paper and Peebles & Xie (2023) have them.
PUBLISHED_SIZES = {
    "class_cond:imagenet-f1": 396,
    "class_cond:imagenet-f2": 391,
    "class_cond:imagenet-f8": 395,
    "class_cond:imagenet-f16": 395,
    "class_cond:imagenet-f32": 395,
    "class_cond:dit-s": 33,
    "class_cond:dit-b": 130,
    "class_cond:dit-l": 458,
    "class_cond:dit-xl": 675,
    "inpaint:places": 215,
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_at_its_published_size(name: str) -> None:
    shapes, file, row = abstract(name), *name.split(":")
    assert all(millions(part) > 0 for key, part in shapes.items() if key != "conditioner")
    if file == "autoencoder" and row in FIRST_STAGE_SIZES:
        assert round(millions(shapes["first_stage"]), 2) == FIRST_STAGE_SIZES[row]
    if name in DENOISER_SIZES:
        assert round(millions(shapes["denoiser"]), 2) == DENOISER_SIZES[name]
    if name in TEXT_SIZES:
        size, tokens, width = TEXT_SIZES[name]
        assert round(millions(shapes["conditioner"]) + tokens * (width + 1) / 1e6, 2) == size
    if name in PUBLISHED_SIZES:
        assert abs(millions(shapes) - PUBLISHED_SIZES[name]) < 1.5


def test_every_row_with_a_size_is_a_preset() -> None:
    assert {f"autoencoder:{row}" for row in (*FIRST_STAGES, *FIRST_STAGE_SIZES)} <= {*PRESETS}
    assert {*DENOISER_SIZES, *TEXT_SIZES, *PUBLISHED_SIZES} <= {*PRESETS}


def test_the_169_millions_of_super_resolution_are_those_with_the_first_stage() -> None:
    first_stage = abstract_first_stage(stages("superres:imagenet")[0], 256)
    assert round(millions(abstract("superres:imagenet")) + millions(first_stage)) == 169


@pytest.mark.parametrize(
    ("name", "shape"),
    [(f"class_cond:imagenet-f{f}", (256 // f, 256 // f, c)) for f, c in {1: 3, 2: 2, 4: 3, 8: 4, 16: 8, 32: 32}.items()]
    + [("retrieval:openimages768", (48, 48, 16)), ("txt2img:sd1", (64, 64, 4)), ("semantic:landscapes512", (128, 128, 3))],
)
def test_latents_have_their_published_shape(name: str, shape: tuple[int, ...]) -> None:
    assert latent_shape(name) == shape


@pytest.mark.parametrize("name", ["superres:shapes", "inpaint:shapes", "retrieval:shapes", "superres:bsr"])
def test_a_preset_samples_whether_or_not_it_can_be_trained(name: str) -> None:
    config, (autoencoder, denoiser) = preset(name), stages(name)
    assert denoiser is not None
    params = {**abstract(name), "first_stage": abstract_first_stage(autoencoder, config.data.resolution)}
    draw = partial(generate, FirstStage(autoencoder), denoiser, make_sampling(config.sample, steps=2), None)
    arrays, noise = denoiser.conditioning.null(1), np.zeros((1, *latent_shape(name)), np.float32)
    inputs = GenerateInputs(noise, image_keys(0, np.arange(1)), arrays, arrays, config.sample.guidance)
    images = jax.tree.leaves(jax.eval_shape(draw, params, inputs))[0]
    assert images.shape == (1, config.data.resolution, config.data.resolution, 3) and images.dtype == np.uint8


# --- what diffusers opens ---

PIPELINES = {
    "class_cond:dit-s": "DiTPipeline",
    "class_cond:dit-b": "DiTPipeline",
    "class_cond:dit-l": "DiTPipeline",
    "class_cond:dit-xl": "DiTPipeline",
    "txt2img:laion-1p4b": "LDMTextToImagePipeline",
    "txt2img:sd1": "StableDiffusionPipeline",
    "txt2img:sd2": "StableDiffusionPipeline",
    "txt2img:sd2-v": "StableDiffusionPipeline",
    "txt2img:sd1-inpainting": "StableDiffusionInpaintPipeline",
    "superres:imagenet": "LDMSuperResolutionPipeline",
    "superres:bsr": "LDMSuperResolutionPipeline",
    **{f"unconditional:{name}": "LDMPipeline" for name in ("celeba256", "ffhq256", "bedrooms256")},
    **{f"autoencoder:{name}": "AutoencoderKL" if name.startswith("kl") else "VQModel" for name in FIRST_STAGES},
}
# The reasons for all others.
REFUSALS = {
    "unconditional:churches256": "UNet2DModel has one number of channels a head, not one number of heads",
    ".*:(shapes|smoke|gpu)": "sample no flow process|no autoencoder of patches",
    "class_cond:imagenet-f1": "no class for pixels as latents",
    "class_cond:imagenet-.*": "whose UNet takes label",
    "txt2img:cc-f4": "decodes with a KL autoencoder only; .* of factor 8 and with texts of 77 tokens, not 4 and 77",
    "layout2img:.*": "whose UNet takes boxes",
    "semantic:.*": "whose UNet takes segmentation",
    "inpaint:.*": "whose UNet takes mask",
    "retrieval:.*": "whose UNet takes neighbors",
}


def networks(name: str) -> Networks:
    """Those of a preset as a model directory would have them, with a tokenizer."""
    config, (autoencoder, denoiser) = preset(name), stages(name)
    scale = 0.7 if config.first_stage.latent_scale == "std" else 1 / float(config.first_stage.latent_scale)
    if denoiser is not None:
        tokenizer = Tokenizer.train(["a picture"], 300, config.conditioning.text.max_length)
        conditioners: Any = [replace(c, tokenizer=tokenizer) if c.name == "text" else c for c in denoiser.conditioning.conditioners]  # type: ignore[type-var]
        denoiser = replace(denoiser, conditioning=Conditioning(conditioners))
    info = {group: config[group].to_dict() for group in ("diffusion", "sample", "conditioning")} | {"resolution": config.data.resolution}
    made = Networks(FirstStage(autoencoder, (0.0,), (scale,)), denoiser, info)
    shapes = {"first_stage": abstract_first_stage(autoencoder, config.data.resolution), **(abstract(name) if denoiser else {})}
    made.__dict__["params"] = shapes  # shared by the tests, as it takes long
    return made


def exported(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Writes everything of an exported preset but its weights, and returns the class that opens it. Raises UserError."""
    made = networks(name)
    monkeypatch.setattr(exporting, "open_model", lambda path: exporting.Model(made, lambda leaf: np.zeros(()), flatten(made.params)))
    monkeypatch.setattr(exporting, "_save", lambda path, model, keys: keys)
    return exporting.export_folder("model", folder)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_trained_goes_to_the_pipeline_that_the_readme_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in PIPELINES:
        assert exported(name, tmp_path / "out", monkeypatch) == PIPELINES[name]
        return
    reason = next(reason for pattern, reason in REFUSALS.items() if re.fullmatch(pattern, name))
    with pytest.raises(UserError, match=reason):
        exported(name, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_the_papers_format_takes_all_but_transformers_and_models_of_scenes(name: str) -> None:
    if re.fullmatch(r".*:(shapes|smoke|gpu|dit-.*)", name):
        with pytest.raises(UserError, match="the paper's code"):
            to_yaml(networks(name))
    else:
        assert "target: " in to_yaml(networks(name))
        assert model_map(networks(name))


def test_the_readme_names_each_pipeline() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    table = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `") and "Pipeline`" in line}
    for pipeline in {*PIPELINES.values()} - {"AutoencoderKL", "VQModel"}:
        for name in [name.partition(":")[2] for name, opens in PIPELINES.items() if opens == pipeline]:
            assert f"`{name}`" in table[f"`{pipeline}`"], (pipeline, name)


# --- settings ---


@pytest.mark.parametrize("file", FILES)
def test_the_default_preset_needs_no_download(file: str) -> None:
    config = configs.load_file(str(FILES[file]))
    assert configs.flat(config) == configs.flat(preset(f"{file}:shapes"))
    assert config.data.source == "shapes" and not config.data.path and config.conditioning.text.tokenizer == "train"
    assert not config.conditioning.text.frozen and config.train.init_from == config.first_stage.path == ""


@pytest.mark.parametrize("file", FILES)
def test_an_unknown_preset_is_one_line_with_those_there_are(file: str) -> None:
    with pytest.raises(UserError) as refusal:
        configs.load_file(f"{FILES[file]}:huge")
    assert str(refusal.value) == f"configs/{file}.py has no preset 'huge'; it has {', '.join(presets_of(file))}"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete_and_passes_the_checks(name: str) -> None:
    config = preset(name)
    assert {path: type(value) for path, value in configs.flat(config).items()} == {
        path: type(value) for path, value in configs.flat(base()).items()
    }
    if config.conditioning.text.enabled and config.conditioning.text.frozen:
        with pytest.raises(UserError, match=r"give its weights with train\.init_from$"):
            configs.check(config)
        config = configs.from_flat(configs.flat(config))
        config.train.init_from = "weights"
    configs.check(config)


# First stage, first and last beta, loss, batch size, learning rate and updates, as tables 12, 13, 15 and the released files have them;
# None where they are not published.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "unconditional:celeba256": ("vq-f4", 0.0015, 0.0195, "l2", 48, 9.6e-5, 410_000),
    "unconditional:ffhq256": ("vq-f4", 0.0015, 0.0195, "l2", 42, 8.4e-5, 635_000),
    "unconditional:bedrooms256": ("vq-f4", 0.0015, 0.0195, "l2", 48, 9.6e-5, 1_900_000),
    "unconditional:churches256": ("kl-f8", 0.0015, 0.0155, "l1", 96, 5e-5, 500_000),
    "class_cond:imagenet-f1": (None, 0.0015, 0.0195, "l2", 7, 4.9e-5, 2_000_000),
    "class_cond:imagenet-f2": ("vq-f2", 0.0015, 0.0195, "l2", 9, 6.3e-5, 2_000_000),
    "class_cond:imagenet-f4": ("vq-f4", 0.0015, 0.0195, "l2", 1200, 1e-4, 178_000),
    "class_cond:imagenet-f8": ("vq-f8", 0.0015, 0.0195, "l2", 64, 6.4e-5, 4_800_000),
    "class_cond:imagenet-f16": ("vq-f16", 0.0015, 0.0195, "l2", 112, 4.5e-5, 2_000_000),
    "class_cond:imagenet-f32": (None, 0.0015, 0.0195, "l2", 112, 4.5e-5, 2_000_000),
    "txt2img:laion-1p4b": ("kl-f8", 0.00085, 0.012, "l2", 680, 1e-4, 390_000),
    "txt2img:cc-f4": ("vq-f4", 0.0015, 0.0195, "l2", 28, 5.6e-5, None),
    "txt2img:sd1": ("kl-f8", 0.00085, 0.012, "l2", 2048, 1e-4, None),
    "layout2img:openimages": ("vq-f4", 0.0015, 0.0205, "l1", 24, 4.8e-5, 4_400_000),
    "layout2img:coco": ("vq-f8", None, None, None, 48, 4.8e-5, 170_000),
    "semantic:landscapes256": ("vq-f4", 0.0015, 0.0205, "l1", 48, 4.8e-5, 360_000),
    "semantic:landscapes512": ("vq-f4", 0.0015, 0.0205, "l1", 8, 8e-6, None),
    "superres:imagenet": ("vq-f4", None, None, None, 64, 6.4e-5, 860_000),
    "superres:bsr": ("vq-f4", 0.0015, 0.0155, "l2", 64, 6.4e-5, None),
    "inpaint:places": ("vq-f4", None, None, None, 128, 1e-6, 360_000),
    "inpaint:places-big": ("vq-f4-noattn", 0.0015, 0.0205, "l1", None, 1e-6, None),
    "retrieval:openimages768": ("kl-f16", 0.0015, 0.015, "l2", None, 1e-4, None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_papers_settings(name: str) -> None:
    first_stage, *expected = SETTINGS[name]
    config = preset(name)
    diffusion, train = config.diffusion, config.train
    found = (diffusion.start, diffusion.end, diffusion.loss, train.batch_size, config.optimizer.learning_rate, train.steps)
    for value, published in zip(found, expected, strict=True):
        assert published is None or value == pytest.approx(published)
    assert (diffusion.process, diffusion.schedule, diffusion.prediction, diffusion.num_steps) == ("discrete", "linear", "eps", 1000)
    optimizer = config.optimizer
    assert (optimizer.kind, optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == ("adamw", 0.9, 0.999, 0.01, 0.0)
    assert config.ema.decays == (0.9999,)
    if first_stage is not None:
        group, row = config.first_stage.to_dict(), preset(f"autoencoder:{first_stage}").first_stage.to_dict()
        differing = {field for field in group if group[field] != row[field]}
        assert differing <= {"latent_scale"}


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_the_papers_settings_of_first_stages(name: str) -> None:
    row, config = FIRST_STAGES[name], preset(f"autoencoder:{name}")
    optimizer, codebook = config.optimizer, name.startswith("vq")
    assert config.task == "autoencoder" and config.data.resolution == 256
    assert (optimizer.kind, optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip_norm) == ("adam", 0.5, 0.9, 0.0, 0.0)
    assert optimizer.learning_rate == pytest.approx(4.5e-6 * config.train.batch_size)
    assert (config.first_stage.loss.reduction, config.first_stage.kind) == (("mean", "vq") if codebook else ("sum", "kl"))
    factor, suffix = 256 // latent_shape(f"autoencoder:{name}")[0], name.split("-f")[1].split("-")
    assert factor == int(suffix[0]) and 2 ** (len(row.channel_mult) - 1) == factor
    if suffix[1:] and suffix[1][0] in "nd" and suffix[1][1:].isdigit():
        assert int(suffix[1][1:]) == (row.codebook if suffix[1][0] == "n" else row.channels)


# --- what the files say ---

# Scores (FID, IS, PSNR, SSIM, LPIPS), updates, and V100 days.
RESULTS: dict[str, tuple[str, ...]] = {
    "unconditional": ("5.11", "410,000", "14.4", "4.98", "635,000", "26", "2.95", "1.9 million", "60", "4.02", "500,000", "18"),
    "class_cond": ("10.56", "103.49", "3.60", "247.67", "178,000", "271", "15.51", "79.03", "4.8 million", "79", "2 million"),
    "txt2img": ("23.31", "20.03", "12.63", "30.29", "390,000", "16.79", "13.89", "237,000", "150,000 A100 hours"),
    "layout2img": ("32.02", "4.4 million", "42.06", "170,000", "345M"),
    "semantic": ("360,000", "215M", "ask for attention at 32, 16 and 8, which no level of theirs has", "middle block only"),
    "superres": ("2.8", "4.8", "166.3", "24.4", ".69", "860,000", "169M", "has no level of 16"),
    "inpaint": ("9.39", ".246", "1.50", ".137", "360,000", "eight V100"),
    "retrieval": ("1.34 billion", "not published"),
    "autoencoder": ("0.58", "27.4", "533,066", "0.90", "24.2", "246,803", "29 V100 days", "66"),
}


@pytest.mark.parametrize("file", FILES)
def test_the_docstring_names_every_preset_and_its_published_result(file: str) -> None:
    text = docstring(file)
    for name in presets_of(file):
        assert name in text or name.partition("-")[2] in text, name
    missing = [number for number in RESULTS[file] if number not in text]
    assert not missing


# --- what cannot be trained yet ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "class").mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "class" / "a.png")
    return str(folder)


@pytest.mark.parametrize(("name", "missing"), [("layout2img:coco", "boxes"), ("semantic:landscapes256", "segmentation")])
def test_training_without_its_data_says_what_is_missing(name: str, missing: str, pictures: str, tmp_path: Path) -> None:
    config = configs.from_flat(configs.flat(preset(name)))
    config.data.path = pictures
    with pytest.raises(UserError, match=rf"^data.path: .*\b{missing}\b"):
        open_source(config, WorkDir(tmp_path / "new"))


@pytest.mark.parametrize("name", [f"{file}:shapes" for file in FILES if file != "autoencoder"])
def test_the_data_of_scenes_has_what_its_presets_need(name: str, tmp_path: Path) -> None:
    config = preset(name)
    workdir = WorkDir(tmp_path / "new")
    source = open_source(config, workdir)
    check_components(config, workdir, source)
    assert not workdir.path.exists()
    batch = Batches(source.below if name.startswith("retrieval") else source, 2, seed=0).batch(0)
    assert batch["image"].shape == (2, 64, 64, 3)
    names = [kind for kind in KINDS if config.conditioning[kind].enabled and kind != "neighbors"]
    assert set(batch) == {"image", *names}


def test_a_picture_with_a_hole_is_not_cached(tmp_path: Path) -> None:
    config = configs.from_flat(configs.flat(preset("inpaint:shapes")))
    config.data.cache = True
    with pytest.raises(UserError, match=r"set data\.cache=False"):
        open_source(config, WorkDir(tmp_path / "new"))
