"""A teacher behind an OpenAI-compatible completions endpoint that returns top-K log-probabilities of the prompt.

Two dialects are understood in the answer: `prompt_logprobs` (a list of {token id: {"logprob": x}}, asked for by that
name), and `logprobs.top_logprobs` of an echoed prompt, whose keys are token ids written "token_id:17".
Shapes: B batch, T positions, K tokens kept.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import DataError
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
        self.url, self.vocabulary, self.kept = url.rstrip("/"), vocabulary, kept
        self.timeout, self.retries = timeout, retries
        self.model = model or self._first_model()

    def __call__(self, ids: Tensor, mask: Tensor) -> TeacherOutput:
        """top_ids and top_log_probs [B, T, K] and tail_log_prob [B, T]; position t is about token t + 1."""
        body = {
            "model": self.model, "prompt": ids.tolist(), "max_tokens": 1, "echo": True, "temperature": 1.0,
            "logprobs": self.kept, "prompt_logprobs": self.kept, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        choices = self._ask("completions", body).get("choices", [])
        choices = sorted(choices, key=lambda choice: choice.get("index", 0))
        if len(choices) != len(ids):
            raise DataError(f"{self.url} answered {len(choices)} of {len(ids)} prompts: check its batch limit")
        rows = [self._row(choice, ids.shape[1]) for choice in choices]
        top_ids = torch.tensor([row[0] for row in rows], device=ids.device)
        top = torch.tensor([row[1] for row in rows], device=ids.device)
        rest = -torch.expm1(top.double().logsumexp(-1).clamp(max=0.0))
        return TeacherOutput(top_ids=top_ids, top_log_probs=top, tail_log_prob=rest.clamp(min=1e-9).log().float())

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

    def _first_model(self) -> str:
        models = self._ask("models", None).get("data", [])
        if not models:
            raise DataError(f"{self.url} lists no model: give its address up to /v1")
        return str(models[0]["id"])

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    found = json.load(answer)
                break
            except urllib.error.HTTPError as error:
                if error.code < 500 or attempt == self.retries:
                    said = error.read(200).decode(errors="replace").strip()
                    raise DataError(f"{self.url} refused {path} with status {error.code}: {said}") from error
            except (OSError, ValueError) as error:
                if attempt == self.retries:
                    raise DataError(f"{self.url} gives no usable answer to {path} ({error}): is it running?") from error
            time.sleep(0.2 * 2**attempt)
        if not isinstance(found, dict):
            raise DataError(
                f"{self.url} answers {path} with something else than a JSON object: is it the right address?"
            )
        return found


def _distributions(choice: Mapping[str, Any]) -> list[dict[int, float]] | None:
    """For each prompt token what was predicted in its place, by token id; the first is empty."""
    prompt = choice.get("prompt_logprobs")
    if prompt is not None:
        return [{int(token): float(said["logprob"]) for token, said in (entry or {}).items()} for entry in prompt]
    echoed = (choice.get("logprobs") or {}).get("top_logprobs")
    if echoed is None:
        return None
    try:
        return [
            {int(name.rsplit(":", 1)[-1]): float(value) for name, value in (entry or {}).items()} for entry in echoed
        ]
    except ValueError:
        raise DataError(
            "the server names tokens by their text, which is ambiguous: start it so that it returns token ids"
        ) from None
