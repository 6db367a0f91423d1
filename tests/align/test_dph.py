"""DPH-RL: the generators and trees of its card, gradients by enumeration, the buffer, the joint loss."""

import math

import pytest
import torch

from kullback.align._hf_reuse import rows_of_use
from kullback.align.dph import Dph, rehearsal_divergence, rehearsal_loss, visited_penalty
from kullback.align.grpo import Grpo
from kullback.align.regularised import f_regularised_policy
from kullback.align.rehearsal import RehearsalBuffer, partition_by_pass_rate, rehearse
from kullback.align.rollouts import Rollouts
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.divergences import f_divergence, jsd, kl

REFERENCE, POLICY = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
CARD = [  # name, alpha, f(2), D(ref||pi)
    ("forward_kl", 0.2, 0.3068528194, 0.3600624406),
    ("js", 0.2, 0.1698990368, 0.1811316999),
    ("alpha", 0.2, 0.3681179588, 0.3827238869),
    ("alpha", 0.5, 0.3431457505, 0.3696523928),
    ("alpha", 0.8, 0.3206352813, 0.3621552183),
    ("reverse_kl", 0.2, 2 * math.log(2) - 1, 0.3948162052),
]


@pytest.mark.parametrize(("name", "alpha", "at_two", "value"), CARD)
def test_generators_and_divergences_of_the_card(name, alpha, at_two, value):
    divergence = rehearsal_divergence(name, alpha=alpha)
    log_u = torch.tensor([math.log(2), 0.0], dtype=torch.float64, requires_grad=True)
    f = divergence.penalty(log_u, samples_from="reference")
    assert f.tolist() == pytest.approx([at_two, 0.0], abs=1e-10)
    assert torch.autograd.grad(f.sum(), log_u)[0][1] == 0.0
    log_ratio = (POLICY / REFERENCE).log()
    found = (REFERENCE * divergence.penalty(log_ratio, samples_from="reference")).sum()
    assert found.item() == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize(("name", "alpha", "at_two", "value"), CARD)
def test_gradients_are_those_of_the_divergence_by_enumeration(name, alpha, at_two, value):
    """All answers once, each in the buffer by its probability: loss and gradient of the divergence, and u f'(u)."""
    theta = POLICY.log().clone().requires_grad_()
    log_policy = theta.log_softmax(-1)
    weighted = rehearsal_loss(
        log_policy.unsqueeze(1), REFERENCE.log().unsqueeze(1), torch.ones(3, 1),
        divergence=rehearsal_divergence(name, alpha=alpha), reduction="seq-mean-token-sum",
    )  # fmt: skip
    divergence = rehearsal_divergence(name, alpha=alpha)
    ratios = log_policy - REFERENCE.log()
    expected = (REFERENCE * divergence.penalty(ratios, samples_from="reference")).sum()
    exact = {"forward_kl": kl, "js": lambda p, q: 2 * jsd(p, q), "reverse_kl": lambda p, q: kl(q, p)}.get(name)
    if exact is not None:
        slope = torch.autograd.grad(exact(REFERENCE.log(), log_policy), theta, retain_graph=True)[0]
        assert torch.allclose(torch.autograd.grad(expected, theta, retain_graph=True)[0], slope, atol=1e-10)
    log_u = ratios.detach().requires_grad_()
    slope = torch.autograd.grad(divergence.penalty(log_u, samples_from="reference").sum(), log_u)[0]
    u = ratios.detach().exp()
    closed = {
        "forward_kl": u - 1, "js": u * (2 * u / (1 + u)).log(), "alpha": (u - u ** (1 - alpha)) / alpha,
        "reverse_kl": u * u.log(),
    }  # fmt: skip
    assert torch.allclose(slope, closed[name], atol=1e-12)
    assert not torch.allclose(slope, closed["js" if name != "js" else "forward_kl"], atol=1e-3)
    plain = divergence.penalty(ratios, samples_from="reference").mean()
    assert torch.isclose(weighted, plain)


def tree():
    """Sequences of two steps: reference and policy log-probabilities [4, 2] of their tokens, and the law of each."""
    steps = {"ref": [0.7, 0.3, 0.6, 0.4, 0.1, 0.9], "pi": [0.4, 0.6, 0.5, 0.5, 0.3, 0.7]}
    found = []
    for who in ("ref", "pi"):
        all_steps = torch.tensor(steps[who], dtype=torch.float64).log()
        pairs = torch.stack([all_steps[:2].repeat_interleave(2), all_steps[2:]], 1)
        found += [pairs, pairs.sum(1).exp()]
    return found


