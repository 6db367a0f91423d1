"""Text with a backspace: an action appends a token or removes the last visible one.

A layout turns actions into one forward pass: every token that was ever appended stands in the stream once, attends to
the tokens that were visible when it came (its ancestors), and has its depth as position. The state after a backspace
is that of the parent, whose logits are there already: nothing is read again, and nothing that was deleted is seen.
Place i of the stream sees place j where j <= i <= last_j, the last token that came before j was deleted.

Shapes: B rows, A actions, T = 1 + tokens appended (the first is the begin token), V vocabulary with the backspace.
Source: arXiv 2306.05426.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError

__all__ = [
    "Layout",
    "additive_mask",
    "backspace_layout",
    "block_mask",
    "generate_with_backspace",
    "inject_noise",
    "visible_text",
]

PAD = -100


@dataclass(frozen=True, slots=True)
class Layout:
    """input_ids and position_ids [B, T] of the stream, and last [B, T]: the last place that sees each.

    actions [B, A], PAD where a row has ended; state_index, next_index [B, A]: the stream's place of the state before
    and after each action; weight [B, A]: of each action in a loss, 0 for padding; depth [B, A]: visible tokens before;
    backspace: the action that deletes.
    """

    input_ids: Tensor
    position_ids: Tensor
    last: Tensor
    actions: Tensor
    state_index: Tensor
    next_index: Tensor
    weight: Tensor
    depth: Tensor
    backspace: int

    @property
    def held(self) -> Tensor:
        """Actions that are not padding [B, A]."""
        return self.actions != PAD

    @property
    def attention(self) -> Tensor:
        """What each place of the stream (row) sees of the others (column): bool [B, T, T], made anew at each call."""
        places = torch.arange(self.last.shape[1], device=self.last.device)
        return (self.last.unsqueeze(1) >= places.unsqueeze(1)).tril_()


def backspace_layout(actions: Tensor, *, backspace: int, begin: int, weights: Tensor | None = None) -> Layout:
    """The layout of actions [B, A], padded with -100 on the right; weights [B, A], 1 by default.

    Raises ShapeError, ConfigError for a backspace that is the begin token, and DataError for a backspace where nothing
    is visible, a row without an action, padding inside a row, ids or weights that are negative or not finite.

    >>> layout = backspace_layout(torch.tensor([[5, 6, 9, 7]]), backspace=9, begin=0)
    >>> layout.input_ids, layout.state_index, layout.next_index
    (tensor([[0, 5, 6, 7]]), tensor([[0, 1, 2, 1]]), tensor([[1, 2, 1, 3]]))
    """
    _check_layout(actions, backspace, begin, weights)
    held = actions != PAD
    deletes = actions == backspace
    appends = held & ~deletes
    depth = (appends.long() - deletes.long()).cumsum(1)
    if (depth < 0).any():
        raise DataError("a backspace where nothing is visible: remove it, or mask the action there")
    appended = appends.long().cumsum(1)
    places = torch.where(appends, appended, 0)  # of the token in the stream, from 1 on
    after = _latest_at_depth(depth, places)
    before, depth_before = (torch.nn.functional.pad(x[:, :-1], (1, 0)) for x in (after, depth))
    size = int(appended.max()) + 1
    ids = torch.full((len(actions), size), begin, device=actions.device)
    positions, last = torch.zeros_like(ids), torch.full_like(ids, size - 1)
    # What is no append is written to place 0, and that is the begin token's.
    ids.scatter_(1, places, torch.where(appends, actions, begin))
    positions.scatter_(1, places, torch.where(appends, depth, 0))
    rows, times = deletes.nonzero(as_tuple=True)
    last[rows, before[rows, times]] = appended[rows, times]
    weight = held.float() if weights is None else torch.where(held, weights, 0.0)
    return Layout(ids, positions, last, actions, before, after, weight, depth_before, backspace)


def _check_layout(actions: Tensor, backspace: int, begin: int, weights: Tensor | None) -> None:
    if actions.ndim != 2 or 0 in actions.shape or (weights is not None and weights.shape != actions.shape):
        raise ShapeError(f"actions are [B, A] with an action at least, and weights alike, got {tuple(actions.shape)}")
    if backspace < 0 or begin < 0 or backspace == begin:
        raise ConfigError(f"backspace and begin are two ids from 0 on, got {backspace} and {begin}")
    held = actions != PAD
    whole = not actions.is_floating_point() and bool(held[:, 0].all())
    if not whole or (held[:, 1:] & ~held[:, :-1]).any() or (actions[held] < 0).any():
        raise DataError(
            "each row of actions has token ids from 0 on, one or more, and -100 for padding at its end only"
        )
    if weights is not None and not ((weights >= 0) & weights.isfinite()).all():
        raise DataError("weights of actions are finite and not negative")


def _latest_at_depth(depth: Tensor, places: Tensor) -> Tensor:
    """For each time the stream's place of the last token appended so far at the depth of that time; 0 at depth 0.

    Whenever the depth falls below, the way back appends a token there anew, so the last one is the visible one.
    """
    count = depth.shape[1]
    times = torch.arange(count, device=depth.device)
    order = (depth * count + times).argsort(1)
    marked = torch.where(places > 0, depth * (count + 1) + places, depth * (count + 1)).gather(1, order)
    latest = marked.cummax(1).values - depth.gather(1, order) * (count + 1)
    return torch.empty_like(latest).scatter(1, order, latest)


def additive_mask(layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, 1, T, T], 0 where a token is seen and the lowest number of the type elsewhere, as transformers takes it."""
    seen = torch.zeros((), dtype=dtype, device=layout.last.device)
    return torch.where(layout.attention, seen, torch.finfo(dtype).min).unsqueeze(1)


