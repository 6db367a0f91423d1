"""Verifiable rewards of completions: a function of the user's, a pattern, an answer, an integer expression, a model.

A reward is called with the prompts and the completions, one of each a row, and with further columns of the data by
name, and returns a number a row:

    reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> Sequence[float] or Tensor [B]

`score` calls one with a time limit and checks what comes back, so that a wrong function gives one sentence.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import math
import operator
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, KullbackError, RewardError

__all__ = [
    "ArithmeticReward",
    "ExactReward",
    "ModelReward",
    "PatternReward",
    "Reward",
    "arithmetic_value",
    "constant_groups",
    "load_reward",
    "score",
]

Reward = Callable[..., Any]

_LARGEST_DIGITS = 60
_INTEGER = re.compile(r"[-+]?\d+")
_EXPRESSION = re.compile(r"[-+(]*\d[\d\s+\-*/%()]*")


def load_reward(place: str) -> Reward:
    """The function named "package.module:name", of a module that is installed or here, or "path/to/file.py:name".

    Raises ConfigError for another form, DataError for a module, file or name that is not there or fails to load.
    """
    where, _, name = place.rpartition(":")
    if not where or not name.isidentifier():
        raise ConfigError(f'a reward is named "module:function" or "file.py:function", not {place!r}')
    try:
        module = _module_of_file(Path(where)) if where.endswith(".py") else _module_here(where)
        found = getattr(module, name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise DataError(f"the reward {place} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise DataError(f"the reward {place} is a {type(found).__name__}, and a function is needed")
    if inspect.isclass(found):
        raise DataError(f"the reward {place} is a class: name a function, or an object made from the class")
    reward: Reward = found
    return reward


def _module_here(name: str) -> Any:
    """The module, looked for in the working directory as well, which the kullback command has not on its path."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"kullback_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _OutOfTime(BaseException):
    """Not an Exception, so that a reward which catches those lets it pass."""


def score(
    reward: Reward,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    seconds: float | None = 60.0,
    name: str | None = None,
    **columns: Sequence[Any],
) -> Tensor:
    """Rewards [B], float32, of B completions; columns go to the reward, which need not take those it does not name.

    seconds: what one call may take, None for no limit; in the main thread the call is interrupted, elsewhere it is
    left behind. Raises RewardError where the reward raises, is late, returns another number of values than completions
    or one that is not finite, and ConfigError for a limit that is not positive.

    >>> score(lambda prompts, completions: [len(text) for text in completions], ["a", "b"], ["", "cc"])
    tensor([0., 2.])
    """
    if seconds is not None and not seconds > 0.0:
        raise ConfigError(f"the time limit of a reward is a positive number of seconds, not {seconds}")
    called = name or str(getattr(reward, "__name__", type(reward).__name__))
    known = _named(reward, columns)
    try:
        found = _within(lambda: reward(prompts=list(prompts), completions=list(completions), **known), seconds)
    except _OutOfTime:
        raise RewardError(
            f"the reward {called} took over {seconds:g} s for {len(completions)} completions: make it faster or allow "
            "it more time"
        ) from None
    except KullbackError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's function does; none of it ends the job unsaid
        said = " ".join(str(error).split())
        raise RewardError(f"the reward {called} raised {type(error).__name__}: {said}") from error
    return _as_rewards(found, len(completions), called)


