"""Files that torch itself saves, in all its formats, against our reader; and what we write, read by torch."""

import collections
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm_jax.config import UserError
from ldm_jax.interop.safetensors_file import open_weights, write_safetensors
from ldm_jax.interop.torch_file import load_state_dict
from ldm_jax.interop.torch_writer import write_checkpoint

pytestmark = pytest.mark.peers

_FORMATS = [
    {},
    {"pickle_protocol": 3},
    {"pickle_protocol": 4},
    {"pickle_protocol": 5},
    {"_use_new_zipfile_serialization": False},
    {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
]
_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
_DTYPES += [torch.uint8, torch.bool]


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().numpy() if tensor.dtype == torch.bfloat16 else tensor.detach().numpy()


def _same(found: Any, expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert str(found[name].dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].astype(_numpy(tensor).dtype), _numpy(tensor))


def _state() -> dict[str, Any]:
    """Tensors of every dtype, parameters, and views of all kinds, some on one storage."""
    torch.manual_seed(0)
    base = torch.randn(8, 5)
    state = collections.OrderedDict({str(dtype): (10 * torch.randn(3, 1, 5)).to(dtype) for dtype in _DTYPES})
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    annotated = torch.nn.Parameter(torch.randn(4, 3))
    annotated.note = "an attribute"
    views = {"base": base, "transposed": base.T, "slice": base[2:6, ::2], "row": base[3], "expanded": base[:, :1].expand(8, 7)}
    state |= views | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "channels_last": torch.randn(2, 3, 4, 5)}
    state["channels_last"] = state["channels_last"].to(memory_format=torch.channels_last)
    return state | {"parameter": parameter, "annotated": annotated, "tied": parameter}


@pytest.mark.parametrize("options", _FORMATS, ids=str)
def test_every_format_dtype_and_view(tmp_path: Path, options: dict[str, Any]) -> None:
    state = _state()
    torch.save(state, tmp_path / "x.pt", **options)
    _same(load_state_dict(tmp_path / "x.pt"), state)
    weights = open_weights(tmp_path / "x.pt")
    _same(weights, state)
    assert weights.shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("options", _FORMATS, ids=str)
def test_modules_with_their_metadata(tmp_path: Path, options: dict[str, Any]) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4))
    torch.save(module.state_dict(), tmp_path / "x.bin", **options)
    _same(load_state_dict(tmp_path / "x.bin"), module.state_dict())
    torch.save(module, tmp_path / "module.pt", **options)
    with pytest.raises(ValueError, match=r"asks for torch\.nn\.modules\.container\.Sequential"):
        load_state_dict(tmp_path / "module.pt")


def test_programs_are_told_from_weights(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="TorchScript"):
        load_state_dict(tmp_path / "x.pt")


