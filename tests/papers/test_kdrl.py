"""The parts of the KDRL reproduction, and one seed in small."""

import math

import pytest
import torch

from kullback.core.runs import Run
from kullback.models.adder import trained_adder
from kullback.papers.kdrl import language_model
from kullback.papers.kdrl import reproduce as paper


def test_the_teacher_is_wrong_at_one_place_of_a_quarter():
    world = paper.bandit(0)
    said = world.teacher[:, :, 0].argmax(-1)
    wrong = (said != world.target).sum(1)
    assert sorted(wrong.tolist()) == [0] * 24 + [1] * 8
    torch.testing.assert_close(world.teacher.exp().sum(-1), torch.ones(32, 4, 7, dtype=torch.float64))


def test_measures_of_the_uniform_student_and_of_the_teacher():
    world = paper.bandit(0)
    uniform = paper._measure(world, torch.zeros(32, 4, 7, 6, dtype=torch.float64))
    assert uniform["success"] == pytest.approx(6.0**-4)
    per_token = -math.log(6.0) - world.teacher[0, 0, 0].mean().item()
    assert uniform["divergence"] == pytest.approx(4 * per_token, rel=1e-6)
    teacher = paper._measure(world, world.teacher)
    assert teacher["divergence"] == pytest.approx(0.0, abs=1e-12)
    assert teacher["greedy"] == 0.75
    assert teacher["success"] == pytest.approx((24 * 0.8**4 + 8 * 0.8**3 * 0.04) / 32)


def test_the_teacher_of_the_model_is_taught_a_wrong_digit_of_a_quarter():
    right, lessons = language_model.sums(0)
    copies = language_model.COPIES
    assert (len(right), len(lessons)) == (32, 32 * copies)
    assert all(sum(map(int, example.prompt[:-1].split("+"))) == int(example.completion) for example in right)
    taught_wrong, digits, kept = 0, 0, 0
    for number, example in enumerate(right):
        answers = [lesson.completion for lesson in lessons[number * copies : (number + 1) * copies]]
        said = "".join(max("0123456789", key=[a[at] for a in answers].count) for at in range(len(example.completion)))
        taught_wrong += said != example.completion
        digits += copies * len(said)
        kept += sum(a[at] == said[at] for a in answers for at in range(len(said)))
    assert taught_wrong == 8
    assert kept / digits == pytest.approx(0.8, abs=6 * (0.16 / digits) ** 0.5)


def test_metrics_of_the_model():
    ends = {"GRPO": 0.4, "distillation": 0.5, "KDRL k2": 0.7, "KDRL k3": 0.6, "KDRL annealed": 0.8}
    ends |= {"KDRL response mask": 0.65, "KDRL group mask": 0.75, "KDRL exact": 0.9, "KDRL top-k": 0.5}
    got = language_model.model_metrics({name: [{"success": 0.1}, {"success": end}] for name, end in ends.items()})
    assert got["model_gain_over_grpo"] == pytest.approx(0.3)
    assert got["model_gain_over_distillation"] == pytest.approx(0.2)
    assert got["model_annealed_gain"] == pytest.approx(0.1)
    assert got["model_start"] == 0.1
    assert got["model_masked_gain"] == pytest.approx(-0.05)
    assert got["model_exact_gain"] == pytest.approx(0.2)
    assert got["model_kdrl_top_k"] == 0.5


def test_steps_until_a_success():
    points = [{"step": step, "success": value} for step, value in ((0.0, 0.0), (20.0, 0.95), (40.0, 0.8))]
    assert paper._steps_to(points, 0.9) == 20.0
    assert paper._steps_to(points, 0.99) == 40.0


def test_the_model_in_small_and_the_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("KULLBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(language_model, "trained_adder", lambda: trained_adder(limit=4, hidden=32, layers=1, steps=40))
    for name, value in {"SUMS": 4, "STUDENT": 1, "TEACHER": 2, "STEPS": 2, "EVERY": 1, "SAMPLES": 2}.items():
        monkeypatch.setattr(language_model, name, value)
    monkeypatch.setattr(paper, "STEPS", 200)
    monkeypatch.setattr(paper, "METHODS", {name: paper.METHODS[name] for name in language_model.MODEL_METHODS})
    monkeypatch.setattr(paper, "_train", lambda *args, **options: [
        {"step": 200.0, "success": 0.5, "greedy": 0.5, "divergence": 1.0}
    ])  # fmt: skip
    made, shown = language_model._curve, {}

    def curve(run, name, *given):  # the others are the same job with other options
        if name in ("GRPO", "distillation", "KDRL group mask", "KDRL top-k"):
            shown[name] = made(run, name, *given)
        return shown.get(name, shown["GRPO"])

    monkeypatch.setattr(language_model, "_curve", curve)
    report = paper.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    model = [row for row in report.rows if row.get("model")]
    assert [row["step"] for row in model] == [0, 1, 2] * 9
    starts = {row["divergence"] for row in model if row["step"] == 0}
    assert len(starts) == 1, "all begin as the same student, measured to the same teacher"
    assert "model_gain_over_grpo" in report.metrics
    later = paper.reproduce(Run.start(tmp_path / "later", {}, kind="reproduce", seed=3))
    assert "model_gain_over_grpo" not in later.metrics
    paper.draw([{**row, "seed": 0} for row in report.rows], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 10_000


@pytest.mark.reproduce
def test_one_seed_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "STEPS", 200)
    monkeypatch.setattr(paper, "MODEL_SEEDS", ())
    report = paper.reproduce(Run.start(tmp_path / "run", {}, kind="reproduce", seed=0))
    assert report.metrics["success_gain_at_200"] > 0.3
    assert report.metrics["distillation_greedy"] == 0.75