def block_mask(layout: Layout) -> Any:
    """The same for models with attn_implementation="flex_attention": a BlockMask, for which no [T, T] is held."""
    from torch.nn.attention.flex_attention import create_block_mask

    last = layout.last

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query <= last[row, key])

    return create_block_mask(seen, len(last), None, last.shape[1], last.shape[1], device=str(last.device))


def visible_text(actions: Tensor, *, backspace: int) -> list[list[int]]:
    """The tokens that are visible at the end of each row of actions [B, A], replayed on a stack; DataError as above.

    >>> visible_text(torch.tensor([[5, 6, 9, 7]]), backspace=9)
    [[5, 7]]
    """
    found = []
    for row in actions.tolist():
        stack: list[int] = []
        for action in row:
            if action == backspace and not stack:
                raise DataError("a backspace where nothing is visible: remove it, or mask the action there")
            if action == backspace:
                stack.pop()
            elif action != PAD:
                stack.append(action)
        found.append(stack)
    return found


def inject_noise(
    ids: Tensor,
    *,
    share: float,
    vocabulary: int,
    backspace: int,
    generator: torch.Generator,
    mask_noise: bool = True,
    exclude: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(actions, weights) [B, A]: before each token of ids [B, L], with chance share, a wrong token and a backspace.

    mask_noise: the wrong token itself has weight 0, so that a model learns to delete it and not to write it; exclude:
    from (ids, proposed) both [B, L] to those proposals [B, L] that could be right, at which nothing is inserted.
    Raises ConfigError for a share outside [0, 1), a vocabulary without another token or with the backspace; ShapeError,
    DataError for ids outside the vocabulary.
    """
    if not 0.0 <= share < 1.0 or vocabulary < 2:
        raise ConfigError(f"share lies in [0, 1) and the vocabulary has two tokens at least: {share}, {vocabulary}")
    if 0 <= backspace < vocabulary:
        raise ConfigError(f"the backspace, {backspace}, is none of the {vocabulary} tokens that texts are made of")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ShapeError(f"ids are [B, L] with a token at least, got {tuple(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise DataError(f"ids lie from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}")
    chosen = torch.rand(ids.shape, generator=generator, device=ids.device) < share
    shift = torch.randint(1, vocabulary, ids.shape, generator=generator, device=ids.device)
    wrong = (ids + shift) % vocabulary  # never the token itself
    if exclude is not None:
        excluded = exclude(ids, wrong)
        if excluded.shape != ids.shape:
            raise ShapeError(f"exclude gives a bool for each of {tuple(ids.shape)}, got {tuple(excluded.shape)}")
        chosen &= ~excluded.bool()
    width = ids.shape[1] + 2 * int(chosen.sum(1).max())
    at = torch.arange(ids.shape[1], device=ids.device) + 2 * chosen.long().cumsum(1)
    actions = torch.full((len(ids), width), PAD, device=ids.device)
    weights = torch.zeros(len(ids), width, device=ids.device)
    actions.scatter_(1, at, ids)
    weights.scatter_(1, at, 1.0)
    rows, columns = chosen.nonzero(as_tuple=True)
    place = at[rows, columns]
    actions[rows, place - 2] = wrong[rows, columns]
    actions[rows, place - 1] = backspace
    weights[rows, place - 2] = 0.0 if mask_noise else 1.0
    weights[rows, place - 1] = 1.0
    return actions, weights


@torch.no_grad()
def generate_with_backspace(
    model: Any,
    rows: int,
    *,
    backspace: int,
    begin: int,
    length: int,
    most_actions: int,
    generator: torch.Generator,
    end: int | None = None,
    prompts: Tensor | None = None,
    processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    replace: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Actions [rows, A] of a model until `length` tokens are visible, `end` is taken, or most_actions were.

    The logits of every visible state are kept, so a backspace costs no forward pass of its own; deleted tokens stay in
    the key-value cache and are masked. prompts [rows, P]: follow the begin token, and are never deleted; processor:
    from the visible text [n, L] (begin, prompt and what is written) and logits [n, V] to logits, as transformers'
    LogitsProcessor; replace: from tokens [n] that are to be appended to those that are, as a noisy channel would.
    Raises ConfigError, ShapeError, DataError for a prompt with a backspace and for a state without an action.
    """
    if rows < 1 or length < 1 or most_actions < length:
        given = f"{rows}, {length} and {most_actions}"
        raise ConfigError(f"rows and length are 1 or more and most_actions is at least length, got {given}")
    if backspace in (begin, end):
        raise ConfigError(f"the backspace is neither the begin token nor the end, got {backspace} for both")
    if prompts is not None and (prompts.ndim != 2 or len(prompts) != rows):
        raise ShapeError(f"prompts are [rows, P] for {rows} rows, got {tuple(prompts.shape)}")
    if prompts is not None and (prompts == backspace).any():
        raise DataError("a prompt is text that stands, and holds a backspace: replay it first, by visible_text")
    parameter, training = next(model.parameters()), model.training
    start = torch.full((rows, 1), begin, device=parameter.device)
    if prompts is not None:
        start = torch.cat([start, prompts.to(start)], 1)
    model.eval()
    try:
        return _generate(model, start, (backspace, begin, end), length, most_actions, generator, processor, replace)
    finally:
        model.train(training)


def _generate(
    model: Any, start: Tensor, special: tuple[int, int, int | None], length: int, most: int,
    generator: torch.Generator, processor: Callable[[Tensor, Tensor], Tensor] | None,
    replace: Callable[[Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    (backspace, begin, end), (rows, given), device = special, start.shape, start.device
    everyone, depth = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.long, device=device)
    out = model(input_ids=start, use_cache=True)
    logits = out.logits[:, -1].float()
    if not 0 <= backspace < logits.shape[-1]:
        raise ConfigError(f"the backspace, {backspace}, is none of the model's {logits.shape[-1]} actions")
    stack = logits.new_zeros(rows, length + 1, logits.shape[-1])  # the logits of each visible state
    stack[:, 0] = logits
    seen = torch.ones_like(start)
    where = torch.zeros(rows, length + 1, dtype=torch.long, device=device)  # the cache's place of each visible token
    text = torch.cat([start, torch.zeros_like(where[:, 1:])], 1)
    done, actions = torch.zeros(rows, dtype=torch.bool, device=device), []
    for number in range(most):
        current = stack[everyone, depth]
        if processor is not None:
            current = _processed(processor, text, depth + given, current)
        current[depth == 0, backspace] = -torch.inf
        law = current.softmax(-1)
        if law.isnan().any():
            raise DataError("a state has no action left, or logits that are NaN: look at the model and the processor")
        action = torch.multinomial(law, 1, generator=generator).squeeze(1)
        delete = (action == backspace) & ~done
        if replace is not None:
            action = torch.where(delete, action, replace(action))
            if ((action == backspace) & ~delete & ~done).any():
                raise DataError("replace gives tokens for tokens, and gave a backspace")
        actions.append(torch.where(done, PAD, action))
        seen[everyone[delete], where[everyone[delete], depth[delete]]] = 0
        append = ~delete & ~done
        depth = depth + append.long() - delete.long()
        text[everyone[append], given - 1 + depth[append]] = action[append]
        stop = append & ((depth >= length) | (action == end if end is not None else torch.zeros_like(append)))
        done = done | stop
        if done.all() or number == most - 1:
            break
        name = "cache" if "cache" in out else "past_key_values"  # before and since transformers 5.24
        cache = {name: out[name]}
        seen = torch.cat([seen, append.long().unsqueeze(1)], 1)
        where[everyone[append], depth[append]] = given + number
        token = torch.where(append, action, begin).unsqueeze(1)
        mask = seen.clone()
        mask[:, -1] = 1  # a row that has deleted reads a token that nobody will see
        position = (depth + given - 1).unsqueeze(1)
        out = model(input_ids=token, position_ids=position, attention_mask=mask, use_cache=True, **cache)
        stack[everyone[append], depth[append]] = out.logits[:, -1].float()[append]
    return torch.stack(actions, 1)


def _processed(
    processor: Callable[[Tensor, Tensor], Tensor], text: Tensor, sizes: Tensor, logits: Tensor
) -> Tensor:
    """Rows whose visible texts are equally long go through the processor together, without padding."""
    found = logits.clone()
    for size in sizes.unique().tolist():
        rows = (sizes == size).nonzero().squeeze(1)
        new = processor(text[rows, :size], logits[rows])
        if new.shape != (len(rows), logits.shape[1]):
            given = tuple(found[rows].shape)
            raise ShapeError(f"a processor keeps the shape of logits {given}, got {tuple(new.shape)}")
        found[rows] = new
    return found
