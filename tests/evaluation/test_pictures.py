import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ldm_jax.config import UserError
from ldm_jax.data.transforms import center_crop
from ldm_jax.evaluation.pictures import CENTRAL, Pictures, crop, open_pictures
from tests.data.pictures import encoded, noise, png, save

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 5, 7, 3), np.uint8)


def npz(path: Path, compressed: bool = False, **arrays: Any) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def file_of(image: np.ndarray, **text: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    return encoded(Image.fromarray(image), pnginfo=info).getvalue()


@pytest.fixture(scope="module")
def every_form(tmp_path_factory: pytest.TempPathFactory) -> list[Pictures]:
    """The same pictures in each form."""
    root = tmp_path_factory.mktemp("forms")
    (root / "folder").mkdir()
    with zipfile.ZipFile(root / "stored.zip", "w") as stored, zipfile.ZipFile(root / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as deflated:
        for i in reversed(range(len(IMAGES))):
            (root / "folder" / f"{i:02d}.png").write_bytes(file_of(IMAGES[i]))
            stored.writestr(f"a/{i:02d}.png", file_of(IMAGES[i]))
            deflated.writestr(f"a/{i:02d}.png", file_of(IMAGES[i]))
    npz(root / "stored.npz", arr_0=IMAGES)
    npz(root / "deflated.npz", compressed=True, arr_0=IMAGES)
    (root / "parts").mkdir()
    for name, part, compressed in (("c", IMAGES[9:], True), ("a", IMAGES[:4], False), ("b", IMAGES[4:9], False)):
        npz(root / "parts" / f"{name}.npz", compressed, arr_0=part)
    names = ("folder", "stored.zip", "deflated.zip", "stored.npz", "deflated.npz", "parts")
    forms = [open_pictures(root / name) for name in names]
    return [*forms, *(crop(form, (5, 7)) for form in forms)]


@given(st.integers(0, 11), st.integers(0, 11), st.integers(0, 11))
@settings(max_examples=40, deadline=None)
def test_every_form_gives_the_same_pictures_in_any_order_of_reading(every_form: list[Pictures], a: int, b: int, c: int) -> None:
    for pictures in every_form:
        for start, stop in ((min(a, b), max(a, b)), (min(b, c), max(b, c))):
            read = pictures.read(start, stop)
            assert read.dtype == np.uint8 and read.shape == (stop - start, 5, 7, 3)
            np.testing.assert_array_equal(read, IMAGES[start:stop])


def test_what_is_known_of_them(every_form: list[Pictures]) -> None:
    for pictures in every_form:
        assert (len(pictures), pictures.size, pictures.jpegs, pictures.labels) == (11, (5, 7), 0, None)
        assert "11 pic" in pictures.describe() and "7x5" in pictures.describe() and "\n" not in pictures.describe()
        for start, stop in ((-1, 2), (3, 2), (0, 12)):
            with pytest.raises(IndexError, match=f"pictures {start} to {stop} of 11"):
                pictures.read(start, stop)
    fingerprints = [pictures.fingerprint() for pictures in every_form]
    assert fingerprints[1] == fingerprints[2] and fingerprints[3] == fingerprints[4]  # the content counts, not how it is packed
    assert len(set(fingerprints)) == 8
    assert all(len(fingerprint) == 16 for fingerprint in fingerprints)


def test_files_are_taken_by_relative_name_without_what_is_no_picture(tmp_path: Path) -> None:
    wanted = ["B.PNG", "a.png", "dog/01.jpg", "dog/02.webp"]
    unwanted = [
        "grid.png",
        "dog/states.png",
        ".x.png",
        ".cache/a.png",
        "masks/a.png",
        "segmentation/a.png",
        "__MACOSX/._a.png",
        "__MACOSX/a.png",
    ]
    order = np.random.default_rng(1).permutation(wanted + unwanted)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in order:
            save(tmp_path / "x" / name, 10 + [*wanted, *unwanted].index(name))
            archive.write(tmp_path / "x" / name, name)
        archive.writestr("notes.txt", "no picture")
        archive.mkdir("empty.png")
    (tmp_path / "x" / "notes.txt").write_text("no picture")
    for pictures in (open_pictures(tmp_path / "x"), open_pictures(str(tmp_path / "x.zip"))):
        assert len(pictures) == 4 and pictures.jpegs == 1
        assert np.abs(pictures.read(0, 4)[:, 0, 0, 0].astype(int) - [10, 11, 12, 13]).max() <= 2


def test_jpegs_are_known_by_their_content(tmp_path: Path) -> None:
    for name, kind in (("a.png", "JPEG"), ("b.jpg", "PNG"), ("c.jpg", "JPEG")):
        (tmp_path / name).write_bytes(encoded(noise(8), kind).getvalue())
    assert open_pictures(tmp_path).jpegs == 2 and crop(open_pictures(tmp_path), (4, 4)).jpegs == 2


def test_transparent_gray_palette_cmyk_and_16_bit_are_as_in_training(tmp_path: Path) -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "0.png")
    Image.fromarray(np.full((4, 4), 257 * 90, np.uint16)).save(tmp_path / "1.png")
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "2.jpg", quality=95)
    Image.new("RGB", (4, 4), (10, 200, 30)).quantize(2).save(tmp_path / "3.png")
    read = open_pictures(tmp_path).read(0, 4)[:, 0, 0].astype(int)
    assert np.abs(read - [[255, 255, 255], [90, 90, 90], [255, 0, 0], [10, 200, 30]]).max() <= 3


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    whole = encoded(noise()).getvalue()
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(whole if i != 1 else whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(3):
            archive.write(tmp_path / f"{i}.png", f"{i}.png")
    for pictures in (open_pictures(tmp_path), open_pictures(tmp_path / "x.zip")):
        assert len(pictures.read(0, 1)) == len(pictures.read(2, 3)) == 1
        with pytest.raises(UserError, match=r"1\.png cannot be read: .*truncated.*; make or fetch it anew, or take it away"):
            pictures.read(0, 3)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.png cannot be read: it is empty"):
        open_pictures(tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png cannot be read: .*No such file"):
        pictures = open_pictures(tmp_path / "x.zip")
        (tmp_path / "0.png").write_bytes(whole)
        (tmp_path / "2.png").symlink_to(tmp_path / "nowhere.png")
        open_pictures(tmp_path).read(2, 3)


def test_damage_inside_a_zip_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", png(1))
        archive.writestr("b.png", png(2))
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[content.rindex(b"IDAT") + 6] ^= 255
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"x.zip/b.png cannot be read: Bad CRC-32"):
        open_pictures(tmp_path / "x.zip").read(0, 2)
    (tmp_path / "x.zip").write_bytes(content[:-30])
    with pytest.raises(UserError, match=r"x.zip is damaged or not complete \(File is not a zip file\)"):
        open_pictures(tmp_path / "x.zip")


def test_sizes_that_differ_are_refused_and_cropped(tmp_path: Path) -> None:
    shapes = [(40, 30), (70, 64), (16, 16)]
    images = [np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8) for i, shape in enumerate(shapes)]
    for i, image in enumerate(images):
        (tmp_path / f"{i}.png").write_bytes(file_of(image, parameters='{"seed": 3}'))
    pictures = open_pictures(tmp_path)
    assert pictures.size == (40, 30) and len(pictures.read(0, 1)) == 1
    with pytest.raises(UserError, match=r"1.png has 64x70 pixels, but 0.png 30x40: crop them to one size, or .* --write-reference"):
        pictures.read(0, 2)
    square = crop(pictures, (16, 16))
    np.testing.assert_array_equal(square.read(0, 3), [center_crop(image, 16) for image in images])
    assert square.read(1, 1).shape == (0, 16, 16, 3) and square.size == (16, 16) and len(square) == 3
    np.testing.assert_array_equal(square.read(2, 3)[0], images[2])
    assert square.provenance["seed"] == 3 and square.provenance["crop"] == CENTRAL and CENTRAL in square.describe()
    assert len({pictures.fingerprint(), square.fingerprint(), crop(pictures, (8, 8)).fingerprint()}) == 3


