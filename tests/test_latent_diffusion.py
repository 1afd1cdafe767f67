"""The model as one object: written and read, sampling, encoding and decoding, and what bad input gets."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ldm_jax
from ldm_jax.conditioning.conditioners import MaskConditioner
from ldm_jax.config import UserError, WorkDir
from ldm_jax.diffusion.samplers import SamplerSettings, image_keys, initial_noise, sample
from ldm_jax.latent_diffusion import LatentDiffusion, load_model
from ldm_jax.sampling import make_tiles
from ldm_jax.stages import masked_jit, to_uint8
from ldm_jax.training import state as states
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.run import model_info, versions
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["a red circle", "a blue square", "a green ring"]


def random_params(stage: Any, seed: int = 0) -> dict[str, Any]:
    """Parameters without the zeros of a fresh network, which would hide the conditions."""
    params = jax.device_get(jax.jit(stage.denoiser.init, static_argnums=1)(jax.random.key(seed), stage.latent_shape))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (x + 0.2 * rng.normal(size=x.shape)).astype(np.float32), params)


@pytest.fixture(scope="module")
def stage() -> Any:
    cfg = tiny.config()
    cfg.sample.update(guidance=2.0)
    return tiny.diffusion_stage(cfg)


@pytest.fixture(scope="module")
def model(stage: Any) -> LatentDiffusion:
    return stage.model(random_params(stage), model_info(stage.config, 0))


@pytest.fixture
def saved(model: LatentDiffusion, tmp_path: Path) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model"


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to one of the 255 grey levels."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def test_a_saved_model_is_the_same_model(model: LatentDiffusion, saved: Path) -> None:
    again = ldm_jax.load(str(saved))
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.first_stage.shift == (0.1,) and again.first_stage.scale == (0.7,)
    assert again.info["sample"] == json.loads(json.dumps(model.info["sample"]))
    np.testing.assert_array_equal(again.sample(prompts=PROMPTS, seed=3), model.sample(prompts=PROMPTS, seed=3))


def test_a_model_stays_until_the_next_is_complete(model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    model.save(path)
    before = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def full(*_: Any) -> None:
        raise UserError("no space left")

    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr("ldm_jax.paths.write_json", full)
        model.save(path)
    assert before == {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    model.info["step"] = 7
    model.save(path)
    assert json.loads((path / "model.json").read_text())["step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_model_directory_has_the_layout_of_the_contract(saved: Path) -> None:
    files = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    parts = {f"{part}/{name}" for part in ("first_stage", "denoiser", "conditioner") for name in ("config.json", "weights.safetensors")}
    assert files == parts | {"model.json", "conditioner/tokenizer.json"}
    info = json.loads((saved / "model.json").read_text())
    assert info["format"] == 1 and info["shift"] == [0.1] and info["scale"] == [0.7] and info["diffusion"]["process"] == "discrete"


def test_load_takes_a_work_directory_finished_or_not(stage: Any, model: LatentDiffusion, tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    workdir.claim(stage.config, ["train"], versions())
    info = {"task": "autoencoder", "resolution": 16}
    LatentDiffusion(stage.first_stage, None, {"first_stage": stage.first_stage_params}, info).save(workdir.first_stage.model)
    (tmp_path / "tokenizer.json").write_text(tiny.tokenizer(stage.config).to_json())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        ldm_jax.load(str(tmp_path))
    state = states.create(random_params(stage, 1), stage.optimizers, ("denoiser", "conditioner"), (0.9,))
    with Checkpoints(workdir.checkpoints, 1) as checkpoints:
        checkpoints.save(4, state, wait=True)

    for restored in (ldm_jax.load(str(tmp_path)), ldm_jax.load(str(tmp_path), step=4, ema=0.9)):
        for a, b in zip(jax.tree.leaves(restored.params["denoiser"]), jax.tree.leaves(state.ema["0.9"]["denoiser"]), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match=r"no EMA of decay 0\.5; it has 0\.9"):
        ldm_jax.load(str(tmp_path), ema=0.5)
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        ldm_jax.load(str(tmp_path), step=5)

    model.save(workdir.model)
    finished = ldm_jax.load(str(tmp_path))
    np.testing.assert_array_equal(finished.params["denoiser"]["out_conv"]["kernel"], model.params["denoiser"]["out_conv"]["kernel"])
    with pytest.raises(UserError, match="step and ema belong to a work directory"):
        ldm_jax.load(str(workdir.model), step=4)
    with pytest.raises(UserError, match="neither a model directory nor a work directory"):
        ldm_jax.load(str(tmp_path / "samples"))


def test_samples_are_pictures_that_the_seed_decides(model: LatentDiffusion) -> None:
    images = model.sample(prompts=PROMPTS, seed=1)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, model.sample(prompts=PROMPTS, seed=1))
    assert not near(images, model.sample(prompts=PROMPTS, seed=2))


def test_an_image_depends_on_seed_index_and_prompt_alone(model: LatentDiffusion) -> None:
    prompts = [PROMPTS[i % 3] for i in range(19)]
    images = model.sample(prompts=prompts, batch_size=8)
    assert images.shape[0] == 19
    assert near(images, model.sample(prompts=prompts, batch_size=16))
    assert near(images[:5], model.sample(prompts=prompts[:5]))


def test_a_stochastic_sampler_too(model: LatentDiffusion) -> None:
    draw = partial(model.sample, prompts=PROMPTS * 4, eta=1.0)
    images = draw(batch_size=8)
    assert near(images, draw(batch_size=16)) and not near(images, model.sample(prompts=PROMPTS * 4))


def test_prompts_and_numbers(model: LatentDiffusion) -> None:
    one = model.sample(prompts=PROMPTS[:1], num=3)
    assert near(one, model.sample(prompts=PROMPTS[:1] * 3)) and not near(one[0], one[1])
    assert near(model.sample(num=2), model.sample(prompts=["", ""]))
    assert model.sample().shape[0] == 1
    assert model.sample(prompts=PROMPTS, num=3).shape[0] == 3
    with pytest.raises(UserError, match="3 prompts for 2 images"):
        model.sample(prompts=PROMPTS, num=2)
    with pytest.raises(UserError, match="must be a list of texts"):
        model.sample(prompts="a red circle")  # type: ignore[arg-type]


def test_conditions_move_the_result(model: LatentDiffusion) -> None:
    images = model.sample(prompts=PROMPTS)
    assert not near(images, model.sample(prompts=PROMPTS[::-1]))
    assert not near(images, model.sample(prompts=PROMPTS, negative="a black cross"))
    assert near(images, model.sample(prompts=PROMPTS, negative=""))
    assert not near(images, model.sample(prompts=PROMPTS, guidance=4.0))
    assert near(model.sample(prompts=PROMPTS, guidance=0.0), model.sample(num=3, guidance=1.0))


def test_guidance_one_is_the_conditional_model(model: LatentDiffusion) -> None:
    settings, n, seed = SamplerSettings("ddim", 2, spacing="trailing"), 8, 5
    prompts, index = [PROMPTS[0]] * n, np.arange(n)
    condition = model.condition({"text": prompts})
    noise = initial_noise(seed, index, model.latent_shape)
    assert model.denoiser is not None
    denoise = partial(model.denoise, condition=condition)
    latents = sample(denoise, model.denoiser.process, model.denoiser.prediction, settings, noise, image_keys(seed, index))
    expected = np.asarray(to_uint8(model.decode(latents)))
    assert near(model.sample(prompts=prompts, guidance=1.0, seed=seed), expected)


def test_latents_are_scaled(model: LatentDiffusion) -> None:
    images = np.stack([tiny.Pictures()[i]["image"] for i in range(3)])
    latents = model.encode(images)
    assert latents.shape == (3, 4, 4, 4) and latents.dtype == np.float32
    floats = images / np.float32(127.5) - 1
    mean, log_var = np.split(np.asarray(jax.jit(model.first_stage.moments)(model.params["first_stage"], floats)), 2, axis=-1)
    np.testing.assert_allclose(latents, (mean - 0.1) / 0.7, atol=1e-5)
    np.testing.assert_allclose(model.encode(floats), latents, atol=1e-5)
    drawn = model.encode(images, jax.random.key(0))
    deviations = (drawn - latents) * 0.7 / np.exp(0.5 * log_var)
    assert 0.7 < deviations.std() < 1.3 and abs(deviations.mean()) < 0.3
    decoded = model.decode(latents)
    assert decoded.shape == images.shape and decoded.dtype == np.float32
    raw = jax.jit(partial(model.first_stage.network.apply, method="decode"))({"params": model.params["first_stage"]}, mean)
    np.testing.assert_allclose(decoded, raw, atol=1e-4)
    with pytest.raises(ValueError, match="factor 4"):
        model.encode(images[:, :15])


@pytest.mark.parametrize("kind", ["vq", "identity"])
def test_every_kind_of_first_stage_is_written_and_read(kind: str, tmp_path: Path) -> None:
    cfg = tiny.quantised(tiny.config())
    cfg.first_stage.kind = kind
    first, params = tiny.first_stage(cfg)
    model = LatentDiffusion(first, None, {"first_stage": params}, {"resolution": 16})
    model.save(tmp_path)
    again = load_model(tmp_path, dtype="float32")
    assert again.first_stage == first and again.latent_shape == {"vq": (4, 4, 4), "identity": (16, 16, 3)}[kind]
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)
    images = tiny.Pictures()[0]["image"][None]
    latents = model.encode(images)
    np.testing.assert_array_equal(again.encode(images, jax.random.key(0)), latents)
    np.testing.assert_array_equal(again.decode(latents), model.decode(latents))
    if kind == "identity":
        np.testing.assert_array_equal(to_uint8(model.decode(latents)), images)


def test_scaled_vq_latents_are_quantised_in_decode() -> None:
    cfg = tiny.quantised(tiny.config())
    first, params = tiny.first_stage(cfg)
    model = LatentDiffusion(first, None, {"first_stage": params}, {"resolution": 16})
    entries = np.asarray(params["quantize"]["embedding"])
    raw = entries[np.random.default_rng(0).integers(0, len(entries), (2, 4, 4))]
    gap = np.sort(np.linalg.norm(entries[:, None] - entries, axis=-1), axis=1)[:, 1].min()
    near_entries = raw + np.float32(0.2 * gap)  # off by 0.4 of the gap, over 4 channels
    scaled = (np.stack([raw, near_entries]) - 0.1) / np.float32(0.7)
    np.testing.assert_array_equal(model.decode(scaled[0]), model.decode(scaled[1]))
    far = model.decode(scaled[0][:, ::-1])
    assert np.abs(far - model.decode(scaled[0])).max() > 0


def test_an_autoencoder_alone_has_no_samples(model: LatentDiffusion, tmp_path: Path) -> None:
    LatentDiffusion(model.first_stage, None, model.params, {"resolution": 16}).save(tmp_path)
    alone = load_model(tmp_path)
    images = tiny.Pictures()[0]["image"][None]
    np.testing.assert_array_equal(alone.encode(images), model.encode(images))
    with pytest.raises(UserError, match="autoencoder alone"):
        alone.sample()


@pytest.mark.parametrize("settings", [{"sampler": "fast"}, {"steps": 0}, {"spacing": "random"}, {"sampler": "ddim", "eta": -1.0}])
def test_a_wrong_sampler_is_bad_input(model: LatentDiffusion, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="sample: "):
        model.sample(prompts=PROMPTS, **settings)


def test_weights_that_do_not_fit_are_listed_at_once(saved: Path) -> None:
    for part, names in {"denoiser": ("out_conv.kernel", "time_embed_0.bias"), "conditioner": ("text.token_embedding",)}.items():
        file = saved / part / "weights.safetensors"
        tensors = load_file(file)
        tensors["extra." + part] = tensors.pop(names[0])
        if len(names) > 1:
            tensors[names[1]] = tensors[names[1]][:-1]
        save_file(tensors, file)
    with pytest.raises(UserError) as error:
        load_model(saved)
    text = str(error.value)
    assert "\n" not in text
    for tensor in ("denoiser.out_conv.kernel: missing there", "denoiser.time_embed_0.bias: (31,) there, (32,) wanted"):
        assert tensor in text
    assert "conditioner.text.token_embedding: missing there" in text and "conditioner.extra.conditioner: " in text


def test_a_first_stage_that_does_not_fit(saved: Path) -> None:
    file = saved / "first_stage" / "weights.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("conv_out")}, file)
    with pytest.raises(UserError, match=r"conv_out\.bias: missing there, \(12,\) wanted; first_stage\.conv_out\.kernel: missing"):
        load_model(saved)


@pytest.mark.parametrize("missing", ["model.json", "first_stage/config.json", "denoiser/weights.safetensors"])
def test_a_model_with_a_missing_file(saved: Path, missing: str) -> None:
    (saved / missing).unlink()
    with pytest.raises(UserError, match="not a complete"):
        load_model(saved)


def test_a_file_of_weights_that_was_cut_short(saved: Path) -> None:
    file = saved / "denoiser" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a complete part of a model"):
        load_model(saved)


def test_a_model_of_another_format(saved: Path) -> None:
    info = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_text(json.dumps(info | {"format": 2}))
    with pytest.raises(UserError, match="has format 2; this version reads format 1"):
        load_model(saved)


@pytest.mark.parametrize(("style", "empty"), [("ldm", 0.0), ("sd", 127.5)])
@pytest.mark.parametrize(("shrink", "rows"), [("any", 1), ("nearest", 0)])
def test_pictures_with_holes(model: LatentDiffusion, style: Any, empty: float, shrink: Any, rows: int) -> None:
    """A hole one pixel thick, off the pixels that stand for a latent."""
    size, stage = model.info["resolution"], model.first_stage
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    holes = np.zeros((2, size, size), bool)
    holes[0, 1] = True
    conditioner = MaskConditioner(size // stage.network.factor, 0, style, shrink, 0.0)
    both = np.asarray(masked_jit(stage, conditioner, None, model.params, images, holes))
    assert both.shape == (2, *model.latent_shape[:2], model.latent_shape[2] + 1) and both.dtype == np.float32
    expected = -np.ones(both.shape[:3])
    expected[0, :rows] = 1
    np.testing.assert_array_equal(both[..., -1], expected)
    floats = images / 127.5 - 1.0
    floats[0, 1] = empty / 127.5 - 1.0
    np.testing.assert_allclose(both[..., :-1], model.encode(floats.astype(np.float32)), rtol=1e-4, atol=1e-5)
    in_windows = masked_jit(stage, conditioner, make_tiles(size, stage.network.factor), model.params, images, holes)
    np.testing.assert_allclose(in_windows, both, atol=1e-4)
    images[0, 1] = 255 - images[0, 1]
    np.testing.assert_array_equal(both, masked_jit(stage, conditioner, None, model.params, images, holes))


def test_guidance_of_one_runs_a_batch_that_is_not_doubled(model: LatentDiffusion) -> None:
    """And gives what the conditional model alone does."""
    plain = model.sample(prompts=PROMPTS, steps=2, guidance=1.0)
    per_image = model.sample(prompts=PROMPTS, steps=2, guidance=[1.0, 1.0, 1.0])
    assert near(plain, per_image)


def test_each_image_has_its_own_guidance(model: LatentDiffusion) -> None:
    scales = [1.0, 2.0, 4.0]
    together = model.sample(prompts=PROMPTS, steps=3, guidance=scales)
    for i, scale in enumerate(scales):
        alone = model.sample(prompts=PROMPTS, steps=3, guidance=[scale] * 3)
        assert near(together[i : i + 1], alone[i : i + 1])
    with pytest.raises(UserError, match="2 guidance scales for 3 images"):
        model.sample(prompts=PROMPTS, guidance=[1.0, 2.0])


def test_a_start_from_pictures(model: LatentDiffusion) -> None:
    side = model.info["resolution"]
    pictures = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    weak, strong = (model.sample(prompts=PROMPTS, steps=20, strength=s, init_images=pictures).astype(int) for s in (0.05, 1.0))
    own = to_uint8(model.decode(model.encode(pictures)))
    assert np.abs(weak - own).mean() < np.abs(strong - own).mean()
    one = model.sample(prompts=PROMPTS, steps=20, strength=0.5, init_images=pictures[:1])
    assert near(one, model.sample(prompts=PROMPTS, steps=20, strength=0.5, init_images=np.repeat(pictures[:1], 3, axis=0)))


def test_pictures_stay_outside_a_hole(model: LatentDiffusion) -> None:
    side = model.info["resolution"]
    pictures = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    holes = np.zeros((1, side, side), bool)
    holes[:, 5:7, 5:7] = True
    kept, other = (model.sample(prompts=PROMPTS, steps=4, init_images=p, holes=holes, seed=3) for p in (pictures, 255 - pictures))
    inside = holes[0]
    np.testing.assert_array_equal(kept[:, ~inside], pictures[:, ~inside])
    assert not near(kept[:, inside], pictures[:, inside]) and not near(kept[:, inside], other[:, inside])
    for everywhere in (np.zeros_like(holes), np.ones_like(holes)):
        with pytest.raises(UserError, match="holes are everywhere, or nowhere"):
            model.sample(prompts=PROMPTS, steps=4, init_images=pictures, holes=everywhere)
    with pytest.raises(UserError, match=r"holes must be \[1 or 3,"):
        model.sample(prompts=PROMPTS, init_images=pictures, holes=holes[:, 4:])


@pytest.mark.slow
def test_pictures_larger_than_those_of_training(model: LatentDiffusion) -> None:
    side = model.info["resolution"]
    drawn = model.sample(prompts=PROMPTS[:2], steps=2, size=(side, 2 * side), seed=5)
    assert drawn.shape == (2, side, 2 * side, 3)
    again = model.sample(prompts=PROMPTS[:2], steps=2, init_images=np.zeros_like(drawn), strength=1.0, seed=5)
    assert again.shape == drawn.shape
    with pytest.raises(UserError, match="init_images is for"):
        model.sample(prompts=PROMPTS[:2], size=(side, side), init_images=np.zeros_like(drawn), strength=0.5)
    with pytest.raises(UserError, match=rf"multiples of \d+: {side}x{side}, not {side + 1}x{side}"):
        model.sample(prompts=PROMPTS[:2], size=(side + 1, side))


def test_windows_of_a_picture_are_told_no_places_in_the_whole(model: LatentDiffusion) -> None:
    knowing = replace(model.denoiser, network=replace(model.denoiser.network, places=True))
    placed = LatentDiffusion(model.first_stage, knowing, model.params, model.info)
    side = model.info["resolution"]
    with pytest.raises(UserError, match="told places in the whole picture"):
        placed.sample(prompts=PROMPTS[:1], steps=1, tile=side, size=(2 * side, 2 * side))


@pytest.mark.slow
def test_large_pictures_in_tiles(model: LatentDiffusion) -> None:
    """Tiles as large as the picture are the picture; smaller ones make another, that is decoded in tiles to the same latents' picture."""
    side = model.info["resolution"]
    wide: dict[str, Any] = {"prompts": PROMPTS[:2], "steps": 2, "size": (side, 2 * side), "seed": 5}
    whole = model.sample(**wide)
    assert near(whole, model.sample(**wide, tile=2 * side))
    started = [model.sample(**wide, init_images=whole, strength=0.5, decode_tile=tile) for tile in (None, 2 * side)]
    assert near(*started)
    tiled, decoded = model.sample(**wide, tile=side), model.sample(**wide, decode_tile=side, tile_passes=3)
    assert tiled.shape == whole.shape and not near(tiled, whole)
    assert psnr(decoded, whole) > 30
    apart = model.sample(**wide, decode_tile=side, tile_passes=0)
    assert psnr(apart, whole) < psnr(decoded, whole)
    latents = model.encode(whole)
    np.testing.assert_allclose(model.encode(whole, tile=2 * side), latents, atol=1e-4)
    np.testing.assert_allclose(model.decode(latents, tile=2 * side), model.decode(latents), atol=1e-4)
    with pytest.raises(UserError, match="a tile of 3 pixels must be a multiple of"):
        model.sample(**wide, tile=3)
    with pytest.raises(UserError, match="tile_passes is of tile or decode_tile"):
        model.sample(**wide, tile_passes=2)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(20 * np.log10(255) - 10 * np.log10(np.mean((a.astype(float) - b) ** 2)))


