"""A client of OpenAI-compatible servers: JSON over HTTP, tried again where the server is busy."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from kullback.core.errors import DataError

__all__ = ["CompletionServer", "token_number"]


class CompletionServer:
    """A server by its address up to /v1, such as http://127.0.0.1:8000/v1.

    model: its name there, empty for the first that the server lists; timeout: seconds; retries: further tries after a
    failed request, with a pause that doubles. Raises DataError when the server cannot be reached or lists no model.
    """

    def __init__(self, url: str, *, model: str = "", timeout: float = 60.0, retries: int = 3) -> None:
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.model = model or self._first_model()

    def completions(self, body: Mapping[str, Any], *, prompts: int) -> list[dict[str, Any]]:
        """The choices of a request, in the order of their index; `prompts` says how many there have to be.

        Raises DataError for another number, a refusal, or an answer that is no JSON object.
        """
        choices = self.ask("completions", {"model": self.model, **body}).get("choices", [])
        if len(choices) != prompts:
            raise DataError(f"{self.url} answered {len(choices)} of {prompts} prompts: check its batch limit")
        return sorted(choices, key=lambda choice: choice.get("index", 0))

    def ask(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """The JSON object that the server answers, to a GET where body is None and else to a POST."""
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

    def _first_model(self) -> str:
        models = self.ask("models", None).get("data", [])
        if not models:
            raise DataError(f"{self.url} lists no model: give its address up to /v1")
        return str(models[0]["id"])


def token_number(name: str) -> int:
    """The token id that a server writes as "token_id:17". Raises DataError for a token that is named by its text.

    >>> token_number("token_id:17")
    17
    """
    try:
        return int(name.rsplit(":", 1)[-1])
    except ValueError:
        raise DataError(
            "the server names tokens by their text, which is ambiguous: start it so that it returns token ids"
        ) from None
