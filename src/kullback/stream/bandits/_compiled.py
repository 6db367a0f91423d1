"""The loop of the simulator, compiled: rounds of one run, then the next run, a few arrays of K numbers as the state.

`kind` says which policy; the loop of `kullback.stream.bandits.simulate` over policy objects is the naive twin. What
depends on the round alone (root log t, epsilon_t, ...) comes in `schedule`. Random numbers are splitmix64's, one stream
a run, its state z passed from call to call. Of an index m + c_t / root(n) only the pulled arm's m and n change, so
that a round costs one root, K products and K comparisons. Functions on the path of every round are small and have one
exit, so that they are inlined: a call with arrays costs more than such a round.
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
# The rows of `room`, the state of policies that are not simple indices.
COUNTS, MEANS, SUMS, LOGARITHMS, WEIGHTS, INDEX = range(6)
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
def gamma(shape, normal, z):
    """A Gamma(shape) number after Marsaglia and Tsang, from a first normal number and more where that is rejected."""
    boost = 1.0
    if shape < 1.0:
        z += GOLDEN
        boost = (1.0 - uniform(z)) ** (1.0 / shape)
        shape += 1.0
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        v = 1.0 + c * normal
        if v > 0.0:
            v = v * v * v
            z += GOLDEN
            u = 1.0 - uniform(z)
            square = normal * normal
            if u < 1.0 - 0.0331 * square * square or math.log(u) < 0.5 * square + d * (1.0 - v + math.log(v)):
                return d * v * boost, z
        normal, _, z = normals(z)


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


@compiled
def drawn(room, row, total, z):
    """A place drawn in proportion to the row's entries, which sum to `total`; never one of weight 0."""
    z += GOLDEN
    rest = uniform(z) * total
    place, last = -1, 0
    for arm in range(room.shape[1]):
        weight = room[row, arm]
        if weight > 0.0 and place < 0:
            last = arm
            rest -= weight
            if rest < 0.0:
                place = arm
    return (place if place >= 0 else last), z


@compiled
def posterior_draws(kind, options, room, z):
    """A draw from every arm's posterior, Beta or Gaussian, written to INDEX."""
    for arm in range(room.shape[1]):
        one, two, z = normals(z)
        count, won = room[COUNTS, arm], room[SUMS, arm]
        if kind == BETA:
            success, z = gamma(options[0] + won, one, z)
            failure, z = gamma(options[1] + count - won, two, z)
            room[INDEX, arm] = success / (success + failure)
        else:
            precision = options[1] + options[2] * count
            room[INDEX, arm] = (options[0] * options[1] + options[2] * won) / precision + one / math.sqrt(precision)
    return z


@compiled
def tsallis(rate, room):
    """The law of Tsallis-INF, written to INDEX, from the costs in WEIGHTS; returns its sum."""
    lowest = math.inf
    for arm in range(room.shape[1]):
        lowest = min(lowest, room[WEIGHTS, arm])
    x, total = lowest - 2.0 / rate, 0.0
    for _ in range(100):
        total = slope = 0.0
        for arm in range(room.shape[1]):
            inverse = 2.0 / (rate * (room[WEIGHTS, arm] - x))
            law = inverse * inverse
            room[INDEX, arm] = law
            total += law
            slope += law * inverse
        if abs(total - 1.0) < 1e-12:
            break
        x -= (total - 1.0) / (rate * slope)
    return total


@compiled
def exponential_law(mixing, room):
    """The law of the weights with uniform play mixed in, written to INDEX; returns its sum."""
    arms, total = room.shape[1], 0.0
    for arm in range(arms):
        total += room[WEIGHTS, arm]
        room[INDEX, arm] = room[WEIGHTS, arm]
    if mixing > 0.0:
        for arm in range(arms):
            room[INDEX, arm] = (1.0 - mixing) * room[WEIGHTS, arm] / total + mixing / arms
        total = 1.0
    return total


@compiled
def choose(kind, moment, level, options, room, first, z):
    """The arm of round `moment`; a law that it was drawn from is left in INDEX, times options[5]."""
    arm = 0
    if kind >= EXP3:
        options[5] = tsallis(level, room) if kind == TSALLIS else exponential_law(options[1], room)
        arm, z = drawn(room, INDEX, options[5], z)
    else:
        z = posterior_draws(kind, options, room, z)
        index = room[INDEX]
        arm, z = largest(index, index, index, 0.0, 0.0, first, z)
    return arm, z


