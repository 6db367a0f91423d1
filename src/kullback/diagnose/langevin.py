"""Langevin dynamics: a posterior over network weights by stochastic gradients with noise, and its log-evidence.

With g the gradient of the mean negative log-likelihood of a minibatch, n the number of samples and w the prior,

    t <- t - (e_k / 2) [beta n g - grad log w(t)] + sqrt(e_k) N(0, I),    e_k = lr (1 + k / decay)^(-gamma):

the factor is n, not the size of the batch, and the half belongs to the noise's variance e_k. Preconditioned (pSGLD),
both terms are multiplied by G = 1 / (damping + sqrt(v)), v a running mean of g^2. The ensemble predicts with the mean
of probabilities, Q = (1/M) sum P_m, neither of logits nor of weights. Integrating the mean energy over the inverse
temperature gives the evidence, F_n = -log Z_n = int_0^1 E_beta[n L_n] d beta (thermodynamic integration).
Sources: Welling and Teh 2011; Li et al. 2016 (arXiv 1512.07666); Watanabe 2013 for WBIC.

Shapes: inputs [n, ...], labels [n]; predictions [B, Y] in nats.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.diagnose._parameters import Parameters, check_fitted

__all__ = ["SGLD", "Evidence", "GaussianPrior", "SGLDEnsemble", "beta_grid", "log_weight_ti", "wbic"]


@dataclass(frozen=True)
class GaussianPrior:
    """Independent normal weights of deviation std about 0; by_name: other deviations of parameters by their name.

    A deviation fixed for each weight shrinks or grows the functions with the width: for a last layer of H inputs, it
    takes c / sqrt(H) to keep them of one scale.
    """

    std: float = 1.0
    by_name: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(0.0 < value < math.inf for value in (self.std, *self.by_name.values())):
            raise ConfigError("deviations of a prior are positive and finite: one is not")

    def deviations(self, named: Iterable[tuple[str, Tensor]]) -> list[float]:
        """One for each parameter in order; raises ConfigError for a name in by_name that there is not."""
        names = [name for name, _ in named]
        if unknown := sorted(set(self.by_name) - set(names)):
            raise ConfigError(f"the prior names {unknown[0]!r}, and the parameters are {', '.join(names)}")
        return [self.by_name.get(name, self.std) for name in names]

    def sample_(self, module: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights of a module from the prior, in place."""
        named = list(module.named_parameters())
        with torch.no_grad():
            for (_, weight), std in zip(named, self.deviations(named), strict=True):
                weight.copy_(std * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))


