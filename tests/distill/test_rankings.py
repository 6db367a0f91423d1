"""Rankings on disk: what was ranked comes back, from a stream of batches, and what does not fit is said."""

import copy
import json

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from kullback.core.errors import DataError, ShapeError
from kullback.distill import KeptRankings, PLDLoss, PLDTrainer, WithRankings, write_rankings

V = 7


@pytest.fixture
def rows(generator):
    """Teacher and student logits [10, V] and labels [10], of which one does not count."""
    teacher, student = 2 * torch.randn(2, 10, V, generator=generator)
    labels = torch.randint(V, (10,), generator=generator)
    labels[4] = -100
    return teacher, student, labels


def batches(teacher, labels, size=4):
    return zip(teacher.split(size), labels.split(size), strict=True)


@pytest.mark.parametrize("options", [{}, {"topk": 3, "temperature": 2.0}, {"weights": "uniform"}])
def test_what_was_ranked_comes_back(tmp_path, rows, options):
    teacher, student, labels = rows
    loss = PLDLoss(**options)
    kept = write_rankings(batches(teacher, labels), loss, tmp_path / "ranked")
    again = KeptRankings(tmp_path / "ranked")
    wanted = loss.ranking(teacher, labels)
    assert (len(again), again.classes, again.picks) == (10, V, options.get("topk", V))
    assert torch.equal(again.labels, labels)
    for found in (kept, again, copy.copy(again)):
        for part, right in zip(found[range(10)], wanted, strict=True):
            assert torch.equal(part, right)
            assert part.dtype == right.dtype
    order, weights = again[-2]
    assert torch.equal(order, wanted.order[8])
    assert torch.equal(weights, wanted.weights[8])
    some = torch.tensor([7, 4, 0])
    torch.testing.assert_close(
        loss.of_ranking(again[some], student[some], labels[some]), loss(teacher[some], student[some], labels[some])
    )
    wrong = loss.of_ranking(again[some.flip(0)], student[some], labels[some])  # bites: rankings of other samples
    assert abs(wrong - loss(teacher[some], student[some], labels[some])) > 1e-3


def test_many_classes_take_wider_numbers(tmp_path, generator):
    teacher = torch.randn(2, 40_000, generator=generator)
    teacher[:, 39_999] += 20
    kept = write_rankings([(teacher, torch.tensor([3, 39_998]))], PLDLoss(topk=4), tmp_path / "ranked")
    assert kept[0].order.dtype == torch.int32
    assert kept[0].order[:2].tolist() == [3, 39_999]
    assert (tmp_path / "ranked" / "order.bin").stat().st_size == 2 * 4 * 4


def test_batches_are_taken_one_at_a_time(tmp_path, rows):
    teacher, _, labels = rows
    taken = []

    def stream():
        for part in batches(teacher, labels):
            taken.append((tmp_path / "ranked").exists())
            yield part

    write_rankings(stream(), PLDLoss(), tmp_path / "ranked")
    assert taken == [False] * 3


def collate(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class Student(torch.nn.Module):
    """Logits [n, V] that are one parameter, the same for all inputs."""

    def __init__(self):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.linspace(-1, 1, V))

    def forward(self, inputs):
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=self.scores.expand(len(inputs), V))


def test_a_trainer_reads_them_in_any_order(tmp_path, rows):
    teacher, _, labels = rows
    items = [{"inputs": torch.tensor([float(place)]), "labels": label} for place, label in enumerate(labels)]
    loss = PLDLoss()
    ranked = WithRankings(items, write_rankings(batches(teacher, labels), loss, tmp_path / "ranked"))
    shuffled = next(iter(DataLoader(ranked, 10, shuffle=True, collate_fn=collate)))
    places = shuffled["inputs"][:, 0].long()
    assert torch.equal(shuffled["order"], ranked.rankings[places].order)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=10, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True, remove_unused_columns=False,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = PLDTrainer(model=Student(), args=arguments, train_dataset=ranked, data_collator=collate, loss=loss)
    with torch.random.fork_rng():
        trainer.train()
    student = Student()
    loss(teacher, student(torch.zeros(10, 1)).logits, labels).backward()
    wanted = student.scores.detach() - 0.1 * student.scores.grad
    torch.testing.assert_close(trainer.model.scores.detach(), wanted)


def test_samples_in_another_order_are_refused(tmp_path, rows):
    teacher, _, labels = rows
    kept = write_rankings(batches(teacher, labels), PLDLoss(), tmp_path / "ranked")
    items = [{"labels": label} for label in labels]
    with pytest.raises(DataError, match="10 rankings do not belong to 9"):
        WithRankings(items[:9], kept)
    turned = WithRankings([{"labels": (label + 1) % V} for label in labels], kept)
    with pytest.raises(DataError, match="another order"):
        turned[0]


def test_bad_input_leaves_no_folder(tmp_path, rows):
    teacher, _, labels = rows
    folder = tmp_path / "ranked"
    with pytest.raises(DataError, match="nothing to rank"):
        write_rankings([], PLDLoss(), folder)
    with pytest.raises(ShapeError, match=r"\[n, 7\]"):
        write_rankings([(teacher, labels), (teacher[:, :5], labels.clamp(max=4))], PLDLoss(), folder)
    with pytest.raises(DataError, match="NaN"):
        write_rankings([(teacher * torch.nan, labels)], PLDLoss(), folder)
    assert not list(tmp_path.iterdir())


def test_damage_is_said(tmp_path, rows):
    teacher, _, labels = rows
    folder = tmp_path / "ranked"
    with pytest.raises(DataError, match="no rankings"):
        KeptRankings(folder)
    write_rankings(batches(teacher, labels), PLDLoss(), folder)
    index = json.loads((folder / "rankings.json").read_text())
    for wrong in ({**index, "format": 2}, {**index, "picks": 0}, {**index, "order": "<f4"}, []):
        (folder / "rankings.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="damaged"):
            KeptRankings(folder)
    (folder / "rankings.json").write_text(json.dumps(index))
    (folder / "weights.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match="4 bytes"):
        KeptRankings(folder)
