"""Mixtures and Langevin chains beside posteriors, NumPy and plain SGD, in one run. Writes universality_lens.json.

Mixture: samples a second of an exact mixture over K functions of 32 inputs, and its predictions, beside the same sums
in NumPy. Langevin: a step with its gradient, on 64-H-10 networks and batches of 50, beside torch's SGD without noise
and posteriors' SGLD; for a normal law, "error" is that of the variance against the one that steps of this size have.
Ensemble: predictions of 140 members at once, beside a loop over them. Contenders take turns, one thread; times are
medians, "ratio" is the other's over ours, the median over rounds. "mb": peak memory above what the inputs hold,
of the middle size. Two hopes do not come true on one core: a normal number costs some 4 ns a weight where a gradient on
50 rows costs 8, so that a Langevin step takes 1.4 of SGD's and not 1.15, which is for batches of some hundred rows; and
members at once multiply the same matrices as a loop does, so that they gain (2.6 times) on single inputs only.
"""

import copy
import json
import math
import warnings
from importlib.metadata import version
from pathlib import Path

warnings.simplefilter("ignore")  # of tensordict's, on import

import numpy as np  # noqa: E402
import posteriors  # noqa: E402
import scipy.special  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import _measure  # noqa: E402
from kullback.core.environment import environment  # noqa: E402
from kullback.core.rng import generator  # noqa: E402
from kullback.diagnose import SGLD, BayesMixture, SGLDEnsemble  # noqa: E402

torch.set_num_threads(1)
CLASSES, WIDTHS, BATCHES = (4_500, 45_000, 450_000), (64, 256, 1024), (1, 50, 1000)
N_DATA, STEP, MEMBERS = 300, 2e-4, 140


def memory(function, *arguments):
    return _measure.peak_memory(__file__, function, *arguments) / 1e6


def functions(size):
    """A class of K random Boolean functions with labels flipped at 0.1: log_prior [K] and laws [K, 32, 2]."""
    ones = 0.1 + 0.8 * torch.randint(2, (size, 32), generator=generator(0, "functions")).double()
    prior = torch.randn(size, generator=generator(0, "prior"), dtype=torch.float64).log_softmax(0)
    return prior, torch.stack([1 - ones, ones], dim=2).log()


def mixture_calls(size, steps=40):
    prior, laws = functions(size)
    mixture = BayesMixture(prior, laws)
    columns, start = laws.permute(1, 2, 0).contiguous().numpy(), prior.numpy()
    x = torch.randint(32, (steps,), generator=generator(0, "x")).tolist()

    def ours():
        mixture.fit([], [])
        for at in x:
            mixture.update(at, 1)
        return mixture.predict_log_proba(range(32)).numpy()

    def theirs():
        weights = start.copy()
        for at in x:
            weights += columns[at, 1]
        return scipy.special.logsumexp(columns + (weights - scipy.special.logsumexp(weights)), axis=2)

    def update():
        for at in x:
            mixture.update(at, 1)

    weights = start.copy()

    def add():
        nonlocal weights
        for at in x:
            weights += columns[at, 1]

    def predict():
        return mixture.predict_log_proba(range(32))

    def sums():
        return scipy.special.logsumexp(columns + (weights - scipy.special.logsumexp(weights)), axis=2)

    return ours, theirs, {"update": (update, add, steps), "predict, 32 inputs": (predict, sums, 1)}


def memory_of_mixture(who, size):
    ours, theirs, _ = mixture_calls(size)
    return ours if who == "kullback" else theirs


def mixtures(size):
    ours, theirs, calls = mixture_calls(size)
    error = float(np.abs(ours() - theirs()).max())
    rows = []
    for name, (own, other, count) in calls.items():
        times, _ = _measure.race({"kullback": own, "numpy": other}, clock=_measure.time.process_time)
        middle = _measure.medians(times)
        for who in times:
            mb = memory("memory_of_mixture", who, size) if size == CLASSES[1] else None
            row = {"case": f"mixture, {size} functions, {name}", "who": who, "us": 1e6 * middle[who] / count}
            row |= {"per_s": count / middle[who], "ratio": _measure.ratio(times, who, "kullback")}
            rows.append(row | {"error": error if who == "numpy" else 0.0, "mb": mb})
    return rows


def network(width):
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    source = generator(0, "network", width)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=source) / math.sqrt(weight.shape[-1]))
    inputs = torch.rand(50, 64, generator=source)
    return model, inputs, torch.randint(10, (50,), generator=source)


def by_optimizer(width, make):
    model, inputs, labels = network(width)
    optimizer = make(model.parameters())

    def step():
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    return step


