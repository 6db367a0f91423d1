r"""Contrastive search: of the likeliest tokens the one that is least like what has been written.

    x_t = argmax over the `candidates` likeliest v of (1 - a) p(v | x_<t) - a max_j cos(h_v, h_j)

with h_v the last hidden state that the model would have after v, and h_j those of the tokens before. a = 0 is greedy.
All candidates of a step are read in one pass, on top of the key-value cache; the cache then goes on with the chosen.
No random number is drawn, so a prompt has one continuation.

Shapes: N prompts of P tokens, padded on the left; T new tokens at most; V vocabulary; K candidates; H hidden width.
Source: arXiv 2202.06417.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.decode.ancestral import Drawn, check_prompts

__all__ = ["ContrastiveSearch", "contrastive_search"]

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(slots=True)
class _Rows:
    """The texts that go on [n, L], without what was replaced; what the model has read of each and its mask [n, M], unit
    hidden states of that [n, M, H] in float32, logits of what comes next [n, V], the cache (empty where it cannot be
    repeated); and for each text the row of the result.
    """

    text: Tensor
    read: Tensor
    mask: Tensor
    hidden: Tensor
    logits: Tensor
    cache: dict[str, Any]
    places: Tensor


@torch.no_grad()
def contrastive_search(
    model: Any,
    ids: Tensor,
    *,
    count: int,
    alpha: float = 0.6,
    candidates: int = 4,
    mask: Tensor | None = None,
    end: Sequence[int] = (),
    pad: int = 0,
    vocabulary: int | None = None,
    processor: Processor | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    replace: Callable[[Tensor], Tensor] | None = None,
) -> Drawn:
    """Up to `count` tokens after ids [N, P] by contrastive search with the degeneration penalty alpha in [0, 1].

    mask [N, P], end, pad, vocabulary: as of `draw_tokens`; log_probs are the model's own. processor: from texts [n, L]
    and logits [n, V] to logits, as transformers' LogitsProcessor; stop: from texts [n, L] to which of them end [n];
    replace: from chosen tokens [n] to those that are appended, as a noisy channel would. The model's last hidden states
    must tell tokens apart by their direction; those of some models hardly do, and alpha then changes little. Raises
    ConfigError for numbers out of range, ShapeError for a mask that does not fit or has padding on the right.
    """
    _check(ids, mask, count, alpha, candidates)
    was_training = model.training
    model.eval()
    try:
        rows = _read(model, ids, torch.ones_like(ids) if mask is None else mask.long())
        return _search(
            model, rows, count, (alpha, 1 if alpha == 0.0 else candidates), (tuple(end), pad, vocabulary), processor,
            stop, replace,
        )  # fmt: skip
    finally:
        model.train(was_training)


def _search(
    model: Any, rows: _Rows, count: int, search: tuple[float, int], special: tuple[tuple[int, ...], int, int | None],
    processor: Processor | None, stop: Callable[[Tensor], Tensor] | None, replace: Callable[[Tensor], Tensor] | None,
) -> Drawn:  # fmt: skip
    end, pad, vocabulary = special
    ends = torch.tensor(end, dtype=torch.long, device=rows.text.device)
    tokens = rows.text.new_full((len(rows.text), count), pad)
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    log_probs = torch.zeros(tokens.shape, device=tokens.device)
    for place in range(count):
        logits = rows.logits[:, :vocabulary].float()
        law = (logits if processor is None else processor(rows.text, logits)).log_softmax(-1)
        here = rows.places
        if search[1] == 1 and replace is None and place + 1 == count:  # nothing to compare, and nothing comes after
            step = law.argmax(-1)
            rows.text = _with(rows.text, step)
        else:
            step, rows = _step(model, rows, law, *search)
            if replace is not None:
                step, rows = _replaced(model, rows, step, replace(step))
        tokens[here, place], counts[here, place] = step, True
        log_probs[here, place] = law.gather(1, step.unsqueeze(1)).squeeze(1)
        done = torch.isin(step, ends)
        if stop is not None:
            done |= stop(rows.text).bool()
        if done.all():
            return Drawn(tokens[:, : place + 1], counts[:, : place + 1], log_probs[:, : place + 1])
        if done.any() and place + 1 < count:
            rows = _selected(rows, (~done).nonzero().squeeze(1))
    return Drawn(tokens, counts, log_probs)


def _step(model: Any, rows: _Rows, law: Tensor, alpha: float, candidates: int) -> tuple[Tensor, _Rows]:
    """The token [n] that is chosen after each row, from log-probabilities [n, V], and the rows with it."""
    found = law.topk(min(candidates, law.shape[-1]))
    size, count = found.indices.shape
    read = _with(rows.read.repeat_interleave(count, 0), found.indices.flatten())
    mask = torch.nn.functional.pad(rows.mask, (0, 1), value=1)
    for held in rows.cache.values():
        held.batch_repeat_interleave(count)
    logits, hidden, cache = _forward(model, read, mask.repeat_interleave(count, 0), rows.cache)
    hidden = hidden[:, -1:]
    alike = torch.einsum("nkh,nlh->nkl", hidden.view(size, count, -1), rows.hidden)
    penalty = alike.masked_fill(rows.mask.unsqueeze(1) == 0, -torch.inf).amax(-1)
    best = ((1.0 - alpha) * found.values.exp() - alpha * penalty).argmax(1)
    pick = torch.arange(size, device=best.device) * count + best
    for held in cache.values():
        held.batch_select_indices(pick)
    context = torch.cat([rows.hidden, hidden[pick]], 1)
    chosen = read[pick, -1]
    return chosen, _Rows(_with(rows.text, chosen), read[pick], mask, context, logits[pick], cache, rows.places)


def _replaced(model: Any, rows: _Rows, chosen: Tensor, step: Tensor) -> tuple[Tensor, _Rows]:
    """The tokens that are appended in place of the chosen ones, and the rows with them.

    What replaces a token is read after it, and the token itself is masked; where nothing is replaced, a copy of it is.
    """
    changed = step != chosen
    if not changed.any():
        return step, rows
    read = _with(rows.read, step)
    mask = torch.nn.functional.pad(rows.mask, (0, 1), value=1)
    mask[changed, -2] = 0
    logits, hidden, cache = _forward(model, read, mask, rows.cache)
    mask[~changed, -1] = 0
    context = torch.cat([rows.hidden, hidden[:, -1:]], 1)
    logits = torch.where(changed.unsqueeze(1), logits, rows.logits)
    text = _with(rows.text[:, :-1], step)
    return step, _Rows(text, read, mask, context, logits, cache, rows.places)


def _selected(rows: _Rows, keep: Tensor) -> _Rows:
    for held in rows.cache.values():
        held.batch_select_indices(keep)
    text, read, mask, hidden = (part[keep] for part in (rows.text, rows.read, rows.mask, rows.hidden))
    return _Rows(text, read, mask, hidden, rows.logits[keep], rows.cache, rows.places[keep])


def _read(model: Any, ids: Tensor, mask: Tensor) -> _Rows:
    logits, hidden, cache = _forward(model, ids, mask, {})
    return _Rows(ids, ids, mask, hidden, logits, cache, torch.arange(len(ids), device=ids.device))


def _forward(
    model: Any, text: Tensor, mask: Tensor, cache: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits [n, V] after texts [n, M], unit hidden states of what was read, and the cache: the last token is read on
    top of a cache, everything without one (a cache of a kind that cannot be repeated is none).
    """
    given: dict[str, Any] = dict(cache)
    fed = text[:, -1:] if cache else text
    if not mask.all():
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        given |= {"attention_mask": mask, "position_ids": positions}
    out = model(input_ids=fed, use_cache=True, logits_to_keep=1, output_hidden_states=True, **given)
    states = getattr(out, "hidden_states", None)
    if states is None:
        raise ConfigError("contrastive search compares last hidden states, and the model returns no hidden_states")
    name = "cache" if "cache" in out else "past_key_values"  # since and before transformers 5.24
    found = {name: out[name]} if hasattr(out.get(name), "batch_repeat_interleave") else {}
    return out.logits[:, -1], torch.nn.functional.normalize(states[-1].float(), dim=-1), found


