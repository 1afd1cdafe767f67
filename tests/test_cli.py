"""The commands: bad input is one clear line and exit code 2, with nothing left behind; shell and Python sample the same pixels."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax import cli, encode, neighbors, sample, train
from ldm_jax import config as configs
from ldm_jax.data.embeddings import mean_colors
from ldm_jax.data.transforms import center_crop, fit
from ldm_jax.latent_diffusion import LatentDiffusion
from tests import tiny

ROOT = Path(__file__).parent.parent
SMOKE = f"{ROOT}/configs/txt2img.py:smoke"
EIGHT = ("--config.train.batch_size=8", "--config.first_stage.train.batch_size=8")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """`run(main, *arguments) -> (exit code, stdout, stderr)`, in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    cache = jax.config.jax_compilation_cache_dir

    def call(main: Callable[[], int], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.guarded(main)
        out, err = capsys.readouterr()
        return end.value.code, out, err  # type: ignore[return-value]

    yield call
    jax.config.update("jax_compilation_cache_dir", cache)


def test_an_interrupt_is_one_line(run: Run) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    assert run(main) == (130, "", "interrupted\n")


def refused(result: tuple[int, str, str]) -> str:
    """The one line of a refusal."""
    code, out, err = result
    assert (code, out) == (cli.BAD_INPUT, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(path)


@pytest.mark.parametrize("command", [train, encode])
@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (SMOKE, ("--config.train.step=3",), "unknown configuration field 'train.step'; the nearest is 'train.steps'"),
        (SMOKE, ("--config.train.steps=many",), "train.steps takes a whole number, not 'many'"),
        (SMOKE, ("--config.train=3",), "train is a group of fields"),
        (SMOKE, ("--steps=3",), "unknown argument '--steps=3'"),
        (SMOKE, ("--config.train.steps", "3"), "--config.group.field=value"),
        ("missing.py", (), "no configuration file at missing.py"),
        (f"{ROOT}/configs/txt2img.py:huge", (), "no preset 'huge'; it has shapes, smoke"),
        (SMOKE, ("--config.task=paint",), "autoencoder, diffusion"),
        (SMOKE, ("--config.data.resolution=30",), "data.resolution: 30 pixels are not divisible by the autoencoder's factor 4"),
        (SMOKE, ("--config.train.dtype=int8",), "train.dtype"),
        (SMOKE, ("--num-processes=2",), "give all three"),
    ],
)
def test_a_wrong_configuration(command, config: str, arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path) -> None:
    assert message in refused(run(command.main, "--config", config, "--workdir", "runs/new", *arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config.data.source=folder", "--config.data.path=missing"), "no folder 'missing'"),
        (("--config.data.source=folder",), "data.path is empty"),
        (("--config.data.source=web",), "data.source is 'web'; it must be one of shapes, folder, tfds"),
        (("--config.train.batch_size=12",), "batch size 12 is not divisible by 8 devices"),
        (("--config.first_stage.train.batch_size=12",), "batch size 12 is not divisible by 8 devices"),
        (("--config.mesh.data=3",), "mesh data=3, fsdp=1 does not fit 8 devices"),
        (("--config.first_stage.path=missing",), "no model at missing"),
        (("--config.first_stage.kind=gan",), "first_stage.kind 'gan' is not one of kl, vq, identity"),
        (("--config.first_stage.kind=vq", "--config.first_stage.attention_levels=(64,)"), "attention_levels [64] match no level"),
        (("--config.first_stage.loss.reduction=max",), "reduction 'max'"),
        (("--config.first_stage.attention_levels=(64,)",), "attention_levels [64] match no level"),
        (("--config.first_stage.loss.disc_loss=soft",), "discriminator loss 'soft'"),
        (("--config.first_stage.loss.vgg=missing.pth",), "missing.pth"),
        (("--config.denoiser.kind=gan",), "denoiser.kind 'gan' is not one of unet, dit"),
        (("--config.denoiser.attention_levels=(64,)",), "attention_levels [64] match no level"),
        (("--config.denoiser.num_heads=4",), "give one of num_heads and head_channels"),
        (("--config.diffusion.process=cold",), "cold"),
        (("--config.diffusion.prediction=score",), "score"),
        (("--config.diffusion.loss=l3",), "l3"),
        (("--config.diffusion.time_sampling=often",), "often"),
        (("--config.sample.sampler=magic",), "magic"),
        (("--config.sample.spacing=leading",), "spacing 'leading'"),
        (("--config.optimizer.kind=sgd",), "unknown optimiser 'sgd'"),
        (("--config.optimizer.schedule=stairs",), "unknown learning-rate schedule 'stairs'"),
        (("--config.first_stage.optimizer.kind=sgd",), "unknown optimiser 'sgd'"),
        (("--config.conditioning.text.tokenizer=./missing.json",), "no tokenizer './missing.json'"),
    ],
)
def test_wrong_input_is_found_before_anything_is_written(
    arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(configs.WorkDir, "claim")  # which a run calls before it writes
    assert message in refused(run(train.main, "--config", SMOKE, "--workdir", "runs/new", *EIGHT, *arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [((), "no pictures"), (("notes.txt",), "no pictures"), (("a.png", "a.txt", "cat/b.png"), "1 of 2 pictures"), (("a.png",), "'a.png'")],
    ids=["empty", "other files", "one without caption", "none with caption"],
)
def test_a_wrong_folder(files: tuple[str, ...], message: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in files:
        if name.endswith(".png"):
            picture(tmp_path / "data" / name)
        else:
            (tmp_path / "data" / name).write_text("a caption")
    arguments = (*EIGHT, "--config.data.source=folder", "--config.data.path=data")
    assert message in refused(run(train.main, "--config", SMOKE, "--workdir", "runs/new", *arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_work_directory_of_another_configuration_stays_as_it_is(run: Run, tmp_path: Path) -> None:
    workdir = configs.WorkDir(tmp_path / "old")
    workdir.claim(configs.load_file(SMOKE), ["train"], {})
    before = workdir.config.read_bytes()
    line = refused(run(train.main, "--config", SMOKE, "--workdir", "old", *EIGHT, "--config.denoiser.channels=64", "--config.data.size=99"))
    assert "data.size: 512 there, 99 now; denoiser.channels: 32 there, 64 now" in line
    assert workdir.config.read_bytes() == before
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["config.json"]


def test_a_file_where_the_work_directory_should_be(run: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    assert "cannot create the work directory taken" in refused(run(train.main, "--config", SMOKE, "--workdir", "taken", *EIGHT))
    assert (tmp_path / "taken").read_text() == "mine"


def test_missing_flags(run: Run) -> None:
    assert "--config" in refused(run(train.main, "--workdir", "runs/new"))
    assert "--workdir" in refused(run(train.main, "--config", SMOKE))
    assert "--output" in refused(run(sample.main, "--model", "runs/new"))
    assert "--num" in refused(run(sample.main, "--model", "runs/new", "--output", "out", "--num", "few"))


def test_encoding_needs_a_first_stage(run: Run, tmp_path: Path) -> None:
    assert "no model at" in refused(run(encode.main, "--config", SMOKE, "--workdir", "runs/new"))
    assert "diffusion run" in refused(run(encode.main, "--config", SMOKE, "--workdir", "runs/new", "--config.task=autoencoder"))
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_process_leaves_nothing_either(tmp_path: Path) -> None:
    """As above, but nothing is compiled or cached yet, and `__main__` runs as it does for a user."""
    arguments = ["--config", SMOKE, "--workdir", "runs/new", *EIGHT, "--config.first_stage.path=missing"]
    done = subprocess.run(
        [sys.executable, "-m", "ldm_jax.train", *arguments],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "no model at missing" in refused((done.returncode, done.stdout, done.stderr))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`models(condition)`: the directory of an untrained model that is told a text, a label, boxes, text and label, or nothing."""

    @cache
    def make(condition: str) -> Path:
        cfg = tiny.config()
        cfg.diffusion.update(process="flow", prediction="flow")
        cfg.sample.update(sampler="euler")
        cfg.conditioning.text.enabled = "text" in condition
        cfg.conditioning.label.update(enabled="label" in condition, num_classes=8, width=16)
        cfg.conditioning.boxes.update(enabled=condition == "boxes", width=16, depth=1, num_heads=2, head_dim=8)
        cfg.conditioning.neighbors.update(count=4, width=6)
        cfg.conditioning.segmentation.update(num_classes=5, stages=2)
        if condition in ("segmentation", "low_res", "mask", "neighbors"):
            cfg.conditioning[condition].enabled = True
            cfg.data.cache = condition != "mask"
        return tiny.save_untrained(cfg, tmp_path_factory.mktemp("trained") / "model")

    return make


@pytest.fixture(scope="module")
def model(models: Callable[[str], Path]) -> Path:
    """The directory of an untrained text-to-image model."""
    return models("text")


def test_the_command_and_python_give_the_same_pixels(model: Path, run: Run, tmp_path: Path) -> None:
    settings = ("--prompt", "a red circle", "--num", "3", "--guidance", "2", "--seed", "5")
    code, out, err = run(sample.main, "--model", str(model.parent), *settings, "--output", "out")
    assert (code, out) == (cli.OK, "3 images: out\n"), err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", "00001.png", "00002.png", "grid.png"]
    images = ldm_jax.load(str(model)).sample(prompts=["a red circle"], num=3, guidance=2, seed=5)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / f"{i:05d}.png")), image)
    assert np.abs(images[0].astype(int) - images[1]).max() > 0


def test_a_file_of_prompts(model: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue square  \n")
    code, _, err = run(sample.main, "--model", str(model), "--prompts-file", "prompts.txt", "--output", "out")
    assert code == cli.OK, err
    images = ldm_jax.load(str(model)).sample(prompts=["a red circle", "a blue square"])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "00001.png")), images[1])


@pytest.mark.parametrize(
    ("condition", "arguments", "inputs"),
    [
        ("label", ("--label", "3", "--num", "2"), {"label": [3, 3]}),
        ("label", ("--label", "3", "7"), {"label": [3, 7]}),
        ("nothing", ("--num", "2"), {"num": 2}),
        ("text and label", ("--label", "3", "7", "--prompt", "a red circle"), {"label": [3, 7], "text": ["a red circle"] * 2}),
        ("text and label", ("--label", "3", "7"), {"label": [3, 7], "text": ["", ""]}),
    ],
)
def test_models_that_are_told_other_things(
    condition: str, arguments: tuple[str, ...], inputs: dict[str, Any], models: Callable[[str], Path], run: Run, tmp_path: Path
) -> None:
    code, out, err = run(sample.main, "--model", str(models(condition)), *arguments, "--output", "out")
    assert (code, out) == (cli.OK, "2 images: out\n"), err
    images = ldm_jax.load(str(models(condition))).sample(**inputs)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", "00001.png", "grid.png"]
    for i, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / f"{i:05d}.png")), image)


@pytest.mark.slow
def test_files_of_what_a_model_is_told(models: Callable[[str], Path], run: Run, tmp_path: Path) -> None:
    """Each kind of file means what its content means in Python."""
    rng = np.random.default_rng(0)
    small, picture = rng.integers(0, 256, (8, 4, 3), np.uint8), rng.integers(0, 256, (20, 24, 3), np.uint8)
    classes, found = rng.integers(0, 5, (16, 16), np.uint8), rng.normal(size=(2, 3, 6)).astype(np.float32)
    hole = np.zeros((20, 24), np.uint8)
    hole[6:14, 8:15] = 255
    for name, array in {"small": small, "picture": picture, "classes": classes, "hole": hole}.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    np.save(tmp_path / "neighbors.npy", found)
    (tmp_path / "boxes.json").write_text('[{"class": 3, "box": [0.1, 0.2, 0.5, 0.9]}]')
    fitted = fit({"image": picture, "mask": hole > 0}, 16, 16)
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("boxes", "--boxes boxes.json boxes.json", {"boxes": [np.array([[3, 0.1, 0.2, 0.5, 0.9]], np.float32)] * 2}),
        ("segmentation", "--segmentation classes.png", {"segmentation": [classes]}),
        ("low_res", "--image small.png", {"low_res": [small]}),
        ("mask", "--image picture.png --mask hole.png", {"image": [fitted["image"]], "mask": [fitted["mask"]]}),
        ("neighbors", "--neighbors neighbors.npy", {"neighbors": list(found)}),
    ]
    for condition, flags, inputs in cases:
        code, _, err = run(sample.main, "--model", str(models(condition)), *flags.split(), "--seed", "4", "--npz", "--output", condition)
        assert code == cli.OK, err
        images = ldm_jax.load(str(models(condition))).sample(**inputs, seed=4)
        np.testing.assert_array_equal(np.load(tmp_path / condition / "samples.npz")["arr_0"], images)
        png = Image.open(tmp_path / condition / "00000.png")
        np.testing.assert_array_equal(np.asarray(png), images[0])
        assert json.loads(png.info["parameters"])["seed"] == 4
    assert np.asarray(Image.open(tmp_path / "low_res" / "00000.png")).shape == (32, 16, 3)
    kept = np.asarray(Image.open(tmp_path / "mask" / "00000.png"))
    np.testing.assert_array_equal(kept[~fitted["mask"]], fitted["image"][~fitted["mask"]])
    assert (kept[fitted["mask"]] != fitted["image"][fitted["mask"]]).any()


def test_neighbours_of_a_picture(run: Run, tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    rows = np.stack([mean_colors(picture) for picture in pictures])
    np.savez(tmp_path / "database.npz", embeddings=rows)
    Image.fromarray(pictures[4]).save(tmp_path / "query.png")
    flags = "--database database.npz --queries query.png --count 2 --output found.npy"
    assert run(neighbors.main, *flags.split())[:2] == (cli.OK, "1 x 2 neighbours: found.npy\n")
    found = np.load(tmp_path / "found.npy")
    assert found.shape == (1, 2, 192) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], rows[np.argsort(-(rows @ rows[4]))[:2]], atol=1e-6)
    assert "7 neighbours of a database of 6" in refused(run(neighbors.main, *flags.replace("2", "7").split()))


@pytest.mark.slow
def test_how_it_is_drawn(model: Path, run: Run, tmp_path: Path) -> None:
    """Every flag of samplers and guidance means what it does in Python."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "start.png")
    flags = (
        "--steps 4 --sampler dpmpp_2m --guidance 3 --guidance-interval 0.2 3 --guidance-rescale 0.5 --init-image start.png --strength 0.5"
    )
    arguments = ("--model", str(model), "--prompt", "a red circle", "--weak", str(model), *flags.split())
    code, _, err = run(sample.main, *arguments, "--output", "out")
    assert code == cli.OK, err
    loaded = ldm_jax.load(str(model))
    options = {"steps": 4, "sampler": "dpmpp_2m", "guidance": 3.0, "guidance_interval": [0.2, 3.0], "guidance_rescale": 0.5}
    start = center_crop(picture, 16)[None]
    images = loaded.sample(prompts=["a red circle"], weak=loaded, init_images=start, strength=0.5, **options)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "00000.png")), images[0])


def test_a_hole_and_the_states_on_the_way(model: Path, run: Run, tmp_path: Path) -> None:
    picture, hole = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
    picture[:, 8:], hole[4:12, 4:12] = 200, 255
    Image.fromarray(picture).save(tmp_path / "start.png")
    Image.fromarray(hole).save(tmp_path / "hole.png")
    flags = "--steps 4 --states 2 --num 2 --init-image start.png --hole hole.png"
    code, _, err = run(sample.main, "--model", str(model), "--prompt", "a red circle", *flags.split(), "--output", "out")
    assert code == cli.OK, err
    images, states = ldm_jax.load(str(model)).sample_states(
        2, prompts=["a red circle"], num=2, steps=4, init_images=picture[None], holes=hole[None]
    )
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "00001.png")), images[1])
    assert states.shape == (2, 2, 16, 16, 3) and (tmp_path / "out" / "states.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--init-image missing.png --strength 0.5", "cannot read the picture missing.png"),
        ("--strength 0.5", "strength and holes are of init_images"),
        ("--states 0", "states are kept after every 1 step or more, not 0"),
        ("--guidance 1 --guidance-rescale 0.5", "guidance_rescale has no effect with a scale of 1"),
        ("--guidance-interval 3 1", "0 <= low < high"),
        ("--guidance 1 2 3", "3 guidance scales for 1 images"),
        ("--weak missing", "missing"),
        ("--sampler plms --eta 0.5", "sampler 'plms' has no eta"),
    ],
)
def test_ways_of_drawing_that_make_no_sense(flags: str, message: str, model: Path, run: Run, tmp_path: Path) -> None:
    assert message in refused(run(sample.main, "--model", str(model), "--prompt", "a red circle", *flags.split(), "--output", "out"))
    assert not (tmp_path / "out").exists()