def test_states_on_the_way_end_in_the_images(model: LatentDiffusion) -> None:
    images, states = model.sample_states(2, prompts=PROMPTS, steps=4, sampler="ddim", batch_size=2)
    assert states.shape == (2, *images.shape) and near(states[-1], images) and not near(states[0], images)
    assert near(images, model.sample(prompts=PROMPTS, steps=4, sampler="ddim", batch_size=2))
    with pytest.raises(UserError, match="this model takes no colour"):
        model.sample_states(2, prompts=PROMPTS, colour=["red"])


@pytest.mark.slow
def test_what_is_inverted_is_drawn_again(model: LatentDiffusion, stage: Any) -> None:
    mild = jax.tree.map(lambda x: 0.1 * x, random_params(stage))  # with the fixture's weights nothing comes back: a path is too wild
    calm = stage.model(mild, model.info)
    drawn = model.sample(prompts=PROMPTS, steps=4)
    own = to_uint8(calm.decode(calm.encode(drawn))).astype(int)
    errors = []
    for steps in (4, 64):
        noise = calm.invert(drawn, steps, text=PROMPTS)
        again = calm.sample(prompts=PROMPTS, steps=steps, sampler="ddim", guidance=1.0, noise=noise)
        errors.append(np.abs(again.astype(int) - own).mean())
    assert errors[1] < 0.3 * errors[0] and errors[1] < 2, errors
    with pytest.raises(UserError, match="noise must be"):
        model.sample(prompts=PROMPTS, noise=np.zeros((1, 2, 2, 4), np.float32))


