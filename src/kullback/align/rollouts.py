"""Rollouts: a group of completions for each of a batch of prompts, drawn from the policy, as padded tensors.

Shapes: P prompts, G completions of each, B = P G rows in the order of the prompts; L prompt tokens, padded on the left,
T completion tokens, padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.decode.ancestral import Drawn, draw_tokens
from kullback.decode.served import ServedSampler

__all__ = ["Rollouts", "join_rollouts", "pad_left", "sample_rollouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Completions with all that a policy gradient needs of them; ShapeError where the tensors do not fit.

    ids [B, L + T]; attention_mask [B, L + T]: tokens that are not padding; completion_mask [B, T]: completion tokens
    that count, with the end token where there is one; prompt_index [B]: the prompt that each row answers; log_probs
    [B, T]: of the drawn tokens at the sampling temperature, 0 outside the mask; finished [B]: rows that came to an
    end by themselves; texts: the decoded completions, where a tokenizer was at hand.
    """

    ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    prompt_index: Tensor
    log_probs: Tensor
    finished: Tensor
    temperature: float = 1.0
    texts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        rows, length = self.completion_mask.shape
        fits = self.ids.ndim == 2 and len(self.ids) == rows and self.ids.shape[1] > length
        fits = fits and self.attention_mask.shape == self.ids.shape and self.log_probs.shape == (rows, length)
        fits = fits and self.prompt_index.shape == (rows,) and self.finished.shape == (rows,)
        if not fits or (self.texts is not None and len(self.texts) != rows):
            shapes = ", ".join(
                f"{name} {tuple(getattr(self, name).shape)}"
                for name in ("ids", "attention_mask", "completion_mask", "prompt_index", "log_probs", "finished")
            )
            raise ShapeError(f"the tensors of rollouts have a row for each completion, got {shapes}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt_length(self) -> int:
        """L, with padding."""
        return self.ids.shape[1] - self.completion_mask.shape[1]

    @property
    def completion_ids(self) -> Tensor:
        """The last T tokens [B, T]."""
        return self.ids[:, self.prompt_length :]

    @property
    def lengths(self) -> Tensor:
        """Completion tokens that count [B]."""
        return self.completion_mask.sum(1)

    def select(self, rows: Tensor | Sequence[int]) -> Rollouts:
        """The rows [K] given by their numbers, or by true entries of [B]."""
        chosen = torch.as_tensor(rows, device=self.ids.device)
        chosen = chosen.nonzero().squeeze(1) if chosen.dtype == torch.bool else chosen.long()
        texts = None if self.texts is None else tuple(self.texts[row] for row in chosen.tolist())
        return replace(self, texts=texts, **{name: part[chosen] for name, part in self._tensors().items()})

    def to(self, device: torch.device | str) -> Rollouts:
        """The same on a device."""
        return replace(self, **{name: part.to(device) for name, part in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts of token ids as one tensor [P, L], padded on the left, and the mask of their tokens.

    >>> pad_left([[5, 6], [7]], 0)
    (tensor([[5, 6],
            [0, 7]]), tensor([[ True,  True],
            [False,  True]]))
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise DataError("every prompt has a token at least, and there is at least one prompt")
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(length) >= length - lengths.unsqueeze(1)


def join_rollouts(parts: Sequence[Rollouts], *, pad: int = 0) -> Rollouts:
    """All rows of several rollouts of one temperature, as wide as the widest need; ConfigError for another temperature.

    texts go on where all parts have them.
    """
    if not parts:
        raise DataError("there are no rollouts to join")
    if len({part.temperature for part in parts}) > 1:
        raise ConfigError(f"rollouts of temperatures {sorted({part.temperature for part in parts})} are not of one law")
    left = max(part.prompt_length for part in parts)
    right = max(part.completion_mask.shape[1] for part in parts)

    def joined(name: str, fill: float, both: bool) -> Tensor:
        tensors = []
        for part in parts:
            missing = (both * (left - part.prompt_length), right - part.completion_mask.shape[1])
            tensors.append(functional.pad(getattr(part, name), missing, value=fill))
        return torch.cat(tensors)

    texts = [part.texts for part in parts]
    return Rollouts(
        ids=joined("ids", pad, True),
        attention_mask=joined("attention_mask", False, True),
        completion_mask=joined("completion_mask", False, False),
        log_probs=joined("log_probs", 0.0, False),
        prompt_index=torch.cat([part.prompt_index for part in parts]),
        finished=torch.cat([part.finished for part in parts]),
        temperature=parts[0].temperature,
        texts=None if None in texts else tuple(text for some in texts for text in some or ()),
    )


def sample_rollouts(
    model: Any,
    prompts: Sequence[Sequence[int]] | Tensor,
    *,
    group: int,
    length: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    end: int | Sequence[int] | None = None,
    pad: int | None = None,
    vocabulary: int | None = None,
    batch: int | None = None,
    prompt_index: Sequence[int] | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> Rollouts:
    """Draw `group` completions of at most `length` tokens for each prompt, from softmax(logits / temperature).

    prompts: token ids, lists of any lengths or a tensor [P, L]; end: the token or tokens that end a completion; pad:
    what stands outside the masks, the first end token by default; batch: prompts drawn at once; prompt_index: numbers
    of the prompts, 0 to P - 1 by default; decode: from the ids of a completion, without its end token, to its text.
    Raises ConfigError for numbers out of range and DataError for an empty prompt.
    """
    if batch is not None and batch < 1:
        raise ConfigError(f"batch is a number of prompts of 1 or more, got {batch}")
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    filler = pad if pad is not None else ends[0] if ends else 0
    ids, mask = pad_left(prompts.tolist() if isinstance(prompts, Tensor) else prompts, filler)
    index = list(range(len(ids))) if prompt_index is None else list(prompt_index)
    if len(index) != len(ids):
        raise ShapeError(f"prompt_index has a number for each of {len(ids)} prompts, got {len(index)}")
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    parts = []
    for start in range(0, len(ids), batch or len(ids)):
        rows = slice(start, start + (batch or len(ids)))
        parts.append(
            draw_tokens(
                model, ids[rows], mask=mask[rows], count=length, generator=generator, temperature=temperature,
                group=group, end=ends, pad=filler, vocabulary=vocabulary,
            )
        )  # fmt: skip
    longest = max(part.tokens.shape[1] for part in parts)
    tokens, counts, log_probs = (
        torch.cat([_widened(part[place], longest, fill) for part in parts])
        for place, fill in enumerate((filler, False, 0.0))
    )
    drawn = Drawn(tokens, counts, log_probs)
    return _assembled(ids, mask, drawn, index, group=group, ends=ends, temperature=temperature, decode=decode)


def served_rollouts(
    server: ServedSampler,
    prompts: Sequence[Sequence[int]],
    *,
    group: int,
    length: int,
    generator: torch.Generator,
    end: int | Sequence[int] | None = None,
    pad: int | None = None,
    prompt_index: Sequence[int] | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> Rollouts:
    """As `sample_rollouts`, drawn by a server at temperature 1: log_probs are those of the policy that it serves."""
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    filler = pad if pad is not None else ends[0] if ends else 0
    ids, mask = pad_left(prompts, filler)
    index = list(range(len(ids))) if prompt_index is None else list(prompt_index)
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
    drawn = server(prompts, count=length, group=group, end=ends, pad=filler, seed=seed)
    return _assembled(ids, mask, drawn, index, group=group, ends=ends, temperature=1.0, decode=decode)


def _assembled(
    ids: Tensor, mask: Tensor, drawn: Drawn, index: list[int], *, group: int, ends: list[int], temperature: float,
    decode: Callable[[list[int]], str] | None,
) -> Rollouts:  # fmt: skip
    tokens, counts, log_probs = drawn
    finished = (torch.isin(tokens, torch.tensor(ends, dtype=torch.long, device=tokens.device)) & counts).any(1)
    return Rollouts(
        ids=torch.cat([ids.repeat_interleave(group, 0), tokens], 1),
        attention_mask=torch.cat([mask.repeat_interleave(group, 0), counts], 1),
        completion_mask=counts,
        prompt_index=torch.tensor(index, device=tokens.device).repeat_interleave(group),
        log_probs=log_probs,
        finished=finished,
        temperature=temperature,
        texts=None if decode is None else _texts(tokens, counts, ends, decode),
    )


def _widened(part: Tensor, length: int, fill: float) -> Tensor:
    missing = part.new_full((len(part), length - part.shape[1]), fill)
    return torch.cat([part, missing], 1)


def _texts(tokens: Tensor, counts: Tensor, ends: list[int], decode: Callable[[list[int]], str]) -> tuple[str, ...]:
    rows = [row[held].tolist() for row, held in zip(tokens.cpu(), counts.cpu(), strict=True)]
    return tuple(decode(row[:-1] if row and row[-1] in ends else row) for row in rows)
