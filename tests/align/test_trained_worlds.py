"""Methods inside the room's Trainer on a small transformer whose sixteen completions are enumerated: where they end."""

import pytest
import torch
from transformers import TrainingArguments

from kullback.align._hf import AlignTrainer, frozen_reference, index_items
from kullback.align.f_dpg import FDpg
from kullback.align.grpo import Grpo
from kullback.align.kdrl import BetaSchedule, Kdrl
from kullback.align.log_probs import completion_log_probs
from kullback.align.nash_policy import NashPolicy, judged
from kullback.align.ppo import Ppo
from kullback.align.proposals import ProposalContest
from kullback.align.scored import ScoredRollouts
from kullback.align.worlds import World
from kullback.core.rng import generator
from kullback.divergences import kl
from kullback.models.small import small_llama

WORLD, PROMPT = World(4, 2), [4]
REWARDS = torch.rand(WORLD.size, generator=generator(1, "rewards"), dtype=torch.float64)


def table(prompts, completions):
    """The reward of a completion, which is written as its digits."""
    return [REWARDS[WORLD.index(torch.tensor([int(digit) for digit in text]))].item() for text in completions]


def made():
    model = small_llama(5, hidden=16, layers=1, heads=2, length=4, generator=generator(0, "model"))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that the law at the start is far from even
    return model


def law(model):
    """Log-probabilities [16] of all completions."""
    x = WORLD.sequences()
    ids = torch.cat([torch.tensor([PROMPT]).expand(len(x), 1), x], 1)
    with torch.no_grad():
        held = torch.ones_like(x, dtype=torch.bool)
        found = completion_log_probs(model, ids, torch.ones_like(ids), held, vocabulary=4)
    return found.log_probs.double().sum(1)


def trained(folder, method, *, steps=90, group=128, rate=1e-2, reward=table, change=None):
    """The law at the end and that of the reference."""
    policy, first = made(), made()
    source = ScoredRollouts(
        prompts=[PROMPT], texts=["p"], reward=reward, length=2, vocabulary=4,
        decode=lambda row: "".join(map(str, row)),
    )  # fmt: skip
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=1, learning_rate=rate, report_to=[], logging_steps=50,
        save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True, lr_scheduler_type="linear",
        average_tokens_across_devices=True,
    )  # fmt: skip
    trainer = AlignTrainer(
        model=policy, args=arguments, train_dataset=index_items([0] * 8), method=method, rollouts=source, group=group,
        vocabulary=4, reference=frozen_reference(first, vocabulary=4), reference_model=first,
    )  # fmt: skip
    if change is not None:
        change(trainer)
    trainer.train()
    return law(policy), law(first), trainer


@pytest.mark.parametrize("defence", [0.0, 0.1])
def test_a_past_policy_as_proposal_leads_to_the_target(defence, tmp_path):
    method = FDpg(beta=0.3, proposal="offline", defence=defence, contest=ProposalContest(every=5))
    end, start, _ = trained(tmp_path, method)
    target = (start + REWARDS / 0.3).log_softmax(0)
    assert kl(target, end) < 0.03 * kl(target, start)
    exact = (start + REWARDS / 0.3).logsumexp(0).item()
    assert method.partition.log_partition().item() == pytest.approx(exact, abs=0.05)


def test_a_pseudo_reward_of_the_proposal_is_caught(tmp_path):
    """Listed wrong: -f' of q / p in place of pi / p, which no move of the policy ever changes."""

    class Wrong(FDpg):
        def prepare(self, batch, **options):
            return FDpg.prepare(self, {**batch, "policy_log_prob": batch["old_log_prob"]}, **options)

    method = Wrong(beta=0.3, proposal="offline", contest=ProposalContest(every=1000))
    end, start, _ = trained(tmp_path, method, steps=60)
    target = (start + REWARDS / 0.3).log_softmax(0)
    assert kl(target, end) > 0.3 * kl(target, start)
    right = FDpg(beta=0.3, proposal="offline", contest=ProposalContest(every=1000))
    end, start, _ = trained(tmp_path, right, steps=60)
    assert kl(target, end) < 0.03 * kl(target, start)


