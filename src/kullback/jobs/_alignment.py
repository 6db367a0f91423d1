"""The steps of the align job: what it loads, each training of the policy, and how the policy is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kullback.align._hf import AlignTrainer, Reference, adapter_reference, frozen_reference, index_items
from kullback.align.difficulty import DifficultyFilter, PassRateTracker, difficulty_filter
from kullback.align.difficulty_sampler import FilteredSource
from kullback.align.f_dpg import FDpg
from kullback.align.scored import ScoredRollouts
from kullback.core.errors import ConfigError, RewardError
from kullback.core.runs import Run
from kullback.decode.served import ServedSampler
from kullback.jobs._align_cuts import CutRollouts, said_of_examples
from kullback.jobs._align_data import Examples, collator, read_split
from kullback.jobs._align_methods import chosen_method
from kullback.jobs._align_reference import check_served, served_reference, with_teacher
from kullback.jobs._align_rehearsal import rehearsed
from kullback.jobs._align_report import METRICS, write_report
from kullback.jobs._align_rewards import EqualRewards, chosen_reward
from kullback.jobs._align_soup import averaged
from kullback.jobs._align_validation import Validation
from kullback.jobs._checkpoints import RunCheckpoints
from kullback.jobs._models import add_lora, check_same_tokenizer, load_model, load_tokenizer
from kullback.jobs._parts import processes, quiet_elsewhere, removed_on_error, start_run, train_part
from kullback.jobs._training import Listener, LoraSettings, TrainingConfig, training_arguments
from kullback.jobs.align import AlignConfig, MethodConfig, RewardConfig, SamplingConfig, check
from kullback.models.adapters import check_one_base

__all__ = ["Alignment", "Part"]

_FORGETTING = 0.5  # of a tracked pass rate at each new look: the policy has moved since


class _Trainer(RunCheckpoints, AlignTrainer):
    """Alignment with checkpoints in the run directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One training of the policy: its seed and all that determines it."""

    seed: int
    model: str
    reference: tuple[str, ...]
    reference_weights: tuple[float, ...]
    method: MethodConfig
    reward: RewardConfig
    sampling: SamplingConfig
    training: TrainingConfig
    lora: LoraSettings

    @property
    def name(self) -> str:
        return f"aligned-{self.seed}"

    @property
    def text(self) -> str:
        return f"{self.method.name}, seed {self.seed}"


class Alignment:
    """An align job at work: model and examples are loaded when it is made, then each part is trained."""

    def __init__(self, config: AlignConfig, out: Path, *, listen: Listener, resume: bool = False) -> None:
        check(config)
        self.config, self.out, self.state = config, out, processes(config.training)
        self.listen = quiet_elsewhere(listen, self.state)
        fresh = not resume and not out.exists()
        self.kind = chosen_method(config.method).kind
        self._check_method()
        self.folder = self._folder()
        self.tokenizer = load_tokenizer(self.folder, role="model")
        self.reward = chosen_reward(config.reward, needed=self.kind == "online", device=self.state.device)
        training, validation = read_split(config.data, self.kind, self.tokenizer)
        self.reward_columns(training)
        self.examples, self.validation_examples = training, validation
        # So that what is wrong with the model is said before anything is written.
        self._check_positions(self.policy(config.seeds[0]))
        self.reference_server = served_reference(config.reference)
        self.reference_ends: list[int] = []  # the end tokens of the references' own
        self.notes = said_of_examples([training, validation], config.data)  # what to know about the input
        self.reference_model = self._reference_model()
        self.server = ServedSampler(config.sampling.server) if config.sampling.server else None
        self.run = start_run(self.state, out, config, kind="align", resume=resume)
        for text in self.notes:
            self._note(self.run, "input", text)
        with removed_on_error(out if fresh and self.state.is_main_process else None):
            self.validation = Validation(self, validation)

    @property
    def parts(self) -> list[Part]:
        """Every training of the job, one a seed."""
        config = self.config
        return [
            Part(
                seed=seed, model=config.model, reference=config.reference,
                reference_weights=config.reference_weights, method=config.method, reward=config.reward,
                sampling=config.sampling, training=config.training, lora=config.lora,
            )
            for seed in config.seeds
        ]  # fmt: skip

    def train(self, part: Part) -> None:
        """Train one part to its end, from its latest checkpoint; a part that is finished is left as it is."""
        try:
            train_part(self, part, kind="align-part", metrics=METRICS)
        except RewardError as error:
            kept = Run.open(self.out / "parts" / part.name).latest_checkpoint()
            if kept is None:
                raise
            step = int(kept.name.rpartition("-")[2])
            raise RewardError(f"{error}; {part.text} is kept up to step {step}, --resume goes on from there") from error

    def finish(self) -> Run:
        """Gather the parts into the run's report, samples, curves and model directory (that of the first seed)."""
        if self.state.is_main_process:
            write_report(self)
        self.state.wait_for_everyone()
        return self.run

    def policy(self, seed: int) -> Any:
        """The policy as it starts out for `seed`."""
        model = load_model(self.folder, role="model", seed=seed)
        lora = self.config.lora
        if not lora.rank:
            return model
        return add_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed)

    def reference_of(self, policy: Any) -> Reference:
        """The log-probabilities of the reference: a model of its own, or the policy with its adapters off."""
        options: dict[str, Any] = {"temperature": self._temperature(), "vocabulary": len(self.tokenizer)}
        if self.reference_server is not None:
            return self.reference_server
        if self.reference_model is None:
            return adapter_reference(policy, **options)
        return frozen_reference(self.reference_model, **options)

    def trainer(self, part: Part, run: Run) -> _Trainer:
        choice = chosen_method(part.method)
        policy, online = self.policy(part.seed), self.kind == "online"
        end, correct = self.tokenizer.eos_token_id, part.reward.correct
        method = with_teacher(choice.method, correct=correct, end=end, ends=self.reference_ends)
        if getattr(method, "unheard", ()):
            self._note(run, "end", "the teacher's texts end with another token: it is not heard where the model ends")
        if self.server is not None and isinstance(method, FDpg):
            method = replace(method, proposal="given")
        prompts: Sequence[int] = range(len(self.examples))
        if choice.rehearsal is not None:
            prompts, method = rehearsed(self, choice, policy, run)
        trainer = _Trainer(
            model=policy,
            args=training_arguments(part.training, run, processes=self.state.num_processes),
            train_dataset=index_items(prompts) if online else self.examples,
            data_collator=None if online else collator(self.tokenizer.eos_token_id),
            method=method,
            reference=self.reference_of(policy) if method.needs_reference else None,
            reference_model=self.reference_model,
            rollouts=self._training_source(run) if online else None,
            group=part.sampling.group,
            temperature=self._temperature(),
            vocabulary=len(self.tokenizer),
            seed=part.seed,
        )
        trainer.run, trainer.keep_checkpoints = run, part.training.keep
        return trainer

    def _training_source(self, run: Run) -> Any:
        """Where the training completions come from: the policy or a server, all prompts or those of a difficulty."""
        sampling = self.config.sampling
        source = replace(
            self.rollouts(self.examples, self.reward_failed(run)),
            server=self.server,
            told=EqualRewards(lambda text: self._note(run, "reward_equal", text)),
            seen=CutRollouts(self.config.data.length, lambda text: self._note(run, "cut", text)),
        )
        if not sampling.filter:
            return source
        tracker = PassRateTracker(len(self.examples), forgetting=_FORGETTING) if sampling.tracked else None
        return FilteredSource(
            source=source, keep=self._filter(), max_draws=sampling.most_draws, told=self._groups_told(run),
            tracker=tracker,
        )  # fmt: skip

    def _filter(self) -> DifficultyFilter:
        mode: Any = self.config.sampling.filter
        return difficulty_filter(mode, self.config.sampling.filter_threshold)

    def _groups_told(self, run: Run) -> Callable[[int, int], None]:
        """Records how many groups a step drew and how many of them were kept."""

        def tell(drawn: int, kept: int) -> None:
            if self.state.is_main_process:
                run.event("groups", drawn=drawn, kept=kept)

        return tell

    def rollouts(self, examples: Examples, on_error: Any = None) -> ScoredRollouts:
        """The sampling of completions of these prompts, with their rewards (0 where the job has no reward)."""
        end = self.tokenizer.eos_token_id
        return ScoredRollouts(
            prompts=examples.prompts, texts=examples.texts, columns=self.reward_columns(examples),
            reward=self.reward or _no_reward, length=self.config.data.length, decode=self.tokenizer.decode, end=end,
            pad=end, temperature=self.config.sampling.temperature, vocabulary=len(self.tokenizer),
            batch=self.config.sampling.batch or None, seconds=self.config.reward.seconds, on_error=on_error,
            name=self.config.reward.name or None,
        )  # fmt: skip

    def evaluate(self, trainer: Any) -> dict[str, float]:
        return self.validation.measure(trainer)

    def reward_columns(self, examples: Examples) -> dict[str, Any]:
        """The fields of the data that the reward may look at. ConfigError when the one it compares with is missing."""
        columns = dict(examples.columns)
        exact = self.reward is not None and self.config.reward.name == "exact"
        if exact and any(value is None for value in columns.get("answer", [None])):
            raise ConfigError("reward exact compares with the field 'answer', which not all of the data has")
        return columns

    def _temperature(self) -> float:
        """Of the policy in the loss: that of the samples where there are any, else 1."""
        return self.config.sampling.temperature if self.kind == "online" else 1.0

    def _check_method(self) -> None:
        training = self.config.training
        if training.fsdp and self.kind == "online":
            raise ConfigError("sampling needs the whole model in every process: leave training.fsdp out")
        if self.config.sampling.filter and self.kind != "online":
            raise ConfigError(f"{self.config.method.name} learns from given completions: leave sampling.filter out")
        if self.config.sampling.filter:
            self._filter()
        if self.config.sampling.server and self.kind != "online":
            raise ConfigError(f"{self.config.method.name} learns from given completions: leave sampling.server out")
        method = chosen_method(self.config.method).method
        self._check_drawing(method)
        check_served(self.config, method)
        if self.config.method.name == "kdrl" and not self.config.reference:
            raise ConfigError("kdrl learns from a teacher as well: name it as the reference")
        if self.config.method.name == "salsa" and len(self.config.reference) < 2:
            raise ConfigError("salsa has the average of several fine-tuned models as reference: name two or more")

    def _check_drawing(self, method: Any) -> None:
        """Whether the method can have its completions in the way that sampling says."""
        name, sampling = self.config.method.name, self.config.sampling
        smallest = getattr(method, "smallest_group", 2)
        if self.kind == "online" and sampling.group < smallest:
            raise ConfigError(
                f"{name} compares completions of a prompt and needs {smallest}: set sampling.group over {smallest - 1}"
            )
        others = hasattr(method, "opponents") and method.opponents(sampling.group)
        if sampling.filter and others:
            raise ConfigError(f"{name} has another policy's completions too: leave sampling.filter out")
        if sampling.server and getattr(method, "proposal", "online") == "offline":
            raise ConfigError("a server draws the completions, and proposal offline would too: leave one of them out")

    def _check_positions(self, model: Any) -> None:
        """Whether the longest prompt and a completion after it have a place in the model."""
        places = getattr(model.config, "max_position_embeddings", None)
        prompt = max(len(ids) for part in (self.examples, self.validation_examples) for ids in part.prompts)
        length = self.config.data.length
        if places is not None and prompt + length > places:
            raise ConfigError(
                f"the longest prompt has {prompt} tokens and data.length allows {length} more, and the model has "
                f"{places} positions: lower data.prompt_length or data.length so that they come to no more"
            )

    def _folder(self) -> str:
        if self.config.model:
            return self.config.model
        from kullback.models.adder import trained_adder

        with self.state.main_process_first():
            self.listen({"kind": "stage", "text": "the embedded model (trained once, then kept in the cache)"})
            return str(trained_adder(listen=self.listen))

    def _reference_model(self) -> Any:
        """The model of the reference; None for the policy with its adapters off."""
        folders = self.config.reference
        if self.reference_server is not None:
            return None
        if not folders:
            return None if self.config.lora.rank else load_model(self.folder, role="reference")
        for folder in folders:
            tokenizer = load_tokenizer(folder, role="reference")
            check_same_tokenizer(tokenizer, self.tokenizer, roles=("reference", "model"))
            self.reference_ends.append(tokenizer.eos_token_id)
        check_one_base(folders)
        models = [load_model(folder, role="reference") for folder in folders]
        if len(models) == 1:
            return models[0]
        return averaged(
            models, self.config.reference_weights or None, self.validation_examples.prompts,
            length=self.config.data.length, end=self.tokenizer.eos_token_id, vocabulary=len(self.tokenizer),
            tell=self.notes.append,
        )  # fmt: skip

    def reward_failed(self, run: Run) -> Any:
        """What happens when a reward fails: None stops the job, else it is told and recorded."""
        if self.config.reward.on_error == "stop":
            return None

        def tell(error: RewardError) -> None:
            self._note(run, "reward_error", str(error), "; its completions get 0")

        return tell

    def _note(self, run: Run, kind: str, text: str, more: str = "") -> None:
        """Something to know about, recorded and told."""
        if self.state.is_main_process:
            run.event(kind, text=text)
        self.listen({"kind": "note", "text": text + more})


def _no_reward(prompts: Any, completions: Any) -> torch.Tensor:
    """Completions that nobody rewards."""
    return torch.zeros(len(completions))
