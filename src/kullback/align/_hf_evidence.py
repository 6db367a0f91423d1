"""The prior of a causal model over the answers to one prompt, for evidence and posterior samples: a log Z a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kullback.align._moves import PriorSampler, token_move
from kullback.align.log_probs import completion_log_probs
from kullback.core.errors import ConfigError
from kullback.decode.ancestral import draw_tokens

__all__ = ["completion_next_laws", "completion_prior", "prior_log_probs"]


def completion_prior(
    model: Any,
    prompt: Sequence[int],
    reward: Callable[[Tensor], Tensor],
    *,
    length: int,
    tokens: int = 1,
    tries: int = 1,
    batch: int = 64,
    vocabulary: int | None = None,
) -> PriorSampler:
    """The answers x [n, length] of a causal model of transformers to a prompt, at temperature 1, and their moves.

    reward: from x to [n]; tokens: that a move draws anew; tries: see `token_move`; batch: sequences a forward;
    vocabulary: the first so many logits. All answers are equally long: what comes after an end token is drawn like the
    rest, and a reward that looks away from it does no harm. Moves keep the laws [n, length, V] of the samples. Raises
    ConfigError.
    """
    if not len(prompt) or length < 1 or batch < 1:
        raise ConfigError(f"a prompt has a token, and length and batch are 1 or more, got {len(prompt)}, {length}")
    head = torch.tensor(list(prompt), dtype=torch.long, device=next(model.parameters()).device).unsqueeze(0)

    def sample(count: int, draw: torch.Generator) -> Tensor:
        found = [
            draw_tokens(
                model, head, count=length, generator=draw, group=min(batch, count - start), vocabulary=vocabulary
            ).tokens
            for start in range(0, count, batch)
        ]
        return torch.cat(found)

    def laws(x: Tensor) -> Tensor:
        found = []
        for rows in x.split(batch):
            ids = torch.cat([head.expand(len(rows), -1), rows[:, :-1]], 1)
            found.append(_laws(model, ids, length, vocabulary))
        return torch.cat(found)

    return PriorSampler(sample, reward, token_move(laws, tokens=tokens, tries=tries))


def completion_next_laws(
    model: Any, prompt: Sequence[int], *, vocabulary: int | None = None
) -> Callable[[Tensor], Tensor]:
    """From the first tokens x [n, t] of answers to the laws of the next one [n, V]: the model of `twisted_smc`."""
    head = torch.tensor(list(prompt), dtype=torch.long, device=next(model.parameters()).device).unsqueeze(0)

    def laws(x: Tensor) -> Tensor:
        ids = torch.cat([head.expand(len(x), -1), x], 1)
        return _laws(model, ids, 1, vocabulary)[:, 0]

    return laws


@torch.no_grad()
def _laws(model: Any, ids: Tensor, count: int, vocabulary: int | None) -> Tensor:
    """The last laws [n, count, V], of a model that is not training, as those that it samples from."""
    was_training = model.training
    model.eval()
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=count).logits
    finally:
        model.train(was_training)
    return logits[..., :vocabulary].float().log_softmax(-1)


@torch.no_grad()
def prior_log_probs(model: Any, prompt: Sequence[int], x: Tensor) -> Tensor:
    """log a(x | prompt) [n] of answers x [n, T]: with the policy's the input of elbo, eubo and implied_beta."""
    head = torch.tensor(list(prompt), dtype=torch.long, device=x.device).unsqueeze(0)
    ids = torch.cat([head.expand(len(x), -1), x], 1)
    found = completion_log_probs(model, ids, torch.ones_like(ids), torch.ones_like(x))
    return found.log_probs.double().sum(1)
