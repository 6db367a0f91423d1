"""Users' texts as a stream of documents: plain text, JSONL, Parquet, or a folder of any of these.

Nothing is loaded whole: a plain text comes in pieces of bounded size, the other kinds record by record.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from kullback.core.errors import ConfigError, DataError
from kullback.data.records import json_records, known_files, parquet_records

__all__ = ["held_out", "read_documents", "whole_characters"]

_LARGEST, _SMALLEST = 1 << 13, 1 << 10  # characters of a piece of plain text, about
_PIECES = 64  # of a small text, so that there is something to hold out
_FEW, _FEW_CHARACTERS = 1000, 1 << 24  # documents that `held_out` looks at together
_ENDINGS = (".txt", ".md", ".jsonl", ".ndjson", ".parquet")


def read_documents(path: Path, *, field: str = "text", tokenizer: Any = None) -> Iterator[str]:
    """The documents of a file or folder, one after the other, in the order of the files' names.

    .txt and .md come in pieces of 1,000 to 8,000 characters that end with a paragraph where they can; .jsonl and
    .parquet give `field` of each record or, where records have `messages`, the chat as the tokenizer's template writes
    it. Hidden files and blank documents are passed over. The path and the kinds of its files are checked at once,
    contents as they are read.

    Raises DataError, naming the file and the line or row, for what is missing, empty, binary or malformed, or has no
    such field; MissingExtra for Parquet without pyarrow.
    """
    files = known_files(Path(path).expanduser(), _ENDINGS, "text")
    return _documents(files, Path(path), field, tokenizer)


def held_out(documents: Iterable[str], *, share: float, inside: bool) -> Iterator[str]:
    """The documents of the share held out (inside), or all the others: the same ones every time, copies on one side.

    Of up to 1,000 documents every 1 / share-th is held out, so that a few are enough; of more those whose text has a
    hash below the share, so that none need be remembered. Raises ConfigError for a share outside (0, 1).

    >>> list(held_out("abcdaefgh", share=0.25, inside=True)), list(held_out("abcdaefgh", share=0.25, inside=False))
    (['b', 'f'], ['a', 'c', 'd', 'a', 'e', 'g', 'h'])
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"the share held out lies in (0, 1), got {share}")
    return _held_out(iter(documents), share, inside)


def _held_out(documents: Iterator[str], share: float, inside: bool) -> Iterator[str]:
    first: list[str] = []
    size = 0
    while len(first) < _FEW and size < _FEW_CHARACTERS and (document := next(documents, None)) is not None:
        first.append(document)
        size += len(document)
    following = next(documents, None)
    if following is None:
        # In the middle of each stretch of 1 / share distinct documents.
        places = {text: index for index, text in enumerate(dict.fromkeys(first))}
        steps = {text: math.floor(index * share + 0.5) for text, index in places.items()}
        yield from (text for text in first if (math.floor((places[text] + 1) * share + 0.5) > steps[text]) == inside)
        return
    for document in chain(first, [following], documents):
        place = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") / 2**64
        if (place < share) == inside:
            yield document


def _documents(files: list[Path], path: Path, field: str, tokenizer: Any) -> Iterator[str]:
    empty = True
    for file in files:
        for document in _readers()[file.suffix.lower()](file, field, tokenizer):
            if document.strip():
                empty = False
                yield document
    if empty:
        raise DataError(f"{path} is empty: there is no text in it")


def _readers() -> dict[str, Callable[[Path, str, Any], Iterator[str]]]:
    return {".txt": _plain, ".md": _plain, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}


def _plain(path: Path, field: str, tokenizer: Any) -> Iterator[str]:
    least = max(_SMALLEST, min(_LARGEST, path.stat().st_size // _PIECES))
    piece: list[str] = []
    size = 0
    for line in _lines(path):
        # a line without end is cut as well, so that no file is held whole
        for start in range(0, len(line), _LARGEST):
            part = line[start : start + _LARGEST]
            piece.append(part)
            size += len(part)
            if size >= 2 * _LARGEST or (size >= least and not part.strip()):
                yield "".join(piece)
                piece, size = [], 0
    if (rest := "".join(piece)).strip():
        yield rest


def _lines(path: Path) -> Iterator[str]:
    """The lines, each of at most a mebibyte; DataError where they are not text."""
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:
            number = 0
            while line := file.readline(1 << 20):
                number += 1
                if "\0" in line:
                    raise DataError(f"{path} is not text in UTF-8: line {number} has a NUL byte, as binary files do")
                yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error.reason}): convert it, or name another file") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _json_lines(path: Path, field: str, tokenizer: Any) -> Iterator[str]:
    for where, record in json_records(path):
        yield _text(record, field, tokenizer, where)


def _parquet(path: Path, field: str, tokenizer: Any) -> Iterator[str]:
    def columns(names: Sequence[str]) -> list[str]:
        column = field if field in names else "messages" if "messages" in names else None
        if column is None:
            raise DataError(_no_field(field, list(names), str(path)))
        return [column]

    for where, record in parquet_records(path, columns):
        yield _text(record, field, tokenizer, where)


def _text(record: Any, field: str, tokenizer: Any, where: str) -> str:
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is a {type(record).__name__}: a record with the field {field!r} is expected")
    if field in record and not isinstance(record[field], list):
        if not isinstance(record[field], str):
            raise DataError(f"{field!r} in {where} is a {type(record[field]).__name__}, not text: name another field")
        return whole_characters(record[field], where)
    messages = record.get(field, record.get("messages"))
    if messages is None:
        raise DataError(_no_field(field, list(record), where))
    return _chat(messages, tokenizer, where)


def _chat(messages: Any, tokenizer: Any, where: str) -> str:
    sound = isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages)
    if not sound or not messages or not all({"role", "content"} <= message.keys() for message in messages):
        raise DataError(f"the messages in {where} are no chat: a list of records with role and content is expected")
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"{where} is a chat, and the tokenizer has no chat template: set one, or give plain text")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template can raise whatever it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the chat template refuses {where}: {reason}") from error
    return whole_characters(text, where)


def whole_characters(text: str, where: str) -> str:
    """The text as it is; DataError where it holds half a surrogate pair, which JSON can write and no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} has half a surrogate pair, which is no character: repair or remove it") from error
    return text


def _no_field(field: str, names: list[Any], where: str) -> str:
    near = get_close_matches(field, [str(name) for name in names], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where} has no field {field!r}: its fields are {', '.join(map(str, names)) or 'none'}{hint}"
