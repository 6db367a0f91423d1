"""MDCS with the moving average of its weights as teacher: the recursion by hand, resumed runs, and what is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.distill import MDCSClassifier, MDCSLoss, MDCSTrainer, TwoViews
from kullback.distill._averages import WeightAverage
from kullback.models.experts import CosineHead, ExpertLinear, MultiExpert


class Model(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        draw = stream(0, "model")
        branches = nn.Sequential(ExpertLinear(3, 6, 8, generator=draw), nn.ReLU(), nn.Dropout(dropout))
        self.experts = MultiExpert(nn.Identity(), branches, CosineHead(8, 3, experts=3, generator=draw))

    def forward(self, x):
        return self.experts(x)


class Weights(TrainerCallback):
    """All weights before training and after each step."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})


@pytest.fixture
def items(generator):
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([30, 15, 7]))
    rows = 2 * torch.eye(3, 6)[labels] + torch.randn(len(labels), 6, generator=generator)
    return [{"x": row, "label": int(label)} for row, label in zip(rows, labels, strict=True)]


def trained(place, items, *, decay, steps=6, resume=None, dropout=0.0, save=3, **options):
    arguments = TrainingArguments(
        output_dir=str(place), max_steps=steps, per_device_train_batch_size=13, learning_rate=0.05, seed=0,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=save, logging_steps=1,
        optim="adamw_torch", remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    views = TwoViews(lambda row: row, lambda row: row + 0.3 * torch.ones(6), field="x")
    loss = MDCSLoss(torch.tensor([30, 15, 7]), warm_epochs=0, alpha=2.0, selection="none", **options)
    trainer = MDCSTrainer(
        model=Model(dropout), args=arguments, train_dataset=items, data_collator=views, loss=loss,
        teacher_decay=decay, callbacks=[Weights()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: weight.detach() for name, weight in trainer.model.named_parameters()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def seen(trainer):
    return next(call.seen for call in trainer.callback_handler.callbacks if isinstance(call, Weights))


def test_the_average_is_the_recursion_by_hand(tmp_path, items):
    trainer = trained(tmp_path, items, decay=0.75)
    history = seen(trainer)
    assert len(history) == 7
    for name, start in history[0].items():
        average = start.double()
        for step in history[1:]:
            average = 0.75 * average + 0.25 * step[name].double()
        torch.testing.assert_close(trainer.average.held[name], average.float(), rtol=0, atol=2e-6)
        late = sum(0.75 ** (6 - k) * 0.25 * history[k][name] for k in range(1, 7))
        assert (late - average).abs().max() > 1e-3, "an average that starts at 0"


def test_the_loss_is_that_of_a_second_model_with_the_average(tmp_path, items):
    trainer = trained(tmp_path, items, decay=0.75, dropout=0.5)
    trainer.model.eval()
    batch, second = trainer.data_collator(items[20:40]), Model()
    second.load_state_dict(trainer.average.held, strict=True)
    own, other = (model(batch["x"])["logits"] for model in (trainer.model, second))
    wanted = trainer.loss(own[:, :20], own[:, 20:], batch["labels"], teacher_logits=other[:, :20])["loss"]
    plain = trainer.loss(own[:, :20], own[:, 20:], batch["labels"])["loss"]
    found = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(found, wanted)
    assert (plain - wanted).abs() > 1e-3
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    assert all(module.training for module in trainer.model.modules())


def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(tmp_path, items):
    whole = trained(tmp_path / "whole", items, decay=0.75)
    resumed = trained(tmp_path / "resumed", items, decay=0.75, resume=str(tmp_path / "whole" / "checkpoint-3"))
    for found, wanted in ((weights(resumed), weights(whole)), (resumed.average.held, whole.average.held)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # The same without the file's averages: those of the weights at the checkpoint lead elsewhere.
    wrong = tmp_path / "wrong" / "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", wrong)
    averages = load_file(wrong / "teacher_average.safetensors")
    shutil.copy(wrong / "model.safetensors", wrong / "teacher_average.safetensors")
    assert load_file(wrong / "model.safetensors").keys() == averages.keys()
    other = trained(tmp_path / "other", items, decay=0.75, resume=str(wrong))
    assert not all(torch.equal(weights(other)[name], weights(whole)[name]) for name in weights(whole))


@pytest.mark.parametrize("options", [{}, {"teacher": "mean"}, {"direction": "symmetric"}])
def test_without_decay_it_is_the_expert_itself(tmp_path, items, options):
    own = trained(tmp_path / "own", items, decay=None, **options)
    same = trained(tmp_path / "same", items, decay=0.0, **options)
    slow = trained(tmp_path / "slow", items, decay=0.9, **options)
    assert losses(same) == pytest.approx(losses(own), abs=1e-5)
    for name, weight in weights(own).items():
        torch.testing.assert_close(weights(same)[name], weight, rtol=0, atol=1e-5)
        assert torch.equal(same.average.held[name], weights(same)[name])
    assert losses(slow)[0] == pytest.approx(losses(own)[0], abs=1e-5), "it starts as the weights"
    assert losses(slow)[-1] != pytest.approx(losses(own)[-1], abs=1e-3)


def test_bad_averages(tmp_path, items):
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"decay of averaged weights lies in \[0, 1\)"):
            trained(tmp_path / "bad", items, decay=decay)
        rows, labels = torch.stack([item["x"] for item in items]), [item["label"] for item in items]
        with pytest.raises(ConfigError, match="decay of averaged weights"):
            MDCSClassifier(epochs=1, teacher_decay=decay).fit(rows, labels)
    trained(tmp_path / "plain", items, decay=None, steps=3)
    with pytest.raises(DataError, match="has no averaged weights"):
        trained(tmp_path / "resumed", items, decay=0.5, resume=str(tmp_path / "plain" / "checkpoint-3"))
    average = WeightAverage(0.5)
    average.start(nn.Linear(2, 2))
    with pytest.raises(ShapeError, match="another model"):
        average.move(nn.Linear(2, 3))
    with pytest.raises(ShapeError, match="another model"):
        average.load({"weight": torch.zeros(2, 2)}, nn.Linear(2, 2))


def test_halves_are_averaged_in_single_precision_and_running_means_too():
    layer = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)).to(torch.bfloat16)
    average = WeightAverage(0.999)
    layer[0].weight.data.fill_(1.0)
    average.start(layer)
    layer[0].weight.data.fill_(2.0)
    layer[1].running_mean.fill_(3.0)
    for _ in range(10):
        average.move(layer)
    assert average.held["0.weight"].item() == pytest.approx(2.0 - 0.999**10, rel=1e-5)
    assert average.held["1.running_mean"].item() == pytest.approx(3.0 * (1.0 - 0.999**10), rel=1e-4)
    assert "1.num_batches_tracked" not in average.held
    assert average(layer, torch.ones(2, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer[1].running_mean.item() == 3.0
    naive = torch.tensor(1.0, dtype=torch.bfloat16)
    for _ in range(10):
        naive = naive.lerp(torch.tensor(2.0, dtype=torch.bfloat16), 0.001)
    assert naive.item() == 1.0, "in bfloat16 it would never move"


def test_the_classifier(items):
    rows, labels = torch.stack([item["x"] for item in items]), [item["label"] for item in items]
    settings = {"epochs": 5, "hidden": 8, "width": 8, "batch": 16, "warm_epochs": 0, "alpha": 2.0,
                "options": {"selection": "none"}}  # fmt: skip
    own, same, slow = (
        MDCSClassifier(**settings, teacher_decay=decay).fit(rows, labels).expert_logits(rows)
        for decay in (None, 0.0, 0.95)
    )
    torch.testing.assert_close(same, own, rtol=0, atol=1e-4)
    assert (slow - own).abs().max() > 0.05
    from kullback.distill.mdcs_classifier import fit_together

    pair = [MDCSClassifier(**settings, teacher_decay=0.95, seed=seed) for seed in (0, 1)]
    fit_together(pair, rows, labels)
    torch.testing.assert_close(pair[0].expert_logits(rows), slow, rtol=0, atol=2e-4)
    with pytest.raises(ConfigError, match="one teacher_decay"):
        fit_together([pair[0], MDCSClassifier(**settings, teacher_decay=0.5)], rows, labels)
