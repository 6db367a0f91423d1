"""A walk over Ray actors in a process of its own: a folder and the walk's options as JSON."""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _token_process import DIMENSION, NODES, ring_with_chord, values

from kullback.core.errors import KullbackError
from kullback.optim.srrw import SRRW
from kullback.optim.token_actors import walk_actors


def main(folder, actors, options):
    broken, killed = options.pop("broken", None), options.pop("killed", None)
    data = values()  # the actors get it with the function below

    def make_gradient(owner):
        visits = 0

        def gradient(theta, node):
            nonlocal visits
            visits += 1
            if node % actors != owner:
                raise RuntimeError(f"actor {owner} was asked for node {node}")
            if killed == node and visits > 3:
                os._exit(9)
            force = theta - data[node]
            return force / 0.0 if node == broken and visits > 3 else force

        return gradient

    rule = SRRW(ring_with_chord(), options.pop("alpha"), options.pop("a"))
    owners, theta = [node % actors for node in range(NODES)], torch.ones(DIMENSION, dtype=torch.float64)
    try:
        result = walk_actors(rule, make_gradient, theta, owners=owners, **options)
    except KullbackError as error:
        (folder / "failed").write_text(f"{type(error).__name__}: {error}")
        return
    found = {"theta": result.theta.tolist(), "visited": result.visited, "log_counts": result.log_counts}
    (folder / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
