"""`python -m ldm_jax.convert`: models in and out; what is wrong is one line and exit code 2, runs nothing and leaves nothing behind."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import ldm_jax
from ldm_jax import cli, convert
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.interop import exporting, importing
from ldm_jax.interop.compvis import ema_name, import_checkpoint
from ldm_jax.interop.safetensors_file import Spec, write_safetensors
from ldm_jax.interop.torch_file import load_state_dict
from tests import tiny
from tests.interop import compvis_files as files
from tests.interop import torch_files
from tests.test_cli import Run, refused
from tests.test_cli import run as run  # a fixture

UNET = "model.diffusion_model."
Given = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    files.trace_once(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `text.ckpt`, as Lightning leaves it, `text.yaml` and `tokenizer.json` of a text-to-image model of 16 px, and the
    same of a model without condition."""
    root = tmp_path_factory.mktemp("source")
    tokens = Tokenizer.train(tiny.CAPTIONS, 300, 8)
    (root / "tokenizer.json").write_text(tokens.to_json())
    contents = {"text": files.changed("text", "condition", vocab_size=tokens.vocab_size), "plain": files.TINY["unconditional"]}
    for name, content in contents.items():
        files.write_yaml(root, content).rename(root / f"{name}.yaml")
        torch_files.write(root / f"{name}.ckpt", lightning(files.random_tensors(root / f"{name}.yaml")))
    return root


def lightning(tensors: Given) -> dict[str, Any]:
    """What training leaves: the weights with the UNet's moving averages (larger by 1), and other dicts with tensors."""
    averages = {ema_name(name): array + np.float32(1) for name, array in tensors.items() if name.startswith(UNET)}
    return {
        "pytorch-lightning_version": "1.4.2",
        "epoch": 3,
        "global_step": 1000,
        "callbacks": {"last": {"best_model_score": np.float32([0.5])}},
        "hyper_parameters": {"betas": np.linspace(0, 1, 5, dtype=np.float32)},
        "optimizer_states": [{"state": {0: {"exp_avg": np.ones(3, np.float32)}}}],
        "state_dict": {**tensors, **averages, "model_ema.num_updates": np.int64(3) * np.ones((), np.int64)},
    }


def tensors_of(source: Path, name: str) -> Given:
    return files.random_tensors(source / f"{name}.yaml")


def compvis(source: Path, name: str, **other: Any) -> list[str]:
    """The flags of a conversion to `out`; `other` files stand in the place of the right ones."""
    flags = {"checkpoint": source / f"{name}.ckpt", "yaml": source / f"{name}.yaml", "output": "out", **other}
    return ["--from", "compvis", *(f"--{flag}={value}" for flag, value in flags.items() if value is not None)]


def done(result: tuple[int, str, str]) -> list[str]:
    """The lines that a successful command printed."""
    code, out, err = result
    assert (code, err) == (cli.OK, ""), err
    return out.splitlines()


def equal_files(one: Path, other: Path) -> bool:
    """The same files with the same bytes under two folders."""
    names = [{file.relative_to(root) for file in root.rglob("*") if file.is_file()} for root in (one, other)]
    return names[0] == names[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in names[0])


# --- what works ---


@pytest.mark.slow
def test_a_checkpoint_becomes_a_model_that_draws(source: Path, run: Run, tmp_path: Path) -> None:
    lines = done(run(convert.main, *compvis(source, "text", tokenizer=source / "tokenizer.json")))
    assert lines == ["model: out"]
    model = ldm_jax.load(str(tmp_path / "out"))
    images = model.sample(prompts=["a red circle", "a blue square"], steps=2, guidance=2.0, seed=3)
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    assert np.ptp(images) > 0 and (images[0] != images[1]).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    assert done(run(convert.main, "--to", "compvis", "--model", "out", "--output", "back")) == ["back: a checkpoint of latent-diffusion"]
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.yaml", "model.ckpt"]
    back = load_state_dict(tmp_path / "back" / "model.ckpt", "state_dict")
    given = tensors_of(source, "text")
    assert back.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(back[name], array + np.float32(name.startswith(UNET)), err_msg=name)
    again = compvis(source, "text", checkpoint="back/model.ckpt", yaml="back/config.yaml", output="again")
    assert done(run(convert.main, *again, f"--tokenizer={source / 'tokenizer.json'}")) == [
        "note: the checkpoint has no moving averages: its plain weights are taken",
        "model: again",
    ]
    assert equal_files(tmp_path / "out", tmp_path / "again")


