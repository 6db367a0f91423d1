"""Small programs whose measures are known, and random ones with an interpretation that is written out by hand."""

from fractions import Fraction as F

from hypothesis import strategies

from kullback.sample.compose import bernoulli, categorical, factor, program, sample, spawn, yield_


@program
def coin():
    heads = yield sample(bernoulli(F(1, 2)))
    yield factor(3 if heads else 1)
    yield yield_()
    return heads


def coin_flip():
    return sample(bernoulli(F(1, 2)))


@program
def hmm(observed=(1, 0), stay=F(3, 4), good=F(3, 4)):
    """A hidden chain of two states, a checkpoint after each observation."""
    state, states = None, []
    for seen in observed:
        odds = F(1, 2) if state is None else stay if state else 1 - stay
        state = yield sample(bernoulli(odds))
        states.append(state)
        yield factor(good if state == bool(seen) else 1 - good)
        yield yield_()
    return tuple(states)


def hmm_measure(observed, stay=F(3, 4), good=F(3, 4)):
    """The weight of each path, as a product."""
    paths = {(): F(1)}
    for seen in observed:
        longer = {}
        for path, weight in paths.items():
            for state in (False, True):
                move = F(1, 2) if not path else stay if state == path[-1] else 1 - stay
                longer[(*path, state)] = weight * move * (good if state == bool(seen) else 1 - good)
        paths = longer
    return paths


@program
def branching():
    """Traces of one and of two choices."""
    x = yield sample(bernoulli(F(1, 2)))
    if not x:
        return (x,)
    y = yield sample(bernoulli(F(1, 3)))
    yield factor(2 if y else F(1, 2))
    yield yield_()
    return x, y


@program
def geometric(most=4):
    """Flips until heads, four at most, weighted by their number."""
    flips = 1
    while flips < most and not (yield sample(bernoulli(F(1, 2)))):
        flips += 1
        yield yield_()
    yield factor(F(flips, 2))
    return flips


# --- random programs, as trees ---

weights = strategies.sampled_from([F(0), F(1, 3), F(1, 2), F(1), F(2), F(5, 2)])
chances = strategies.sampled_from([F(1, 6), F(1, 3), F(1, 2), F(2, 3), F(5, 6)])
leaves = strategies.integers(0, 2).map(lambda value: ("ret", value))


def grown(inner):
    return strategies.one_of(
        strategies.tuples(strategies.just("flip"), chances, inner, inner),
        strategies.tuples(strategies.just("factor"), weights, inner),
        strategies.tuples(strategies.just("yield"), inner),
        strategies.tuples(strategies.just("spawn"), strategies.integers(1, 2), inner),
    )


def count(tree, kind):
    return (tree[0] == kind) + sum(count(part, kind) for part in tree if isinstance(part, tuple))


# what is enumerated grows with the power of the copies
trees = strategies.recursive(leaves, grown, max_leaves=3).filter(
    lambda tree: count(tree, "spawn") <= 1 and count(tree, "flip") <= 2
)
quiet = trees.filter(lambda tree: not count(tree, "spawn") and count(tree, "flip") <= 1)


@program
def planted(tree, below=0):
    """The program of a tree, which returns `below` times three plus the leaf."""
    kind, *rest = tree
    while kind != "ret":
        if kind == "flip":
            tree = rest[1] if (yield sample(categorical({True: rest[0], False: 1 - rest[0]}))) else rest[2]
        else:
            tree = rest[-1]
            if kind == "factor":
                yield factor(rest[0])
            elif kind == "yield":
                yield yield_()
            else:
                yield spawn(rest[0])
        kind, *rest = tree
    return 3 * below + rest[0]


def measure(tree, below=0, weight=F(1)):
    """The measure of a tree, by recursion."""
    kind, *rest = tree
    if kind == "ret":
        return {3 * below + rest[0]: weight} if weight else {}
    if kind == "flip":
        parts = [measure(rest[1], below, weight * rest[0]), measure(rest[2], below, weight * (1 - rest[0]))]
    else:
        parts = [measure(rest[-1], below, weight * rest[0] if kind == "factor" else weight)]
    return added(parts)


def added(parts):
    total = {}
    for part in parts:
        for value, weight in part.items():
            total[value] = total.get(value, F(0)) + weight
    return total


def integral(first, then):
    """The measure of `first`, and then that of then(x)."""
    parts = [{value: mass * weight for value, weight in then(x).items()} for x, mass in first.items()]
    return {value: weight for value, weight in added(parts).items() if weight}
