"""KLoM, ensembles and datamodels beside plain loops. Writes dmm.json.

One thread, medians of calls in turn, time of ours over the other's as "ratio". "klom": 100 against 100 models on 200,
1000 and 5000 points, over numpy.histogram in a loop. "ensemble": 100 networks 64-32-10 on 300 points, 40 steps, over
one nn.Sequential after the other. "trak": features of 300 points projected on 512 dimensions, over a loop of backward
passes, and over the authors' package, where half its time is aimed at: with a dense projection both wait for the same
product and are even, a sparse one ("sparse over package") does without and is 1.7 to 1.8 times as fast, the rest being
the gradients of either. KLoM aims at a twentieth, which compiled loops reach and tensor operations ("klom without
numba") do not, with more passes over memory; ensembles aim at a tenth and take that, within the noise of a shared
machine: half of what is left are matrix products. "datamodels": ridge for 300 points and 10 classes from 400 models,
over scikit-learn's.
"""

import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge
from trak import TRAKer
from trak.projectors import BasicSingleBlockProjector, ProjectionType

import _measure
from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.diagnose.attribution import TRAKFeatures, fit_datamodels
from kullback.diagnose.unlearning import klom
from kullback.models.ensemble import EnsembleMLP, train_ensemble

SIZES = (64, 32, 10)


def raced(calls, rounds=5):
    times, _ = _measure.race(calls, rounds=rounds, clock=time.process_time)
    return {"seconds": _measure.medians(times), "ratio": _measure.ratio(times, *calls)}


def looped(a, b, bins=20):
    found = []
    for x, y in zip(a.T, b.T):
        edges = np.linspace(min(x.min(), y.min()), max(x.max(), y.max()), bins + 1)
        p, q = (np.histogram(z, edges)[0] / len(z) for z in (x, y))
        q = np.where(q > 0, q, 1e-5)
        found.append(sum(i * math.log(i / j) for i, j in zip(p, q) if i > 0))
    return found


def kloms(points, compiled=None):
    a, b = (torch.randn(100, points, generator=generator(0, name), dtype=torch.float64) for name in "ab")
    ours, theirs = (lambda: klom(a, b, compiled=compiled)), (lambda: looped(a.numpy(), b.numpy()))
    return {"points": points, **raced({"kullback": ours, "numpy": theirs})}


def points():
    draw = generator(0, "points")
    return torch.rand(300, 64, generator=draw), torch.randint(10, (300,), generator=draw)


def one_by_one(inputs, labels, count, steps):
    for _ in range(count):
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()


def ensembles():
    inputs, labels = points()

    def together():
        train_ensemble(EnsembleMLP(100, SIZES, generator=generator(1)), inputs, labels, steps=40)

    return raced({"kullback": together, "loop": lambda: one_by_one(inputs, labels, 100, 40)}, rounds=3)


def traks():
    inputs, labels = points()
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    trak = TRAKFeatures(model, dimensions=512, generator=generator(2), chunk=300)

    def loop():
        rows = []
        for x, y in zip(inputs, labels):
            logits = model(x)
            others = torch.cat([logits[:y], logits[y + 1 :]])
            gradients = torch.autograd.grad(logits[y] - others.logsumexp(0), list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in gradients]) @ trak.projection)
        return torch.stack(rows)

    ours = {"kullback": lambda: trak.features(inputs, labels)}
    with tempfile.TemporaryDirectory() as folder:
        peer = package(model, folder)

        def theirs():
            gradients = peer.gradient_computer.compute_per_sample_grad(batch=(inputs, labels))
            return peer.projector.project(gradients, model_id=0)

        beside = raced({**ours, "package": theirs}, rounds=5)
        thin = TRAKFeatures(model, dimensions=512, generator=generator(2), projection="sparse", chunk=300)
        sparse = raced({"kullback, sparse": lambda: thin.features(inputs, labels), "package": theirs}, rounds=5)
    return {"sparse over package": sparse, "loop": raced({**ours, "loop": loop}, rounds=3), "package": beside}


def package(model, folder):
    """The authors' package with as many dimensions, its projection kept in memory as ours is."""
    size = sum(p.numel() for p in model.parameters())
    projector = BasicSingleBlockProjector(
        grad_dim=size, proj_dim=512, seed=0, proj_type=ProjectionType.rademacher, device="cpu", model_id=0
    )
    peer = TRAKer(
        model=model, task="image_classification", train_set_size=300, device="cpu", save_dir=folder, proj_dim=512,
        projector=projector, use_half_precision=False, logging_level=40,
    )  # fmt: skip
    peer.load_checkpoint(model.state_dict(), model_id=0)
    return peer


def datamodels():
    masks = (torch.rand(400, 300, generator=generator(3)) < 0.5).double()
    outputs = torch.randn(400, 300, 10, generator=generator(4), dtype=torch.float64)
    x, y = masks.numpy(), outputs.flatten(1).numpy()
    ours, theirs = (lambda: fit_datamodels(masks, outputs, penalty=50.0)), (lambda: Ridge(alpha=50.0).fit(x, y))
    return raced({"kullback": ours, "sklearn": theirs}, rounds=3)


def main():
    torch.set_num_threads(1)
    found = {
        "environment": environment(), "klom": [kloms(count) for count in (200, 1000, 5000)],
        "klom without numba": kloms(1000, False), "ensemble": ensembles(), "trak": traks(), "datamodels": datamodels(),
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
