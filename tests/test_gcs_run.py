"""A run of the `smoke` preset on object storage, killed and started again, ends with the bytes of one on a disk, and is read from there."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ldm_jax
from tests.fake_gcs import Storage, serving_here
from tests.test_resume import ROOT, STEPS, assert_same_run, finish, kill_at


def download(storage: Storage, prefix: str, folder: Path) -> Path:
    for name in storage.names("bucket", prefix):
        file = folder / name.removeprefix(prefix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(storage.read("bucket", name))
    return folder


def moments(storage: Storage) -> dict[str, Callable[[float], bool]]:
    """Where the run is killed, in the order in which it comes there."""

    def there(part: str) -> Callable[[float], bool]:
        return lambda _: any(part in name for name in storage.names("bucket", "run/"))

    return {
        "while the first stage writes a checkpoint": there("first_stage/checkpoints/"),
        "while its model is written": there("first_stage/model/first_stage/"),
        "while latents are encoded": there("latents/"),
        "while the denoiser writes a checkpoint": lambda _: any("/default/" in n for n in storage.names("bucket", "run/checkpoints/")),
        "while the model is written": there("run/model/"),
    }


def command(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", f"ldm_jax.{module}", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_on_object_storage_ends_as_one_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, log = tmp_path / "local", tmp_path / "log.txt"
    finish(local, log)
    with serving_here("bucket") as storage:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for file in (local / "compilation_cache").iterdir():
            storage.write("bucket", f"run/compilation_cache/{file.name}", file.read_bytes())
        work: Any = "gs://bucket/run"
        for name, reached in moments(storage).items():
            print(name, flush=True)
            kill_at(work, log, reached, 0.05)
        finish(work, log)
        check_same(download(storage, "run/", tmp_path / "downloaded"), local)
        check_read(work, storage, local, tmp_path)

        (tmp_path / "refused").touch()
        finish("gs://nowhere/run", tmp_path / "refused", code=2)  # type: ignore[arg-type]
        assert (tmp_path / "refused").read_text().splitlines()[-1] == "error: cannot reach gs://nowhere: there is no such bucket or object"


def check_same(found: Path, local: Path) -> None:
    files = [p.relative_to(local) for p in local.rglob("*.safetensors")]
    assert len(files) == 4
    files += [
        Path("oracle.json"),
        Path("tokenizer.json"),
        Path("latents_of.json"),
        Path("model/model.json"),
        Path(f"samples/{STEPS:08d}.png"),
    ]
    files += [p.relative_to(local) for p in local.glob("latents/*/*.array_record")]
    assert_same_run(found, local, files)
    for stage in ("first_stage", ""):
        assert any((found / stage).glob("events.*"))


def check_read(work: str, storage: Storage, local: Path, tmp_path: Path) -> None:
    """What reads a run reads it there as on a disk."""
    told = ["--prompt", "a red circle", "--steps", "2", "--num", "2"]
    assert "2 images" in command("sample", "--model", work, "--output", f"{work}/drawn", *told)
    command("sample", "--model", str(local), "--output", str(tmp_path / "drawn"), *told)
    for i in range(2):
        assert pixels(storage.read("bucket", f"run/drawn/{i:05d}.png"), tmp_path) == pixels(
            (tmp_path / "drawn" / f"{i:05d}.png").read_bytes(), tmp_path
        )

    theirs, ours = ldm_jax.load(f"{work}/model"), ldm_jax.load(work, step=STEPS)
    for part, tree in theirs.params.items():
        for name, value in tree.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, ours.params[part][name])

    evaluation = ["--num", "8", "--steps", "2", "--allow-small", "--reference-num", "8"]
    one = command("evaluate", "--model", work, "--output", f"{work}/report", *evaluation)
    other = command("evaluate", "--model", str(local), "--output", str(tmp_path / "report"), *evaluation)
    assert one.splitlines()[:-1] == other.splitlines()[:-1]
    assert {"report.html", "report.json"} <= {name.removeprefix("run/report/") for name in storage.names("bucket", "run/report/")}
    assert not storage.names("bucket", "run/report/features/")


def pixels(png: bytes, tmp_path: Path) -> bytes:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).tobytes()
