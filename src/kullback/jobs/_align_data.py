"""An align job's examples as tokens: prompts, and where the method learns from them completions or pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kullback.align._hf import collate_completions
from kullback.core.errors import DataError
from kullback.data.arithmetic import sum_examples
from kullback.data.examples import Example, Wanted, read_examples, split_examples
from kullback.jobs._align_cuts import Cuts, lengths_over

if TYPE_CHECKING:
    from kullback.jobs.align import ExampleConfig

__all__ = ["Examples", "collator", "read_split"]

_WANTED: dict[str, Wanted] = {"online": "prompt", "completion": "completion", "pair": "pair"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Tokenised examples, all lists as long: prompts, their texts, and the completions of the kind that is wanted.

    completions: none, one list (of completions) or two (chosen and rejected); columns: the other fields of the data;
    cuts: what was too long.
    """

    prompts: list[list[int]]
    texts: list[str]
    completions: tuple[list[list[int]], ...] = ()
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cuts: Cuts = field(default_factory=Cuts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.prompts[index], "completions": [part[index] for part in self.completions]}


def read_split(config: ExampleConfig, kind: str, tokenizer: Any) -> tuple[Examples, Examples]:
    """The examples for training and for validation, these cut to `validation_prompts`.

    Raises DataError for what cannot be read, tokenised or split.
    """
    wanted = _WANTED[kind]
    if not config.train:
        training, validation = split_examples(_embedded(kind), share=config.holdout)
    elif config.validation:
        training, validation = (
            list(read_examples(Path(path), wanted=wanted, tokenizer=tokenizer))
            for path in (config.train, config.validation)
        )
    else:
        examples = read_examples(Path(config.train), wanted=wanted, tokenizer=tokenizer)
        training, validation = split_examples(examples, share=config.holdout)
    if kind == "online":
        training, validation = _distinct(training), _distinct(validation)
    few = validation[:: max(1, len(validation) // config.validation_prompts)][: config.validation_prompts]
    return _tokenised(training, kind, config, tokenizer), _tokenised(few, kind, config, tokenizer)


def _embedded(kind: str) -> list[Example]:
    examples = sum_examples()
    if kind != "completion":
        return examples
    return [Example(prompt=e.prompt, completion=e.chosen, others=e.others) for e in examples]


def _distinct(examples: Iterable[Example]) -> list[Example]:
    """The first example of each prompt: of preference pairs a prompt may have several."""
    return list({example.prompt: example for example in reversed(list(examples))}.values())[::-1]


def _tokenised(examples: list[Example], kind: str, config: ExampleConfig, tokenizer: Any) -> Examples:
    prompts = []
    for example in examples:
        ids = tokenizer(example.prompt, add_special_tokens=not example.chat).input_ids
        if not ids:
            raise DataError(f"the prompt {example.prompt[:40]!r} has no token in this tokenizer")
        prompts.append(list(ids))
    sides: dict[str, tuple[str, ...]] = {"pair": ("chosen", "rejected"), "completion": ("completion",), "online": ()}
    completions = [[_completion(getattr(example, side), tokenizer) for example in examples] for side in sides[kind]]
    short = tuple([ids[: config.length] for ids in side] for side in completions)
    names = {name: None for example in examples for name in example.others}
    return Examples(
        prompts=[ids[-config.prompt_length :] for ids in prompts],
        texts=[example.prompt for example in examples],
        completions=short,
        columns={name: [example.others.get(name) for example in examples] for name in names},
        cuts=Cuts(
            prompts=lengths_over(prompts, config.prompt_length),
            completions=lengths_over(chain(*completions), config.length),
            alike=sum(one == other for one, other in zip(*short, strict=True)) if kind == "pair" else 0,
        ),
    )


def _completion(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a completion with an end token."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids


def collator(filler: int) -> Any:
    """Batches of examples for the trainer: first completions, or chosen ones and after them the rejected."""

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        sides = range(len(items[0]["completions"]))
        prompts = [item["prompt"] for _ in sides for item in items]
        completions = [item["completions"][side] for side in sides for item in items]
        batch: dict[str, Any] = collate_completions(prompts, completions, filler)
        return batch

    return collate
