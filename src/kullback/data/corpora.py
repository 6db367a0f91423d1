"""Texts that are on every machine: the prose and the sources of Python's standard library, in fixed splits.

They depend on the version of Python: the same version gives the same corpus everywhere, another a similar one.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kullback.core.errors import ConfigError

__all__ = ["Corpus", "corpus", "split_of"]

_SHARES = {"validation": 0.1, "test": 0.1}  # and the rest is for training
_TITLE = re.compile(r"^(?=\S)(.+)\n([=*~^-])\2{2,}$", re.MULTILINE)
_PIECE = 4000  # characters of a document of prose, about
_LONG = 60  # characters from which on the same paragraph in two places is a copy and no coincidence
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents for training, validation and test; none is in two of them."""

    train: list[str]
    validation: list[str]
    test: list[str]


def corpus(name: Literal["prose", "code"]) -> Corpus:
    """The corpus of that name, each document in the split that the hash of its name gives it; 8 to 1 to 1.

    "prose": the sections of the language reference in `pydoc_data.topics`, about 0.4 MB, each paragraph once though
    topics repeat each other; "code": the modules of the standard library, about 9 MB, without tests, tables of
    characters, and files made at installation. Raises ConfigError for another name.

    >>> prose = corpus("prose")
    >>> len(prose.train) > 5 * len(prose.test), set(prose.train) & set(prose.validation + prose.test)
    (True, set())
    """
    sources = {"prose": _sections, "code": _modules}
    if name not in sources:
        raise ConfigError(f'the corpora are "prose" and "code", not {name!r}')
    documents = dict(sources[name]())
    unique = {text: key for key, text in reversed(documents.items())}
    found: Mapping[str, list[str]] = {"train": [], "validation": [], "test": []}
    for key, text in documents.items():
        if unique[text] == key:
            found[split_of(key)].append(text)
    return Corpus(**found)


def split_of(name: str, shares: Mapping[str, float] = _SHARES, *, rest: str = "train") -> str:
    """The split that the hash of a document's name puts it in: one of `shares` with that probability, or `rest`.

    >>> [split_of(name, {"test": 0.5}) for name in "abc"]
    ['train', 'test', 'test']
    """
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return rest


def _sections() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    # The longest first: it keeps the passages that shorter topics repeat, and they fall away rather than it in parts.
    for topic, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        for title, section in _by_title(text):
            paragraphs = section.split("\n\n")
            new = [paragraph for paragraph in paragraphs if _words(paragraph) not in seen]
            seen.update(words for paragraph in paragraphs if len(words := _words(paragraph)) >= _LONG)
            if sum(map(len, new)) > len(section) / 2:
                for number, piece in enumerate(_pieces(new)):
                    yield f"{topic}: {title} {number}", piece


def _by_title(text: str) -> Iterator[tuple[str, str]]:
    starts = [*(match.start() for match in _TITLE.finditer(text)), len(text)]
    for start, end in zip([0, *starts[:-1]] if starts[0] else starts, starts if starts[0] else starts[1:]):
        section = text[start:end].strip("\n")
        if section:
            yield section.partition("\n")[0], section


def _pieces(paragraphs: list[str]) -> Iterator[str]:
    size, piece = 0, []
    for paragraph in paragraphs:
        piece.append(paragraph)
        size += len(paragraph)
        if size >= _PIECE:
            yield "\n\n".join(piece)
            size, piece = 0, []
    if piece:
        yield "\n\n".join(piece)


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        made = name.name.startswith("_sysconfigdata") or name.parts[0].startswith("config-")
        if made or _SKIPPED & set(name.parts):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield name.as_posix(), text
