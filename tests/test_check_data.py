"""The look at the data before training: what is counted, what is refused, and the page of samples."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_jax import check_data, cli
from ldm_jax.training.preview import class_colors
from tests.data.pictures import gray_png, noise, save

CONFIG = f"{Path(__file__).parent.parent}/configs/txt2img.py:smoke"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`run(*arguments) -> (exit code, stdout, stderr without the progress bar)`, in an empty folder, of the pictures in `data`."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        fields = ("--config.data.source=folder", "--config.data.path=data", "--config.data.resolution=32")
        monkeypatch.setattr(sys, "argv", ["check_data", "--config", CONFIG, *fields, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.guarded(check_data.main)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("error")]
        return end.value.code, out, "\n".join(lines)  # type: ignore[return-value]

    return call


def captioned(root: Path, count: int, text: str = "number {}") -> None:
    for i in range(count):
        save(root / f"{i}.png", value=i, size=(40 + i, 30 + i))
        (root / f"{i}.txt").write_text(text.format(i), encoding="utf-8")


def test_what_is_there_is_counted(run: Run, tmp_path: Path) -> None:
    captioned(tmp_path / "data" / "day", 3)
    captioned(tmp_path / "data" / "night", 2, "the same")
    save(tmp_path / "data" / "night" / "ليل.png", size=(300, 200))
    (tmp_path / "data" / "night" / "ليل.txt").write_text(" ".join(["قمر"] * 200), encoding="utf-8")
    code, out, err = run("--output", "page", "--config.conditioning.label.enabled=True")
    assert (code, err) == (cli.OK, ""), out
    for line in (
        "examples: 6 with text, label (folder-",
        "sizes: 40x30 to 300x200, median 41x31; 4 of 6 (66.7%) are enlarged to 32 pixels",
        "classes: 2 (day 3, night 3)",
        "captions: 6, 1 a picture, of 8 to 799 (median 8) characters",
        "captions that occur more than once: 2 of 6 (33.3%); most often, 2 times: 'the same'",
        "tokens: 1 of 6 captions are longer than conditioning.text.max_length=",
        "broken: 0 of 6\n",
        f"sample: {Path('page', 'sample.png')}",
    ):
        assert line in out, out
    page = np.asarray(Image.open(tmp_path / "page" / "sample.png"))
    assert page.shape == (128 + 12 * 4 + 8, 8 * 132 + 4, 3) and (page != 255).any()
    assert not (tmp_path / "page" / "broken_images.txt").exists()


def test_broken_files_are_named_and_too_many_refused(run: Run, tmp_path: Path) -> None:
    captioned(tmp_path / "data", 4)
    (tmp_path / "data" / "1.png").write_bytes(b"")
    noise().save(tmp_path / "data" / "2.jpg")
    (tmp_path / "data" / "2.png").unlink()
    whole = (tmp_path / "data" / "2.jpg").read_bytes()
    (tmp_path / "data" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    code, out, err = run("--config.data.max_broken=0.5")
    assert (code, err) == (cli.OK, "") and "broken: 1.png: OSError: it is empty" in out
    assert f"broken: 2 of 4, all named in {Path('data_check', 'broken_images.txt')}" in out
    rows = (tmp_path / "data_check" / "broken_images.txt").read_text().splitlines()
    assert [row.split("\t")[:2] for row in rows] == [["1", "1.png"], ["2", "2.jpg"]]
    code, out, err = run()
    assert code == cli.BAD_INPUT and "broken: 2 of 4" in out
    assert err == "error: data: 2 of 4 examples are broken, 50.00%, and data.max_broken allows 0.10%; the first is '1.png'"
    for name in ("0.png", "3.png"):
        (tmp_path / "data" / name).write_bytes(b"")
    code, out, err = run("--config.data.max_broken=1")
    assert code == cli.BAD_INPUT and "4 of 4 examples are broken" in err and "sample:" not in out


def test_what_is_missing_is_one_line(run: Run, tmp_path: Path) -> None:
    captioned(tmp_path / "data", 3)
    (tmp_path / "data" / "1.txt").unlink()
    code, out, err = run()
    assert (code, out) == (cli.BAD_INPUT, "")
    assert err.startswith("error: data.path: 1 of 3 pictures in 'data' have no caption, the first is '1.png'")
    (tmp_path / "data" / "file").write_text("")
    code, _, err = run("--config.data.path=data", "--output", "data/file/page", "--config.conditioning.text.enabled=False")
    assert code == cli.BAD_INPUT and "choose another --output" in err


def test_classes_that_the_model_has_not_are_refused(run: Run, tmp_path: Path) -> None:
    captioned(tmp_path / "data", 2)
    (tmp_path / "data" / "segmentation").mkdir()
    for i in range(2):
        (tmp_path / "data" / "segmentation" / f"{i}.png").write_bytes(gray_png(np.full((30 + i, 40 + i), 255 - 245 * i)))
    lines = [json.dumps({"file_name": f"{i}.png", "text": "x", "label": 5 * i}) for i in range(2)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    flags = ["--config.conditioning.label.enabled=True", "--config.conditioning.segmentation.enabled=True"]
    numbers = ("--config.conditioning.label.num_classes={}", "--config.conditioning.segmentation.num_classes={}")
    code, out, err = run(*flags, *(number.format(5 + 5 * i) for i, number in enumerate(numbers)))
    assert code == cli.BAD_INPUT and err.splitlines() == [
        "error: classes lie in [0, 5], but must in [0, 5): set conditioning.label.num_classes",
        "error: classes of the segmentation lie in [10, 10], but must in [0, 10): set conditioning.segmentation.num_classes",
    ]
    assert "segmentation: maps that show each of the classes: 1 (10 1)" in out
    assert run(*flags, *(number.format(6 + 5 * i) for i, number in enumerate(numbers)))[0] == cli.OK


def test_a_part_is_looked_at_where_asked(run: Run, tmp_path: Path) -> None:
    captioned(tmp_path / "data", 12)
    outs = [run("--examples", "5")[1] for _ in range(2)]
    assert outs[0] == outs[1] and "examples: 12 with text" in outs[0] and "broken: 0 of 5" in outs[0]


def test_boxes_maps_and_holes_are_shown_where_they_are_in_the_crop() -> None:
    """A square object in a picture of 100x50, of which a crop shows the middle 50x50 at 25 pixels."""
    inside = np.zeros((25, 25), bool)
    inside[5:15, 10:20] = True
    image = np.where(inside[..., None], np.uint8([200, 30, 40]), np.uint8(128))
    box = [3, (25 + 20) / 100, 10 / 50, (25 + 40) / 100, 30 / 50]
    example: dict[str, Any] = {
        "image": image, "boxes": np.array([box], np.float32), "segmentation": inside.astype(np.uint8), "mask": inside,
        "crop": np.array([0.25, 0, 0.75, 1], np.float32),
    }  # fmt: skip
    picture = check_data.shown(example)
    assert picture.shape == (125, 375, 3)
    enlarged = inside.repeat(5, 0).repeat(5, 1)
    outline = tuple(class_colors(np.array(3)))
    drawn = (picture[:, :125] == outline).all(-1)
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (25, 75, 50, 100)
    colours = picture[:, 125:250]
    assert (
        (colours[enlarged] == colours[37, 62]).all()
        and (colours[~enlarged] == colours[0, 0]).all()
        and (colours[37, 62] != colours[0, 0]).any()
    )
    np.testing.assert_array_equal((picture[:, 250:] == 255).all(-1), enlarged)
