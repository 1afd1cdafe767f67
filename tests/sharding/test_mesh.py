from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from ldm_jax.config import UserError
from ldm_jax.sharding.mesh import batch_sharding, check_batch, make_mesh, replicated, to_global


@pytest.mark.parametrize(("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (2, -1, (2, 4)), (-1, 4, (2, 4)), (1, 8, (1, 8))])
def test_make_mesh_fills_the_devices(data, fsdp, shape):
    mesh = make_mesh(data, fsdp)
    assert mesh.axis_names == ("slices", "data", "fsdp")
    assert mesh.devices.shape == (1, *shape)
    assert set(mesh.axis_types) == {AxisType.Auto}


@dataclass(frozen=True)
class Tpu:
    """What of a TPU decides where it comes to lie in a mesh."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize(
    ("kind", "torus"),
    [("TPU v4", (4, 4, 4)), ("TPU v5", (4, 4, 4)), ("TPU v5", (4, 4, 6)), ("TPU v5 lite", (16, 16, 1)), ("TPU v6 lite", (8, 8, 1))],
)
def test_a_mesh_of_any_size_lies_on_a_torus(kind: str, torus: tuple[int, int, int]):
    places = [place[::-1] for place in np.ndindex(torus[::-1])]
    devices: list[Any] = [Tpu(i, place, kind) for i, place in enumerate(places)]
    for fsdp in (n for n in range(1, len(devices) + 1) if len(devices) % n == 0):
        mesh = make_mesh(-1, fsdp, devices)
        assert mesh.devices.shape == (1, len(devices) // fsdp, fsdp) and set(mesh.devices.flat) == set(devices)


def test_make_mesh_on_some_of_the_devices():
    assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, -1), (-1, 3), (2, 2), (0, 8), (-1, 0), (-1, 16), (-2, -4)])
def test_make_mesh_that_does_not_fit(data, fsdp):
    with pytest.raises(UserError, match=rf"data={data}, fsdp={fsdp} does not fit 8 devices"):
        make_mesh(data, fsdp)


@given(batch=st.integers(-4, 200), accumulation=st.integers(1, 5))
def test_check_batch_names_the_nearest_that_works(batch, accumulation):
    mesh = make_mesh(2, 4)
    unit = 8 * accumulation
    if batch > 0 and batch % unit == 0:
        return check_batch(batch, mesh, accumulation)
    with pytest.raises(UserError) as caught:
        check_batch(batch, mesh, accumulation)
    advice = [int(word) for word in str(caught.value).split("use ")[1].split(" or ")]
    for works in advice:
        check_batch(works, mesh, accumulation)
        assert abs(works - batch) < unit or works == unit


def test_check_batch_rejects_no_accumulation():
    with pytest.raises(UserError, match="accumulation is 0"):
        check_batch(8, make_mesh(), 0)


def test_to_global_splits_arrays_and_drops_text():
    mesh = make_mesh(2, 4)
    image = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    with jax.transfer_guard("disallow"):
        out = to_global({"image": image, "text": ["a"] * 16, "names": np.array(["a"] * 16), "label": np.arange(16)}, mesh)
    assert set(out) == {"image", "label"}
    assert out["image"].sharding == batch_sharding(mesh)
    assert out["image"].addressable_shards[0].data.shape == (2, 3)
    assert out["image"].dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(out["image"]), image)


def test_replicated():
    x = jax.device_put(np.ones((3, 5)), replicated(make_mesh(2, 4)))
    assert x.sharding.spec == PartitionSpec()
    assert all(shard.data.shape == (3, 5) for shard in x.addressable_shards)