def test_the_two_step_tree_of_the_card():
    reference, law, policy, _ = tree()
    mask = torch.ones(4, 2)

    def value(name, level):
        """The mean over the buffer, where each answer stands by its probability."""
        rows = [
            law[row] * rehearsal_loss(
                policy[[row]], reference[[row]], mask[:1], divergence=name, level=level,
                reduction="seq-mean-token-sum" if level == "token" else "token-mean",
            )
            for row in range(4)
        ]  # fmt: skip
        return sum(rows).item()

    assert value("forward_kl", "token") == pytest.approx(0.2327782838, abs=1e-10)
    assert value("forward_kl", "sequence") == pytest.approx(0.2327782838, abs=1e-10)
    assert value("js", "sequence") == pytest.approx(0.1224652476, abs=1e-10)
    assert value("js", "token") == pytest.approx(0.1189420758, abs=1e-10)


@pytest.mark.parametrize(
    ("name", "alpha", "rate"),
    [("reverse_kl", 0.2, 0.9801866627), ("forward_kl", 0.2, 0.8582575695), ("js", 0.2, 0.9959386520),
     ("alpha", 0.5, 0.9178696303)],
)  # fmt: skip
def test_at_the_optimum_correct_answers_keep_their_proportions(name, alpha, rate):
    reference = torch.tensor([0.2, 0.05, 0.6, 0.15], dtype=torch.float64)
    reward = torch.tensor([1.0, 1.0, 0.0, 0.0]).double()
    divergence = rehearsal_divergence(name, alpha=alpha)
    policy = f_regularised_policy(reference.log(), reward, divergence=divergence, beta=0.2).log_policy.exp()
    assert policy[:2].sum().item() == pytest.approx(rate, abs=1e-9)
    assert (policy[0] / policy[1]).item() == pytest.approx(4.0, abs=1e-12)


def test_far_ratios_stay_finite_and_forgotten_tokens_are_learned():
    log_u = torch.tensor([[-80.0, 30.0, 0.0]], requires_grad=True)
    for name in ("forward_kl", "js", "alpha", "reverse_kl"):
        loss = rehearsal_loss(log_u, torch.zeros(1, 3), torch.ones(1, 3), divergence=name)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, log_u)[0].isfinite().all()
    slope = torch.autograd.grad(rehearsal_loss(log_u, torch.zeros(1, 3), torch.ones(1, 3)), log_u)[0]
    assert slope[0, 0] == pytest.approx(-1 / 3)
    bounded = rehearsal_loss(log_u, torch.zeros(1, 3), torch.ones(1, 3), clamp=10.0)
    assert torch.autograd.grad(bounded, log_u)[0][0, 0] == 0.0, "the authors' bound stops learning what was forgotten"


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "skew_reverse_kl"])
def test_the_penalty_on_own_completions(name):
    divergence = f_divergence(name, alpha=0.5) if name.startswith("skew") else f_divergence(name)
    theta = POLICY.log().clone().requires_grad_()
    log_policy = theta.log_softmax(-1)
    weight = POLICY

    def slope(gradient):
        rows = [
            weight[y] * visited_penalty(
                log_policy[y].view(1, 1), REFERENCE.log()[y].view(1, 1), torch.ones(1, 1), divergence=divergence,
                gradient=gradient,
            )
            for y in range(3)
        ]  # fmt: skip
        return sum(rows), torch.autograd.grad(sum(rows), theta, retain_graph=True)[0]

    exact = divergence(REFERENCE.log(), log_policy)
    value, by_divergence = slope("divergence")
    assert torch.isclose(value, exact, atol=1e-12)
    expected = torch.autograd.grad(exact, theta, retain_graph=True)[0]
    assert torch.allclose(by_divergence, expected, atol=1e-10)
    value, by_value = slope("value")
    assert torch.isclose(value, exact, atol=1e-12)
    assert not torch.allclose(by_value, expected, atol=1e-3)


