"""SinKD against a naive copy of what was released, its laws, the whole objective, and two processes."""

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.distill.sinkd import RELEASED, SinkhornKD, gather_rows, sinkd_loss

F64 = torch.float64


@pytest.fixture
def logits(generator):
    """Teacher and student logits [6, 5]."""
    return torch.randn(2, 6, 5, generator=generator, dtype=F64).mul(2).unbind()


def close(ours, expected, atol=1e-12):
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


# --- the released loss, and wrong ones that the same check rejects


def naive(teacher, student, *, tau=2.0, eps=0.1, n_iters=20, dim=-1, p=1, mass=1.0, columns_first=False):
    """The loss as the card describes the released code; every option but tau, eps and n_iters makes it wrong."""
    s, t = (student / tau).softmax(dim), (teacher / tau).softmax(dim)
    cost = torch.cdist(s, t, p=p)
    plan = torch.exp(-cost / eps)
    for _ in range(n_iters):
        for axis in (0, 1) if columns_first else (1, 0):
            plan = plan / plan.sum(axis, keepdim=True)
    return mass * (plan * cost).sum()


def check_loss(loss, teacher, student):
    """Value and gradient are those of the released loss."""
    student = student.clone().requires_grad_()
    for tau, eps, n_iters in [(2.0, 0.1, 20), (1.0, 0.1, 3)]:
        ours = loss(teacher, student, tau=tau, eps=eps, n_iters=n_iters)
        expected = naive(teacher, student, tau=tau, eps=eps, n_iters=n_iters)
        close(ours, expected, 1e-10)
        close(*(torch.autograd.grad(value, student)[0] for value in (ours, expected)), 1e-10)


def test_equals_the_released_loss(logits):
    check_loss(partial(sinkd_loss, gradient="unroll"), *logits)


@pytest.mark.parametrize(
    "wrong",
    [
        partial(naive, dim=0),
        partial(naive, mass=1 / 6),
        partial(naive, p=2),
        partial(naive, columns_first=True),
        lambda teacher, student, tau, **options: naive(teacher, student, tau=1.5, **options),
        lambda teacher, student, **options: naive(student, teacher, **options),
        lambda teacher, student, **options: sinkd_loss(teacher, student, estimator="entropic", **options),
    ],
)
def test_the_check_rejects_wrong_losses(wrong, logits):
    with pytest.raises(AssertionError):
        check_loss(wrong, *logits)


def test_the_default_gradient_is_near_the_unrolled_one_at_the_released_constants(logits):
    teacher, student = logits
    student.requires_grad_()
    fast, unrolled = (
        torch.autograd.grad(sinkd_loss(teacher, student, gradient=gradient), student)[0]
        for gradient in ("envelope", "unroll")
    )
    assert (fast - unrolled).norm() < 3e-3 * unrolled.norm()


# --- laws


def test_blind_to_the_order_of_the_students_rows(logits, generator):
    teacher, student = logits
    order = torch.randperm(6, generator=generator)
    for estimator in ("sharp", "entropic", "debiased"):
        loss = partial(sinkd_loss, teacher, estimator=estimator, n_iters=500)
        close(loss(student[order]), loss(student), 1e-12)
    assert abs(sinkd_loss(teacher, teacher[order], estimator="debiased").item()) < 1e-9


