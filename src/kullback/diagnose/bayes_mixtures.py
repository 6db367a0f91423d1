"""Bayesian mixtures as predictors: over an enumerated class, conjugate families, and all bounded context trees.

Each predicts with Q(y | past) = int w(t | past) P_t(y | past), and pays the regret that `universality` bounds.

- BayesMixture: K hypotheses P_k(y | x), exactly; a sample is one addition to K log-weights.
- BetaBernoulliMixture, DirichletMixture: symbols independent or Markov of a given order, in closed form.
- ContextTreeMixture: all tree sources up to a depth at once (context-tree weighting; Willems, Shtarkov and Tjalkens
  1995): P_s = P_KT / 2 + (product of P of the children) / 2, with the ratio of the two halves kept at each node, so
  that a symbol costs O(depth).

Shapes: log_likelihood [K, N, Y] in nats, inputs are indices 0..N-1 and labels 0..Y-1; float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.diagnose._parameters import Parameters
from kullback.diagnose.universality import regret_batch, regret_online, regret_supervised

__all__ = ["BayesMixture", "BetaBernoulliMixture", "ContextTreeMixture", "DirichletMixture"]


@dataclass(eq=False, repr=False)
class BayesMixture(Parameters):
    """The exact mixture over K hypotheses with log_prior [K], with scikit-learn's manners.

    log_likelihood: log P_k(y | x) as a tensor [K, N, Y], inputs then being indices; or a function of inputs [B, ...] to
    [K, B, Y]. Starts at the prior: predict before any sample is the prior's prediction. fit begins anew, update and
    partial_fit go on. Raises DataError for a prior or a likelihood that is not normalised and for samples outside.

    >>> coins = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.9, 0.1]]).double().log().unsqueeze(1)
    >>> mixture = BayesMixture(torch.full((3,), 1 / 3).double().log(), coins).update([0, 0, 0], [1, 1, 1])
    >>> mixture.predict_proba([0]).round(decimals=4)
    tensor([[0.1594, 0.8406]], dtype=torch.float64)
    """

    log_prior: Tensor
    log_likelihood: Tensor | Callable[[Any], Tensor]

    def __post_init__(self) -> None:
        prior = torch.as_tensor(self.log_prior).double()
        if prior.ndim != 1 or not len(prior) or abs(float(prior.logsumexp(0))) > 1e-6:
            raise DataError(f"log_prior [K] is of masses that sum to one, got {tuple(prior.shape)} or another sum")
        self._columns: Tensor | None = None
        self._linear: Tensor | None = None
        if isinstance(self.log_likelihood, Tensor):
            table = self.log_likelihood
            if table.ndim != 3 or len(table) != len(prior):
                raise ShapeError(f"log_likelihood has shape [K={len(prior)}, N, Y], got {tuple(table.shape)}")
            _check_laws(table)
            # by input and label, so that a sample reads one row
            self._columns = table.double().permute(1, 2, 0).contiguous()
        self._weights = prior.clone()
        self._count = 0

    def fit(self, x: Any, y: Any) -> Self:
        """Begin at the prior and take inputs [B] with labels [B]."""
        self.__post_init__()
        return self.update(x, y)

    def update(self, x: Any, y: Any) -> Self:
        """Take inputs [B] with labels [B]; a single sample is one addition."""
        if self._columns is not None:
            inputs, labels = self._indices(x, y)
            if len(inputs) == 1:
                self._weights += self._columns[int(inputs), int(labels)]
            else:
                size = self._columns.shape[:2]
                counts = torch.bincount(inputs * size[1] + labels, minlength=size.numel()).double()
                seen = counts.nonzero().squeeze(1)
                rows = self._columns.view(size.numel(), -1)[seen]
                self._weights += counts[seen] @ rows.clamp(min=-1e300)
            self._count += len(inputs)
            return self
        labels = _integers(y, "labels")
        likelihood = self._of(x)
        if likelihood.shape[1] != len(labels):
            raise ShapeError(f"{likelihood.shape[1]} inputs and {len(labels)} labels: give one each")
        self._weights += likelihood.gather(2, labels.expand(len(likelihood), -1).unsqueeze(2)).squeeze(2).sum(1)
        self._count += len(labels)
        return self

    def partial_fit(self, x: Any, y: Any) -> Self:
        """scikit-learn's name for `update`."""
        return self.update(x, y)

    def _of(self, x: Any) -> Tensor:
        if not callable(self.log_likelihood):
            raise ConfigError("a tensor of likelihoods is read by index")
        table = self.log_likelihood(x).double()
        if table.ndim != 3 or len(table) != len(self._weights):
            raise ShapeError(f"log_likelihood returns [K={len(self._weights)}, B, Y], got {tuple(table.shape)}")
        _check_laws(table)
        return table

    def _indices(self, x: Any, y: Any = None) -> tuple[Tensor, Tensor]:
        if self._columns is None:
            raise ConfigError("inputs are indices only where the likelihood is a tensor")
        inputs = _integers(x, "inputs")
        labels = torch.zeros_like(inputs) if y is None else _integers(y, "labels")
        if inputs.shape != labels.shape:
            raise ShapeError(f"{len(inputs)} inputs and {len(labels)} labels: give one each")
        for name, values, size in (("inputs", inputs, len(self._columns)), ("labels", labels, self._columns.shape[1])):
            if len(values) and not 0 <= int(values.amin()) <= int(values.amax()) < size:
                raise DataError(f"{name} are from 0 to {size - 1}: some are outside")
        return inputs, labels

    @property
    def n_seen(self) -> int:
        """How many samples were taken."""
        return self._count

    def log_evidence(self) -> float:
        """log Q of all that was seen: minus the cumulative loss in nats."""
        return float(self._weights.logsumexp(0))

    def posterior(self) -> Tensor:
        """log w(k | seen), [K]. Raises DataError where no hypothesis allows what was seen."""
        if float(self._weights.amax()) < -1e299:
            raise DataError("every hypothesis gives the samples probability zero: the class does not hold the truth")
        return self._weights.log_softmax(0)

    def predict_log_proba(self, x: Any) -> Tensor:
        """log Q(y | x, seen) for inputs [B], to [B, Y]."""
        posterior = self.posterior()
        if self._columns is None:
            return (posterior[:, None, None] + self._of(x)).logsumexp(0)
        inputs, _ = self._indices(x)
        chosen, back = torch.unique(inputs, return_inverse=True)
        # a product of probabilities, ten times quicker than log-sums; these where it underflows
        size = (len(chosen), self._columns.shape[1])
        found = (self._likelihoods()[chosen].flatten(0, 1) @ posterior.exp()).view(size).log()
        for row in (found < -600.0).any(1).nonzero().flatten().tolist():
            found[row] = (self._columns[chosen[row]] + posterior).logsumexp(1)
        return found[back]

    def _likelihoods(self) -> Tensor:
        if self._linear is None and self._columns is not None:
            self._linear = self._columns.exp()
        if self._linear is None:
            raise ConfigError("inputs are indices only where the likelihood is a tensor")
        return self._linear

    def predict_proba(self, x: Any) -> Tensor:
        """Q(y | x, seen) for inputs [B], to [B, Y]."""
        return self.predict_log_proba(x).exp()

    def score(self, x: Any, y: Any) -> float:
        """The mean of log Q(y | x) over samples, in nats."""
        labels = _integers(y, "labels")
        return float(self.predict_log_proba(x).gather(1, labels.unsqueeze(1)).mean())

    def regret(self, log_truth: Tensor, x: Any = None) -> float:
        """E over inputs of D(P_0(. | x) || Q(. | x)), for log_truth [N, Y] at all N inputs, or at given x [N]."""
        if x is None:
            if self._columns is None:
                raise ConfigError("regret needs the inputs x where the likelihood is a function")
            x = torch.arange(len(self._columns))
        return float(regret_supervised(log_truth, self.predict_log_proba(x)))


