"""The reproduction of PLD: its parts, one seed against the card, and its figure."""

import tomllib
from importlib import resources
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

from kullback.core.rng import generator as stream
from kullback.core.runs import Run
from kullback.distill import dkd_loss
from kullback.distill.pld import PLDLoss
from kullback.papers.pld import reproduce as study


def test_a_seed_gives_the_same_world_whatever_else_is_drawn():
    before = torch.random.get_rng_state()
    first, second, other = study.world(3), study.world(3), study.world(4)
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(first[0].inputs, other[0].inputs)
    assert [len(part.labels) for part in first] == [study.TRAIN, study.VALIDATION, study.TEST]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_student_has_its_own_loss(generator):
    taught = 2 * torch.randn(5, study.CLASSES, generator=generator)
    labels = torch.randint(study.CLASSES, (5,), generator=generator)
    logits = torch.randn(study.COPIES, 5, study.CLASSES, generator=generator, requires_grad=True)
    rows = torch.tensor([4, 1, 2])
    (found,) = torch.autograd.grad(study.losses_of(taught, labels)(rows, logits[:, rows]), logits)
    own = labels[rows]
    listmle = PLDLoss(weights=torch.ones(study.CLASSES))
    wanted = [F.cross_entropy(logits[0, rows], own), listmle(taught[rows], logits[1, rows], own)]
    for place, kind in ((2, "position"), (3, "position_teacher")):
        wanted.append(PLDLoss(weights=kind)(taught[rows], logits[place, rows], own))
    for place, temperature in enumerate(study.TEMPERATURES, 4):
        wanted.append(PLDLoss(temperature=temperature)(taught[rows], logits[place, rows], own))
    scaled = [(x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True) for x in (taught, logits)]
    first = len(study.RANKED)
    wanted.append(PLDLoss()(scaled[0][rows], logits[first - 2, rows], own))
    wanted.append(PLDLoss()(scaled[0][rows], scaled[1][first - 1, rows], own))
    wanted.append(study.dist_loss(taught[rows], logits[first, rows], own))
    even = -logits[first + 1, rows].log_softmax(-1).mean()
    wanted.append(0.9 * F.cross_entropy(logits[first + 1, rows], own) + 0.1 * even)
    for place, beta in enumerate(study.DKD_BETAS, first + 2):
        student = logits[place, rows]
        wanted.append(dkd_loss(taught[rows], student, own, beta=beta) + F.cross_entropy(student, own))
    for place, kd in enumerate(study.TUNED, study.COPIES - len(study.TUNED)):
        soft = F.kl_div(
            (logits[place, rows] / kd.temperature).log_softmax(-1), (taught[rows] / kd.temperature).softmax(-1),
            reduction="batchmean",
        )  # fmt: skip
        hard = F.cross_entropy(logits[place, rows], own)
        wanted.append((1 - kd.weight) * kd.temperature**2 * soft + kd.weight * hard)
    assert len(wanted) == study.COPIES
    (right,) = torch.autograd.grad(torch.stack(wanted).sum(), logits)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_dist_is_one_less_the_correlations(generator):
    teacher, student = torch.randn(2, 6, 4, generator=generator)
    labels = torch.randint(4, (6,), generator=generator)
    p, q = teacher.softmax(-1), student.softmax(-1)
    rows = torch.stack([torch.corrcoef(torch.stack([p[i], q[i]]))[0, 1] for i in range(6)])
    columns = torch.stack([torch.corrcoef(torch.stack([p[:, i], q[:, i]]))[0, 1] for i in range(4)])
    right = 0.1 * F.cross_entropy(student, labels) + 0.45 * (1 - rows.mean()) + 0.45 * (1 - columns.mean())
    torch.testing.assert_close(study.dist_loss(teacher, student, labels), right)


def test_the_divergence_goes_from_the_teacher_to_the_student(generator):
    teacher, students = torch.randn(1, 6, 4, generator=generator), torch.randn(2, 6, 4, generator=generator)
    p, q = teacher.softmax(-1)[0], students[1].softmax(-1)
    assert study.divergences(teacher, students)[1] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert study.divergences(teacher, students)[1] != pytest.approx((q * (q / p).log()).sum(-1).mean().item(), rel=1e-2)
    assert study.divergences(teacher, teacher) == [0.0]


def test_side_by_side_is_one_by_one():
    inputs, labels = study.world(0)[0]
    inputs, labels = inputs[:256], labels[:256]

    def loss(rows, logits):
        return sum(F.cross_entropy(copy, labels[rows]) for copy in logits)

    ended = []
    for copies in (1, 3):
        parameters = study.layers((study.FEATURES, 8, study.CLASSES), copies, stream(0, "student"))
        study.train(parameters, inputs, loss, stream(0, "batches"), 3e-3)
        ended.append([parameter.detach()[-1] for parameter in parameters])
    for one, other in zip(*ended, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_surfaces_are_convex():
    at, *surfaces = study.surface(21)
    for values in surfaces:
        for line in (values[10], values[:, 3], values.diagonal()):
            assert line.diff(n=2).min() >= -1e-12
    assert at.shape == (21,)


@pytest.mark.reproduce
def test_one_seed_and_its_figure(tmp_path):
    report = study.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=3))
    card = tomllib.loads(resources.files("kullback.papers.pld").joinpath("card.toml").read_text())
    assert {claim["metric"] for claim in card["claims"]} <= set(report.metrics)
    assert report.metrics["gain_over_cross_entropy"] >= 0.5
    by_name = {row["method"]: row["accuracy"] for row in report.rows}
    assert 60 < by_name["CE"] < by_name["teacher"] < 80
    assert [row["method"] for row in report.rows if row.get("tuned")] == ["DKD", "KD"]
    assert len(report.rows) == 1 + study.COPIES
    assert report.metrics["farther_than_kd"] > 0
    study.draw([{**row, "seed": 3} for row in report.rows], tmp_path / "pld.svg")
    assert ElementTree.parse(tmp_path / "pld.svg").getroot().tag.endswith("svg")
