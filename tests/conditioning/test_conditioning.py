"""Tokens, and what the denoiser is told."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.conditioning.conditioner import Conditioning
from ldm_jax.conditioning.conditioners import TextConditioner
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.nn.text_encoder import TextTransformer

CAPTIONS = ["a red circle on a gray background", "a blue square above a green ring on a pink background"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, vocab_size=400, max_length=14)


def conditioning(tokenizer: Tokenizer, drop_rate: float) -> Conditioning:
    network = TextTransformer(tokenizer.vocab_size, 14, 16, 1, 2, 8)
    return Conditioning((TextConditioner(tokenizer, network, network.max_length, drop_rate),))


def test_words_of_the_captions_are_single_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(CAPTIONS[:1])
    assert tokens.shape == (1, 14) and tokens.dtype == np.int32
    assert (tokens[0] != tokens[0, -1]).sum() == 7 + 2  # the words, begin and end; the rest is padding
    np.testing.assert_array_equal(tokenizer(["A RED circle on a gray background"]), tokens)


def test_any_text_has_a_code_and_long_ones_are_cut(tokenizer: Tokenizer) -> None:
    texts = ["", "دائرة حمراء", "🟥 x", "red " * 100]
    tokens = tokenizer(texts)
    assert tokens.shape == (4, 14) and tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size
    assert len({t.tobytes() for t in tokens}) == 4


def test_the_json_form_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    again = Tokenizer.load(tmp_path / "tokenizer.json", 14)
    np.testing.assert_array_equal(again(CAPTIONS), tokenizer(CAPTIONS))
    np.testing.assert_array_equal(Tokenizer.pretrained(str(tmp_path), 14)(CAPTIONS), tokenizer(CAPTIONS))


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer") as caught:
        Tokenizer.pretrained(str(tmp_path), 14)
    assert "\n" not in str(caught.value)


def test_a_hugging_face_tokenizer_directory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "plain.json").write_text(tokenizer.to_json())
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "plain.json"), pad_token="[PAD]")
    fast.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(Tokenizer.pretrained(str(tmp_path / "saved"), 14)(CAPTIONS), tokenizer(CAPTIONS))


def test_context_depends_on_every_word_and_its_place(tokenizer: Tokenizer) -> None:
    c = conditioning(tokenizer, 0.1)
    params = c.init(jax.random.key(0))
    texts = ["a red circle", "a blue circle", "circle red a"]
    context = c.apply(params, c.prepare({"text": texts}))["crossattn"]
    assert context.shape == (3, 14, 16)
    assert np.abs(context[0] - context[1]).max() > 1e-3 and np.abs(context[0] - context[2]).max() > 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_captions_are_dropped_at_their_rate_and_replaced_by_the_empty_one(tokenizer: Tokenizer, rate: float) -> None:
    c = conditioning(tokenizer, rate)
    arrays = c.prepare({"text": ["a red circle"] * 400})
    dropped = np.asarray(c.drop({k: jnp.asarray(v) for k, v in arrays.items()}, jax.random.key(1))["tokens"])
    null = c.null(1)["tokens"][0]
    gone = (dropped == null).all(1)
    assert abs(gone.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / 400)
    np.testing.assert_array_equal(dropped[~gone], arrays["tokens"][~gone])


@pytest.mark.parametrize("pad", ["[EOS]", {"__type": "AddedToken", "content": "[EOS]", "lstrip": False}])
def test_a_folder_pads_with_what_the_file_beside_the_tokenizer_says(tmp_path: Path, pad: Any) -> None:
    trained = Tokenizer.train(["a red square", "a blue disc"], 300, 8)
    (tmp_path / "tokenizer.json").write_text(trained.to_json())
    assert Tokenizer.pretrained(str(tmp_path), 8)(["a"])[0, -1] == trained.pad_id
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
    padded = Tokenizer.pretrained(str(tmp_path), 8)
    assert padded.pad_id == padded(["a"])[0, -1] != trained.pad_id
    assert Tokenizer.load(tmp_path / "tokenizer.json", 8).pad_id == trained.pad_id
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match=r"no tokenizer .*Expecting value"):
        Tokenizer.pretrained(str(tmp_path), 8)
