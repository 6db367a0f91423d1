"""Users' texts: every kind of file gives its documents, and every way to be wrong is one sentence."""

import builtins
import json
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet

from kullback.core.errors import ConfigError, DataError, MissingExtra
from kullback.data.text import held_out, read_documents
from kullback.data.tokenizer import train_byte_bpe

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(["[user] Why? [assistant] Because."] * 2, 270)


@pytest.fixture
def chatty(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    return tokenizer


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def table(path, records, **options):
    parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)
    return path


def paragraphs(count, size=300):
    return "".join(f"{index}: " + "word " * (size // 5) + "\n\n" for index in range(count))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT"])
@pytest.mark.parametrize("count", [1, 40, 2000])
def test_plain_text_comes_whole_in_pieces_of_bounded_size(tmp_path, name, count):
    text = paragraphs(count)
    (tmp_path / name).write_text(text, encoding="utf-8")
    pieces = list(read_documents(tmp_path / name))
    assert "".join(pieces) == text
    assert all(len(piece) <= 17_000 for piece in pieces)
    assert all(piece.endswith("\n\n") for piece in pieces)
    assert len(pieces) >= min(count // 4, 60)


def test_a_line_without_end_is_cut(tmp_path):
    text = "".join(str(index) for index in range(30_000))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_documents(tmp_path / "a.txt"))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 17_000


def test_line_ends_and_byte_order_marks_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["one\ntwo\n"]


def test_json_lines(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "zwei, ü", "more": 1}, {"text": "  "}])
    path.write_text(path.read_text() + "\n\n")
    assert list(read_documents(path)) == ["one", "zwei, ü"]
    assert list(read_documents(lines(tmp_path / "b.jsonl", [{"body": "one"}]), field="body")) == ["one"]


def test_parquet(tmp_path):
    records = [{"text": f"document {index}", "number": index} for index in range(700)]
    path = table(tmp_path / "a.parquet", records, row_group_size=100)
    assert list(read_documents(path)) == [record["text"] for record in records]


@pytest.mark.parametrize(("write", "name"), [(lines, "a.jsonl"), (table, "a.parquet")])
@pytest.mark.parametrize("field", ["messages", "conversation"])
def test_chats_go_through_the_template(tmp_path, chatty, write, name, field):
    path = write(tmp_path / name, [{field: CHAT, "id": 1}])
    chosen = {} if field == "messages" else {"field": field}
    assert list(read_documents(path, tokenizer=chatty, **chosen)) == ["[user] Why?\n[assistant] Because.\n"]


def test_a_folder_is_read_in_order_and_hidden_files_are_not(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text("second")
    lines(tmp_path / "a.jsonl", [{"text": "first"}])
    table(tmp_path / "deep" / "c.parquet", [{"text": "third"}])
    (tmp_path / "empty.txt").write_text("")
    for name in (".hidden.txt", ".git/config.txt", "picture.png"):
        (tmp_path / name).write_text("never")
    assert list(read_documents(tmp_path)) == ["first", "second", "third"]


def test_nothing_is_loaded_whole(tmp_path):
    text, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text(paragraphs(8000))
    lines(records, ({"text": f"{index} " + "word " * 200} for index in range(2500)))
    for path in (text, records):
        tracemalloc.start()
        assert sum(map(len, read_documents(path))) > 2_000_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 300_000


def refused(path, *messages, **options):
    with pytest.raises(DataError) as error:
        list(read_documents(path, **options))
    text = str(error.value)
    assert path.name in text
    assert "\n" not in text
    for message in messages:
        assert message in text


def test_what_is_missing_empty_or_unknown_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match=r"no\.txt does not exist"):
        read_documents(tmp_path / "no.txt")
    (tmp_path / "a.docx").write_text("?")
    with pytest.raises(DataError, match=r"a\.docx .* \.txt, \.md, \.jsonl.*\.parquet"):
        read_documents(tmp_path / "a.docx")
    with pytest.raises(DataError, match="no file of a known kind"):
        read_documents(tmp_path)