def _check_laws(table: Tensor) -> None:
    if float(table.amax()) > 1e-9 or float(table.logsumexp(-1).abs().amax()) > 1e-5:
        raise DataError("log_likelihood holds normalised log-probabilities, none above 0: subtract its logsumexp")


def _integers(values: Any, name: str) -> Tensor:
    found = torch.as_tensor(values)
    found = found.reshape(1) if found.ndim == 0 else found
    if found.ndim != 1 or (found.is_floating_point() and not bool((found == found.round()).all())):
        raise DataError(f"{name} are whole numbers of shape [B], got {tuple(found.shape)}")
    return found.long()


@dataclass(eq=False, repr=False)
class BetaBernoulliMixture(Parameters):
    """Coins of every bias under a Beta(a, b) prior: P(1 | past) = (a + ones) / (a + b + n).

    >>> round(BetaBernoulliMixture().regret_online(0.3, 10), 6)
    0.618816
    """

    a: float = 1.0
    b: float = 1.0

    def __post_init__(self) -> None:
        if not (self.a > 0.0 and self.b > 0.0):
            raise ConfigError(f"a and b of a Beta prior are positive, got {self.a} and {self.b}")
        self._ones, self._zeros = 0, 0

    def fit(self, x: Any, y: Any = None) -> Self:
        """Begin at the prior and take symbols 0 and 1, [n]."""
        self._ones, self._zeros = 0, 0
        return self.update(x)

    def update(self, x: Any) -> Self:
        """Take symbols 0 and 1, [n]."""
        symbols = _symbols(x, 2)
        ones = int(symbols.sum())
        self._ones, self._zeros = self._ones + ones, self._zeros + len(symbols) - ones
        return self

    partial_fit = update

    def predict_log_proba(self) -> Tensor:
        """log P of 0 and 1 next, [2]."""
        counts = torch.tensor([self.b + self._zeros, self.a + self._ones], dtype=torch.float64)
        return (counts / counts.sum()).log()

    def log_evidence(self) -> float:
        """log Q of the sequence seen."""
        return float(self._log_mixture(torch.tensor(float(self._ones)).double(), self._ones + self._zeros))

    def _log_mixture(self, ones: Tensor, n: int) -> Tensor:
        def log_beta(p: Tensor, q: Tensor) -> Tensor:
            return torch.lgamma(p) + torch.lgamma(q) - torch.lgamma(p + q)

        a, b = torch.tensor(self.a).double(), torch.tensor(self.b).double()
        return log_beta(a + ones, b + n - ones) - log_beta(a, b)

    def _sequences(self, theta: float, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """By the number of ones [n + 1]: the truth's and the mixture's log-probability, and how many sequences."""
        if not 0.0 < theta < 1.0:
            raise ConfigError(f"theta is the truth's probability of a one, in (0, 1), and is {theta}")
        if n < 0:
            raise ConfigError(f"n is a number of samples, and is {n}")
        ones = torch.arange(n + 1, dtype=torch.float64)
        truth = ones * math.log(theta) + (n - ones) * math.log1p(-theta)
        many = torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(ones + 1) - torch.lgamma(n - ones + 1)
        return truth, self._log_mixture(ones, n), many

    def regret_online(self, theta: float, n: int) -> float:
        """n R_o = D(P_theta^n || Q), exactly, in nats."""
        truth, mixture, many = self._sequences(theta, n)
        return float(regret_online(truth, mixture, log_count=many))

    def regret_batch(self, theta: float, n: int) -> float:
        """R_b(n), the expected KL of the prediction of sample n after n - 1, exactly."""
        if n < 1:
            raise ConfigError(f"n is a number of samples, 1 or more, and is {n}")
        truth, _, many = self._sequences(theta, n - 1)
        ones = torch.arange(n, dtype=torch.float64)
        counts = torch.stack([self.b + n - 1 - ones, self.a + ones], dim=1)
        nature = torch.tensor([1.0 - theta, theta], dtype=torch.float64).log().expand(n, 2)
        return float(regret_batch(truth, nature, (counts / counts.sum(1, keepdim=True)).log(), log_count=many))


@dataclass(eq=False, repr=False)
class DirichletMixture(Parameters):
    """Symbols 0..Y-1 whose law given the last `order` symbols has a Dirichlet prior alpha [Y]; order 0: independent.

    alpha = 1/2 each is Krichevsky and Trofimov's. The first `order` symbols have no context yet and cost log Y each.

    >>> mixture = DirichletMixture(torch.full((2,), 0.5)).update([0, 1, 1])
    >>> mixture.predict_log_proba().exp()
    tensor([0.3750, 0.6250], dtype=torch.float64)
    """

    alpha: Tensor
    order: int = 0

    def __post_init__(self) -> None:
        alpha = torch.as_tensor(self.alpha).double()
        if alpha.ndim != 1 or len(alpha) < 2 or not bool((alpha > 0.0).all()):
            raise ConfigError("alpha [Y] has a positive entry for each of two symbols or more")
        if self.order < 0 or len(alpha) ** self.order > 1 << 22:
            raise ConfigError(f"order is 0 or more with Y^order up to four million contexts, got {self.order}")
        self._reset()

    def _reset(self) -> None:
        alpha = torch.as_tensor(self.alpha).double()
        self._counts = alpha.repeat(len(alpha) ** self.order, 1)
        self._past: list[int] = []
        self._evidence = 0.0

    def fit(self, x: Any, y: Any = None) -> Self:
        """Begin at the prior and take a sequence [n]."""
        self._reset()
        return self.update(x)

    def update(self, x: Any) -> Self:
        """Take the next symbols of the sequence, [n]."""
        size = self._counts.shape[1]
        for symbol in _symbols(x, size).tolist():
            if len(self._past) < self.order:
                self._evidence -= math.log(size)
            else:
                row = self._counts[self._context()]
                self._evidence += math.log(float(row[symbol] / row.sum()))
                row[symbol] += 1.0
            self._past = [*self._past, symbol][-self.order :] if self.order else []
        return self

    partial_fit = update

    def _context(self) -> int:
        size, index = self._counts.shape[1], 0
        for symbol in self._past:
            index = index * size + symbol
        return index

    def predict_log_proba(self) -> Tensor:
        """log Q of the next symbol, [Y]."""
        if len(self._past) < self.order:
            return torch.full((self._counts.shape[1],), -math.log(self._counts.shape[1]), dtype=torch.float64)
        row = self._counts[self._context()]
        return (row / row.sum()).log()

    def log_evidence(self) -> float:
        """log Q of the sequence seen."""
        return self._evidence


def _symbols(x: Any, size: int) -> Tensor:
    symbols = _integers(x, "symbols")
    if len(symbols) and not 0 <= int(symbols.amin()) <= int(symbols.amax()) < size:
        raise DataError(f"symbols are from 0 to {size - 1}: some are outside")
    return symbols


class _Node:
    """Counts of a context, and the log of (P_KT / product of the children's P)."""

    __slots__ = ("balance", "children", "counts")

    def __init__(self, alphabet: int) -> None:
        self.counts = [0.5] * alphabet
        self.children: dict[int, _Node] = {}
        self.balance = 0.0


@dataclass(eq=False, repr=False)
class ContextTreeMixture(Parameters):
    """The mixture over all context trees up to `depth` on symbols 0..alphabet-1, with Krichevsky-Trofimov leaves.

    A tree of L leaves and inner nodes has the prior mass 2^-(nodes above the depth). The first `depth` symbols find
    symbols 0 before them. Memory grows with the contexts seen.

    >>> mixture = ContextTreeMixture(3).update([0, 1] * 20)
    >>> round(float(mixture.predict_log_proba().exp()[0]), 3)
    0.975
    """

    depth: int
    alphabet: int = 2

    def __post_init__(self) -> None:
        if self.depth < 0 or self.alphabet < 2:
            raise ConfigError(f"depth is 0 or more and alphabet 2 or more, got {self.depth} and {self.alphabet}")
        self._reset()

    def _reset(self) -> None:
        self._root = _Node(self.alphabet)
        self._past = [0] * self.depth
        self._evidence = 0.0

    def fit(self, x: Any, y: Any = None) -> Self:
        """Begin at the prior and take a sequence [n]."""
        self._reset()
        return self.update(x)

    def update(self, x: Any) -> Self:
        """Take the next symbols of the sequence, [n]."""
        for symbol in _symbols(x, self.alphabet).tolist():
            self._step(symbol)
        return self

    partial_fit = update

    def _path(self, *, grow: bool) -> list[_Node]:
        """Nodes from the root along the past, latest symbol first."""
        path = [self._root]
        for symbol in reversed(self._past):
            child = path[-1].children.get(symbol)
            if child is None:
                child = _Node(self.alphabet)
                if grow:
                    path[-1].children[symbol] = child
            path.append(child)
        return path

    def _predictions(self, path: Sequence[_Node]) -> list[list[float]]:
        """Of each node on the path, P(next symbol) under its subtree, root first."""
        below: list[float] | None = None
        found = []
        for node in reversed(path):
            total = sum(node.counts)
            own = [count / total for count in node.counts]
            if below is not None:
                share = 1.0 / (1.0 + math.exp(-node.balance)) if node.balance > -700.0 else 0.0
                own = [share * one + (1.0 - share) * other for one, other in zip(own, below, strict=True)]
            below = own
            found.append(own)
        return found[::-1]

    def _step(self, symbol: int) -> None:
        path = self._path(grow=True)
        predictions = self._predictions(path)
        self._evidence += math.log(predictions[0][symbol])
        for depth, node in enumerate(path):
            if depth < self.depth:
                own = node.counts[symbol] / sum(node.counts)
                node.balance += math.log(own) - math.log(predictions[depth + 1][symbol])
            node.counts[symbol] += 1.0
        self._past = [*self._past, symbol][-self.depth :] if self.depth else []

    def predict_log_proba(self) -> Tensor:
        """log Q of the next symbol, [alphabet]."""
        return torch.tensor(self._predictions(self._path(grow=False))[0], dtype=torch.float64).log()

    def log_evidence(self) -> float:
        """log Q of the sequence seen."""
        return self._evidence
