"""A teacher behind an OpenAI-compatible completions endpoint that returns top-K log-probabilities of the prompt.

Two dialects are understood in the answer: `prompt_logprobs` (a list of {token id: {"logprob": x}}, asked for by that
name), and `logprobs.top_logprobs` of an echoed prompt, whose keys are token ids written "token_id:17".
Shapes: B batch, T positions, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import DataError
from kullback.core.server import CompletionServer, token_number
from kullback.core.types import TeacherOutput

__all__ = ["ServedTeacher"]


class ServedTeacher:
    """A teacher asked over HTTP for its `kept` most likely tokens at every position; temperature is always 1.

    url: the server's address up to /v1, such as http://127.0.0.1:8000/v1; model: its name there, empty for the first
    that the server lists; retries: further tries after a failed request, with a pause that doubles. Raises DataError
    when the server cannot be reached, or answers without log-probabilities.
    """

    def __init__(
        self, url: str, *, vocabulary: int, kept: int = 20, model: str = "", timeout: float = 60.0, retries: int = 3
    ) -> None:
        self.server = CompletionServer(url, model=model, timeout=timeout, retries=retries)
        self.url, self.vocabulary, self.kept = self.server.url, vocabulary, kept

    @property
    def has_labels(self) -> bool:
        """Whether the server says how probable a prompt's tokens are beside its top K; it is asked about some."""
        ids = torch.arange(min(16, self.vocabulary)).unsqueeze(0)
        return self(ids, torch.ones_like(ids)).label_log_probs is not None

    def __call__(self, ids: Tensor, mask: Tensor) -> TeacherOutput:
        """top_ids and top_log_probs [B, T, K], tail_log_prob and, where the server says it of every token,
        label_log_probs [B, T]; position t is about token t + 1.
        """
        body = {
            "prompt": ids.tolist(), "max_tokens": 1, "echo": True, "temperature": 1.0,
            "logprobs": self.kept, "prompt_logprobs": self.kept, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        choices = self.server.completions(body, prompts=len(ids))
        rows = [self._row(choice, ids.shape[1]) for choice in choices]
        labels = [_labels(choice, row) for choice, row in zip(choices, ids.tolist(), strict=True)]
        top_ids = torch.tensor([row[0] for row in rows], device=ids.device)
        top = torch.tensor([row[1] for row in rows], device=ids.device)
        rest = -torch.expm1(top.double().logsumexp(-1).clamp(max=0.0))
        out = TeacherOutput(top_ids=top_ids, top_log_probs=top, tail_log_prob=rest.clamp(min=1e-9).log().float())
        known = [row for row in labels if row is not None]
        return out._replace(label_log_probs=torch.tensor(known, device=ids.device)) if len(known) == len(rows) else out

    def _row(self, choice: Mapping[str, Any], length: int) -> tuple[list[list[int]], list[list[float]]]:
        said = _distributions(choice)
        if said is None or len(said) < length:
            raise DataError(
                f"{self.url} answers without log-probabilities of the prompt: start the server so that it accepts "
                f"prompt_logprobs={self.kept}"
            )
        ids, log_probs = [], []
        for entry in said[1:length]:
            ranked = sorted(entry.items(), key=lambda item: -item[1])[: self.kept]
            if len(ranked) < self.kept:
                raise DataError(f"{self.url} returns {len(ranked)} of {self.kept} log-probabilities: raise its limit")
            ids.append([token for token, _ in ranked])
            log_probs.append([max(value, -1e4) for _, value in ranked])
        # What follows the last token is never compared with a label.
        return [*ids, ids[-1]], [*log_probs, log_probs[-1]]


def _labels(choice: Mapping[str, Any], ids: list[int]) -> list[float] | None:
    """The log-probability of each next token, which servers give of a prompt beside their top K; None where not."""
    echoed = (choice.get("logprobs") or {}).get("token_logprobs")
    if echoed is None:
        said = _distributions(choice) or []
        echoed = [entry.get(token) for entry, token in zip(said, ids)]
    found = [value for value in echoed[1 : len(ids)] if value is not None]
    if len(found) != len(ids) - 1:
        return None
    return [max(float(value), -1e4) for value in (*found, found[-1])]  # nothing follows the last token


def _distributions(choice: Mapping[str, Any]) -> list[dict[int, float]] | None:
    """For each prompt token what was predicted in its place, by token id; the first is empty."""
    prompt = choice.get("prompt_logprobs")
    if prompt is not None:
        return [{int(token): float(said["logprob"]) for token, said in (entry or {}).items()} for entry in prompt]
    echoed = (choice.get("logprobs") or {}).get("top_logprobs")
    if echoed is None:
        return None
    return [{token_number(name): float(value) for name, value in (entry or {}).items()} for entry in echoed]
