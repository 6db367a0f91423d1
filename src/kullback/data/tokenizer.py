"""Tokenisers trained on the spot: byte-level byte-pair encoding, for any text in any script."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kullback.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["END", "train_byte_bpe"]

END = "<|end|>"


def train_byte_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens: the end token 0, the 256 bytes, then merges by frequency.

    Every text comes back from its tokens unchanged, and the same texts give the same tokens. It has fewer than `size`
    where no pair is left that occurs twice. Raises ConfigError for a size below 257.

    >>> tokenizer = train_byte_bpe(["the cat and the dog and the bird"] * 2, 270)
    >>> tokenizer.tokenize("the cat")
    ['the', 'Ġcat']
    >>> tokenizer.decode(tokenizer("Grüße, 世界").input_ids)
    'Grüße, 世界'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if size < 257:
        raise ConfigError(f"a byte-level tokenizer has at least 257 tokens, bytes and an end token, got size {size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
