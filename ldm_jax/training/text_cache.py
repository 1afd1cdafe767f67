"""The embeddings of captions by a text encoder that does not train, computed once and kept beside the latents."""

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cache
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import paths
from ldm_jax.conditioning.conditioner import Conditioning
from ldm_jax.conditioning.conditioners import TextConditioner
from ldm_jax.config import UserError, WorkDir
from ldm_jax.data.latents import LatentCache, cache_fingerprint, weights_fingerprint
from ldm_jax.data.pipeline import read_ahead
from ldm_jax.data.reliable import Layer
from ldm_jax.model_directory import Params, find_finished, load_params
from ldm_jax.sharding.mesh import batch_sharding, filled, make_mesh, replicated, split_host_arrays
from ldm_jax.sharding.processes import from_first
from ldm_jax.training.encode import cache_directory, ensure_written, split

_BATCH = 64  # captions
_SHARD = 1024  # examples
_LOOK = ("kind", "max_length", "width", "depth", "num_heads", "head_dim", "activation", "skip_last", "ff_width")


class Embedded(Layer):
    """A latent cache whose examples have `embeddings` too: [L,W] of their caption, or [n,L,W] where they have several.

    `mirrored` is the latents'; `empty` [1,L,W] is of the empty caption.
    """

    def __init__(self, latents: LatentCache, embeddings: LatentCache) -> None:
        super().__init__(latents)
        self._embeddings, self.mirrored = embeddings, latents.mirrored
        self.empty: np.ndarray = embeddings[len(latents)]["embeddings"][None]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return self.read(indices)

    def read(self, indices: Sequence[int] | np.ndarray, flips: np.ndarray | None = None) -> list[dict[str, Any]]:
        """As `LatentCache.read`; a mirrored picture keeps its captions."""
        latents, embeddings = self.below.read(indices, flips), self._embeddings.read(indices)
        return [{**one, **other} for one, other in zip(latents, embeddings, strict=True)]


class TextEncoder:
    """Captions to embeddings on this process's own devices, in batches of one size so that one program serves all."""

    def __init__(self, conditioner: TextConditioner, params: Params) -> None:
        self._conditioner, self._mesh = conditioner, make_mesh(devices=jax.local_devices())
        self._size = filled(_BATCH, self._mesh)
        whole, parts = replicated(self._mesh), batch_sharding(self._mesh)
        self._params = jax.device_put(params, whole)
        self._run = jax.jit(
            lambda p, tokens: conditioner.apply(p, {"tokens": tokens})["crossattn"].astype(conditioner.network.dtype),
            in_shardings=(whole, parts),
            out_shardings=parts,
        )

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [len(texts),L,W] of the network's dtype."""
        return np.concatenate([self._batch([texts[i] for i in part]) for part in split(range(len(texts)), self._size)])

    def _batch(self, texts: list[str]) -> np.ndarray:
        filled = texts + [""] * (self._size - len(texts))
        tokens = self._conditioner.prepare({"text": filled})["tokens"]
        return np.asarray(self._run(self._params, split_host_arrays(tokens, self._mesh)))[: len(texts)]


def with_embeddings(config: ConfigDict, workdir: WorkDir, conditioning: Conditioning, latents: LatentCache, starts: bool) -> Embedded:
    """The latents with the embeddings of their captions by the frozen encoder of `conditioning`, computed now where they are missing.

    The encoder is `train.init_from`'s. Which one it is, is written down where the run starts; where it goes on from a checkpoint, its
    weights are needed only if the cache is gone. Raises UserError where they are gone too, or are others.
    """
    conditioner = next(c for c in conditioning.conditioners if isinstance(c, TextConditioner))
    note = workdir.path / "text_encoder.json"
    given = cache(lambda: _weights(config))  # read where they are needed, and once

    def settle() -> str:
        if starts or not note.exists():
            paths.write_json(note, {"weights": given()[1]})
        return json.loads(note.read_text())["weights"]

    known = from_first(settle)

    @cache
    def encoder() -> TextEncoder:
        params, weights = given()
        if weights != known:
            raise UserError(
                f"train.init_from={config.train.init_from} has another text encoder than the one that {workdir.path} has learnt with"
            )
        return TextEncoder(conditioner, params)

    def make(examples: range, views: int) -> Generator[dict[str, Any], None, None]:
        return embedded(encoder(), latents, examples)

    mark = _fingerprint(config, conditioner, known, latents)
    directory = cache_directory(config, workdir, mark)
    # One more than there are pictures: the last is the empty caption's.
    return Embedded(latents, ensure_written(directory, {"fingerprint": mark}, len(latents) + 1, _SHARD, make, config.data.copies))


def _weights(config: ConfigDict) -> tuple[Params, str]:
    """The parameters of the text encoder that the run starts from, and their fingerprint. Raises UserError."""
    params = load_params(find_finished(config.train.init_from) / "conditioner")["text"]
    return params, weights_fingerprint(params)


def _fingerprint(config: ConfigDict, conditioner: TextConditioner, weights: str, latents: LatentCache) -> str:
    """Changes with all that the embeddings depend on."""
    assert conditioner.tokenizer is not None
    tokenizer = hashlib.sha256(conditioner.tokenizer.to_json().encode()).hexdigest()
    dtype = np.dtype(conditioner.network.dtype).name
    look = {name: config.conditioning.text[name] for name in _LOOK}
    return cache_fingerprint(text=weights, tokenizer=tokenizer, dtype=dtype, latents=latents.fingerprint(), **look)


def embedded(encoder: TextEncoder, latents: LatentCache, examples: range) -> Generator[dict[str, Any], None, None]:
    """The embeddings of those examples; at the index after the last example of the latents, of the empty caption."""

    def captions(piece: range) -> list[str | list[str]]:
        stored = latents.read([i for i in piece if i < len(latents)])
        return [*(example["text"] for example in stored), *([""] if len(latents) in piece else [])]

    with closing(read_ahead(captions, split(examples, _BATCH), 1, 1)) as batches:
        for batch in batches:
            several = [text if isinstance(text, list) else [text] for text in batch]
            found = iter(encoder([text for texts in several for text in texts]))
            for text, own in zip(batch, several, strict=True):
                rows = np.stack([next(found) for _ in own])
                yield {"embeddings": rows if isinstance(text, list) else rows[0]}