@pytest.mark.parametrize(
    ("text", "provenance"),
    [({"parameters": '{"seed": 1}'}, {"seed": 1}), ({"parameters": "a cat, Steps: 20"}, {"parameters": "a cat, Steps: 20"}), ({}, {})],
)
def test_provenance_of_files_is_that_of_the_first(tmp_path: Path, text: dict[str, str], provenance: dict[str, Any]) -> None:
    (tmp_path / "a.png").write_bytes(file_of(IMAGES[0], **text))
    (tmp_path / "b.png").write_bytes(file_of(IMAGES[0], parameters='{"seed": 9}'))
    assert open_pictures(tmp_path).provenance == provenance


META = '{"seed": 3, "name": "Größe"}'


@pytest.mark.parametrize("meta", [META, META.encode(), np.frombuffer(META.encode(), np.uint8)], ids=["text", "bytes", "uint8"])
def test_labels_and_provenance_of_an_npz(tmp_path: Path, meta: Any) -> None:
    pictures = open_pictures(npz(tmp_path / "x.npz", arr_0=IMAGES, arr_1=np.arange(11, dtype=np.int32), meta=meta))
    assert pictures.provenance == json.loads(META) and pictures.labels is not None and pictures.labels.tolist() == list(range(11))
    np.testing.assert_array_equal(crop(pictures, (4, 4)).labels, pictures.labels)


