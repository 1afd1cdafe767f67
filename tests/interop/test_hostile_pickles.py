"""Weight files that are written to run code, to eat memory, or to confuse the reader; and what they may hold beside weights."""

import copyreg
import os
import pickle
import sys
import time
import tracemalloc
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_jax.interop.torch_file import load_state_dict

_CALLS: list[str] = []
_EVENTS: list[str] = []
_watching = False


def _audit(event: str, _: Any) -> None:
    if _watching and event.split(".")[0] in ("os", "exec", "import", "subprocess", "ctypes", "pickle", "shutil", "socket"):
        _EVENTS.append(event)


sys.addaudithook(_audit)


def _call(*args: Any) -> None:
    _CALLS.append(f"called with {args}")


class _Trap:
    """Tells of every way to make it or to give it a state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Trap":
        _call(args, kwargs)
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        _call(state)


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What zipfile and numpy import when they are first used is not the doing of an attack."""
    load_state_dict(_raw(tmp_path_factory.mktemp("good") / "x.pth", _GOOD))


@pytest.fixture
def trap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Functions that a pickle would reach, replaced by ones that tell; the same as attributes of a package whose prefix is let through."""
    _CALLS.clear()
    _EVENTS.clear()
    monkeypatch.setattr(os, "system", _call)
    monkeypatch.setattr("builtins.eval", _call)
    package = types.ModuleType("pytorch_lightning")
    package.os, package.run = os, _call  # type: ignore[attr-defined]
    module = types.ModuleType("trap")
    module.Trap, module.os = _Trap, os  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", package)
    monkeypatch.setitem(sys.modules, "trap", module)
    copyreg.add_extension("os", "system", 240)
    yield
    copyreg.remove_extension("os", "system", 240)
    copyreg._extension_cache.pop(240, None)  # type: ignore[attr-defined]


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _raw(path: Path, stream: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream)
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    return path


def _refused(path: Path, reason: str) -> None:
    """One line, at once, and nothing happened that Python's audit events would show."""
    global _watching
    begin = time.monotonic()
    with pytest.raises(ValueError, match=reason) as caught:
        _watching = True
        try:
            load_state_dict(path)
        finally:
            _watching = False
    assert str(path) in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert not _CALLS and not _EVENTS
    assert time.monotonic() - begin < 5


_2, _4 = b"\x80\x02", b"\x80\x04"
_ARGUMENT = _text("true") + b"\x85"
_SYSTEM = b"cos\nsystem\n"
_TRAP = b"ctrap\nTrap\n"
_ATTACKS = {
    "reduce": (_2 + _SYSTEM + _ARGUMENT + b"R.", r"asks for os\.system"),
    "eval": (_2 + b"c__builtin__\neval\n" + _ARGUMENT + b"R.", r"asks for __builtin__\.eval"),
    "stack global": (_4 + _text("os") + _text("system") + b"\x93" + _ARGUMENT + b"R.", r"asks for os\.system"),
    "dotted name": (_4 + _text("trap") + _text("os.system") + b"\x93" + _ARGUMENT + b"R.", r"asks for trap\.os\.system"),
    "dotted name behind a prefix": (
        _4 + _text("pytorch_lightning") + _text("os.system") + b"\x93" + _ARGUMENT + b"R.",
        "holds no named tensors",  # a placeholder, which does nothing
    ),
    "name of a prefix": (_2 + b"cpytorch_lightning\nrun\n" + _ARGUMENT + b"R.", "holds no named tensors"),
    "getattr of a prefix": (
        _2 + b"c__builtin__\ngetattr\ncpytorch_lightning\nos\n" + _text("system") + b"\x86R" + _ARGUMENT + b"R.",
        r"asks for __builtin__\.getattr",
    ),
    "memo overwritten": (
        _2 + b"ccollections\nOrderedDict\nq\x000" + _SYSTEM + b"q\x000h\x00" + _ARGUMENT + b"R.",
        r"asks for os\.system",
    ),
    "memo of a function, then its argument": (_2 + _SYSTEM + b"q\x01N}q\x01h\x01000" + _SYSTEM + _ARGUMENT + b"R.", r"asks for os\.system"),
    "inst": (b"(" + _text("true") + b"ios\nsystem\n.", "instruction 0x69"),
    "obj": (b"(" + _SYSTEM + _text("true") + b"o.", r"asks for os\.system"),
    "obj of a prefix": (b"(cpytorch_lightning\nrun\n" + _text("true") + b"o.", "instruction 0x6f"),
    "newobj": (_2 + _TRAP + b")\x81.", r"asks for trap\.Trap"),
    "newobj with keywords": (_4 + _TRAP + b")}\x92.", r"asks for trap\.Trap"),
    "newobj with keywords of a prefix": (_4 + b"cpytorch_lightning\nos\n)}\x92" + _SYSTEM + _ARGUMENT + b"R.", "instruction 0x92"),
    "state of an object": (_2 + _TRAP + b")\x81" + _text("true") + b"b.", r"asks for trap\.Trap"),
    "state that brings a setter": (
        _2 + b"ccollections\nOrderedDict\n)R}" + _text("__setstate__") + _SYSTEM + b"sb" + _text("true") + b"b.",
        r"asks for os\.system",
    ),
    "reduce hidden in what is not needed": (
        _2 + b"}" + _text("optimizer_states") + b"]" + _SYSTEM + _ARGUMENT + b"Ras.",
        r"asks for os\.system",
    ),
    "reduce in the state of a prefix": (
        _2 + b"cpytorch_lightning\nrun\n" + _SYSTEM + _ARGUMENT + b"Rb.",
        r"asks for os\.system",
    ),
    "factory": (_2 + b"ccollections\ndefaultdict\n" + _SYSTEM + b"\x85R.", r"asks for os\.system"),
    "extension": (_2 + b"\x82\xf0" + _ARGUMENT + b"R.", "instruction 0x82"),
    "extension of two bytes": (_2 + b"\x83\xf0\x00" + _ARGUMENT + b"R.", "instruction 0x83"),
    "extension of four bytes": (_2 + b"\x84\xf0\x00\x00\x00" + _ARGUMENT + b"R.", "instruction 0x84"),
    "line breaks and terminal codes in a name": (
        _4 + _text("o\ns\x1b[2J") + _text("x" * 5000) + b"\x93" + _SYSTEM + _ARGUMENT + b"R.",
        "asks for o s",
    ),
}
_RUN_IN_PYTHON = set(_ATTACKS) - {"line breaks and terminal codes in a name", "factory", "newobj with keywords of a prefix"}


