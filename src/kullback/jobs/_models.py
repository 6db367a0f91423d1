"""Model directories in and out: every way in which one can be wrong is said in a sentence."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kullback.core.errors import ConfigError, DataError, MissingExtra, ShapeError
from kullback.core.rng import generator
from kullback.models.adapters import adapter_base

__all__ = [
    "add_lora",
    "check_length",
    "check_same_tokenizer",
    "check_weights",
    "load_model",
    "load_tokenizer",
    "merged",
    "without_bars",
]


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of transformers' own: a job tells its listener how far it is."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(folder: str | Path, *, role: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The causal language model of a Hugging Face directory; fresh weights from `seed` where it has a config.json
    alone; the directory of an adapter is the model that it adapts, with the adapter merged in.

    Raises DataError when the directory is missing, is no model, is damaged, or holds weights that are not finite, and
    MissingExtra for an adapter without peft.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = _directory(folder, role)
    base = adapter_base(path)
    if base is not None:
        return _adapted(path, load_model(base, role=f"the base of {role}", dtype=dtype, seed=seed), role)
    if not (path / "config.json").is_file():
        raise DataError(f"{role} {path} has no config.json: name a directory made by save_pretrained")
    try:
        if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        else:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            with _seeded(seed):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # transformers, safetensors and json each have their own
        raise DataError(f"{role} {path} could not be loaded as a causal language model: {_sentence(error)}") from error
    check_weights(model, role=f"{role} {path}")
    return model


def _adapted(path: Path, model: Any, role: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra("peft", extra="lora") from error
    try:
        with _unwarned():
            found = merged(PeftModel.from_pretrained(model, str(path)))
    except Exception as error:  # peft, torch and safetensors each have their own
        raise DataError(f"{role} {path} is an adapter that does not fit its model: {_sentence(error)}") from error
    check_weights(found, role=f"{role} {path}")
    return found.requires_grad_(True)  # peft has frozen it


def load_tokenizer(folder: str | Path, *, role: str) -> Any:
    """The tokenizer of a model directory, with an end-of-text token. Raises DataError when there is none.

    That of an adapter which has none of its own is the one of the model that it adapts.
    """
    from transformers import AutoTokenizer

    path = _directory(folder, role)
    base = None if (path / "tokenizer_config.json").is_file() else adapter_base(path)
    if base is not None:
        return load_tokenizer(base, role=f"the base of {role}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise DataError(f"{role} {path} has no tokenizer that loads: {_sentence(error)}") from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"{role} {path} has a tokenizer without an end-of-text token: set eos_token and save it again")
    return tokenizer


def check_weights(model: Any, *, role: str) -> None:
    """Raise DataError when a weight is NaN or infinite, naming the first such tensor."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise DataError(f"{role} has weights that are not finite in {name}: the checkpoint is damaged")


def check_length(model: Any, length: int, *, role: str) -> None:
    """Raise ConfigError where blocks of `length` tokens are longer than the model was made for."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ConfigError(f"data.length is {length} tokens and the {role} was made for {most} at most: lower it")


def check_same_tokenizer(teacher: Any, student: Any, *, roles: tuple[str, str] = ("teacher", "student")) -> None:
    """Raise ShapeError unless both tokenizers give the same tokens the same numbers; roles: what to call their models.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differ = sum(theirs.get(token) != index for token, index in ours.items())
    raise ShapeError(
        f"{roles[0]} has {len(theirs)} tokens, {roles[1]} {len(ours)}, and {differ} of the {roles[1]}'s tokens mean "
        f"another number to the {roles[0]}: they are compared token by token, so give a {roles[1]} with the "
        f"{roles[0]}'s tokenizer"
    )


def add_lora(model: Any, *, rank: int, alpha: int, targets: tuple[str, ...], seed: int = 0) -> Any:
    """The model with fresh low-rank adapters from `seed` as its only trainable weights. MissingExtra without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("peft", extra="lora") from error
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets) if targets else "all-linear", task_type="CAUSAL_LM"
    )
    try:
        with _seeded(seed), _unwarned():
            return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"adapters could not be added: {_sentence(error)}") from error


def merged(model: Any) -> Any:
    """The plain model with its adapters merged in; a model without adapters as it is."""
    return model.merge_and_unload() if getattr(model, "peft_config", None) else model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Libraries that draw weights from the global state draw them from `seed`, and leave that state as it was."""
    with torch.random.fork_rng():
        torch.random.default_generator.set_state(generator(seed, "fresh weights").get_state())
        yield


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without what peft is told about names that transformers will give up: the user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _directory(folder: str | Path, role: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(f"{role} {path} is not a directory: download the model first and name its folder")
    return path


def _sentence(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"config.json is not JSON (line {error.lineno})"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
