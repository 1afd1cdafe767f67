import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax.sharding.hlo import Program, shape_bytes
from ldm_jax.sharding.mesh import make_mesh

# As XLA:TPU writes programs: groups in four notations, a fused reduce-scatter, a loop, an asynchronous start, vector memory S(1).
TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8
%all-reduce-scatter.1 (in: bf16[64,128]) -> bf16[16,128] {
  %in = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[64,128]{1,0} all-reduce(%in), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %cut = bf16[16,128]{1,0} dynamic-slice(%all-reduce.7, %offset), dynamic_slice_sizes={16,128}
}

%body.1 (carry: (f32[8,4], s32[])) -> (f32[8,4], s32[]) {
  %carry = (f32[8,4]{1,0}, s32[]) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%carry), index=0
  %permute = f32[8,4]{1,0} collective-permute(%x), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3}}
  ROOT %out = (f32[8,4]{1,0}, s32[]) tuple(%permute, %x)
}

%below.1 (state: (f32[8,4], s32[])) -> pred[] {
  %state = (f32[8,4]{1,0}, s32[]) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=1
  %limit = s32[]{:T(128)} constant(7)
  ROOT %go = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%body.2 (carried: (f32[8,4], s32[])) -> (f32[8,4], s32[]) {
  %carried = (f32[8,4]{1,0}, s32[]) parameter(0)
  %y = f32[8,4]{1,0} get-tuple-element(%carried), index=0
  ROOT %sums = (f32[8,4]{1,0}, s32[]) all-reduce(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (p: f32[8,4], q: bf16[64,128]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %scattered = bf16[16,128]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  %gathered = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%scattered), replica_groups=[2,4]<=[2,4]T(0,1), dimensions={0}
  %start = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%p), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
  %done = f32[32,4]{1,0} all-gather-done(%start)
  %sum = f32[8,4]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add
  %loop = (f32[8,4]{1,0}, s32[]) while(%carried), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %other = (f32[8,4]{1,0}, s32[]) while(%loop), condition=%below.1, body=%body.2, metadata={op_name="jit(f)/while"}
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_collectives_of_every_notation() -> None:
    found = {(one.kind, one.shape): one for one in Program(TEXT).collectives()}
    scatter = found["reduce-scatter", "bf16[64,128]"]
    assert scatter.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and scatter.bytes == 64 * 128 * 2
    assert scatter.traffic == 64 * 128 * 2 * 3 / 4 and not scatter.crosses(4) and scatter.crosses(2)
    assert found["all-gather", "bf16[64,128]"].groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    start = found["all-gather", "(f32[8,4], f32[32,4])"]
    assert start.bytes == 32 * 4 * 4 and start.groups.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]] and start.crosses(4)
    total = found["all-reduce", "f32[8,4]"]
    assert total.groups.tolist() == [[*range(8)]] and total.traffic == 2 * 128 * 7 / 8
    permute = found["collective-permute", "f32[8,4]"]
    assert permute.times == 5 and permute.traffic == 5 * 128 and permute.groups.shape == (3, 2)
    assert found["all-reduce", "(f32[8,4], s32[])"].times == 7  # by its condition alone
    assert len(found) == 6


