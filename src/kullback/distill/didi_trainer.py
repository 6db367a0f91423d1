"""The training loop of DiDi-Instruct: a student, its discriminator and its teacher, a step at a time.

A step draws sequences from the student through an intermediate state at a random time tau, masks them and reference
sequences to that same level, teaches the discriminator to tell the two apart at the masked positions, and moves the
student along grad log q times the discriminator's logit, normalised in groups. See `didi` for the parts.
Source: Zheng et al. 2025 (arXiv 2509.25035); defaults as in their released code, where text and code differ the code's.

Shapes: b sequences, L positions, V symbols.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, ShapeError
from kullback.distill.didi import (
    Trajectory,
    TrajectoryKind,
    density_ratio_reward,
    discriminator_accuracy,
    discriminator_loss,
    grouped_advantages,
    ikl_surrogate,
    matching_kl,
    mean_entropy,
    sample_times,
    time_weights,
    two_step_trajectory,
)
from kullback.models.masked_diffusion import LogLinearSchedule, Schedule, corrupt, logits_at, without_mask
from kullback.models.masked_diffusion_sampling import AncestralSampler

__all__ = ["DiDiSettings", "DiDiTrainer"]

Listener = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiDiSettings:
    """How a student is distilled; the defaults are those released for 169 million weights and 1,024 tokens.

    batch: sequences a step, whole groups of `group`; normalise: rewards within the "group" or over the "batch".
    reference: masked sequences of the "teacher" (drawn in reference_steps) or of the "data" stand for what is real.
    coupled: both sides are masked to the tau of the student's own step, else to a level of their own. beta, tau_clip:
    of tau; tau_shared: the same for all of a group, whose rewards are then of one kind; over_density: divides omega by
    tau's density. kl: weights of KL(teacher||student) at all masks and at z,
    times kl_beta; kl_mix: share of the reverse direction. correct_smoothing: see `corrected_log_odds`.
    discriminator_first: steps before the student moves; student_every: it moves at each so manieth step.
    """

    batch: int = 32
    group: int = 4
    normalise: Literal["group", "batch"] = "group"
    reference: Literal["teacher", "data"] = "data"
    reference_steps: int = 64
    trajectory: TrajectoryKind = "two_step"
    coupled: bool = True
    remask: float = 0.0
    beta: tuple[float, float] = (1.0, 1.0)
    tau_clip: tuple[float, float] = (0.02, 0.98)
    tau_shared: bool = False
    omega_clip: tuple[float, float] = (0.1, 10.0)
    over_density: bool = False
    kl: tuple[float, float] = (0.01, 0.01)
    kl_beta: float = 1.0
    kl_mix: float = 0.0
    entropy: float = 0.02
    reward_clip: float = 8.0
    advantage_clip: float = 3.0
    smoothing: float = 0.1
    correct_smoothing: bool = False
    iterations: int = 10_000
    warmup: int = 1_000
    learning_rate: float = 1e-6
    discriminator_rate: float = 1e-5
    student_clip: float = 0.5
    discriminator_clip: float = 1.0
    ema: float = 0.999
    discriminator_first: int = 0
    student_every: int = 1

    def __post_init__(self) -> None:
        if self.batch < 2 or self.group < 2 or self.batch % self.group:
            given = f"{self.batch} sequences in groups of {self.group}"
            raise ConfigError(f"batch is whole groups of 2 or more, got {given}")
        if min(self.learning_rate, self.discriminator_rate) <= 0.0 or not 0.0 <= self.ema < 1.0:
            given = f"{self.learning_rate}, {self.discriminator_rate} and {self.ema}"
            raise ConfigError(f"learning rates are positive and ema in [0, 1), got {given}")
        if self.reference not in ("teacher", "data") or self.normalise not in ("group", "batch"):
            raise ConfigError(
                f'reference is "teacher" or "data" and normalise "group" or "batch", got {self.reference!r} and '
                f"{self.normalise!r}"
            )
        if min(self.iterations, self.student_every) < 1 or min(self.warmup, self.discriminator_first) < 0:
            raise ConfigError("iterations and student_every are 1 or more, warmup and discriminator_first 0 or more")
        if not 0.0 <= self.remask < 1.0:
            raise ConfigError(f"remask is a share in [0, 1) and is {self.remask}")


class _Resting:
    """A denoiser that may rest on another device than its input: its logits come back to that of the input."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return self.at(z, t, torch.ones_like(z, dtype=torch.bool)).view(*z.shape, -1)

    def at(self, z: Tensor, t: Tensor, places: Tensor) -> Tensor:
        device = next(self.model.parameters(), z).device
        return logits_at(self.model, z.to(device), t.to(device), places.to(device)).to(z.device)


