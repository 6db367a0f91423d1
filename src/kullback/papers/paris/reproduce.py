"""What a held path does to the bias of PaRIS: sweep by sweep in a linear Gaussian model, and in learning a parameter.

Bias: E[sum x_{t-1} x_t | y] over 100 steps by PPG with 10 particles, and by PaRIS with as many as PPG used in all,
against the Kalman smoother. Learning: the coefficient of an autoregression in noise by score ascent over 200 steps,
with four allotments of particles and sweeps, against the maximum of the Kalman likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.sample.exact_smoothing import kalman_smoother, sequence_rows
from kullback.sample.paris import Smoother, paris
from kullback.sample.ppg import forward_pass, ppg, ppg_rollout, simulate_back, trace
from kullback.sample.score_ascent import score_ascent
from kullback.sample.state_space import AdditiveStatistic, LinearGaussianModel

__all__ = ["draw", "reproduce"]

TIMES, PARTICLES, REPLICATES = 100, 10, 200
SWEEPS, BURN_IN = 8, 4
BUDGETS = (10, 50, 90, 130)  # particles of PaRIS: 90 are those of the eight sweeps and of the pass that starts them
LEARNING_TIMES, TRUTH, SCALE, START = 200, 0.95, 0.3, 0.5
STEPS, AVERAGED, LEARNERS, GAIN = 100, 30, 24, 1.0
SETTINGS = {  # particles, sweeps; None: plain PaRIS
    "PaRIS, N = 8": (8, None),
    "PaRIS, N = 32": (32, None),
    "PPG, N = 8, k = 4": (8, 4),
    "PPG, N = 32, k = 1": (32, 1),
}


def observed(model: LinearGaussianModel, times: int, source: torch.Generator) -> Tensor:
    """Observations [times + 1, 1] of one path of a scalar model."""
    x, rows = model.sample_init((1, 1), generator=source), []
    scale = model.observation_covariance.sqrt()
    for time in range(times + 1):
        x = model.sample_trans(x, time, generator=source) if time else x
        rows.append(x[0, 0] + scale[0] * torch.randn(1, generator=source, dtype=torch.float64))
    return torch.stack(rows)


def product(x: Tensor, x_next: Tensor, observation: Tensor, time: int) -> Tensor:
    """x_{t-1} x_t."""
    return x * x_next


def smoothed_product(model: LinearGaussianModel, observations: Tensor) -> float:
    """The exact E[sum x_{t-1} x_t | y]."""
    exact = kalman_smoother(model, observations)
    return ((exact.mean[0, :-1] * exact.mean[0, 1:]).sum() + exact.lag_covariance.sum()).item()


def bias_study(run: Run) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The bias of every sweep, of the roll-out, and of PaRIS at four budgets, over REPLICATES chains."""
    model = LinearGaussianModel.scalar(0.9, 0.6, 1.0)
    observations = observed(model, TIMES, generator(0, "paris", "bias data"))
    exact = smoothed_product(model, observations)
    kernel = ppg(model, product, observations, num_particles=PARTICLES, backward="exact")
    source = generator(run.seed, "sweeps")
    rollout = ppg_rollout(kernel, SWEEPS, BURN_IN, generator=source, chains=REPLICATES)
    rows = [error_row("PPG", values, exact, sweep=i) for i, values in enumerate(rollout.per_sweep.unbind(1))]
    rows.append(error_row("roll-out", rollout.mean, exact))
    for count in BUDGETS:
        smoother = paris(model, product, num_particles=count, backward="exact")
        source = generator(run.seed, "paris", count)
        state = smoother.init(observations[0], generator=source, chains=REPLICATES)
        for observation in observations[1:]:
            state, _ = smoother.step(state, observation, generator=source)
        rows.append(error_row("PaRIS", state.estimate, exact, particles=count))
    run.event("bias", exact=exact, rollout=rows[SWEEPS]["bias"], paris=rows[SWEEPS + 1]["bias"])
    plain = next(row for row in rows if row.get("particles") == 90)
    metrics = {
        "bias_ratio_after_4_sweeps": abs(rows[4]["bias"]) / abs(rows[0]["bias"]),
        "rmse_ratio": rows[SWEEPS]["rmse"] / plain["rmse"],
    }
    return metrics, rows


