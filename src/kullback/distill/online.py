"""Online distillation: networks of different sizes that start together and teach each other, without a trained teacher.

Every pair of networks is ordered by its numbers of parameters, the larger is the teacher of the pair. A network's loss
is its own cross-entropy and the mean of its distillation terms over its pairs, as the student of larger networks
(`bdkd_loss`) and the teacher of smaller ones (`bdkd_teacher_loss`); in each term the other network is a constant, so
one backward pass through the sum of all losses gives every network the gradient of its own.
Source: Amara et al. 2022 (arXiv 2212.12965); mode="dml" is deep mutual learning (Zhang et al. 2018).

Shapes: inputs as the networks take them, logits [..., V], labels and masks [...].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError
from kullback.distill.bd_kd import Gate, Mode, bdkd_loss, bdkd_teacher_loss, bdkd_weights

__all__ = ["OnlineDistiller", "OnlineLoss", "by_size"]


def by_size(networks: Sequence[nn.Module]) -> list[int]:
    """The places of the networks, from the one with the most parameters to the one with the fewest, ties as they come.

    >>> by_size([nn.Linear(2, 3), nn.Linear(20, 3), nn.Linear(2, 3)])
    [1, 0, 2]
    """
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    return sorted(range(len(sizes)), key=lambda place: -sizes[place])


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineLoss:
    """The losses of networks that teach each other; the options are those of `bdkd_loss` for every pair.

    alpha: weight of what a network learns as a student; teacher_alpha: as a teacher, 0 leaves the larger ones to their
    labels. Raises ConfigError for options out of range.

    >>> large, small = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.2, 0.1]])
    >>> [f"{terms['loss']:.4f}" for terms in OnlineLoss(temperature=1.0)([large, small], torch.tensor([0]))]
    ['0.5647', '1.4120']
    """

    mode: Mode = "bdkd"
    delta: float = 2.0
    temperature: float = 2.0
    alpha: float = 1.0
    teacher_alpha: float = 1.0
    gate: Gate = "entropy"
    gate_temperature: float = 1.0
    width: float | None = None

    def __post_init__(self) -> None:
        if not self.alpha >= 0.0 or not self.teacher_alpha >= 0.0:
            raise ConfigError(f"alpha and teacher_alpha weigh terms and are {self.alpha} and {self.teacher_alpha}")
        row = torch.zeros(1, 2)
        options: dict[str, Any] = {"delta": self.delta, "mode": self.mode, "gate": self.gate, "width": self.width}
        bdkd_weights(row, row, torch.zeros(1, dtype=torch.long), gate_temperature=self.gate_temperature, **options)
        if not self.temperature > 0.0:
            raise ConfigError(f"temperature must be positive and is {self.temperature}")

    def __call__(
        self,
        logits: Sequence[Tensor],
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> list[dict[str, Tensor]]:
        """For each network, its "loss" and parts as scalars; logits [..., V] from the largest network to the smallest.

        "distillation" is the mean over pairs before alpha and T^2; "reverse_share", which the largest has not, the
        share of rows in which it was the less certain of a pair. labels [...]: -100 is left out. mask, count: see
        `bdkd_loss`.
        """
        if len(logits) < 2:
            raise ConfigError(f"online distillation is between two networks or more, got {len(logits)}")
        return [self.of_network(place, logits, labels, mask=mask, count=count) for place in range(len(logits))]

    def of_network(
        self,
        place: int,
        logits: Sequence[Tensor],
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        count: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """The terms of one of the networks; no gradient reaches the others."""
        shared: dict[str, Any] = {"temperature": self.temperature, "mode": self.mode, "mask": mask, "count": count}
        gate: dict[str, Any] = {"delta": self.delta, "gate": self.gate, "gate_temperature": self.gate_temperature}
        own, pairs, number = logits[place], [], len(logits) - 1
        for other, peer in enumerate(logits):
            if other < place:
                options = {**shared, **gate, "width": self.width, "alpha": self.alpha / number}
                pairs.append(bdkd_loss(peer, own, labels, **options))
            elif other > place:
                pairs.append(bdkd_teacher_loss(own, peer, labels, alpha=self.teacher_alpha / number, **shared))
        hard = pairs[0]["cross_entropy"]  # every pair adds it, and it counts once
        terms = {"loss": sum((pair["loss"] for pair in pairs), -(number - 1) * hard), "cross_entropy": hard}
        terms["distillation"] = sum((pair["distillation"] for pair in pairs), 0.0 * hard) / number
        shares = [pair["reverse_share"] for pair in pairs if "reverse_share" in pair]
        return {**terms, "reverse_share": torch.stack(shares).mean()} if shares else terms


class OnlineDistiller:
    """A training loop's step for two or more networks that learn together from scratch.

    networks: any modules from inputs to logits [..., V]; optimizers: one for each, or None for a network that is frozen
    (with a trained teacher frozen this is offline distillation). update: "joint" takes one forward pass for all and
    then all steps; "teacher_first" goes from the largest network to the smallest and gives each the others' fresh
    logits, at up to two more forward passes a network. logits: takes the logits out of a network's output. Raises
    ConfigError for fewer than two networks, none to train, or another number of optimizers.

    >>> large, small = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
    >>> optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (large, small)]
    >>> distiller = OnlineDistiller([large, small], optimizers)
    >>> [sorted(terms) for terms in distiller.step(torch.ones(2, 4), torch.tensor([0, 1]))]
    [['cross_entropy', 'distillation', 'loss'], ['cross_entropy', 'distillation', 'loss', 'reverse_share']]
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer | None],
        *,
        loss: OnlineLoss | None = None,
        update: Literal["joint", "teacher_first"] = "joint",
        logits: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if len(networks) < 2 or len(networks) != len(optimizers):
            raise ConfigError(
                f"give two networks or more and an optimizer, or None, for each: got {len(networks)} networks "
                f"and {len(optimizers)} optimizers"
            )
        if all(optimizer is None for optimizer in optimizers):
            raise ConfigError("every network is frozen: give at least one of them an optimizer")
        if update not in ("joint", "teacher_first"):
            raise ConfigError(f'update is "joint" or "teacher_first", not {update!r}')
        self.networks, self.optimizers = list(networks), list(optimizers)
        self.loss, self.update, self.order = loss or OnlineLoss(), update, by_size(networks)
        self.logits = logits or (lambda output: output)

    def step(self, inputs: Any, labels: Tensor, *, mask: Tensor | None = None) -> list[Mapping[str, float]]:
        """One update of every network that is not frozen; the terms of each, as numbers, in the order given.

        inputs: a tensor, or a mapping of keyword arguments. Frozen networks are evaluated without dropout.
        """
        terms = self._joint(inputs, labels, mask) if self.update == "joint" else self._in_turn(inputs, labels, mask)
        numbers = [{name: value.item() for name, value in mapping.items()} for mapping in terms]
        return [numbers[self.order.index(place)] for place in range(len(self.networks))]

    def _forward(self, place: int, inputs: Any, gradient: bool) -> Tensor:
        network, frozen = self.networks[place], self.optimizers[place] is None
        if frozen and network.training:
            network.eval()
        with torch.set_grad_enabled(gradient and not frozen):
            return self.logits(network(**inputs) if isinstance(inputs, Mapping) else network(inputs))

    def _joint(self, inputs: Any, labels: Tensor, mask: Tensor | None) -> list[dict[str, Tensor]]:
        terms = self.loss([self._forward(place, inputs, True) for place in self.order], labels, mask=mask)
        trained = [term["loss"] for place, term in zip(self.order, terms) if self.optimizers[place] is not None]
        for optimizer in self.optimizers:
            if optimizer is not None:
                optimizer.zero_grad()
        torch.stack(trained).sum().backward()
        for optimizer in self.optimizers:
            if optimizer is not None:
                optimizer.step()
        return terms

    def _in_turn(self, inputs: Any, labels: Tensor, mask: Tensor | None) -> list[dict[str, Tensor]]:
        logits = [self._forward(place, inputs, False) for place in self.order]
        terms = []
        for rank, place in enumerate(self.order):
            optimizer = self.optimizers[place]
            if optimizer is None:
                terms.append(self.loss.of_network(rank, logits, labels, mask=mask))
                continue
            logits[rank] = self._forward(place, inputs, True)
            terms.append(self.loss.of_network(rank, logits, labels, mask=mask))
            optimizer.zero_grad()
            terms[-1]["loss"].backward()
            optimizer.step()
            if rank + 1 < len(self.order):
                logits[rank] = self._forward(place, inputs, False)
        return terms
