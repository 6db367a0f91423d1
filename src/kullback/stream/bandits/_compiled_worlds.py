"""Compiled loops of two studies that take too many rounds for policy objects: zooming, and knapsacks.

The classes of `lipschitz` and `knapsacks` are their naive twins: the same choices, from the same draws where there are.
"""

from __future__ import annotations

import math

import numpy as np

from kullback.stream.bandits._compiled import GOLDEN, compiled, entry, uniform

__all__ = ["run_knapsack", "run_zooming"]


@compiled
def cell_range(place, radius, cells):
    """The first cell, and the one after the last, whose centres lie within `radius` of the centre of cell `place`."""
    reach = math.floor(radius * cells + 1e-9)
    return max(place - reach, 0), min(place + reach + 1, cells)


@compiled
def shrink(cover, free, place, before, after):
    """Take the ball's cover from the cells it has left; returns how many cells are free of any cover now."""
    cells = len(cover)
    old_start, old_end = cell_range(place, before, cells)
    new_start, new_end = cell_range(place, after, cells)
    for cell in range(old_start, new_start):
        cover[cell] -= 1
        free += cover[cell] == 0
    for cell in range(new_end, old_end):
        cover[cell] -= 1
        free += cover[cell] == 0
    return free


@compiled
def activate(cover, free, radius, z):
    """A free cell at random, which is covered now; returns it, how many are free then, and the state."""
    z += GOLDEN
    skip = int(uniform(z) * free)
    place = 0
    for cell in range(len(cover)):
        if cover[cell] == 0:
            if skip == 0:
                place = cell
                break
            skip -= 1
    start, end = cell_range(place, radius, len(cover))
    for cell in range(start, end):
        free -= cover[cell] == 0
        cover[cell] += 1
    return place, free, z


@entry
def run_zooming(truth, best, root_log, lipschitz, steps, z, curve):
    """Zooming on [0, 1] with coins; truth [cells]: the means at the centres of the grid, best: the largest mean.

    The regret after each of `steps` goes to curve; returns the number of active arms.
    """
    cells = len(truth)
    cover = np.zeros(cells, dtype=np.int64)
    places, indices = np.zeros(cells, dtype=np.int64), np.zeros(cells)
    counts, sums = np.zeros(cells), np.zeros(cells)
    free, active, regret, note = cells, 0, 0.0, 0
    for moment in range(1, steps[-1] + 1):
        arm = 0
        if free > 0:
            arm = active
            places[arm], free, z = activate(cover, free, root_log / lipschitz, z)
            active += 1
        else:
            top = indices[0]
            for other in range(1, active):
                if indices[other] > top:
                    arm, top = other, indices[other]
        mean = truth[places[arm]]
        z += GOLDEN
        counts[arm] += 1.0
        sums[arm] += uniform(z) < mean
        before, after = root_log / math.sqrt(counts[arm]), root_log / math.sqrt(counts[arm] + 1.0)
        indices[arm] = sums[arm] / counts[arm] + 2.0 * after
        free = shrink(cover, free, places[arm], before / lipschitz, after / lipschitz)
        regret += best - mean
        if moment == steps[note]:
            curve[note] = regret
            note += 1
    return active


@entry
def run_knapsack(blind, chances, payments, uses, budget, horizon, level, z):
    """One run of primal-dual on an instance, or of UCB1 on rewards alone when `blind`; level: exploration log T.

    Returns what was earned, and in how many rounds.
    """
    arms, resources = len(chances) + 1, uses.shape[1] + 1
    counts, rewards = np.zeros(arms), np.zeros(arms)
    consumption, prices, used = np.zeros((arms, resources - 1)), np.ones(resources), np.zeros(resources - 1)
    largest = np.zeros(resources - 1)
    for resource in range(resources - 1):
        largest[resource] = uses[:, resource].max()
    share, growth = budget / horizon, 1.0 + math.sqrt(math.log(max(resources, 2)) / budget)
    earned = 0.0
    for moment in range(horizon):
        arm, top = 0, -1.0
        if moment < arms:
            arm = moment
        else:
            for other in range(arms):
                radius = math.sqrt(level / counts[other])
                index = rewards[other] + radius
                if not blind:
                    price = prices[resources - 1] * share
                    for resource in range(resources - 1):
                        price += prices[resource] * max(consumption[other, resource] - radius, 0.0)
                    index = min(index, 1.0) / price
                if index > top:
                    arm, top = other, index
            radius = math.sqrt(level / counts[arm])
            for resource in range(resources - 1):
                prices[resource] *= growth ** max(consumption[arm, resource] - radius, 0.0)
            prices[resources - 1] *= growth**share
            if prices.max() > 1e200:
                prices /= prices.max()
        z += GOLDEN
        success = arm < arms - 1 and uniform(z) < chances[arm]
        counts[arm] += 1.0
        reward = payments[arm] if success else 0.0
        rewards[arm] += (reward - rewards[arm]) / counts[arm]
        spent = False
        for resource in range(resources - 1):
            use = uses[arm, resource] if success else 0.0
            consumption[arm, resource] += (use - consumption[arm, resource]) / counts[arm]
            used[resource] += use
            spent = spent or used[resource] + largest[resource] > budget * (1.0 + 1e-12)
        earned += reward
        if spent:
            return earned, moment + 1
    return earned, horizon
