"""Real text and arrays on hand, readers for your own, tokenisers, packing, and the cache of small trained models."""

from kullback.data.arrays import digits
from kullback.data.cache import cached
from kullback.data.corpora import Corpus, corpus
from kullback.data.examples import Example, read_examples, split_examples
from kullback.data.long_tail import long_tail_counts, make_long_tail, many_medium_few
from kullback.data.packing import PackedTokens, load_packed, pack
from kullback.data.records import read_records
from kullback.data.text import held_out, read_documents
from kullback.data.tokenizer import train_byte_bpe

__all__ = [
    "Corpus",
    "Example",
    "PackedTokens",
    "cached",
    "corpus",
    "digits",
    "held_out",
    "load_packed",
    "long_tail_counts",
    "make_long_tail",
    "many_medium_few",
    "pack",
    "read_documents",
    "read_examples",
    "read_records",
    "split_examples",
    "train_byte_bpe",
]