def test_a_model_goes_to_diffusers_and_comes_back(source: Path, run: Run, tmp_path: Path) -> None:
    assert done(run(convert.main, *compvis(source, "plain"))) == ["model: out"]
    assert done(run(convert.main, "--to", "diffusers", "--model", "out", "--output", "folder")) == ["folder: LDMPipeline"]
    assert json.loads((tmp_path / "folder" / "model_index.json").read_text())["_class_name"] == "LDMPipeline"
    assert done(run(convert.main, "--from", "diffusers", "--checkpoint", "folder", "--output", "back")) == ["model: back"]
    for part in ("first_stage", "denoiser"):
        assert equal_files(tmp_path / "out" / part, tmp_path / "back" / part)


def test_flags_choose_the_weights_and_their_type(source: Path, run: Run, tmp_path: Path) -> None:
    assert done(run(convert.main, *compvis(source, "plain"), "--no-ema", "--dtype=bfloat16")) == ["model: out"]
    stored = load_file(tmp_path / "out" / "denoiser" / "weights.safetensors")["out_conv.bias"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stored, tensors_of(source, "plain")[f"{UNET}out.2.bias"].astype(ml_dtypes.bfloat16))


def test_a_file_with_several_sets_of_weights(source: Path, run: Run, tmp_path: Path) -> None:
    given = tensors_of(source, "plain")
    both = {"model": given, "ema": {name: array + np.float32(1) for name, array in given.items()}}
    path = torch_files.write(tmp_path / "both.ckpt", both)
    line = refused_and_clean(run, tmp_path, *compvis(source, "plain", checkpoint=path))
    assert "several sets of tensors; the key is to be one of" in line
    for key, added in (("model", 0), ("ema", 1)):
        done(run(convert.main, *compvis(source, "plain", checkpoint=path, key=key, output=key)))
        stored = load_file(tmp_path / key / "denoiser" / "weights.safetensors")["out_conv.bias"]
        np.testing.assert_array_equal(stored, given[f"{UNET}out.2.bias"] + np.float32(added))
    assert "no set of tensors 'odd'" in refused_and_clean(run, tmp_path, *compvis(source, "plain", checkpoint=path, key="odd"))


def test_another_resolution(source: Path, run: Run, tmp_path: Path) -> None:
    assert done(run(convert.main, *compvis(source, "plain", resolution=32))) == ["model: out"]
    assert ldm_jax.load(str(tmp_path / "out")).sample(num=1, steps=1, seed=0).shape == (1, 32, 32, 3)
    assert "33 is no multiple of 2" in refused_and_clean(run, tmp_path, *compvis(source, "plain", resolution=33, output="other"))
    assert "invalid int value: 'big'" in refused_and_clean(run, tmp_path, *compvis(source, "plain", resolution="big", output="other"))


