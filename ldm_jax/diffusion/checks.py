"""What all settings of diffusion have in common: their numbers are finite, and each acts.

Both checks raise ValueError, since what is here knows nothing of configurations and their users.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def check_finite(settings: Any, what: str) -> None:
    """Raises ValueError where a number of a dataclass, or the first of two that bound an interval, is infinite or none at all."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name.endswith("interval"):
            value = value[0]  # the other may be infinite
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not math.isfinite(number):
                raise ValueError(f"{field.name} of {what} must be a finite number, got {number}")


# (the field that chooses, its values under which the others act, the others), names as in a configuration.
_ACTING: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("process", ("discrete",), ("schedule", "start", "end", "betas", "zero_terminal_snr", "num_steps")),
    ("process", ("flow", "cosine"), ("shift",)),
    ("process", ("sigma",), ("sigma_min", "sigma_max", "rho", "sigma_data")),
    ("schedule", ("linear", "linear_beta", "sqrt"), ("start", "end")),
    ("loss", ("huber",), ("huber_delta",)),
    ("weighting", ("min_snr", "soft_min_snr", "p2"), ("gamma",)),
    ("weighting", ("p2", "sigmoid"), ("weight_offset",)),
    ("time_sampling", ("logit_normal", "log_normal"), ("time_mean", "time_std")),
    ("time_sampling", ("mode",), ("mode_scale",)),
)
# The schedule's own ends, and what stood in configurations whatever the schedule when that was the default.
_UNSET = {"start": (None, 0.0, 0.0015), "end": (None, 0.0, 0.0195)}


def check_acting(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises ValueError for a field of diffusion that is set, away from its default, where another leaves it without effect."""
    for chooser, values, names in _ACTING:
        for name in names if group[chooser] not in values else ():
            if group[name] not in (defaults[name], *_UNSET.get(name, ())):
                raise ValueError(f"{name}={group[name]} has no effect with {chooser}={group[chooser]}: it is of {', '.join(values)}")
