"""The compiled loop of KL-UCB, which seldom computes an index.

Of an arm that is not pulled, the index rises with the level, and ever more slowly: from the last time that it was
computed it lies between that value and the tangent there, of slope q (1-q) / (n (q - m)). So only arms whose tangents
reach the largest lower bound are solved for. A q between the largest index and the next tangent is then held: until a
tangent comes up to it, and while the best arm's index is above it, n kl(m, q) < level, the best arm is pulled again.
There kl(m, q) <= (q - m)^2 (1 / v(m) + 2 / v(q)) / 6 with v(x) = x (1-x), since 1 / v is convex, takes no logarithm.
"""

from __future__ import annotations

import math

import numpy as np

from kullback.stream.bandits._compiled import GOLDEN, compiled, entry, inlined, kl_upper_bound, note, reward_of, uniform

__all__ = ["run_kl_ucb"]

# The rows of `room`: n, sum of rewards, the index, the level it was computed at, its slope there, and one over that.
COUNTS, SUMS, INDEX, LEVEL, SLOPE, RUN = range(6)
_MARGIN = 1e-11  # of indices, which are exact to 1e-12


@compiled
def solve(arm, level, room):
    """The index of an arm at this level, and its slope."""
    seen = room[COUNTS, arm]
    mean = room[SUMS, arm] / seen
    index = kl_upper_bound(mean, level / seen)
    room[INDEX, arm], room[LEVEL, arm], room[SLOPE, arm] = index, level, math.inf
    if index > mean or mean >= 1.0:
        room[SLOPE, arm] = index * (1.0 - index) / (seen * (index - mean)) if index > mean else 0.0
    room[RUN, arm] = 1.0 / max(room[SLOPE, arm], 1e-300)


@inlined
def tangent(arm, level, room):
    """A bound from above of the index at this level."""
    rise = level - room[LEVEL, arm]
    return room[INDEX, arm] + _MARGIN + (room[SLOPE, arm] * rise if rise > 0.0 else 0.0)


@compiled
def best(level, room, first, z):
    """The arm of the largest index, ties at random unless `first`; how many tie; and the state.

    All that may be the largest are solved for.
    """
    arms, lower = room.shape[1], -math.inf
    for arm in range(arms):
        lower = max(lower, room[INDEX, arm])
    lower -= _MARGIN
    highest, last = -math.inf, -1
    for arm in range(arms):
        if tangent(arm, level, room) >= lower:
            if room[LEVEL, arm] != level:
                if last >= 0 and room[COUNTS, last] == room[COUNTS, arm] and room[SUMS, last] == room[SUMS, arm]:
                    for row in (INDEX, LEVEL, SLOPE, RUN):
                        room[row, arm] = room[row, last]
                else:
                    solve(arm, level, room)
            last = arm
            highest = max(highest, room[INDEX, arm])
            lower = max(lower, highest - _MARGIN)
    top, count = -1, 0
    for arm in range(arms):
        if room[INDEX, arm] == highest and room[LEVEL, arm] == level:
            count += 1
            if count == 1:
                top = arm
            elif not first:
                z += GOLDEN
                if uniform(z) * count < 1.0:
                    top = arm
    return top, count, z


@compiled
def hold(level, top, room):
    """A q between the largest index, that of `top`, and the others', and the level up to which these stay below it."""
    second = -math.inf
    for arm in range(room.shape[1]):
        if arm != top:
            second = max(second, tangent(arm, level, room))
    between, ceiling = 0.5 * (second + room[INDEX, top]), math.inf
    if room.shape[1] == 1:
        between = room[SUMS, top] / room[COUNTS, top]
    if not (second < room[INDEX, top] and 0.0 < between < 1.0):
        return between, -math.inf
    for arm in range(room.shape[1]):
        if arm != top:
            rise = (between - room[INDEX, arm] - _MARGIN) * room[RUN, arm]
            ceiling = min(ceiling, room[LEVEL, arm] + rise)
    return between, ceiling


@compiled
def above(level, count, total, between, log_yes, log_no):
    """Whether the index of an arm with this count and sum is above q."""
    short = between - total / count
    if short <= 0.0:
        return True
    mean = total / count
    spread, other = mean * (1.0 - mean), between * (1.0 - between)
    if count * short * short * (other + 2.0 * spread) < 5.999999 * level * spread * other:
        return True
    entropy = 0.0
    if 0.0 < mean < 1.0:
        entropy = mean * math.log(mean) + (1.0 - mean) * math.log(1.0 - mean)
    return count * (entropy - mean * log_yes - (1.0 - mean) * log_no + 1e-9) + 1e-9 < level


@compiled
def run_once(schedule, truth, deviation, table, steps, first, z, curve, pulls):
    """One run; the regret after each of `steps` goes to curve."""
    arms = len(pulls)
    room, sums = np.zeros((6, arms)), np.zeros(arms)
    highest, regret, place, arm = truth.max(), 0.0, 0, -1
    count = total = between = log_yes = log_no = before = 0.0
    ceiling = -math.inf
    for moment in range(1, steps[-1] + 1):
        level = schedule[moment if len(schedule) > 1 else 0]
        if level >= ceiling or not above(level, count, total, between, log_yes, log_no):
            if arm >= 0:
                room[COUNTS, arm], room[SUMS, arm] = count, total
            if moment <= arms:
                arm = moment - 1
            else:
                if moment == arms + 1 or level < before:
                    for other in range(arms):
                        solve(other, level, room)
                else:
                    solve(arm, level, room)
                arm, ties, z = best(level, room, first, z)
                ceiling = -math.inf
                if ties == 1:
                    between, ceiling = hold(level, arm, room)
                if ceiling > level:
                    log_yes, log_no = math.log(between), math.log(1.0 - between)
            count, total, before = room[COUNTS, arm], room[SUMS, arm], level
        reward, z = reward_of(arm, moment, truth, deviation, table, z)
        count += 1.0
        total += reward
        pulls[arm] += 1
        regret += highest - truth[arm]
        if note(sums, table, moment):
            regret -= reward
        if moment == steps[place]:
            curve[place] = regret + sums.max()
            place += 1


@entry
def run_kl_ucb(schedule, truths, deviation, table, steps, first, seeds, curves, pulls):
    """All runs in turn; truths has one row for all or one a run (zeros for a table); table: the rewards or None."""
    for run in range(len(seeds)):
        truth = truths[run if len(truths) > 1 else 0]
        run_once(schedule, truth, deviation, table, steps, first, seeds[run], curves[run], pulls[run])