def error_row(method: str, estimates: Tensor, exact: float, **place: int) -> dict[str, Any]:
    """Bias with its standard error, and root mean squared error."""
    errors = estimates.flatten() - exact
    spread = errors.std().item() / len(errors) ** 0.5
    rmse = errors.square().mean().sqrt().item()
    return {"study": "bias", "method": method, **place, "bias": errors.mean().item(), "error": spread, "rmse": rmse}


def autoregression(parameters: Mapping[str, Tensor]) -> LinearGaussianModel:
    """The model to learn; the law of its first state stays that of the truth, so that any coefficient may be tried."""
    coefficient = parameters["coefficient"].reshape(-1, 1, 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    first = SCALE**2 / (1 - TRUTH**2)
    return LinearGaussianModel(coefficient, SCALE**2 * one, one, one, torch.zeros(1, dtype=torch.float64), first * one)


def score(parameters: Mapping[str, Tensor]) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """The score's statistic in closed form: (x_t - a x_{t-1}) x_{t-1} / q^2."""
    coefficient = parameters["coefficient"].detach().reshape(-1, 1, 1, 1)
    return lambda x, x_next, observation, time: (x_next - coefficient * x) * x / SCALE**2


def most_likely(observations: Tensor) -> float:
    """The coefficient of largest likelihood, on grids of 41 values, each a twentieth as wide as the one before."""
    centre, width = 0.8, 0.2
    for _ in range(4):
        grid = centre + width * torch.linspace(-1, 1, 41, dtype=torch.float64)
        likelihood = kalman_smoother(autoregression({"coefficient": grid}), observations).log_likelihood
        centre, width = grid[likelihood.argmax()].item(), width / 20
    return centre


def learned(name: str, observations: Tensor, seed: int) -> Tensor:
    """The coefficients of LEARNERS learners after each step: [STEPS, LEARNERS]."""
    particles, sweeps = SETTINGS[name]
    values = {"coefficient": torch.full((LEARNERS,), START, dtype=torch.float64, requires_grad=True)}
    optimizer = torch.optim.SGD(values.values(), lr=GAIN / LEARNING_TIMES, maximize=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) ** -0.6)
    seen: list[Tensor] = []
    score_ascent(
        autoregression, values, observations, optimizer,
        num_particles=particles, num_sweeps=sweeps or 1, num_steps=STEPS, method="ppg" if sweeps else "paris",
        statistic_of=score, backward="exact", per_chain=True, chains=LEARNERS, scheduler=scheduler,
        generator=generator(seed, "learning", name),
        listen=lambda step, parameters: seen.append(parameters["coefficient"].detach().clone()),
    )  # fmt: skip
    return torch.stack(seen)


