"""Student and teacher over the whole vocabulary: chunks against whole logits, real models, and exact worlds."""

import math
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from kullback.align._hf_reference import LocalReference, check_reference, check_temperatures
from kullback.align.compared import TeacherStates, compared_completions, compared_from_hidden, teacher_states
from kullback.align.grpo import Grpo
from kullback.align.kdrl import BetaSchedule, Kdrl, exact_kd_terms, kd_terms, kdrl_loss, reverse_kl_top_k
from kullback.align.log_probs import completion_log_probs
from kullback.align.worlds import TabularPolicy, World
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.divergences import reverse_kl
from kullback.models.small import small_llama

DIVERGENCES = {
    "exact": reverse_kl_top_k,
    "top-k": partial(reverse_kl_top_k, kept=3),
    "of the teacher's": partial(reverse_kl_top_k, kept=3, support="teacher", tail="renormalise"),
}


def parts():
    draws = stream(1)
    shapes = ((3, 5, 8), (50, 8), (50,), (3, 5, 6), (50, 6))
    tensors = [torch.randn(*shape, generator=draws, dtype=torch.float64) for shape in shapes]
    ids, mask = torch.randint(50, (3, 5), generator=draws), torch.rand(3, 5, generator=draws) > 0.3
    return [tensor.requires_grad_() for tensor in tensors[:3]], TeacherStates(*tensors[3:]), ids, mask


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_chunks_give_values_and_gradients_of_whole_logits(divergence, chunk):
    (hidden, weight, bias), teacher, ids, mask = parts()
    student, other = (hidden @ weight.T + bias) / 0.7, teacher.hidden @ teacher.weight.T / 0.7
    chosen = student.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    expected = [torch.where(mask, part, 0.0) for part in (chosen, divergence(other, student))]
    found = compared_from_hidden(
        teacher, hidden, weight, ids, divergence=divergence, bias=bias, mask=mask, temperature=0.7, chunk=chunk
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
    slopes = [
        torch.autograd.grad(a.sin().sum() + b.square().sum(), [hidden, weight, bias]) for a, b in (found, expected)
    ]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_no_more_rows_of_logits_than_a_chunk_are_held_and_hidden_rows_cost_nothing():
    (hidden, weight, bias), teacher, ids, mask = parts()
    seen = []

    def recorded(other, student):
        seen.append(len(student))
        return reverse_kl_top_k(other, student)

    broken = hidden.detach().masked_fill(~mask.unsqueeze(-1), math.nan).requires_grad_()
    found = compared_from_hidden(teacher, broken, weight, ids, divergence=recorded, bias=bias, mask=mask, chunk=2)
    (slope,) = torch.autograd.grad(found.divergence.sum(), [broken])
    assert max(seen) == 2
    assert sum(seen) == 2 * mask.sum(), "once forward and once backward"
    assert (slope[~mask] == 0).all()
    assert slope[mask].abs().min() > 0


def capped(generator):
    """A model whose logits are no linear map of its hidden states."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(
        vocab_size=40, **sizes, num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.double().eval()


def llama(seed, hidden=16):
    made = small_llama(40, hidden=hidden, layers=1, heads=2, length=16, generator=stream(seed, "model"))
    with torch.no_grad():
        made.lm_head.weight.mul_(10)
    return made.double().eval()


@pytest.mark.parametrize("student", ["linear", "capped"])
@pytest.mark.parametrize("teacher", ["linear", "capped"])
def test_completions_of_models_with_any_head(student, teacher):
    draws = stream(2)
    ids = torch.randint(40, (3, 9), generator=draws)
    attention, held = torch.ones(3, 9, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    attention[1, 7:] = held[1, 2:] = False
    attention[0, :2] = student == "capped"  # whose own attention has no gradient beside padding on the left
    ids[:, -4:] %= 30
    given = (ids, attention, held)
    student = llama(0) if student == "linear" else capped(stream(3))
    teacher = llama(1, hidden=8) if teacher == "linear" else capped(stream(4))
    states = teacher_states(teacher, *given, vocabulary=30)
    found = compared_completions(
        student, *given, teacher=states, divergence=reverse_kl_top_k, temperature=0.5, vocabulary=30
    )
    alone = completion_log_probs(student, *given, temperature=0.5, vocabulary=30).log_probs
    torch.testing.assert_close(found.log_probs, alone)
    positions = (attention.long().cumsum(1) - 1).clamp(min=0)
    logits = [m(ids, attention_mask=attention.long(), position_ids=positions).logits for m in (student, teacher)]
    laws = [(z[:, -5:-1, :30] / 0.5).log_softmax(-1) for z in logits]
    exact = torch.where(held, reverse_kl(laws[1], laws[0]), 0.0)
    torch.testing.assert_close(found.divergence[held], exact[held])
    slopes = [
        torch.autograd.grad(value.sum(), next(student.parameters()), retain_graph=True)[0]
        for value in (found.divergence, exact)
    ]
    torch.testing.assert_close(*slopes)


def test_adapters_off_are_the_teacher_they_stand_on():
    peft = pytest.importorskip("peft")
    base = llama(0)
    ids, held = torch.randint(40, (2, 6), generator=stream(5)), torch.ones(2, 3, dtype=torch.bool)
    given = (ids, torch.ones_like(ids), held)
    plain = teacher_states(base, *given)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).train()
    found = LocalReference(adapted, adapters=True).states(*given)
    torch.testing.assert_close(found.hidden @ found.weight.T, plain.hidden @ plain.weight.T)
    assert adapted.training
    moved = teacher_states(adapted.eval(), *given)
    assert not torch.allclose(moved.hidden, plain.hidden, atol=1e-3), "with adapters it is another"


def world_laws(world, policy):
    """Laws [N, T, V] before each token of every sequence, and log-probabilities [N, T] of the tokens."""
    x = world.sequences()
    laws = torch.stack([policy.logits[0][:1].expand(len(x), -1), policy.logits[1][x[:, 0]]], 1).log_softmax(-1)
    return laws, laws.gather(-1, x.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_gradients_by_enumeration(divergence):
    """Token credit is the gradient with the prefixes' chances fixed; return-to-go that of the mean over the paths."""
    world, draws = World(4, 2), stream(0, "tables")
    student, teacher = (TabularPolicy(world, generator=draws, scale=1.0) for _ in range(2))
    laws, log_probs = world_laws(world, student)
    values = divergence(world_laws(world, teacher)[0].detach(), laws)
    chances = log_probs.sum(1).exp()
    fixed, whole = (chances.detach() * values.sum(1)).sum(), (chances * values.sum(1)).sum()
    parameters = list(student.logits)
    for credit, exact in (("token", fixed), ("return_to_go", whole)):
        wanted = torch.autograd.grad(exact, parameters, retain_graph=True)
        terms = exact_kd_terms(values, log_probs, credit=credit, mask=torch.ones(world.size, 2))
        torch.testing.assert_close(terms.detach(), values.detach())
        found = torch.autograd.grad((chances.detach() * terms.sum(1)).sum(), parameters, retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    if divergence is reverse_kl_top_k:
        of_wholes = torch.autograd.grad(reverse_kl(teacher.all_log_probs(), student.all_log_probs()), parameters)
        torch.testing.assert_close(found, of_wholes, atol=1e-12, rtol=0)
    other = torch.autograd.grad(fixed, parameters)
    assert not torch.allclose(other[0], found[0], atol=1e-3), "what the first token does to the second is lost"
    torch.testing.assert_close(other[1], found[1], atol=1e-12, rtol=0)


def test_k2_of_drawn_tokens_has_the_exact_gradient_in_the_mean_and_more_noise():
    world, draws = World(4, 2), stream(0, "tables")
    student, teacher = (TabularPolicy(world, generator=draws, scale=1.0) for _ in range(2))
    (laws, log_probs), (other, log_teacher) = (world_laws(world, policy) for policy in (student, teacher))
    weights = log_probs.sum(1).exp().detach()
    means, second = {}, {}
    terms = {
        "sampled": kd_terms(log_teacher.detach(), log_probs),
        "exact": exact_kd_terms(reverse_kl_top_k(other.detach(), laws), log_probs),
    }
    for name, term in terms.items():
        slopes = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(row.sum(), [*student.logits], retain_graph=True)])
            for row in term
        ])  # fmt: skip
        means[name] = weights @ slopes
        second[name] = (weights @ slopes.square()).sum()
    torch.testing.assert_close(means["sampled"], means["exact"], atol=1e-12, rtol=0)
    assert second["exact"] < 0.7 * second["sampled"]


