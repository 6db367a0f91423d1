"""Records of JSONL and Parquet files, one after the other, each with the words that say where it stands."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kullback.core.errors import DataError, MissingExtra

__all__ = ["json_records", "known_files", "parquet_records", "read_records"]

_ENDINGS = (".jsonl", ".ndjson", ".parquet")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Columns = Callable[[Sequence[str]], Sequence[str] | None]


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a .jsonl, .ndjson or .parquet file, or of a folder of them in the order of their names.

    The path and the kinds of its files are checked at once, contents as they are read. Raises DataError, naming the
    file and the line or row, for what is missing, empty or malformed; MissingExtra for Parquet without pyarrow.
    """
    files = known_files(Path(path).expanduser(), _ENDINGS, "records")
    return _records(files, Path(path))


def _records(files: list[Path], path: Path) -> Iterator[tuple[str, Any]]:
    empty = True
    for file in files:
        for found in (parquet_records if file.suffix.lower() == ".parquet" else json_records)(file):
            empty = False
            yield found
    if empty:
        raise DataError(f"{path} is empty: there is no record in it")


def known_files(path: Path, endings: tuple[str, ...], content: str) -> list[Path]:
    """The files of a path whose names end as wanted: itself, or those of a folder. DataError where there is none."""
    try:
        path.stat()
    except FileNotFoundError as error:
        kinds = "text, JSONL or Parquet" if ".txt" in endings else "JSONL or Parquet"
        raise DataError(f"{path} does not exist: name a file of {kinds}, or a folder of them") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not path.is_dir():
        if path.suffix.lower() not in endings:
            raise DataError(f"{path} is of a kind that is not known: {content} ends in {', '.join(endings)}")
        return [path]
    inside = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    files = [file for file in inside if file.suffix.lower() in endings]
    if not files:
        raise DataError(f"{path} has no file of a known kind: {content} ends in {', '.join(endings)}")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line that is not blank. Raises DataError for one that is not JSON in UTF-8."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"line {number} of {path}"
                if number == 1 and line.startswith(_UTF_16):
                    raise DataError(f"{where} is not text in UTF-8 (it begins as UTF-16 does): convert the file")
                try:
                    record = json.loads(line)
                except UnicodeDecodeError as error:
                    raise DataError(f"{where} is not text in UTF-8 ({error.reason}): convert the file") from error
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where} is not JSON: one record a line is expected") from error
                yield where, record
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def parquet_records(path: Path, columns: Columns = lambda names: None) -> Iterator[tuple[str, Any]]:
    """(where, record) of each row; columns: picks, from the file's names, those that are read, or None for all.

    Raises DataError for a file that is not sound, MissingExtra without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", extra="parquet") from error
    try:
        with parquet.ParquetFile(path) as file:
            chosen, row = columns(file.schema_arrow.names), 0
            for batch in file.iter_batches(batch_size=256, columns=None if chosen is None else list(chosen)):
                for record in batch.to_pylist():
                    row += 1
                    yield f"row {row} of {path}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not Parquet, or damaged: write it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