def test_js_by_definition_is_js():
    m = 0.5 * (REFERENCE + POLICY)
    ratio = (POLICY / REFERENCE).log()
    kept = (REFERENCE * f_divergence("skew_kl", alpha=0.5).penalty(ratio, samples_from="reference")).sum()
    seen = (POLICY * f_divergence("skew_reverse_kl", alpha=0.5).penalty(ratio, samples_from="model")).sum()
    assert kept.item() == pytest.approx(kl(REFERENCE.log(), m.log()).item(), abs=1e-12)
    assert seen.item() == pytest.approx(kl(POLICY.log(), m.log()).item(), abs=1e-12)
    assert (kept + seen).item() == pytest.approx(0.1811316999, abs=1e-9)


# --- the buffer ---


def completions(prompts, answers, temperature=1.0):
    """Rollouts of given tokens; the log-probability of each is minus the token."""
    from kullback.align._hf import collate_completions

    batch = collate_completions(prompts, answers, 0)
    rows, length = batch["completion_mask"].shape
    tokens = batch["input_ids"][:, -length:]
    return Rollouts(
        ids=batch["input_ids"], attention_mask=batch["attention_mask"], completion_mask=batch["completion_mask"],
        prompt_index=torch.arange(rows), log_probs=-tokens.float() * batch["completion_mask"],
        finished=torch.ones(rows, dtype=torch.bool), temperature=temperature,
    )  # fmt: skip


@pytest.fixture
def buffer():
    made = RehearsalBuffer()
    made.add(completions([[1], [2, 3], [4]], [[5, 6, 7], [8], [9, 9]]), torch.tensor([True, False, True]))
    made.add(completions([[7, 7, 7]], [[1]]), torch.tensor([1]))
    return made


def test_partition():
    correct = torch.tensor([[1] * 6 + [0] * 2, [1] * 5 + [0] * 3, [1] * 8, [0] * 8])
    mastered, exploring = partition_by_pass_rate(correct)
    assert (mastered.tolist(), exploring.tolist()) == ([0, 2], [1, 3])
    assert partition_by_pass_rate(correct, threshold=1.0).mastered.tolist() == [2]
    assert partition_by_pass_rate(correct, threshold=1.1).mastered.tolist() == []
    with pytest.raises(ConfigError):
        partition_by_pass_rate(correct, threshold=0.0)
    with pytest.raises(ShapeError):
        partition_by_pass_rate(correct[0])


def test_the_buffer_keeps_what_is_correct_as_it_was(buffer, tmp_path):
    assert len(buffer) == 3
    buffer.save(tmp_path / "deep" / "b.safetensors")
    for held in (buffer, RehearsalBuffer.load(tmp_path / "deep" / "b.safetensors")):
        rows = held.rows([2, 0])
        assert rows.ids.tolist() == [[7, 7, 7, 1, 0, 0], [0, 0, 1, 5, 6, 7]]
        assert rows.log_probs.tolist() == [[-1.0, 0.0, 0.0], [-5.0, -6.0, -7.0]]
        assert rows.completion_mask.tolist() == [[True, False, False], [True] * 3]
        assert rows.attention_mask.tolist() == [[True] * 4 + [False] * 2, [False] * 2 + [True] * 4]
        assert rows.prompt_index.tolist() == [0, 0]
        assert held.temperature == 1.0


def test_samples_repeat_nothing_before_all_came(buffer):
    drawn = buffer.sample(7, generator=stream(1))
    keys = [tuple(row[row > 0].tolist()) for row in drawn.ids]
    assert len(set(keys[:3])) == len(set(keys[3:6])) == 3
    again = buffer.sample(7, generator=stream(1))
    assert torch.equal(drawn.ids, again.ids)
    parts = [buffer.shard(rank, 2) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 1]
    assert parts[1].rows([0]).ids.tolist() == buffer.rows([1]).ids.tolist()


def test_what_the_buffer_refuses(buffer, tmp_path):
    rollouts = completions([[1]], [[2]])
    with pytest.raises(ConfigError, match="temperature"):
        buffer.add(completions([[1]], [[2]], temperature=0.5), torch.ones(1))
    with pytest.raises(ShapeError, match="correct"):
        buffer.add(rollouts, torch.ones(2))
    rollouts.log_probs[0, 0] = math.nan
    with pytest.raises(DataError, match="NaN"):
        buffer.add(rollouts, torch.ones(1))
    with pytest.raises(DataError, match="empty"):
        RehearsalBuffer().sample(1, generator=stream(0))
    with pytest.raises(DataError, match="no entries"):
        buffer.rows([])
    with pytest.raises(ConfigError):
        buffer.sample(0, generator=stream(0))
    with pytest.raises(ConfigError):
        buffer.shard(2, 2)
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        RehearsalBuffer.load(tmp_path / "bad")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(DataError, match="no rehearsal buffer"):
        RehearsalBuffer.load(tmp_path / "other")
    RehearsalBuffer().save(tmp_path / "empty")
    assert len(RehearsalBuffer.load(tmp_path / "empty")) == 0