def _named(reward: Reward, columns: dict[str, Sequence[Any]]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return columns
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    names = {parameter.name for parameter in parameters}
    return {name: column for name, column in columns.items() if name in names}


def _as_rewards(found: Any, count: int, name: str) -> Tensor:
    try:
        values = found.detach().cpu().float() if isinstance(found, Tensor) else torch.tensor(
            [float(value) for value in found], dtype=torch.float32
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise RewardError(f"the reward {name} must return a number a completion: {error}") from error
    if values.shape != (count,):
        raise RewardError(f"the reward {name} returned {tuple(values.shape)} values for {count} completions")
    wrong = (~values.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise RewardError(
            f"the reward {name} returned {values[wrong[0]]:g} for completion {wrong[0]} and {len(wrong)} of {count} in "
            "all: return 0 where there is nothing to reward"
        )
    return values


def _within(call: Callable[[], Any], seconds: float | None) -> Any:
    if seconds is None:
        return call()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _with_alarm(call, seconds)
    return _in_thread(call, seconds)


def _with_alarm(call: Callable[[], Any], seconds: float) -> Any:
    late, here, traced = False, inspect.currentframe(), sys.gettrace()

    def watch(frame: FrameType, event: str, value: Any) -> Any:
        if event == "line":
            raise _OutOfTime
        return watch

    def end(number: int, frame: FrameType | None) -> None:
        # The call may catch all there is and go on. What it does next then ends it: there is no way back into its try.
        nonlocal late
        late = True
        while frame is not None and frame is not here:
            frame.f_trace, frame = watch, frame.f_back
        sys.settrace(watch)
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, 1.0))
    try:
        found = call()
    finally:
        sys.settrace(traced)
        signal.setitimer(signal.ITIMER_REAL, outer)
        signal.signal(signal.SIGALRM, before)
    if late:
        raise _OutOfTime
    return found


def _in_thread(call: Callable[[], Any], seconds: float) -> Any:
    held: dict[str, Any] = {}

    def work() -> None:
        try:
            held["value"] = call()
        except BaseException as error:  # handed on to the thread that waits
            held["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise _OutOfTime
    if "error" in held:
        raise held["error"]
    return held["value"]


@dataclass(frozen=True, slots=True)
class PatternReward:
    """1 for a completion in which a regular expression is found, or with `whole` that it matches from end to end.

    Raises ConfigError for an expression that cannot be compiled.

    >>> PatternReward(r"<answer>.*</answer>")(["?"] * 2, ["so <answer>7</answer>", "7"])
    [1.0, 0.0]
    """

    pattern: str
    whole: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"the pattern {self.pattern!r} is no regular expression: {error}") from error

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        known = re.compile(self.pattern, re.DOTALL)
        found = known.fullmatch if self.whole else known.search
        return [float(found(text) is not None) for text in completions]


@dataclass(frozen=True, slots=True)
class ExactReward:
    """1 where the answer in the completion equals that of the column `answer`, blanks at the ends apart.

    The answer is what the first group of `pattern` catches at its last place, or the whole completion without one.

    >>> ExactReward(r"= *(\\d+)")(["1+1"] * 2, ["1+1 = 2", "= 3"], answer=["2", "2"])
    [1.0, 0.0]
    """

    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            PatternReward(self.pattern)
            if re.compile(self.pattern).groups < 1:
                raise ConfigError(f"the pattern {self.pattern!r} has no group around the answer: put one in brackets")

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
        return [
            float(self._answer(text) == str(wanted).strip()) for text, wanted in zip(completions, answer, strict=True)
        ]

    def _answer(self, text: str) -> str | None:
        if self.pattern is None:
            return text.strip()
        found = list(re.finditer(self.pattern, text, re.DOTALL))
        return (found[-1].group(1) or "").strip() if found else None


@dataclass(frozen=True, slots=True)
class ArithmeticReward:
    """1 where the completion's first integer, or its last, is the value of the integer expression in the prompt.

    The prompt's expression is the longest run of digits, brackets and operators in it that has a value; a prompt
    without one is a DataError.

    >>> ArithmeticReward()(["12+7=", "What is (2+3)*4?"], ["19", "24"])
    [1.0, 0.0]
    """

    last: bool = False

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [
            float(self._answer(text) == self._value(prompt)) for prompt, text in zip(prompts, completions, strict=True)
        ]

    def _value(self, prompt: str) -> int:
        for found in sorted(_EXPRESSION.findall(prompt), key=len, reverse=True):
            with suppress(DataError):
                return arithmetic_value(found.strip())
        raise DataError(f"the prompt {prompt[:80]!r} has no integer expression with a value")

    def _answer(self, text: str) -> int | None:
        found = _INTEGER.findall(text)
        if not found:
            return None
        chosen = found[-1 if self.last else 0]
        return int(chosen) if len(chosen) <= _LARGEST_DIGITS else None


_OPERATORS: dict[type[ast.AST], Callable[..., int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def arithmetic_value(expression: str) -> int:
    """The value of an integer expression with + - * // % and brackets, and / where it leaves no remainder.

    Nothing else is evaluated. Raises DataError for anything else, a division by zero, or numbers of over 60 digits.

    >>> arithmetic_value("2*(3+4) - 6/3")
    12
    """
    try:
        if len(expression) > 1000 or not re.fullmatch(r"[\d\s+\-*/%()]+", expression, re.ASCII):
            raise ValueError("it has other characters, or over 1000")
        return _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:
        shown = repr(expression[:80])
        raise DataError(f"{shown} is no integer expression of + - * / // % and brackets: {error}") from error


def _evaluate(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_evaluate(node.operand))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        value, rest = divmod(_evaluate(node.left), _evaluate(node.right))
        if rest:
            raise ValueError("a division leaves a remainder")
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    else:
        raise ValueError(f"{type(node).__name__} is not allowed")
    if abs(value) >= 10**_LARGEST_DIGITS:
        raise ValueError(f"a number has over {_LARGEST_DIGITS} digits")
    return value


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' table of weights that are missing: what is wrong is said in a sentence."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class ModelReward:
    """The score of a sequence classifier with one label, from its directory, for prompt and completion together.

    batch: texts at once; length: tokens of a text at most, its end kept, or as many as the model has places for.
    Raises DataError for a directory that cannot be loaded, a model with another number of labels, or one whose score
    was never trained.
    """

    def __init__(
        self, folder: str | Path, *, batch: int = 16, length: int = 1024, device: torch.device | str = "cpu"
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            with _quiet_loading():
                self.model, found = AutoModelForSequenceClassification.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True
                )
        except Exception as error:  # transformers and safetensors each have their own
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{folder} holds no sequence classifier with its tokenizer: {said}") from error
        if self.model.config.num_labels != 1:
            labels = self.model.config.num_labels
            raise DataError(f"a reward model has one label, and the one in {folder} has {labels}")
        if found["missing_keys"]:
            raise DataError(
                f"{folder} has no weights for {min(found['missing_keys'])}, which would be drawn at random: name a "
                "model that was trained as a sequence classifier"
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.truncation_side = "left"
        self.model = self.model.eval().requires_grad_(False).to(device)
        places = getattr(self.model.config, "max_position_embeddings", None) or length
        self.batch, self.length = batch, min(length, places, self.tokenizer.model_max_length)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
        """Scores [B]."""
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        parts = []
        for start in range(0, len(texts), self.batch):
            rows = self.tokenizer(
                texts[start : start + self.batch], padding=True, truncation=True, max_length=self.length,
                return_tensors="pt",
            )  # fmt: skip
            rows = {name: part.to(self.model.device) for name, part in rows.items() if name != "token_type_ids"}
            parts.append(self.model(**rows).logits.squeeze(-1).float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0)


def constant_groups(rewards: Tensor, *, tolerance: float = 0.0) -> int:
    """How many of the groups [P, G] have equal rewards, and so no advantage and nothing to teach.

    >>> constant_groups(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.5, 0.5]]))
    2
    """
    if not 0.0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance is 0 or more, got {tolerance}")
    return int((rewards.amax(-1) - rewards.amin(-1) <= tolerance).sum())
