"""The byte-level tokenizer gives every text back, and is the same whenever it is trained on the same texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kullback.core.errors import ConfigError
from kullback.data.corpora import corpus
from kullback.data.tokenizer import END, train_byte_bpe

TEXTS = corpus("prose").validation
TOKENIZER = train_byte_bpe(TEXTS, 400)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@pytest.mark.parametrize("text", ["", " ", "a  b", " .,!? don 't", "\r\n\t\0", "e\u0301", "👩‍👩‍👧", f"a{END}b"])
def test_hard_texts_come_back(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_unseen_bytes_are_there_and_the_size_is_kept():
    assert len(TOKENIZER) == 400
    assert TOKENIZER.eos_token_id == 0
    assert TOKENIZER.convert_ids_to_tokens(0) == END
    assert len(train_byte_bpe([], 300)) == 257
    assert train_byte_bpe([], 300).decode(train_byte_bpe([], 300)("ж").input_ids) == "ж"


def test_the_same_texts_give_the_same_tokens():
    again = train_byte_bpe(iter(TEXTS), 400)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    other = train_byte_bpe(TEXTS[1:], 400)
    assert other.backend_tokenizer.to_str() != TOKENIZER.backend_tokenizer.to_str()


def test_it_shortens_what_it_was_trained_on():
    text = TEXTS[0]
    assert len(TOKENIZER(text).input_ids) < 0.7 * len(text.encode())


def test_it_is_saved_and_loaded(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.eos_token_id == 0
    assert all(loaded(text).input_ids == TOKENIZER(text).input_ids for text in TEXTS)


def test_too_small_a_size_is_refused():
    with pytest.raises(ConfigError, match="257"):
        train_byte_bpe(TEXTS, 256)