class SGLD(torch.optim.Optimizer):
    """Stochastic-gradient Langevin dynamics as an optimizer, for gradients of the mean negative log-likelihood.

    n_data: the samples behind that mean; std: of the normal prior, a number or one for each parameter, and no other
    weight decay; beta: inverse temperature; lr, decay, gamma: of the step size, gamma = 0 keeps it; precondition:
    pSGLD with the running mean's `memory`. generator: of the noise; under data parallelism give every process one in
    the same state, or the temperature is wrong. Raises ConfigError for values out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        n_data: int,
        lr: float,
        std: float | list[float] = 1.0,
        gamma: float = 0.0,
        decay: float = 1000.0,
        beta: float = 1.0,
        precondition: bool = False,
        memory: float = 0.99,
        damping: float = 1e-5,
        generator: torch.Generator,
    ) -> None:
        if not (lr > 0.0 and n_data >= 1 and beta >= 0.0 and decay > 0.0 and 0.0 <= gamma <= 1.0):
            raise ConfigError("lr, n_data and decay are positive, beta is not negative, gamma is in [0, 1]: one is not")
        if not 0.0 <= memory < 1.0 or not damping > 0.0:
            raise ConfigError(f"memory is in [0, 1) and damping positive, got {memory} and {damping}")
        options = {"n_data": n_data, "lr": lr, "gamma": gamma, "decay": decay, "beta": beta}
        super().__init__(params, {**options, "precondition": precondition, "memory": memory, "damping": damping})
        self.generator = generator
        weights = [weight for group in self.param_groups for weight in group["params"]]
        deviations = std if isinstance(std, list) else [std] * len(weights)
        if len(deviations) != len(weights) or not all(value > 0.0 for value in deviations):
            raise ConfigError(f"std is positive, one for each of {len(weights)} parameters or one for all")
        self._precision = {id(weight): value**-2 for weight, value in zip(weights, deviations, strict=True)}
        self._steps = 0

    def step_size(self) -> float:
        """e_k of the next step, of the first group."""
        group = self.param_groups[0]
        return float(group["lr"] * (1.0 + self._steps / group["decay"]) ** -group["gamma"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient; the others, and those at beta = 0, move by the prior."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            epsilon = group["lr"] * (1.0 + self._steps / group["decay"]) ** -group["gamma"]
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            sizes = [weight.numel() for weight in weights]
            noise = torch.randn(sum(sizes), generator=self.generator, dtype=weights[0].dtype, device=weights[0].device)
            kicks = [part.view_as(weight) for part, weight in zip(noise.split(sizes), weights, strict=True)]
            slopes: list[Tensor] = [weight.grad for weight in weights]  # type: ignore[misc]
            if group["precondition"]:
                self._preconditioned(group, epsilon, weights, slopes, kicks)
                continue
            # t (1 - e / (2 s^2)) - (e n beta / 2) g + sqrt(e) noise, a pass over all parameters for each term
            shrink = [1.0 - 0.5 * epsilon * self._precision[id(weight)] for weight in weights]
            torch._foreach_mul_(weights, shrink)
            torch._foreach_add_(weights, slopes, alpha=-0.5 * epsilon * group["beta"] * group["n_data"])
            torch._foreach_add_(weights, kicks, alpha=math.sqrt(epsilon))
        self._steps += 1
        return loss

    def _preconditioned(
        self, group: dict[str, Any], epsilon: float, weights: list[Tensor], slopes: list[Tensor], kicks: list[Tensor]
    ) -> None:
        for weight, slope, kick in zip(weights, slopes, kicks, strict=True):
            state = self.state[weight]
            if "square" not in state:
                state["square"] = slope.square()
            else:
                state["square"].mul_(group["memory"]).addcmul_(slope, slope, value=1.0 - group["memory"])
            metric = 1.0 / (group["damping"] + state["square"].sqrt())
            drift = group["beta"] * group["n_data"] * slope + self._precision[id(weight)] * weight
            weight.add_(-0.5 * epsilon * metric * drift + (epsilon * metric).sqrt() * kick)


@dataclass(eq=False, repr=False)
class SGLDEnsemble(Parameters):
    """An ensemble of networks along a Langevin chain, with scikit-learn's manners; it approximates the Bayes mixture.

    model: a module from inputs to logits [B, Y], or outputs that `loss` takes; left as it is, the chain starts from its
    weights. loss(outputs, labels): the mean negative log-likelihood, cross-entropy by default. prior, lr, gamma, decay,
    precondition, beta: see SGLD; steps of batches of `batch`, of which the first burn_in are passed over and then every
    `thin`-th is kept; seed: of batches and noise. After fit: members_ (stacked weights by name), losses_ (of the
    minibatch, a step each), n_members_.
    Raises ConfigError for batch normalisation, whose likelihood depends on the batch, and for values out of range.

    >>> data = torch.linspace(-1, 1, 40).unsqueeze(1)
    >>> net = torch.nn.Linear(1, 2)
    >>> ensemble = SGLDEnsemble(net, lr=1e-2, steps=600, burn_in=200, thin=20).fit(data, (data[:, 0] > 0).long())
    >>> ensemble.n_members_, bool(ensemble.predict_proba(data)[-1, 1] > 0.8)
    (20, True)
    """

    model: nn.Module
    prior: GaussianPrior = field(default_factory=GaussianPrior)
    lr: float = 1e-4
    gamma: float = 0.55
    decay: float = 1000.0
    steps: int = 5000
    burn_in: int = 1000
    thin: int = 25
    batch: int = 50
    precondition: bool = False
    beta: float = 1.0
    n_data: int | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    seed: int = 0

    def fit(self, X: Any, y: Any = None) -> Self:
        """Run the chain on inputs [n, ...] with labels [n], or on a loader of (inputs, labels) with n_data given."""
        self._check()
        module = copy.deepcopy(self.model).train()
        batches, count = self._batches(X, y)
        named = list(module.named_parameters())
        source = stream(self.seed, "langevin noise")
        chain = SGLD(
            [weight for _, weight in named],
            n_data=count,
            lr=self.lr,
            std=self.prior.deviations(named),
            gamma=self.gamma,
            decay=self.decay,
            beta=self.beta,
            precondition=self.precondition,
            generator=source,
        )
        kept: list[dict[str, Tensor]] = []
        losses = torch.empty(self.steps)
        for step in range(self.steps):
            inputs, labels = next(batches)
            chain.zero_grad()
            loss = self.loss(module(inputs), labels)
            loss.backward()
            chain.step()
            losses[step] = loss.detach()
            if step >= self.burn_in and (step - self.burn_in) % self.thin == self.thin - 1:
                kept.append({name: weight.detach().clone() for name, weight in named})
        if not bool(torch.isfinite(losses).all()):
            raise DataError(f"the chain diverged: a smaller lr than {self.lr:g} keeps n lr times the curvature below 4")
        self.members_ = {name: torch.stack([one[name] for one in kept]) for name, _ in named}
        self.module_, self.losses_, self.n_members_ = module.eval(), losses, len(kept)
        return self

    def _check(self) -> None:
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.model.modules()):
            raise ConfigError("batch normalisation has no likelihood of single samples: freeze it into a layer first")
        if not (self.steps >= 1 and self.burn_in >= 0 and self.thin >= 1 and self.batch >= 1):
            raise ConfigError("steps, thin and batch are 1 or more and burn_in is not negative: one is not")
        if self.burn_in + self.thin > self.steps:
            raise ConfigError(f"{self.steps} steps keep no member after burn_in={self.burn_in} and thin={self.thin}")

    def _batches(self, X: Any, y: Any) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
        if y is None:
            if self.n_data is None:
                raise ConfigError("a loader does not say how many samples it stands for: give n_data")
            return _endless(X), self.n_data
        inputs, labels = _tensor(X), torch.as_tensor(y)
        if not len(inputs) or len(inputs) != len(labels):
            raise ShapeError(f"{len(inputs)} rows of X and {len(labels)} of y: give as many, and one at least")
        if not bool(torch.isfinite(inputs).all()):
            raise DataError("X has entries that are not finite: drop or impute those rows")
        inputs = inputs.to(next(self.model.parameters()).dtype)
        source = stream(self.seed, "langevin batches")

        def drawn() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                for rows in torch.randperm(len(inputs), generator=source).split(self.batch):
                    yield inputs[rows], labels[rows]

        return drawn(), len(inputs) if self.n_data is None else self.n_data

    def outputs(self, X: Any, *, chunk: int | None = None) -> Tensor:
        """What every member returns for inputs [B, ...]: [M, B, ...], `chunk` members at a time.

        By default 64, and on a CPU one after another from some millions of weights times inputs on.
        """
        check_fitted(self, "members_")
        some = next(iter(self.members_.values()))
        inputs = _tensor(X).to(some.dtype)
        if chunk is None:
            # from there on, one product of matrices after another is quicker than a batch of them
            size = sum(stack[0].numel() for stack in self.members_.values()) * len(inputs)
            chunk = 1 if some.device.type == "cpu" and size > 4_000_000 else 64

        def of(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.module_, weights, (inputs,))  # type: ignore[no-any-return]

        with torch.no_grad():
            if chunk > 1:
                return torch.vmap(of, chunk_size=chunk)(self.members_)
            members = ({name: stack[i] for name, stack in self.members_.items()} for i in range(len(some)))
            return torch.stack([of(weights) for weights in members])

    def predict_log_proba(self, X: Any) -> Tensor:
        """log of the mean probability over members, for a model of logits: [B, ...] to [B, Y]."""
        return self.outputs(X).log_softmax(-1).logsumexp(0) - math.log(self.n_members_)

    def predict_proba(self, X: Any) -> Tensor:
        """The mean probability over members, [B, Y]."""
        return self.predict_log_proba(X).exp()

    def score(self, X: Any, y: Any) -> float:
        """The mean log-probability of labels [B], in nats."""
        labels = torch.as_tensor(y).unsqueeze(1)
        return float(self.predict_log_proba(X).gather(1, labels).mean())


def _tensor(X: Any) -> Tensor:
    return X.detach() if isinstance(X, Tensor) else torch.as_tensor(X)


def _endless(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        empty = True
        for inputs, labels in loader:
            empty = False
            yield inputs, labels
        if empty:
            raise DataError("the loader gave no batch: one that can be gone through again and again is needed")


class Evidence(NamedTuple):
    """F = -log Z in nats, its standard error, and the curve [K, 3]: beta, the mean energy, and its standard error."""

    value: float
    se: float
    curve: Tensor


def beta_grid(count: int = 25, *, power: float = 5.0) -> Tensor:
    """Inverse temperatures (k / (count - 1))^power from 0 to 1, dense where the energy falls fast."""
    if count < 2 or not power > 0.0:
        raise ConfigError(f"count is 2 or more and power positive, got {count} and {power}")
    return torch.linspace(0.0, 1.0, count, dtype=torch.float64) ** power


def log_weight_ti(
    energy: Callable[[Any], Tensor],
    sample_at_beta: Callable[[float], Any],
    betas: Tensor,
    *,
    correct: bool = True,
    batches: int = 20,
) -> Evidence:
    """F = int_0^1 E_beta[n L] d beta, by the trapezoidal rule over betas [K] from 0 to 1.

    sample_at_beta(beta) returns draws from w e^(-beta n L), of which energy gives n L [S]; with n D for n L it is the
    exponential bound L(n). correct: use the slope dE/d beta = -Var as well (the corrected rule, of a higher order).
    Standard errors come from `batches` batch means along the draws, which may depend on each other.
    """
    grid = torch.as_tensor(betas).double()
    rising = grid.ndim == 1 and len(grid) > 1 and bool((grid.diff() > 0.0).all())
    if not rising or float(grid[0]) != 0.0 or float(grid[-1]) != 1.0:
        raise ConfigError("betas rise from 0 to 1, as beta_grid() does")
    rows = []
    for beta in grid.tolist():
        energies = torch.as_tensor(energy(sample_at_beta(beta))).double()
        if energies.ndim != 1 or len(energies) < 2 or not bool(torch.isfinite(energies).all()):
            raise DataError(f"the energies at beta={beta:g} are {tuple(energies.shape)} or not finite: give [S], S > 1")
        means = torch.stack([part.mean() for part in energies.tensor_split(min(batches, len(energies)))])
        rows.append([beta, float(energies.mean()), float(means.std()) / math.sqrt(len(means)), float(energies.var())])
    table = torch.tensor(rows, dtype=torch.float64)
    width = grid.diff()
    total = (0.5 * width * (table[:-1, 1] + table[1:, 1])).sum()
    if correct:
        total = total + (width.square() / 12.0 * (table[1:, 3] - table[:-1, 3])).sum()
    share = 0.5 * (torch.cat([width, width.new_zeros(1)]) + torch.cat([width.new_zeros(1), width]))
    return Evidence(float(total), float((share * table[:, 2]).square().sum().sqrt()), table[:, :3])


def wbic(energies: Tensor) -> float:
    """F from one chain at beta = 1 / log n, whose mean energy n L it is to leading order; energies [S]."""
    values = torch.as_tensor(energies).double()
    if values.ndim != 1 or not len(values):
        raise ShapeError(f"energies have shape [S], one a draw, got {tuple(values.shape)}")
    return float(values.mean())