@pytest.mark.parametrize(
    ("options", "left"),
    [({}, 0.05), ({"critic": "model", "critic_rate": 1.0}, 0.05), ({"epochs": 2, "mini_batches": 2}, 0.12)],
)
def test_ppo_ends_at_the_tilted_optimum(options, left, tmp_path):
    """With several steps from the same completions there are a quarter of them only."""
    end, start, trainer = trained(tmp_path, Ppo(beta=0.3, **options), steps=120)
    target = (start + REWARDS / 0.3).log_softmax(0)
    assert kl(target, end) < left * kl(target, start)
    assert trainer.state.log_history[-2]["metric/explained"] > 0.0, "the critic knows something"


def test_a_critic_that_has_seen_the_token_is_caught(tmp_path):
    """Listed wrong: the value after a token in the place of that before it."""

    def change(trainer):
        right = trainer.critic.forward
        trainer.critic.forward = lambda hidden, *given: right(torch.cat([hidden[:, 1:], hidden[:, -1:]], 1), *given)

    end, start, _ = trained(tmp_path, Ppo(beta=0.3), change=change)
    target = (start + REWARDS / 0.3).log_softmax(0)
    assert kl(target, end) > 0.15 * kl(target, start)


@pytest.mark.parametrize("options", [{"divergence": "exact"}, {"divergence": "top-k", "top_k": 3}, {}])
def test_reward_and_teacher_in_one_end_at_the_tilted_teacher(options, tmp_path):
    """Of plain advantages and the divergence of whole completions; K = 3 of 4 tokens and a rest are all of them."""
    policy = Grpo(scale="none")
    whole = Kdrl(schedule=BetaSchedule(start=0.08), credit="return_to_go", policy=policy, **options)
    end, start, trainer = trained(tmp_path, whole)
    target = (start + REWARDS / 0.08).log_softmax(0)
    assert kl(target, end) < 0.06 * kl(target, start)
    said = trainer.state.log_history[-2]["metric/divergence"]
    assert said == pytest.approx(kl(end, start).item() / 2, rel=0.1), "a token of two, at the last steps"


def test_divergences_without_the_path_are_caught(tmp_path):
    """Listed wrong for whole completions, and what the paper does: each token's divergence with its prefix fixed."""
    method = Kdrl(schedule=BetaSchedule(start=0.08), divergence="exact", policy=Grpo(scale="none"))
    end, start, _ = trained(tmp_path, method)
    target = (start + REWARDS / 0.08).log_softmax(0)
    assert kl(target, end) > 0.09 * kl(target, start)


KINDS = WORLD.sequences().sum(1) % 3
BEATS = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)[KINDS[:, None], KINDS]


def circular(prompts, firsts, seconds):
    """The chances of a judge in whose eyes three kinds of completions beat each other in a circle."""
    first, second = (WORLD.index(torch.tensor([[int(x) for x in text] for text in side])) for side in (firsts, seconds))
    return BEATS[first, second]


def mixed(log_policy, log_reference, share):
    """The law [16] of the mixture token by token."""
    steps = []
    for whole in (log_policy, log_reference):
        pairs = whole.view(4, 4)
        steps.append((pairs.logsumexp(1), pairs.log_softmax(1)))
    first, second = (((1 - share) * a + share * b).log_softmax(-1) for a, b in zip(*steps, strict=True))
    return (first.unsqueeze(1) + second).flatten()


def fixed_point(start, beta, opponent):
    """pi = ref exp(P(. > mu(pi)) / beta) / Z, by iteration with damping."""
    policy = start
    for _ in range(4000):
        goal = (start + BEATS @ opponent(policy).exp() / beta).log_softmax(0)
        policy = (0.98 * policy + 0.02 * goal).log_softmax(0)
    assert (policy - goal).abs().max() < 1e-9
    return policy


@pytest.mark.parametrize(
    ("beta", "options"),
    [(0.1, {"mode": "nash-md", "mixture": 0.8}), (0.3, {"mode": "nash-ema", "decay": 0.5}),
     (0.2, {"mode": "nash-prox", "inner": 5})],
)  # fmt: skip
def test_nash_learning_ends_at_its_fixed_point(beta, options, tmp_path):
    method = NashPolicy(beta=beta, preferences="given", **options)
    group = 128 if method.opponents(4) else 96
    end, start, _ = trained(tmp_path, method, steps=100, group=group, reward=judged(circular))
    plain = exact = fixed_point(start, beta, lambda policy: policy)
    if options["mode"] == "nash-md":
        exact = fixed_point(start, beta, lambda policy: mixed(policy, start, 0.8))
        assert kl(plain, end) > 5 * kl(exact, end), "listed wrong: opponents that the policy itself draws"
    assert kl(exact, end) < 0.08 * kl(exact, start)
