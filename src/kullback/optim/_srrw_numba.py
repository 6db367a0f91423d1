"""Self-repellent walks and the recursions that they drive, as compiled loops.

Twins of those in srrw.py, srrw_simulation.py and visit_orders.py.

A visit touches the neighbours of the current node alone: the history is kept as y = x / s with a scale s that all
nodes share, and each node's weight (x_j / mu_j)^-alpha is kept, up to a factor common to all, until its next visit.
"""

# Types cannot be checked: the decorators replace the functions.
# mypy: ignore-errors

import numpy as np
from numba import njit

__all__ = ["descend", "non_backtracking", "walk"]

_LOWEST, _HIGHEST = 1e-250, 1e250


@njit(cache=True)
def _draw_direct(begin, end, neighbours, probabilities, log_mu, y, log_scale, alpha, log_cap, number, buffer):
    """A draw with all weights in logarithms, for caps, for an alpha that changes and for weights out of range."""
    top = -np.inf
    for k in range(begin, end):
        node = neighbours[k]
        ratio = np.log(y[node]) + log_scale - log_mu[node]
        ratio = min(max(ratio, -log_cap), log_cap)
        value = np.log(probabilities[k]) - alpha * ratio
        buffer[k - begin] = value
        top = max(top, value)
    total = 0.0
    for k in range(end - begin):
        total += np.exp(buffer[k] - top)
        buffer[k] = total
    chosen, bound = 0, number * total
    while chosen < end - begin - 1 and buffer[chosen] <= bound:
        chosen += 1
    return neighbours[begin + chosen]


@njit(cache=True)
def _renew(y, weights, log_mu, scale, alpha):
    """The history made to sum to what it should with scale 1, and its weights."""
    for node in range(len(y)):
        y[node] *= scale
        weights[node] = np.exp(-alpha * (np.log(y[node]) - log_mu[node]))


@njit(cache=True)
def walk(
    starts, neighbours, probabilities, log_mu, history, places, first, uniforms,
    increments, log_scales, fresh, alphas, log_cap, direct, visited,
):  # fmt: skip
    """Visits by uniform numbers [R, n] into visited [R, n]; history [R, N] and places [R, M] are brought up to date.

    increments [n]: gamma / s, what a visit adds to y. log_scales [n]: log s after it. fresh [n]: whether y is made
    normal before it. direct: alpha changes or ratios are capped.
    """
    nodes, tokens, count = history.shape[1], places.shape[1], uniforms.shape[1]
    weights, buffer = np.empty(nodes), np.empty(nodes)
    for run in range(history.shape[0]):
        y = history[run]
        for index in range(count):
            alpha = alphas[index]
            log_scale = log_scales[index - 1] if index > 0 else 0.0
            if fresh[index]:
                _renew(y, weights, log_mu, np.exp(log_scale), alpha)
                log_scale = 0.0
            token = (first + index) % tokens
            begin, end = starts[places[run, token]], starts[places[run, token] + 1]
            number, total = uniforms[run, index], 0.0
            if not direct:
                for k in range(begin, end):
                    total += probabilities[k] * weights[neighbours[k]]
                    buffer[k - begin] = total
            if _LOWEST < total < _HIGHEST:
                chosen, bound = 0, number * total
                while chosen < end - begin - 1 and buffer[chosen] <= bound:
                    chosen += 1
                node = neighbours[begin + chosen]
            else:
                node = _draw_direct(
                    begin, end, neighbours, probabilities, log_mu, y, log_scale, alpha, log_cap, number, buffer
                )
            y[node] += increments[index]
            if not direct:
                weights[node] = np.exp(-alpha * (np.log(y[node]) - log_mu[node]))
            places[run, token] = node
            visited[run, index] = node
        if count > 0:
            scale = np.exp(log_scales[count - 1])
            for node in range(nodes):
                y[node] *= scale


@njit(cache=True)
def descend(kind, features, labels, ridge, theta, nodes, sizes, radius):
    """theta [R, d] moved along the fields of nodes [R, n, M], their mean at a time, by sizes [n].

    kind: 0 logistic, 1 least squares, 2 the mean of the features. radius: of the ball that holds theta.
    """
    dimension, tokens = theta.shape[1], nodes.shape[2]
    ascent = np.empty(dimension)
    for run in range(theta.shape[0]):
        point = theta[run]
        for step in range(nodes.shape[1]):
            for k in range(dimension):
                ascent[k] = -point[k] if kind == 2 else -ridge * point[k]
            for token in range(tokens):
                row = features[nodes[run, step, token]]
                factor = 1.0
                if kind < 2:
                    score = 0.0
                    for k in range(dimension):
                        score += row[k] * point[k]
                    mean = 1.0 / (1.0 + np.exp(-score)) if kind == 0 else score
                    factor = labels[nodes[run, step, token]] - mean
                for k in range(dimension):
                    ascent[k] += factor / tokens * row[k]
            square = 0.0
            for k in range(dimension):
                point[k] += sizes[step] * ascent[k]
                square += point[k] * point[k]
            if square > radius * radius:
                for k in range(dimension):
                    point[k] *= radius / np.sqrt(square)


@njit(cache=True)
def non_backtracking(starts, neighbours, probabilities, places, before, uniforms, visited):
    """Visits [n, R] by uniform numbers [n, R, 3]; places and before [R] are brought up to date."""
    for index in range(uniforms.shape[0]):
        for run in range(uniforms.shape[1]):
            here, last = places[run], before[run]
            begin, end = starts[here], starts[here + 1]
            total, back, others = 0.0, 0.0, 0
            for k in range(begin, end):
                total += probabilities[k]
                if neighbours[k] == last:
                    back = probabilities[k]
                elif neighbours[k] != here:
                    others += 1
            bound, reached, chosen = uniforms[index, run, 0] * total, 0.0, end - 1
            for k in range(begin, end):
                reached += probabilities[k]
                if reached > bound:
                    chosen = k
                    break
            other = neighbours[chosen]
            if other == last and others > 0:
                left = min(int(uniforms[index, run, 1] * others), others - 1)
                for k in range(begin, end):
                    if neighbours[k] != last and neighbours[k] != here:
                        if left == 0:
                            if uniforms[index, run, 2] < (probabilities[k] / back) ** 2:
                                other = neighbours[k]
                            break
                        left -= 1
            if other != here:
                before[run] = here
                places[run] = other
            visited[index, run] = places[run]