def by_posteriors(width):
    model, inputs, labels = network(width)

    def log_posterior(weights, batch):
        outputs = torch.func.functional_call(model, weights, (batch[0],))
        likely = -N_DATA * nn.functional.cross_entropy(outputs, batch[1])
        return likely - 0.5 * sum(weight.square().sum() for weight in weights.values()), outputs

    transform = posteriors.sgmcmc.sgld.build(log_posterior, lr=STEP / 2)
    held = [transform.init({name: weight.detach().clone() for name, weight in model.named_parameters()})]

    def step():
        for _ in range(20):
            held[0], _ = transform.update(held[0], (inputs, labels), inplace=False)

    return step


def langevin_calls(width):
    chain = lambda weights: SGLD(weights, n_data=N_DATA, lr=STEP, generator=generator(0, "noise"))  # noqa: E731
    return {
        "kullback": by_optimizer(width, chain),
        "kullback, pSGLD": by_optimizer(
            width,
            lambda w: SGLD(w, n_data=N_DATA, lr=STEP, precondition=True, generator=generator(0, "noise")),
        ),
        "SGD, no noise": by_optimizer(width, lambda weights: torch.optim.SGD(weights, lr=STEP, weight_decay=1e-3)),
        "posteriors": by_posteriors(width),
    }


def memory_of_step(who, width):
    return langevin_calls(width)[who]


def variance_errors(epsilon=0.5, count=100_000, steps=60):
    """Relative errors of the variance on N(0, 1/3), of many chains at once, against 1 / (3 (1 - 3 epsilon / 4))."""
    state = nn.Parameter(torch.zeros(count, dtype=torch.float64))
    chain = SGLD([state], n_data=1, lr=epsilon, std=1.0, generator=generator(0, "variance"))
    for _ in range(steps):
        state.grad = 2.0 * state.detach()
        chain.step()
    peer = posteriors.sgmcmc.sgld.build(lambda w, _: (-1.5 * w["x"].square().sum(), w["x"]), lr=epsilon / 2)
    held = peer.init({"x": torch.zeros(count, dtype=torch.float64)})
    for _ in range(steps):
        held, _ = peer.update(held, None, inplace=False)
    expected = 1 / (3 * (1 - 3 * epsilon / 4))
    found = {"kullback": state.detach().var(), "posteriors": held.params["x"].var()}
    return {who: abs(float(value) / expected - 1) for who, value in found.items()}


def langevin(width, errors):
    times, _ = _measure.race(langevin_calls(width), rounds=9, clock=_measure.time.process_time)
    middle, rows = _measure.medians(times), []
    for who in times:
        row = {"case": f"Langevin step, width {width}", "who": who, "us": 1e6 * middle[who] / 20}
        row |= {"ratio": _measure.ratio(times, who, "kullback"), "error": errors.get(who)}
        rows.append(row | {"mb": memory("memory_of_step", who, width) if width == WIDTHS[1] else None})
    return rows


def ensemble_calls(width, batch):
    model, _, labels = network(width)
    inputs = torch.rand(batch, 64, generator=generator(0, "held out"))
    fitted = SGLDEnsemble(model, lr=STEP, steps=MEMBERS, burn_in=0, thin=1)
    fitted.fit(torch.rand(50, 64, generator=generator(0, "fit")), labels)
    twins = [copy.deepcopy(model) for _ in range(MEMBERS)]
    for index, twin in enumerate(twins):
        twin.load_state_dict({name: stack[index] for name, stack in fitted.members_.items()})

    @torch.no_grad()
    def loop():
        return torch.stack([twin(inputs).log_softmax(-1) for twin in twins]).logsumexp(0) - math.log(MEMBERS)

    return {"kullback": lambda: fitted.predict_log_proba(inputs), "loop over members": loop}


def memory_of_ensemble(who, width, batch):
    return ensemble_calls(width, batch)[who]


def ensembles(width, batch):
    times, results = _measure.race(ensemble_calls(width, batch), rounds=9, clock=_measure.time.process_time)
    middle, rows = _measure.medians(times), []
    for who in times:
        row = {"case": f"ensemble of {MEMBERS}, width {width}, {batch} inputs", "who": who, "us": 1e6 * middle[who]}
        row["ratio"] = _measure.ratio(times, who, "kullback")
        row["error"] = float((results[who] - results["kullback"]).abs().max())
        middle_size = (width, batch) == (WIDTHS[1], BATCHES[1])
        rows.append(row | {"mb": memory("memory_of_ensemble", who, width, batch) if middle_size else None})
    return rows


def main():
    table, errors = [], variance_errors()
    for size in CLASSES:
        table += mixtures(size)
    for width in WIDTHS:
        table += langevin(width, errors)
    for width in WIDTHS:
        table += [row for batch in BATCHES for row in ensembles(width, batch)]
    for row in table:
        row |= {key: float(f"{value:.4g}") for key, value in row.items() if isinstance(value, float)}
        rest = "  ".join(f"{name} {value}" for name, value in row.items() if name not in ("case", "who"))
        print(f"{row['case']:45} {row['who']:18} {rest}")
    peers = {name: version(name) for name in ("posteriors", "numpy", "scipy")}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
