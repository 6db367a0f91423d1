"""A walking token over real processes, by torch.distributed: who holds the token computes, all others answer.

Each process owns some nodes, with their data and their own counts of visits; no process knows the counts of others'
nodes. The holder of the token at node i asks the owners of i's neighbours for their counts, draws the next node by the
self-repellent rule, and sends the token there: the parameters, the optimizer's state and the number of its visit. The
owner counts the visit, computes its gradient, moves the parameters, and goes on. Several tokens walk at once, each at
its own pace, with counts of their own or with those of all of them together.

Since the scale of a history does not matter to the rule, a node counts visits as y_j += gamma_n / s_n with
s_n = (1 - gamma_1) ... (1 - gamma_n), which a visit's number alone gives; counts are kept in logarithms.

Shapes: N nodes, d parameters, M tokens. Source: Hu, Doshi and Eun 2024, arXiv 2401.09665, Algorithm 1.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kullback.core.errors import ConfigError, DataError, KullbackError, ShapeError
from kullback.core.rng import generator as stream
from kullback.optim.srrw import SRRW
from kullback.optim.srrw_simulation import step_sizes

__all__ = ["TokenResult", "token_uniform", "walk_tokens"]

_ASK, _ANSWER, _TOKEN, _FINISHED, _GOODBYE, _FAILED = range(6)
_HEAD = 4  # kind, token, visit, node
_PATIENCE = 60.0  # seconds for the last words of the others


class TokenResult(NamedTuple):
    """What a process knows at the end.

    theta [M, d], parameters of each token; their mean is what the method returns. log_counts: token -> node -> log y of
    the nodes owned here, under token 0 where the history is shared. visited: (token, visit, node) of visits made here.
    """

    theta: Tensor
    log_counts: Mapping[int, Mapping[int, float]]
    visited: Sequence[tuple[int, int, int]]


@dataclass
class _Held:
    """A token that is here and waits for the counts of its neighbours."""

    payload: Tensor
    visit: int
    node: int
    counts: dict[int, float]
    missing: int


@dataclass
class _Place:
    """One process: its nodes, the tokens it holds, and what has come in."""

    rule: SRRW
    gradient: Callable[[Tensor, int], Tensor]
    owners: list[int]
    rank: int
    steps: int
    sizes: Tensor
    momentum: float
    radius: float | None
    shared: bool
    seed: int
    group: Any
    log_counts: dict[int, dict[int, float]]
    log_increments: list[float]
    frame: int
    payload: Tensor  # what a token carries where it starts: [1 or 2, d]
    tokens: int
    held: dict[int, _Held] = field(default_factory=dict)
    ready: deque[tuple[int, int, int, Tensor]] = field(default_factory=deque)
    finished: dict[int, Tensor] = field(default_factory=dict)
    visited: list[tuple[int, int, int]] = field(default_factory=list)
    inbox: SimpleQueue[tuple[int, Any, Tensor | None]] = field(default_factory=SimpleQueue)


def token_uniform(seed: int, token: int, visit: int) -> float:
    """The uniform number in [0, 1) that chooses a token's node at a visit, the first of which is 1.

    >>> token_uniform(0, 0, 1) == token_uniform(0, 0, 1) != token_uniform(0, 1, 1)
    True
    """
    return torch.rand((), generator=stream(seed, "token", token, visit), dtype=torch.float64).item()


def walk_tokens(
    rule: SRRW,
    gradient: Callable[[Tensor, int], Tensor],
    theta: Tensor,
    steps: int,
    *,
    owners: Sequence[int],
    starts: Sequence[int],
    lr: float = 1.0,
    b: float = 0.9,
    momentum: float = 0.0,
    radius: float | None = None,
    shared: bool = False,
    history: Tensor | None = None,
    seed: int = 0,
    group: Any = None,
) -> TokenResult:
    """Walk M tokens for `steps` visits each; call it in every process of an initialised process group, with the same
    arguments but for `gradient`.

    gradient(theta [d], node) -> [d]: of the loss of a node that this process owns. theta [d]: float64 or float32.
    owners [N]: the rank of each node; starts [M]: where the tokens begin. momentum: share of the former direction that
    the token carries along. radius: of the ball that holds theta. shared: all tokens count on one history, and the n-th
    visit of a token is then the n M-th of all. Give the process group a timeout longer than the walk: two processes may
    have nothing to say to each other until its end. Raises ConfigError and ShapeError for arguments that do not fit,
    DataError for a gradient that is not finite, KullbackError when another process fails or is gone.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("there is no process group: call torch.distributed.init_process_group('gloo') before")
    place = _place(
        rule, gradient, theta, steps, owners, starts, step_sizes(0, steps, b, lr), momentum, radius, shared,
        history, seed, group,
    )  # fmt: skip
    for token, node in enumerate(starts):
        if place.owners[node] == place.rank:
            place.ready.append((token, 0, node, place.payload.clone()))
    listeners = _listen(place)
    try:
        _walk(place)
    except Exception:
        for rank in range(dist.get_world_size(group)):
            with suppress(KullbackError):  # some may be gone as well
                if rank != place.rank:
                    _send(place, rank, _FAILED)
        raise
    finally:
        # each of the others says goodbye, that it fails too, or is gone
        for thread in listeners:
            thread.join(_PATIENCE)
    ends = torch.stack([place.finished[token] for token in range(place.tokens)])
    return TokenResult(ends, place.log_counts, place.visited)


