"""One object for an f-divergence: its generator, derivative, conjugate, curvature and loss.

D_f(p||q) = sum_i q_i f(p_i / q_i), f convex on (0, inf), f(1) = 0. Every f here is written with f'(1) = 0 as well
(adding c (t - 1) changes no divergence), so that f >= 0, its conjugate f*(y) = sup_t (t y - f(t)) has f*(0) = 0, and
penalties and rewards vanish where the two agree. f, f' and (f')^-1 work on the log-ratio log t, which never overflows.

Two conventions meet in the literature. In kullback the reference p (teacher, target, frozen policy) comes first and
the model q second. Papers on alignment write D_f(model||reference), with the ratio u = model / reference; their f is
the generator of the `dual`, f°(u) = u f(1/u). `link`, `pseudo_reward` and `penalty` take log u and do that step.

Shapes: log-probabilities [..., V] to [...]; log-ratios and the arguments y of the conjugate of any shape, elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError
from kullback.core.types import Divergence
from kullback.divergences.fused import check_pair

__all__ = ["FDivergence"]

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FDivergence:
    """An f-divergence as one object, itself a Divergence; `f_divergence(name)` builds the known ones.

    loss: the fast form of the divergence. f, derivative: f(t) and f'(t) from log t. conjugate: f*(y), inf above the
    domain. domain: the open interval of slopes f'(t), on which derivative_inverse gives log t from y (None where f'
    has no inverse). second_at_one: f''(1), None if there is none. opposite: builds the dual.

    >>> from kullback.divergences import f_divergence
    >>> js = f_divergence("jsd")
    >>> log_t = torch.tensor([-1.0, 0.0, 2.0])
    >>> slope = js.derivative(log_t)
    >>> torch.allclose(js.f(log_t) + js.conjugate(slope), log_t.exp() * slope, atol=1e-6)  # Fenchel's equality
    True
    """

    name: str
    loss: Divergence
    f: Elementwise
    derivative: Elementwise
    conjugate: Elementwise
    domain: tuple[float, float]
    second_at_one: float | None
    derivative_inverse: Elementwise | None
    opposite: Callable[[], FDivergence]

    def __call__(self, log_p: Tensor, log_q: Tensor, /) -> Tensor:
        """D_f(p||q), [..., V] to [...]."""
        return self.loss(log_p, log_q)

    def definition(self, log_p: Tensor, log_q: Tensor, /) -> Tensor:
        """sum q f(p/q) from the generator, [..., V] to [...]: slower than a call, differentiable again and again."""
        return self.terms(log_p, log_q).sum(-1)

    def terms(self, log_p: Tensor, log_q: Tensor, /) -> Tensor:
        """q f(p/q) of every outcome [..., V], from the generator: none is negative, and their sum is the divergence.

        Where p > q it is p f°(q/p), the same number with a ratio below 1, so that nothing overflows.
        """
        log_p, log_q = check_pair(log_p, log_q)
        both_zero = (log_p == -math.inf) & (log_q == -math.inf)
        log_p, log_q = log_p.masked_fill(both_zero, 0.0), log_q.masked_fill(both_zero, 0.0)
        ratio = log_p - log_q
        above = ratio > 0
        # each branch sees only its own ratios, so that the other's infinities reach neither value nor gradient
        from_p = log_p.masked_fill(~above, 0.0).exp() * self.dual().f((-ratio).masked_fill(~above, 0.0))
        from_q = log_q.masked_fill(above, 0.0).exp() * self.f(ratio.masked_fill(above, 0.0))
        return torch.where(above, from_p, from_q).masked_fill(both_zero, 0.0)

    def dual(self) -> FDivergence:
        """The divergence with its arguments exchanged, D(q||p): its generator is f°(u) = u f(1/u).

        >>> from kullback.divergences import f_divergence
        >>> f_divergence("kl").dual().name
        'reverse_kl'
        """
        return self.opposite()

    def scaled(self, factor: float) -> FDivergence:
        """The divergence times a positive number, with everything that belongs to it."""
        if not 0.0 < factor < math.inf:
            raise ConfigError(f"a divergence is scaled by a positive finite number, not by {factor}")
        inverse = self.derivative_inverse
        return FDivergence(
            name=f"{factor:g} * {self.name}",
            loss=lambda log_p, log_q, /: factor * self.loss(log_p, log_q),
            f=lambda log_t: factor * self.f(log_t),
            derivative=lambda log_t: factor * self.derivative(log_t),
            conjugate=lambda y: factor * self.conjugate(y / factor),
            domain=(factor * self.domain[0], factor * self.domain[1]),
            second_at_one=None if self.second_at_one is None else factor * self.second_at_one,
            derivative_inverse=None if inverse is None else lambda y: inverse(y / factor),
            opposite=lambda: self.opposite().scaled(factor),
        )

    def normalised(self) -> FDivergence:
        """Divided by f''(1), so that every member is (1/2) sum (p - q)^2 / q to second order around p = q.

        Raises ConfigError for total variation, whose generator has a kink at 1.

        >>> from kullback.divergences import f_divergence
        >>> f_divergence("jsd").normalised().second_at_one
        1.0
        """
        if self.second_at_one is None:
            raise ConfigError(f"{self.name} has no second derivative at 1 to divide by: choose a smooth divergence")
        if self.second_at_one == 1.0:
            return self
        return replace(self.scaled(1.0 / self.second_at_one), name=f"normalised {self.name}", second_at_one=1.0)

    def link(self, log_ratio: Tensor) -> Tensor:
        """f°'(u) from log u = log model - log reference: the implicit reward over beta of f-DPO, 0 at u = 1.

        The optimum of E r - beta D(reference||model) has r = beta link(log_ratio) + const per prompt. For `reverse_kl`
        it is log u itself (plain DPO), for `kl` 1 - 1/u, for `alpha_divergence` (1 - u^-a) / a.
        Source: arXiv 2309.16240, where D_f(model||reference) is written with f°.
        """
        return self.dual().derivative(log_ratio)

    def link_inverse(self, reward: Tensor) -> Tensor:
        """The log u at which `link` gives this value; ConfigError where link has no inverse (total variation)."""
        inverse = self.dual().derivative_inverse
        if inverse is None:
            raise ConfigError(f"the link of {self.name} has no inverse: choose a strictly convex divergence")
        return inverse(reward)

    @property
    def keeps_support(self) -> bool:
        """Whether link goes to -inf as u -> 0, the condition under which f-DPO's optimum keeps every outcome."""
        return self.dual().domain[0] == -math.inf

    def pseudo_reward(self, log_ratio: Tensor) -> Tensor:
        """-f°'(u) from log u = log model - log target, detached: the reward of f-DPG, 0 at u = 1.

        The gradient of D(target||model) is -E_{x ~ model} [pseudo_reward grad log model(x)].
        Source: arXiv 2302.08215; its rewards differ from these by constants, which baselines remove.
        """
        return -self.link(log_ratio.detach())

    def penalty(self, log_ratio: Tensor, *, samples_from: Literal["reference", "model"]) -> Tensor:
        """A non-negative per-sample estimate of D(reference||model) from log u = log model - log reference.

        f°(u) for samples of the reference (a rehearsal buffer), f(1/u) for samples of the model; both are unbiased.
        As losses they differ: from the reference, autograd through log u gives the gradient of the divergence; from the
        model it does not, for the samples themselves depend on the model (use `pseudo_reward`).
        """
        if samples_from == "reference":
            return self.dual().f(log_ratio)
        if samples_from == "model":
            return self.f(-log_ratio)
        raise ConfigError(f'samples_from is "reference" or "model", not {samples_from!r}')
