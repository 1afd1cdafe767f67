"""The conditioners of a configuration's `conditioning` group."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm_jax.conditioning.conditioner import Conditioner, Conditioning
from ldm_jax.conditioning.conditioners import (
    BoxesConditioner,
    LabelConditioner,
    LowResConditioner,
    MaskConditioner,
    NeighborsConditioner,
    SegmentationConditioner,
    TextConditioner,
)
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.nn.clip_text import CLIPText
from ldm_jax.nn.embedders import BoxEmbedder, ClassEmbedder, SpatialRescaler
from ldm_jax.nn.t5 import T5Encoder
from ldm_jax.nn.text_encoder import TextTransformer

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """What conditioners must know of the model that they are for.

    Attributes:
      resolution: of the pictures, in pixels; `factor` of them along each axis are one position of the latents, of so many channels.
      tokenizer: of the text, where it is enabled.
    """

    resolution: int
    factor: int
    latent_channels: int
    dtype: Any
    tokenizer: Tokenizer | None = None


def build_conditioning(group: Group, model: Model) -> Conditioning:
    """The conditioners that are enabled, in the order of `KINDS`. Raises UserError for settings that do not go together."""
    enabled = [name for name in KINDS if group.get(name, {}).get("enabled")]
    return Conditioning(tuple(KINDS[name](group[name], model) for name in enabled))


def _text(group: Group, model: Model) -> Conditioner:
    """A table that trains with the denoiser has the size of its tokenizer, or `vocab_size` where there is none yet; those trained elsewhere
    have theirs, which may be larger."""
    kind = group.get("kind", "transformer")
    if kind not in _TEXT_NETWORKS:
        raise UserError(f"conditioning.text.kind {kind!r} is not one of {', '.join(_TEXT_NETWORKS)}")
    module, names = _TEXT_NETWORKS[kind]
    vocab_size = group["vocab_size"]
    if model.tokenizer and kind == "transformer":
        vocab_size = model.tokenizer.vocab_size
    elif model.tokenizer and model.tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {model.tokenizer.vocab_size} tokens, conditioning.text.vocab_size is {vocab_size}")
    fields = {name: group[name] for name in names if name in group}  # a model from before a field was there has its default
    network = module(vocab_size=vocab_size, **fields, dtype=model.dtype)
    frozen = group.get("frozen", False)
    return TextConditioner(model.tokenizer, network, group["max_length"], group["drop_rate"], frozen, masked=kind == "t5")


_TEXT_NETWORKS: dict[str, tuple[type, tuple[str, ...]]] = {
    "transformer": (TextTransformer, ("max_length", "width", "depth", "num_heads", "head_dim", "remat")),
    "clip": (CLIPText, ("max_length", "width", "depth", "num_heads", "activation", "skip_last")),
    "t5": (T5Encoder, ("width", "depth", "num_heads", "head_dim", "ff_width")),
}


def _label(group: Group, model: Model) -> Conditioner:
    if group["to"] not in ("crossattn", "vector"):
        raise UserError(f"conditioning.label.to {group['to']!r} is not one of crossattn, vector")
    if group["drop_rate"] and not group["null_class"]:
        raise UserError("conditioning.label.drop_rate needs conditioning.label.null_class")
    stddev = 0.02 if group["to"] == "vector" else 1.0  # what is added to the time embedding starts small (Peebles & Xie 2023)
    network = ClassEmbedder(group["num_classes"] + bool(group["null_class"]), group["width"], stddev, model.dtype)
    return LabelConditioner(network, group["num_classes"], group["null_class"], group["to"], group["drop_rate"])


def _boxes(group: Group, model: Model) -> Conditioner:
    kind, sizes = group.get("kind", "sequence"), (group["vocab_size"], 3 * group["max_objects"] + 2, group["width"])
    if kind not in ("sequence", "objects"):
        raise UserError(f"conditioning.boxes.kind {kind!r} is not one of sequence, objects")
    network: TextTransformer | BoxEmbedder = BoxEmbedder(*sizes, model.dtype)
    if kind == "sequence":
        network = TextTransformer(*sizes, group["depth"], group["num_heads"], group["head_dim"], model.dtype)
    return BoxesConditioner(network, group["max_objects"], group["drop_rate"])


def _segmentation(group: Group, model: Model) -> Conditioner:
    if 2 ** group["stages"] != model.factor:
        raise UserError(f"conditioning.segmentation.stages {group['stages']} must halve the map to the latents' size, by {model.factor}")
    if not 0 < group["num_classes"] <= 255:
        raise UserError(f"conditioning.segmentation.num_classes must lie in [1, 255], not {group['num_classes']}")
    network = SpatialRescaler(group["stages"], group["channels"], model.dtype)
    return SegmentationConditioner(network, group["num_classes"], model.resolution, group["drop_rate"])


def _low_res(group: Group, model: Model) -> Conditioner:
    return LowResConditioner(model.resolution // model.factor, group["drop_rate"])


def _mask(group: Group, model: Model) -> Conditioner:
    if group["style"] not in ("ldm", "sd"):
        raise UserError(f"conditioning.mask.style {group['style']!r} is not one of ldm, sd")
    shrink = group.get("shrink", "nearest")  # of models that are older than the choice
    if shrink not in ("nearest", "any"):
        raise UserError(f"conditioning.mask.shrink {shrink!r} is not one of nearest, any")
    return MaskConditioner(model.resolution // model.factor, model.latent_channels, group["style"], shrink, group["drop_rate"])


def _neighbors(group: Group, model: Model) -> Conditioner:
    return NeighborsConditioner(group["count"], group["width"], group["drop_rate"])


KINDS: dict[str, Callable[[Group, Model], Conditioner]] = {
    "text": _text,
    "label": _label,
    "boxes": _boxes,
    "segmentation": _segmentation,
    "low_res": _low_res,
    "mask": _mask,
    "neighbors": _neighbors,
}
