"""One process of a walk over processes: rank, number of processes, a folder and the walk's options as JSON."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kullback.core.errors import KullbackError
from kullback.optim.chains import base_chain
from kullback.optim.srrw import SRRW
from kullback.optim.token_processes import walk_tokens

NODES, DIMENSION = 8, 3


def ring_with_chord():
    adjacency = torch.zeros(NODES, NODES)
    for node in range(NODES):
        adjacency[node, (node + 1) % NODES] = 1.0
    adjacency[0, 4] = 1.0
    return base_chain(adjacency + adjacency.T)


def values():
    """f of the mean that is sought, [NODES, DIMENSION]."""
    return torch.sin(torch.arange(NODES * DIMENSION, dtype=torch.float64)).reshape(NODES, DIMENSION)


def main(rank, world, folder, options):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    owners = [node % world for node in range(NODES)]
    broken, killed = options.pop("broken", None), options.pop("killed", None)
    visits = 0

    def gradient(theta, node):
        nonlocal visits
        visits += 1
        if owners[node] != rank:
            raise SystemExit(f"process {rank} was asked for node {node}")
        if killed == node and visits > 3:
            os._exit(9)
        force = theta - values()[node]
        return force / 0.0 if node == broken and visits > 3 else force

    rule = SRRW(ring_with_chord(), options.pop("alpha"), options.pop("a"))
    try:
        result = walk_tokens(rule, gradient, torch.ones(DIMENSION, dtype=torch.float64), owners=owners, **options)
    except KullbackError as error:
        (Path(folder) / f"failed-{rank}").write_text(str(error))
        return
    found = {"theta": result.theta.tolist(), "visited": result.visited, "log_counts": result.log_counts}
    (Path(folder) / f"result-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
