"""PLD as a module, as the objective of a language model, and inside a Trainer of classifiers."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.rng import generator as stream
from kullback.core.types import TeacherOutput
from kullback.distill import PLDLoss, PLDTrainer, pld_objective
from kullback.distill.objective import Objective
from kullback.distill.top_k import keep_top
from kullback.divergences import kl
from kullback.divergences.plackett_luce import pld_loss

B, T, H, V = 3, 5, 8, 11
F64 = torch.float64


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


@pytest.fixture
def rows(generator):
    """Teacher and student logits [2, 3, V] and labels [2, 3], of which two do not count."""
    teacher, student = 2 * torch.randn(2, 2, 3, V, generator=generator, dtype=F64)
    labels = torch.randint(V, (2, 3), generator=generator)
    labels[0, 1] = labels[1, 2] = -100
    return teacher, student, labels


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 2.0}, {"topk": 4}, {"weights": "uniform"}, {"weights": torch.linspace(1, 0, V, dtype=F64)}],
)
def test_a_kept_ranking_gives_the_loss_and_the_gradient(rows, options):
    teacher, student, labels = rows
    student.requires_grad_()
    loss = PLDLoss(**options)
    at_once, kept = loss(teacher, student, labels), loss.of_ranking(loss.ranking(teacher, labels), student, labels)
    close(at_once, pld_loss(teacher, student, labels, **options))
    close(kept, at_once)
    close(*(torch.autograd.grad(value, student)[0] for value in (at_once, kept)))
    close(loss.of_ranking(loss.ranking(teacher, labels), student, labels, count=8), at_once / 2)


def test_rows_that_do_not_count_may_hold_anything(rows):
    teacher, student, labels = rows
    loss = PLDLoss()
    clean = loss(teacher, student, labels)
    for logits in (teacher, student):
        logits[labels == -100] = torch.nan
    ranking = loss.ranking(teacher, labels)
    close(loss.of_ranking(ranking, student, labels), clean)
    assert ranking.weights[labels == -100].eq(0).all()
    assert ranking.order.dtype == torch.int16
    with pytest.raises(ShapeError, match="rows"):
        loss.of_ranking(ranking, student[0], labels[0])


def test_weights_by_rank_move_with_the_module():
    loss = PLDLoss(weights=torch.ones(V))
    assert loss.to(F64).weights.dtype == F64
    assert PLDLoss().weights == "teacher"
    assert repr(loss) == "PLDLoss(temperature=1.0, weights=by rank, topk=None)"


# --- the objective of a language model


@pytest.fixture
def parts(generator):
    """Teacher and student states with their heads, and labels [B, T] of which some do not count."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 2] = labels[2, 1:4] = -100
    return {"teacher": normal(B, T, H + 1), "head": normal(V, H + 1), "student": normal(B, T, H),
            "weight": normal(V, H), "labels": labels}  # fmt: skip


def definition(parts, logits, count, *, shifted=1, share=0.0, **options):
    """The mean over the tokens that count, each predicted from the position before."""
    teacher = parts["teacher"] @ parts["head"].T
    total, number = 0.0, 0
    for b in range(B):
        for position in range(T - 1):
            if parts["labels"][b, position + 1] == -100:
                continue
            label = parts["labels"][b, position + shifted].clamp(min=0)
            pld = pld_loss(teacher[b, position], logits[b, position], label, **options)
            total = total + (1 - share) * pld - share * logits[b, position].log_softmax(-1)[label]
            number += 1
    return total / (count or number)


@pytest.mark.parametrize("options", [{}, {"topk": 3}, {"temperature": 2.0, "cross_entropy": 0.3}])
@pytest.mark.parametrize("count", [None, 40])
def test_every_way_in_gives_the_definition(parts, options, count):
    objective = pld_objective(**options)
    student, weight = (parts[name].clone().requires_grad_() for name in ("student", "weight"))
    its = {("share" if name == "cross_entropy" else name): value for name, value in options.items()}
    expected = definition(parts, student @ weight.T, count, **its)
    wanted = torch.autograd.grad(expected, (student, weight))
    for target in (
        TeacherOutput(hidden=parts["teacher"], weight=parts["head"]),
        TeacherOutput(logits=parts["teacher"] @ parts["head"].T),
    ):
        for hidden, head in ((student, {"weight": weight}), (student @ weight.T, {})):
            loss = objective.loss(target, hidden, parts["labels"], count=count, **head)
            close(loss, expected)
            for found, right in zip(torch.autograd.grad(loss, (student, weight)), wanted, strict=True):
                close(found, right)


def test_the_definition_tells_a_shifted_label_apart(parts):
    logits = parts["student"] @ parts["weight"].T
    assert abs(definition(parts, logits, None) - definition(parts, logits, None, shifted=0)) > 1e-3
    assert abs(definition(parts, logits, None) - definition(parts, logits, None, topk=2)) > 1e-3


