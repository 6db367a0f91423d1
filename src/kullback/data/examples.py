"""Examples for alignment as the ecosystem writes them: prompts with answers, completions, or preference pairs.

A record has `prompt` with any of `completion`, `chosen` and `rejected`, as text or as chat messages; or `messages`, a
chat whose last message is the completion; or `chosen` and `rejected` as whole chats that begin alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kullback.core.errors import DataError
from kullback.data.records import read_records
from kullback.data.text import held_out, whole_characters

__all__ = ["Example", "Wanted", "read_examples", "split_examples"]

Wanted = Literal["prompt", "completion", "pair"]

_TEXTS = ("completion", "chosen", "rejected")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One prompt as the model is given it, with what the record says about it.

    chat: the texts come from a chat template, which has written the special tokens already; others: the record's
    remaining fields, for reward functions.
    """

    prompt: str
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    chat: bool = False
    others: Mapping[str, Any] = field(default_factory=dict)


def read_examples(path: Path, *, wanted: Wanted, tokenizer: Any = None) -> Iterator[Example]:
    """The examples of a JSONL or Parquet file, or of a folder of them, that have what is wanted.

    A pair serves as a completion too: its chosen one. tokenizer: writes chats with its template. Raises DataError,
    naming the line or row, for a record without the fields, an empty prompt or completion, a pair of equal completions,
    and a chat that the tokenizer cannot write; and what read_records raises.
    """
    records = read_records(path)
    return (_example(record, where, wanted, tokenizer) for where, record in records)


def split_examples(examples: Iterable[Example], *, share: float) -> tuple[list[Example], list[Example]]:
    """(training, validation): the share of the distinct prompts that is held out with all their examples.

    >>> training, validation = split_examples([Example(prompt=str(i)) for i in range(10)], share=0.2)
    >>> len(training), [example.prompt for example in validation]
    (8, ['2', '7'])
    """
    known = list(examples)
    outside = set(held_out(dict.fromkeys(example.prompt for example in known), share=share, inside=True))
    if not 0 < len(outside) < len({example.prompt for example in known}):
        raise DataError(
            f"a share of {share} holds out {len(outside)} of {len({e.prompt for e in known})} distinct prompts: give "
            "more prompts, or a validation file"
        )
    return [e for e in known if e.prompt not in outside], [e for e in known if e.prompt in outside]


def _example(record: Any, where: str, wanted: Wanted, tokenizer: Any) -> Example:
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is a {type(record).__name__}: a record with the field 'prompt' is expected")
    fields = _unfolded(record, where)
    _check_fields(fields, where, wanted, list(record))
    chat = isinstance(fields["prompt"], list)
    texts = _chat_texts(fields, where, tokenizer) if chat else _plain_texts(fields, where)
    if not texts["prompt"].strip():
        raise DataError(f"{where} has an empty prompt: remove the record or fill it in")
    for name in _TEXTS:
        if texts.get(name) is not None and not texts[name].strip():
            raise DataError(f"{where} has an empty {name!r}: remove the record or fill it in")
    for text in texts.values():
        if text is not None:
            whole_characters(text, where)
    if wanted == "pair" and texts["chosen"] == texts["rejected"]:
        raise DataError(f"{where} prefers a completion to itself: chosen and rejected are equal, remove the record")
    if wanted == "completion" and texts.get("completion") is None:
        texts["completion"] = texts["chosen"]
    others = {str(name): value for name, value in record.items() if name not in ("prompt", "messages", *_TEXTS)}
    return Example(chat=chat, others=others, **texts)


def _unfolded(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """prompt and texts, where a record has them folded into whole chats."""
    fields = {name: record[name] for name in ("prompt", *_TEXTS) if record.get(name) is not None}
    if "prompt" in fields:
        return fields
    if record.get("messages") is not None:
        messages = _messages(record["messages"], where)
        if messages[-1]["role"] == "assistant" and len(messages) > 1:
            return {"prompt": messages[:-1], "completion": messages[-1:]}
        return {"prompt": messages}
    chats = [fields.get(name) for name in ("chosen", "rejected")]
    if all(isinstance(chat, list) for chat in chats):
        chosen, rejected = (_messages(chat, where) for chat in chats)
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == 0:
            raise DataError(f"the chats chosen and rejected in {where} have no message in common to be the prompt")
        return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return fields


def _check_fields(fields: Mapping[str, Any], where: str, wanted: Wanted, names: Sequence[Any]) -> None:
    if "prompt" not in fields:
        known = ", ".join(map(repr, names)) or "none"
        raise DataError(f"{where} has no 'prompt', nor a chat in 'messages': its fields are {known}")
    missing = [name for name in ("chosen", "rejected") if name not in fields] if wanted == "pair" else []
    if missing:
        raise DataError(f"{where} is no preference pair: it has no {' and no '.join(map(repr, missing))}")
    if wanted == "completion" and "completion" not in fields and "chosen" not in fields:
        raise DataError(f"{where} has no 'completion' (nor 'chosen', nor a last message of the assistant) to learn")


def _plain_texts(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name, value in fields.items():
        if not isinstance(value, str):
            raise DataError(f"{name!r} in {where} is a {type(value).__name__}, and its prompt is text: give both alike")
    return dict(fields)


def _chat_texts(fields: Mapping[str, Any], where: str, tokenizer: Any) -> dict[str, Any]:
    """Prompt and texts as the tokenizer's chat template writes them, the texts without the prompt."""
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"{where} is a chat, and the tokenizer has no chat template: set one, or give plain text")
    prompt = _messages(fields["prompt"], where)
    try:
        texts = {"prompt": tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)}
        for name in _TEXTS:
            if name in fields:
                value = fields[name]
                answer = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
                whole = tokenizer.apply_chat_template([*prompt, *_messages(answer, where)], tokenize=False)
                if not whole.startswith(texts["prompt"]):
                    raise DataError(f"the chat template writes the prompt of {where} anew when an answer follows it")
                texts[name] = whole[len(texts["prompt"]) :]
    except DataError:
        raise
    except Exception as error:  # a template can raise whatever it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the chat template refuses {where}: {reason}") from error
    return texts


def _messages(messages: Any, where: str) -> list[Any]:
    sound = isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages)
    if not sound or not messages or not all({"role", "content"} <= message.keys() for message in messages):
        raise DataError(f"the messages in {where} are no chat: a list of records with role and content is expected")
    return messages