def learning_study(run: Run) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The bias of the learned coefficient with four allotments, and the way there."""
    truth = autoregression({"coefficient": torch.tensor([TRUTH], dtype=torch.float64)})
    observations = observed(truth, LEARNING_TIMES, generator(0, "paris", "learning data"))
    best = most_likely(observations)
    rows: list[dict[str, Any]] = []
    bias = {}
    for name in SETTINGS:
        coefficients = learned(name, observations, run.seed)
        late = coefficients[-AVERAGED:].mean(0)
        likelihood = kalman_smoother(
            autoregression({"coefficient": torch.cat([late, torch.tensor([best])])}), observations
        )
        gap = (likelihood.log_likelihood[-1] - likelihood.log_likelihood[:-1]).mean().item()
        bias[name] = late.mean().item() - best
        run.event("learned", setting=name, bias=bias[name], likelihood_gap=gap)
        error = late.std().item() / LEARNERS**0.5
        rows.append({"study": "learned", "method": name, "bias": bias[name], "error": error, "likelihood_gap": gap})
        rows += [
            {"study": "learning", "method": name, "step": step + 1, "coefficient": values.mean().item(), "best": best}
            for step, values in enumerate(coefficients)
            if step % 2
        ]
    ratio = abs(bias["PPG, N = 8, k = 4"]) / abs(bias["PaRIS, N = 32"])
    return {"learning_bias_ratio": ratio}, rows


def reproduce(run: Run) -> Report:
    """One seed: REPLICATES chains on one data set, and LEARNERS learners in each setting on another."""
    bias_metrics, bias_rows = bias_study(run)
    learning_metrics, learning_rows = learning_study(run)
    return Report(metrics={**bias_metrics, **learning_metrics}, rows=bias_rows + learning_rows)


def genealogies(count: int = 25, times: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Paths of all final particles, traced and drawn backward, [count, times + 1] each; smoothed mean and deviation."""
    model, source = LinearGaussianModel.scalar(0.9, 0.6, 1.0), generator(0, "paris", "picture")
    observations = observed(model, times, source)
    smoother = Smoother(model, AdditiveStatistic(product), count, backward="exact")
    history = forward_pass(smoother, sequence_rows(observations), 1, source)
    last = torch.arange(count).unsqueeze(0)
    traced = trace(history.particles, history.ancestors, last)
    drawn = simulate_back(model, history, last, source)
    exact = kalman_smoother(model, observations)
    return traced[0, ..., 0], drawn[0, ..., 0], exact.mean[0, :, 0], exact.covariance[0, :, 0, 0].sqrt()


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Genealogies and backward paths in the smoothing band, the bias sweep by sweep, and the learned coefficients."""
    from kullback.figures import figure

    traced, drawn, mean, deviation = genealogies()
    with figure(path, columns=4, size=(3.6, 3.2)) as (traced_axes, drawn_axes, bias_axes, learning_axes):
        for axes, lines, title in (
            (traced_axes, traced, "ancestors of 25 particles"),
            (drawn_axes, drawn, "backward draws from the same"),
        ):
            axes.fill_between(range(len(mean)), mean - 2 * deviation, mean + 2 * deviation, color="0.88")
            axes.plot(mean, color="0.45", linewidth=1.0, linestyle="--")
            for line in lines:
                axes.plot(line, color="C0", linewidth=0.7, alpha=0.6)
            axes.set(xlabel="time", title=f"{title};\ngrey: exact mean ± 2 deviations", ylim=(-3.5, 3.5))
        draw_bias([row for row in rows if row["study"] == "bias"], bias_axes)
        learning = [row for row in rows if row["study"] == "learning"]
        for index, name in enumerate(SETTINGS):
            points = [row for row in learning if row["method"] == name]
            steps = sorted({row["step"] for row in points})
            means = [average(row["coefficient"] for row in points if row["step"] == step) for step in steps]
            learning_axes.plot(steps, means, color=f"C{index}", linewidth=1.2, label=name)
        best = learning[0]["best"]
        learning_axes.axhline(best, color="0.3", linewidth=0.8, linestyle=":", label="maximum likelihood")
        learning_axes.set(xlabel="step of score ascent", title="learned coefficient", ylim=(START, best + 0.04))
        learning_axes.legend(frameon=False, fontsize=7.5, loc="lower right")


def draw_bias(rows: Sequence[Mapping[str, Any]], axes: Any) -> None:
    """|bias| of each sweep with two standard errors over all seeds, and that of PaRIS by its particles."""
    floor, seeds = 0.05, len({row["seed"] for row in rows})
    values, below, above = [], [], []
    for sweep in range(SWEEPS):
        chosen = [row for row in rows if row.get("sweep") == sweep]
        value = abs(average(row["bias"] for row in chosen))
        error = 2 * average(row["error"] ** 2 for row in chosen) ** 0.5 / seeds**0.5
        values.append(value)
        below.append(value - max(value - error, floor))
        above.append(error)
    axes.errorbar(
        range(1, SWEEPS + 1), values, yerr=(below, above), fmt="o-", color="C2", capsize=3, linewidth=1.2,
        label=f"PPG, N = {PARTICLES}, by sweep, ± 2 errors",
    )  # fmt: skip
    for count in BUDGETS:
        value = abs(average(row["bias"] for row in rows if row.get("particles") == count))
        axes.plot([0.7, SWEEPS + 0.4], [value, value], color="C0", linewidth=0.9)
        axes.text(SWEEPS + 0.5, value, f"N = {count}", color="C0", fontsize=7.5, va="center")
    axes.plot([], [], color="C0", linewidth=0.9, label="PaRIS, by particles")
    axes.set(xlabel="sweep", title="|bias| of the estimate of E[Σ x x' | y]", yscale="log", ylim=(floor, 80.0))
    axes.set_xlim(0.6, SWEEPS + 2.6)
    axes.legend(frameon=False, fontsize=7.5)


def average(values: Iterable[float]) -> float:
    """The mean of numbers."""
    numbers = list(values)
    return sum(numbers) / len(numbers)
