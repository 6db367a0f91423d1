"""The loop of the simulator, compiled, for index policies: rounds of one run, then the next, a few arrays as the state.

`kind` says which policy; the loop of `kullback.stream.bandits.simulate` over policy objects is the naive twin. What
depends on the round alone (root log t, epsilon_t, ...) comes in `schedule`. Random numbers are splitmix64's, one stream
a run, its state z passed from call to call. Of an index m + c_t / root(n) only the pulled arm's m and n change, so
that a round costs one root, K products and K comparisons. Functions on the path of every round are small and have one
exit, so that they are inlined: a call with arrays costs more than such a round. KL-UCB, Thompson sampling and policies
that draw from weights have loops of their own, in the files beside this one.
"""

from __future__ import annotations

import math

import numpy as np

from kullback.core.errors import MissingExtra
from kullback.stream.bandits.lower_bounds import kl_upper_bound as _kl_upper_bound

try:
    from numba import njit
except ImportError as error:
    raise MissingExtra("numba", extra="numba") from error

__all__ = ["GOLDEN", "KINDS", "compiled", "entry", "run_many", "uniform"]

KINDS = (
    "explore_first", "epsilon_greedy", "successive_elimination", "ucb1", "ucb_v",
    "kl_ucb", "thompson_beta", "thompson_gaussian", "exp3", "tsallis_inf", "hedge",
)  # fmt: skip
EXPLORE_FIRST, EPSILON_GREEDY, ELIMINATION, UCB1, UCB_V, KL_UCB, BETA, GAUSSIAN, EXP3, TSALLIS, HEDGE = range(11)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)

# Only entry points are cached on disk, and with them all that they call.
entry = njit(cache=True, nogil=True, error_model="numpy")
compiled = njit(nogil=True, error_model="numpy")
inlined = njit(nogil=True, error_model="numpy", inline="always")
kl_upper_bound = compiled(_kl_upper_bound)


@compiled
def uniform(z):
    """The number of [0, 1) that belongs to the state z of splitmix64; the next state is z + GOLDEN."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def normals(z):
    """Two independent standard normal numbers by the polar method, and the state after them."""
    square = x = y = 0.0
    while not 0.0 < square < 1.0:
        z += GOLDEN
        x = 2.0 * uniform(z) - 1.0
        z += GOLDEN
        y = 2.0 * uniform(z) - 1.0
        square = x * x + y * y
    factor = math.sqrt(-2.0 * math.log(square) / square)
    return factor * x, factor * y, z


@compiled
def reward_of(arm, moment, truth, deviation, table, z):
    """The reward of an arm: of a coin where table is None or deviation < 0, from the table, or Gaussian.

    None is known while compiling: coins, the most frequent case, get code of their own, three times as fast.
    """
    reward = 0.0
    if table is None or deviation < 0.0:
        z += GOLDEN
        reward = 1.0 if uniform(z) < truth[arm] else 0.0
    elif len(table) > 0:
        reward = table[moment - 1, arm]
    else:
        noise, _, z = normals(z)
        reward = truth[arm] + deviation * noise
    return reward, z


@inlined
def largest(means, roots, shares, factor, second, first, z):
    """The place of the largest means + factor roots + second shares, ties at random unless `first`."""
    top, count = 0, 1
    value = means[0] + factor * roots[0] + second * shares[0]
    for arm in range(1, len(means)):
        other = means[arm] + factor * roots[arm] + second * shares[arm]
        if other > value:
            top, count, value = arm, 1, other
        elif other == value and not first:
            count += 1
            z += GOLDEN
            if uniform(z) * count < 1.0:
                top = arm
    return top, z


@compiled
def next_active(active, arm):
    """The next active arm in turn after `arm`, len(active) at the end of the turn."""
    arm += 1
    while arm < len(active) and not active[arm]:
        arm += 1
    return arm


@compiled
def eliminate(means, active, radius):
    """Drop the arms whose upper bound is below some active arm's lower bound; returns the first active arm."""
    highest = -math.inf
    for arm in range(len(means)):
        if active[arm]:
            highest = max(highest, means[arm])
    for arm in range(len(means)):
        if means[arm] + radius < highest - radius:
            active[arm] = False
    return next_active(active, -1)


@compiled
def note(sums, table, moment):
    """Add the rewards of all arms in this round, where there is a table of them; says whether there is."""
    found = False
    if table is not None:
        found = len(table) > 0
        if found:
            for arm in range(len(sums)):
                sums[arm] += table[moment - 1, arm]
    return found


@compiled
def run_index(kind, options, schedule, truth, deviation, table, steps, first, z, curve, pulls):
    """One run of a policy by means, counts and spread; the regret after each of `steps` goes to curve."""
    arms = len(pulls)
    means, counts, squares = np.zeros(arms), np.zeros(arms), np.zeros(arms)
    roots, shares, sums = np.zeros(arms), np.zeros(arms), np.zeros(arms)
    active = np.ones(arms, dtype=np.bool_)
    best, regret, place, turn, chosen = truth.max(), 0.0, 0, 0, -1
    exploring = options[0] * arms if kind == EXPLORE_FIRST else arms
    for moment in range(1, steps[-1] + 1):
        level = schedule[moment if len(schedule) > 1 else 0]
        if kind == ELIMINATION:
            arm = turn
        elif moment <= exploring:
            arm = (moment - 1) % arms
        elif chosen >= 0:
            arm = chosen
        else:
            factor = level if kind == UCB1 else (math.sqrt(level) if kind == UCB_V else 0.0)
            arm, z = largest(means, roots, shares, factor, level if kind == UCB_V else 0.0, first, z)
            if kind == EXPLORE_FIRST:
                chosen = arm
            elif kind == EPSILON_GREEDY:
                z += GOLDEN
                if uniform(z) < level:
                    z += GOLDEN
                    arm = int(uniform(z) * arms)
        reward, z = reward_of(arm, moment, truth, deviation, table, z)
        count = counts[arm] + 1.0
        change = reward - means[arm]
        counts[arm] = count
        means[arm] += change / count
        if kind == UCB1:
            roots[arm] = 1.0 / math.sqrt(count)
        elif kind == UCB_V:
            squares[arm] += change * (reward - means[arm])
            roots[arm], shares[arm] = math.sqrt(2.0 * squares[arm]) / count, 3.0 * options[0] / count
        elif kind == ELIMINATION:
            turn = next_active(active, arm)
            if turn == arms:
                turn = eliminate(means, active, level / math.sqrt(count))
        regret += best - truth[arm]
        if note(sums, table, moment):
            regret -= reward
        if moment == steps[place]:
            curve[place] = regret + sums.max()
            place += 1
    pulls[:] = counts.astype(np.int64)


@entry
def run_many(kind, options, schedule, truths, deviation, table, steps, first, seeds, curves, pulls):
    """All runs in turn; truths has one row for all or one a run (zeros for a table); table: the rewards or None."""
    for run in range(len(seeds)):
        truth = truths[run if len(truths) > 1 else 0]
        z, curve, counts = seeds[run], curves[run], pulls[run]
        run_index(kind, options, schedule, truth, deviation, table, steps, first, z, curve, counts)