@pytest.mark.parametrize("content", ["", " \n\n \n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, "is empty")


def test_a_folder_of_empty_files_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    table(tmp_path / "b.parquet", [{"text": ""}])
    refused(tmp_path, "is empty")


def test_binary_files_are_refused(tmp_path):
    (tmp_path / "nul.txt").write_bytes(b"text\nmore\0text")
    refused(tmp_path / "nul.txt", "not text", "line 2")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    refused(tmp_path / "latin.txt", "not text in UTF-8")
    (tmp_path / "wide.txt").write_bytes("text".encode("utf-16"))
    refused(tmp_path / "wide.txt", "not text in UTF-8")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    refused(tmp_path / "bad.parquet", "not Parquet")
    path = table(tmp_path / "cut.parquet", [{"text": "one"}] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    refused(path, "not Parquet, or damaged")


@pytest.mark.parametrize(("write", "name"), [(lines, "a.jsonl"), (table, "a.parquet")])
def test_a_wrong_field_is_answered_with_those_that_are_there(tmp_path, write, name):
    path = write(tmp_path / name, [{"content": "one", "source": "two"}])
    refused(path, "'text'", "content", "source")
    refused(path, "content, source", "did you mean 'content'?", field="contents")
    path = write(tmp_path / name, [{"text": 3}])
    refused(path, "'text'", "int", "not text")


@pytest.mark.parametrize("line", ["{oops", "\x00\x01", '{"text": "a"} {"text": "b"}', "[" * 100_000])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    refused(tmp_path / "a.jsonl", "line 3", "not JSON")


def test_a_line_that_is_no_record_is_named(tmp_path):
    refused(lines(tmp_path / "a.jsonl", [{"text": "fine"}, ["text"]]), "line 2", "list")
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d a pair"}\n')
    refused(tmp_path / "a.jsonl", "line 1", "surrogate")


def test_chats_that_cannot_be_written_are_refused(tmp_path, tokenizer, chatty, monkeypatch):
    path = lines(tmp_path / "a.jsonl", [{"messages": CHAT}])
    refused(path, "line 1", "no chat template", tokenizer=None)
    for messages in ([], "text", [{"role": "user"}], ["Why?"]):
        refused(lines(tmp_path / "b.jsonl", [{"messages": messages}]), "line 1", "no chat", tokenizer=chatty)
    monkeypatch.setattr(chatty, "chat_template", "{{ raise_exception('roles must alternate') }}")
    refused(path, "line 1", "roles must alternate", tokenizer=chatty)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    refused(path, "line 1", "no chat template", tokenizer=tokenizer)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", [{"text": "one"}])
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"kullback\[parquet\]"):
        list(read_documents(path))


def halves(documents, share):
    return [list(held_out(iter(documents), share=share, inside=inside)) for inside in (True, False)]


@pytest.mark.parametrize("count", [40, 1000, 1001, 5000])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_both_halves_are_disjoint_complete_and_in_order(count, share):
    documents = [f"document {index}" for index in range(count)]
    inside, outside = halves(documents, share)
    assert not set(inside) & set(outside)
    for half in (inside, outside):
        members = set(half)
        assert [text for text in documents if text in members] == half
    assert len(inside) + len(outside) == count
    deviation = (count * share * (1 - share)) ** 0.5
    assert abs(len(inside) - share * count) <= (1 if count <= 1000 else 6 * deviation)
    assert halves(documents, share) == [inside, outside]


@pytest.mark.parametrize("count", [60, 2000])
def test_copies_fall_on_one_side(count):
    documents = [f"document {index // 2}" for index in range(count)]
    inside, outside = halves(documents, 0.2)
    assert inside
    assert not set(inside) & set(outside)
    by_place = documents[::5], [text for index, text in enumerate(documents) if index % 5]
    assert set(by_place[0]) & set(by_place[1])  # a split by place alone is what this is there to find


def test_long_streams_keep_their_sides_when_documents_are_added():
    documents = [f"document {index}" for index in range(2000)]
    before, after = halves(documents, 0.1)[0], halves(["new", *documents, "newer"], 0.1)[0]
    assert [text for text in after if text.startswith("document")] == before


def test_a_single_text_file_can_be_split(tmp_path):
    (tmp_path / "a.txt").write_text(paragraphs(60))
    inside, outside = halves(list(read_documents(tmp_path / "a.txt")), 0.1)
    assert inside
    assert len(outside) > 4 * len(inside)


def test_long_streams_are_not_held():
    tracemalloc.start()
    documents = (f"{index} " + "word " * 200 for index in range(20_000))
    assert sum(1 for _ in held_out(documents, share=0.1, inside=True)) > 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


def test_shares_out_of_range_are_refused():
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            held_out(["a"], share=share, inside=True)
