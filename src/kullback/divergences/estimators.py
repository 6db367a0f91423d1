"""Monte-Carlo estimates of KL(q||p) from samples of the model q, with value and gradient chosen apart.

With x ~ q (the model, never the reference p) and r = log p(x) - log q(x):

| value | estimate      | expectation | remarks                                                             |
|-------|---------------|-------------|---------------------------------------------------------------------|
| k1    | -r            | KL(q||p)    | takes both signs, the largest variance                              |
| k2    | r^2 / 2       | biased      | KL to second order in r; never negative                             |
| k3    | e^r - 1 - r   | KL(q||p)    | never negative; its variance is infinite where chi-squared(p||q) is |

Differentiating such an estimate through log q(x), as losses in the wild do, gives a gradient that belongs to another
quantity: k1 gives 0 in expectation, k2 the gradient of KL(q||p), and k3 that of KL(p||q), the other direction. So the
gradient here never comes from the value:

| gradient         | factor of grad log q(x_t)                | expectation                                           |
|------------------|------------------------------------------|-------------------------------------------------------|
| reverse          | -r_t                                     | of KL(q||p), each token given its prefix              |
| reverse_sequence | sum of -r_u over u >= t                  | of KL(q||p) between whole sequences                   |
| forward          | 1 - e^(r_t)                              | of KL(p||q), each token given a prefix drawn from q   |
| none             | 0                                        | none: for reporting, or a reward                      |

`reverse` is what k1 inside the reward of a policy gradient gives when only the token's own reward is counted,
`reverse_sequence` when the rewards of all later tokens are. For samples of the reference p instead, KL(p||q) has the
unbiased value and gradient of `f_divergence("kl").penalty(..., samples_from="reference")`.

Shapes: log_p_x, log_q_x, ratio and mask [...] alike, one entry per sampled token ([..., T] for sequences); nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, ShapeError

__all__ = ["kl_sampled"]

_VALUES = ("k1", "k2", "k3")
_GRADIENTS = ("reverse", "reverse_sequence", "forward", "none")


def kl_sampled(
    log_p_x: Tensor,
    log_q_x: Tensor,
    *,
    value: str = "k3",
    gradient: str = "reverse",
    ratio: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Estimate KL(q||p) at tokens x drawn from the model q; [...] to [...], in nats, to be reduced by `masked_mean`.

    log_p_x, log_q_x: log-probabilities of the drawn tokens under the reference and the model; the gradient flows into
    log_q_x only. ratio: q(x)/mu(x) when the tokens were drawn from another policy mu; it multiplies value and gradient
    and is taken as a constant. For whole sequences it is the product over the prefix,
    exp(cumsum(log_q_x - log_mu_x, -1)). mask: which tokens count in the sums of `reverse_sequence` over later tokens.
    Float32 at least. Raises ConfigError for unknown names and for a mask that would do nothing, ShapeError
    for shapes that differ. Source: the table above; by enumeration in the tests.

    >>> log_p_x, log_q_x = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0], requires_grad=True)
    >>> estimate = kl_sampled(log_p_x, log_q_x, value="k1")
    >>> estimate.detach(), torch.autograd.grad(estimate.sum(), log_q_x)[0]
    (tensor([-0.5000,  1.0000]), tensor([-0.5000,  1.0000]))
    """
    _check(log_p_x, log_q_x, value, gradient, ratio, mask)
    dtype = torch.promote_types(torch.promote_types(log_p_x.dtype, log_q_x.dtype), torch.float32)
    log_q = log_q_x.to(dtype)
    with torch.no_grad():
        log_ratio = log_p_x.to(dtype) - log_q
        estimate = _estimate(value, log_ratio)
        factor = _factor(gradient, log_ratio)
        if ratio is not None:
            estimate, factor = estimate * ratio, factor * ratio
        if gradient == "reverse_sequence":
            if mask is not None:
                factor = factor.masked_fill(~mask.bool(), 0.0)
            factor = factor.flip(-1).cumsum(-1).flip(-1)
    if gradient == "none":
        return estimate
    return estimate + factor * (log_q - log_q.detach())


def _estimate(value: str, log_ratio: Tensor) -> Tensor:
    if value == "k1":
        return -log_ratio
    if value == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(log_ratio) - log_ratio


def _factor(gradient: str, log_ratio: Tensor) -> Tensor:
    return -torch.expm1(log_ratio) if gradient == "forward" else -log_ratio


def _check(
    log_p_x: Tensor, log_q_x: Tensor, value: str, gradient: str, ratio: Tensor | None, mask: Tensor | None
) -> None:
    if value not in _VALUES:
        raise ConfigError(f"value is one of {', '.join(_VALUES)}, not {value!r}")
    if gradient not in _GRADIENTS:
        raise ConfigError(f"gradient is one of {', '.join(_GRADIENTS)}, not {gradient!r}")
    if mask is not None and gradient != "reverse_sequence":
        raise ConfigError(
            f'mask does nothing with gradient="{gradient}", where no token sees another: give it to masked_mean'
        )
    if gradient == "reverse_sequence" and log_q_x.ndim == 0:
        raise ShapeError("reverse_sequence sums over later tokens and got a scalar: give log-probabilities [..., T]")
    for name, other in (("log_p_x", log_p_x), ("ratio", ratio), ("mask", mask)):
        if other is not None and other.shape != log_q_x.shape:
            raise ShapeError(
                f"{name} has shape {tuple(other.shape)} and log_q_x has {tuple(log_q_x.shape)}: give one entry per "
                "drawn token"
            )
