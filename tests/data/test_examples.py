"""Examples for alignment: every way the ecosystem writes them, and every way they can be wrong."""

import json

import pytest

from kullback.core.errors import DataError
from kullback.data.examples import Example, read_examples, split_examples
from kullback.data.tokenizer import train_byte_bpe

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))


@pytest.fixture
def tokenizer():
    found = train_byte_bpe(["text"], 257)
    found.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return found


def write(folder, *records, name="data.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "4", "rejected": "5"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_chats_in_every_form_are_one_pair(record, tokenizer, tmp_path):
    (found,) = read_examples(write(tmp_path, record), wanted="pair", tokenizer=tokenizer)
    assert found == Example(prompt="<user>2+2?</><assistant>", chosen="4</>", rejected="5</>", chat=True)


def test_plain_records_keep_what_else_they_have(tmp_path):
    record = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "answer": 4}
    (pair,) = read_examples(write(tmp_path, record), wanted="pair")
    assert (pair.prompt, pair.chosen, pair.rejected, pair.others) == ("2+2=", "4", "5", {"answer": 4})
    (learned,) = read_examples(write(tmp_path, record), wanted="completion")
    assert learned.completion == "4"
    (asked,) = read_examples(write(tmp_path, {"prompt": "2+2=", "answer": 4}), wanted="prompt")
    assert asked.completion is None


def test_the_last_message_is_the_completion(tokenizer, tmp_path):
    path = write(tmp_path, {"messages": [USER, GOOD]})
    (found,) = read_examples(path, wanted="completion", tokenizer=tokenizer)
    assert (found.prompt, found.completion) == ("<user>2+2?</><assistant>", "4</>")


def test_parquet_has_the_same_examples(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    record = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "answer": 4}
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "data.parquet")
    found = list(read_examples(tmp_path / "data.parquet", wanted="pair"))
    assert found == list(read_examples(write(tmp_path, record), wanted="pair"))


@pytest.mark.parametrize(
    ("record", "wanted", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "pair", "no 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "pair", "prefers a completion to itself"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "pair", "empty 'rejected'"),
        ({"prompt": "", "completion": "b"}, "completion", "empty prompt"),
        ({"prompt": "a"}, "completion", "no 'completion'"),
        ({"question": "a"}, "prompt", "no 'prompt'.*its fields are 'question'"),
        ({"prompt": "a", "completion": "\ud800b"}, "completion", "half a surrogate pair"),
        ({"prompt": 3}, "prompt", "is a int"),
        ({"prompt": [USER]}, "prompt", "no chat template"),
        ({"messages": [{"role": "user"}]}, "prompt", "no chat"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "pair", "in common"),
        (["a"], "prompt", "is a list"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(record, wanted, words, tmp_path):
    path = write(tmp_path, record)
    with pytest.raises(DataError, match=words) as raised:
        list(read_examples(path, wanted=wanted))
    assert "line 1 of" in str(raised.value)


def test_files_that_are_no_records(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_examples(tmp_path / "gone.jsonl", wanted="prompt")
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(DataError, match="not known"):
        read_examples(tmp_path / "text.txt", wanted="prompt")
    for encoding, words in (("latin-1", "line 2"), ("utf-16", "begins as UTF-16 does")):
        lines = '{"prompt": "a"}\n{"prompt": "Grüße"}\n'
        (tmp_path / "other.jsonl").write_bytes(lines.encode(encoding))
        with pytest.raises(DataError, match=f"{words}.*is not text in UTF-8" if "line" in words else words):
            list(read_examples(tmp_path / "other.jsonl", wanted="prompt"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        list(read_examples(tmp_path / "empty.jsonl", wanted="prompt"))


def test_a_prompt_and_its_pairs_stay_on_one_side():
    examples = [Example(prompt=str(i // 3), chosen=str(i), rejected="x") for i in range(60)]
    training, validation = split_examples(examples, share=0.1)
    assert len(training) == 54
    assert not {e.prompt for e in training} & {e.prompt for e in validation}
    with pytest.raises(DataError, match="holds out"):
        split_examples(examples[:3], share=0.1)
