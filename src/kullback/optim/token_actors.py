"""Walking tokens over Ray actors, asynchronous and without a process group: the walk of `walk_tokens` on a cluster.

An actor owns some nodes, with their data and their own counts of visits. It holds a token for as long as the walk stays
with its nodes; at every visit it asks the owners of the neighbours for their counts, all at once, and answers others
while it waits. Parameters go from actor to actor through the object store; the caller is told where they went and
nothing else. Numbers are those of `walk_tokens`, so that both visit the same nodes.

Shapes: N nodes, d parameters, M tokens. Source: Hu, Doshi and Eun 2024, arXiv 2401.09665, Algorithm 1.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kullback.core.errors import KullbackError, MissingExtra
from kullback.optim.srrw import SRRW
from kullback.optim.token_walk import (
    TokenResult,
    TokenUpdate,
    UpdateRule,
    check_walk,
    counted,
    log_increments,
    next_node,
    token_uniform,
)

__all__ = ["walk_actors"]

Gradient: TypeAlias = Callable[[Tensor, int], Tensor]
Counts: TypeAlias = dict[int, dict[int, float]]


class _Owner:
    """An actor: its nodes, their counts, and the gradient of their losses."""

    def __init__(
        self, rank: int, rule: SRRW, make_gradient: Callable[[int], Gradient], owners: list[int], update: TokenUpdate,
        log_counts: Counts, increments: list[float], shared: bool, tokens: int, seed: int,
    ) -> None:  # fmt: skip
        self.rank, self.rule, self.owners, self.update = rank, rule, owners, update
        self.gradient = make_gradient(rank)
        self.log_counts, self.increments, self.shared, self.tokens = log_counts, increments, shared, tokens
        self.seed, self.steps = seed, len(increments) // (tokens if shared else 1)
        self.visited: list[tuple[int, int, int]] = []
        self.peers: list[Any] = []

    def meet(self, peers: list[Any]) -> None:
        self.peers = peers

    def counts(self, token: int, nodes: list[int]) -> list[float]:
        history = self.log_counts[0 if self.shared else token]
        return [history[node] for node in nodes]

    def found(self) -> tuple[Counts, list[tuple[int, int, int]]]:
        return self.log_counts, self.visited

    async def hold(self, token: int, visit: int, node: int, rows: Any) -> tuple[tuple[int, int] | None, Any]:
        """Walk on until the token leaves: the visit and the node where it goes, or None at its end; and its rows."""
        payload = torch.from_numpy(rows.copy())
        while self.owners[node] == self.rank:
            if visit:
                self._visit(token, visit, node, payload)
            if visit == self.steps:
                return None, payload.numpy()
            known = await self._near(token, node)
            visit, node = visit + 1, next_node(self.rule, node, known, token_uniform(self.seed, token, visit + 1))
        return (visit, node), payload.numpy()

    def _visit(self, token: int, visit: int, node: int, payload: Tensor) -> None:
        self.visited.append((token, visit, node))
        history = self.log_counts[0 if self.shared else token]
        number = (visit - 1) * self.tokens + token if self.shared else visit - 1
        history[node] = counted(history[node], self.increments[number])
        self.update.apply_(payload, self.gradient, node, visit)

    async def _near(self, token: int, node: int) -> dict[int, float]:
        """The counts of a node's neighbours."""
        near: dict[int, list[int]] = {}
        for other in self.rule.chain.row(node)[0].tolist():
            near.setdefault(self.owners[other], []).append(other)
        own = near.pop(self.rank, [])
        known = dict(zip(own, self.counts(token, own), strict=True))
        answers = await asyncio.gather(*(self.peers[rank].counts.remote(token, nodes) for rank, nodes in near.items()))
        for nodes, values in zip(near.values(), answers, strict=True):
            known.update(zip(nodes, values, strict=True))
        return known