def exact_batch():
    (hidden, weight, bias), teacher, ids, mask = parts()
    found = compared_from_hidden(teacher, hidden, weight, ids, divergence=reverse_kl_top_k, bias=bias, mask=mask)
    mask[0, 0] = True
    return found, mask


def test_the_loss_with_whole_laws():
    (log_student, divergences), mask = exact_batch()
    advantages = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    keep = torch.tensor([True, False, True])
    found = kdrl_loss(None, log_student, advantages, mask, beta=0.3, keep=keep, divergences=divergences)
    heard = mask & keep[:, None]
    assert found.distillation.item() == pytest.approx(divergences[heard].mean().item())
    assert found.divergence.item() == pytest.approx(divergences[mask].mean().item())
    assert found.loss.item() == pytest.approx(found.policy.item() + 0.3 * found.distillation.item())
    for wrong in ({"kind": "k3"}, {"most_log_ratio": 3.0}):
        with pytest.raises(ConfigError, match="leave them out"):
            kdrl_loss(None, log_student, advantages, mask, beta=0.3, divergences=divergences, **wrong)
    with pytest.raises(ConfigError, match="missing"):
        kdrl_loss(None, log_student, advantages, mask, beta=0.3)


def test_an_end_token_that_the_teacher_does_not_know():
    """Its own chance there says nothing; with the token left out the rest is compared as laws of their own."""
    draws = stream(6)
    teacher, student = torch.randn(2, 5, 12, generator=draws, dtype=torch.float64)
    teacher[:, 7] = -50.0
    method = Kdrl(divergence="exact", unheard=(7,))
    others = [i for i in range(12) if i != 7]
    expected = reverse_kl_top_k(teacher[:, others], student[:, others])
    torch.testing.assert_close(method.compares(teacher, student), expected)
    assert (Kdrl(divergence="exact").compares(teacher, student) > expected + 1.0).any()
    ids = torch.tensor([[1, 2, 3, 7], [1, 2, 7, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    batch = {"rewards": torch.tensor([0.0, 1.0]), "completion_mask": mask, "input_ids": ids}
    heard = Kdrl(unheard=(7,)).prepare(batch, group=2, generator=stream(0))["heard"]
    assert heard.tolist() == [[True, True, False], [True, False, False]]
    assert Kdrl().prepare(batch, group=2, generator=stream(0))["heard"].equal(mask)


def test_masks_are_means_over_the_whole_step():
    """However a step is cut into micro-batches and processes; listed wrong: each by what it holds itself."""
    draws = stream(7)
    student, teacher = -torch.rand(2, 8, 4, generator=draws, dtype=torch.float64)
    rewards, mask = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]), torch.rand(8, 4, generator=draws) > 0.3
    method = Kdrl(keep="response")
    whole = {"rewards": rewards, "completion_mask": mask, "old_log_prob": student, "reference_log_prob": teacher}
    prepared = method.prepare(whole, group=4, generator=stream(0))
    count = method.count(prepared)
    expected = method.loss(student, prepared, count=count)[1]["distillation"]
    parts = [
        method.prepare({k: v[rows] for k, v in whole.items()}, group=4, generator=stream(0))
        for rows in (slice(0, 4), slice(4, 8))
    ]
    alone = sum(method.loss(p["old_log_prob"], p, count=count)[1]["distillation"] for p in parts)
    assert abs(alone - expected) > 1e-3
    # Two processes of a micro-batch each: the sum over processes is what both have.
    both = sum(torch.stack([p["heard"].sum(), p["completion_mask"].sum()]).double() for p in parts)
    settled = [method.settle([p], step=0, total=lambda counts: both)[0] for p in parts]
    for found in (settled, method.settle(parts, step=0, total=lambda counts: counts)):
        together = sum(method.loss(p["old_log_prob"], p, count=count)[1]["distillation"] for p in found)
        torch.testing.assert_close(together, expected)


def test_weights_are_those_of_the_optimiser_step_even_where_completions_serve_for_several():
    draws = stream(8)
    student, teacher = -torch.rand(2, 4, 3, generator=draws, dtype=torch.float64)
    given = {"completion_mask": torch.ones(4, 3), "old_log_prob": student - 0.1, "reference_log_prob": teacher}
    given |= {"rewards": torch.tensor([1.0, 0, 0, 1]), "step": torch.tensor(4)}
    schedule = BetaSchedule(kind="switch", start=0.3, end=0.0, steps=5)
    method = Kdrl(schedule=schedule, reward_from=5, policy=Grpo(epochs=2))
    drawn = method.prepare(given, group=4, generator=stream(0))
    told = []
    for step in (4, 5):
        (batch,) = method.settle([drawn], step=step, total=lambda counts: counts)
        told.append(method.loss(student, batch, count=12.0)[1])
    assert [metrics["beta"].item() for metrics in told] == [pytest.approx(0.3), 0.0]
    assert told[0]["policy"] == 0.0
    assert told[1]["policy"] != 0.0
    assert told[1]["ratio"].item() == pytest.approx(math.exp(0.1))


def test_what_cannot_work_is_said():
    (hidden, weight, _), teacher, ids, _ = parts()
    with pytest.raises(ShapeError, match="49 tokens and the student's 50"):
        compared_from_hidden(
            teacher._replace(weight=teacher.weight[:49]), hidden, weight, ids, divergence=reverse_kl_top_k
        )
    with pytest.raises(ShapeError, match="speaks of"):
        compared_from_hidden(
            teacher._replace(hidden=teacher.hidden[:2]), hidden, weight, ids, divergence=reverse_kl_top_k
        )
    with pytest.raises(ConfigError, match="temperature"):
        compared_from_hidden(teacher, hidden, weight, ids, divergence=reverse_kl_top_k, temperature=0.0)
    with pytest.raises(ConfigError, match="drawn tokens alone"):
        check_reference(Kdrl(divergence="exact"), lambda *given: torch.zeros(1, 1))
    check_reference(Kdrl(), lambda *given: torch.zeros(1, 1))
    with pytest.raises(ConfigError, match=r"the reference has temperature 0\.7 and the policy 1"):
        check_temperatures(1.0, reference=LocalReference(llama(0), temperature=0.7))
    for wrong, words in (
        ({"divergence": "whole"}, "sampled, exact or"), ({"top_k": 3}, "top_k"), ({"divergence": "top-k"}, "None"),
        ({"divergence": "exact", "support": "teacher"}, "top-k"), ({"divergence": "top-k", "top_k": 0}, "kept"),
        ({"divergence": "exact", "shaping": "reward"}, "leave them out"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            Kdrl(**wrong)
    with pytest.raises(ConfigError, match="credit"):
        exact_kd_terms(torch.zeros(1, 2), torch.zeros(1, 2), credit="all")
    empty = {"rewards": torch.zeros(2), "completion_mask": torch.zeros(2, 3, dtype=torch.bool)}
    with pytest.raises(DataError, match="no completion"):
        Kdrl().prepare(empty, group=2, generator=stream(0))
