"""Autoencoders on images far above the size that memory holds at once, window by window (`tiling`), in two ways.

*Independent*: each window is an image of its own. Its norms see no other, so that colour and contrast drift from window to window.

*Whole*: what runs at the latents' size, attention included, runs on the whole image. What runs above it runs on windows, with the norms'
statistics taken over the whole image: a first pass over all windows, whose norms work with their own, measures them. What a norm reads
hangs on the norms before it, so that each further pass, which works with what the last one measured, comes nearer to the undivided result;
as many passes as there are norms give it exactly where windows overlap by their receptive field. Attention above the latents' size, which
few networks have, sees its window alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext

from ldm_jax.nn.autoencoder import Autoencoder
from ldm_jax.nn.tiling import Array, Tiling, Windows, blended, windows

Function = Callable[[Array], Array]
Statistics = dict[str, tuple[Array, Array]]  # of each norm, by its path: mean and variance [B, groups]


def decode(network: Autoencoder, params: Any, z: Array, tiling: Tiling, passes: int = 1) -> Array:
    """Raw latents [B,h,w,c] to images [B,H,W,3], not clipped, in at least float32: nearly what `network.decode` gives.

    Args:
      tiling: in latent positions.
      passes: over all windows to measure statistics; 0 makes the windows independent.
    """
    over = windows(z.shape[1], z.shape[2], tiling)
    run: Any = partial(network.apply, {"params": params})
    if not passes:
        return blended(partial(run, method="decode"), z, over)
    return _with_whole_norms(partial(run, method="decode_above"), run(z, method="decode_below"), over, passes)


def moments(network: Autoencoder, params: Any, images: Array, tiling: Tiling, passes: int = 1) -> Array:
    """Images [B,H,W,3] to moments, nearly what `network.moments` gives; arguments as of `decode`.

    Raises ValueError for a size that the network's factor does not divide.
    """
    height, width = images.shape[1:3]
    if height % network.factor or width % network.factor:
        raise ValueError(f"images of {height}x{width} are not divisible by the autoencoder's factor {network.factor}")
    over = windows(height // network.factor, width // network.factor, tiling)
    run: Any = partial(network.apply, {"params": params})
    if not passes:
        return blended(partial(run, method="moments"), images, over)
    return run(_with_whole_norms(partial(run, method="encode_above"), images, over, passes), method="encode_below")


def _with_whole_norms(function: Function, x: Array, over: Windows, passes: int) -> Array:
    """`function` of windows of x, blended, its norms' statistics measured over the whole of x by that many passes."""
    found = _measured(function, x, over, None)
    if passes > 1:
        found = jax.lax.fori_loop(1, passes, lambda _, given: _measured(function, x, over, given), found)
    return blended(partial(_applied, function, found), x, over)


def _measured(function: Function, x: Array, over: Windows, given: Statistics | None) -> Statistics:
    """The statistics over the whole of x of every norm in `function`, while these work with the given ones, or with each window's own.

    Windows count as they do in the blend, so that what several see counts once. Their variances are joined by the law of total variance.
    """

    def measure(window: tuple[Array, Array, Array]) -> Statistics:
        corner, rows, columns = window
        found: Statistics = {}

        def note(norm: nn.GroupNorm, x: Array) -> None:
            found["/".join(norm.path)] = _statistics(x, cast(int, norm.num_groups), rows, columns)

        _applied(function, given, over.cut(x, corner), note)
        return found

    rows, columns = (jnp.asarray(weights, jnp.promote_types(x.dtype, jnp.float32)) for weights in over.weights(1))
    parts = jax.lax.map(measure, (jnp.asarray(over.corners), rows, columns))
    share = (rows.sum(1) * columns.sum(1) / (over.rows.length * over.columns.length))[:, None, None]

    def joined(mean: Array, variance: Array) -> tuple[Array, Array]:
        total = (share * mean).sum(0)
        return total, (share * (variance + (mean - total) ** 2)).sum(0)

    return {path: joined(*part) for path, part in parts.items()}


def _applied(function: Function, given: Statistics | None, x: Array, note: Callable[[nn.GroupNorm, Array], None] | None = None) -> Array:
    """`function` with the given statistics in its norms, x's own where there are none; `note` is called with each norm and its input."""

    def norms(call: Callable[..., Array], args: tuple[Any, ...], kwargs: dict[str, Any], context: InterceptorContext) -> Array:
        norm = context.module
        if not isinstance(norm, nn.GroupNorm):
            return call(*args, **kwargs)
        if note is not None:
            note(norm, args[0])
        return call(*args) if given is None else _normalised(norm, args[0], *given["/".join(norm.path)])

    with nn.intercept_methods(norms):
        return function(x)


def _statistics(x: Array, groups: int, rows: Array, columns: Array) -> tuple[Array, Array]:
    """Weighted mean and variance [B, groups] of a window [B,H,W,C], by a weight for each row and column of cells."""
    b, h, w, c = x.shape
    wide = x.reshape(b, h, w, groups, c // groups).astype(jnp.promote_types(x.dtype, jnp.float32))
    rows, columns = (jnp.repeat(a / a.sum(), n // len(a)) * (len(a) / n) for a, n in ((rows, h), (columns, w)))

    def average(y: Array) -> Array:
        return jnp.einsum("bhwgc,h,w->bg", y, rows, columns) / (c // groups)

    mean = average(wide)
    return mean, average((wide - mean[:, None, None, :, None]) ** 2)


def _normalised(norm: nn.GroupNorm, x: Array, mean: Array, variance: Array) -> Array:
    """What a norm makes of x [B,H,W,C] with given statistics [B, groups]."""
    params = norm.variables["params"]
    mean, variance = (jnp.repeat(a, x.shape[-1] // a.shape[-1], axis=-1)[:, None, None] for a in (mean, variance))
    y = (x.astype(mean.dtype) - mean) * (jax.lax.rsqrt(variance + norm.epsilon) * params["scale"]) + params["bias"]
    return y.astype(norm.dtype)
