"""A model of another program in our terms, before it has weights."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A model of another program in our terms: groups of fields as a configuration has them.

    Attributes:
      denoiser: None for an autoencoder alone.
      conditioning: only the groups that are enabled.
      sample: fields of the `sample` group.
      scale: of the latents, scaled = raw / scale; None where the checkpoint holds it.
      resolution: of the pictures, in pixels.
      linear_projections: a SpatialTransformer's projections are matrices there, not 1x1 convolutions.
      fused_by_head: rows of a plain attention's fused tensor are ordered by head first, not by query, key and value.
    """

    first_stage: dict[str, Any]
    denoiser: dict[str, Any] | None = None
    conditioning: dict[str, dict[str, Any]] = field(default_factory=dict)
    diffusion: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, Any] = field(default_factory=dict)
    scale: float | None = 1.0
    resolution: int = 256
    linear_projections: bool = False
    fused_by_head: bool = True
