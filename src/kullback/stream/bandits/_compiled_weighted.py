"""The compiled loops of policies that draw an arm from weights: Exp3 and its kin, Hedge, and Tsallis-INF.

A round of Exp3 computes one exponential; its weights sum to what the round before has left, and the draw stops at the
arm that it finds. A round of Hedge computes none: with rewards of 0 and 1 a cost multiplies a weight by exp(-rate), a
number known beforehand; before the weights grow too small they are computed anew from the costs. The equation of
Tsallis-INF is solved from the root of the round before.
"""

from __future__ import annotations

import math

import numpy as np

from kullback.stream.bandits._compiled import GOLDEN, HEDGE, TSALLIS, compiled, entry, inlined, note, reward_of, uniform

__all__ = ["run_weighted"]


@inlined
def drawn(law, total, z):
    """A place drawn in proportion to the law, which sums to `total`; never one of weight 0."""
    rest, place, last, arms = uniform(z) * total, -1, 0, len(law)
    for arm in range(arms):
        weight = law[arm]
        if weight > 0.0:
            last = arm
            rest -= weight
            if rest < 0.0:
                place = arm
                break
    return place if place >= 0 else last


@compiled
def shift(logarithms, weights):
    """The weights anew, the largest of them 1; returns their offset, the largest logarithm."""
    offset = logarithms.max()
    for arm in range(len(weights)):
        weights[arm] = math.exp(logarithms[arm] - offset)
    return offset


@compiled
def mixed(mixing, weights, total, law):
    """The law of the weights, which sum to `total`, with uniform play mixed in."""
    arms = len(law)
    for arm in range(arms):
        law[arm] = (1.0 - mixing) * weights[arm] / total + mixing / arms


@compiled
def shared(share, weights, total, logarithms):
    """A share of all weight spread over all arms; the offset is 0 after it."""
    arms = len(weights)
    for arm in range(arms):
        weights[arm] = (1.0 - share) * weights[arm] / total + share / arms
        logarithms[arm] = math.log(weights[arm])


@compiled
def run_exp3(options, truth, deviation, table, steps, z, curve, pulls):
    """One run of Exp3; the regret after each of `steps` goes to curve."""
    arms = len(pulls)
    rate, mixing, implicit, bonus, share = options[0], options[1], options[2], options[3], options[4]
    weights, logarithms, sums, law = np.ones(arms), np.zeros(arms), np.zeros(arms), np.ones(arms)
    best, regret, place, offset, mass = truth.max(), 0.0, 0, 0.0, float(arms)
    for moment in range(1, steps[-1] + 1):
        z += GOLDEN
        total = mass
        if mixing > 0.0:
            mixed(mixing, weights, mass, law)
            total = 1.0
            arm = drawn(law, total, z)
            chance = law[arm]
        else:
            arm = drawn(weights, total, z)
            chance = weights[arm] / total
        reward, z = reward_of(arm, moment, truth, deviation, table, z)
        if bonus > 0.0:
            for other in range(arms):
                logarithms[other] += rate * bonus / (law[other] if mixing > 0.0 else weights[other] / total)
            logarithms[arm] += rate * reward / chance
            offset = shift(logarithms, weights)
        elif reward != 1.0:
            logarithms[arm] -= rate * (1.0 - reward) / (chance + implicit)
            weights[arm] = math.exp(logarithms[arm] - offset)
        mass = 0.0
        for other in range(arms):
            mass += weights[other]
        if share > 0.0:
            shared(share, weights, mass, logarithms)
            offset, mass = 0.0, 1.0
        elif mass < 1e-100:
            offset = shift(logarithms, weights)
            mass = weights.sum()
        pulls[arm] += 1
        regret += best - truth[arm]
        if note(sums, table, moment):
            regret -= reward
        if moment == steps[place]:
            curve[place] = regret + sums.max()
            place += 1


@compiled
def run_hedge(rate, truth, deviation, table, steps, z, curve, pulls):
    """One run of Hedge, which sees the costs of all arms."""
    arms = len(pulls)
    weights, costs, sums = np.ones(arms), np.zeros(arms), np.zeros(arms)
    shrinking, mass = math.exp(-rate), float(arms)
    best, regret, place = truth.max(), 0.0, 0
    for moment in range(1, steps[-1] + 1):
        z += GOLDEN
        arm = drawn(weights, mass, z)
        reward, z = reward_of(arm, moment, truth, deviation, table, z)
        mass = 0.0
        for other in range(arms):
            received = reward
            if other != arm:
                received, z = reward_of(other, moment, truth, deviation, table, z)
            costs[other] += 1.0 - received
            if received == 0.0:
                weights[other] *= shrinking
            elif received != 1.0:
                weights[other] *= math.exp(-rate * (1.0 - received))
            mass += weights[other]
        if not 1e-100 < mass < 1e100:
            shift(-rate * costs, weights)
            mass = weights.sum()
        pulls[arm] += 1
        regret += best - truth[arm]
        if note(sums, table, moment):
            regret -= reward
        if moment == steps[place]:
            curve[place] = regret + sums.max()
            place += 1


@compiled
def tsallis(rate, costs, before, law):
    """The law 4 / (rate (cost - x))^2 with the x at which it sums to 1, by Newton's method; returns its sum and x.

    The sum grows with x and is convex, and at the smallest cost - 2 / rate it is 1 or more: from there, or from any x
    below, the second step and all after it come down to the root.
    """
    largest = costs.min() - 2.0 / rate
    x, total = min(before, largest), 0.0
    for _ in range(100):
        total = slope = 0.0
        for arm in range(len(costs)):
            inverse = 2.0 / (rate * (costs[arm] - x))
            share = inverse * inverse
            law[arm] = share
            total += share
            slope += share * inverse
        if abs(total - 1.0) < 1e-12:
            break
        x = min(x - (total - 1.0) / (rate * slope), largest)
    return total, x


@compiled
def run_tsallis(schedule, truth, deviation, table, steps, z, curve, pulls):
    """One run of Tsallis-INF."""
    arms = len(pulls)
    costs, law, sums = np.zeros(arms), np.zeros(arms), np.zeros(arms)
    best, regret, place, x = truth.max(), 0.0, 0, math.inf
    for moment in range(1, steps[-1] + 1):
        total, x = tsallis(schedule[moment if len(schedule) > 1 else 0], costs, x, law)
        z += GOLDEN
        arm = drawn(law, total, z)
        reward, z = reward_of(arm, moment, truth, deviation, table, z)
        costs[arm] += (1.0 - reward) * total / law[arm]
        pulls[arm] += 1
        regret += best - truth[arm]
        if note(sums, table, moment):
            regret -= reward
        if moment == steps[place]:
            curve[place] = regret + sums.max()
            place += 1


@entry
def run_weighted(kind, options, schedule, truths, deviation, table, steps, seeds, curves, pulls):
    """All runs in turn; truths has one row for all or one a run (zeros for a table); table: the rewards or None."""
    for run in range(len(seeds)):
        truth = truths[run if len(truths) > 1 else 0]
        if kind == HEDGE:
            run_hedge(schedule[0], truth, deviation, table, steps, seeds[run], curves[run], pulls[run])
        elif kind == TSALLIS:
            run_tsallis(schedule, truth, deviation, table, steps, seeds[run], curves[run], pulls[run])
        else:
            run_exp3(options, truth, deviation, table, steps, seeds[run], curves[run], pulls[run])
