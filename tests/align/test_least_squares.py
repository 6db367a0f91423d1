"""Squared targets: sums step by step, the gradient of SequenceMatch's mixture where samples are the policy's."""

import itertools
import math

import pytest
import torch
from transformers import TrainingArguments

from kullback.align._hf_sequencematch import SequenceMatchSettings, SequenceMatchTrainer, with_backspace
from kullback.align.least_squares import SquaredTargets, squared_targets_loss
from kullback.align.sequencematch import sequencematch_loss
from kullback.core.errors import ConfigError, ShapeError
from kullback.core.rng import generator
from kullback.decode.backspace import PAD, backspace_layout
from kullback.models.small import small_llama
from kullback.papers.sequencematch.bandit import bandit_optimum

BACKSPACE, BEGIN, END = 7, 0, 6
DATA = torch.tensor([[1, 2, 7, 3, 6], [4, 7, 5, 1, 2], [6, PAD, PAD, PAD, PAD]])
OWN = torch.tensor([[2, 7, 4, 6, PAD], [3, 3, 3, 3, 3]])


def streams(scale=1.0):
    layouts = [backspace_layout(x, backspace=BACKSPACE, begin=BEGIN) for x in (DATA, OWN)]
    logits = [
        scale * torch.randn(*layout.input_ids.shape, 8, generator=generator(0, name), dtype=torch.float64)
        for layout, name in zip(layouts, ("data", "own"), strict=True)
    ]
    return logits, layouts


def written_out(logits, layouts, targets, *, alpha, gamma, terminal, end):
    """The sums of squares over weights, one step after the other, less their values at errors of 0."""
    bound, sums = 4 * alpha, {}
    for name, (z, layout) in zip(("data", "own"), zip(logits, layouts, strict=True), strict=True):
        found = {"actions": 0.0, "values": 0.0, "fixed": 0.0, "weights": 0.0}
        for row, actions in enumerate(layout.actions.tolist()):
            count = sum(action != PAD for action in actions)

            def value(index, z=z, row=row):
                now = z[row, index].clone()
                if index == 0:
                    now[BACKSPACE] = -math.inf
                return now.logsumexp(0)

            for time, action in enumerate(actions[:count]):
                ends = time + 1 == count and (end is None or action == end)
                after = value(layout.next_index[row, time])
                if ends and terminal != "bootstrap":
                    after = torch.zeros(())
                worth = bound / (1 - gamma) if ends and terminal == "absorbing" else bound
                largest = bound / (1 - gamma)
                after = after.clamp(-largest, largest) if targets.clip else after
                sign = 1 if name == "data" else -1
                q, v = z[row, layout.state_index[row, time], action], value(layout.state_index[row, time])
                found["actions"] += gamma**time * ((q - sign * worth - gamma * after) ** 2 - worth**2)
                found["values"] += gamma**time * ((v + worth - gamma * after) ** 2 - worth**2)
                found["fixed"] += gamma**time * ((q - largest) ** 2 - largest**2)
                found["weights"] += gamma**time
        sums[name] = {key: total / found["weights"] / (2 * bound) for key, total in found.items()}
    squares = sums["data"]["fixed" if targets.data == "fixed" else "actions"]
    if targets.own == "all values":
        return squares + 0.5 * (sums["data"]["values"] + sums["own"]["values"])
    return squares + sums["own"][targets.own]


@pytest.mark.parametrize(("terminal", "end"), [("zero", None), ("zero", END), ("absorbing", END), ("bootstrap", None)])
def test_the_squares_step_by_step(terminal, end):
    words = ("bootstrap", "fixed"), ("actions", "values", "all values"), (True, False)
    for data, own, clip in itertools.product(*words):
        targets = SquaredTargets(data=data, own=own, clip=clip)
        logits, layouts = streams(30.0 if clip else 1.0)
        options = {"alpha": 0.7, "gamma": 0.8, "terminal": terminal, "end": end}
        output = squared_targets_loss(
            logits[0], layouts[0], logits[1], layouts[1], backspace=BACKSPACE, targets=targets, nll_share=0.0, **options
        )
        expected = written_out(logits, layouts, targets, **options)
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)
        assert output.objective.item() == -output.loss.item()
        if clip and data == "bootstrap":
            other = written_out(logits, layouts, SquaredTargets(data=data, own=own, clip=False), **options)
            assert abs(other - expected) > 1e-3, "some values lie outside"


def every_trajectory(length=3):
    """All texts of so many actions over two tokens and the backspace 2, which cannot come where nothing is visible."""
    found = []
    for actions in itertools.product(range(3), repeat=length):
        depths = list(itertools.accumulate(-1 if action == 2 else 1 for action in actions))
        if min(depths) >= 0:
            found.append(actions)
    return torch.tensor(found)


def tabular(table, layout):
    """Logits that depend on the visible text alone, as a model's do: table [15, 3] by the number of the text."""
    numbers = torch.zeros_like(layout.input_ids)
    for row in range(len(numbers)):
        for place in range(1, numbers.shape[1]):
            before = [j for j in range(1, place) if layout.last[row, j] >= place]
            parent = numbers[row, before[-1]] if before else 0
            numbers[row, place] = 2 * parent + 1 + layout.input_ids[row, place] % 2
    return table[numbers]