@pytest.mark.slow
def test_a_weak_model_guides(model: LatentDiffusion, stage: Any) -> None:
    other = stage.model(random_params(stage, 1), model.info)
    guided = model.sample(prompts=PROMPTS, steps=3, guidance=2.0, weak=other)
    assert not near(guided, model.sample(prompts=PROMPTS, steps=3, guidance=2.0))
    assert near(model.sample(prompts=PROMPTS, steps=3, guidance=2.0, weak=model), model.sample(prompts=PROMPTS, steps=3, guidance=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "strength and holes are of init_images"),
        ({"init_images": np.zeros((1, 8, 8, 3), np.uint8)}, "started from with strength"),
        ({"init_images": np.zeros((3, 16, 16, 3), np.float32), "strength": 0.5}, "init_images must be uint8 .*, not float32"),
        ({"init_images": np.zeros((2, 8, 8, 3), np.uint8), "strength": 0.5}, r"init_images must be uint8 \[1 or 3,.*, not uint8"),
        ({"guidance": 1.0, "guidance_rescale": 0.7}, "guidance_rescale has no effect with a scale of 1"),
        ({"guidance_kind": "cfg++", "guidance": 3.0, "sampler": "ddim"}, "'cfg\\+\\+' takes a scale from 0 to 1"),
        ({"guidance_kind": "cfg++", "guidance": 0.5, "sampler": "dpmpp_2m"}, "renoising in sampler 'ddim'"),
        ({"guidance_interval": [3.0, 1.0]}, "0 <= low < high"),
        ({"guidance_interval": [1e5, 1e6]}, "guidance_interval 100000 to 1e[+]06 holds no level"),
        ({"guidance_kind": "apg", "guidance": 3.0}, "'apg' is 'cfg' without"),
        ({"guidance": 1.0, "negative": "a red circle"}, "negative has no effect with a scale of 1"),
        ({"guidance": math.nan}, "guidance must be a number, not nan"),
        ({"guidance": [1.0, math.inf, 2.0]}, "guidance must be a number"),
        ({"seed": 2**32}, r"seed must lie in \[0, 2\*\*32\), not 4294967296"),
        ({"seed": -1}, "seed must lie in"),
        ({"sampler": "heun", "eta": 0.0}, "'heun' has no eta"),
        ({"sampler": "dpmpp_2m", "eta": 0.5}, "has no eta"),
        ({"spacing": "karras", "sampler": "dpmpp_2m", "steps": 5, "guidance_kind": "apc"}, "unknown guidance 'apc'"),
    ],
)
def test_combinations_that_make_no_sense(model: LatentDiffusion, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.sample(prompts=PROMPTS, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_kind": "apg", "guidance": 3.0, "guidance_parallel": 0.0},
        {"guidance_kind": "apg", "guidance": 3.0, "guidance_radius": 0.5, "guidance_momentum": -0.5},
        {"guidance_kind": "cfg++", "guidance": 0.6, "sampler": "ddim"},
        {"guidance_interval": [0.2, 3.0], "guidance": 3.0, "guidance_rescale": 0.5},
        {"sampler": "dpmpp_2m"},
    ],
    ids=str,
)
def test_options_reach_the_sampler(model: LatentDiffusion, options: dict[str, Any]) -> None:
    base = model.sample(prompts=PROMPTS, steps=4, guidance=options.get("guidance"))
    found = model.sample(prompts=PROMPTS, steps=4, **options)
    assert found.shape == base.shape
    assert not np.array_equal(found, base)