def test_one_image_where_nothing_is_told(models: Callable[[str], Path], run: Run) -> None:
    assert run(sample.main, "--model", str(models("nothing")), "--output", "out")[:2] == (cli.OK, "1 images: out\n")


def test_an_image_obeys_its_class(models: Callable[[str], Path]) -> None:
    images = ldm_jax.load(str(models("label"))).sample(label=[3, 7, 3], seed=1, guidance=4.0).astype(int)
    again = ldm_jax.load(str(models("label"))).sample(label=[7, 7, 3], seed=1, guidance=4.0)
    assert np.abs(images[0] - again[0]).max() > 1
    np.testing.assert_array_equal(images[1:], again[1:])


@pytest.mark.parametrize(
    ("condition", "arguments", "message"),
    [
        ("text", ("--class", "3"), "this model takes no --class: it takes --prompt"),
        ("text", ("--crop", "0", "0", "1", "1"), "this model takes no --crop: it takes --prompt"),
        ("label", ("--prompt", "a red circle"), "this model takes no --prompt: it takes --class"),
        ("label", ("--label", "3", "--negative", "a red circle"), "this model takes no --negative: it takes --class"),
        ("label", ("--num", "3"), "this model needs --class: one for every image, or one for each"),
        ("label", ("--label", "8"), "labels must lie in [0, 8), not 8 to 8"),
        ("label", ("--label", "-1"), "labels must lie in [0, 8), not -1 to -1"),
        ("label", ("--label", "99999999999"), "labels must be int32 numbers"),
        ("label", ("--label", "red"), "argument --label/--class: invalid int value: 'red'"),
        ("label", ("--label", "1", "2", "--num", "3"), "2 label for 3 images: give one, or one for each image"),
        ("text and label", ("--prompt", "a red circle"), "this model needs --class"),
        ("nothing", ("--prompt", "a red circle"), "this model takes no --prompt: it takes --num alone"),
        ("nothing", ("--label", "3"), "this model takes no --class: it takes --num alone"),
        ("boxes", (), "this model needs --boxes: one for every image, or one for each"),
        ("boxes", ("--prompt", "a red circle"), "this model takes no --prompt: it takes --boxes"),
        ("boxes", ("--boxes", "missing.json"), "cannot read boxes from missing.json"),
        ("low_res", ("--image", "missing.png"), "cannot read the picture missing.png"),
        ("low_res", ("--mask", "missing.png"), "this model takes no --mask: it takes --image"),
        ("mask", ("--image", "missing.png"), "this model needs --mask"),
        ("neighbors", ("--neighbors", "missing.npy"), "cannot read embeddings from missing.npy"),
        ("nothing", ("--guidance", "7"), "guidance has no effect with a model whose training dropped no condition"),
        ("nothing", ("--steps", "4", "--states", "5"), "states are kept after every 5 steps, of which there are 4"),
        ("nothing", ("--seed", "99999999999999999999"), "seed must lie in [0, 2**32)"),
    ],
)
def test_what_a_model_is_told(
    condition: str, arguments: tuple[str, ...], message: str, models: Callable[[str], Path], run: Run, tmp_path: Path
) -> None:
    assert message in refused(run(sample.main, "--model", str(models(condition)), *arguments, "--output", "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "missing", "--prompt", "a red circle"), "missing is neither a model directory nor a work directory"),
        (("--model", "MODEL", "--sampler", "magic"), "magic"),
        (("--model", "MODEL", "--spacing", "leading"), "spacing 'leading'"),
        (("--model", "MODEL", "--steps", "0"), "at least 1 step"),
        (("--model", "MODEL", "--eta", "2"), "eta"),
        (("--model", "MODEL", "--num", "0"), "num must be at least 1, not 0"),
        (("--model", "MODEL", "--batch-size", "-1"), "batch_size must be at least 1, not -1"),
        (("--model", "MODEL", "--step", "3"), "step and ema belong to a work directory"),
        (("--model", "MODEL", "--prompt", "x", "--prompts-file", "y"), "not both"),
        (("--model", "MODEL", "--prompts-file", "missing.txt"), "cannot read missing.txt"),
    ],
)
def test_wrong_sampling_leaves_no_output(arguments: tuple[str, ...], message: str, model: Path, run: Run, tmp_path: Path) -> None:
    given = [str(model) if argument == "MODEL" else argument for argument in arguments]
    assert message in refused(run(sample.main, *given, "--output", "out"))
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(model: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    assert "cannot create taken" in refused(run(sample.main, "--model", str(model), "--prompt", "a red circle", "--output", "taken"))


@pytest.mark.parametrize("part", ["model.json", "first_stage/weights.safetensors", "denoiser/config.json", "conditioner/tokenizer.json"])
def test_an_incomplete_model(part: str, model: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / part).unlink()
    assert "copy" in refused(run(sample.main, "--model", "copy", "--output", "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["model.json", "first_stage/weights.safetensors", "denoiser/config.json", "conditioner/tokenizer.json"])
def test_a_damaged_model(part: str, model: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    whole = (tmp_path / "copy" / part).read_bytes()
    (tmp_path / "copy" / part).write_bytes(whole[: len(whole) // 2])
    assert "copy" in refused(run(sample.main, "--model", "copy", "--output", "out"))


@pytest.mark.slow
def test_a_first_stage_of_another_shape(model: Path, run: Run, tmp_path: Path) -> None:
    """`first_stage.path` takes a model whose latents the denoiser cannot halve."""
    cfg = tiny.config()
    cfg.first_stage.update(channel_mult=(1, 1, 1, 1), patch_size=2)
    stage, params = tiny.first_stage(cfg)
    LatentDiffusion(stage, None, {"first_stage": params}, {"task": "autoencoder", "resolution": 16}).save(tmp_path / "first")
    arguments = ("--config.first_stage.path=first", "--config.data.resolution=16", *EIGHT)
    assert "a side of 1 latents cannot be halved" in refused(run(train.main, "--config", SMOKE, "--workdir", "runs/new", *arguments))
    assert "no denoiser" in refused(run(sample.main, "--model", "first", "--output", "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
