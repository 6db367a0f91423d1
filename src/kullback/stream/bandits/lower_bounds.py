"""What no algorithm can beat (chapter 2 of the book): divergences of coins, hard instances, sample sizes.

kl(p, q) = p log(p/q) + (1-p) log((1-p)/(1-q)), in nats, with 0 log 0 = 0. Lai and Robbins: any policy whose regret is
subpolynomial on every instance has regret at least log T times the sum over gaps of gap / kl(mean, best mean).
Source: Slivkins (arXiv 1904.07272), chapter 2; the index bound of Garivier and Cappe (arXiv 1102.2490).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kullback.core.errors import ConfigError, DataError

__all__ = ["bernoulli_kl", "kl_upper_bound", "lai_robbins_constant", "min_samples_two_coins", "worst_case_instance"]


def bernoulli_kl(p: float, q: float) -> float:
    """KL divergence of a coin of mean p from one of mean q, in nats; inf where q excludes what p allows.

    >>> round(bernoulli_kl(0.5, 0.6), 6), bernoulli_kl(0.5, 1.0)
    (0.020411, inf)
    """
    if not (0.0 <= p <= 1.0 and 0.0 <= q <= 1.0):
        raise DataError(f"the means of two coins lie in [0, 1] and are {p} and {q}")
    value = 0.0
    for mass, other in ((p, q), (1.0 - p, 1.0 - q)):
        if mass > 0.0:
            value += mass * math.log(mass / other) if other > 0.0 else math.inf
    return max(value, 0.0)


def kl_upper_bound(mean: float, budget: float) -> float:
    """The largest q in [mean, 1] with kl(mean, q) <= budget, to 1e-12.

    Newton's method from the expansion to third order, kept below a bound that is above the root: on a convex function
    a step from below the root leads above it, and steps from above come down to it without passing it.

    >>> round(bernoulli_kl(0.3, kl_upper_bound(0.3, 0.1)), 9)
    0.1
    """
    if mean >= 1.0 or budget <= 0.0:
        return min(mean, 1.0)
    rest = 1.0 - mean
    bound = mean + math.sqrt(0.5 * budget)
    if bound >= 1.0 or mean <= 0.0:
        entropy = -rest * math.log(rest) - (mean * math.log(mean) if mean > 0.0 else 0.0)
        bound = min(bound, 1.0 - math.exp(-(budget + entropy) / rest))
    upper = mean + math.sqrt(2.0 * mean * rest * budget) + (1.0 - 2.0 * mean) * budget * (2.0 / 3.0)
    if not mean < upper < bound:
        upper = bound
    for _ in range(60):
        if upper >= 1.0 or upper <= mean:
            break
        value = rest * math.log(rest / (1.0 - upper)) - budget
        if mean > 0.0:
            value += mean * math.log(mean / upper)
        step = value * upper * (1.0 - upper) / (upper - mean)
        upper = min(upper - step, bound)
        if abs(step) < 1e-8 * (upper - mean):  # the next one would be below 1e-16 of it
            break
    return min(max(upper, mean), 1.0)


def _gaps(means: Sequence[float]) -> tuple[float, list[float]]:
    values = [float(mean) for mean in means]
    if not values or not all(0.0 <= mean <= 1.0 for mean in values):
        raise DataError(f"means are one or more numbers in [0, 1], and are {values}")
    top = max(values)
    return top, [mean for mean in values if mean < top]


def lai_robbins_constant(means: Sequence[float], *, form: str = "kl") -> float:
    """The sum over worse arms of gap / kl(mean, best), which times log T bounds the regret from below, asymptotically.

    form: "kl", or "book" for the weaker sum of best (1 - best) / gap. Raises DataError for means outside [0, 1].

    >>> round(lai_robbins_constant([0.6] + 9 * [0.5]), 3)
    44.094
    """
    top, worse = _gaps(means)
    if form == "kl":
        return sum((top - mean) / bernoulli_kl(mean, top) for mean in worse)
    if form != "book":
        raise ConfigError(f'form is "kl" or "book", not {form!r}')
    return sum(top * (1.0 - top) / (top - mean) for mean in worse)


def worst_case_instance(arms: int, horizon: int, *, best: int = 0, constant: float = 0.25) -> list[float]:
    """Means of Bernoulli arms between which `horizon` rounds hardly tell: 1/2, and (1 + e)/2 for one, e = root(cK/T).

    Any algorithm has regret of the order of root(KT) on one of the `arms` choices of `best`.

    >>> worst_case_instance(2, 8, best=1)
    [0.5, 0.625]
    """
    if not (arms >= 2 and horizon >= 1 and 0 <= best < arms and constant > 0.0):
        given = f"{arms}, {horizon}, {best}, {constant}"
        raise ConfigError(f"needs arms >= 2, horizon >= 1, best < arms and constant > 0, and got {given}")
    edge = math.sqrt(constant * arms / horizon)
    if edge > 1.0:
        raise ConfigError(f"{horizon} rounds are too few for {arms} arms: the best mean would exceed 1")
    return [0.5 * (1.0 + edge) if arm == best else 0.5 for arm in range(arms)]


def min_samples_two_coins(edge: float, *, error: float = 0.25) -> int:
    """Tosses below which no rule tells a coin of mean (1 + edge)/2 from a fair one with both errors at most `error`.

    From Pinsker: the two errors add up to at least 1 - root(T kl / 2), where kl(fair, biased) = -log(1 - edge^2)/2.

    >>> min_samples_two_coins(0.1)
    100
    """
    if not (0.0 < edge < 1.0 and 0.0 < error < 0.5):
        raise ConfigError(f"edge lies in (0, 1) and error in (0, 1/2), and they are {edge} and {error}")
    divergence = -0.5 * math.log1p(-edge * edge)
    return math.ceil(2.0 * (1.0 - 2.0 * error) ** 2 / divergence)