def test_on_the_policys_own_trajectories_its_gradient_is_that_of_the_mixture():
    actions = every_trajectory()
    table = torch.randn(15, 3, generator=generator(1, "table"), dtype=torch.float64, requires_grad=True)
    demonstrated = torch.rand(len(actions), generator=generator(2, "p"), dtype=torch.float64)
    plain = backspace_layout(actions, backspace=2, begin=0)
    with torch.no_grad():
        logits = tabular(table, plain)
        logits[:, 0, 2] = -math.inf
        rows = torch.arange(len(actions)).unsqueeze(1)
        chances = logits[rows, plain.state_index].log_softmax(-1).gather(2, actions.unsqueeze(2)).sum((1, 2)).exp()
    assert chances.sum().item() == pytest.approx(1.0)

    def gradients(own_weights):
        found = []
        layouts = [
            backspace_layout(actions, backspace=2, begin=0, weights=(w / w.sum())[:, None].expand(actions.shape))
            for w in (demonstrated, own_weights)
        ]
        options = {"backspace": 2, "alpha": 1.5, "gamma": 0.9, "nll_share": 0.0}
        for loss in (
            lambda *x: sequencematch_loss(*x, **options).loss,
            lambda *x: squared_targets_loss(*x, targets=SquaredTargets(clip=False, still=False), **options).loss,
            lambda *x: squared_targets_loss(*x, targets=SquaredTargets(clip=False), **options).loss,
        ):
            value = loss(tabular(table, layouts[0]), layouts[0], tabular(table, layouts[1]), layouts[1])
            found.append(torch.autograd.grad(value, table)[0])
        return found

    mixture, squares, still = gradients(chances)
    torch.testing.assert_close(squares, mixture, atol=1e-10, rtol=0)
    assert (still - mixture).abs().max() > 1e-2, "targets that stand still are another rule"
    mixture, squares, _ = gradients(torch.ones(len(actions), dtype=torch.float64))
    assert (squares - mixture).abs().max() > 1e-2, "and so are trajectories of another policy"


@pytest.mark.parametrize("own", ["actions", "values"])
def test_the_bandit_ends_where_the_mixture_does(own):
    """Where there is nothing after an action; "values" pull V, the mean of no Q, elsewhere."""
    p, alpha = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), 1.0
    expected = bandit_optimum(p, alpha=alpha, divergence="chi2_mixture").policy
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    actions = torch.arange(3).unsqueeze(1)
    for _ in range(300):
        shares = (p, logits.detach().softmax(0))
        layouts = [backspace_layout(actions, backspace=3, begin=0, weights=w.unsqueeze(1)) for w in shares]
        full = torch.cat([logits, logits.new_zeros(1)]).expand(3, layouts[0].input_ids.shape[1], 4)
        loss = squared_targets_loss(
            full, layouts[0], full, layouts[1], backspace=3, alpha=alpha, gamma=1.0, nll_share=0.0,
            targets=SquaredTargets(own=own),
        ).loss  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gap = (logits.detach().softmax(0) - expected).abs().max().item()
    if own == "actions":
        assert gap < 1e-8
        torch.testing.assert_close(logits.detach(), 4 * alpha * (p - expected) / (p + expected), atol=1e-7, rtol=0)
    else:
        assert gap > 1e-2


def test_targets_of_another_model_and_targets_that_stand_still():
    logits, layouts = streams()
    options = {"backspace": BACKSPACE, "gamma": 0.8, "nll_share": 0.0, "terminal": "bootstrap"}

    def loss(x, y, targets, **more):
        return squared_targets_loss(x, layouts[0], y, layouts[1], targets=targets, **options, **more).loss

    live = SquaredTargets(still=False)
    pair = tuple(logits)
    assert loss(*pair, live, target_logits=pair) == loss(*pair, live)
    other = tuple(x + 1.0 for x in logits)
    assert abs(loss(*pair, live, target_logits=other) - loss(*pair, live)) > 1e-3
    parts = [x.clone().requires_grad_() for x in pair]
    held, moving = (
        torch.autograd.grad(loss(*parts, targets), parts)[0] for targets in (SquaredTargets(), live)
    )
    by_copy = torch.autograd.grad(loss(*parts, live, target_logits=pair), parts)[0]
    torch.testing.assert_close(held, by_copy)
    assert not torch.allclose(held, moving)
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, live), [part.detach().requires_grad_() for part in parts])


def test_the_trainer_takes_squared_targets(tmp_path):
    model = small_llama(7, hidden=16, layers=1, heads=2, length=64, generator=generator(6, "m"))
    with_backspace(model)
    windows = torch.randint(2, 7, (32, 10), generator=generator(7, "w"))
    windows[::2, -1] = 1
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to="none", logging_steps=2, disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    settings = SequenceMatchSettings(
        samples=4, kept=8, length=10, refresh_every=2, terminal="absorbing", end=1, squared=SquaredTargets(data="fixed")
    )
    trainer = SequenceMatchTrainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row} for row in windows], backspace=7, begin=0,
        settings=settings,
    )  # fmt: skip
    trainer.train()
    assert not hasattr(model, "end_value"), "what an end is worth is known"
    assert all(math.isfinite(entry["metric/objective"]) for entry in trainer.state.log_history if "loss" in entry)


def test_bad_input():
    logits, layouts = streams()
    for wrong in ({"data": "mean"}, {"own": "both"}):
        with pytest.raises(ConfigError, match="not"):
            SquaredTargets(**wrong)
    given = (logits[0], layouts[0], logits[1], layouts[1])
    for wrong, message in (
        ({"alpha": 0.0}, "alpha"), ({"nll_share": 2.0}, "nll_share"), ({"normalise": "mean"}, "normalise"),
        ({"gamma": 0.0}, "gamma"), ({"terminal": "end"}, "terminal"),
        ({"gamma": 1.0, "targets": SquaredTargets(data="fixed")}, "gamma below 1"),
        ({"gamma": 1.0, "terminal": "absorbing"}, "gamma below 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            squared_targets_loss(*given, backspace=BACKSPACE, **wrong)
    with pytest.raises(ShapeError, match="stream"):
        squared_targets_loss(logits[0][:, :2], *given[1:], backspace=BACKSPACE)
