"""Completions drawn by an OpenAI-compatible server, with the log-probabilities it drew them at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kullback.core.errors import DataError
from kullback.core.server import CompletionServer, token_number
from kullback.decode.ancestral import Drawn

__all__ = ["ServedSampler"]


class ServedSampler:
    """A server that is asked to continue prompts of token ids, at temperature 1; options as of CompletionServer.

    It must return tokens by their ids and the log-probability of each: `logprobs.tokens` as "token_id:17" and
    `logprobs.token_logprobs`. Raises DataError when it cannot be reached or answers without them.
    """

    def __init__(self, url: str, *, model: str = "", timeout: float = 600.0, retries: int = 3) -> None:
        self.server = CompletionServer(url, model=model, timeout=timeout, retries=retries)

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, count: int, group: int, end: Sequence[int], pad: int, seed: int
    ) -> Drawn:
        """`group` continuations of at most `count` tokens for each prompt, in their order, stopping with an end token.

        Shapes as in `decode.ancestral`; the end token that stops a continuation is asked for and counts.
        """
        body: dict[str, Any] = {
            "prompt": [list(prompt) for prompt in prompts], "n": group, "max_tokens": count, "temperature": 1.0,
            "logprobs": 1, "return_tokens_as_token_ids": True, "seed": seed, "stop_token_ids": list(end),
            "include_stop_str_in_output": True,
        }  # fmt: skip
        choices = self.server.completions(body, prompts=len(prompts) * group)
        rows = [self._row(choice, count) for choice in choices]
        width = max(len(ids) for ids, _ in rows)
        tokens, log_probs = torch.full((len(rows), width), pad), torch.zeros(len(rows), width)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for place, (ids, values) in enumerate(rows):
            tokens[place, : len(ids)] = torch.tensor(ids)
            log_probs[place, : len(ids)] = torch.tensor(values)
            mask[place, : len(ids)] = True
        return Drawn(tokens, mask, log_probs)

    def _row(self, choice: Mapping[str, Any], count: int) -> tuple[list[int], list[float]]:
        said = choice.get("logprobs") or {}
        names, values = said.get("tokens"), said.get("token_logprobs")
        if not names or values is None or len(names) != len(values) or len(names) > count:
            raise DataError(
                f"{self.server.url} answers without the log-probability of every token it drew: start the server so "
                "that it accepts logprobs=1 and return_tokens_as_token_ids"
            )
        return [token_number(str(name)) for name in names], [float(value) for value in values]
