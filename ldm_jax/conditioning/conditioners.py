"""The kinds of condition: text, classes, boxes, semantic maps, smaller or masked pictures, neighbours (Rombach et al., section 3.3).

`prepare` raises UserError for a field that is not what its conditioner takes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.conditioner import Arrays, Params
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.nn.embedders import BoxEmbedder, ClassEmbedder, SpatialRescaler
from ldm_jax.nn.text_encoder import TextTransformer

_NO_CLASS = 255  # of a semantic map: a pixel that no channel of the one-hot map stands for


def array_of(name: str, values: Any, shape: tuple[int | str, ...], dtype: Any) -> np.ndarray:
    """An array for each example as one [B, *shape], where a length with a name is any that all have. Raises UserError for other shapes, and
    for what a whole number cannot be."""
    what = f"{name} must be [{', '.join(map(str, shape))}] for each image" if shape else f"{name} must be one number for each image"
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise UserError(f"{what}, not arrays of different shapes") from error
    given = array.shape[1:]
    if array.ndim == 0 or len(given) != len(shape) or any(isinstance(w, int) and w != n for w, n in zip(shape, given, strict=True)):
        raise UserError(f"{what}, not {list(given)}")
    try:
        with np.errstate(invalid="ignore"):
            typed = array.astype(dtype)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be {np.dtype(dtype)} numbers, not {array.dtype}") from error
    if np.issubdtype(dtype, np.integer) and (typed != array).any():
        raise UserError(f"{name} must be {np.dtype(dtype)} numbers, not {array.dtype} from {array.min()} to {array.max()}")
    return typed


@dataclass(frozen=True)
class TextConditioner:
    """Captions through a text encoder. A batch's `text` (list of str) becomes `tokens` int32 [B,L]; gives "crossattn" [B,L,width].

    Attributes:
      tokenizer: None where only shapes matter: such a model cannot read text.
      network: tokens int32 [B,L] to [B,L,width].
      max_length: L.
      frozen: its weights were trained elsewhere and stay.
      masked: the network is told which tokens are not padding, and attends to those alone. T5's was trained so (Raffel et al. 2020), and
        gives a text the same embeddings whatever the length is that it is padded to; the paper's and CLIP's attend to padding.
    """

    tokenizer: Tokenizer | None
    network: Any
    max_length: int
    drop_rate: float
    frozen: bool = False
    masked: bool = False
    name: str = "text"

    def prepare(self, batch: Mapping[str, Any]) -> Arrays:
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer; convert it again with --tokenizer")
        if not all(isinstance(text, str) for text in batch["text"]):
            raise UserError("texts must be str")
        return {"tokens": self.tokenizer(batch["text"])}

    def null(self, n: int) -> Arrays:
        if self.tokenizer is None:
            return {"tokens": np.zeros((n, self.max_length), np.int32)}
        return {"tokens": np.repeat(self.tokenizer([""]), n, axis=0)}

    def init(self, key: jax.Array) -> Params:
        return self.network.init(key, jnp.zeros((1, self.max_length), jnp.int32))["params"]

    def apply(self, params: Params, arrays: Arrays) -> Arrays:
        params = jax.lax.stop_gradient(params) if self.frozen else params
        mask = (arrays["tokens"] != (self.tokenizer.pad_id if self.tokenizer else 0),) if self.masked else ()
        return {"crossattn": self.network.apply({"params": params}, arrays["tokens"], *mask)}


@dataclass(frozen=True, eq=False)
class EmbeddedTextConditioner:
    """Captions that a frozen text encoder has read before. A batch's `embeddings` [B,L,width]; gives them as "crossattn".

    `empty` [1,L,width] is what the encoder makes of the empty caption.
    """

    empty: np.ndarray
    drop_rate: float
    name: str = "text"

    def prepare(self, batch: Mapping[str, Any]) -> Arrays:
        return {"embeddings": np.stack(batch["embeddings"])}

    def null(self, n: int) -> Arrays:
        return {"embeddings": np.repeat(self.empty, n, axis=0)}

    def init(self, key: jax.Array) -> Params:
        return {}

    def apply(self, params: Params, arrays: Arrays) -> Arrays:
        return {"crossattn": arrays["embeddings"]}


@dataclass(frozen=True)
class LabelConditioner:
    """Classes through a table. A batch's `label` int [B]; gives "crossattn" [B,1,width], or "vector" [B,width].

    Attributes:
      num_classes: classes, of labels in [0, num_classes).
      null_class: whether the table has one more row for "no class", the last; without it the null condition is class 0, and guidance has
        no meaning.
    """

    network: ClassEmbedder
    num_classes: int
    null_class: bool
    to: Literal["crossattn", "vector"]
    drop_rate: float
    name: str = "label"

    def prepare(self, batch: Mapping[str, Any]) -> Arrays:
        label = array_of("labels", batch["label"], (), np.int32)
        if label.size and not 0 <= label.min() <= label.max() < self.num_classes:
            raise UserError(f"labels must lie in [0, {self.num_classes}), not {label.min()} to {label.max()}")
        return {"label": label}

    def null(self, n: int) -> Arrays:
        return {"label": np.full(n, self.num_classes if self.null_class else 0, np.int32)}

    def init(self, key: jax.Array) -> Params:
        return self.network.init(key, jnp.zeros(1, jnp.int32))["params"]

    def apply(self, params: Params, arrays: Arrays) -> Arrays:
        vector: Any = self.network.apply({"params": params}, arrays["label"])
        return {"vector": vector} if self.to == "vector" else {"crossattn": vector[:, None]}


@dataclass(frozen=True)
class BoxesConditioner:
    """Boxes as a sentence of tokens through a transformer. A batch's `boxes`: for each image float [n,5] of class, x0, y0, x1, y1, the
    coordinates in [0, 1]; becomes `box_tokens` int32 [B,L], L = 3 max_objects + 2; gives "crossattn" [B,L,width].

    An object is three tokens, its class and the places of two corners on a square grid of as many cells as there are tokens but one; what
    is not there is that one, the last. The corners of the window of the picture that is drawn come last: a batch's `crop` float [B,4] of
    x0, y0, x1, y1, the whole where there is none. Boxes are shares of the whole picture all the same (Rombach et al. 2022, section 4.3.1
    and appendix E.2.2; table 17). `boxes_of` reads tokens back.
    """

    network: TextTransformer | BoxEmbedder
    max_objects: int
    drop_rate: float
    name: str = "boxes"

    @property
    def sections(self) -> int:
        """Cells of the grid along each axis."""
        return math.isqrt(self.network.vocab_size - 1)

    def prepare(self, batch: Mapping[str, Any]) -> Arrays:
        crops = array_of("crop", batch.get("crop", [_WHOLE] * len(batch["boxes"])), (4,), np.float64)
        return {"box_tokens": np.stack([self._tokens(boxes, crop) for boxes, crop in zip(batch["boxes"], crops, strict=True)])}

    def null(self, n: int) -> Arrays:
        return {"box_tokens": np.repeat(self._tokens(np.zeros((0, 5)), np.array(_WHOLE))[None], n, axis=0)}

    def boxes_of(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float64 [n,5] and the window [4] that tokens int [L] stand for: places are right to half a cell, 1/(2 sections - 2)."""
        triples = tokens[:-2].reshape(-1, 3)
        triples = triples[triples[:, 0] < self.network.vocab_size - 1]
        places = (triples[:, 1], triples[:, 2], tokens[-2:])
        first, second, window = (np.stack([p % self.sections, p // self.sections], axis=-1) / (self.sections - 1) for p in places)
        return np.concatenate([triples[:, :1], first, second], axis=1), window.ravel()

    def _tokens(self, rows: Any, crop: np.ndarray) -> np.ndarray:
        """int32 [L]; of more objects than there is room for, the largest."""
        boxes = _rows(rows)
        if not ((boxes[:, 1:] >= 0) & (boxes[:, 1:] <= 1)).all():
            raise UserError("boxes are rows of class, x0, y0, x1, y1, with coordinates in [0, 1]")
        if not (boxes[:, 1:3] <= boxes[:, 3:]).all():
            raise UserError("boxes are rows of class, x0, y0, x1, y1, with x0 <= x1 and y0 <= y1")
        if not np.isin(boxes[:, 0], np.arange(self.network.vocab_size - 1)).all():
            raise UserError(f"classes of boxes must be whole numbers in [0, {self.network.vocab_size - 1})")
        area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])
        kept = boxes[np.sort(np.argsort(-area, kind="stable")[: self.max_objects])]
        tokens = np.full(3 * self.max_objects + 2, self.network.vocab_size - 1, np.int32)
        triples = np.stack([kept[:, 0], self._place(kept[:, 1:3]), self._place(kept[:, 3:5])], axis=1)
        tokens[: 3 * len(kept)] = triples.ravel()
        tokens[-2:] = self._place(crop.reshape(2, 2))
        return tokens

    def _place(self, points: np.ndarray) -> np.ndarray:
        """Points (x, y) in [0, 1] to cells of the grid, row by row."""
        cells = np.round(points * (self.sections - 1)).astype(np.int64)
        return cells[:, 1] * self.sections + cells[:, 0]

    def init(self, key: jax.Array) -> Params:
        return self.network.init(key, jnp.zeros((1, self.network.max_length), jnp.int32))["params"]

    def apply(self, params: Params, arrays: Arrays) -> Arrays:
        return {"crossattn": self.network.apply({"params": params}, arrays["box_tokens"])}


_WHOLE = (0.0, 0.0, 1.0, 1.0)


def _rows(boxes: Any) -> np.ndarray:
    """An image's boxes as float64 [n,5]. Raises UserError."""
    try:
        rows = np.asarray(boxes, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError("boxes are rows of five numbers: class, x0, y0, x1, y1") from error
    if rows.size == 0:
        return np.zeros((0, 5))
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise UserError(f"boxes are rows of five numbers for each image, class, x0, y0, x1, y1, not an array of {list(rows.shape)}")
    return rows


@dataclass(frozen=True)
class SegmentationConditioner:
    """Semantic maps, one-hot and rescaled to the size of the latents. A batch's `segmentation` uint8 [B,H,W]; gives "concat" [B,h,w,c]."""

    network: SpatialRescaler
    num_classes: int
    resolution: int
    drop_rate: float
    name: str = "segmentation"

    def prepare(self, batch: Mapping[str, Any]) -> Arrays:
        maps = array_of("segmentation", batch["segmentation"], ("H", "W"), np.uint8)
        if ((maps >= self.num_classes) & (maps != _NO_CLASS)).any():
            raise UserError(f"classes of a segmentation must lie in [0, {self.num_classes}), or be {_NO_CLASS} for none")
        return {"segmentation": maps}

    def null(self, n: int) -> Arrays:
        return {"segmentation": np.full((n, self.resolution, self.resolution), _NO_CLASS, np.uint8)}

    def init(self, key: jax.Array) -> Params:
        size = 2**self.network.stages
        return self.network.init(key, jnp.zeros((1, size, size, self.num_classes)))["params"]

    def apply(self, params: Params, arrays: Arrays) -> Arrays:
        one_hot = jax.nn.one_hot(arrays["segmentation"], self.num_classes, dtype=self.network.dtype)
        return {"concat": self.network.apply({"params": params}, one_hot)}


@dataclass(frozen=True)
class LowResConditioner:
    """The picture at the size of the latents, in [-1, 1]. A batch's `low_res` uint8 [B,h,w,3]; gives "concat" [B,h,w,3] (section 4.4)."""

    size: int
    drop_rate: float
    name: str = "low_res"

    def prepare(self, batch: Mapping[str, Any]) -> Arrays:
        return {"low_res": array_of("low_res", batch["low_res"], ("h", "w", 3), np.uint8)}

    def null(self, n: int) -> Arrays:
        return {"low_res": np.full((n, self.size, self.size, 3), 127, np.uint8)}

    def init(self, key: jax.Array) -> Params:
        return {}

    def apply(self, params: Params, arrays: Arrays) -> Arrays:
        return {"concat": arrays["low_res"].astype(jnp.float32) / 127.5 - 1.0}


@dataclass(frozen=True)
class MaskConditioner:
    """What is left of a picture with a hole. A batch's `mask` float32 [B,h,w,C+1]: the scaled latents of the picture without the hole's
    content, and the mask at their size, 1 in the hole and -1 outside (`FirstStage.masked`); gives "concat" (section 4.5).

    `style` "sd" is Stable Diffusion's: its weights take the mask first, 1 in the hole and 0 outside, and the latents after it, of a picture
    whose hole is gray, where the paper's ("ldm") is black. `shrink` "nearest" takes the mask at one pixel for each latent, as the released
    weights learnt it; "any" is a hole wherever a latent sees any of one, so that thin strokes are not lost.
    """

    size: int
    channels: int
    style: Literal["ldm", "sd"]
    shrink: Literal["nearest", "any"]
    drop_rate: float
    name: str = "mask"

    def prepare(self, batch: Mapping[str, Any]) -> Arrays:
        return {"mask": array_of("mask", batch["mask"], ("h", "w", self.channels + 1), np.float32)}

    def null(self, n: int) -> Arrays:
        return {"mask": np.ones((n, self.size, self.size, self.channels + 1), np.float32)}

    def init(self, key: jax.Array) -> Params:
        return {}

    def apply(self, params: Params, arrays: Arrays) -> Arrays:
        mask = arrays["mask"]
        if self.style == "sd":
            mask = jnp.concatenate([(mask[..., -1:] + 1) / 2, mask[..., :-1]], axis=-1)
        return {"concat": mask}


@dataclass(frozen=True)
class NeighborsConditioner:
    """Embeddings of retrieved pictures, attended to as they are. A batch's `neighbors` float32 [B,n,width]; gives "crossattn".

    1 <= n <= count, as many for all pictures of a batch: attention has no length of its own.
    """

    count: int
    width: int
    drop_rate: float
    name: str = "neighbors"

    def prepare(self, batch: Mapping[str, Any]) -> Arrays:
        counts = sorted({len(rows) if hasattr(rows, "__len__") else 0 for rows in batch["neighbors"]})
        if len(counts) != 1 or not 1 <= counts[0] <= self.count:
            given = " and ".join(map(str, counts))
            raise UserError(f"neighbors must be 1 to {self.count} embeddings for each image, as many for all, not {given}")
        return {"neighbors": array_of("neighbors", batch["neighbors"], (counts[0], self.width), np.float32)}

    def null(self, n: int) -> Arrays:
        return {"neighbors": np.zeros((n, self.count, self.width), np.float32)}

    def init(self, key: jax.Array) -> Params:
        return {}

    def apply(self, params: Params, arrays: Arrays) -> Arrays:
        return {"crossattn": arrays["neighbors"]}