@pytest.mark.parametrize("attack", _ATTACKS)
@pytest.mark.usefixtures("trap")
def test_no_trick_reaches_a_function(tmp_path: Path, attack: str) -> None:
    stream, reason = _ATTACKS[attack]
    _refused(_raw(tmp_path / "evil.ckpt", stream), reason)


@pytest.mark.parametrize("attack", sorted(_RUN_IN_PYTHON))
@pytest.mark.usefixtures("trap")
def test_the_tricks_do_work_on_python(attack: str) -> None:
    if attack == "dotted name":
        sys.modules["trap"].os = types.SimpleNamespace(system=_call)  # type: ignore[attr-defined]
    pickle.loads(_ATTACKS[attack][0])
    assert _CALLS


@pytest.mark.usefixtures("trap")
def test_an_extension_that_python_has_cached_is_refused_too(tmp_path: Path) -> None:
    copyreg._extension_cache[240] = _call  # type: ignore[attr-defined]
    _refused(_raw(tmp_path / "evil.ckpt", _ATTACKS["extension"][0]), "instruction 0x82")


@pytest.mark.parametrize(
    "name",
    """os.popen nt.system posix.execv subprocess.Popen sys.exit importlib.import_module builtins.exec builtins.getattr builtins.compile
    builtins.open __builtin__.__import__ runpy.run_path operator.attrgetter _operator.methodcaller functools.partial copyreg._reconstructor
    pickle.loads _pickle.loads torch.load torch.hub.load torch.jit.load numpy.load numpy.testing._private.utils.runstring shutil.rmtree
    webbrowser.open pip.main timeit.timeit pytorch_lightnin.x pytorch_lightning_.x omegaconfig.x lightning-x.y .pytorch_lightning
    collections.namedtuple codecs.encode typing.Union torch.device.__class__ _codecs.decode""".split(),  # noqa: SIM905
)
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    module, _, last = name.rpartition(".")
    for stream in (_2 + f"c{module}\n{last}\n".encode(), _4 + _text(module) + _text(last) + b"\x93"):
        _refused(_raw(tmp_path / "evil.pth", stream + b"."), f"asks for {name}".replace(".", r"\."))