def _walk(place: _Place) -> None:
    """Serve and walk until all tokens have ended, and tell the others so."""
    while True:
        while place.ready:
            _arrive(place, *place.ready.popleft())
        if len(place.finished) == place.tokens:
            break
        _serve(place, *place.inbox.get())
    _send_all(place, _GOODBYE)


def _listen(place: _Place) -> list[Thread]:
    """A thread for each other process, which puts what comes into the inbox until that process says goodbye.

    Since someone always listens, a send never waits for long, and no two processes can wait for each other.
    """
    others = [rank for rank in range(dist.get_world_size(place.group)) if rank != place.rank]
    threads = [Thread(target=_hear, args=(place, rank), daemon=True) for rank in others]
    for thread in threads:
        thread.start()
    return threads


def _hear(place: _Place, sender: int) -> None:
    kind = _ASK
    try:
        while kind not in (_GOODBYE, _FAILED):
            frame, payload = torch.empty(place.frame, dtype=torch.float64), None
            dist.recv(frame, group=place.group, group_src=sender)
            kind = int(frame[0])
            if kind in (_TOKEN, _FINISHED):
                payload = torch.empty_like(place.payload)
                dist.recv(payload, group=place.group, group_src=sender)
            place.inbox.put((sender, frame, payload))
    except RuntimeError as error:
        place.inbox.put((sender, error, None))


def _place(
    rule, gradient, theta, steps, owners, starts, sizes, momentum, radius, shared, history, seed, group
) -> _Place:
    nodes, world, rank = rule.chain.nodes, dist.get_world_size(group), dist.get_rank(group)
    if len(owners) != nodes or not all(0 <= owner < world for owner in owners):
        raise ConfigError(f"owners names a process from 0 to {world - 1} for each of {nodes} nodes")
    if not starts or not all(0 <= node < nodes for node in starts):
        raise ConfigError(f"starts names a node from 0 to {nodes - 1} for every token, and got {list(starts)}")
    if rule.cap is not None or rule.warm_up:
        raise ConfigError("a cap or a warm-up needs the scale of the history, which no process knows: leave them out")
    if rule.tokens != 1:
        raise ConfigError("here the number of tokens is that of their starts: leave the rule's tokens at 1")
    if theta.ndim != 1 or steps < 1 or not 0.0 <= momentum < 1.0:
        raise ShapeError(
            f"theta is [d], steps positive and momentum in [0, 1), not {tuple(theta.shape)}, {steps} and {momentum}"
        )
    x = rule.chain.target if history is None else history
    if x.shape != (nodes,) or not bool((x.isfinite() & (x > 0)).all()):
        raise DataError(f"history is positive at each of {nodes} nodes")
    tokens, payload = len(starts), torch.stack([theta.detach(), torch.zeros_like(theta)][: 2 if momentum else 1])
    gammas = rule.steps(0, steps * (tokens if shared else 1))
    increments = gammas.log() - torch.log1p(-gammas).cumsum(0)
    logs = (x / x.sum()).to(torch.float64).log().tolist()
    own = {node: logs[node] for node in range(nodes) if owners[node] == rank}
    return _Place(
        rule, gradient, list(owners), rank, steps, sizes, momentum, radius, shared, seed, group,
        {token: dict(own) for token in range(1 if shared else tokens)}, increments.tolist(),
        _HEAD + rule.chain.width, payload, tokens,
    )  # fmt: skip


