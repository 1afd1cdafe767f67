"""Floating-point operations of a function, counted from its jaxpr.

XLA's own cost analysis counts the body of a scan once, so that it is wrong under gradient accumulation; here it counts `length` times.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# Matrix products of the forward and of the backward pass.
_FUSED_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}


def count_flops(fn: Callable[..., Any], *abstract_args: Any) -> int:
    """Operations of `fn(*abstract_args)` (arrays or `jax.ShapeDtypeStruct`s), for the global shapes, two for each multiply-add.

    Matrix products and convolutions are counted, as is the custom in the field; element-wise work is not. Taps on the padding of a
    convolution count (as in the usual 2 H W k^2 C_in C_out), the zeros of a dilated input do not, so that the backward of a strided
    convolution costs what its forward does. Of a `cond` the dearest branch counts, a `while` once, recomputation as often as it runs.
    Kernels opaque to jax (custom calls) count nothing.
    """
    return _jaxpr_flops(jax.make_jaxpr(fn)(*abstract_args).jaxpr)


def _jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    return sum(_equation_flops(eqn) for eqn in jaxpr.eqns)


def _equation_flops(eqn: Any) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot_flops(eqn)
    if name == "conv_general_dilated":
        return _conv_flops(eqn)
    if name in _FUSED_ATTENTION:
        return _attention_flops(eqn)
    inner = [_jaxpr_flops(jaxpr) for value in eqn.params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (eqn.params["length"] if name == "scan" else 1)


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)


def _dot_flops(eqn: Any) -> int:
    lhs, _ = (v.aval.shape for v in eqn.invars)
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _attention_flops(eqn: Any) -> int:
    """cuDNN's kernel on q [B,T,N,D] and k [B,S,N,D]: the products of the unfused form, without what the backward pass recomputes."""
    q, k = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    return 2 * _FUSED_ATTENTION[eqn.primitive.name] * math.prod(q) * k[1]


def _conv_flops(eqn: Any) -> int:
    """Each output sums over the input features of its group and the taps of the kernel that meet an input, not a dilation zero."""
    p, kernel, out = eqn.params, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    numbers = p["dimension_numbers"]
    taps = math.prod(
        _taps(out[o], kernel[k], stride, low, dilation, kernel_dilation)
        for o, k, stride, (low, _), dilation, kernel_dilation in zip(
            numbers.out_spec[2:],
            numbers.rhs_spec[2:],
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            strict=True,
        )
    )
    outputs = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    return 2 * outputs * kernel[numbers.rhs_spec[1]] * taps


def _taps(out: int, kernel: int, stride: int, low: int, dilation: int, kernel_dilation: int) -> int:
    """Pairs (output position, kernel position) of one dimension that fall on the lattice of real inputs."""
    if dilation == 1:
        return out * kernel
    return sum((o * stride + k * kernel_dilation - low) % dilation == 0 for o in range(out) for k in range(kernel))