def _tensor(pid: bytes, size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85") -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K\x00" + size + stride + b"\x89NtR"


def _pid(count: bytes = b"K\x04", kind: bytes = b"ctorch\nFloatStorage\n", more: bytes = b"") -> bytes:
    return b"(" + _text("storage") + kind + _text("0") + _text("cuda:0") + count + more + b"tQ"


def test_the_hand_written_tensor_is_one(tmp_path: Path) -> None:
    path = _raw(tmp_path / "x.pth", _2 + b"}" + _text("w") + _tensor(_pid()) + b"s.")
    np.testing.assert_array_equal(load_state_dict(path)["w"], [0, 1, 2, 3])


_HUGE = b"\x8a\x08" + (2**62).to_bytes(8, "little")
_LAUGHS = b"]q\x00" + b"".join(b"]q" + bytes([i]) + b"(h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"e" for i in range(1, 60))
_DEEP = b"N" + b"\x85" * 300_000  # tuples in tuples: too deep for Python to hash
_ENDLESS = _tensor(_pid(), size=b"\x8a\x06\0\0\0\0\0\x01\x85", stride=b"K\x00\x85")  # 2^40 elements, all in one place


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (_tensor(_text("0") + b"Q"), "describes a storage"),
        (_tensor(b"NQ"), "describes a storage"),
        (_tensor(b"}Q"), "describes a storage"),
        (_tensor(b"(" + _text("storage") + b"tQ"), "describes a storage"),
        (_tensor(_pid(kind=_text("ObjectStorage"))), "describes a storage"),
        (_tensor(_pid(kind=b"ctorch\nUntypedStorage\n")), r"asks for torch\.UntypedStorage"),
        (_tensor(_pid(count=b"J\xff\xff\xff\xff")), "describes a storage"),
        (_tensor(_pid(count=_text("4"))), "describes a storage"),
        (_tensor(_pid(more=_ENDLESS)), "describes a storage"),
        (_tensor(_pid(more=_LAUGHS)), "describes a storage"),
        (_tensor(_pid(count=_HUGE)), "storage 0 has 16 bytes, too few"),
        (_tensor(_pid(), size=b"(K\x04" + _HUGE + b"t", stride=b"K\x01K\x00\x86"), "cannot be read"),
        (_tensor(_pid(), size=_HUGE + b"\x85"), "exceeds its storage"),
        (_tensor(_pid(), size=_LAUGHS), "malformed"),
        (_tensor(_pid(), size=_ENDLESS), "malformed"),
        (_tensor(_text("0")), "malformed"),
        (_tensor(_ENDLESS, stride=b"K\x00\x85"), "exceeds its storage|cannot be read|holds no named"),
        (b"ctorch\nSize\n" + _ENDLESS + b"\x85R", "makes a container of a ndarray"),
        (b"ccollections\nOrderedDict\n" + _ENDLESS + b"\x85R", "makes a container of a ndarray"),
        (_tensor(_pid()) + b"K\x01b", "sets the state of a ndarray"),
        (_tensor(_pid()) + b"K\x00K\x07s", "cannot be read"),
        (b"ctorch._utils\n_rebuild_parameter\n}" + _text("call") + b"Nsb", "sets the state of a Function"),
        (b"ctorch._utils\n_rebuild_parameter\nctorch._utils\n_rebuild_parameter\n\x85R)R", "cannot be read"),
        (_text("os.system") + _ARGUMENT + b"R", "calls a str"),
        (b"ctorch\nFloatStorage\n" + _ARGUMENT + b"R", "calls a str"),
        (b"Nr\xff\xff\xff\xff", "holds no named tensors"),  # a memo of 2^32 entries
        (b"B\xff\xff\xff\x7fx", "truncated"),
        (b"\x8d" + b"\xff" * 7 + b"\x7f" + b"x", "cannot be read"),
        (b"\x95" + b"\xff" * 7 + b"\x7f" + b"x", "cannot be read"),
        (b"\x8b\xff\xff\xff\x7f\x01", "truncated|holds no named"),
        (b"\x96" + b"\xff" * 7 + b"\x7f", "instruction 0x96"),
        (b"\x97", "instruction 0x97"),
        (b"}" + _DEEP + b"Ns", "has a tuple as a key"),
        (b"}(" + _DEEP + b"Nu", "has a tuple as a key"),
        (b"\x8f(" + _DEEP + b"\x90", "has a tuple as a key"),
        (b"c__builtin__\nset\n]" + _DEEP + b"a\x85R", "has a tuple as a key"),
        (b"ccollections\nOrderedDict\n]" + _DEEP + b"N\x86a\x85R", "has a tuple as a key"),
        (b"(" + _DEEP + b"\x91", "instruction 0x91"),
        (_DEEP, "holds no named tensors"),
        (b"h\x05", "cannot be read"),
        (b"t", "cannot be read"),
        (b"e" * 5, "cannot be read"),
        (b"(" * 100_000, "cannot be read"),
        (b"\x80\x07", "unsupported pickle protocol"),
    ],
)
@pytest.mark.usefixtures("trap")
def test_malformed_and_endless_pickles_cost_nothing(tmp_path: Path, stream: bytes, reason: str) -> None:
    path = _raw(tmp_path / "x.pth", _2 + stream + b".")
    tracemalloc.start()
    try:
        _refused(path, reason)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def _archive(path: Path, members: list[tuple[str, bytes, int]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content, compression in members:
            archive.writestr(name, content, compression)
    return path


_GOOD = _2 + b"}" + _text("w") + _tensor(_pid()) + b"s."
_DATA = ("a/data/0", bytes(16), zipfile.ZIP_STORED)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a/data.pkl", _GOOD, 0), ("a/data.pkl", _2 + _SYSTEM + b".", 0), _DATA], "two members of the same name"),
        ([("a/data.pkl", _GOOD, 0), _DATA, _DATA], "two members of the same name"),
        ([("a/data.pkl", _GOOD, 0), ("a/b/data.pkl", _GOOD, 0), _DATA], "2 members named"),
        ([("data.pkl", _GOOD, 0), _DATA], "0 members named"),
        ([("a/data.pkl", _GOOD, zipfile.ZIP_BZIP2), _DATA], "unusual way"),
        ([("a/data.pkl", _GOOD, 0), ("a/data/0", bytes(2**27), zipfile.ZIP_DEFLATED)], "would unpack to 134217728"),
        ([("a/data.pkl", b"N0" * 2**26 + b"N.", zipfile.ZIP_DEFLATED)], "would unpack to 134217730"),
        ([("a/data.pkl", _GOOD, 0), ("a/constants.pkl", b"", 0), _DATA], "TorchScript"),
        ([("a/data.pkl", _GOOD, 0)], "bytes of storage 0 are missing"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.usefixtures("trap")
def test_archives_that_are_forged(tmp_path: Path, members: list[tuple[str, bytes, int]], reason: str) -> None:
    _refused(_archive(tmp_path / "x.ckpt", members), reason)


def test_compressed_members_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _2 + b"}" + b"".join(_text(f"w{i}") + _tensor(_pid()) + b"s" for i in range(50)) + b"."
    path = _archive(tmp_path / "x.pt", [("a/data.pkl", stream, 8), ("a/data/0", bytes(16), 8)])
    read = zipfile.ZipFile.read
    members: list[Any] = []
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, name, pwd=None: members.append(name) or read(self, name, pwd))
    assert len(load_state_dict(path)) == 50 and len(members) == 2


def _object(module: str, name: str, state: Any) -> bytes:
    """An instance as pickles of protocol 2 hold it: NEWOBJ, then BUILD."""
    return f"c{module}\n{name}\n".encode() + b")\x81" + pickle.dumps(state, 2)[2:-1] + b"b"


def test_what_lightning_checkpoints_hold_beside_weights_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes as keys, configurations, numpy scalars, devices: nothing of it is imported, even where it could be."""
    for package in ("pytorch_lightning", "lightning", "omegaconf"):
        folder = tmp_path / package
        folder.mkdir()
        (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    score = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + _text("f8") + b"\x89\x88\x87R(K\x03" + _text("<") + b"NNNJ\xff\xff\xff\xff"
    score += b"J\xff\xff\xff\xffK\x00tbc_codecs\nencode\n" + _text("\x00" * 8) + _text("latin1") + b"\x86R\x86R"
    metadata = {"ref_type": int, "object_type": str, "element_type": bytes, "flags": {}, "resolver_cache": {}}
    entries = {
        "callbacks": b"}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}" + _text("best_model_score") + score + b"ss",
        "state_dict": b"ccollections\nOrderedDict\n)R" + _text("w") + _tensor(_pid()) + b"s",
        "hyper_parameters": _object("omegaconf.dictconfig", "DictConfig", {"_metadata": metadata, "_content": {"lr": 1e-4}}),
        "type": b"ctyping\nAny\n",
        "cache": b"ccollections\ndefaultdict\nc__builtin__\ndict\n\x85R" + _text("a") + b"K\x01s",
        "parsed": b"clightning.pytorch.utilities.parsing\nAttributeDict\n)\x81(" + _text("a") + b"K\x01u",
        "listed": b"comegaconf.listconfig\nListConfig\n)\x81(K\x01K\x02eK\x03a",
        "set": b"clightning.x\nSet\n)\x81(K\x01\x90",
        "args": _object("argparse", "Namespace", {"batch_size": 4}),
        "device": b"ctorch\ndevice\n" + _text("cuda") + b"K\x00\x86R",
        "dtype": b"ctorch\nbfloat16\n",
        "milestones": b"ccollections\nCounter\n}K\x05K\x01s\x85R",
    }
    stream = _4 + b"}" + b"".join(_text(name) + value + b"s" for name, value in entries.items()) + b"."
    state = load_state_dict(_raw(tmp_path / "last.ckpt", stream))
    assert list(state) == ["w"]
    np.testing.assert_array_equal(state["w"], [0, 1, 2, 3])
    assert not {"pytorch_lightning", "lightning", "omegaconf"} & set(sys.modules)
