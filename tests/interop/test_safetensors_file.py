"""Weights read lazily from every kind of file and folder; safetensors files written tensor by tensor, against the safetensors package."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ldm_jax.config import UserError
from ldm_jax.interop.safetensors_file import Spec, Weights, open_weights, write_safetensors

_DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8]
_DTYPES += [np.uint64, np.uint32, np.uint16, np.uint8, np.bool_]
_SHAPES = [(3,), (2, 3), (), (0, 4), (2, 1, 3, 5)]


def _arrays(count: int = 13) -> dict[str, np.ndarray]:
    """One of each dtype under names that are not in order, with shapes of odd sizes."""
    random = np.random.default_rng(0)
    return {
        f"{(7 * i) % 13}.ключ\n": random.integers(0, 2 if dtype is np.bool_ else 100, _SHAPES[i % 5]).astype(dtype)
        for i, dtype in enumerate(_DTYPES[:count])
    }


def _floats(count: int = 6, size: int = 10) -> dict[str, np.ndarray]:
    return {f"layer.{i}": np.full((size,), i, np.float32) for i in range(count)}


def _same(found: Any, expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected) and len(found) == len(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_the_package_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    arrays = _arrays()
    write_safetensors(tmp_path / "ours.safetensors", reversed(arrays.items()), arrays, metadata={"format": "pt"})
    save_file(arrays, tmp_path / "theirs.safetensors", {"format": "pt"})
    _same(load_file(tmp_path / "ours.safetensors"), arrays)
    for name in ("ours", "theirs"):
        weights = open_weights(tmp_path / f"{name}.safetensors")
        _same(weights, arrays)
        assert weights.shapes() == {key: array.shape for key, array in arrays.items()}
        assert {key: spec.dtype for key, spec in weights.specs().items()} == {key: array.dtype for key, array in arrays.items()}
    with safe_open(tmp_path / "ours.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.safetensors", "theirs.safetensors"]


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    arrays = _arrays()
    write_safetensors(tmp_path / "x.safetensors", arrays.items(), arrays)
    content = (tmp_path / "x.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    assert begin % 8 == 0 and "__metadata__" not in header
    for name, array in arrays.items():
        start, end = header[name]["data_offsets"]
        assert (begin + start) % array.itemsize == 0
        assert content[begin + start : begin + end] == array.tobytes()
    assert len(content) == begin + sum(array.nbytes for array in arrays.values())


@given(
    shapes=st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 4), max_size=3), max_size=6),
    dtypes=st.lists(st.sampled_from(_DTYPES), min_size=6, max_size=6),
    limit=st.one_of(st.none(), st.integers(1, 300)),
)
def test_any_tensors_come_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], dtypes: list[Any], limit: int | None
) -> None:
    arrays = {
        name: (np.arange(math.prod(shape)) % 2).reshape(shape).astype(dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=False)
    }
    folder = tmp_path_factory.mktemp("any")
    write_safetensors(folder / "model.safetensors", arrays.items(), arrays, max_shard_bytes=limit)
    _same(open_weights(folder), arrays)


def test_transposed_arrays_are_written_as_they_look(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {"t": array.T, "s": array[:, ::2], "b": np.broadcast_to(array[0, 0, 1], (3, 3))}
    write_safetensors(tmp_path / "x.safetensors", views.items(), views)
    _same(load_file(tmp_path / "x.safetensors"), views)


def test_shards_are_those_that_hugging_face_writes(tmp_path: Path) -> None:
    arrays = _floats() | {"large": np.arange(50, dtype=np.float32), "last": np.ones(1, np.float16)}
    write_safetensors(tmp_path / "model.safetensors", arrays.items(), arrays, metadata={"format": "pt"}, max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    assert index["metadata"] == {"total_size": 6 * 40 + 200 + 2}
    assert list(index["weight_map"]) == sorted(arrays)
    expected = [["layer.0", "layer.1"], ["layer.2", "layer.3"], ["layer.4", "layer.5"], ["large"], ["last"]]
    for name, inside in zip(names, expected, strict=True):
        _same(load_file(tmp_path / name), {key: arrays[key] for key in inside})
        assert all(index["weight_map"][key] == name for key in inside)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        weights = open_weights(path)
        _same(weights, arrays)
        assert weights.shapes()["large"] == (50,)


def test_a_limit_that_all_tensors_fit_into_gives_one_file(tmp_path: Path) -> None:
    arrays = _floats()
    write_safetensors(tmp_path / "model.safetensors", arrays.items(), arrays, max_shard_bytes=240)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def _broken(arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    yield next(iter(arrays.items()))
    raise RuntimeError("the source broke")


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (lambda a: [*a.items()][:-2], ValueError, "2 tensors to be written were not given: layer.4, layer.5"),
        (lambda a: [*a.items(), ("layer.0", a["layer.0"])], ValueError, "layer.0 is given twice"),
        (lambda a: [*a.items(), ("other", a["layer.0"])], ValueError, "other is not among the tensors"),
        (lambda a: [("layer.0", np.zeros((10, 1), np.float32))], ValueError, r"layer.0 is float32\[10, 1\], not float32\[10\]"),
        (lambda a: [("layer.0", np.zeros(10, np.float16))], ValueError, r"layer.0 is float16\[10\], not float32\[10\]"),
        (_broken, RuntimeError, "the source broke"),
    ],
)
@pytest.mark.parametrize("limit", [None, 100])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, tensors: Any, error: type[Exception], message: str, limit: int | None
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    arrays = _floats()
    with pytest.raises(error, match=message):
        write_safetensors(path, tensors(arrays), arrays, max_shard_bytes=limit)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b"before"


def test_tensors_that_the_format_cannot_hold(tmp_path: Path) -> None:
    for name, dtype in (("x", np.complex64), ("x", np.dtype(">f4")), ("__metadata__", np.float32)):
        arrays = {name: np.zeros(2, dtype)}
        with pytest.raises(ValueError, match="holds no"):
            write_safetensors(tmp_path / "x.safetensors", arrays.items(), arrays)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_does_not_take_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*absent/x\.safetensors: No such file"):
        write_safetensors(tmp_path / "absent" / "x.safetensors", {}.items(), {})


def test_shapes_and_membership_read_no_tensor(tmp_path: Path) -> None:
    arrays = _floats()
    save_file(arrays, tmp_path / "x.safetensors")
    weights = open_weights(tmp_path / "x.safetensors")
    reads: list[str] = []
    counted = Weights(
        {name: tensor._replace(read=lambda name=name: reads.append(name)) for name, tensor in weights._tensors.items()}  # type: ignore[misc]
    )
    assert "layer.1" in counted and "x" not in counted and len(counted) == 6 and list(counted)[:2] == ["layer.0", "layer.1"]
    assert counted.shapes()["layer.1"] == (10,) and counted.specs()["layer.1"] == Spec((10,), np.dtype(np.float32))
    assert not reads
    assert counted["layer.1"] is None and reads == ["layer.1"]
    with pytest.raises(KeyError):
        weights["x"]


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "model", "pytorch_model"])
def test_folders_are_read_by_their_usual_names(tmp_path: Path, name: str) -> None:
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    save_file({"w": np.ones(1, np.float16)}, tmp_path / f"{name}.fp16.safetensors")
    (tmp_path / f"{name}.bin").write_bytes(b"not read, as there are safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert open_weights(tmp_path)["w"].dtype == np.float32
    assert open_weights(str(tmp_path), variant="fp16")["w"].dtype == np.float16
    with pytest.raises(UserError, match=f"no weights of the variant 'ema'; its files are: config.json, {name}.bin"):
        open_weights(tmp_path, variant="ema")


def test_a_folder_of_variants_only_is_not_guessed(tmp_path: Path) -> None:
    arrays = _floats()
    write_safetensors(tmp_path / "model.fp16.safetensors", arrays.items(), arrays, max_shard_bytes=100)
    (tmp_path / "model.fp16.safetensors.index.json").rename(tmp_path / "model.safetensors.index.fp16.json")
    with pytest.raises(UserError, match=r"holds no weights under a usual name.*model\.fp16-00001-of-00003\.safetensors"):
        open_weights(tmp_path)
    _same(open_weights(tmp_path, variant="fp16"), arrays)


def test_two_weight_files_in_a_folder_are_ambiguous(tmp_path: Path) -> None:
    for name in ("model", "diffusion_pytorch_model"):
        save_file(_floats(1), tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"several weight files.*diffusion_pytorch_model\.safetensors, model\.safetensors"):
        open_weights(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    arrays = _floats()
    write_safetensors(tmp_path / "model.safetensors", arrays.items(), arrays, max_shard_bytes=100)
    return tmp_path


def test_missing_shards_are_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    for path in (sharded, sharded / "model.safetensors.index.json"):
        with pytest.raises(UserError, match=r"lacks 1 of 3 weight files .*: model-00002-of-00003\.safetensors$"):
            open_weights(path)


def test_tensors_that_a_shard_lacks_are_named(sharded: Path) -> None:
    save_file(_floats(1), sharded / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match=r"2 tensors that are not in their files: layer\.2 \(model-00002-of-00003\.safetensors\), layer\.3"):
        open_weights(sharded)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "is no index"),
        ("[]", "is no index"),
        ('{"metadata": {}}', "is no index"),
        ('{"weight_map": ["x"]}', "is no index"),
        ('{"weight_map": {"x": 3}}', "is no index"),
        ('{"weight_map": {"x": "../secret.safetensors"}}', "outside of its folder"),
        ('{"weight_map": {"x": "/etc/passwd"}}', "outside of its folder"),
        ('{"weight_map": {"x": "a\\nb"}}', "names: a b$"),
        ("version https://git-lfs.github.com/spec/v1", "is no index"),
    ],
)
def test_indices_that_are_none(tmp_path: Path, index: str, reason: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=reason):
        open_weights(tmp_path)


def test_every_other_fault_of_a_file_is_one_line_for_the_user(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    for content, reason in [
        (shard.read_bytes()[:-1], "is no complete safetensors file"),
        (shard.read_bytes()[:20], "is no complete safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"", "is empty"),
    ]:
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"{shard.name} {reason}") as caught:
            open_weights(sharded)
        assert "\n" not in str(caught.value)
    for path, reason in [(sharded / "absent.ckpt", "no weight file at"), (sharded / "config.yaml", "is text, not a weight file")]:
        (sharded / "config.yaml").write_text("model: ldm\n")
        with pytest.raises(UserError, match=reason):
            open_weights(path)


def test_a_dtype_that_is_not_read_is_named(tmp_path: Path) -> None:
    save_file({"w": np.ones(3, ml_dtypes.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="F8_E4M3"):
        open_weights(tmp_path / "x.safetensors")


def test_npz_files(tmp_path: Path) -> None:
    arrays = _floats()
    np.savez(tmp_path / "x.npz", **arrays)
    _same(open_weights(tmp_path / "x.npz"), arrays)


_PROGRAM = """
import sys, threading, time, zipfile
from pathlib import Path
import numpy as np
from ldm_jax.interop.safetensors_file import open_weights, write_safetensors

