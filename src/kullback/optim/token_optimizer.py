"""Training by a token that walks over the nodes of a graph, and the order of data that such a walk gives.

    node ~ K[x](node, .),    x <- x + gamma (delta_node - x),    theta <- theta - lr (n + 1)^-b direction(grad f_node)

The direction is the gradient, its running mean ("momentum") or that of Adam; several tokens average their gradients.
Keep b above the history's a: the noise then falls with the square of alpha.
Source: Hu, Doshi and Eun 2024, arXiv 2401.09665, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler

from kullback.core.errors import CheckpointError, ConfigError, DataError
from kullback.optim.srrw import SRRW, WalkState, check_exponent, start_walk, walk
from kullback.optim.token_walk import UpdateRule

__all__ = ["SASRRW", "TokenSampler"]


class SASRRW(torch.optim.Optimizer):
    """Stochastic approximation driven by self-repellent tokens.

    params: as for any optimizer; each group's lr is that of step 0, and step n takes lr (n + 1)^-b. rule: the walk,
    with a token or more. base: what is done with a gradient. radius: all parameters together are brought back to the
    ball of that radius after each step. start: the tokens' first nodes; history [N]: counts of visits to begin with.
    Raises ConfigError for options out of range.

    >>> from kullback.optim import base_chain
    >>> chain, weight = base_chain(torch.ones(3, 3)), torch.zeros(1, requires_grad=True)
    >>> optimizer = SASRRW([weight], SRRW(chain, alpha=5.0), generator=torch.Generator().manual_seed(0))
    >>> loss = optimizer.step(lambda node: (weight - node).square().sum())
    """

    def __init__(
        self,
        params: Any,
        rule: SRRW,
        lr: float = 1.0,
        b: float = 0.9,
        *,
        base: UpdateRule = "sgd",
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        radius: float | None = None,
        start: int | Tensor | None = None,
        history: Tensor | None = None,
        generator: torch.Generator,
    ) -> None:
        check_exponent("b", b)
        if base not in get_args(UpdateRule):
            raise ConfigError(f"base is one of {', '.join(get_args(UpdateRule))}, not {base!r}")
        if not lr > 0.0 or (radius is not None and not radius > 0.0):
            raise ConfigError(f"lr and radius are positive (no radius: None), not {lr} and {radius}")
        super().__init__(params, {"lr": lr})
        self._walker, self._b, self._radius, self._generator = rule, b, radius, generator
        self._walk = start_walk(rule, start=start, history=history, generator=generator)
        inner: torch.optim.Optimizer
        if base == "adam":
            inner = torch.optim.Adam(self.param_groups, betas=betas)
        else:
            inner = torch.optim.SGD(self.param_groups, momentum=momentum if base == "momentum" else 0.0)
        self._inner = inner

    def current_node(self) -> int | list[int]:
        """Where the token is, or each of the tokens."""
        nodes = self._walk.node[0].tolist()
        return nodes[0] if len(nodes) == 1 else nodes

    @property
    def history(self) -> Tensor:
        """The history x [N], which sums to 1."""
        return self._walk.history[0]

    def step(self, closure: Callable[[int], Tensor]) -> Tensor:  # type: ignore[override]
        """Every token moves once, closure(node) gives the loss there, and the parameters follow the mean gradient.

        The gradients are cleared and computed here: the closure returns a loss and does not call backward. Returns the
        mean loss, detached.
        """
        tokens, number = self._walker.tokens, self._walk.visits // self._walker.tokens + 1
        self._walk, nodes = walk(self._walker, self._walk, tokens, generator=self._generator)
        self.zero_grad()
        total: Tensor | float = 0.0
        with torch.enable_grad():
            for node in nodes[0].tolist():
                loss = closure(node) / tokens
                loss.backward()
                total = total + loss.detach()
        self._inner.param_groups, self._inner.state = self.param_groups, self.state
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, rates):
                group["lr"] = rate * (number + 1) ** -self._b
            self._inner.step()
        finally:
            for group, rate in zip(self.param_groups, rates):
                group["lr"] = rate
        self._project()
        return torch.as_tensor(total)

    @torch.no_grad()
    def _project(self) -> None:
        if self._radius is None:
            return
        params = [param for group in self.param_groups for param in group["params"]]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(param) for param in params]))
        if norm > self._radius:
            for param in params:
                param.mul_(self._radius / norm)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the walk with its generator: all of them tensors and numbers."""
        return {**super().state_dict(), "walk": _saved(self._walk), "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Raises CheckpointError where the state is that of another graph or number of tokens."""
        self._walk = _restored(self._walker, state_dict["walk"])
        self._generator.set_state(state_dict["generator"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})


def _saved(state: WalkState) -> dict[str, Any]:
    return {"node": state.node.clone(), "history": state.history.clone(), "visits": state.visits}


def _restored(rule: SRRW, saved: Mapping[str, Any]) -> WalkState:
    node, history = saved["node"], saved["history"]
    if node.shape != (1, rule.tokens) or history.shape != (1, rule.chain.nodes):
        raise CheckpointError(
            f"the saved walk has {node.shape[-1]} tokens on {history.shape[-1]} nodes, and this one {rule.tokens} on "
            f"{rule.chain.nodes}: resume with the graph and the tokens of the saved run"
        )
    return WalkState(node.clone(), history.clone(), int(saved["visits"]))


class TokenSampler(Sampler[int]):
    """The order of data that a self-repellent walk gives; a `torch.utils.data.Sampler` with `length` entries an epoch.

    Without shards it yields nodes. With shards, a list of sample indices for each node, a visit yields the next
    `per_visit` samples of that node, its list begun again at its end. The walk goes on from epoch to epoch; state_dict
    in the middle of one goes on there. On a complete graph this lies between random order (alpha = 0) and cyclic order.
    Raises ConfigError for options out of range, DataError for a shard without samples.
    """

    def __init__(
        self,
        rule: SRRW,
        length: int,
        *,
        shards: Sequence[Sequence[int]] | None = None,
        per_visit: int = 1,
        start: int | Tensor | None = None,
        history: Tensor | None = None,
        block: int = 1024,
        generator: torch.Generator,
    ) -> None:
        if length < 1 or per_visit < 1 or block < 1:
            raise ConfigError(f"length, per_visit and block are positive, not {length}, {per_visit} and {block}")
        if shards is None and per_visit > 1:
            raise ConfigError(f"per_visit is {per_visit} and would do nothing without shards: give them, or leave it 1")
        if shards is not None and len(shards) != rule.chain.nodes:
            raise ConfigError(f"{rule.chain.nodes} nodes need a shard each, and got {len(shards)}")
        for node, shard in enumerate(shards or ()):
            if isinstance(shard, Sized) and not len(shard):
                raise DataError(f"shard {node} has no samples: leave its node out of the graph")
        self._rule, self._length, self._shards, self._per_visit = rule, length, shards, per_visit
        self._block, self._generator = block, generator
        self._begin = start_walk(rule, start=start, history=history, generator=generator)
        self._before, self._end = generator.get_state(), self._begin
        self._nodes: list[int] = []
        self._used, self._taken, self._left = 0, 0, 0
        self._cursors = [0] * rule.chain.nodes

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        """The rest of the epoch that was begun, or the next epoch."""
        while self._left < self._length:
            self._left += 1
            yield self._next()
        self._left = 0

    def _next(self) -> int:
        if self._taken == 0:
            if self._used == len(self._nodes):
                self._advance()
            self._used += 1
        node = self._nodes[self._used - 1]
        if self._shards is None:
            return node
        self._taken = (self._taken + 1) % self._per_visit
        shard, cursor = self._shards[node], self._cursors[node]
        self._cursors[node] = (cursor + 1) % len(shard)
        return shard[cursor]

    def _advance(self) -> None:
        self._begin, self._before = self._end, self._generator.get_state()
        self._end, nodes = walk(self._rule, self._begin, self._block, generator=self._generator)
        self._nodes, self._used = nodes[0].tolist(), 0

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands: the walk before the current block, its generator then, and the places within."""
        places = {"used": self._used, "taken": self._taken, "left": self._left, "drawn": len(self._nodes)}
        return {
            "walk": _saved(self._begin), "generator": self._before.clone(), "block": self._block,
            "cursors": torch.tensor(self._cursors), **places,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the state is that of another graph or number of tokens."""
        self._end = _restored(self._rule, state["walk"])
        self._begin, self._block = self._end, int(state["block"])
        self._generator.set_state(state["generator"])
        self._before, self._nodes = self._generator.get_state(), []
        if state["drawn"]:
            self._advance()
        self._used, self._taken, self._left = (int(state[name]) for name in ("used", "taken", "left"))
        self._cursors = state["cursors"].tolist()