def test_nothing_counted_gives_zero_and_a_live_gradient(parts):
    student = parts["student"].requires_grad_()
    target = TeacherOutput(hidden=parts["teacher"], weight=parts["head"])
    labels = torch.full((B, T), -100)
    for hidden, head in ((student, {"weight": parts["weight"]}), (student @ parts["weight"].T, {})):
        loss = pld_objective().loss(target, hidden, labels, **head)
        assert loss == 0.0
        assert torch.autograd.grad(loss, student)[0].eq(0).all()


def test_halves_are_widened(parts):
    low = {name: value.bfloat16() if value.is_floating_point() else value for name, value in parts.items()}
    target = TeacherOutput(hidden=low["teacher"], weight=low["head"])
    loss = pld_objective().loss(target, low["student"], low["labels"], weight=low["weight"])
    assert loss.dtype == torch.float32
    wide = definition(parts, parts["student"] @ parts["weight"].T, None)
    assert loss.item() == pytest.approx(wide.item(), rel=0.02)


def test_what_cannot_be_is_said(parts):
    objective = pld_objective()
    assert not objective.needs_whole_teacher
    assert not Objective(divergence=kl).needs_labels
    top = keep_top(torch.zeros(B, T, V).log_softmax(-1), 3)
    truncated = TeacherOutput(top_ids=top[0], top_log_probs=top[1], tail_log_prob=top[2])
    with pytest.raises(ConfigError, match="how probable the teacher finds the label"):
        objective.loss(truncated, parts["student"], parts["labels"], weight=parts["weight"])
    bare = Objective(divergence=kl, row_term=partial(pld_loss, reduction="none"))
    assert bare.needs_whole_teacher
    with pytest.raises(ConfigError, match="truncated"):
        bare.loss(truncated, parts["student"], parts["labels"], weight=parts["weight"])
    with pytest.raises(ConfigError, match="own samples"):
        objective.on_own_samples()
    with pytest.raises(ConfigError, match="bind a temperature"):
        Objective(divergence=kl, row_term=partial(pld_loss, reduction="none"), temperature=2.0)
    with pytest.raises(ConfigError, match="weights are"):
        pld_objective(weights="rising")


# --- inside a Trainer


class Classifier(nn.Module):
    """Logits of 6 inputs by a linear map, in a half of precision if asked."""

    def __init__(self, seed, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(6, 4, dtype=dtype)
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=stream(seed, "classifier")))

    def forward(self, inputs, labels=None):
        return SequenceClassifierOutput(logits=self.linear(inputs.to(self.linear.weight.dtype)))


@pytest.fixture
def items(generator):
    inputs, labels = torch.randn(16, 6, generator=generator), torch.randint(4, (16,), generator=generator)
    labels[3] = -100
    return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def collate(batch):
    return {name: torch.stack([item[name] for item in batch]) for name in batch[0]}


def trained(tmp_path, items, batch=8, **options):
    """A student after one step, trained on all items at once, in micro-batches of `batch`."""
    student = Classifier(1)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=16 // batch,
        learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, weight_decay=0.0,
        report_to=[], use_cpu=True, remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = PLDTrainer(model=student, args=arguments, train_dataset=items, data_collator=collate, **options)
    with torch.random.fork_rng():
        trainer.train()
    return trainer


def test_a_trainer_takes_the_step_of_the_loss(tmp_path, items):
    teacher, student = Classifier(0), Classifier(1)
    whole = collate(items)
    loss = PLDLoss(temperature=2.0)
    loss(teacher(whole["inputs"]).logits.detach(), student(whole["inputs"]).logits, whole["labels"]).backward()
    wanted = student.linear.weight.detach() - 0.1 * student.linear.weight.grad
    for batch in (16, 8):
        trainer = trained(tmp_path, items, batch, teacher=teacher, loss=loss)
        close(trainer.model.linear.weight.detach(), wanted, 1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    kept = loss.ranking(teacher(whole["inputs"]).logits, whole["labels"])
    ranked = [{**item, "order": o, "weights": w} for item, o, w in zip(items, *kept, strict=True)]
    trainer = trained(tmp_path, ranked, loss=loss)
    close(trainer.model.linear.weight.detach(), wanted, 1e-6)
    evaluated = trainer.evaluate(ranked)["eval_loss"]
    assert 0 < evaluated < loss(teacher(whole["inputs"]).logits, Classifier(1)(whole["inputs"]).logits, whole["labels"])


def test_a_teacher_in_halves_trains(tmp_path, items):
    trainer = trained(tmp_path, items, teacher=Classifier(0, torch.bfloat16))
    assert trainer.model.linear.weight.isfinite().all()


def test_a_trainer_without_a_teacher_says_so(tmp_path, items):
    with pytest.raises(ConfigError, match="this batch holds inputs, labels alone"):
        trained(tmp_path, items)
