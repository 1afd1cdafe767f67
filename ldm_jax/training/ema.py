"""Exponential moving averages of the parameters, several decays at once.

The reference's warm-up: at update n the decay is min(decay, (1 + n) / (10 + n)), so that early averages forget the initial weights.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.config import UserError


def init(params: Any, decays: Sequence[float]) -> dict[str, Any]:
    """One copy of `params` for each decay, keyed by `str(decay)`: "0.999". A copy, as a donated buffer can be given away only once.

    Raises:
        UserError: a decay outside [0, 1), or one named twice.
    """
    if any(not 0 <= decay < 1 for decay in decays) or len(set(decays)) != len(decays):
        raise UserError(f"EMA decays must lie in [0, 1) and differ, but are {list(decays)}")
    return {str(decay): jax.tree.map(jnp.copy, params) for decay in decays}


def update(emas: dict[str, Any], params: Any, step: jax.Array | int, decays: Sequence[float]) -> dict[str, Any]:
    """The averages after `step` updates (1 after the first one), in the dtype of the parameters.

    ema <- ema + max(1 - decay, 9 / (10 + step)) (params - ema), which is the rule above without the rounding of 1 - decay in float32.
    """

    def average(decay: float) -> Any:
        rate = jnp.maximum(1.0 - decay, 9.0 / (10.0 + step))
        return jax.tree.map(lambda e, p: e + rate.astype(e.dtype) * (p - e), emas[str(decay)], params)

    return {str(decay): average(decay) for decay in decays}