def test_the_first_stage():
    """Prompt 10 is always solved, 11 never, 12 six times of eight and once more, 13 six times and then not."""
    asked = []

    def source(model, numbers, *, group, generator):
        asked.append((list(numbers), group))
        found = completions([[number] for number in numbers for _ in range(group)], [[1, 2]] * (len(numbers) * group))
        rates = {10: 8, 11: 0, 12: 6, 13: 6}
        if group == 1:
            return found, torch.tensor([0.0 if number == 13 else 1.0 for number in numbers])
        return found, torch.tensor([float(answer < rates[number]) for number in numbers for answer in range(group)])

    split, buffer = rehearse(source, None, [10, 11, 12, 13], generator=stream(0), batch=3)
    assert split.mastered.tolist() == [10, 12, 13]
    assert split.exploring.tolist() == [11]
    assert asked == [([10, 11, 12], 8), ([13], 8), ([10, 12, 13], 1)]
    assert len(buffer) == 2
    none, empty = rehearse(source, None, [11], generator=stream(0), threshold=1.5)
    assert len(none.mastered) == len(empty) == 0
    with pytest.raises(DataError):
        rehearse(source, None, [], generator=stream(0))


# --- the method ---


def sampled(rows=4, length=2):
    draws = stream(3)
    found = completions([[5, 5]] * rows, [[1, 2]] * rows)
    return {
        "input_ids": found.ids, "attention_mask": found.attention_mask, "completion_mask": found.completion_mask,
        "old_log_prob": -torch.rand(rows, length, generator=draws), "prompt_index": found.prompt_index,
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]),
    }  # fmt: skip


def joint(method, batch, shift=0.1):
    batch = method.prepare(batch, group=2, generator=stream(9))
    log_prob = (batch["old_log_prob"] + shift).requires_grad_()
    loss, metrics = method.loss(log_prob, batch, count=method.count(batch))
    return loss, torch.autograd.grad(loss, log_prob)[0], batch, metrics


def test_without_rehearsal_it_is_grpo_exactly(buffer):
    plain = Grpo(clip_high=0.28, dual_clip=3.0)
    expected = joint(plain, sampled())
    for method in (Dph(buffer=buffer, eta=0.0), Dph(buffer=RehearsalBuffer(), eta=0.5)):
        found = joint(method, sampled())
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert joint(Dph(buffer=buffer, eta=0.5), sampled())[0] != expected[0]


@pytest.mark.parametrize("name", ["forward_kl", "js"])
def test_the_joint_loss_is_the_sum_of_two_means(buffer, name):
    method = Dph(buffer=buffer, eta=0.5, rehearsed=3, divergence=name)
    loss, _, batch, metrics = joint(method, sampled())
    assert batch["input_ids"].shape == (7, 3 + 3)
    assert batch["rehearsal"].tolist() == [False] * 4 + [True] * 3
    rows = batch["rehearsal"]
    expected = buffer.sample(3, generator=after_one_draw(9))
    assert torch.equal(batch["input_ids"][rows], expected.ids)
    assert torch.equal(batch["attention_mask"][rows], expected.attention_mask)
    assert torch.equal(batch["reference_log_prob"][rows], expected.log_probs)
    plain = joint(Grpo(clip_high=0.28, dual_clip=3.0), sampled())[0]
    kept = rehearsal_loss(expected.log_probs + 0.1, expected.log_probs, expected.completion_mask, divergence=name)
    assert torch.isclose(loss, plain + 0.5 * kept)
    assert torch.isclose(metrics["rehearsal"], kept)
    assert metrics["reward"] == 0.5, "of sampled rows alone"
    assert method.count(batch) == 8


def after_one_draw(seed):
    source = stream(seed)
    torch.rand((), generator=source)
    return source


