"""The corpora: large enough, the same every time, and nothing of the test split in the train split."""

import hashlib
import os
import subprocess
import sys

import pytest

from kullback.core.errors import ConfigError
from kullback.data import corpora
from kullback.data.corpora import corpus, split_of


@pytest.fixture(scope="module")
def prose():
    return corpus("prose")


@pytest.fixture(scope="module")
def code():
    return corpus("code")


def shared(some, others):
    """The share of the long paragraphs of some documents that are in others as well."""

    def paragraphs(documents):
        parts = [" ".join(part.split()) for text in documents for part in text.split("\n\n")]
        return [part for part in parts if len(part) >= 60]

    known = set(paragraphs(others))
    found = paragraphs(some)
    return sum(part in known for part in found) / len(found)


def test_prose_has_no_copies_across_splits(prose):
    assert shared(prose.validation + prose.test, prose.train) == 0
    assert shared(prose.validation, prose.test) == 0


def test_the_search_for_copies_bites(monkeypatch):
    """Topics as they are, split by their names, leak: the same passages stand under several."""

    def topics():
        from pydoc_data.topics import topics

        yield from topics.items()

    monkeypatch.setattr(corpora, "_sections", topics)
    raw = corpus("prose")
    assert shared(raw.validation + raw.test, raw.train) > 0.05


def test_code_has_few_copies_across_splits(code):
    assert shared(code.validation + code.test, code.train) < 0.03


@pytest.mark.parametrize(("name", "least"), [("prose", 300_000), ("code", 5_000_000)])
def test_size_and_shares(name, least, request):
    splits = request.getfixturevalue(name)
    sizes = [sum(map(len, part)) for part in (splits.train, splits.validation, splits.test)]
    assert sum(sizes) > least
    assert sizes[0] > 0.7 * sum(sizes)
    assert min(sizes) > 0.04 * sum(sizes)
    documents = splits.train + splits.validation + splits.test
    assert len(set(documents)) == len(documents)
    assert all(document.strip() for document in documents)


def test_code_is_source(code):
    assert sum("def " in text for text in code.train) > 0.7 * len(code.train)


def test_the_same_in_another_process(prose):
    code = (
        "import hashlib; from kullback.data.corpora import corpus; c = corpus('prose');"
        "print(hashlib.sha256(repr((c.train, c.validation, c.test)).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    ours = hashlib.sha256(repr((prose.train, prose.validation, prose.test)).encode()).hexdigest()
    assert other.stdout.strip() == ours


def test_a_split_follows_its_share_and_no_other_name():
    names = [f"document {index}" for index in range(20_000)]
    found = [split_of(name, {"a": 0.2, "b": 0.05}) for name in names]
    for split, share in (("a", 0.2), ("b", 0.05), ("train", 0.75)):
        deviation = (share * (1 - share) / len(names)) ** 0.5
        assert abs(found.count(split) / len(names) - share) < 6 * deviation
    assert found[:100] == [split_of(name, {"a": 0.2, "b": 0.05}) for name in names[:100]]


def test_another_name_is_refused():
    with pytest.raises(ConfigError, match="poetry"):
        corpus("poetry")
