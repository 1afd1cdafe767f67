"""The reader of weight files, on files that are built here by hand, without torch."""

import collections
import io
import mmap
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ldm_jax.interop.torch_file import load_state_dict


class _Call:
    """Pickles as the call of a global function, by a name that need not exist here."""

    def __init__(self, name: str, *args: Any) -> None:
        self.name, self.args = name, args

    def __reduce__(self) -> tuple:
        return _Global(self.name), self.args


class _Global:
    """Pickles as a bare global name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> None:
        raise AssertionError("never called")


class _Storage:
    def __init__(self, kind: str, key: str, array: np.ndarray) -> None:
        self.kind, self.key, self.array = kind, key, array


class _Pickler(pickle._Pickler):
    """Python's own pickler, taught to write foreign names and torch's storages."""

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", _Global(f"torch.{obj.kind}"), obj.key, "cpu", obj.array.size) if isinstance(obj, _Storage) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            module, _, name = obj.name.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        else:
            super().save(obj, save_persistent_id)


_KINDS = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


def _strides(array: np.ndarray) -> tuple[int, ...]:
    return tuple(step // array.itemsize for step in array.strides)


def _tensor(storage: _Storage, offset: Any, size: Any, stride: Any) -> _Call:
    return _Call("torch._utils._rebuild_tensor_v2", storage, offset, size, stride, False, collections.OrderedDict())


def _of(array: np.ndarray, key: str) -> _Call:
    return _tensor(_Storage(_KINDS[array.dtype], key, array), 0, array.shape, _strides(array))


def _write(path: Path, obj: Any, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    stream, storages = io.BytesIO(), {}

    class Pickler(_Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, _Storage):
                storages[obj.key] = obj.array
            return super().persistent_id(obj)

    Pickler(stream, protocol=2).dump(obj)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("dtype", _KINDS, ids=str)
def test_every_dtype_is_read_exactly(tmp_path: Path, dtype: np.dtype, compression: int) -> None:
    array = (np.arange(24).reshape(2, 3, 4) % 5).astype(dtype)
    state = load_state_dict(_write(tmp_path / "x.pth", {"a.weight": _of(array, "0")}, compression))
    assert list(state) == ["a.weight"] and state["a.weight"].dtype == dtype
    np.testing.assert_array_equal(state["a.weight"], array)


def test_tensors_share_storages_with_offsets_and_strides(tmp_path: Path) -> None:
    base = np.arange(40, dtype=np.float32)
    storage = _Storage("FloatStorage", "7", base)
    path = _write(
        tmp_path / "x.pt",
        {
            "slice": _tensor(storage, 4, (3,), (1,)),
            "transposed": _tensor(storage, 0, (5, 8), (1, 5)),
            "expanded": _tensor(storage, 2, (3, 2), (0, 1)),
            "scalar": _tensor(storage, 39, (), ()),
            "empty": _tensor(_Storage("FloatStorage", "8", base[:0]), 0, (0, 3), (3, 1)),
        },
    )
    state = load_state_dict(path)
    np.testing.assert_array_equal(state["slice"], [4, 5, 6])
    np.testing.assert_array_equal(state["transposed"], base.reshape(8, 5).T)
    np.testing.assert_array_equal(state["expanded"], [[2, 3]] * 3)
    assert state["scalar"] == 39 and state["empty"].shape == (0, 3)


def _is_mapped(array: Any) -> bool:
    owner = array
    while not isinstance(owner, (mmap.mmap, bytes, type(None))):
        owner = owner.obj if isinstance(owner, memoryview) else owner.base
    return isinstance(owner, mmap.mmap) and not array.flags.writeable


def test_stored_members_are_mapped_not_copied(tmp_path: Path) -> None:
    assert _is_mapped(load_state_dict(_write(tmp_path / "x.pth", {"w": _of(np.ones(1000, np.float32), "0")}))["w"])


def test_lightning_checkpoint_gives_its_state_dict(tmp_path: Path) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    inner = collections.OrderedDict(weight=_of(weight, "0"), steps=5)
    inner["parameter"] = _Call("torch._utils._rebuild_parameter", _of(weight, "1"), True, collections.OrderedDict())
    checkpoint = {
        "epoch": 3,
        "state_dict": inner,
        "sizes": [_Call("torch.Size", (2, 3)), None, 1.5, (True, {"set"})],
        "optimizer_states": [{"state": {0: {"exp_avg": _of(weight, "2")}}}],
    }
    state = load_state_dict(_write(tmp_path / "last.ckpt", checkpoint))
    assert sorted(state) == ["parameter", "weight"]
    np.testing.assert_array_equal(state["parameter"], weight)


def test_metadata_of_an_ordered_dict_is_ignored(tmp_path: Path) -> None:
    state = collections.OrderedDict(w=_of(np.ones(2, np.float32), "0"))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert list(load_state_dict(_write(tmp_path / "x.pth", state))) == ["w"]


def test_safetensors_and_npz(tmp_path: Path) -> None:
    arrays = {"a": np.arange(3, dtype=np.float32), "b.c": np.ones((2, 2), ml_dtypes.bfloat16)}
    save_file(arrays, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", a=arrays["a"])
    state = load_state_dict(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert state[name].dtype == array.dtype
        np.testing.assert_array_equal(state[name], array)
    np.testing.assert_array_equal(load_state_dict(str(tmp_path / "x.npz"))["a"], arrays["a"])


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "posix.system",
        "builtins.eval",
        "torch.load",
        "numpy.load",
        "torch._utils._rebuild_tensor_v2.__class__",
    ],
)
def test_foreign_names_are_refused_and_nothing_runs(tmp_path: Path, name: str) -> None:
    proof = tmp_path / "proof"
    path = _write(tmp_path / "evil.pth", {"w": _of(np.ones(2, np.float32), "0"), "x": _Call(name, f"touch {proof}")})
    with pytest.raises(ValueError, match=f"asks for {name}".replace(".", r"\.")) as caught:
        load_state_dict(path)
    assert not proof.exists() and "\n" not in str(caught.value)


def test_the_malicious_file_would_run_in_a_plain_unpickler(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = _write(tmp_path / "evil.pth", _Call("os.system", f"touch {proof}"))
    pickle.loads(zipfile.ZipFile(path).read("archive/data.pkl"))
    assert proof.exists()


def test_refusal_imports_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_pickle.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"imported_by_pickle\.f"):
        load_state_dict(_write(tmp_path / "x.pth", {"x": _Call("imported_by_pickle.f")}))
    assert "imported_by_pickle" not in sys.modules


def test_build_instruction_cannot_change_the_readers_functions(tmp_path: Path) -> None:
    stream = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x04\x00\x00\x00callK\x01s\x86b."
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
    with pytest.raises(ValueError, match="cannot be read"):
        load_state_dict(path)
    assert list(load_state_dict(_write(tmp_path / "y.pth", {"w": _of(np.ones(2, np.float32), "0")}))) == ["w"]


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (4, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (2, 2), (10**9, 1)),
        (0, (2,), (-1,)),
        (0, (2,), (1, 1)),
        ("0", (1,), (1,)),
    ],
)
def test_tensors_outside_of_their_storage_are_refused(tmp_path: Path, offset: Any, size: Any, stride: Any) -> None:
    tensor = _tensor(_Storage("FloatStorage", "0", np.ones(4, np.float32)), offset, size, stride)
    with pytest.raises(ValueError, match=r"exceeds its storage|malformed"):
        load_state_dict(_write(tmp_path / "x.pth", {"w": tensor}))


def test_storage_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    short = types.SimpleNamespace(size=100, tobytes=lambda: b"\0" * 8)
    with pytest.raises(ValueError, match="storage 0 has 8 bytes, too few for 100 x float32"):
        load_state_dict(_write(tmp_path / "x.pth", {"w": _tensor(_Storage("FloatStorage", "0", short), 0, (100,), (1,))}))


def test_truncated_files_are_refused_in_one_line(tmp_path: Path) -> None:
    arrays = {"w": np.ones(1000, np.float32)}
    save_file(arrays, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **arrays)
    _write(tmp_path / "x.pth", {"w": _of(arrays["w"], "0")})
    for name in ("x.safetensors", "x.npz", "x.pth"):
        whole = (tmp_path / name).read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 5):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(ValueError) as caught:
                load_state_dict(tmp_path / name)
            assert name in str(caught.value) and "\n" not in str(caught.value)


@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_one_changed_byte_gives_arrays_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, position: int, value: int) -> None:
    path = _write(tmp_path_factory.mktemp("fuzz") / "x.pth", {"w": _of(np.arange(10, dtype=np.float32), "0")})
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        state = load_state_dict(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(array, np.ndarray) for array in state.values())


def test_other_formats_and_missing_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{"object": 1}], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        load_state_dict(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError, match="no weight file"):
        load_state_dict(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="is a folder"):
        load_state_dict(tmp_path)


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5962336\n"


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".safetensors", ".npz", ""])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "is empty, not a weight file"),
        (_POINTER, "is a git-lfs pointer to weights"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page"),
        (b"<html>not found</html>", "is a web page"),
        (b"model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n" * 20, "is text, not a weight file"),
        (b'{"weight_map": {}}', "is text, not a weight file"),
        ("ключ: значение # ".encode() * 40, "is text, not a weight file"),  # 512 bytes end within a letter
        (b"\x1f\x8b\x08" + b"\0" * 40, "is packed by gzip"),
        (b"\x01" * 257 + b"ustar" + b"\0" * 300, "is a tar archive"),
    ],
)
def test_what_is_no_weight_file_is_called_what_it_is(tmp_path: Path, suffix: str, content: bytes, kind: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=kind) as caught:
        load_state_dict(path)
    assert str(caught.value).startswith(f"{path} is") and "\n" not in str(caught.value)


def test_binary_files_of_another_kind(tmp_path: Path) -> None:
    for content, reason in [
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no zip archive"),
        (pickle.dumps({"w": 1}), "no zip archive"),
        (b"PK\x03\x04" + bytes(100), "archive is truncated"),
    ]:
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            load_state_dict(tmp_path / "x.pth")


def test_the_dict_of_tensors_is_chosen_by_its_key_and_never_guessed(tmp_path: Path) -> None:
    model, ema = _of(np.zeros(2, np.float32), "0"), _of(np.ones(2, np.float32), "1")
    path = _write(tmp_path / "dit.pt", {"model": {"w": model}, "ema": {"w": ema, "b": ema}, "opt": {"state": {0: {"m": model}}}})
    with pytest.raises(ValueError, match=r"several sets of tensors.*'model' \(1\), 'ema' \(2\)$"):
        load_state_dict(path)
    with pytest.raises(ValueError, match=r"no set of tensors 'opt'.*'model' \(1\), 'ema' \(2\)$"):
        load_state_dict(path, key="opt")
    assert list(load_state_dict(path, key="ema")) == ["w", "b"]
    np.testing.assert_array_equal(load_state_dict(path, key="model")["w"], [0, 0])
    mixed = _write(tmp_path / "mixed.pt", {"loss": ema, "network": {"w": model}})
    with pytest.raises(ValueError, match=r"'' \(1\), 'network' \(1\)$"):
        load_state_dict(mixed)
    assert list(load_state_dict(mixed, key="")) == ["loss"]
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no set of tensors 'ema'"):
        load_state_dict(tmp_path / "x.safetensors", key="ema")


def _write_legacy(path: Path, obj: Any) -> Path:
    """The format from before torch 1.6: header pickles, the object, the storages' keys, their sizes and bytes."""
    storages: dict[str, np.ndarray] = {}

    class Pickler(_Pickler):
        def persistent_id(self, obj: Any) -> Any:
            pid = super().persistent_id(obj)
            if pid is None:
                return None
            storages[obj.key] = obj.array
            return (*pid, None)

    stream = io.BytesIO()
    for header in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(header, stream, protocol=2)
    Pickler(stream, protocol=2).dump(obj)
    pickle.dump(list(storages), stream, protocol=2)
    for array in storages.values():
        stream.write(array.size.to_bytes(8, "little") + array.tobytes())
    path.write_bytes(stream.getvalue())
    return path


