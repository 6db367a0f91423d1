"""A job's texts: read, tokenised and packed once into the run directory, streamed all the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kullback.core.errors import DataError
from kullback.data.corpora import corpus
from kullback.data.packing import PackedTokens, load_packed, pack
from kullback.data.text import held_out, read_documents
from kullback.jobs._training import Listener

__all__ = ["Texts", "pack_texts"]


@dataclass(frozen=True, slots=True)
class Texts:
    """Packed blocks for training and for validation."""

    train: PackedTokens
    validation: Any


def pack_texts(config: Any, tokenizer: Any, folder: Path, listen: Listener) -> Texts:
    """The packed texts of a TextConfig, made in `folder` unless they are there already.

    Raises DataError for input that cannot be read or is too short to fill a block.
    """
    packed = {}
    for split in ("train", "validation"):
        place = folder / split
        if not place.exists():
            listen({"kind": "stage", "text": f"the text for {'training' if split == 'train' else split}"})
            pack(_documents(config, split, tokenizer), tokenizer, config.length, place)
        packed[split] = load_packed(place)
        if not len(packed[split]):
            raise DataError(
                f"{config.train or 'the text'} gives {packed[split].tokens} tokens for {split} and a block needs "
                f"{config.length}: give more text, or lower data.length"
            )
    few = min(len(packed["validation"]), config.validation_blocks)
    return Texts(packed["train"], [packed["validation"][index] for index in range(few)])


def _documents(config: Any, split: str, tokenizer: Any) -> Iterable[str]:
    if not config.train:
        prose = corpus("prose")
        return prose.train if split == "train" else prose.validation
    if config.validation:
        path = config.train if split == "train" else config.validation
        return read_documents(Path(path), field=config.field, tokenizer=tokenizer)
    documents = read_documents(Path(config.train), field=config.field, tokenizer=tokenizer)
    return held_out(documents, share=config.holdout, inside=split == "validation")