def _arrive(place: _Place, token: int, visit: int, node: int, payload: Tensor) -> None:
    """A token comes to a node of this process, its visit number `visit`; 0 is where it starts."""
    history = place.log_counts[0 if place.shared else token]
    if visit:
        place.visited.append((token, visit, node))
        number = (visit - 1) * place.tokens + token if place.shared else visit - 1
        high, low = sorted((history[node], place.log_increments[number]), reverse=True)
        history[node] = high + math.log1p(math.exp(low - high))
        _descend(place, payload, node, visit)
    if visit == place.steps:
        _send_all(place, _FINISHED, token, visit, node, payload=payload)
        place.finished[token] = payload[0]
        return
    near = place.rule.chain.row(node)[0].tolist()
    known = {other: history[other] for other in near if place.owners[other] == place.rank}
    ranks = {place.owners[other] for other in near} - {place.rank}
    place.held[token] = _Held(payload, visit, node, known, len(ranks))
    for rank in sorted(ranks):
        _send(place, rank, _ASK, token, visit, node)
    if not ranks:
        _leave(place, token)


def _descend(place: _Place, payload: Tensor, node: int, visit: int) -> None:
    direction = place.gradient(payload[0], node).detach()
    if direction.shape != payload[0].shape or not bool(direction.isfinite().all()):
        raise DataError(
            f"the gradient at node {node}, visit {visit}, is {tuple(direction.shape)} or not finite; expected "
            f"{tuple(payload[0].shape)}: lower lr, or give a radius"
        )
    if len(payload) > 1:
        payload[1].mul_(place.momentum).add_(direction)
        direction = payload[1]
    payload[0].sub_(place.sizes[visit - 1].item() * direction)
    if place.radius is not None:
        payload[0].mul_((place.radius / payload[0].norm()).clamp(max=1.0))


def _leave(place: _Place, token: int) -> None:
    """All counts are here: the next node is drawn, and the token goes there."""
    held = place.held.pop(token)
    near, probabilities = place.rule.chain.row(held.node)
    counts = torch.tensor([held.counts[other] for other in near.tolist()], dtype=torch.float64)
    logits = probabilities.log() - place.rule.alpha * (counts - place.rule.chain.target[near].log())
    cumulative = (logits - logits.max()).exp().cumsum(0)
    number = token_uniform(place.seed, token, held.visit + 1)
    chosen = int((cumulative <= number * cumulative[-1]).sum().clamp(max=len(near) - 1))
    node = int(near[chosen])
    if place.owners[node] == place.rank:
        place.ready.append((token, held.visit + 1, node, held.payload))
    else:
        _send(place, place.owners[node], _TOKEN, token, held.visit + 1, node, payload=held.payload)


def _send(
    place: _Place, rank: int, kind: int, token: int = 0, visit: int = 0, node: int = 0,
    *, values: Sequence[float] = (), payload: Tensor | None = None,
) -> None:  # fmt: skip
    """A frame to another process, and the parameters behind it."""
    frame = torch.zeros(place.frame, dtype=torch.float64)
    frame[:_HEAD] = torch.tensor([kind, token, visit, node], dtype=torch.float64)
    frame[_HEAD : _HEAD + len(values)] = torch.tensor(values, dtype=torch.float64)
    try:
        dist.send(frame, group=place.group, group_dst=rank)
        if payload is not None:
            dist.send(payload, group=place.group, group_dst=rank)
    except RuntimeError as error:
        raise KullbackError(f"process {rank} of the walk is gone: see its own message ({error})") from error


def _send_all(place: _Place, kind: int, *where: int, payload: Tensor | None = None) -> None:
    for rank in range(dist.get_world_size(place.group)):
        if rank != place.rank:
            _send(place, rank, kind, *where, payload=payload)


def _serve(place: _Place, sender: int, frame: Tensor | RuntimeError, payload: Tensor | None) -> None:
    """Do what a frame asks for."""
    if isinstance(frame, RuntimeError):
        raise KullbackError(f"process {sender} of the walk is gone: see its own message ({frame})") from frame
    kind, token, visit, node = (int(value) for value in frame[:_HEAD].tolist())
    if kind == _FAILED:
        raise KullbackError(f"process {sender} of the walk failed: see its own message")
    asked = place.rule.chain.row(node)[0].tolist()
    if kind == _ASK:
        history = place.log_counts[0 if place.shared else token]
        values = [history[other] for other in asked if place.owners[other] == place.rank]
        _send(place, sender, _ANSWER, token, visit, node, values=values)
    elif kind == _ANSWER:
        held = place.held[token]
        theirs = [other for other in asked if place.owners[other] == sender]
        held.counts.update(zip(theirs, frame[_HEAD : _HEAD + len(theirs)].tolist(), strict=True))
        held.missing -= 1
        if held.missing == 0:
            _leave(place, token)
    elif kind == _TOKEN and payload is not None:
        place.ready.append((token, visit, node, payload))
    elif kind == _FINISHED and payload is not None:
        place.finished[token] = payload[0]