def test_an_empty_folder_may_be_there(source: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert done(run(convert.main, *compvis(source, "plain"))) == ["model: out"]
    assert (tmp_path / "out" / "model.json").is_file()


def test_a_missing_tokenizer_is_noted(source: Path, run: Run, tmp_path: Path) -> None:
    assert done(run(convert.main, *compvis(source, "text"))) == [
        "note: no tokenizer: give one with --tokenizer, or the model cannot read prompts",
        "model: out",
    ]
    assert not (tmp_path / "out" / "conditioner" / "tokenizer.json").exists()


# --- what is refused ---


def refused_and_clean(run: Run, tmp_path: Path, *arguments: str) -> str:
    """The one line of a refusal; no file has come, gone or changed."""

    def listing() -> list[tuple[Path, int]]:
        return sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

    before = listing()
    line = refused(run(convert.main, *arguments))
    assert listing() == before
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --output"),
        (("--output", "out"), "one of the arguments --from --to is required"),
        (("--from", "keras", "--output", "out"), "invalid choice: 'keras'"),
        (("--from", "compvis", "--to", "diffusers", "--output", "out"), "not allowed with argument"),
        (("--from", "compvis", "--checkpoint", "x.ckpt"), "--output"),
        (("--from", "compvis", "--checkpoint", "x.ckpt", "--output", "out"), "--from compvis needs --yaml"),
        (("--from", "compvis", "--output", "out"), "--from compvis needs --checkpoint, --yaml"),
        (("--from", "diffusers", "--output", "out"), "--from diffusers needs --checkpoint"),
        (("--to", "diffusers", "--output", "out"), "--to diffusers needs --model"),
        (("--from", "diffusers", "--checkpoint", "x", "--yaml", "y", "--no-ema", "--output", "out"), "takes no --no-ema, --yaml"),
        (("--to", "compvis", "--model", "x", "--dtype", "bfloat16", "--output", "out"), "--to compvis takes no --dtype"),
        (
            ("--from", "diffusers", "--checkpoint", "x", "--key", "y", "--resolution", "8", "--output", "out"),
            "takes no --key, --resolution",
        ),
        (("--from", "compvis", "--checkpoint", "x", "--yaml", "y", "--variant", "z", "--output", "out"), "takes no --variant"),
        (("--to", "compvis", "--model", "x", "--output", "gs://bucket/out"), "no folder of a local disk"),
        (("--to", "compvis", "--model", "x", "--output", "out"), "no model at x"),
        (("--from", "diffusers", "--checkpoint", "x", "--output", "out"), "cannot read x/config.json"),
    ],
)
def test_flags_that_do_not_go_together(arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path) -> None:
    assert message in refused_and_clean(run, tmp_path, *arguments)


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_there_is_never_replaced(kind: str, source: Path, run: Run, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / "out").write_text("mine")
    elif kind == "folder":
        files.write_yaml(tmp_path / "out", {})
    else:
        (tmp_path / "out").symlink_to("elsewhere")
        assert "out is there already" in refused(run(convert.main, *compvis(source, "plain")))
        return
    assert "out is there already" in refused_and_clean(run, tmp_path, *compvis(source, "plain"))
    assert "out is there already" in refused_and_clean(run, tmp_path, "--to", "compvis", "--model", "x", "--output", "out")


def test_files_in_each_others_place(source: Path, run: Run, tmp_path: Path) -> None:
    yaml, checkpoint = source / "plain.yaml", source / "plain.ckpt"
    assert "plain.yaml is text, not a weight file" in refused_and_clean(run, tmp_path, *compvis(source, "plain", checkpoint=yaml))
    for size in (None, 3000):  # as it is, and so small that a configuration could be as large
        small = tmp_path / "small.ckpt"
        small.write_bytes(checkpoint.read_bytes()[:size])
        assert "small.ckpt" in (line := refused_and_clean(run, tmp_path, *compvis(source, "plain", yaml=small)))
        assert ("bytes" in line) == (size is None)
    assert "no weight file at" in refused_and_clean(run, tmp_path, *compvis(source, "plain", checkpoint="missing.ckpt"))
    assert "missing.yaml" in refused_and_clean(run, tmp_path, *compvis(source, "plain", yaml="missing.yaml"))
    assert "holds no weights under a usual name" in refused_and_clean(run, tmp_path, *compvis(source, "plain", checkpoint=tmp_path))


def test_a_class_that_has_no_counterpart(source: Path, run: Run, tmp_path: Path) -> None:
    content = files.changed("unconditional", "model")
    content["model"]["target"] = "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion"
    path = files.write_yaml(tmp_path, content)
    line = refused_and_clean(run, tmp_path, *compvis(source, "plain", yaml=path))
    assert "target ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion has no counterpart here" in line


def test_all_tensors_that_do_not_fit_are_in_one_line(source: Path, run: Run, tmp_path: Path) -> None:
    given = tensors_of(source, "plain")
    del given[f"{UNET}out.0.weight"], given["first_stage_model.quantize.embedding.weight"]
    given[f"{UNET}time_embed.0.weight"] = np.zeros((3, 4), np.float32)
    given[f"{UNET}time_embed.0.bias"] = given[f"{UNET}time_embed.0.bias"].astype(np.int64)
    given |= {name: np.zeros(1, np.float32) for name in (f"{UNET}label_emb.weight", "cond_stage_model.encoder.conv_in.weight")}
    path = torch_files.write(tmp_path / "model.ckpt", {"state_dict": given})
    line = refused_and_clean(run, tmp_path, *compvis(source, "plain", checkpoint=path))
    assert "(6 tensors)" in line
    for problem in (
        f"{UNET}out.0.weight is missing",
        "first_stage_model.quantize.embedding.weight is missing",
        f"{UNET}time_embed.0.weight is [3, 4], not [128, 32]",
        f"{UNET}time_embed.0.bias is of int64",
        f"{UNET}label_emb.weight is not expected",
        "cond_stage_model.encoder.conv_in.weight is not expected",
    ):
        assert problem in line