def test_files_from_before_torch_1_6(tmp_path: Path) -> None:
    a, b = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(5, dtype=np.int64)
    transposed = _tensor(_Storage("FloatStorage", "0", a.ravel()), 0, (4, 3), (1, 4))
    path = _write_legacy(tmp_path / "old.pth", {"a": _of(a.ravel(), "0"), "t": transposed, "b": _of(b, "7")})
    state = load_state_dict(path)
    np.testing.assert_array_equal(state["a"], a.ravel())
    np.testing.assert_array_equal(state["t"], a.T)
    np.testing.assert_array_equal(state["b"], b)
    assert all(_is_mapped(array) for array in state.values())
    for cut in (1, 20, 60):
        (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(ValueError, match="cannot be read as a torch weight file"):
            load_state_dict(tmp_path / "cut.pth")
    hostile = _write_legacy(tmp_path / "hostile.pth", {"a": _Call("os.system", "true")})
    with pytest.raises(ValueError, match=r"asks for os\.system"):
        load_state_dict(hostile)


@pytest.mark.parametrize("obj", [{"epoch": 1}, [1, 2], {"model": {"w": None}}, {"state_dict": 3}])
def test_files_without_named_tensors_are_refused(tmp_path: Path, obj: Any) -> None:
    with pytest.raises(ValueError, match="holds no named tensors"):
        load_state_dict(_write(tmp_path / "x.pth", obj))


def test_big_endian_and_doubled_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(ValueError, match="big-endian"):
        load_state_dict(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"")
    with pytest.raises(ValueError, match="2 members named"):
        load_state_dict(path)
