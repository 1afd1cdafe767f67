"""Captions to token ids: a byte-level BPE trained on the captions, or a Hugging Face tokenizer."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from ldm_jax.config import UserError
from ldm_jax.paths import resolve

_PAD, _BOS, _EOS = "[PAD]", "[BOS]", "[EOS]"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")  # what transformers reads of a folder besides


class Tokenizer:
    """Maps texts to int32 [B, max_length], padded and truncated. Wraps a `tokenizers.Tokenizer`, whose JSON form travels with the model."""

    def __init__(self, inner: tokenizers.Tokenizer, max_length: int) -> None:
        self._inner = inner
        self.max_length = max_length
        padding, truncation = self._inner.padding or {}, self._inner.truncation or {}
        self._inner.enable_truncation(max_length, direction=truncation.get("direction", "right"))
        self._inner.enable_padding(
            direction=padding.get("direction", "right"),
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
        """A `tokenizer.json`, a directory that holds one, or a Hugging Face name or directory. Raises UserError.

        The token of padding stands in up to three files of a directory, which may disagree: where there is more than `tokenizer.json`,
        transformers reads them, and the ids are those that it gives.
        """
        folder = os.path.isdir(name)
        file = os.path.join(name, "tokenizer.json") if folder else name
        if os.path.isfile(file) and not any(os.path.isfile(os.path.join(name, other)) for other in _BESIDE):
            return cls.load(file, max_length)
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
        from transformers import AutoTokenizer  # slow to import, and only this branch needs it

        try:
            fast = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False, local_files_only=folder)
        except Exception as error:  # damaged files raise whatever their reader came upon, `tokenizers` a plain `Exception`
            raise UserError(f"no tokenizer {name!r}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
        if not getattr(fast, "is_fast", False):
            raise UserError(f"tokenizer {name!r} has no fast form (tokenizer.json)")
        inner = fast.backend_tokenizer
        inner.enable_truncation(max_length, direction=fast.truncation_side)
        inner.enable_padding(
            direction=fast.padding_side, pad_id=fast.pad_token_id or 0, pad_token=fast.pad_token or _PAD, pad_type_id=fast.pad_token_type_id
        )
        return cls(inner, max_length)

    @classmethod
    def load(cls, path: str | os.PathLike[str], max_length: int) -> "Tokenizer":
        """A file that holds what `to_json` gives. Raises UserError where it is missing or damaged."""
        try:
            return cls.from_json(resolve(path).read_text(), max_length)
        except Exception as error:
            # `tokenizers` raises a plain `Exception` for text that is no tokenizer: no narrower clause would catch it.
            if type(error) is not Exception and not isinstance(error, OSError | ValueError):
                raise
            raise UserError(f"cannot read the tokenizer {path}: {error}") from error

    @classmethod
    def from_json(cls, text: str, max_length: int) -> "Tokenizer":
        """The inverse of `to_json`."""
        return cls(tokenizers.Tokenizer.from_str(text), max_length)

    def padded_with(self, token: str | int | None) -> "Tokenizer":
        """The same with another padding token, given as text or id; None, or one that there is not, leaves it."""
        text = self._inner.id_to_token(token) if isinstance(token, int) else token
        if text is None or (number := self._inner.token_to_id(text)) is None:
            return self
        inner = tokenizers.Tokenizer.from_str(self._inner.to_str())
        inner.enable_padding(**(self._inner.padding or {}) | {"pad_id": number, "pad_token": text})
        return Tokenizer(inner, self.max_length)

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
