"""The steps of the distill job: what it loads, each training of a student, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kullback.core.errors import ConfigError, DataError
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.distill._hf import DistillTrainer, LiveTeacher, common_vocabulary
from kullback.distill.measure import measure
from kullback.distill.objective import Objective
from kullback.distill.served import ServedTeacher
from kullback.distill.teachers import CachedTeacher
from kullback.jobs._checkpoints import RunCheckpoints
from kullback.jobs._distill_report import write_report
from kullback.jobs._models import add_lora, check_length, check_same_tokenizer, load_model, load_tokenizer
from kullback.jobs._parts import processes, quiet_elsewhere, removed_on_error, start_run, train_part
from kullback.jobs._texts import Texts, pack_texts
from kullback.jobs._training import Listener, TrainingConfig, training_arguments
from kullback.jobs.distill import DistillConfig, LoraSettings, ObjectiveConfig, baseline_of, check, objective_of

__all__ = ["Distillation", "Part"]


class _Trainer(RunCheckpoints, DistillTrainer):
    """Distillation with checkpoints in the run directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One training of the student: its role, its seed and all that determines it."""

    role: str
    seed: int
    teacher: str
    student: str
    objective: ObjectiveConfig
    training: TrainingConfig
    lora: LoraSettings

    @property
    def name(self) -> str:
        return f"{self.role}-{self.seed}"

    @property
    def text(self) -> str:
        what = "cross-entropy alone" if self.role == "baseline" else f"{self.objective.name} to the teacher"
        return f"{self.role}, seed {self.seed}: {what}"


class Distillation:
    """A distill job at work: models and texts are loaded when it is made, then each part is trained."""

    def __init__(self, config: DistillConfig, out: Path, *, listen: Listener, resume: bool = False) -> None:
        check(config)
        self.config, self.out, self.state = config, out, processes(config.training)
        self.listen = quiet_elsewhere(listen, self.state)
        fresh = not resume and not out.exists()
        self.divergence = objective_of(config.objective).divergence
        self.teacher_folder, self.tokenizer = self._teacher_and_tokenizer()
        self.teacher, self.teacher_tokens = self._teacher()
        self.student_tokens = self._check_student()
        self.vocabulary = common_vocabulary(self.teacher_tokens, self.student_tokens, len(self.tokenizer))
        if self.student_tokens != self.teacher_tokens:
            compared = f"{self.vocabulary} are compared"
            self.listen(
                {"kind": "note", "text": f"heads of {self.teacher_tokens} and {self.student_tokens} tokens: {compared}"}
            )
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.vocabulary = self.vocabulary
        self.run = start_run(self.state, out, config, kind="distill", resume=resume)
        with removed_on_error(out if fresh and self.state.is_main_process else None):
            self.texts = self._texts()
            self._check_cached()

    @property
    def parts(self) -> list[Part]:
        """Every training of the job, the distilled student of each seed before its baseline."""
        roles = {"distilled": self.config.objective}
        if self.config.baseline:
            roles["baseline"] = baseline_of(self.config)
        config = self.config
        shared = Part(
            role="", seed=0, teacher=config.teacher, student=config.student, objective=config.objective,
            training=config.training, lora=config.lora,
        )  # fmt: skip
        return [
            replace(shared, role=role, seed=seed, objective=objective)
            for seed in config.seeds
            for role, objective in roles.items()
        ]

    def train(self, part: Part) -> None:
        """Train one part to its end, from its latest checkpoint; a part that is finished is left as it is."""
        train_part(self, part, kind="distill-part", metrics=("cross_entropy", "perplexity", "divergence"))

    def finish(self) -> Run:
        """Gather the parts into the run's report, samples, curves and model directory (that of the first seed)."""
        if self.state.is_main_process:
            write_report(self)
        self.state.wait_for_everyone()
        return self.run

    def student(self, seed: int) -> Any:
        """The student as it starts out for `seed`."""
        if self.config.student:
            model = load_model(self.config.student, role="student", seed=seed)
            lora = self.config.lora
            if not lora.rank:
                return model
            return add_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed)
        from kullback.models.small import small_llama

        draw = generator(seed, "student")
        model = small_llama(
            len(self.tokenizer), hidden=96, layers=2, heads=4, length=self.config.data.length, generator=draw
        )
        model.config.eos_token_id = model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        return model

    def trainer(self, part: Part, run: Run) -> _Trainer:
        objective: Objective = objective_of(part.objective)
        trainer = _Trainer(
            model=self.student(part.seed),
            args=training_arguments(part.training, run, processes=self.state.num_processes),
            train_dataset=self.texts.train,
            data_collator=_collate,
            teacher=self.teacher if objective.needs_teacher else None,
            objective=objective,
            on_policy=part.objective.on_policy,
            prompt=part.objective.prompt,
            vocabulary=self.vocabulary,
            seed=part.seed,
        )
        trainer.run, trainer.keep_checkpoints = run, part.training.keep
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.model.to(trainer.args.device)
        return trainer

    def evaluate(self, trainer: Any) -> dict[str, float]:
        rank, count = self.state.process_index, self.state.num_processes
        mine = list(self.texts.validation[rank::count])
        if len(mine) * count < len(self.texts.validation):  # as many for each process, or sharded weights never meet
            filler = self.texts.validation[0]["input_ids"]
            mine.append({"input_ids": filler, "labels": torch.full_like(filler, -100)})
        return measure(
            trainer.model_wrapped, mine, self.teacher, divergence=self.divergence,
            temperature=self.config.objective.temperature, vocabulary=self.vocabulary,
            reduce=trainer.accelerator.reduce if count > 1 else None,
        )  # fmt: skip

    def _teacher_and_tokenizer(self) -> tuple[str, Any]:
        if self.config.teacher:
            return self.config.teacher, load_tokenizer(self.config.student, role="student")
        from kullback.models.small import trained_llama

        with self.state.main_process_first():
            self.listen({"kind": "stage", "text": "the embedded teacher (trained once, then kept in the cache)"})
            folder = trained_llama(listen=self.listen)
        return str(folder), load_tokenizer(folder, role="teacher")

    def _teacher(self) -> tuple[Any, int]:
        from kullback.distill.teachers import is_teacher_cache

        name = self.teacher_folder
        served = name.startswith(("http://", "https://"))
        if served or is_teacher_cache(name):
            _check_truncated(self.config.objective, served=served)
        if served:
            server = ServedTeacher(name, vocabulary=len(self.tokenizer))
            self._check_labels(server)
            return server, len(self.tokenizer)
        if is_teacher_cache(name):
            cached = CachedTeacher(Path(name), temperature=self.config.objective.temperature)
            self._check_labels(cached)
            self._tell_of_tail(cached)
            if not (Path(name).expanduser() / "tokenizer").is_dir():
                raise DataError(f"the teacher cache {name} holds no tokenizer: write it again with teacher-cache")
            tokenizer = load_tokenizer(Path(name).expanduser() / "tokenizer", role="the tokenizer of teacher cache")
            check_same_tokenizer(tokenizer, self.tokenizer)
            return cached, cached.vocabulary
        model = load_model(name, role="teacher")
        check_length(model, self.config.data.length, role="teacher")
        if self.config.teacher:
            check_same_tokenizer(load_tokenizer(name, role="teacher"), self.tokenizer)
        return LiveTeacher(model), model.get_output_embeddings().weight.shape[0]

    def _tell_of_tail(self, teacher: CachedTeacher) -> None:
        """A note where a cache makes less of the objective than it could."""
        config, text = self.config.objective, ""
        name = config.name.replace("-", "_")
        if name != "pld" and not teacher.summary.drawn:
            text = f"the cache has no tokens drawn from the tail: all but the {teacher.kept} kept are one outcome"
        elif name == "bd_kd" and not teacher.has_entropy and "gate" not in config.options:
            text = (
                "the cache is of a format without entropies: bd_kd estimates the teacher's from the tokens drawn, and "
                "from a cache written again has it exactly"
            )
        if text:
            self.listen({"kind": "note", "text": text})

    def _check_labels(self, teacher: CachedTeacher | ServedTeacher) -> None:
        """Raise ConfigError where a truncated teacher does not say what a loss that looks at labels asks of it."""
        objective = objective_of(self.config.objective)
        if not objective.needs_labels:
            return
        name = self.config.objective.name.replace("-", "_")
        picks = self.config.objective.options.get("topk")
        if not teacher.has_labels:
            raise ConfigError(
                f"{name} asks how probable the teacher finds the next token, kept or not, and neither caches of the "
                "first format nor this kind of server say so: write the cache again with teacher-cache"
            )
        if picks is not None and float(picks) > teacher.kept:
            raise ConfigError(
                f"objective.options.topk is {picks} and the teacher gives {teacher.kept} tokens at each position: "
                "lower it, or write a cache that keeps more"
            )
        if name == "pld":
            picked = f"rankings have at most {teacher.kept} picks, as many tokens as the teacher gives"
            self.listen({"kind": "note", "text": picked})

    def _check_cached(self) -> None:
        """Raise DataError before any training where a cache does not hold these texts."""
        if isinstance(self.teacher, CachedTeacher):
            for block in (self.texts.train[0], self.texts.train[len(self.texts.train) - 1], self.texts.validation[0]):
                self.teacher(block["input_ids"][None], block["input_ids"][None])

    def _check_student(self) -> int:
        student = self.student(self.config.seeds[0])
        check_length(student, self.config.data.length, role="student")
        tokens: int = student.get_output_embeddings().weight.shape[0]
        if tokens < len(self.tokenizer):
            raise DataError(
                f"the student's head has {tokens} tokens and its tokenizer {len(self.tokenizer)}: resize it"
            )
        return tokens

    def _texts(self) -> Texts:
        with self.state.main_process_first():
            return pack_texts(self.config.data, self.tokenizer, self.out / "data", self.listen)


def _collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": ids, "labels": ids.clone()}


def _check_truncated(objective: ObjectiveConfig, *, served: bool) -> None:
    """Raise ConfigError for what a teacher that gives its likeliest tokens alone cannot do."""
    if served and objective.temperature != 1:
        raise ConfigError(
            f"a server answers at temperature 1 and the objective asks for {objective.temperature}: a truncated "
            "distribution cannot be tempered, so write a cache at that temperature"
        )
    if not served and objective.on_policy:
        raise ConfigError("a cache knows its own texts alone: on-policy steps need a live or served teacher")