def _stand_in(name: str, *bases: type) -> type:
    """A class of a package that is not installed; saving needs to find it by its name, reading must not."""
    module, _, last = name.rpartition(".")
    return type(last, bases, {"__module__": module})


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A checkpoint as PyTorch Lightning wrote them in 2022 (1.4), around `_state()`."""
    names = {
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": (),
        "pytorch_lightning.utilities.parsing.AttributeDict": (dict,),
        "pytorch_lightning.utilities.distributed.Group": (set,),
        "lightning.pytorch.utilities.parsing.AttributeDict": (dict,),
        "omegaconf.dictconfig.DictConfig": (),
        "omegaconf.listconfig.ListConfig": (list,),
        "omegaconf.base.ContainerMetadata": (),
        "omegaconf.nodes.AnyNode": (),
    }
    found = {}
    with monkeypatch.context():
        for name, bases in names.items():
            module = name.rpartition(".")[0]
            for i in range(1, module.count(".") + 2):
                package = ".".join(module.split(".")[:i])
                monkeypatch.setitem(sys.modules, package, sys.modules.get(package) or types.ModuleType(package))
            found[name] = _stand_in(name, *bases)
            setattr(sys.modules[module], name.rpartition(".")[2], found[name])
    callback, attributes, group, later, config, listed, metadata, node = found.values()
    leaf = node()
    leaf.__dict__.update(_val=4.5e-6, _metadata=metadata(), _parent=None)
    leaf._metadata.__dict__.update(
        ref_type=Any, object_type=dict, key_type=int, element_type=str, resolver_cache=collections.defaultdict(dict), optional=True
    )
    tree = config()
    tree.__dict__.update(_content={"lr": leaf, "mult": listed([1, 2, 4])}, _metadata=leaf._metadata)
    state = _state()
    optimizer = torch.optim.AdamW([state["parameter"]])
    state["parameter"].sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 440_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {callback: {"monitor": "val/loss", "best_model_score": np.float64(0.25), "current_score": torch.tensor(0.25)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 3, "milestones": collections.Counter([3, 3, 7])}],
        "hparams_name": "config",
        "hyper_parameters": attributes(config=tree, rate=1e-4),
        "hparams_type": config,
        "later": later(a=1),
        "group": group({1, 2}),
        "random": {"numpy": np.random.default_rng(0).bytes(4), "words": np.arange(4, dtype=np.uint32), "device": torch.device("cuda:0")},
        "precision": torch.float16,
    }


# In protocol 5 numpy's arrays are made from buffers, which is refused; Lightning saves in torch's own protocol, 2.
@pytest.mark.parametrize("options", [options for options in _FORMATS if options.get("pickle_protocol") != 5], ids=str)
def test_lightning_checkpoints(
    tmp_path: Path, checkpoint: dict[str, Any], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    torch.save(checkpoint, tmp_path / "last.ckpt", **options)
    packages = ("pytorch_lightning", "lightning", "omegaconf")
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    _same(load_state_dict(tmp_path / "last.ckpt"), checkpoint["state_dict"])
    _same(open_weights(tmp_path / "last.ckpt", key="state_dict"), checkpoint["state_dict"])
    assert not [name for name in sys.modules if name.split(".")[0] in packages]


@pytest.mark.parametrize("options", _FORMATS, ids=str)
def test_a_truncated_file_is_one_error(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "x.bin"
    torch.save(_state(), path, **options)
    content = path.read_bytes()
    for length in range(16, len(content), len(content) // 40):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="cannot be read as a torch weight file") as caught:
            open_weights(path)
        assert "\n" not in str(caught.value)


def test_transformers_and_diffusers_shards_of_torch_files(tmp_path: Path) -> None:
    state = _state()
    shards = {
        "pytorch_model-00001-of-00002.bin": dict(list(state.items())[:5]),
        "pytorch_model-00002-of-00002.bin": dict(list(state.items())[5:]),
    }
    for name, part in shards.items():
        torch.save(part, tmp_path / name)
    places = {tensor: f'"{tensor}": "{name}"' for name, part in shards.items() for tensor in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {' + ", ".join(places.values()) + "}}")
    _same(open_weights(tmp_path), state)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 .*pytorch_model-00002-of-00002\.bin$"):
        open_weights(tmp_path)


def test_torch_reads_what_is_streamed_from_its_own_file(tmp_path: Path) -> None:
    state = _state()
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    weights = open_weights(tmp_path / "x.ckpt")
    write_safetensors(tmp_path / "x.safetensors", weights.items(), weights.specs(), metadata={"format": "pt"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 50], ids=["small", "as if larger than 4 GiB"])
@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_the_checkpoints_that_are_written(limit: int, mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {name: tensor.detach() for name, tensor in _state().items()}
    torch.save(state, tmp_path / "theirs.pt")
    weights = open_weights(tmp_path / "theirs.pt")
    with monkeypatch.context() as patched:
        patched.setattr(zipfile, "ZIP64_LIMIT", limit)
        write_checkpoint(tmp_path / "ours.ckpt", weights.items(), weights.specs())
    read = torch.load(tmp_path / "ours.ckpt", weights_only=True, mmap=mapped)["state_dict"]
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) and read[name].is_contiguous()
    modules = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4, bias=False)})
    assert modules.load_state_dict({"a.weight": read["parameter"]}).missing_keys == []
    assert torch.equal(modules["a"].weight, state["parameter"])


def test_hugging_face_loads_the_shards_that_are_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=7
    )
    torch.manual_seed(1)
    model = transformers.CLIPTextModel(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="6KB")
    weights = open_weights(tmp_path / "theirs")
    _same({name: weights[name] for name in model.state_dict()}, model.state_dict())
    (tmp_path / "ours").mkdir()
    config.save_pretrained(tmp_path / "ours")
    write_safetensors(
        tmp_path / "ours" / "model.safetensors", weights.items(), weights.specs(), metadata={"format": "pt"}, max_shard_bytes=6000
    )
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    again = transformers.CLIPTextModel.from_pretrained(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