@pytest.mark.parametrize("keep", [0, 1, 3, 30, 200, 0.5, -100, -22, -1])
def test_a_file_that_is_cut(keep: float, source: Path, run: Run, tmp_path: Path) -> None:
    whole = (source / "plain.ckpt").read_bytes()
    cut = whole[: int(keep * len(whole)) if keep == 0.5 else int(keep)]
    (tmp_path / "cut.ckpt").write_bytes(cut)
    assert "cut.ckpt" in refused_and_clean(run, tmp_path, *compvis(source, "plain", checkpoint="cut.ckpt"))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("content", [b"\0" * 1000, bytes(range(256)) * 20, b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x05\x06" + bytes(18)])
def test_a_file_of_another_kind(content: bytes, suffix: str, source: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    assert f"x{suffix}" in refused_and_clean(run, tmp_path, *compvis(source, "plain", checkpoint=f"x{suffix}"))


# --- files that want to run something ---


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


HIDDEN = b"\x80\x02}" + text("state_dict") + b"ccollections\nOrderedDict\n)R"
ATTACKS = {
    "os.system": b"\x80\x02cos\nsystem\n%s\x85R.",
    "builtins.eval": b"\x80\x02cbuiltins\neval\n%s\x85R.",
    "global behind reduce": HIDDEN + text("w") + b"cos\nsystem\n%s\x85Rss.",
    "global behind build": HIDDEN + b"}" + text("_metadata") + b"cos\nsystem\n%s\x85Rsbs.",
    "memo": b"\x80\x02cos\nsystem\nq\x05" + b"0ccollections\nOrderedDict\nq\x060h\x05%s\x85R.",
    "memo overwritten": b"\x80\x02ccollections\nOrderedDict\nq\x000cos\nsystem\nq\x000h\x00%s\x85R.",
    "stack global": b"\x80\x04" + text("os") + text("system") + b"\x93%s\x85R.",
    "object": b"(cos\nsystem\n%so.",
}


def attack(name: str, proof: Path) -> bytes:
    """A pickle that makes the file `proof` where it is believed."""
    argument = f"open({str(proof)!r}, 'w')" if name == "builtins.eval" else f"touch '{proof}'"
    return ATTACKS[name].replace(b"%s", text(argument))


def hostile(path: Path, stream: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/byteorder", "little")
    return path


@pytest.fixture
def proof(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("proof") / "ran"


@pytest.mark.parametrize("name", ATTACKS)
def test_a_malicious_checkpoint_runs_nothing(name: str, source: Path, run: Run, tmp_path: Path, proof: Path) -> None:
    path = hostile(tmp_path / "evil.ckpt", attack(name, proof))
    line = refused_and_clean(run, tmp_path, *compvis(source, "plain", checkpoint=path))
    assert "evil.ckpt cannot be read" in line and "nothing of it was run" in line
    assert ("builtins.eval" if name == "builtins.eval" else "os.system") in line
    assert not proof.exists()
    pickle.loads(attack(name, proof))  # while Python's own reader
    assert proof.exists()


@pytest.mark.parametrize("part", ["unet", "vqvae"])
def test_a_malicious_file_in_a_folder_of_diffusers_runs_nothing(part: str, folder: Path, run: Run, tmp_path: Path, proof: Path) -> None:
    (folder / part / "diffusion_pytorch_model.safetensors").unlink()
    hostile(folder / part / "diffusion_pytorch_model.bin", attack("os.system", proof))
    line = refused_and_clean(run, tmp_path, "--from", "diffusers", "--checkpoint", "folder", "--output", "out")
    assert "os.system" in line and not proof.exists()


def test_a_fresh_process_refuses_it_too(source: Path, tmp_path: Path, proof: Path) -> None:
    path = hostile(tmp_path / "evil.ckpt", attack("global behind reduce", proof))
    done = subprocess.run(
        [sys.executable, "-m", "ldm_jax.convert", *compvis(source, "plain", checkpoint=path)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(ldm_jax.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "asks for os.system" in refused((done.returncode, done.stdout, done.stderr))
    assert not proof.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["evil.ckpt"]


# --- folders of diffusers that are not whole ---


def convert_to_model(source: Path, output: Path) -> None:
    assert import_checkpoint(source / "plain.ckpt", source / "plain.yaml", output) == []


@pytest.fixture(scope="module")
def pipeline(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    convert_to_model(source, root / "model")
    assert exporting.export_folder(root / "model", root / "folder") == "LDMPipeline"
    return root / "folder"


@pytest.fixture
def folder(pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline, tmp_path / "folder"))


FROM_FOLDER = ("--from", "diffusers", "--checkpoint", "folder", "--output", "out")


def test_a_variant_of_a_folders_weights(folder: Path, pipeline: Path, run: Run, tmp_path: Path) -> None:
    for part in ("unet", "vqvae"):
        tensors = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        half = {name: array.astype(np.float16) for name, array in tensors.items()}
        specs = {name: Spec(array.shape, array.dtype) for name, array in half.items()}
        write_safetensors(folder / part / "diffusion_pytorch_model.fp16.safetensors", half.items(), specs)
    for name, variant in (("whole", ()), ("half", ("--variant=fp16",))):
        assert done(run(convert.main, *FROM_FOLDER[:-1], name, *variant)) == [f"model: {name}"]
        alone = ("--checkpoint=folder/vqvae", f"--output={name} alone")
        assert done(run(convert.main, "--from", "diffusers", *alone, *variant)) == [f"model: {name} alone"]
    for part in ("first_stage", "denoiser"):
        whole, half = (load_file(tmp_path / name / part / "weights.safetensors") for name in ("whole", "half"))
        assert any((whole[name] != array).any() for name, array in half.items())
        for name, array in half.items():
            np.testing.assert_array_equal(array, whole[name].astype(np.float16).astype(np.float32))
    assert equal_files(tmp_path / "half" / "first_stage", tmp_path / "half alone" / "first_stage")
    assert "no weights of the variant 'bf16'" in refused_and_clean(run, tmp_path, *FROM_FOLDER, "--variant=bf16")


def test_a_folder_in_shards_is_read_and_a_lost_shard_is_named(folder: Path, pipeline: Path, run: Run, tmp_path: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    specs = {name: Spec(array.shape, array.dtype) for name, array in tensors.items()}
    write_safetensors(weights, tensors.items(), specs, metadata={"format": "pt"}, max_shard_bytes=200_000)
    shards = sorted(weights.parent.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert done(run(convert.main, *FROM_FOLDER)) == ["model: out"]
    assert done(run(convert.main, "--from", "diffusers", f"--checkpoint={pipeline}", "--output=whole")) == ["model: whole"]
    assert equal_files(tmp_path / "out", tmp_path / "whole")
    shutil.rmtree(tmp_path / "out")
    shards[1].unlink()
    assert shards[1].name in refused_and_clean(run, tmp_path, *FROM_FOLDER)


@pytest.mark.parametrize(
    "lost",
    [
        "unet",
        "vqvae",
        "scheduler",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vqvae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ],
)
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_folder_that_is_not_whole(lost: str, how: str, folder: Path, run: Run, tmp_path: Path) -> None:
    path = folder / lost
    if path.is_dir():
        shutil.rmtree(path)
        if how == "damaged":
            path.mkdir()
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    line = refused_and_clean(run, tmp_path, *FROM_FOLDER)
    assert ("folder" if lost == "model_index.json" else lost.split("/")[0]) in line


# --- failures in the middle ---


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full disk", "interrupt"])
def test_a_conversion_that_fails_half_way_leaves_nothing(
    failure: BaseException, source: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_to_model(source, tmp_path / "model")
    before = sorted(tmp_path.iterdir())

    def fails(function: Any) -> Any:
        def some(*args: Any) -> Iterator[Any]:
            produced = function(*args)
            yield next(produced)
            raise failure

        return some

    monkeypatch.setattr(importing, "_arrays", fails(importing._arrays))
    monkeypatch.setattr(exporting, "_tensors", fails(exporting._tensors))
    for arguments in (
        compvis(source, "plain"),
        ["--to", "compvis", "--model", "model", "--output", "out"],
        ["--to", "diffusers", "--model", "model", "--output", "out"],
    ):
        if isinstance(failure, KeyboardInterrupt):
            monkeypatch.setattr(sys, "argv", ["convert", *arguments])
            with pytest.raises(KeyboardInterrupt):
                convert.main()
        else:
            assert "No space left on device" in refused(run(convert.main, *arguments))
        assert sorted(tmp_path.iterdir()) == before