folder, kind, count, megabytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
size = megabytes * 2**20

def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()

def pickled(end):  # the object of torch.save: a dict of tensors
    body = b"\\x80\\x02}"
    for i in range(count):
        storage = b"(" + text("storage") + b"ctorch\\nFloatStorage\\n" + text(str(i)) + text("cpu")
        storage += b"J" + (size // 4).to_bytes(4, "little")
        shape, stride = b"J" + (size // 4096).to_bytes(4, "little") + b"M\\0\\4\\x86", b"M\\0\\4K\\1\\x86"
        body += text(f"w{i}") + b"ctorch._utils\\n_rebuild_tensor_v2\\n(" + storage + end + b"tQK\\0" + shape + stride + b"\\x89NtRs"
    return body + b"."

source = folder / {"zip": "model.ckpt", "legacy": "model.bin", "safetensors": "model.safetensors"}[kind]
if kind == "zip":
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("a/data.pkl", pickled(b""))
        for i in range(count):
            with archive.open(f"a/data/{i}", "w") as member:
                for _ in range(megabytes):
                    member.write(bytes(2**20))
elif kind == "legacy":
    import pickle
    with source.open("wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            file.write(pickle.dumps(header, 2))
        file.write(pickled(b"N") + pickle.dumps([str(i) for i in range(count)], 2))
        for i in range(count):
            file.write((size // 4).to_bytes(8, "little"))
            file.truncate(file.tell() + size)
            file.seek(0, 2)
else:
    import json
    entry = lambda i: {"dtype": "F32", "shape": [size // 4096, 1024], "data_offsets": [i * size, (i + 1) * size]}
    header = json.dumps({f"w{i}": entry(i) for i in range(count)}).encode()
    with source.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + count * size)

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

peak = before = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
weights = open_weights(source)
specs = {f"{name}.T": type(spec)(spec.shape[::-1], spec.dtype) for name, spec in weights.specs().items()}
transposed = ((f"{name}.T", array.T) for name, array in weights.items())
write_safetensors(folder / "out.safetensors", transposed, specs, max_shard_bytes=3 * size)
done = True
watcher.join()
assert sum(shape[0] * shape[1] * 4 for shape in open_weights(folder / "out.safetensors.index.json").shapes().values()) == count * size
print((peak - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(("kind", "tensors"), [("zip", 1.3), ("legacy", 1.3), ("safetensors", 2.3)])
def test_files_pass_through_without_being_in_memory(tmp_path: Path, kind: str, tensors: float) -> None:
    """320 MB from file to file, every tensor transposed on the way: memory is that of the transposed tensor, and of the read one where
    the source is not mapped."""
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path), kind, "8", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < tensors
