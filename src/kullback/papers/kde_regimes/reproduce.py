"""Kernel density estimators in large dimensions (arXiv 2408.05807) in small: fluctuations, condensation, optimum.

Fluctuations: the estimate at a typical point over 1000 Gaussian data sets, tested for normality on both sides of h_CLT.
Condensation: the participation ratio of the nearest points, drawn by their order statistics for e^(alpha d) points,
held against theory. Optimum: the bandwidth of the largest held-out likelihood. Digits: theory beside what data alone
says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.diagnose import (
    GaussianSpectrumTheory,
    HighDimKDE,
    KDERegimes,
    knn_order_statistics,
    participation_ratio,
)

__all__ = ["draw", "reproduce"]

CASES = ((20, 2981), (30, 8103))  # dimensions and points: alpha = 0.4 and 0.3
MULTIPLES = (0.8, 1.2, 1.41, 1.8, 2.2)  # of h_G, corrected for the finite sample
DATA_SETS, HELD_OUT = 1000, 4000
SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9)
CONDENSATION = ((30, 0.3), (100, 0.25), (400, 0.25), (1000, 0.25))  # dimensions and alpha
REPLICATES, NEAREST = 1500, 2000


def theory(d: int) -> GaussianSpectrumTheory:
    """Unit variance in d dimensions."""
    return GaussianSpectrumTheory(torch.ones(d))


def log_ratios(d: int, n: int, bandwidths: Sequence[float], source: torch.Generator, data_sets: int) -> Tensor:
    """log of the estimate over its mean N(x; 0, (1 + h^2) I), at |x|^2 = d: [bandwidths, data sets]."""
    h = torch.tensor(bandwidths, dtype=torch.float64).unsqueeze(1)
    constant = 0.5 * d * ((1 + h.square()) / h.square()).log() + 0.5 * d / (1 + h.square()) - math.log(n)
    found = []
    for _ in range(data_sets):
        along = torch.randn(n, generator=source) - math.sqrt(d)
        across = torch.randn(n, d - 1, generator=source)
        squared = (along.square() + across.square().sum(1)).double()
        found.append((-0.5 * squared / h.square()).logsumexp(1))
    return torch.stack(found, dim=1) + constant


def fluctuations(run: Run, d: int, n: int) -> list[dict[str, Any]]:
    """A row for each bandwidth: moments of the estimate over data sets, and the p of a test for normality."""
    from scipy import stats

    glass = float(theory(d).h_glass(n, finite=True))
    source = generator(run.seed, "fluctuations", d)
    ratios = log_ratios(d, n, [multiple * glass for multiple in MULTIPLES], source, DATA_SETS).exp()
    table = []
    for multiple, values in zip(MULTIPLES, ratios.numpy(), strict=True):
        normed = (values - values.mean()) / values.std()
        row = {"study": "fluctuations", "d": d, "h": multiple * glass, "multiple": multiple}
        row |= {"skew": float(stats.skew(values)), "kurtosis": float(stats.kurtosis(values))}
        table.append(row | {"mean": float(values.mean()), "p": float(stats.kstest(normed, "norm").pvalue)})
    return table


def condensation(run: Run, d: int, alpha: float) -> list[dict[str, Any]]:
    """A row for each share of h_G: the mean participation of simulated order statistics beside 1 - mu."""
    log_n = alpha * d
    source = generator(run.seed, "condensation", d)
    squared = knn_order_statistics(log_n, theory(d).distances, size=REPLICATES, k=NEAREST, generator=source)
    glass = theory(d).h_glass(log_n, finite=True, log_n=True)
    table = []
    for share in SHARES:
        found = participation_ratio(-0.5 * squared / (share * glass).square())
        row = {"study": "condensation", "d": d, "share": share, "participation": found.mean().item()}
        table.append(row | {"error": found.std().item() / math.sqrt(len(found)), "theory": 1 - share**2})
    return table


def optimum(run: Run, d: int, n: int) -> dict[str, Any]:
    """The bandwidth of the largest likelihood of held-out points, by golden sections, beside the others."""
    source = generator(run.seed, "optimum", d)
    points = torch.randn(n, d, generator=source)
    held_out = torch.randn(HELD_OUT, d, generator=source)
    golden = 0.5 * (math.sqrt(5.0) - 1.0)
    low, high = 0.4, 1.6
    while high - low > 2e-3:
        inner, outer = high - golden * (high - low), low + golden * (high - low)
        better = HighDimKDE(inner).fit(points).score(held_out) > HighDimKDE(outer).fit(points).score(held_out)
        low, high = (low, outer) if better else (inner, high)
    rules = {rule: HighDimKDE(rule).fit(points).bandwidth_ for rule in ("kl", "likelihood", "silverman", "scott")}
    found = KDERegimes().fit(points).diagnose(0.5 * (low + high))
    return {
        "study": "optimum", "d": d, "alpha": math.log(n) / d, "h": 0.5 * (low + high), "regime": found.regime,
        "h_glass": float(theory(d).h_glass(n, finite=True)), "h_clt": float(theory(d).h_clt(n)),
        "h_glass_from_data": found.h_glass, **rules,
    }  # fmt: skip


def digits() -> dict[str, Any]:
    """Real data: the theory for Gaussian data of the same spectrum, and what the nearest neighbours say."""
    from sklearn.datasets import load_digits

    data = torch.from_numpy(load_digits().data)
    data = data[:, data.std(0) > 0]
    data = (data - data.mean(0)) / data.std(0, correction=0)
    fitted = KDERegimes().fit(data)
    likeliest = HighDimKDE("likelihood").fit(data).bandwidth_
    found = fitted.diagnose(likeliest)
    spectrum = GaussianSpectrumTheory(fitted.spectrum_)
    return {
        "study": "digits", "d": data.shape[1], "alpha": math.log(len(data)) / data.shape[1], "h": likeliest,
        "h_glass": float(spectrum.h_glass(len(data))), "h_kl": float(spectrum.h_kl(len(data))),
        "h_glass_from_data": found.h_glass, "h_kl_from_data": found.h_kl, "regime": found.regime,
    }  # fmt: skip


def reproduce(run: Run) -> Report:
    """One seed: the four studies."""
    moving = [row for d, n in CASES for row in fluctuations(run, d, n)]
    run.event("fluctuations", p_near=max(row["p"] for row in moving if row["multiple"] == 1.2))
    condensed = [row for d, alpha in CONDENSATION for row in condensation(run, d, alpha)]
    best = [optimum(run, d, n) for d, n in CASES]
    run.event("optimum", h=[row["h"] for row in best])
    far = [row for row in condensed if row["d"] >= 100 and row["share"] <= 0.8]
    metrics = {
        "largest_p_near_glass": max(row["p"] for row in moving if row["multiple"] == 1.2),
        "smallest_p_above": min(row["p"] for row in moving if row["multiple"] == 2.2),
        "participation_error": max(abs(row["participation"] - row["theory"]) for row in far),
        "optimum_to_clt": max(row["h"] / row["h_clt"] for row in best),
        "optimum_to_glass": max(row["h"] / row["h_glass"] for row in best),
    }
    return Report(metrics=metrics, rows=[*moving, *condensed, *best, digits()])


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The phase diagram with the best bandwidths found, the law of the estimate in each regime, and condensation."""
    from kullback.figures import figure

    with figure(path, columns=3, size=(4.0, 3.4)) as (phases, laws, shares):
        alpha = torch.linspace(0.05, 1.0, 96, dtype=torch.float64)
        large = theory(1000)
        glass, clt, best = (f(1000 * alpha, log_n=True) for f in (large.h_glass, large.h_clt, large.h_kl))
        top = 2.2
        phases.fill_between(alpha, clt, top, color="C0", alpha=0.15, linewidth=0)
        phases.fill_between(alpha, glass, clt, color="C1", alpha=0.2, linewidth=0)
        phases.fill_between(alpha, 0.0, glass, color="C3", alpha=0.15, linewidth=0)
        phases.plot(alpha, clt, color="C1", label="$h_{CLT}$")
        phases.plot(alpha, glass, color="C3", label="$h_G$")
        phases.plot(alpha, best, "k--", label="$h_{KL}$")
        found = [row for row in rows if row["study"] == "optimum"]
        phases.plot([row["alpha"] for row in found], [row["h"] for row in found], "k*", label="best, d = 30, 20")
        own_glass = [row["h_glass"] for row in found]
        phases.plot([row["alpha"] for row in found], own_glass, "v", color="C3", label="$h_G$ there")
        for x, y, name in ((0.65, 1.0, "gaussian"), (0.19, 0.98, "heavy-tailed"), (0.14, 0.3, "condensed")):
            phases.text(x, y, name, rotation=-38.0 * (name == "heavy-tailed"))
        phases.set(xlabel=r"$\alpha = \log n / d$", ylabel="bandwidth h", ylim=(0, top), xlim=(0.05, 1.0))
        phases.set_title("regimes of Gaussian data")
        phases.legend(frameon=False, loc="upper right")
        d, n = CASES[0]
        chosen = ((0.8, "C3"), (1.2, "C1"), (2.2, "C0"))
        h = [multiple * float(theory(d).h_glass(n, finite=True)) for multiple, _ in chosen]
        values = log_ratios(d, n, h, generator(0, "fluctuations", d), 2000).exp()
        for (multiple, colour), own in zip(chosen, values, strict=True):
            low, median, high = torch.quantile(own, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
            normed = (1.349 * (own - median) / (high - low)).numpy()
            options: dict[str, Any] = {"bins": 64, "range": (-4, 12), "density": True, "histtype": "step"}
            laws.hist(normed, color=colour, label=f"{multiple} $h_G$", **options)
        z = torch.linspace(-4, 4, 161)
        laws.plot(z, (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi), "k:", label="normal")
        laws.set(xlabel="estimate, from its median, in quartile deviations", yscale="log", ylim=(1e-3, 1.0))
        laws.set_title(f"law over 2000 data sets, d = {d}")
        laws.legend(frameon=False)
        line = torch.linspace(0, 1, 101)
        shares.plot(line, 1 - line.square(), "k-", linewidth=1.0, label=r"theory $1 - (h/h_G)^2$")
        for index, (d, _) in enumerate(CONDENSATION):
            own = [row for row in rows if row["study"] == "condensation" and row["d"] == d]
            mean = [sum(r["participation"] for r in own if r["share"] == s) / (len(own) / len(SHARES)) for s in SHARES]
            shares.plot(SHARES, mean, "osD^"[index], markersize=4, color=f"C{index}", label=f"d = {d}")
        shares.set(xlabel="h / $h_G$", ylabel="mean of $\\Sigma\\, p_i^2$", title="condensation onto few points")
        shares.legend(frameon=False)
