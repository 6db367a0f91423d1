"""SequenceMatch: layouts equal to separate forwards, the objective's closed forms, generation that deletes rightly."""

import math

import pytest
import torch
from transformers import TrainingArguments

from kullback.align._hf_sequencematch import (
    SequenceMatchSettings,
    SequenceMatchTrainer,
    layout_logits,
    likely_tokens,
    with_backspace,
)
from kullback.align.sequencematch import policy_entropy, sequencematch_loss, transition_rewards
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.decode.backspace import (
    PAD,
    backspace_layout,
    block_mask,
    generate_with_backspace,
    inject_noise,
    visible_text,
)
from kullback.models.small import small_llama
from kullback.papers.sequencematch.bandit import bandit_optimum

BACKSPACE, BEGIN = 7, 0
NESTED = torch.tensor(
    [[1, 2, 7, 7, 3, 4, 7, 5, 6], [1, 2, 3, 4, 5, 6, 1, 2, 3], [1, 7, 2, 7, 3, 7, 4, PAD, PAD], [5] + [PAD] * 8]
)


@pytest.fixture(scope="module")
def model():
    return small_llama(8, hidden=16, layers=2, heads=2, length=32, generator=generator(0, "model")).double().eval()


def random_actions(rows, count, draw):
    found = torch.full((rows, count), PAD)
    for row in range(rows):
        depth = 0
        for place in range(int(torch.randint(count // 2, count + 1, (), generator=draw))):
            delete = depth > 0 and torch.rand((), generator=draw).item() < 0.4
            found[row, place] = BACKSPACE if delete else torch.randint(1, 7, (), generator=draw)
            depth += -1 if delete else 1
    return found


@torch.no_grad()
@pytest.mark.parametrize("actions", [NESTED, random_actions(6, 20, generator(1, "actions"))])
def test_a_layout_has_the_logits_of_a_forward_on_every_visible_prefix(actions, model):
    layout = backspace_layout(actions, backspace=BACKSPACE, begin=BEGIN)
    logits = layout_logits(model, layout)
    for row in range(len(actions)):
        stack = []
        for place, action in enumerate(actions[row].tolist()):
            if action == PAD:
                break
            prefix = model(input_ids=torch.tensor([[BEGIN, *stack]])).logits[0, -1]
            torch.testing.assert_close(logits[row, layout.state_index[row, place]], prefix, atol=1e-10, rtol=0)
            assert layout.depth[row, place] == len(stack)
            if action == BACKSPACE:
                stack.pop()
            else:
                stack.append(action)
            after = model(input_ids=torch.tensor([[BEGIN, *stack]])).logits[0, -1]
            torch.testing.assert_close(logits[row, layout.next_index[row, place]], after, atol=1e-10, rtol=0)
    wrong = model(input_ids=layout.input_ids, position_ids=layout.position_ids).logits  # deleted tokens are read
    assert not torch.allclose(wrong, logits, atol=1e-6)


def test_without_backspaces_it_is_a_plain_sequence(model):
    actions = torch.tensor([[1, 2, 3, 4]])
    layout = backspace_layout(actions, backspace=BACKSPACE, begin=BEGIN)
    assert layout.input_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert layout.state_index.tolist() == [[0, 1, 2, 3]]
    assert torch.equal(layout.attention[0], torch.ones(5, 5).tril().bool())
    logits = layout_logits(model, layout)
    output = sequencematch_loss(
        logits, layout, logits, layout, backspace=BACKSPACE, divergence="mle", gamma=1.0, nll_share=0.0,
        normalise="trajectory",
    )  # fmt: skip
    root = logits[0, 0].clone()
    root[BACKSPACE] = -math.inf
    rows = torch.cat([root.unsqueeze(0), logits[0, 1:4]])
    nll = -rows.log_softmax(-1)[torch.arange(4), actions[0]].sum()
    assert output.loss.item() == pytest.approx(nll.item(), abs=1e-10)
    assert output.nll.item() == pytest.approx(nll.item() / 4, abs=1e-10)


def test_values_telescope_and_a_shift_of_the_logits_is_seen(model):
    layout = backspace_layout(NESTED, backspace=BACKSPACE, begin=BEGIN)
    logits = layout_logits(model, layout).detach()
    found = transition_rewards(logits, layout, backspace=BACKSPACE, gamma=0.9)
    total = (found.weight * (found.value - found.following)).sum(1)
    torch.testing.assert_close(total, found.value[:, 0], atol=1e-10, rtol=0)
    options = {"backspace": BACKSPACE, "nll_share": 0.0}
    first = sequencematch_loss(logits, layout, logits, layout, **options).objective
    shifted = sequencematch_loss(logits + 5.0, layout, logits + 5.0, layout, **options).objective
    assert abs(first - shifted) > 1e-3


def bandit(policy_logits, counts, own_counts, **options):
    """One action from {0, 1, 2} and then the end, each as often as counted; token 3 is the backspace."""
    rows = torch.repeat_interleave(torch.arange(3), counts).unsqueeze(1)
    own = torch.repeat_interleave(torch.arange(3), own_counts).unsqueeze(1)
    layouts = [backspace_layout(x, backspace=3, begin=0) for x in (rows, own)]
    full = torch.cat([policy_logits, policy_logits.new_zeros(1)])
    logits = [full.expand(len(layout.actions), layout.input_ids.shape[1], 4) for layout in layouts]
    return sequencematch_loss(logits[0], layouts[0], logits[1], layouts[1], backspace=3, gamma=1.0, **options)


@pytest.mark.parametrize(
    ("alpha", "policy", "objective"),
    [
        (1.0, (0.59317288, 0.25421035, 0.15261677), -0.8861717058),
        (10.0, (0.68515121, 0.20769326, 0.10715553), -0.8135962894),
        (1000.0, (0.7, 0.2, 0.1), None),
    ],
)
def test_the_bandit_of_the_card(alpha, policy, objective):
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([7, 2, 1])
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-16
    )
    options = {"alpha": alpha, "divergence": "chi2", "nll_share": 0.0}

    def closure():
        optimizer.zero_grad()
        loss = bandit(logits, counts, counts, **options).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    found = bandit(logits, counts, counts, **options)
    assert logits.softmax(0).tolist() == pytest.approx(policy, abs=2e-4 if objective is None else 1e-6)
    if objective is not None:
        assert found.objective.item() == pytest.approx(objective, abs=1e-8)
        p, pi = torch.tensor([0.7, 0.2, 0.1]).double(), logits.softmax(0)
        primal = alpha * ((p - pi).square() / p).sum() + (pi * pi.log()).sum()
        assert found.objective.item() == pytest.approx(primal.item(), abs=1e-8)


@pytest.mark.parametrize(
    ("alpha", "policy", "objective"),
    [
        (1.0, (0.58505895, 0.25407101, 0.16087005), -0.8938194306),
        (10.0, (0.68492645, 0.20772373, 0.10734982), None),
    ],
)
def test_the_bandit_of_the_mixture_at_its_fixed_point(alpha, policy, objective):
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    found = bandit_optimum(p, alpha=alpha, divergence="chi2_mixture")
    assert found.policy.tolist() == pytest.approx(policy, abs=1e-7)
    pi = found.policy
    primal = alpha * ((p - pi).square() / ((p + pi) / 2)).sum().item() - found.entropy
    assert found.objective == pytest.approx(primal, abs=1e-9)
    assert objective is None or found.objective == pytest.approx(objective, abs=1e-9)
    other = bandit_optimum(p, alpha=alpha, divergence="chi2").policy
    assert (other - pi).abs().max() > 1e-4, "it is not the optimum against the data alone"


def test_the_entropy_of_the_bandit_rises_as_alpha_falls():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    entropies = [bandit_optimum(p, alpha=alpha, divergence="chi2").entropy for alpha in (0.1, 1.0, 10.0, 1000.0)]
    assert entropies == sorted(entropies, reverse=True)
    assert math.log(3) > entropies[0] > 1.08
    assert entropies[-1] == pytest.approx(-(p * p.log()).sum().item(), abs=3e-4)


def test_iq_learn_is_the_form_with_the_values_of_the_start(model):
    """E_data phi(Q - g V') - V(s_0), chi-squared, written out for texts that end."""
    layout = backspace_layout(NESTED, backspace=BACKSPACE, begin=BEGIN)
    logits = layout_logits(model, layout).detach()
    options = {"backspace": BACKSPACE, "gamma": 0.9, "nll_share": 0.0, "divergence": "chi2", "alpha": 2.0}
    parts = transition_rewards(logits, layout, backspace=BACKSPACE, gamma=0.9)
    phi = parts.reward - parts.reward.square() / 8.0
    written = ((parts.weight * phi).sum() - parts.value[:, 0].sum()) / len(NESTED)
    forms = {
        name: sequencematch_loss(
            logits, layout, logits, layout, values_of=name, normalise="trajectory", **options
        ).objective
        for name in ("both", "data", "start")
    }
    for found in forms.values():
        torch.testing.assert_close(found, written, atol=1e-10, rtol=0)
    weights = (torch.rand(NESTED.shape, generator=generator(4, "w")) < 0.6).double()
    weights[:, -1] = 1.0
    weights[3, 0] = 1.0
    masked = backspace_layout(NESTED, backspace=BACKSPACE, begin=BEGIN, weights=weights)
    start, data = (
        sequencematch_loss(logits, masked, logits, layout, values_of=name, **options).objective
        for name in ("start", "data")
    )
    assert abs(start - data) > 1e-3, "sums with actions of no weight do not telescope"
    with pytest.raises(ConfigError, match="values_of"):
        sequencematch_loss(logits, layout, logits, layout, values_of="model", **options)


@pytest.mark.parametrize("divergence", ["chi2_mixture", "chi2", "js", "kl", "mle"])
def test_gradients_by_differences(divergence, model):
    data = backspace_layout(NESTED[:2], backspace=BACKSPACE, begin=BEGIN)
    own = backspace_layout(NESTED[2:], backspace=BACKSPACE, begin=BEGIN)
    draw = generator(2, "logits")
    shape = (*data.input_ids.shape, 8)
    logits = torch.randn(shape, generator=draw, dtype=torch.float64)
    other = torch.randn(*own.input_ids.shape, 8, generator=draw, dtype=torch.float64)

    def value(x):
        return sequencematch_loss(x, data, other, own, backspace=BACKSPACE, alpha=3.0, divergence=divergence).loss

    assert torch.autograd.gradcheck(value, logits.requires_grad_(), atol=1e-6)


@torch.no_grad()
def test_generation_with_a_cache_is_that_without(model):
    actions = generate_with_backspace(
        model, 5, backspace=BACKSPACE, begin=BEGIN, length=8, most_actions=20, generator=generator(3, "g")
    )
    draw = generator(3, "g")
    stacks, done = [[] for _ in range(5)], [False] * 5
    for place in range(actions.shape[1]):
        prefixes = [torch.tensor([[BEGIN, *stack]]) for stack in stacks]
        logits = torch.stack([model(input_ids=prefix).logits[0, -1].float() for prefix in prefixes])
        for row, stack in enumerate(stacks):
            if not stack:
                logits[row, BACKSPACE] = -math.inf
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=draw).squeeze(1)
        for row, stack in enumerate(stacks):
            if done[row]:
                assert actions[row, place] == PAD
                continue
            assert actions[row, place] == drawn[row]
            if drawn[row] == BACKSPACE:
                stack.pop()
            else:
                stack.append(int(drawn[row]))
            done[row] = len(stack) >= 8
    assert visible_text(actions, backspace=BACKSPACE) == stacks
    assert (actions == BACKSPACE).any()


def test_noise_comes_and_goes():
    ids = torch.randint(1, 7, (20, 30), generator=generator(4, "ids"))
    actions, weights = inject_noise(ids, share=0.2, vocabulary=7, backspace=BACKSPACE, generator=generator(5, "n"))
    assert visible_text(actions, backspace=BACKSPACE) == ids.tolist()
    deletes = actions == BACKSPACE
    share = deletes.sum().item() / ids.numel()
    assert abs(share - 0.2) < 6 * (0.16 / ids.numel()) ** 0.5
    before = torch.roll(deletes, -1, 1)
    before[:, -1] = False
    assert (weights[before] == 0).all(), "the wrong token is not learnt"
    assert (weights[deletes] == 1).all()
    assert ((weights == 0) == (before | (actions == PAD))).all()
    kept, _ = inject_noise(
        ids, share=0.2, vocabulary=7, backspace=BACKSPACE, generator=generator(5, "n"),
        exclude=lambda true, wrong: torch.ones_like(true, dtype=torch.bool),
    )  # fmt: skip
    assert torch.equal(kept, ids)


def test_noise_that_could_be_right_is_left_out(model):
    ids = torch.randint(1, 7, (20, 12), generator=generator(5, "ids"))
    options = {"share": 0.5, "vocabulary": 7, "backspace": BACKSPACE}
    law = model(torch.cat([torch.zeros(20, 1, dtype=torch.long), ids[:, :-1]], 1)).logits.softmax(-1)
    above = law.median().item()
    counts = {}
    for name, exclude in (("all", None), ("unlikely", likely_tokens(model, begin=BEGIN, above=above))):
        actions, _ = inject_noise(ids, generator=generator(5, "n"), exclude=exclude, **options)
        wrong = []
        for row, each in enumerate(actions.tolist()):
            depth = 0
            for place, action in enumerate(each[:-1]):
                if each[place + 1] == BACKSPACE:
                    wrong.append(law[row, depth, action].item())
                elif action not in (BACKSPACE, PAD):
                    depth += 1
        counts[name] = (len(wrong), max(wrong))
    assert counts["unlikely"][1] <= above + 1e-6 < counts["all"][1]
    assert 0 < counts["unlikely"][0] < counts["all"][0]
    with pytest.raises(ConfigError, match="above"):
        likely_tokens(model, begin=BEGIN, above=2.0)


def test_the_trainer(tmp_path):
    model = small_llama(7, hidden=16, layers=1, heads=2, length=64, generator=generator(6, "m"))
    assert with_backspace(model) == 7
    windows = torch.randint(1, 7, (32, 10), generator=generator(7, "w"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to="none", logging_steps=1, disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = SequenceMatchTrainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row} for row in windows], backspace=7, begin=0,
        settings=SequenceMatchSettings(samples=4, kept=8, length=10, refresh_every=2),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    assert len(trainer.buffer) == 8
    assert trainer.settings.share(0, 100) == 1.0
    assert trainer.settings.share(50, 100) == trainer.settings.share(90, 100) == pytest.approx(0.2)


def summed_step_by_step(logits, layout, end_value, *, alpha, gamma, steps):
    """(sum of r - r^2 / 4 alpha, sum of V - gamma V', sum of weights), the absorbing steps one by one."""
    gained = spent = weights = 0.0
    for row in range(len(layout.actions)):
        count = int(layout.held[row].sum())
        for time in range(count + steps):
            if time < count:
                now = logits[row, layout.state_index[row, time]].clone()
                if layout.depth[row, time] == 0:
                    now[BACKSPACE] = -math.inf
                value = now.logsumexp(0)
                after = logits[row, layout.next_index[row, time]].logsumexp(0) if time + 1 < count else end_value
                if time + 1 < count and layout.depth[row, time + 1] == 0:
                    root = logits[row, 0].clone()
                    root[BACKSPACE] = -math.inf
                    after = root.logsumexp(0)
                reward = now[layout.actions[row, time]] - gamma * after
            else:
                value = after = end_value
                reward = (1 - gamma) * end_value
            gained += gamma**time * (reward - reward**2 / (4 * alpha))
            spent += gamma**time * (value - gamma * after)
            weights += gamma**time
    return gained, spent, weights


def test_an_absorbing_end_is_the_sum_over_all_its_steps(model):
    layout = backspace_layout(NESTED, backspace=BACKSPACE, begin=BEGIN)
    logits, end_value = layout_logits(model, layout).detach(), torch.tensor(0.7, dtype=torch.float64)
    options = {"backspace": BACKSPACE, "gamma": 0.8}
    found = transition_rewards(logits, layout, terminal="absorbing", end_value=end_value, **options)
    total = (found.weight * (found.value - found.following)).sum(1)
    torch.testing.assert_close(total, found.value[:, 0], atol=1e-10, rtol=0)
    gained, spent, weights = summed_step_by_step(logits, layout, end_value, alpha=3.0, gamma=0.8, steps=200)
    output = sequencematch_loss(
        logits, layout, logits, layout, divergence="chi2", alpha=3.0, nll_share=0.0, terminal="absorbing",
        end_value=end_value, **options,
    )  # fmt: skip
    assert output.objective.item() == pytest.approx(((gained - spent) / weights).item(), abs=1e-10)
    at_zero = sequencematch_loss(logits, layout, logits, layout, divergence="chi2", alpha=3.0, nll_share=0.0, **options)
    assert abs(output.objective - at_zero.objective) > 1e-3, "it is not the end of value 0"


def test_a_learnt_end_leaves_the_bandit_where_it_is():
    """All trajectories are equally long, so nothing is to be learnt from the end: its value goes to 0."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    value = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    counts, options = torch.tensor([7, 2, 1]), {"lr": 0.5, "max_iter": 500, "line_search_fn": "strong_wolfe"}
    rows = torch.repeat_interleave(torch.arange(3), counts).unsqueeze(1)
    layout = backspace_layout(rows, backspace=3, begin=0)
    optimizer = torch.optim.LBFGS([logits, value], tolerance_grad=1e-12, tolerance_change=1e-16, **options)

    def closure():
        optimizer.zero_grad()
        full = torch.cat([logits, logits.new_zeros(1)]).expand(10, layout.input_ids.shape[1], 4)
        loss = sequencematch_loss(
            full, layout, full, layout, backspace=3, gamma=0.9, divergence="chi2", alpha=1.0, nll_share=0.0,
            terminal="absorbing", end_value=value,
        ).loss  # fmt: skip
        loss.backward()
        return loss

    optimizer.step(closure)
    assert logits.softmax(0).tolist() == pytest.approx((0.59317288, 0.25421035, 0.15261677), abs=1e-6)
    assert value.item() == pytest.approx(0.0, abs=1e-6)


def test_only_rows_that_end_have_an_end(model):
    layout = backspace_layout(NESTED, backspace=BACKSPACE, begin=BEGIN)
    logits = layout_logits(model, layout).detach()
    cut = transition_rewards(logits, layout, backspace=BACKSPACE, terminal="bootstrap")
    whole = transition_rewards(logits, layout, backspace=BACKSPACE)
    mixed = transition_rewards(logits, layout, backspace=BACKSPACE, end=4)  # only the third row has a 4 at its end
    ended = (NESTED == 4).any(1)
    assert ended.tolist() == [True, True, True, False]
    with_end = transition_rewards(logits, layout, backspace=BACKSPACE, end=6)
    for row, other in ((0, whole), (3, cut)):
        torch.testing.assert_close(with_end.reward[row], other.reward[row])
    assert not torch.allclose(cut.reward, whole.reward)
    torch.testing.assert_close(mixed.reward[3], cut.reward[3])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own imports
@torch.no_grad()
def test_the_block_mask_is_the_dense_one():
    layout = backspace_layout(NESTED, backspace=BACKSPACE, begin=BEGIN)
    mask, (batch, size) = block_mask(layout).mask_mod, layout.input_ids.shape
    b, q, k = torch.meshgrid(torch.arange(batch), torch.arange(size), torch.arange(size), indexing="ij")
    assert torch.equal(mask(b, torch.zeros_like(b), q, k), layout.attention)
    assert not layout.attention[0].equal(torch.ones(size, size).tril().bool())
    flexible = small_llama(8, hidden=32, layers=2, heads=2, length=32, generator=generator(0, "model")).eval()
    dense = layout_logits(flexible, layout)
    flexible.set_attn_implementation("flex_attention")
    torch.testing.assert_close(layout_logits(flexible, layout), dense, atol=1e-5, rtol=0)


@torch.no_grad()
def test_prompts_are_read_and_never_deleted(model):
    prompts = torch.tensor([[1, 2], [3, 4], [5, 6]])
    seen = []

    def only_even(text, logits):
        seen.append(text)
        out = logits.clone()
        out[:, [1, 3, 5]] = -math.inf
        return out

    options = {"backspace": BACKSPACE, "begin": BEGIN, "length": 4, "most_actions": 12, "prompts": prompts}
    actions = generate_with_backspace(model, 3, generator=generator(8, "p"), processor=only_even, **options)
    assert not torch.isin(actions, torch.tensor([1, 3, 5])).any()
    assert all(len(text) <= 4 for text in visible_text(actions, backspace=BACKSPACE))
    assert all(text[0, 0] == BEGIN and text[0, 1:3].tolist() in prompts.tolist() for text in seen)
    texts = {tuple(row.tolist()) for text in seen for row in text}
    stack, row = [BEGIN, 1, 2], actions[0].tolist()
    for action in row[:-1]:
        assert tuple(stack) in texts
        if action == PAD:
            break
        stack = stack[:-1] if action == BACKSPACE else [*stack, action]
    first = generate_with_backspace(model, 3, generator=generator(9, "p"), **options)
    logits = torch.stack([model(torch.tensor([[BEGIN, *p]])).logits[0, -1].float() for p in prompts.tolist()])
    logits[:, BACKSPACE] = -math.inf
    again = torch.multinomial(logits.softmax(-1), 1, generator=generator(9, "p")).squeeze(1)
    assert torch.equal(first[:, 0], again)
    with pytest.raises(ShapeError, match="prompts"):
        generate_with_backspace(model, 2, generator=generator(9, "p"), **options)


def test_the_trainer_learns_the_value_of_an_absorbing_end(tmp_path):
    model = small_llama(7, hidden=16, layers=1, heads=2, length=64, generator=generator(6, "m"))
    with_backspace(model)
    windows = torch.randint(2, 7, (32, 10), generator=generator(7, "w"))
    windows[::2, -1] = 1  # half of the texts end
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to="none", logging_steps=2, disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = SequenceMatchTrainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row} for row in windows], backspace=7, begin=0,
        settings=SequenceMatchSettings(samples=4, kept=8, length=10, refresh_every=2, terminal="absorbing", end=1),
    )  # fmt: skip
    trainer.train()
    assert model.end_value.item() != 0.0
    logged = [entry for entry in trainer.state.log_history if "metric/entropy" in entry]
    assert len(logged) == 2
    assert all(0.0 < entry["metric/entropy"] < math.log(8) + 1e-6 for entry in logged)
    assert {"metric/objective", "metric/nll", "metric/reward/data", "metric/reward/model"} <= logged[0].keys()
    with pytest.raises(ConfigError, match="end"):
        SequenceMatchSettings(terminal="absorbing")


def test_the_entropy_of_a_policy():
    layout = backspace_layout(torch.tensor([[1, 2, PAD]]), backspace=3, begin=0)
    logits = torch.zeros(1, 3, 4)
    logits[0, 2] = 100.0 * torch.arange(4.0)  # after the last action: not a state of any
    assert policy_entropy(logits, layout).item() == pytest.approx(math.log(4))


def test_bad_input(model):
    with pytest.raises(DataError, match="nothing is visible"):
        backspace_layout(torch.tensor([[7, 1]]), backspace=7, begin=0)
    with pytest.raises(DataError, match="padding"):
        backspace_layout(torch.tensor([[1, PAD, 2]]), backspace=7, begin=0)
    with pytest.raises(ShapeError, match="actions"):
        backspace_layout(torch.zeros(2, 0, dtype=torch.long), backspace=7, begin=0)
    layout = backspace_layout(NESTED, backspace=BACKSPACE, begin=BEGIN)
    logits = torch.zeros(*layout.input_ids.shape, 8)
    with pytest.raises(ShapeError, match="stream"):
        transition_rewards(logits[:, :2], layout, backspace=BACKSPACE)
    with pytest.raises(DataError, match="action 7"):
        transition_rewards(logits[..., :7], layout, backspace=BACKSPACE)
    for wrong in ({"alpha": 0.0}, {"gamma": 1.5}, {"divergence": "tv"}, {"normalise": "mean"}, {"terminal": "end"}):
        with pytest.raises(ConfigError):
            sequencematch_loss(logits, layout, logits, layout, backspace=BACKSPACE, **wrong)
    for wrong, message in (
        ({"terminal": "absorbing"}, "end_value"),
        ({"end_value": torch.tensor(0.0)}, "end_value"),
        ({"terminal": "absorbing", "end_value": torch.tensor(0.0), "gamma": 1.0}, "gamma"),
        ({"terminal": "bootstrap", "end": 3}, "cut"),
    ):
        with pytest.raises(ConfigError, match=message):
            sequencematch_loss(logits, layout, logits, layout, backspace=BACKSPACE, **wrong)
    with pytest.raises(ConfigError, match="most_actions"):
        generate_with_backspace(model, 1, backspace=7, begin=0, length=9, most_actions=3, generator=generator(0))
    with pytest.raises(ConfigError, match="share"):
        inject_noise(NESTED[:1], share=1.0, vocabulary=7, backspace=7, generator=generator(0))
