"""python -m ldm_jax.compile on the devices of this machine; for slices of TPUs see test_compile_tpu.py."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ldm_jax import compile as front_door
from ldm_jax import config as configs
from ldm_jax.config import UserError
from ldm_jax.sharding.chips import Chip
from ldm_jax.sharding.mesh import make_mesh
from ldm_jax.sharding.topology import Topology, open_topology
from ldm_jax.training import plan, programs

pytestmark = pytest.mark.usefixtures("quick_compilation")

OVERRIDES = ["--config.train.dtype=float32"]


def on(memory: int | None = None) -> Topology:
    """The devices here, as if they were of a chip with so much memory."""
    return Topology(jax.devices(), None if memory is None else Chip("some", "", 1e12, memory, 1e10, 1e9, 1e8), memory)


def config(spec: str = "configs/class_cond.py:smoke", *overrides: str) -> Any:
    return configs.from_command(spec, [*OVERRIDES, *overrides], weights=False)


@pytest.mark.slow
def test_a_plan_says_what_the_state_is() -> None:
    found = front_door.planned(config(), on(), "smoke", ["step", "preview", "sampler", "encoder"], 0)
    step, preview, sampler, encoder = found["programs"]
    assert [each["name"] for each in found["programs"]] == ["denoiser step", "preview", "sampler", "encoder"]
    stage = programs.plan_stage(config())
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(stage.abstract_params))
    assert step["memory"]["parameters"] == 4 * parameters
    assert step["memory"]["optimiser"] == pytest.approx(8 * parameters, rel=1e-3)  # Adam's two moments, and counts
    assert step["memory"]["EMA"] == 4 * parameters * len(config().ema.decays)
    assert step["chips"] == 8 and sampler["chips"] == encoder["chips"] == 1
    assert sampler["images"] == 2 and encoder["images"] == 16  # a device's share of 16, and of 128
    assert all(preview["memory"][name] == step["memory"][name] for name in ("parameters", "optimiser", "EMA", "batch"))
    assert preview["memory"]["first stage"] > 0 and preview["total"] > sum(preview["memory"][name] for name in ("first stage", "EMA"))
    assert step["flops"] == step["computed"] and found["fits"] is None and step["fits"] is None
    assert step["traffic"]["all-reduce"]["ici_bytes"] >= 2 * 4 * parameters * 7 / 8
    assert json.loads(json.dumps(found)) == found | {"notes": []}


def test_a_split_state_takes_its_share(capsys: pytest.CaptureFixture) -> None:
    whole, split = (programs.train_step(programs.plan_stage(config()), make_mesh(8 // fsdp, fsdp)).given["parameters"] for fsdp in (1, 8))
    leaves = [leaf for leaf in jax.tree.leaves(split) if not leaf.sharding.is_fully_replicated]
    saved = sum(math.prod(leaf.shape) for leaf in leaves) * 4 * 7 // 8
    assert programs.bytes_of(whole) - programs.bytes_of(split) == saved > 0


@pytest.mark.slow
def test_what_does_not_fit_is_said_and_mended(capsys: pytest.CaptureFixture) -> None:
    """On devices that lack a byte for the update with less kept, which is among what is tried: in micro-batches it takes less."""
    shallow = ("--config.denoiser.channel_mult=(1,)", "--config.denoiser.attention_levels=()")
    cfg = config("configs/class_cond.py:smoke", "--config.train.batch_size=256", *shallow)
    with cfg.unlocked():
        cfg.mesh.data = 8  # changes of the mesh make room for themselves
    kept, mesh, _ = front_door.fitted(cfg, jax.devices(), **{"train.remat": "conv+dense+attention"})
    memory = plan.compile_plan(programs.train_step(programs.plan_stage(kept), mesh), on().chip, None).total - 1
    found = front_door.planned(cfg, on(memory), "smoke", ["step"], 8)
    said, step = capsys.readouterr().out, found["programs"][0]
    assert found["fits"] is False and "DOES NOT FIT" in said
    assert step["total"] > memory and step["fits"] is False and step["exceeded"] == step["total"] - memory
    advice = found["advice"]["step"]
    assert advice is not None and advice["program"]["total"] <= memory and " ... fits" in said
    assert "train.remat=conv+dense+attention ... 0.00 GiB too much" in said
    assert set(advice["change"]) <= {"mesh.data", "mesh.fsdp", "train.remat", "train.accumulation", "train.batch_size"}


@pytest.mark.slow
def test_a_first_stage_of_its_own_is_planned_too(capsys: pytest.CaptureFixture) -> None:
    spec, own = "configs/class_cond.py:smoke", "--config.first_stage.train.batch_size=12"
    found = front_door.planned(config(spec, own), on(2**34), "smoke", ["first_stage"], 0)
    assert [each["name"] for each in found["programs"]] == ["first stage step"] and found["programs"][0]["images"] == 16
    assert "  first_stage.train.batch_size=12 does not split over 8 chips" in capsys.readouterr().out
    assert found["programs"][0]["traffic"]["all-reduce"]["count"] > 0


def test_what_may_be_changed_for_memory() -> None:
    """Whatever the number of examples on a chip, and in fields that training accepts."""
    for each, parts in ((3, [3]), (11, [11]), (12, [2, 3, 4, 6, 12])):
        changes = plan.smallest_changes(1, "none", 1, 64 * each, 64, 64)
        assert [change["train.accumulation"] for change in changes if set(change) == {"train.accumulation"}] == parts
        batches = [change["train.batch_size"] for change in changes if "train.batch_size" in change]
        assert batches == sorted(batches, reverse=True) and batches[-1] == 64 and all(batch % 64 == 0 for batch in batches)
        assert batches[0] < 64 * each
    assert plan.smallest_changes(64, "full", 1, 64, 64, 64) == []


def test_nothing_to_compile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="this run has none"):
        front_door.planned(config("configs/autoencoder.py:smoke"), on(), "smoke", ["sampler"], 0)
    command = ["compile", "--config", "configs/autoencoder.py:smoke", "--topology", "cpu"]
    for flags, words in (
        (["--programs", "step", "--sweep", "mesh"], "no effect"),
        (["--programs", "stairs"], "'stairs' is not one of"),
        (["--json", str(tmp_path)], "cannot be written"),
    ):
        monkeypatch.setattr("sys.argv", [*command, *flags])
        with pytest.raises(UserError, match=words):
            front_door.main()
    front_door.check_writable(tmp_path / "new" / "plan.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "new"] and not any((tmp_path / "new").iterdir())


def test_a_state_too_large_alone_is_not_compiled() -> None:
    found = plan.compile_plan(programs.train_step(programs.plan_stage(config()), make_mesh()), None, 2**10)
    assert found.fits is False and found.compile_seconds == 0 and "temporaries" not in found.memory


def test_a_batch_that_does_not_split_is_planned_with_one_that_does(capsys: pytest.CaptureFixture) -> None:
    changed, mesh, notes = front_door.fitted(config("configs/class_cond.py:smoke", "--config.train.batch_size=12"), jax.devices())
    assert changed.train.batch_size == 16 and mesh.size == 8
    assert len(notes) == 1 and "train.batch_size=12 does not split over 8 chips" in notes[0] and "8 or 16" in notes[0]


def test_recomputation_costs_operations_and_counts_not_for_mfu() -> None:
    kept, anew = (
        programs.train_step(programs.plan_stage(config("configs/class_cond.py:smoke", f"--config.train.remat={remat}")), make_mesh())
        for remat in ("none", "blocks")
    )
    (flops, computed), (again, more) = kept.count(), anew.count()
    assert again == flops == computed < more < 1.5 * flops


def test_roofs() -> None:
    roofs = plan.Roofs(compute=2.0, memory=3.0, ici=1.0, dcn=0.5)
    assert roofs.step == 3.0 and roofs.bound == "memory"
    made = plan.Plan("x", 2, 8, True, {}, 1, 2, 0, flops=3.0, computed=4.0, compile_seconds=0.0, roofs=roofs)
    assert made.mfu_bound == pytest.approx(2 / 3 * 3 / 4)
    assert made.to_json()["images_per_second"] == pytest.approx(8 / 3)


def test_xla_words_for_too_little_memory() -> None:
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.98G of 15.75G hbm. Exceeded hbm capacity by 5.23G."
    assert plan._exhausted(said, 2**30) == (int(20.98 * 2**30), int(15.75 * 2**30))
    said = "Ran out of memory on HBM, the total memory required for HLO temporaries (86.25G) exceeds available HBM (15.75G)."
    assert plan._exhausted(said, 2**30) == (int(87.25 * 2**30), int(15.75 * 2**30))
    assert plan._exhausted("INTERNAL: something else", 0) is None


@pytest.mark.slow
def test_sweep_ranks_meshes(capsys: pytest.CaptureFixture) -> None:
    found = front_door.swept(config(), on(2**34), "smoke")
    said = capsys.readouterr().out
    assert found["fits"] and [each["fsdp"] for each in found["sweep"]][:2] == [1, 2]
    assert f"best first: fsdp={min(found['sweep'], key=lambda e: (e['roofs']['step'], e['fsdp']))['fsdp']}" in said


@pytest.mark.parametrize("name", ["v5e", "v5e:0x4", "laptop", "v5e:4x4*0", "v5e:4x4x4x4"])
def test_unknown_topologies(name: str) -> None:
    with pytest.raises(UserError, match=r"--topology"):
        open_topology(name)


def test_local_devices() -> None:
    here = open_topology("cpu")
    assert len(here.devices) == 8 and here.chip is None and here.memory is None
    with pytest.raises(UserError, match="--topology gpu"):
        open_topology("gpu")


@pytest.mark.parametrize("spec", ["configs/txt2img.py:sd1", "configs/inpaint.py:smoke", "configs/txt2img.py:smoke"])
def test_batches_without_data(spec: str) -> None:
    """Captions of a frozen encoder come as embeddings, holes with their pictures."""
    stage = programs.plan_stage(config(spec))
    batch = programs._batch(stage)
    rows = config(spec).train.batch_size
    assert all(value.shape[0] == rows for value in batch.values())
    if spec.endswith("sd1"):
        assert batch["embeddings"].shape == (rows, 77, 768) and batch["moments"].shape == (rows, 64, 64, 8)
    elif "inpaint" in spec:
        assert batch["image"].dtype == np.uint8 and batch["hole"].dtype == bool and "mask" not in batch
    else:
        assert batch["tokens"].dtype == np.int32