def test_memory_traffic_counts_loops_and_leaves_out_vector_memory() -> None:
    tile, row = 64 * 128 * 2, 8 * 4 * 4
    once = (tile + tile // 4) + tile // 4 + (row + 4 * row) + 2 * row
    assert Program(TEXT).memory_bytes() == once + 5 * 2 * row + 7 * (2 * row + 4)


# One gather beside a product and another, as libtpu 0.0.50 writes it, and an operand that is brought to the vector memory in two pieces.
CHAIN = """HloModule jit_g, is_scheduled=true, num_partitions=4
%first (a: f32[4,8]) -> (f32[4,8], f32[16,8], u32[]) {
  %a = f32[4,8]{1,0} parameter(0)
  %gather.1 = f32[16,8]{1,0} all-gather(%a), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %call.1 = (f32[4,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (a: f32[4,8], b: f32[16,8], c: u32[], d: f32[32,32]) -> (f32[32,32], f32[4,8], f32[16,8], f32[16,8], u32[]) {
  %a.2 = f32[4,8]{1,0} parameter(0)
  %b.2 = f32[16,8]{1,0} parameter(1)
  %c.2 = u32[]{:S(2)} parameter(2)
  %d.2 = f32[32,32]{1,0} parameter(3)
  %product = f32[32,32]{1,0} convolution(%d.2, %d.2), dim_labels=bf_io->bf
  %gather.2 = f32[16,8]{1,0} all-gather(%a.2), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %all = (f32[32,32]{1,0}, f32[4,8]{1,0}, f32[16,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}) tuple(%product, %a.2, %b.2, %gather.2, %c.2)
}

%last (a: f32[4,8], b: f32[16,8], c: u32[]) -> f32[16,8] {
  %a.3 = f32[4,8]{1,0} parameter(0)
  %b.3 = f32[16,8]{1,0} parameter(1)
  %c.3 = u32[]{:S(2)} parameter(2)
  %gather.3 = f32[16,8]{1,0} all-gather(%a.3), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %call.3 = f32[16,8]{1,0} custom-call(%a.3, %b.3, %gather.3, %c.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[4,8], q: f32[32,32]) -> f32[16,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[32,32]{1,0} parameter(1)
  %begun = (f32[4,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%first
  %a.4 = f32[4,8]{1,0} get-tuple-element(%begun), index=0
  %b.4 = f32[16,8]{1,0} get-tuple-element(%begun), index=1
  %c.4 = u32[]{:S(2)} get-tuple-element(%begun), index=2
  %both = (f32[32,32]{1,0}, f32[4,8]{1,0}, f32[16,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}) fusion(%a.4, %b.4, %c.4, %q), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {}), {4}: (2, {})}, calls=%beside
  %ended = f32[16,8]{1,0} fusion(%a.4, %b.4, %c.4), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%last
  %piece.1 = ((f32[32,32]{1,0}), f32[16,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%q), slice={[0:16], [0:32]}
  %piece.2 = ((f32[32,32]{1,0}), f32[16,32]{1,0}, s32[]{:S(2)}) slice-start(%q), slice={[16:32], [0:32]}
  ROOT %there = f32[16,32]{1,0:S(1)} slice-done(%piece.1)
}
"""  # noqa: E501


def test_a_collective_beside_other_work_is_one() -> None:
    (gather,) = Program(CHAIN).collectives()
    assert (gather.kind, gather.bytes, gather.times, gather.groups.tolist()) == ("all-gather", 16 * 8 * 4, 1, [[0, 1, 2, 3]])


def test_memory_traffic_beside_a_collective_is_of_the_work_and_of_a_slice_is_the_slice() -> None:
    gathered, product, shard = 16 * 8 * 4, 2 * 32 * 32 * 4, 4 * 8 * 4
    pieces = 3 * 16 * 32 * 4  # two are read, one of them is written to main memory
    assert Program(CHAIN).memory_bytes() == gathered + product + shard + pieces


def test_what_is_sent_between_slices() -> None:
    """As XLA:TPU writes it: a program is one slice's, and its host passes sums on."""
    text = """HloModule jit_f, num_partitions=4
ENTRY %main (p: f32[64,8]) -> f32[64,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %key = token[] after-all()
  %send = (f32[64,8]{1,0}, u32[], token[]) send(%p, %key), is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
}
""".replace("\\\n", "")
    (one,) = Program(text).collectives()
    assert (one.kind, one.shape, one.groups.tolist()) == ("all-reduce", "f32[64,8]", [[0, 4]])
    assert one.crosses(4) and one.traffic == 64 * 8 * 4


@pytest.mark.parametrize(
    ("shape", "size"),
    [("bf16[2,3]{1,0:T(8,128)(2,1)}", 12), ("pred[7]", 7), ("f32[]", 4), ("(s32[2], f8e4m3fn[3], token[])", 11), ("c64[2]", 16)],
)
def test_shape_bytes(shape: str, size: int) -> None:
    assert shape_bytes(shape) == size


def test_a_program_of_eight_devices() -> None:
    """A sum over the batch, within a loop of three turns, and parameters gathered from one axis."""
    mesh = make_mesh(2, 4)
    x, w = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((128, 128), jnp.float32)

    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        def turn(w: jax.Array, _: None) -> tuple[jax.Array, None]:
            return w + jax.lax.with_sharding_constraint(x.T @ x, P()), None

        return jax.lax.scan(turn, jax.lax.with_sharding_constraint(w, P()), None, length=3)[0]

    with jax.set_mesh(mesh):
        shardings = [jax.NamedSharding(mesh, P(None, "fsdp")), jax.NamedSharding(mesh, P(("slices", "data", "fsdp")))]
        text = jax.jit(f, in_shardings=shardings).lower(w, x).compile().as_text()
    found = Program(text).collectives()
    gathers = [one for one in found if one.kind == "all-gather"]
    assert [(one.groups.shape, one.bytes, one.times) for one in gathers] == [((2, 4), 128 * 128 * 4, 1)]
    sums = [one for one in found if one.kind == "all-reduce"]
    assert {one.groups.shape for one in sums} == {(1, 8)} and sum(one.times for one in sums) in (1, 3)  # XLA may take it out of the loop
    assert np.array_equal(np.sort(gathers[0].groups.ravel()), np.arange(8))