@compiled
def shift(options, room):
    """Set the offset options[6] to the largest logarithm and compute the weights relative to it anew."""
    offset = -math.inf
    for arm in range(room.shape[1]):
        offset = max(offset, room[LOGARITHMS, arm])
    for arm in range(room.shape[1]):
        room[WEIGHTS, arm] = math.exp(room[LOGARITHMS, arm] - offset)
    options[6] = offset


@compiled
def exp3(options, arm, reward, room):
    """The weights of Exp3 after a reward: their logarithms, and exponentials relative to the offset options[6]."""
    arms = room.shape[1]
    rate, implicit, bonus, share, total = options[0], options[2], options[3], options[4], options[5]
    if bonus > 0.0:
        for other in range(arms):
            room[LOGARITHMS, other] += rate * bonus * total / room[INDEX, other]
        room[LOGARITHMS, arm] += rate * reward * total / room[INDEX, arm]
        shift(options, room)
    else:
        room[LOGARITHMS, arm] -= rate * (1.0 - reward) / (room[INDEX, arm] / total + implicit)
        room[WEIGHTS, arm] = math.exp(room[LOGARITHMS, arm] - options[6])
    total = 0.0
    for other in range(arms):
        total += room[WEIGHTS, other]
    if share > 0.0:
        for other in range(arms):
            room[WEIGHTS, other] = (1.0 - share) * room[WEIGHTS, other] / total + share / arms
            room[LOGARITHMS, other] = math.log(room[WEIGHTS, other])
        options[6] = 0.0
    elif total < 1e-100:
        shift(options, room)


@compiled
def learn(kind, options, arm, reward, room):
    """Take in the reward of an arm."""
    room[COUNTS, arm] += 1.0
    room[SUMS, arm] += reward
    if kind == TSALLIS:
        room[WEIGHTS, arm] += (1.0 - reward) * options[5] / room[INDEX, arm]
    elif kind == EXP3:
        exp3(options, arm, reward, room)


@compiled
def hedge(rate, arm, reward, moment, truth, deviation, table, options, room, z):
    """Full feedback: the costs of all arms, of which that of `arm` is known."""
    for other in range(room.shape[1]):
        received = reward
        if other != arm:
            received, z = reward_of(other, moment, truth, deviation, table, z)
        room[LOGARITHMS, other] -= rate * (1.0 - received)
    shift(options, room)
    return z


@compiled
def run_drawing(kind, given, schedule, truth, deviation, table, steps, first, z, curve, pulls):
    """One run of any other policy."""
    arms = len(pulls)
    options, room, sums = given.copy(), np.zeros((6, arms)), np.zeros(arms)
    room[WEIGHTS] = 0.0 if kind == TSALLIS else 1.0
    best, regret, place = truth.max(), 0.0, 0
    for moment in range(1, steps[-1] + 1):
        level = schedule[moment if len(schedule) > 1 else 0]
        arm, z = choose(kind, moment, level, options, room, first, z)
        reward, z = reward_of(arm, moment, truth, deviation, table, z)
        pulls[arm] += 1
        if kind == HEDGE:
            z = hedge(level, arm, reward, moment, truth, deviation, table, options, room, z)
        else:
            learn(kind, options, arm, reward, room)
        regret += best - truth[arm]
        if note(sums, table, moment):
            regret -= reward
        if moment == steps[place]:
            curve[place] = regret + sums.max()
            place += 1


@entry
def run_many(kind, options, schedule, truths, deviation, given, table, steps, first, seeds, curves, pulls):
    """All runs in turn; truths has one row for all or one a run (zeros for a table); given: the table or None."""
    for run in range(len(seeds)):
        truth = truths[run if len(truths) > 1 else 0]
        z, curve, counts = seeds[run], curves[run], pulls[run]
        if kind <= UCB_V:
            run_index(kind, options, schedule, truth, deviation, given, steps, first, z, curve, counts)
        else:
            run_drawing(kind, options, schedule, truth, deviation, table, steps, first, z, curve, counts)
