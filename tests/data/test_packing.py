"""Packed tokens are the documents' tokens end to end, whole or not at all, and read from disk alone."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kullback.core.errors import ConfigError, DataError
from kullback.data.packing import load_packed, pack
from kullback.data.tokenizer import train_byte_bpe

DOCUMENTS = ["one fine day", "", "Grüße, 世界", "the end of <|end|> it all", "x" * 500, "one more day\n\n"] * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(["one fine day, and one more day", "the end of it all"] * 2, 280)


def naive(documents, tokenizer):
    return [token for text in documents for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]


def unpacked(packed):
    return [token for index in range(len(packed)) for token in packed[index]["input_ids"].tolist()]


@pytest.mark.parametrize("length", [1, 7, 128])
def test_packing_is_concatenation(tmp_path, tokenizer, length):
    packed = pack(iter(DOCUMENTS), tokenizer, length, tmp_path / "packed")
    expected = naive(DOCUMENTS, tokenizer)
    assert packed.tokens == len(expected)
    assert packed.documents == len(DOCUMENTS)
    assert len(packed) == len(expected) // length
    assert unpacked(packed) == expected[: len(packed) * length]
    assert packed[0]["input_ids"].dtype == torch.int64


def test_the_comparison_bites(tmp_path, tokenizer):
    packed = pack(DOCUMENTS, tokenizer, 1, tmp_path / "packed")
    without_ends = [token for text in DOCUMENTS for token in tokenizer(text).input_ids]
    assert unpacked(packed) != without_ends
    assert unpacked(packed) != naive(reversed(DOCUMENTS), tokenizer)


def test_a_long_document_is_tokenised_as_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("kullback.data.packing._BATCH", 100)
    packed = pack(DOCUMENTS, tokenizer, 1, tmp_path / "packed")
    assert unpacked(packed) == naive(DOCUMENTS, tokenizer)


def test_blocks_are_a_dataset(tmp_path, tokenizer):
    packed = pack(DOCUMENTS, tokenizer, 16, tmp_path / "packed")
    assert len(list(packed)) == len(packed)
    assert torch.equal(packed[-1]["input_ids"], packed[len(packed) - 1]["input_ids"])
    with pytest.raises(IndexError):
        packed[len(packed)]
    batches = list(DataLoader(packed, batch_size=4))
    assert batches[0]["input_ids"].shape == (4, 16)
    packed[0]["input_ids"].zero_()  # a copy: the file stays as it is
    assert packed[0]["input_ids"].any()


def test_a_dataset_travels_without_its_tokens(tmp_path, tokenizer):
    packed = pack(DOCUMENTS * 20, tokenizer, 16, tmp_path / "packed")
    content = pickle.dumps(packed)
    assert len(content) < 1000
    assert unpacked(pickle.loads(content)) == unpacked(packed)  # noqa: S301


def test_no_documents_give_no_blocks(tmp_path, tokenizer):
    pack([], tokenizer, 16, tmp_path / "packed")
    packed = load_packed(tmp_path / "packed")
    assert (len(packed), packed.tokens) == (0, 0)


def test_large_vocabularies_take_wider_numbers(tmp_path, tokenizer):
    class Shifted:
        eos_token_id = 70_000

        def __len__(self):
            return 70_001

        def __call__(self, texts, **options):
            return {"input_ids": [[69_999] * len(text) for text in texts]}

    packed = pack(["ab", "c"], Shifted(), 5, tmp_path / "packed")
    assert packed[0]["input_ids"].tolist() == [69_999, 69_999, 70_000, 69_999, 70_000]


def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, monkeypatch):
    def peak(count):
        tracemalloc.start()
        try:
            pack(("one fine day " * 200 for _ in range(count)), tokenizer, 32, tmp_path / str(count))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr("kullback.data.packing._BATCH", 1 << 15)
    small = peak(30)
    assert peak(300) < 1.25 * small
    monkeypatch.setattr("kullback.data.packing._BATCH", 1 << 30)  # the same check on all texts held at once
    assert peak(300) > 4 * small


def test_a_failing_stream_leaves_nothing(tmp_path, tokenizer):
    def broken():
        yield from DOCUMENTS
        raise DataError("line 7 is not JSON")

    with pytest.raises(DataError, match="line 7"):
        pack(broken(), tokenizer, 16, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_damage_is_one_sentence(tmp_path, tokenizer):
    folder = tmp_path / "packed"
    with pytest.raises(DataError, match="pack the text first"):
        load_packed(folder)

    def damaged(message):
        with pytest.raises(DataError, match=message):
            load_packed(folder)
        pack(DOCUMENTS, tokenizer, 16, folder)

    pack(DOCUMENTS, tokenizer, 16, folder)
    content = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(content[:-2])
    damaged("bytes and its index says")
    (folder / "tokens.bin").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    damaged("has changed")
    (folder / "tokens.bin").unlink()
    damaged("0 bytes")
    (folder / "index.json").write_text("{")
    damaged("damaged")
    (folder / "index.json").write_text("[]")
    damaged("damaged")
    index = json.loads((folder / "index.json").read_text())
    for change in ({"length": 0}, {"tokens": "9"}, {"dtype": "float32"}, {"format": 99}):
        (folder / "index.json").write_text(json.dumps({**index, **change}))
        damaged("damaged or of another version")


def test_what_cannot_work_is_refused(tmp_path, tokenizer):
    class Endless:
        eos_token_id = None

    with pytest.raises(DataError, match="no end token"):
        pack(DOCUMENTS, Endless(), 16, tmp_path / "packed")
    with pytest.raises(ConfigError, match="length=0"):
        pack(DOCUMENTS, tokenizer, 0, tmp_path / "packed")


def test_the_file_is_flat_and_small(tmp_path, tokenizer):
    packed = pack(DOCUMENTS, tokenizer, 16, tmp_path / "packed")
    ids = np.fromfile(tmp_path / "packed" / "tokens.bin", dtype="<u2")
    assert ids.tolist() == naive(DOCUMENTS, tokenizer)
    assert len(ids) == packed.tokens
