"""Captions to token ids: a byte-level BPE trained on the captions, or a Hugging Face tokenizer."""

import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from etils import epath

from ldm_jax.config import UserError

_PAD, _BOS, _EOS = "[PAD]", "[BOS]", "[EOS]"


class Tokenizer:
    """Maps texts to int32 [B, max_length], padded and truncated. Wraps a `tokenizers.Tokenizer`, whose JSON form travels with the model."""

    def __init__(self, inner: tokenizers.Tokenizer, max_length: int) -> None:
        self._inner = inner
        self.max_length = max_length
        self._inner.enable_truncation(max_length)
        padding = self._inner.padding or {}
        self._inner.enable_padding(
            length=max_length,
            pad_id=padding.get("pad_id", 0),
            pad_token=padding.get("pad_token", _PAD),
            pad_type_id=padding.get("pad_type_id", 0),
        )

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, max_length: int) -> "Tokenizer":
        """Byte-level BPE, lower case, [BOS] and [EOS] around: every text has a code, frequent words have one token."""
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()])
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_PAD, _BOS, _EOS],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(captions, trainer)
        ends = [(token, inner.token_to_id(token)) for token in (_BOS, _EOS)]
        inner.post_processor = tokenizers.processors.TemplateProcessing(single=f"{_BOS} $A {_EOS}", special_tokens=ends)
        return cls(inner, max_length)

    @classmethod
    def pretrained(cls, name: str, max_length: int) -> "Tokenizer":
        """A `tokenizer.json`, a directory that holds one, or a Hugging Face name or directory. Raises UserError."""
        if os.path.isfile(name):
            return cls.load(name, max_length)
        if os.path.isfile(file := os.path.join(name, "tokenizer.json")):
            return cls.load(file, max_length)._padded_with(_pad_token(os.path.join(name, "tokenizer_config.json")))
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
        from transformers import AutoTokenizer  # slow to import, and only this branch needs it

        try:
            fast = AutoTokenizer.from_pretrained(name, use_fast=True)
        except (OSError, ValueError) as error:
            raise UserError(f"no tokenizer {name!r}: {str(error).splitlines()[0]}") from error
        if not getattr(fast, "is_fast", False):
            raise UserError(f"tokenizer {name!r} has no fast form (tokenizer.json)")
        inner = fast.backend_tokenizer
        inner.enable_padding(pad_id=fast.pad_token_id or 0, pad_token=fast.pad_token or _PAD)
        return cls(inner, max_length)

    @classmethod
    def load(cls, path: str | os.PathLike[str], max_length: int) -> "Tokenizer":
        """A file that holds what `to_json` gives. Raises UserError where it is missing or damaged."""
        try:
            return cls(tokenizers.Tokenizer.from_str(epath.Path(path).read_text()), max_length)
        except Exception as error:
            # `tokenizers` raises a plain `Exception` for text that is no tokenizer: no narrower clause would catch it.
            if type(error) is not Exception and not isinstance(error, OSError | ValueError):
                raise
            raise UserError(f"cannot read the tokenizer {path}: {error}") from error

    def _padded_with(self, token: str | None) -> "Tokenizer":
        """The same with another padding token; None leaves it."""
        if token is None or (number := self._inner.token_to_id(token)) is None:
            return self
        self._inner.enable_padding(pad_id=number, pad_token=token)
        return Tokenizer(self._inner, self.max_length)

    def to_json(self) -> str:
        return self._inner.to_str()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files of a `transformers.PreTrainedTokenizerFast` that gives the same ids."""
        from transformers import PreTrainedTokenizerFast

        padding = self._inner.padding or {}
        fast = PreTrainedTokenizerFast(
            tokenizer_object=self._inner, pad_token=padding.get("pad_token", _PAD), model_max_length=self.max_length
        )
        fast.save_pretrained(folder)

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    @property
    def pad_id(self) -> int:
        """The token that fills texts up to `max_length`."""
        return (self._inner.padding or {}).get("pad_id", 0)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [len(texts), max_length]."""
        return np.array([e.ids for e in self._inner.encode_batch(list(texts))], np.int32).reshape(len(texts), self.max_length)


def _pad_token(config: str) -> str | None:
    """What a `tokenizer_config.json` says of padding: `tokenizer.json` beside it often does not."""
    if not os.path.isfile(config):
        return None
    try:
        with open(config, encoding="utf-8") as file:
            token = json.load(file).get("pad_token")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {config}: {error}") from error
    return token.get("content") if isinstance(token, dict) else token