def test_the_teacher_is_a_constant(logits):
    teacher, student = (x.requires_grad_() for x in logits)
    for mode in ("batchwise", "samplewise"):
        sinkd_loss(teacher, student, mode=mode).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("mode", ["batchwise", "samplewise"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_mask_is_slicing_and_positions_are_rows(mode, reduction, generator):
    teacher, student = torch.randn(2, 3, 4, 5, generator=generator, dtype=F64)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
    teacher[mask == 0] = math.nan
    kept = mask.bool()
    loss = partial(sinkd_loss, mode=mode, reduction=reduction)
    close(loss(teacher, student, mask=mask), loss(teacher[kept], student[kept]), 0)
    (gradient,) = torch.autograd.grad(loss(teacher, student.requires_grad_(), mask=mask), student)
    assert gradient[~kept].eq(0).all()
    assert gradient[kept].ne(0).all()


def test_the_sum_is_the_mean_times_the_rows(logits):
    for mode in ("batchwise", "samplewise"):
        total, mean = (sinkd_loss(*logits, mode=mode, reduction=reduction) for reduction in ("sum", "mean"))
        close(total, 6 * mean)


def test_samplewise_tends_to_total_variation(logits):
    teacher, student = logits
    half_l1 = 0.5 * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)
    value = sinkd_loss(teacher, student, mode="samplewise", tau=1.0, eps=0.01, n_iters=2000)
    close(value, half_l1.sum(), 1e-4)


def test_samplewise_takes_a_ground_cost_between_classes():
    line = torch.arange(5, dtype=F64)
    ground = (line.unsqueeze(0) - line.unsqueeze(1)).abs()
    teacher, student = 50 * torch.eye(5, dtype=F64)[[0, 4]], 50 * torch.eye(5, dtype=F64)[[3, 3]]
    value = sinkd_loss(teacher, student, mode="samplewise", ground=ground, tau=1.0, reduction="mean")
    close(value, torch.tensor(2.0, dtype=F64), 1e-8)  # three and one steps


@pytest.mark.parametrize("cost", ["l1", "l2", "squared", "cosine"])
def test_regression_heads_compare_raw_outputs(cost, generator):
    teacher, student = torch.randn(2, 7, 3, generator=generator, dtype=F64)
    value = sinkd_loss(teacher, student, tau=None, cost=cost, eps=0.5, estimator="debiased", n_iters=500)
    assert value.item() > 1e-3
    assert sinkd_loss(teacher, teacher, tau=None, cost=cost, estimator="debiased").abs().item() < 1e-9
    assert torch.autograd.gradcheck(
        lambda student: sinkd_loss(teacher, student, tau=None, cost=cost, eps=2.0, n_iters=200),
        student.requires_grad_(),
    )


def test_limit_draws_rows_by_the_generator(generator):
    teacher, student = torch.randn(2, 4, 10, 5, generator=generator)
    draw = lambda seed: sinkd_loss(  # noqa: E731
        teacher, student, limit=8, generator=torch.Generator().manual_seed(seed), reduction="mean"
    )
    assert draw(0) == draw(0) != draw(1)
    everything = sinkd_loss(teacher, student, reduction="mean")
    close(sinkd_loss(teacher, student, limit=40, reduction="mean"), everything, 0)
    drawn = torch.stack([draw(seed) for seed in range(40)])
    assert drawn.mean().item() == pytest.approx(everything.item(), rel=0.3)


def test_halves_are_widened(logits):
    teacher, student = (x.bfloat16() for x in logits)
    value = sinkd_loss(teacher, student.requires_grad_())
    assert value.dtype == torch.float32
    close(value, sinkd_loss(teacher.float(), student.float()), 0)
    value.backward()
    assert student.grad.dtype == torch.bfloat16


def test_descends_to_the_teacher(generator):
    teacher = 3 * torch.randn(8, 4, generator=generator)
    student = torch.zeros(8, 4, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    with torch.no_grad():
        student += 0.1 * torch.randn(8, 4, generator=generator)
    first = None
    for _ in range(300):
        optimizer.zero_grad()
        loss = sinkd_loss(teacher, student, estimator="debiased")
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    assert loss.item() < 0.05 * first


# --- the objective


def test_the_terms_are_those_of_the_paper(logits):
    teacher, student = logits
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    terms = SinkhornKD(alpha=0.8, kd_temperature=3.0, weight=0.01)(teacher, student, labels)
    close(terms["cross_entropy"], F.cross_entropy(student, labels))
    soft = -((teacher / 3).softmax(-1) * (student / 3).log_softmax(-1)).sum(-1).mean()
    close(terms["distillation"], soft)
    close(terms["sinkhorn"], naive(teacher, student), 1e-10)
    close(terms["loss"], 0.2 * terms["cross_entropy"] + 0.8 * soft + 0.01 * terms["sinkhorn"])
    t0 = SinkhornKD(alpha=0.1, cross_entropy=1.0, kd_temperature=3.0)(teacher, student, labels)
    close(t0["loss"], terms["cross_entropy"] + 0.1 * soft + 8e-4 * terms["sinkhorn"])


def test_labels_of_minus_100_are_left_out(generator):
    teacher, student = torch.randn(2, 2, 4, 5, generator=generator, dtype=F64)
    labels = torch.tensor([[1, 2, -100, 0], [-100, 3, 4, 4]])
    mask = torch.ones(2, 4).bool()
    mask[1, 3] = False
    kept = mask & (labels != -100)
    loss = SinkhornKD()
    for name, value in loss(teacher, student, labels, mask=mask).items():
        close(value, loss(teacher[kept], student[kept], labels[kept])[name])


def test_no_labels_are_needed_where_cross_entropy_has_no_weight(logits):
    assert set(SinkhornKD(alpha=1.0)(*logits)) == {"loss", "distillation", "sinkhorn"}
    with pytest.raises(ConfigError, match="pass labels, or alpha=1"):
        SinkhornKD(alpha=0.9)(*logits)


def test_the_temperature_anneals_to_one_in_the_last_epoch(logits):
    loss = SinkhornKD(alpha=1.0, kd_temperature=4.0, anneal=7)
    assert [loss.temperature(epoch) for epoch in range(8)] == [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0]
    close(loss(*logits, epoch=6)["distillation"], SinkhornKD(alpha=1.0, kd_temperature=1.0)(*logits)["distillation"])
    for wrong in (loss, SinkhornKD()):
        with pytest.raises(ConfigError, match="go together"):
            wrong.temperature(0 if wrong is not loss else None)


def test_released_constants():
    assert {task: (s.alpha, s.kd_temperature) for task, s in RELEASED.items()} == {
        "cola": (0.9, 1.0), "mnli": (0.8, 3.0), "mrpc": (1.0, 4.0), "qnli": (0.8, 3.0),
        "qqp": (1.0, 4.0), "rte": (0.9, 3.5), "sst2": (0.9, 2.0),
    }  # fmt: skip
    loss = SinkhornKD.released("mnli", weight=0.5)
    assert (loss.alpha, loss.kd_temperature, loss.weight, loss.cross_entropy) == (0.8, 3.0, 0.5, pytest.approx(0.2))
    with pytest.raises(ConfigError, match="the tasks are cola"):
        SinkhornKD.released("imdb")


def test_any_partial_of_the_loss_is_a_transport(logits, generator):
    transport = partial(sinkd_loss, estimator="debiased", limit=4, reduction="mean")
    terms = SinkhornKD(alpha=1.0, transport=transport)(*logits, generator=generator)
    assert terms["sinkhorn"].item() > 0


# --- several processes

TWO = """
import json, sys
import torch
import torch.distributed as distributed
from kullback.distill.sinkd import sinkd_loss

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
given = json.load(open(f"{folder}/given.json"))
inputs, teacher, weight = (torch.tensor(given[name], dtype=torch.float64) for name in ("inputs", "teacher", "weight"))
own = slice(0, 4) if rank == 0 else slice(4, None)
weight.requires_grad_()
loss = sinkd_loss(teacher[own], inputs[own] @ weight, gather=True, **given["options"])
loss.backward()
distributed.all_reduce(weight.grad)
json.dump([loss.item(), (weight.grad / 2).tolist()], open(f"{folder}/{rank}.json", "w"))
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("estimator", ["sharp", "debiased"])
def test_two_processes_have_the_loss_and_gradient_of_one(estimator, tmp_path, generator):
    inputs, teacher, weight = (torch.randn(*s, generator=generator, dtype=F64) for s in ((7, 3), (7, 5), (3, 5)))
    options = {"estimator": estimator}
    given = {"inputs": inputs.tolist(), "teacher": teacher.tolist(), "weight": weight.tolist(), "options": options}
    (tmp_path / "given.json").write_text(json.dumps(given))
    processes = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    weight.requires_grad_()
    loss = sinkd_loss(teacher, inputs @ weight, **options)
    loss.backward()
    for rank in (0, 1):
        value, gradient = json.loads((tmp_path / f"{rank}.json").read_text())
        assert value == pytest.approx(loss.item(), abs=1e-12)
        close(torch.tensor(gradient, dtype=F64), weight.grad)


def test_a_single_process_gathers_its_own_rows(logits):
    teacher, student = logits
    assert gather_rows(teacher) is teacher
    close(sinkd_loss(teacher, student, gather=True), sinkd_loss(teacher, student), 0)


# --- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0.0}, ConfigError, "tau must be positive"),
        ({"eps": 0.0}, ConfigError, "eps must be positive"),
        ({"n_iters": 0}, ConfigError, "n_iters"),
        ({"mode": "tokenwise"}, ConfigError, "mode is"),
        ({"reduction": "none"}, ConfigError, "reduction is"),
        ({"cost": "l3"}, ConfigError, "no cost between rows"),
        ({"estimator": "blunt"}, ConfigError, "mode is"),
        ({"ground": torch.zeros(5, 5)}, ConfigError, "samplewise"),
        ({"mode": "samplewise", "cost": "l2"}, ConfigError, "leave cost and gather out"),
        ({"mode": "samplewise", "gather": True}, ConfigError, "leave cost and gather out"),
        ({"mode": "samplewise", "tau": None}, ConfigError, "set tau"),
        ({"limit": 3}, ConfigError, "needs a generator"),
        ({"limit": 1, "generator": torch.Generator()}, ConfigError, "at least 2 rows"),
        ({"mask": torch.ones(5)}, ShapeError, "one entry a row"),
        ({"mask": torch.tensor([0, 0, 1, 0, 0, 0])}, ShapeError, "a batch of 1 rows is no cloud"),
        ({"mode": "samplewise", "ground": torch.zeros(4, 4)}, ShapeError, "give 4 log-weights"),
    ],
)
def test_options_that_cannot_work(options, error, message, logits):
    with pytest.raises(error, match=message):
        sinkd_loss(*logits, **options)


def test_inputs_that_cannot_work(logits):
    teacher, student = logits
    with pytest.raises(ShapeError, match="teacher has 5 classes or tokens, student 4"):
        sinkd_loss(teacher, student[:, :4])
    with pytest.raises(ShapeError, match="must match"):
        sinkd_loss(teacher, student[:4])
    with pytest.raises(ShapeError, match="the same for both models"):
        sinkd_loss(teacher[0], student[0])
    with pytest.raises(ShapeError, match="1 rows is no cloud"):
        sinkd_loss(teacher[:1], student[:1])
    with pytest.raises(DataError, match="NaN or infinite"):
        sinkd_loss(teacher, student * math.nan)
    assert sinkd_loss(teacher, student, mode="samplewise", mask=torch.zeros(6)).item() == 0.0


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"kd_temperature": 0.0}, {"anneal": 1}])
def test_settings_out_of_range(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} .*{next(iter(options.values()))}"):
        SinkhornKD(**options)
