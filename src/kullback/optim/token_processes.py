"""A walking token over real processes, by torch.distributed: who holds the token computes, all others answer.

Each process owns some nodes, with their data and their own counts of visits; no process knows the counts of others'
nodes. The holder of the token at node i asks the owners of i's neighbours for their counts, draws the next node by the
self-repellent rule, and sends the token there: the parameters, the optimizer's state and the number of its visit. The
owner counts the visit, computes its gradient, moves the parameters, and goes on. Several tokens walk at once, each at
its own pace, with counts of their own or with those of all of them together.

Shapes: N nodes, d parameters, M tokens. Source: Hu, Doshi and Eun 2024, arXiv 2401.09665, Algorithm 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kullback.core.errors import ConfigError, KullbackError
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

__all__ = ["walk_tokens"]

_ASK, _ANSWER, _TOKEN, _FINISHED, _GOODBYE, _FAILED = range(6)
_HEAD = 4  # kind, token, visit, node
_PATIENCE = 60.0  # seconds for the last words of the others


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
    update: TokenUpdate
    shared: bool
    seed: int
    group: Any
    log_counts: dict[int, dict[int, float]]
    log_increments: list[float]
    frame: int
    payload: Tensor  # what a token carries where it starts: [k, d]
    tokens: int
    held: dict[int, _Held] = field(default_factory=dict)
    ready: deque[tuple[int, int, int, Tensor]] = field(default_factory=deque)
    finished: dict[int, Tensor] = field(default_factory=dict)
    visited: list[tuple[int, int, int]] = field(default_factory=list)
    inbox: SimpleQueue[tuple[int, Any, Tensor | None]] = field(default_factory=SimpleQueue)


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
    base: UpdateRule = "sgd",
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    radius: float | None = None,
    shared: bool = False,
    history: Tensor | None = None,
    seed: int = 0,
    group: Any = None,
) -> TokenResult:
    """Walk M tokens for `steps` visits each; call it in every process of an initialised process group, with the same
    arguments but for `gradient`.

    gradient(theta [d], node) -> [d]: of the loss of a node that this process owns. theta [d]: float64 or float32.
    owners [N]: the rank of each node; starts [M]: where the tokens begin. base, momentum, betas: what is done with a
    gradient, see `TokenUpdate`; what it keeps goes along with the token. radius: of the ball that holds theta. shared:
    all tokens count on one history, and the n-th visit of a token is then the n M-th of all. Give the process group a
    timeout longer than the walk: two processes may have nothing to say to each other until its end. Raises ConfigError
    and ShapeError for arguments that do not fit, DataError for a gradient that is not finite, KullbackError when
    another process fails or is gone.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("there is no process group: call torch.distributed.init_process_group('gloo') before")
    update = TokenUpdate(base, lr, b, momentum, betas, radius=radius)
    place = _place(rule, gradient, theta, steps, owners, starts, update, shared, history, seed, group)
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


def _place(rule, gradient, theta, steps, owners, starts, update, shared, history, seed, group) -> _Place:
    rank, tokens = dist.get_rank(group), len(starts)
    logs = check_walk(rule, steps, owners, starts, dist.get_world_size(group), history)
    own = {node: log for node, log in enumerate(logs) if owners[node] == rank}
    return _Place(
        rule, gradient, list(owners), rank, steps, update, shared, seed, group,
        {token: dict(own) for token in range(1 if shared else tokens)},
        log_increments(rule, steps * (tokens if shared else 1)),
        _HEAD + rule.chain.width, update.payload(theta), tokens,
    )  # fmt: skip


def _arrive(place: _Place, token: int, visit: int, node: int, payload: Tensor) -> None:
    """A token comes to a node of this process, its visit number `visit`; 0 is where it starts."""
    history = place.log_counts[0 if place.shared else token]
    if visit:
        place.visited.append((token, visit, node))
        number = (visit - 1) * place.tokens + token if place.shared else visit - 1
        history[node] = counted(history[node], place.log_increments[number])
        place.update.apply_(payload, place.gradient, node, visit)
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


def _leave(place: _Place, token: int) -> None:
    """All counts are here: the next node is drawn, and the token goes there."""
    held = place.held.pop(token)
    node = next_node(place.rule, held.node, held.counts, token_uniform(place.seed, token, held.visit + 1))
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