def walk_actors(
    rule: SRRW,
    make_gradient: Callable[[int], Gradient],
    theta: Tensor,
    steps: int,
    *,
    owners: Sequence[int],
    starts: Sequence[int],
    lr: float = 1.0,
    b: float = 0.9,
    base: UpdateRule = "sgd",
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    radius: float | None = None,
    shared: bool = False,
    history: Tensor | None = None,
    seed: int = 0,
    resources: Mapping[str, Any] | None = None,
) -> TokenResult:
    """Walk M tokens for `steps` visits each over as many Ray actors as `owners` names, and wait for their end.

    make_gradient(owner) is called in the owner's actor, where it finds its data, and returns gradient(theta [d], node)
    -> [d] of the losses of its nodes. owners [N]: of each node, 0 to the number of actors less one. resources: options
    of each actor, such as num_cpus and num_gpus. Everything else: as for `walk_tokens`. The cluster of RAY_ADDRESS is
    used, or the one that is connected; without either, one of this machine, for as long as the walk takes.
    Raises MissingExtra without ray; ConfigError, ShapeError and DataError as `walk_tokens` does; KullbackError when an
    actor is gone.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", extra="ray") from error
    update = TokenUpdate(base, lr, b, momentum, betas, radius=radius)
    rows, count, tokens = update.payload(theta), max(owners, default=0) + 1, len(starts)
    logs = check_walk(rule, steps, owners, starts, count, history)
    increments = log_increments(rule, steps * (tokens if shared else 1))
    with _cluster(ray, count):
        kind: Any = ray.remote(_Owner)
        actors: list[Any] = []
        for rank in range(count):
            own = {node: log for node, log in enumerate(logs) if owners[node] == rank}
            counts = {token: dict(own) for token in range(1 if shared else tokens)}
            made = kind.options(**(resources or {})).remote(
                rank, rule, make_gradient, list(owners), update, counts, increments, shared, tokens, seed
            )
            actors.append(made)
        try:
            return _walked(ray, actors, rows, list(owners), starts)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, KullbackError) else error) from None
        except ray.exceptions.RayActorError as error:
            raise KullbackError(f"an actor of the walk is gone: see its own message ({error})") from error
        finally:
            for actor in actors:
                ray.kill(actor)


def _walked(ray: Any, actors: list[Any], rows: Tensor, owners: list[int], starts: Sequence[int]) -> TokenResult:
    """Tell each token's owner to hold it, and the next owner when it has left."""
    ray.get([actor.meet.remote(actors) for actor in actors])

    def held(token: int, visit: int, node: int, payload: Any) -> tuple[Any, Any]:
        # what it returns second stays in the store: the next owner fetches it from there
        where, left = actors[owners[node]].hold.options(num_returns=2).remote(token, visit, node, payload)
        return where, left

    first = ray.put(rows.numpy())
    away: dict[Any, tuple[int, Any]] = {}
    for token, node in enumerate(starts):
        where, left = held(token, 0, node, first)
        away[where] = (token, left)
    ends: dict[int, Any] = {}
    while away:
        (where,), _ = ray.wait(list(away), num_returns=1)
        token, left = away.pop(where)
        gone = ray.get(where)
        if gone is None:
            ends[token] = left
            continue
        visit, node = gone
        where, left = held(token, visit, node, left)
        away[where] = (token, left)
    theta = torch.stack([torch.from_numpy(ray.get(ends[token])[0].copy()) for token in range(len(starts))])
    log_counts: Counts = {}
    visited: list[tuple[int, int, int]] = []
    for counts, visits in ray.get([actor.found.remote() for actor in actors]):
        visited += visits
        for token, own in counts.items():
            log_counts.setdefault(token, {}).update(own)
    return TokenResult(theta, log_counts, sorted(visited))


@contextmanager
def _cluster(ray: Any, actors: int) -> Iterator[None]:
    """The cluster that is connected, that of RAY_ADDRESS, or a new one of this machine."""
    if ray.is_initialized():
        yield
        return
    here: dict[str, Any] = {"address": "local", "num_cpus": actors, "include_dashboard": False}
    ray.init(log_to_driver=False, **({} if os.environ.get("RAY_ADDRESS") else here))
    try:
        yield
    finally:
        ray.shutdown()