def _with(text: Tensor, step: Tensor) -> Tensor:
    return torch.cat([text, step.unsqueeze(1)], 1)


def _check(ids: Tensor, mask: Tensor | None, count: int, alpha: float, candidates: int) -> None:
    check_prompts(ids, mask)
    if count < 1 or candidates < 1:
        raise ConfigError(f"count and candidates are 1 or more, got {count} and {candidates}")
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"alpha is the share of the penalty, in [0, 1], got {alpha}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveSearch:
    """Contrastive search for `model.generate(ids, custom_generate=ContrastiveSearch(alpha=0.6, candidates=4), ...)`.

    Length, end and pad tokens, processors and other reasons to stop come from generate's own arguments. Raises
    ConfigError for numbers out of range.
    """

    alpha: float = 0.6
    candidates: int = 4

    def __post_init__(self) -> None:
        _check(torch.zeros(1, 1), None, 1, self.alpha, self.candidates)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        generation_config: Any,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **given: Any,
    ) -> Tensor:
        """The prompts [N, P] with what follows them [N, P + T]."""
        end = generation_config.eos_token_id
        ends = [] if end is None else [end] if isinstance(end, int) else list(end)
        pad = generation_config.pad_token_id
        drawn = contrastive_search(
            model, input_ids, count=generation_config.max_length - input_ids.shape[1], alpha=self.alpha,
            candidates=self.candidates, mask=given.get("attention_mask"), end=ends, processor=logits_processor or None,
            pad=pad if pad is not None else ends[0] if ends else 0,
            stop=(lambda text: stopping_criteria(text, None)) if stopping_criteria else None,
        )  # fmt: skip
        return torch.cat([input_ids, drawn.tokens], 1)
