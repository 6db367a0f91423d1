"""Completions drawn by an OpenAI-compatible server, and given texts scored by one, with log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kullback.core.errors import DataError
from kullback.core.server import CompletionServer, token_number
from kullback.decode.ancestral import Drawn

__all__ = ["ServedSampler", "ServedScorer"]


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


class ServedScorer:
    """A server that is asked how probable it finds each token of given texts; options as of CompletionServer.

    It echoes prompts of token ids, with `logprobs.token_logprobs`, or with `prompt_logprobs` that hold the token that
    is there. batch: texts a request. Raises DataError when it cannot be reached or answers without them.
    """

    def __init__(
        self, url: str, *, model: str = "", timeout: float = 600.0, retries: int = 3, batch: int = 256
    ) -> None:
        self.server = CompletionServer(url, model=model, timeout=timeout, retries=retries)
        self.batch = batch

    def __call__(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of every token but the first of each text, in their order; at least -10000."""
        found: list[list[float]] = []
        for start in range(0, len(texts), self.batch):
            some = [list(text) for text in texts[start : start + self.batch]]
            body = {
                "prompt": some, "max_tokens": 1, "echo": True, "temperature": 1.0, "logprobs": 1, "prompt_logprobs": 1,
                "return_tokens_as_token_ids": True,
            }  # fmt: skip
            choices = self.server.completions(body, prompts=len(some))
            found += [self._row(choice, text) for choice, text in zip(choices, some, strict=True)]
        return found

    def _row(self, choice: Mapping[str, Any], text: list[int]) -> list[float]:
        echoed = (choice.get("logprobs") or {}).get("token_logprobs")
        if choice.get("prompt_logprobs") is not None:
            said = [{int(token): one["logprob"] for token, one in (e or {}).items()} for e in choice["prompt_logprobs"]]
            echoed = [entry.get(token) for entry, token in zip(said, text, strict=False)]
        values = [] if echoed is None else [value for value in echoed[1 : len(text)] if value is not None]
        if len(values) != len(text) - 1:
            raise DataError(
                f"{self.server.url} answers without the log-probability of every token of a text: start the server so "
                "that it accepts echo with logprobs, or prompt_logprobs"
            )
        return [max(float(value), -1e4) for value in values]
