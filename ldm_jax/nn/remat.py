"""Which activations the backward pass finds in memory, and which it computes anew (Chen et al. 2016, arXiv 1604.06174).

* "none" keeps all of them;
* "blocks" keeps what enters each block (a residual block, a transformer);
* "full" keeps what enters each group of blocks, a level of a UNet, and again what enters each block while it is at that group;
* names of `KEPT`, joined by "+", keep what enters each block and the results of these operations: "conv+attention".
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = ("conv", "dense", "attention")


def check_remat(remat: str) -> None:
    """Raises ValueError where a setting is none of the module's."""
    if remat not in ("none", "blocks", "full") and not set(remat.split("+")) <= set(KEPT):
        raise ValueError(f"remat {remat!r} is not one of none, blocks, full, or of {', '.join(KEPT)} joined by '+'")


def kept(x: jax.Array, name: str) -> jax.Array:
    """The result of an operation, under the name of `KEPT` by which a setting may keep it."""
    return checkpoint_name(x, name)


def rematted(block: Any, remat: str, static_argnums: Sequence[int] = ()) -> Any:
    """A block, a module's class or a function of a module, whose activations are kept as the setting says."""
    if remat == "none":
        return block
    policy = None if remat in ("blocks", "full") else jax.checkpoint_policies.save_only_these_names(*remat.split("+"))
    return nn.remat(block, policy=policy, static_argnums=tuple(static_argnums))


def rematted_group(function: Any, remat: str, static_argnums: Sequence[int] = ()) -> Any:
    """A function of a module that runs a group of blocks, computed anew as a whole where the setting is "full"."""
    return rematted(function, remat, static_argnums) if remat == "full" else function
