"""The compiled loops of Thompson sampling: a draw from every arm's posterior in every round.

Only the pulled arm's posterior changes, so that what its draws need is kept. Normal numbers come from a ziggurat of 128
layers (Marsaglia and Tsang 2000, as Doornik 2005 draws the layer and the place from one number), Gamma numbers by
Marsaglia and Tsang's rejection, a Beta number from two of them.
"""

from __future__ import annotations

import math

import numpy as np

from kullback.stream.bandits._compiled import BETA, GOLDEN, compiled, entry, inlined, note, reward_of, uniform

__all__ = ["run_thompson"]

_TAIL, _AREA = 3.442619855899, 9.91256303526217e-3


def _layers() -> tuple[np.ndarray, np.ndarray]:
    """The right ends of the layers [129], the lowest first, and the ratios [128] below which a place is inside."""
    ends = [_AREA / math.exp(-0.5 * _TAIL**2), _TAIL]
    while len(ends) < 128:
        last = ends[-1]
        ends.append(math.sqrt(-2.0 * math.log(_AREA / last + math.exp(-0.5 * last * last))))
    ends.append(0.0)
    right = np.array(ends)
    return right, right[1:] / right[:-1]


ENDS, INSIDE = _layers()


@compiled
def tail_or_edge(layer, place, z):
    """A normal number beyond the lowest layer's end or at a layer's edge, whether it is accepted, and the state."""
    if layer == 0:
        far, near = 1.0, 0.0
        while 2.0 * near < far * far:
            z += GOLDEN
            far = -math.log(1.0 - uniform(z)) / _TAIL
            z += GOLDEN
            near = -math.log(1.0 - uniform(z))
        return math.copysign(_TAIL + far, place), True, z
    x = place * ENDS[layer]
    outer = math.exp(-0.5 * (ENDS[layer] * ENDS[layer] - x * x))
    inner = math.exp(-0.5 * (ENDS[layer + 1] * ENDS[layer + 1] - x * x))
    z += GOLDEN
    return x, inner + uniform(z) * (outer - inner) < 1.0, z


@inlined
def normal(z):
    """A standard normal number and the state after it."""
    x, found = 0.0, False
    while not found:
        z += GOLDEN
        bits = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
        layer = np.int64(bits & np.uint64(127))
        place = (bits >> np.uint64(11)) * (2.0 / 9007199254740992.0) - 1.0
        x, found = place * ENDS[layer], abs(place) < INSIDE[layer]
        if not found:
            x, found, z = tail_or_edge(layer, place, z)
    return x, z


@compiled
def prepare(shape, row, arm, kept):
    """What draws of Gamma(shape) need, in the rows from `row` on: d, c, and 1 / shape where shape is below 1, or 0."""
    kept[row + 2, arm] = 1.0 / shape if shape < 1.0 else 0.0
    d = (shape + 1.0 if shape < 1.0 else shape) - 1.0 / 3.0
    kept[row, arm], kept[row + 1, arm] = d, 1.0 / math.sqrt(9.0 * d)


@inlined
def gamma(d, c, boost, z):
    """A Gamma number and the state after it."""
    value, found = 0.0, False
    while not found:
        x, z = normal(z)
        v = 1.0 + c * x
        if v > 0.0:
            v = v * v * v
            z += GOLDEN
            u = 1.0 - uniform(z)
            square = x * x
            found = u < 1.0 - 0.0331 * square * square
            if not found:
                found = math.log(u) < 0.5 * square + d * (1.0 - v + math.log(v))
            value = d * v
    if boost > 0.0:
        z += GOLDEN
        value *= (1.0 - uniform(z)) ** boost
    return value, z


@compiled
def run_beta(options, truth, deviation, table, steps, z, curve, pulls):
    """One run with Beta posteriors; the regret after each of `steps` goes to curve."""
    arms = len(pulls)
    kept, won, sums = np.zeros((6, arms)), np.zeros(arms), np.zeros(arms)
    for arm in range(arms):
        prepare(options[0], 0, arm, kept)
        prepare(options[1], 3, arm, kept)
    best, regret, place = truth.max(), 0.0, 0
    for moment in range(1, steps[-1] + 1):
        arm, top = 0, -1.0
        for other in range(arms):
            success, z = gamma(kept[0, other], kept[1, other], kept[2, other], z)
            failure, z = gamma(kept[3, other], kept[4, other], kept[5, other], z)
            # success / (success + failure) > top, without the division
            if success > top * (success + failure):
                arm, top = other, success / (success + failure)
        reward, z = reward_of(arm, moment, truth, deviation, table, z)
        pulls[arm] += 1
        won[arm] += reward
        prepare(options[0] + won[arm], 0, arm, kept)
        prepare(options[1] + pulls[arm] - won[arm], 3, arm, kept)
        regret += best - truth[arm]
        if note(sums, table, moment):
            regret -= reward
        if moment == steps[place]:
            curve[place] = regret + sums.max()
            place += 1


@compiled
def run_gaussian(options, truth, deviation, table, steps, z, curve, pulls):
    """One run with Gaussian posteriors."""
    arms = len(pulls)
    centres, widths = np.full(arms, options[0]), np.full(arms, 1.0 / math.sqrt(options[1]))
    won, sums = np.zeros(arms), np.zeros(arms)
    best, regret, place = truth.max(), 0.0, 0
    for moment in range(1, steps[-1] + 1):
        arm, top = 0, -math.inf
        for other in range(arms):
            x, z = normal(z)
            value = centres[other] + widths[other] * x
            if value > top:
                arm, top = other, value
        reward, z = reward_of(arm, moment, truth, deviation, table, z)
        pulls[arm] += 1
        won[arm] += reward
        precision = options[1] + options[2] * pulls[arm]
        centres[arm] = (options[0] * options[1] + options[2] * won[arm]) / precision
        widths[arm] = 1.0 / math.sqrt(precision)
        regret += best - truth[arm]
        if note(sums, table, moment):
            regret -= reward
        if moment == steps[place]:
            curve[place] = regret + sums.max()
            place += 1


@entry
def run_thompson(kind, options, truths, deviation, table, steps, seeds, curves, pulls):
    """All runs in turn; truths has one row for all or one a run (zeros for a table); table: the rewards or None."""
    for run in range(len(seeds)):
        truth = truths[run if len(truths) > 1 else 0]
        if kind == BETA:
            run_beta(options, truth, deviation, table, steps, seeds[run], curves[run], pulls[run])
        else:
            run_gaussian(options, truth, deviation, table, steps, seeds[run], curves[run], pulls[run])
