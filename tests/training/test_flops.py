import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from ldm_jax.training.flops import _taps, count_flops


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(x, w, stride=1, padding="SAME", **kwargs):
    return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs)


DENSE = 2 * 7 * 5 * 3


def test_dense_and_batched_products():
    assert count_flops(jnp.dot, f32(7, 5), f32(5, 3)) == DENSE
    assert count_flops(lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b), f32(2, 3, 4, 5), f32(2, 3, 6, 5)) == 2 * 2 * 3 * 4 * 6 * 5
    assert count_flops(lambda a: jnp.sin(a) + 1, f32(7, 5)) == 0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolution_and_its_gradients(stride, groups):
    x, w = f32(2, 16, 16, 8), f32(3, 3, 8 // groups, 12)
    forward = 2 * 2 * (16 // stride) ** 2 * 9 * (8 // groups) * 12

    def loss(x, w):
        return jnp.sum(conv(x, w, stride, feature_group_count=groups) ** 2)

    assert count_flops(loss, x, w) == forward
    assert count_flops(jax.grad(loss, argnums=(0, 1)), x, w) == pytest.approx(3 * forward, rel=0.05)


@settings(max_examples=60)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    kernel_dilation=st.integers(1, 2),
    low=st.integers(0, 3),
)
def test_taps_equal_the_nonzero_products_of_a_real_convolution(n, k, stride, dilation, kernel_dilation, low):
    length, reach = (n - 1) * dilation + 1, (k - 1) * kernel_dilation + 1
    padded = max(length + low, reach)
    out = (padded - reach) // stride + 1
    # The lattice goes on into the padding: a one wherever a real input, or one beyond the border, would lie.
    lattice = np.array([(i - low) % dilation == 0 for i in range(padded)])
    products = sum(lattice[o * stride + t * kernel_dilation] for o, t in itertools.product(range(out), range(k)))
    assert _taps(out, k, stride, low, dilation, kernel_dilation) == products


def test_control_flow():
    w = f32(5, 5)

    def scan(x, w):
        return lax.scan(lambda h, _: (h @ w, None), x, length=5)[0]

    one = 2 * 7 * 5 * 5
    assert count_flops(scan, f32(7, 5), w) == 5 * one
    assert count_flops(jax.jit(scan), f32(7, 5), w) == 5 * one
    assert count_flops(lambda x, w: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), f32(7, 5), w) == 2 * one
    assert count_flops(lambda x, w: lax.while_loop(lambda h: h[0, 0] > 0, lambda h: h @ w, x), f32(7, 5), w) == one
    assert count_flops(lambda x, w: lax.fori_loop(0, 4, lambda i, h: h @ w, x), f32(7, 5), w) == 4 * one


def test_remat_and_custom_rules():
    one = 2 * 7 * 5 * 5

    def product(x, w):
        return jnp.tanh(x @ w)

    plain = jax.grad(lambda x, w: product(product(x, w), w).sum(), argnums=(0, 1))
    remat = jax.grad(lambda x, w: jax.checkpoint(lambda x, w: product(product(x, w), w))(x, w).sum(), argnums=(0, 1))
    assert count_flops(plain, f32(7, 5), f32(5, 5)) == 6 * one
    assert count_flops(remat, f32(7, 5), f32(5, 5)) > 6 * one

    custom = jax.custom_vjp(product)
    custom.defvjp(lambda x, w: (product(x, w), (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))
    assert count_flops(custom, f32(7, 5), f32(5, 5)) == one
    assert count_flops(jax.grad(lambda x, w: custom(x, w).sum(), argnums=(0, 1)), f32(7, 5), f32(5, 5)) == 3 * one


def test_fused_attention_counts_as_its_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's kernel is opaque, and traces on a machine without it once its checks of the hardware are out of the way."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: True, raising=False)
    batch, queries, keys, heads, width = 2, 64, 128, 3, 32
    q = jax.ShapeDtypeStruct((batch, queries, heads, width), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((batch, keys, heads, width), jnp.bfloat16)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").astype(jnp.float32).sum()

    forward = 4 * batch * heads * queries * keys * width
    assert count_flops(attend, q, k, k) == forward
    assert count_flops(jax.grad(attend, argnums=(0, 1, 2)), q, k, k) == 3 * forward