def test_micro_batches_share_one_count(buffer):
    method = Dph(buffer=buffer, eta=0.5)
    loss, _, batch, _ = joint(method, sampled())
    half = method.loss(batch["old_log_prob"] + 0.1, batch, count=2 * method.count(batch))[0]
    assert torch.isclose(half, loss / 2)


def test_mini_batches_have_their_share_of_both(buffer):
    method = Dph(buffer=buffer, policy=Grpo(clip_high=0.28, dual_clip=3.0, epochs=2, mini_batches=2), eta=0.5)
    assert (method.epochs, method.mini_batches) == (2, 2)
    batch = method.prepare(sampled(), group=2, generator=stream(9))
    parts = [rows_of_use(batch, use, method.mini_batches, seed=(0,)) for use in range(4)]
    for first, second in (parts[:2], parts[2:]):
        for name in ("input_ids", "old_log_prob", "advantages", "rehearsal"):
            both, whole = torch.cat([first[name], second[name]]), batch[name]
            assert torch.equal(both.flatten(1).sort(0).values if both.ndim > 1 else both.sort().values,
                               whole.flatten(1).sort(0).values if whole.ndim > 1 else whole.sort().values)  # fmt: skip
    moved = [method.loss(part["old_log_prob"] + 0.5, part, count=method.count(part))[1] for part in parts]
    assert max(metrics["clipped"].item() for metrics in moved) > 0.0, "ratios leave 1 from the second step on"


@pytest.mark.parametrize("visited", [0.0, 1.0])
def test_js_taken_apart(buffer, visited):
    method = Dph(buffer=buffer, eta=0.5, rehearsed=3, divergence="js", form="definition", visited=visited)
    assert method.needs_reference == (visited > 0)
    given = sampled() | {"reference_log_prob": torch.full((4, 2), -1.5)}
    loss, _, batch, _ = joint(method, given)
    assert torch.equal(batch["reference_log_prob"][:4, :2], given["reference_log_prob"])
    plain = joint(Grpo(clip_high=0.28, dual_clip=3.0), sampled())[0]
    rows, mask = batch["rehearsal"], batch["completion_mask"]
    log_prob = batch["old_log_prob"] + 0.1
    half = f_divergence("skew_kl", alpha=0.5)
    expected = plain + 0.5 * rehearsal_loss(log_prob[rows], log_prob[rows] - 0.1, mask[rows], divergence=half)
    if visited:
        other = f_divergence("skew_reverse_kl", alpha=0.5)
        expected += 0.5 * visited_penalty(
            log_prob[~rows], batch["reference_log_prob"][~rows], mask[~rows], divergence=other
        )
    assert torch.isclose(loss, expected)


def test_equal_rewards_leave_rehearsal_alone(buffer):
    batch = sampled() | {"rewards": torch.ones(4)}
    _, slope, batch, _ = joint(Dph(buffer=buffer, eta=0.5, rehearsed=3), batch)
    assert (slope[:4] == 0).all()
    assert (slope[4:][batch["completion_mask"][4:]] != 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"eta": -1.0}, {"rehearsed": -1}, {"visited": 1.5}, {"divergence": "kl"}, {"divergence": "alpha", "alpha": 1.0},
        {"form": "other"}, {"form": "definition"}, {"policy": Grpo(beta=0.1)},
    ],
)  # fmt: skip
def test_options_that_are_refused(options):
    with pytest.raises(ConfigError):
        Dph(buffer=RehearsalBuffer(), **options)


def test_what_the_losses_refuse():
    one = torch.ones(2, 2)
    for call, error in (
        (lambda: rehearsal_loss(one, one[:1], one), ShapeError),
        (lambda: rehearsal_loss(one, one * math.nan, one), DataError),
        (lambda: rehearsal_loss(one, one, one, level="word"), ConfigError),
        (lambda: rehearsal_loss(one, one, one, level="sequence", reduction=4), ConfigError),
        (lambda: rehearsal_loss(one, one, one, clamp=0.0), ConfigError),
        (lambda: visited_penalty(one, one, one, divergence=f_divergence("kl"), gradient="no"), ConfigError),
    ):
        with pytest.raises(error):
            call()
    empty = rehearsal_loss(one.requires_grad_(), one.detach() * math.nan, torch.zeros(2, 2))
    assert empty == 0.0
    assert empty.requires_grad