class DiDiTrainer:
    """Distils `teacher` into `student`, a copy of it by default, by `step`; `ema` is the student to keep.

    teacher, student: z [b, L], t [b] to logits [b, L, V]; the teacher is called for its KL terms and as a reference
    only, and may rest on another device. discriminator: z, t to logits [b, L], as `TokenDiscriminator`. length: L. All
    randomness is the generator's, which is on the device of the models.
    Under data parallelism each process steps on its own sequences, and gradients are averaged.
    """

    def __init__(
        self,
        teacher: nn.Module,
        discriminator: nn.Module,
        *,
        mask_id: int,
        length: int,
        settings: DiDiSettings,
        generator: torch.Generator,
        student: nn.Module | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.settings, self.mask_id, self.length, self.generator = settings, mask_id, length, generator
        self.student = copy.deepcopy(teacher if student is None else student).requires_grad_().train()
        self.teacher, self.discriminator = teacher.eval(), discriminator.train()
        self._taught = _Resting(self.teacher)
        self.ema = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.schedule: Schedule = LogLinearSchedule() if schedule is None else schedule
        learning = [value for value in discriminator.parameters() if value.requires_grad]
        self._student_optimizer = torch.optim.AdamW(
            self.student.parameters(), settings.learning_rate, weight_decay=0.0, foreach=True
        )
        self._discriminator_optimizer = torch.optim.AdamW(
            learning, settings.discriminator_rate, weight_decay=0.0, foreach=True
        )
        self.steps = 0

    def fit(
        self, steps: int, batches: Iterator[Tensor] | None = None, *, listen: Listener | None = None
    ) -> DiDiTrainer:
        """Take so many steps, on batches [b, L] of data where they are the reference; listen gets what each came to."""
        for _ in range(steps):
            found = self.step(None if batches is None else next(batches))
            if listen is not None:
                listen(found)
        return self

    def step(self, data: Tensor | None = None, *, prompt: Tensor | None = None) -> dict[str, float]:
        """One step of the discriminator and one of the student; what it came to, by name.

        data [b, L]: whole sequences, for reference="data". prompt [b, L]: symbols that every sequence keeps, masks
        elsewhere; data must then hold the same symbols. Raises ConfigError where data is missing, or would do nothing.
        """
        now, n = self.settings, self.settings.batch
        if (data is None) != (now.reference == "teacher"):
            raise ConfigError(f'reference="{now.reference}": data belongs to reference="data", and only there')
        start = prompt
        if start is None:
            start = torch.full((n, self.length), self.mask_id, device=self.generator.device)
        if start.shape != (n, self.length) or (data is not None and data.shape != start.shape):
            raise ShapeError(f"data and prompt have shape [{n}, {self.length}], a batch of whole sequences")
        times = n // now.group if now.tau_shared else n
        tau = sample_times(times, beta=now.beta, clip=now.tau_clip, generator=self.generator)
        tau = tau.repeat_interleave(n // times)
        moves = self.steps >= now.discriminator_first and (self.steps + 1) % now.student_every == 0
        with torch.set_grad_enabled(moves):
            way = two_step_trajectory(
                self.student, start, tau, schedule=self.schedule, mask_id=self.mask_id, generator=self.generator,
                kind=now.trajectory, remask=now.remask,
            )  # fmt: skip
        level = tau if now.coupled else sample_times(n, clip=now.tau_clip, generator=self.generator)
        fake = self._corrupted(way.x, level, start)
        real_level = level if now.coupled else sample_times(n, clip=now.tau_clip, generator=self.generator)
        real = self._corrupted(self._reference(start) if data is None else data, real_level, start)
        found = self._teach_discriminator(real, fake, real_level, level)
        with torch.no_grad():
            self.discriminator.eval()
            logits = self.discriminator(fake, level.float())
            self.discriminator.train()
            smoothing = now.smoothing if now.correct_smoothing else 0.0
            rewards = density_ratio_reward(logits, fake == self.mask_id, clip=now.reward_clip, smoothing=smoothing)
        found |= {"reward": float(rewards.mean()), "reward_deviation": float(rewards.std())}
        self.steps += 1
        if moves:
            found |= self._move_student(way, rewards, level, tau)
        return found

    def _corrupted(self, x: Tensor, level: Tensor, start: Tensor) -> Tensor:
        keep = start != self.mask_id
        return corrupt(x, self.schedule.alpha(level), self.mask_id, generator=self.generator, keep=keep)

    def _reference(self, start: Tensor) -> Tensor:
        sampler = AncestralSampler(
            self._taught, steps=self.settings.reference_steps, mask_id=self.mask_id, schedule=self.schedule
        )
        return sampler.run(*start.shape, generator=self.generator, prompt=start, device=start.device)

    def _teach_discriminator(self, real: Tensor, fake: Tensor, real_t: Tensor, fake_t: Tensor) -> dict[str, float]:
        now = self.settings
        logits = self.discriminator(torch.cat([real, fake]), torch.cat([real_t, fake_t]).float())
        sides = (*logits.split(len(real)), real == self.mask_id, fake == self.mask_id)
        loss = discriminator_loss(*sides, smoothing=now.smoothing)
        self._apply(loss, self._discriminator_optimizer, now.discriminator_rate, now.discriminator_clip)
        accuracy = discriminator_accuracy(*sides)
        return {"discriminator_loss": float(loss.detach()), "discriminator_accuracy": float(accuracy)}

    def _move_student(self, way: Trajectory, rewards: Tensor, level: Tensor, tau: Tensor) -> dict[str, float]:
        now = self.settings
        advantages = grouped_advantages(rewards, now.group, clip=now.advantage_clip, over=now.normalise)
        weights = time_weights(level, self.schedule, clip=now.omega_clip, beta=now.beta if now.over_density else None)
        loss = ikl_surrogate(way.log_prob, advantages, weights)
        divergence = self._matching(way, tau)
        entropy = mean_entropy(torch.cat([way.first, way.second]))
        loss = loss + now.kl_beta * divergence - now.entropy * entropy
        rate = self._apply(loss, self._student_optimizer, now.learning_rate, now.student_clip)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.student.parameters()), 1.0 - now.ema)
        return {
            "loss": float(loss.detach()), "matching_kl": float(divergence.detach()),
            "entropy": float(entropy.detach()), "learning_rate": rate,
        }  # fmt: skip

    def _matching(self, way: Trajectory, tau: Tensor) -> Tensor:
        """The weighted KL between teacher and student at both states of the way, 0 where its weights are."""
        now, total = self.settings, way.first.new_zeros(())
        pairs = ((now.kl[0], way.start, torch.ones_like(tau), way.first), (now.kl[1], way.z, tau, way.second))
        for weight, z, t, student in pairs:
            if weight * now.kl_beta == 0.0:
                continue
            masked = z == self.mask_id
            if bool(masked.all()):  # all rows are alike
                z, t, masked, student = z[:1], t[:1], masked[:1], student[: z.shape[1]]
            with torch.no_grad():
                taught = without_mask(self._taught.at(z, t.float(), masked), self.mask_id).log_softmax(-1)
            total = total + weight * matching_kl(taught, student, mix=now.kl_mix)
        return total

    def _apply(self, loss: Tensor, optimizer: torch.optim.Optimizer, rate: float, clip: float) -> float:
        """A step of an optimizer along the loss at the schedule's share of its rate, which is returned."""
        now = self.settings
        parameters = optimizer.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient.nan_to_num_()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= torch.distributed.get_world_size()
        nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
        left = (now.iterations - self.steps) / max(1, now.iterations - now.warmup)
        share = min((self.steps + 1) / (now.warmup + 1), max(0.0, left), 1.0)
        optimizer.param_groups[0]["lr"] = rate * share
        optimizer.step()
        return rate * share

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, for `core.checkpoint.save_state`."""
        return {
            "student": self.student.state_dict(), "ema": self.ema.state_dict(),
            "discriminator": self.discriminator.state_dict(), "steps": self.steps,
            "optimizers": [self._student_optimizer.state_dict(), self._discriminator_optimizer.state_dict()],
            "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> DiDiTrainer:
        """Go on from a state; returns itself."""
        self.student.load_state_dict(state["student"])
        self.ema.load_state_dict(state["ema"])
        self.discriminator.load_state_dict(state["discriminator"])
        for optimizer, kept in zip((self._student_optimizer, self._discriminator_optimizer), state["optimizers"]):
            optimizer.load_state_dict(kept)
        self.generator.set_state(state["generator"])
        self.steps = int(state["steps"])
        return self
