"""`python -m ldm_jax.evaluate`: samples in any form give the same numbers, a killed job the same report, and bad input one line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import ldm_jax
from ldm_jax import cli, evaluate
from ldm_jax.config import WorkDir
from ldm_jax.data.shapes import ShapesSource
from ldm_jax.evaluation.obedience import SEED
from ldm_jax.evaluation.stored import read_stored
from ldm_jax.nn.inception import abstract_params
from tests import tiny

ROOT = Path(__file__).parent.parent
Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Evaluate]:
    """`command(*arguments) -> (exit code, stdout, stderr)`, in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("INCEPTION", "DINO", "CLIP", "VGG", "LPIPS"):
        monkeypatch.delenv(f"LDM_{name}", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.guarded(evaluate.main)
        out, err = capsys.readouterr()
        return end.value.code, out, err  # type: ignore[return-value]

    yield call


def conditioned(on: str) -> ConfigDict:
    cfg = tiny.config()
    cfg.diffusion.update(process="flow", prediction="flow")
    cfg.sample.update(sampler="euler", guidance=2.0)
    cfg.conditioning.text.enabled = on == "text"
    cfg.conditioning.label.update(enabled=on == "label", num_classes=8, width=16)
    return cfg


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Work directories of untrained models of drawn scenes, by their condition."""
    made = {}
    for on in ("text", "label"):
        path = tmp_path_factory.mktemp(on)
        cfg = conditioned(on)
        WorkDir(path).claim(cfg, [], {})
        tiny.save_untrained(cfg, path / "model")
        made[on] = path
    return made


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([ShapesSource(40, seed=5, resolution=16)[i]["image"] for i in range(40)])


def write_folder(path: Path, images: np.ndarray, names: list[str] | None = None) -> Path:
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / (names[i] if names else f"{i:03d}.png"))
    return path


def values(output: Path) -> dict[str, float]:
    return {metric["name"]: metric["value"] for metric in report(output)["metrics"]}


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


def refused(result: tuple[int, str, str]) -> str:
    code, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith("\r")]
    assert (code, out) == (cli.BAD_INPUT, ""), err
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_every_form_of_samples_gives_the_same_numbers(command: Evaluate, tmp_path: Path, pictures: np.ndarray) -> None:
    samples, reference = pictures[:18], pictures[18:]
    order = np.random.default_rng(0).permutation(len(samples))
    write_folder(tmp_path / "folder", samples)
    write_folder(tmp_path / "renamed", samples[order])
    np.savez(tmp_path / "plain.npz", samples)
    np.savez_compressed(tmp_path / "small.npz", samples)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in sorted((tmp_path / "folder").iterdir()):
            archive.write(file, f"inside/{file.name}")
    np.savez(tmp_path / "reference.npz", reference)
    found = {}
    for name in ("folder", "renamed", "plain.npz", "small.npz", "all.zip"):
        out = f"out_{name}"
        code, _, err = command("--samples", name, "--reference", "reference.npz", "--output", out, "--allow-small", "--measure-batch", "5")
        assert code == cli.OK, err
        found[name] = values(tmp_path / out)
    assert set(found["folder"]) == {
        *("FD-colors", "KID-colors", "MIND-colors", "precision-colors", "recall-colors", "density-colors", "coverage-colors")
    }
    for name, others in found.items():
        assert others == pytest.approx(found["folder"], rel=1e-6, abs=1e-9), name


def test_a_report_says_what_its_numbers_depend_on(command: Evaluate, runs: dict[str, Path], tmp_path: Path) -> None:
    flags = ("--num", "12", "--steps", "3", "--seed", "7", "--reference-num", "20", "--measure-batch", "8")
    code, out, err = command("--model", runs["text"], "--output", "out", *flags)
    assert code == cli.OK, err
    written = report(tmp_path / "out")
    # Three levels, at each of which guidance evaluates the network twice.
    assert written["settings"]["network evaluations a sample"] == 6
    expected = {"sampler": "euler", "steps": 3, "guidance": 2.0, "seed": 7, "dtype": "float32", "EMA": "the first"}
    assert {name: written["settings"][name] for name in expected} == expected
    assert written["settings"]["told"]["scenes"] == "that training has not seen" and len(written["settings"]["weights of the model"]) > 8
    assert "rounded" in written["settings"]["quantisation"] and "colors" in written["rules"]
    assert written["versions"]["jax"] == jax.__version__
    assert written["reference"]["crop"] == "the central square, resized as ADM does"
    assert any("12 samples" in warning for warning in written["warnings"])
    missing = {entry["name"]: entry["why"] for entry in written["missing"]}
    assert "12 samples have no covariance of 192 features" in missing["FD-colors"]
    assert any("pt_inception-2015-12-05-6726825d.pth" in why for why in missing.values())
    titles = [table["title"] for table in written["tables"]]
    assert titles == ["Is text obeyed, as the oracle reads it", "Prompts, by the number of objects"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 12 and "MIND-colors" in page and "MIND-colors" in out
    # The samples are those of `sample`, told the captions of scenes that no training draws, and stay; the features do not.
    captions = [ShapesSource(12, SEED, 16).caption(i) for i in range(12)]
    images = ldm_jax.load(str(runs["text"])).sample(prompts=captions, steps=3, seed=7)
    parts = [np.load(file)["arr_0"] for file in sorted((tmp_path / "out" / "samples").glob("*.npz"))]
    np.testing.assert_array_equal(np.concatenate(parts), images)
    assert not (tmp_path / "out" / "features").exists()


def test_classes_are_balanced_unless_asked(command: Evaluate, runs: dict[str, Path], tmp_path: Path) -> None:
    for labels, balanced in (("balanced", True), ("random", False)):
        flags = ("--num", "18", "--steps", "1", "--labels", labels, "--reference-num", "20")
        code, _, err = command("--model", runs["label"], "--output", labels, *flags)
        assert code == cli.OK, err
        told = np.concatenate([np.load(file)["arr_1"] for file in sorted((tmp_path / labels / "samples").glob("*.npz"))])
        counts = np.bincount(told, minlength=8)
        assert (counts.max() - counts.min() <= 1) == balanced
        assert any("not balanced" in warning for warning in report(tmp_path / labels)["warnings"]) != balanced


def test_a_sweep_shows_the_best_of_its_values(command: Evaluate, runs: dict[str, Path], tmp_path: Path) -> None:
    flags = ("--num", "10", "--steps", "2", "--sweep", "guidance=1,3", "--reference-num", "20")
    code, _, err = command("--model", runs["text"], "--output", "out", *flags)
    assert code == cli.OK, err
    written = report(tmp_path / "out")
    sweep = written["sweep"]
    assert (sweep["parameter"], sweep["values"]) == ("guidance", [1.0, 3.0])
    assert sorted(path.name for path in (tmp_path / "out" / "sweep").iterdir()) == ["guidance=1", "guidance=3"]
    first = next(name for name, better in sweep["better"].items() if better == "lower")
    best = int(np.argmin(sweep["metrics"][first]))
    assert written["settings"]["chosen"].startswith(f"guidance={sweep['values'][best]:g} ")
    assert values(tmp_path / "out")[first] == sweep["metrics"][first][best]
    assert written["settings"]["guidance"] == sweep["values"][best]


def test_statistics_are_written_and_read_again(command: Evaluate, tmp_path: Path, pictures: np.ndarray) -> None:
    np.savez(tmp_path / "samples.npz", pictures[:20])
    np.savez(tmp_path / "reference.npz", pictures[20:])
    code, out, err = command("--reference", "reference.npz", "--write-reference", "statistics.npz")
    assert code == cli.OK and "statistics.npz: 20 pictures, colors" in out, err
    stored = read_stored(tmp_path / "statistics.npz")
    assert stored is not None and stored.gaussians["colors"].number == 20 and stored.provenance["size"] == [16, 16]
    for name in ("reference.npz", "statistics.npz"):
        assert command("--samples", "samples.npz", "--reference", name, "--output", name[:4], "--allow-small")[0] == cli.OK
    assert values(tmp_path / "refe") == pytest.approx(values(tmp_path / "stat"), rel=1e-9)
    assert not list(tmp_path.glob(".*"))


def test_statistics_of_a_configurations_data(command: Evaluate, tmp_path: Path) -> None:
    config = (f"{ROOT}/configs/class_cond.py:smoke", "--config.data.size=30", "--config.data.resolution=16")
    code, _, err = command("--config", *config, "--write-reference", "data.npz")
    assert code == cli.OK, err
    stored = read_stored(tmp_path / "data.npz")
    assert stored is not None and stored.gaussians["colors"].number == 30
    assert stored.provenance["crop"] == "the central square, resized as ADM does" and stored.provenance["source"] == "shapes"


def test_a_first_stage(command: Evaluate, runs: dict[str, Path], tmp_path: Path) -> None:
    code, _, err = command("--model", runs["text"], "--reconstructions", "--output", "out", "--num", "20")
    assert code == cli.OK, err
    found = values(tmp_path / "out")
    chosen = np.sort(np.random.Generator(np.random.Philox(0)).permutation(64)[:20])  # of the data.size scenes
    originals = np.stack([ShapesSource(64, SEED, 16, counts=(1, 2, 3))[int(i)]["image"] for i in chosen])
    model = ldm_jax.load(str(runs["text"]))
    made = np.rint(np.clip(127.5 * model.decode(model.encode(originals)) + 127.5, 0, 255))
    psnr = 10 * np.log10(255**2 / ((made - originals) ** 2).mean((1, 2, 3)))
    assert found["PSNR"] == pytest.approx(psnr.mean(), rel=1e-4)
    assert -1 < found["SSIM"] < 1 and any("LPIPS" in entry["name"] for entry in report(tmp_path / "out")["missing"])


def test_reconstructions_that_are_there(command: Evaluate, tmp_path: Path, pictures: np.ndarray) -> None:
    """Cast without rounding they are darker by half a level, which is said; and against statistics they are no rFID."""
    noisy = np.clip(pictures + np.random.default_rng(0).uniform(-3, 3, pictures.shape), 0, 255)
    np.savez(tmp_path / "originals.npz", pictures)
    np.savez(tmp_path / "cut.npz", noisy.astype(np.uint8))
    np.savez(tmp_path / "rounded.npz", np.rint(noisy).astype(np.uint8))
    said = {}
    for name in ("cut", "rounded"):
        code, _, err = command("--samples", f"{name}.npz", "--reference", "originals.npz", "--paired", "--output", name)
        assert code == cli.OK, err
        said[name] = [warning for warning in report(tmp_path / name)["warnings"] if "without rounding" in warning]
    assert len(said["cut"]) == 1 and not said["rounded"]
    assert values(tmp_path / "rounded")["PSNR"] == pytest.approx(10 * np.log10(255**2 / 3), abs=0.3)
    command("--reference", "originals.npz", "--write-reference", "statistics.npz")
    code, _, err = command("--samples", "rounded.npz", "--reference", "statistics.npz", "--paired", "--output", "wrong")
    assert code == cli.OK, err
    assert any("against stored statistics" in warning for warning in report(tmp_path / "wrong")["warnings"])


def test_what_another_job_left_is_not_taken(command: Evaluate, runs: dict[str, Path], tmp_path: Path) -> None:
    flags = ("--model", runs["text"], "--output", "out", "--num", "4", "--steps", "1", "--reference-num", "9")
    assert command(*flags)[0] == cli.OK
    assert "told differ" in refused(command(*flags, "--config.data.counts=(2,3)"))
    assert "options differ" in refused(command(*flags, "--seed", "1"))
    assert "dtype differ" in refused(command(*flags, "--dtype", "bfloat16"))
    (tmp_path / "run" / "samples").mkdir(parents=True)  # as a training leaves it
    (tmp_path / "run" / "samples" / "00000000.png").touch()
    assert "holds 00000000.png" in refused(command("--model", runs["text"], "--output", "run", "--num", "4", "--steps", "1"))


def test_jpegs_of_a_configurations_data_are_warned_of(command: Evaluate, tmp_path: Path, pictures: np.ndarray) -> None:
    for name, number in (("a", 6), ("b", 4)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(number):
            Image.fromarray(pictures[i]).save(tmp_path / "data" / name / (f"{i}.jpg" if i % 2 else f"{i}.png"))
    np.savez(tmp_path / "samples.npz", pictures[10:20])
    config = (
        f"{ROOT}/configs/unconditional.py:smoke",
        "--config.data.source=folder",
        "--config.data.path=data",
        "--config.data.resolution=16",
    )
    code, _, err = command("--samples", "samples.npz", "--output", "out", "--config", *config)
    assert code == cli.OK, err
    assert any("5 pictures of the reference are JPEG" in warning for warning in report(tmp_path / "out")["warnings"])
    assert command("--config", *config, "--write-reference", "data.npz")[0] == cli.OK
    stored = read_stored(tmp_path / "data.npz")
    assert stored is not None and stored.provenance["jpegs"] == 5


def test_weights_of_another_network_are_refused(command: Evaluate, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", np.zeros((2, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "weights.npz", fc=np.zeros(3, np.float32))
    base = ("--samples", "samples.npz", "--output", "out", "--inception", "weights.npz")
    assert "not the file that the FID is defined by" in refused(command(*base))
    assert "fc.weight: missing" in refused(command(*base, "--any-weights"))
    elsewhere = ("--samples", "samples.npz", "--output", "out", "--inception", "nowhere")
    assert "the weights of inception are not at nowhere" in refused(command(*elsewhere))


@pytest.mark.slow
def test_all_of_inceptions_metrics_by_the_command(command: Evaluate, tmp_path: Path, pictures: np.ndarray) -> None:
    """With random weights in torch's names: what is given where weights are, and that the report names them."""
    rng = np.random.default_rng(0)
    state = {"fc.weight": rng.normal(size=(1008, 2048)).astype(np.float32) / 45}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params()):
        *names, kind = [key.key for key in path]
        if names[0] == "fc" or kind != "kernel":
            continue
        name, (h, w, i, o) = ".".join(names[:-1]), leaf.shape
        state[f"{name}.conv.weight"] = (rng.normal(size=(o, i, h, w)) * (2 / (h * w * i)) ** 0.5).astype(np.float32)
        ones = {"weight": np.ones(o), "bias": np.zeros(o), "running_mean": np.zeros(o), "running_var": np.ones(o)}
        state |= {f"{name}.bn.{part}": value.astype(np.float32) for part, value in ones.items()}
    np.savez(tmp_path / "weights.npz", **state)
    np.savez(tmp_path / "samples.npz", pictures[:16])
    np.savez(tmp_path / "reference.npz", pictures[16:32])
    flags = ("--inception", "weights.npz", "--any-weights", "--allow-small", "--measure-batch", "8")
    code, _, err = command("--samples", "samples.npz", "--reference", "reference.npz", "--output", "out", *flags)
    assert code == cli.OK, err
    found = values(tmp_path / "out")
    assert {"FID", "sFID", "IS", "KID", "precision", "recall", "density", "coverage", "MIND"} <= set(found)
    assert found["FID"] > 0 and found["IS"] >= 1
    assert len(report(tmp_path / "out")["weights"]["inception"]) == 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --samples"),
        (("--samples", "x", "--model", "y", "--output", "o"), "give --samples"),
        (("--samples", "x"), "give --output"),
        (("--samples", "nothing.npz", "--output", "o"), "no file or folder nothing.npz"),
        (("--samples", "s.npz", "--output", "o", "--steps", "3"), "--steps has no effect here"),
        (("--samples", "s.npz", "--output", "o", "--labels", "random"), "--labels has no effect here"),
        (("--samples", "s.npz", "--output", "o", "--ema", "0.9"), "--ema has no effect here"),
        (("--samples", "s.npz", "--reference", "s.npz", "--output", "o", "--config", "c.py"), "--config has no effect here"),
        (("--samples", "s.npz", "--reference", "s.npz", "--output", "o", "--reference-num", "2"), "all of --reference is measured"),
        (("--samples", "s.npz", "--reference", "g.npz", "--output", "o", "--crop", "8"), "statistics of what was cropped before"),
        (("--samples", "s.npz", "--output", "o", "--vgg", "two.txt"), "both --vgg and --lpips"),
        (("--samples", "s.npz", "--output", "two.txt"), "cannot create two.txt"),
        (("--model", "x", "--output", "o", "--reconstructions", "--steps", "3"), "--steps has no effect here"),
        (("--write-reference", "r.npz", "--reference", "s.npz", "--steps", "3"), "--steps has no effect here"),
        (("--write-reference", "r.txt", "--reference", "s.npz"), "writes an .npz, not r.txt"),
        (("--samples", "s.npz", "--output", "o", "--num", "3"), "--num has no effect here"),
        (("--samples", "s.npz", "--output", "o", "--sweep", "guidance=1,2"), "--sweep has no effect here"),
        (("--samples", "s.npz", "--output", "o", "--config.data.size=3"), "unknown argument"),
        (("--samples", "s.npz", "--output", "o", "--paired"), "--paired holds samples against originals"),
        (("--samples", "s.npz", "--output", "o", "--measure-batch", "0"), "--measure-batch must be at least 1"),
        (("--samples", "s.npz", "--output", "o", "--prompts-file", "two.txt"), "2 prompts in two.txt for 3 samples"),
        (("--samples", "s.npz", "--output", "s.npz/x"), "cannot create s.npz/x"),
        (("--model", "nowhere", "--output", "o"), "nowhere"),
        (("--model", "x", "--output", "o", "--sweep", "colour=1,2"), "--sweep goes over guidance"),
        (("--model", "x", "--output", "o", "--sweep", "guidance=a,2"), "--sweep guidance=a,2"),
        (("--model", "x", "--output", "o", "--sweep", "guidance=1,1"), "each once"),
        (("--model", "x", "--output", "o", "--guidance", "1", "2"), "one --guidance"),
        (("--write-reference", "r.npz"), "give --config or --reference"),
        (("--write-reference", "r.npz", "--samples", "s.npz"), "without --samples"),
        (("--write-reference", "r.npz", "--reference", "g.npz"), "statistics alone"),
        (("--samples", "s.npz", "--output", "o", "--clip", "nowhere"), "the weights of clip are not at nowhere"),
    ],
)
def test_what_does_not_go_together_is_one_line(command: Evaluate, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    np.savez(tmp_path / "s.npz", np.zeros((3, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "g.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "two.txt").write_text("a\nb\n")
    assert said in refused(command(*arguments))
    assert not (tmp_path / "o" / "report.json").exists()


def start(run: Path, output: Path, log: Path) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    flags = ["--num", "200", "--steps", "60", "--batch-size", "8", "--reference-num", "300", "--allow-small"]
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "ldm_jax.evaluate", "--model", str(run), "--output", str(output), *flags],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=file,
        )


@pytest.mark.slow
def test_a_job_killed_or_stopped_five_times_ends_with_the_same_report(runs: dict[str, Path], tmp_path: Path) -> None:
    log, rng = tmp_path / "log.txt", random.Random(0)
    assert start(runs["label"], tmp_path / "undisturbed", log).wait(600) == 0, log.read_text()[-3000:]
    killed = tmp_path / "killed"
    drawn_at_kills = []
    for i in range(5):
        begun = len(list((killed / "samples").glob("0*.npz")))
        number = max(rng.randint(4 * i + 1, 4 * i + 3), begun + 1)  # of 25 parts; one of its own tells that the process hears signals
        process = start(runs["label"], killed, log)
        while len(list((killed / "samples").glob("0*.npz"))) < number:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        how = signal.SIGKILL if len(drawn_at_kills) % 2 == 0 else signal.SIGTERM
        process.send_signal(how)
        assert process.wait() == (-how if how == signal.SIGKILL else 75), "it ended before"
        drawn_at_kills.append({file.name: file.stat().st_mtime_ns for file in (killed / "samples").glob("0*.npz")})
    assert not (killed / "report.json").exists()
    assert start(runs["label"], killed, log).wait(600) == 0, log.read_text()[-3000:]
    at_the_end = {file.name: file.stat().st_mtime_ns for file in (killed / "samples").glob("0*.npz")}
    for drawn in drawn_at_kills:  # none was drawn again
        assert drawn.items() <= at_the_end.items()
    one, other = report(killed), report(tmp_path / "undisturbed")
    for depends_on_the_run in ("made", "command", "samples"):
        one.pop(depends_on_the_run), other.pop(depends_on_the_run)
    assert one == other
    for file in sorted((killed / "samples").glob("0*.npz")):
        np.testing.assert_array_equal(np.load(file)["arr_0"], np.load(tmp_path / "undisturbed" / "samples" / file.name)["arr_0"])
