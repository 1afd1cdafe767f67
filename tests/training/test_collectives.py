"""What crosses the network in an update: parameters once, gradients once, a few numbers, and no activation."""

import math
import re
from collections import Counter
from functools import cache
from typing import Any
from unittest import mock

import jax
import pytest

from ldm_jax.sharding import rules
from ldm_jax.sharding.hlo import Collective, Program
from ldm_jax.sharding.mesh import make_mesh
from ldm_jax.training import programs
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")


@cache
def update(kind: str, data: int, fsdp: int) -> tuple[list[Collective], Program, float, Any]:
    """Collectives of an update with the discriminator, or of a preview, its program, XLA's count of bytes, and the abstract parameters."""
    cfg = tiny.config()
    with mock.patch.object(rules, "MIN_SPLIT_ELEMENTS", 128):
        stage = tiny.autoencoder_stage(cfg) if kind == "autoencoder" else tiny.diffusion_stage(cfg)
        planned = (programs.preview if kind == "preview" else programs.train_step)(stage, make_mesh(data, fsdp))
        compiled = planned.lower().compile()
    program = Program(compiled.as_text())
    return program.collectives(), program, compiled.cost_analysis()["bytes accessed"], planned.given["parameters"]


def split_shapes(params: Any) -> Counter:
    return Counter(tuple(leaf.shape) for leaf in jax.tree.leaves(params) if not leaf.sharding.is_fully_replicated)


def shape_of(one: Collective) -> tuple[int, ...]:
    return tuple(int(n) for n in one.shape[one.shape.index("[") + 1 : -1].split(","))


def assert_sums_of_gradients(found: list[Collective], params: Any) -> None:
    """What is summed is as large as a parameter, as its part on a device, or as the four kernels of 2x2 that one of 3x3 becomes where it
    follows an enlargement; or a few numbers. It is no activation."""
    leaves = jax.tree.leaves(params)
    known = {math.prod(shape) for leaf in leaves for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape))}
    known |= {4 * math.prod(leaf.shape[2:]) for leaf in leaves if leaf.shape[:2] == (3, 3)}
    for one in found:
        if one.kind in ("all-reduce", "reduce-scatter"):
            for dims in re.findall(r"\[([\d,]*)\]", one.shape):
                size = math.prod(int(n) for n in dims.split(",") if n)
                assert size in known or size <= 32, one


@pytest.mark.slow
def test_data_parallel_updates_only_sum() -> None:
    found, _, _, params = update("diffusion", 8, 1)
    assert_sums_of_gradients(found, params)
    assert {one.kind for one in found} == {"all-reduce"} and len(found) <= 3
    assert {one.groups.shape for one in found} == {(1, 8)}


def test_split_parameters_are_gathered_once_and_nothing_else_is() -> None:
    found, _, _, params = update("diffusion", 2, 4)
    gathers = [one for one in found if one.kind == "all-gather"]
    assert {one.groups.shape for one in gathers} == {(2, 4)}  # along fsdp alone
    assert Counter(map(shape_of, gathers)) == split_shapes(params) and len(gathers) > 50
    assert {one.kind for one in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert_sums_of_gradients(found, params)


def test_previews_gather_the_averages_once_before_they_sample() -> None:
    found, _, _, params = update("preview", 2, 4)
    gathers, others = [], []
    for one in found:
        (gathers if one.kind == "all-gather" and one.groups.shape == (2, 4) else others).append(one)
    assert Counter(map(shape_of, gathers)) == split_shapes(params) and {one.times for one in gathers} == {1}
    # Besides, guidance lays the conditional and the unconditional half of its batch over the devices.
    latents = 16 * 4 * 4 * 4 * 4
    assert all(one.bytes <= latents for one in others)


def test_the_autoencoder_gathers_parameters_alone() -> None:
    found, _, _, params = update("autoencoder", 2, 4)
    gathers = Counter(shape_of(one) for one in found if one.kind == "all-gather")
    assert set(gathers) == set(split_shapes(params))
    # The discriminator is applied twice, to pictures and to reconstructions.
    assert all(number <= 2 * split_shapes(params)[shape] for shape, number in gathers.items())
    assert_sums_of_gradients(found, params)
    assert {one.kind for one in found} <= {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.parametrize(
    ("kind", "data", "fsdp"), [pytest.param("diffusion", 8, 1, marks=pytest.mark.slow), ("diffusion", 2, 4), ("autoencoder", 2, 4)]
)
def test_bytes_of_memory_agree_with_xla_where_nothing_loops(kind: str, data: int, fsdp: int) -> None:
    _, program, counted, _ = update(kind, data, fsdp)
    assert program.memory_bytes() == pytest.approx(counted, rel=0.1)