def test_parts_are_joined_with_their_labels(tmp_path: Path) -> None:
    for i, name in enumerate(("part-0", "part-1", ".hidden")):
        meta = json.dumps({"seed": 0, "start": i})
        npz(tmp_path / f"{name}.npz", arr_0=IMAGES[i : i + 2], arr_1=np.array([i, 7]), meta=meta)
    save(tmp_path / "grid.png")
    joined = open_pictures(tmp_path)
    assert joined.labels is not None and joined.labels.tolist() == [0, 7, 1, 7] and joined.provenance == {"seed": 0}
    np.testing.assert_array_equal(joined.read(1, 3), IMAGES[[1, 1]])
    npz(tmp_path / "part-2.npz", arr_0=IMAGES[:1])
    with pytest.raises(UserError, match=r"2 of the 3 \.npz in .* have classes \(arr_1\)"):
        open_pictures(tmp_path)
    npz(tmp_path / "part-2.npz", arr_0=IMAGES[:1, :3])
    with pytest.raises(UserError, match=r"hold pictures of 7x3, 7x5 pixels; put those of one size into a folder"):
        open_pictures(tmp_path)
    save(tmp_path / "0.png")  # as the sampling command leaves both
    assert len(open_pictures(tmp_path)) == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.float32)},
            r"arr_0 is float32; write uint8 by rounding, np.clip\(np.rint\(127.5 \* x \+ 127.5\)",
        ),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.int64)}, "arr_0 is int64; pictures are uint8, 0 to 255"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"shape \[2, 3, 4, 4\]; move the channels to the end: x.transpose\(0, 2, 3, 1\)"),
        ({"arr_0": np.zeros((2, 4, 4, 4), np.uint8)}, r"shape \[2, 4, 4, 4\]; pictures are \[N,H,W,3\]"),
        ({"arr_0": np.zeros((4, 4, 3), np.uint8)}, r"shape \[4, 4, 3\]; pictures are"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"shape \[0, 4, 4, 3\]; .*one at least"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "arr_0 is in Fortran order; write np.ascontiguousarray of it"),
        ({"arr_0": np.array([{}], object)}, "arr_0 is no array of numbers but object"),
        ({"arr_0": np.uint8(3)}, "arr_0 is no array of numbers but uint8"),
        ({"images": IMAGES, "x": IMAGES}, r"x.npz holds images, x; pictures are arr_0, uint8 \[N,H,W,3\], as np.savez"),
        ({}, "x.npz holds nothing; pictures are"),
        ({"arr_0": IMAGES, "arr_1": np.zeros(10, np.int64)}, r"arr_1 is int64 \[10\]; classes are integers, one for each of 11"),
        ({"arr_0": IMAGES, "arr_1": np.zeros(11)}, r"arr_1 is float64 \[11\]"),
        ({"arr_0": IMAGES, "arr_1": np.array([{}] * 11, object)}, "x.npz is damaged or not complete .*allow_pickle=False"),
        ({"arr_0": IMAGES, "meta": "{"}, "its array meta is to be one JSON object as text or bytes"),
        ({"arr_0": IMAGES, "meta": np.zeros(3)}, "its array meta is to be one JSON object as text or bytes"),
        ({"arr_0": IMAGES, "meta": "[1]"}, "its array meta is to be one JSON object, not list"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_pictures(npz(tmp_path / "x.npz", **arrays))
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file or folder .*nowhere"):
        open_pictures(tmp_path / "nowhere")
    (tmp_path / "x.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"x.tar: pictures are read from a folder, a .zip of picture files, or an .npz"):
        open_pictures(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"no pictures \(.png, .*\) and no .npz in folder"):
        open_pictures(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("grid.png", png(1))
    with pytest.raises(UserError, match=r"no pictures \(.png, .*\) in .*x.zip"):
        open_pictures(tmp_path / "x.zip")


def with_member(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content)
    return path


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header_is_read(tmp_path: Path, version: tuple[int, int]) -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, IMAGES, version)
    np.testing.assert_array_equal(open_pictures(with_member(tmp_path / "x.npz", file.getvalue())).read(3, 9), IMAGES[3:9])


def test_damaged_arrays_are_told(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, IMAGES)
    short, version = file.getvalue()[:-1], bytearray(file.getvalue())
    version[6] = 4
    for content, reason in ((short, "bytes instead of"), (version, r"format is \(4, 0\)"), (b"nothing", "magic"), (short[:40], "")):
        with pytest.raises(UserError, match=rf"x.npz is damaged or not complete \(.*{reason}.*\); write or fetch it anew"):
            open_pictures(with_member(tmp_path / "x.npz", bytes(content)))
    whole = npz(tmp_path / "y.npz", arr_0=IMAGES).read_bytes()
    for cut in (len(whole) // 2, len(whole) - 5, 0):
        (tmp_path / "y.npz").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"y.npz is damaged or not complete"):
            open_pictures(tmp_path / "y.npz")
    deflated = bytearray(npz(tmp_path / "z.npz", compressed=True, arr_0=IMAGES).read_bytes())
    deflated[len(deflated) // 2] ^= 255
    (tmp_path / "z.npz").write_bytes(deflated)
    with pytest.raises(UserError, match=r"z.npz is damaged or not complete"):
        open_pictures(tmp_path / "z.npz").read(0, 11)


def test_a_deflated_array_is_inflated_once_as_long_as_one_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (500, 16, 16, 3), np.uint8)
    pictures = open_pictures(npz(tmp_path / "x.npz", compressed=True, arr_0=images))
    begun = []
    inflater = zipfile._get_decompressor  # type: ignore[attr-defined]
    monkeypatch.setattr(zipfile, "_get_decompressor", lambda kind: begun.append(kind) or inflater(kind))
    for start in range(0, 500, 50):
        np.testing.assert_array_equal(pictures.read(start, start + 40), images[start : start + 40])
    assert len(begun) == 1
    np.testing.assert_array_equal(pictures.read(0, 3), images[:3])
    assert len(begun) == 2


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    before = npz(tmp_path / "x.npz", arr_0=IMAGES)
    shutil.copy(before, tmp_path / "y.npz")
    os.utime(tmp_path / "y.npz", (1, 1))
    other = npz(tmp_path / "z.npz", arr_0=255 - IMAGES)
    first, same, differs = (open_pictures(path).fingerprint() for path in (before, tmp_path / "y.npz", other))
    assert first == same != differs
    save(tmp_path / "a" / "0.png", 1)
    folder = open_pictures(tmp_path / "a").fingerprint()
    assert folder == open_pictures(tmp_path / "a").fingerprint()
    save(tmp_path / "a" / "grid.png", 1)
    assert folder == open_pictures(tmp_path / "a").fingerprint()
    save(tmp_path / "a" / "0.png", 2)
    os.utime(tmp_path / "a" / "0.png", (1, 1))
    assert folder != open_pictures(tmp_path / "a").fingerprint()


PEAK = """
import re, sys
from pathlib import Path
from ldm_jax.evaluation.pictures import open_pictures
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
pictures = open_pictures(sys.argv[1])
at_start = peak()
total = sum(int(pictures.read(i, i + 20)[:, 0, 0, 0].sum()) for i in range(0, len(pictures), 20))
in_batches = peak()
pictures.read(0, 400)
print(len(pictures), total, in_batches - at_start, peak() - in_batches)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's own peak of memory")
@pytest.mark.parametrize(("number", "packing"), [(2000, zipfile.ZIP_STORED), (400, zipfile.ZIP_DEFLATED)], ids=["stored", "deflated"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, number: int, packing: int) -> None:
    size = 256 * 256 * 3
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (number, 256, 256, 3)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w", packing, compresslevel=1) as archive, archive.open("arr_0.npy", "w") as member:
        member.write(header.getvalue())
        for _ in range(number // 20):
            member.write(bytes(20 * size))
    assert packing == zipfile.ZIP_DEFLATED or (tmp_path / "x.npz").stat().st_size > number * size
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "x.npz"], capture_output=True, text=True, cwd=root, check=False)
    (tmp_path / "x.npz").unlink()
    assert done.returncode == 0, done.stderr
    read, total, in_batches, at_once = map(int, done.stdout.split())
    assert (read, total) == (number, 0)
    assert in_batches < 4 * 20 * size and at_once > 300 * size  # which shows that what is held would be seen
