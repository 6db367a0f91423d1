"""Fine-tuning a teacher, its centroids, and distillation with classes or examples missing."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from kullback.core.errors import ConfigError, DataError, NotFitted
from kullback.distill._hf_mcmi import MCMITeacherTrainer
from kullback.distill.mcmi import class_centroids, empirical_cmi
from kullback.distill.mcmi_teacher import (
    CentroidTracker,
    Datasets,
    MCMISettings,
    balanced_batches,
    balanced_subset,
    expected_calibration_error,
    finetune_teacher,
    kd_loss,
    measured,
    zero_shot_distill,
)

CLASSES = 4


def clusters(generator, n=240, noise=0.8):
    """Inputs [n, 6] around one of four centres each, and which."""
    labels = torch.arange(n) % CLASSES
    centres = 1.5 * torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(1))
    return centres[labels] + noise * torch.randn(n, 6, generator=generator), labels


def network(generator, *, norm=False, hidden=32):
    layers = [nn.Linear(6, hidden), nn.BatchNorm1d(hidden) if norm else nn.Identity(), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(hidden, CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
    return model


PLAIN = {"lam": 0.0, "epochs": 40, "batch": 32, "learning_rate": 3e-3, "optimizer": "adam", "weight_decay": 0.0}


@pytest.fixture
def trained(generator):
    inputs, labels = clusters(generator)
    teacher = finetune_teacher(network(generator), inputs, labels, MCMISettings(**PLAIN), generator=generator)
    return teacher, inputs, labels


FINE = {"epochs": 8, "batch": 32, "learning_rate": 5e-3, "optimizer": "adam", "weight_decay": 0.0}


@pytest.mark.parametrize("refresh", ["never", "epoch", "ema", "batch"])
def test_fine_tuning_raises_the_information_and_keeps_accuracy(trained, generator, refresh):
    teacher, inputs, labels = trained
    before = copy.deepcopy(teacher.state_dict())
    found, state = {}, generator.get_state()
    for lam in (0.0, 0.7):
        generator.set_state(state)
        settings = MCMISettings(lam=lam, refresh=refresh, decay=0.9, **FINE)
        model = finetune_teacher(teacher, inputs, labels, settings, generator=generator)
        found[lam] = measured(model, [(inputs, labels)], CLASSES)
    assert found[0.7].cmi > 1.3 * found[0.0].cmi
    assert found[0.7].accuracy > found[0.0].accuracy - 0.03
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_no_weight_is_fine_tuning_on_cross_entropy(trained, generator):
    teacher, inputs, labels = trained
    state = generator.get_state()
    settings = MCMISettings(lam=0.0, cosine=False, **FINE)
    ours = finetune_teacher(teacher, inputs, labels, settings, generator=generator)
    generator.set_state(state)
    plain = copy.deepcopy(teacher)
    optimizer = torch.optim.Adam(plain.parameters(), 5e-3)
    for _ in range(8):
        for rows in torch.randperm(len(inputs), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    torch.testing.assert_close(ours(inputs), plain(inputs), rtol=1e-4, atol=1e-4)


def test_the_best_epoch_is_kept_and_events_are_told(trained, generator):
    teacher, inputs, labels = trained
    events = []
    held_out = clusters(generator, 80)
    settings = MCMISettings(lam=0.4, **{**FINE, "learning_rate": 2e-2})
    model = finetune_teacher(
        teacher, inputs, labels, settings, generator=generator, validation=held_out, listen=events.append
    )
    best = max(event["accuracy"] for event in events)
    assert measured(model, [held_out], CLASSES).accuracy == best
    assert [event["epoch"] for event in events] == list(range(1, 9))
    assert events[0]["loss"] == pytest.approx(events[0]["ce"] - 0.4 * events[0]["cmi"], abs=1e-5)


def test_centroids_are_renewed_as_told(generator):
    inputs, labels = clusters(generator)
    first, second = network(generator), network(generator)
    probs = {model: model(inputs).detach().softmax(-1) for model in (first, second)}
    means = {model: class_centroids(value, labels, CLASSES).double() for model, value in probs.items()}
    batch = labels < 2
    for refresh, decay in (("never", 0.5), ("epoch", 0.5), ("ema", 0.75), ("batch", 0.5)):
        tracker = CentroidTracker(CLASSES, refresh, decay)
        with pytest.raises(NotFitted):
            tracker.get(labels)
        tracker.fit(first, zip(inputs.split(50), labels.split(50)))
        torch.testing.assert_close(tracker.centroids, means[first], rtol=0, atol=1e-6)
        tracker.update(probs[second][batch], labels[batch])
        share = {"ema": 0.25, "batch": 1.0}.get(refresh, 0.0)
        moved = torch.lerp(means[first], means[second], share)
        moved[2:] = means[first][2:]
        torch.testing.assert_close(tracker.centroids, moved, rtol=0, atol=1e-6)
        tracker.fit(second, [(inputs, labels)])
        wanted = means[first] if refresh == "never" else means[second]
        torch.testing.assert_close(tracker.get(labels), wanted[labels], rtol=0, atol=1e-6)


def test_train_mode_takes_the_statistics_of_batches(generator):
    inputs, labels = clusters(generator)
    model = network(generator, norm=True).eval()
    tracker = CentroidTracker(CLASSES).fit(model, [(inputs, labels)])
    released = CentroidTracker(CLASSES, train_mode=True).fit(model, [(inputs, labels)])
    assert (tracker.centroids - released.centroids).abs().max() > 1e-2
    assert not model.training


def test_a_class_left_out_is_learnt_from_a_teacher_that_spreads_it(generator):
    inputs, labels = clusters(generator, noise=1.2)
    teacher = finetune_teacher(network(generator), inputs, labels, MCMISettings(**PLAIN), generator=generator)
    data = Datasets(inputs, labels, *clusters(generator, 400, noise=1.2))

    def accuracy(kd, omit=(3,)):
        student = network(torch.Generator().manual_seed(3), hidden=32)
        return zero_shot_distill(
            teacher, student, data, omit=omit, kd=kd, generator=torch.Generator().manual_seed(4), epochs=40
        )

    hard = accuracy(partial(kd_loss, alpha=0.0))
    soft = accuracy(partial(kd_loss, alpha=1.0, temperature=8.0))
    assert hard[3] == 0.0
    assert soft[3] > 0.2
    assert hard[:3].min() > 0.6
    assert accuracy(partial(kd_loss, alpha=0.0), omit=()).min() > 0.6
    with pytest.raises(ConfigError, match="omit fewer"):
        accuracy(kd_loss, omit=range(CLASSES))


def test_kd_is_cross_entropy_and_kl_by_definition(generator):
    teacher, student = torch.randn(2, 7, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.arange(7) % CLASSES
    p, q = (teacher / 4).softmax(-1), (student / 4).softmax(-1)
    wanted = 0.1 * nn.functional.cross_entropy(student, labels) + 0.9 * 16 * (p * (p / q).log()).sum(-1).mean()
    assert kd_loss(teacher, student, labels).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_few_shots_and_balanced_batches(generator):
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 10)
    chosen = balanced_subset(labels, 0.25, generator=generator)
    assert torch.bincount(labels[chosen]).tolist() == [10, 5, 2]
    assert len(set(chosen.tolist())) == 17
    batches = list(balanced_batches(torch.arange(70), labels, 3, generator=generator))
    assert len(batches) == 7
    assert all(torch.bincount(target).tolist() == [3, 3, 3] for _, target in batches)
    assert all(torch.equal(labels[rows], target) for rows, target in batches)
    rare = torch.cat([rows[target == 1] for rows, target in batches])
    assert torch.bincount(rare - 40, minlength=20).max() - torch.bincount(rare - 40, minlength=20).min() <= 1


def test_calibration_error_by_hand():
    logits = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.55, 0.45], [0.55, 0.45]]).log()
    # right 1 of 2 at 0.95 and 2 of 2 at 0.55
    assert expected_calibration_error(logits, torch.tensor([0, 1, 0, 0])) == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)


def test_the_temperature_of_loss_and_centroids_is_one(generator):
    inputs, labels = clusters(generator)
    model = network(generator)
    tracker = CentroidTracker(CLASSES, temperature=3.0).fit(model, [(inputs, labels)])
    logits = model(inputs).detach()
    own = empirical_cmi(logits, labels, temperature=3.0).item()
    fixed = empirical_cmi(logits, labels, centroids=tracker.centroids.float(), temperature=3.0).item()
    assert fixed == pytest.approx(own, abs=1e-6)


def test_what_is_refused(generator):
    inputs, labels = clusters(generator)
    with pytest.raises(ConfigError, match="refresh"):
        CentroidTracker(CLASSES, "sometimes")
    with pytest.raises(ConfigError, match="decay"):
        CentroidTracker(CLASSES, decay=1.0)
    with pytest.raises(ConfigError, match="lam"):
        MCMISettings(lam=-0.1)
    with pytest.raises(ConfigError, match="optimizer"):
        MCMISettings(optimizer="lbfgs")
    with pytest.raises(ConfigError, match="epochs"):
        MCMISettings(epochs=0)
    with pytest.raises(DataError, match="one label"):
        finetune_teacher(network(generator), inputs, labels[:3], MCMISettings(), generator=generator)
    with pytest.raises(DataError, match="seen no sample"):
        CentroidTracker(CLASSES).fit(network(generator), [])
    with pytest.raises(ConfigError, match="share"):
        balanced_subset(labels, 0.0, generator=generator)


class Classifier(nn.Module):
    """A network with the interface of transformers' classifiers."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, inputs, labels=None):
        return SequenceClassifierOutput(logits=self.body(inputs))


def rows_of(inputs, labels):
    return [{"inputs": one, "labels": label} for one, label in zip(inputs, labels.tolist())]


def trainer(folder, model, data, held_out=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=6, per_device_train_batch_size=32, learning_rate=5e-3, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=5, remove_unused_columns=False, label_names=["labels"],
        disable_tqdm=True, lr_scheduler_type="constant", weight_decay=0.0,
    )  # fmt: skip
    return MCMITeacherTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=held_out, **options)


def test_the_trainer_raises_the_information_and_logs_it(trained, generator, tmp_path):
    teacher, inputs, labels = trained
    found = {}
    for lam in (0.0, 0.7):
        model = Classifier(copy.deepcopy(teacher))
        job = trainer(tmp_path, model, rows_of(inputs, labels), rows_of(inputs, labels), lam=lam)
        job.train()
        found[lam] = job.evaluate()
    meter = measured(model.body, [(inputs, labels)], CLASSES)
    assert found[0.7]["eval_cmi"] == pytest.approx(meter.cmi, abs=1e-6)
    assert found[0.7]["eval_accuracy"] == pytest.approx(meter.accuracy)
    assert found[0.7]["eval_ce"] == pytest.approx(meter.mean_cross_entropy, abs=1e-6)
    assert found[0.7]["eval_cmi"] > 1.3 * found[0.0]["eval_cmi"]
    logged = [entry for entry in job.state.log_history if "loss" in entry]
    assert all(entry["loss"] == pytest.approx(entry["ce"] - 0.7 * entry["cmi"], abs=1e-3) for entry in logged)
    with pytest.raises(ConfigError, match="lam"):
        trainer(tmp_path, model, [], lam=-1.0)


class Language(nn.Module):
    """Logits of the next token from this one alone."""

    def __init__(self, source):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6, generator=source))

    def forward(self, input_ids, labels=None):
        return SequenceClassifierOutput(logits=self.table[input_ids])


def test_a_language_model_is_conditioned_on_clusters_of_tokens(generator, tmp_path):
    ids = torch.randint(6, (64, 9), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    data = [{"input_ids": one, "labels": target} for one, target in zip(ids, labels)]
    model = Language(generator)
    job = trainer(tmp_path, model, data, data, lam=0.1, group_fn=lambda tokens: tokens // 2, num_groups=3)
    job.train()
    assert job.tracker.centroids.shape == (3, 6)
    logits = model.table[ids[:, 2:-1]].flatten(0, 1).detach()
    wanted = empirical_cmi(logits, ids[:, 3:].flatten() // 2).item()
    assert job.evaluate()["eval_cmi"] == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ConfigError, match="together"):
        trainer(tmp_path, model, data, lam=0.1, num_groups=3)


def test_several_teachers_at_once_are_each_alone(trained, generator):
    teacher, inputs, labels = trained
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other[-1].weight.mul_(0.3)
    data = Datasets(inputs, labels, *clusters(generator, 400, noise=1.2))

    def distilled(teachers):
        student = network(torch.Generator().manual_seed(3), hidden=8)
        found = zero_shot_distill(
            teachers, student, data, omit=[1], generator=torch.Generator().manual_seed(4), epochs=5
        )
        return found, student

    together, untouched = distilled([teacher, other])
    fresh = network(torch.Generator().manual_seed(3), hidden=8)
    assert torch.equal(untouched[0].weight, fresh[0].weight)
    for index, one in enumerate((teacher, other)):
        alone, student = distilled(one)
        torch.testing.assert_close(together[index], alone, rtol=0, atol=0.011)
        assert not torch.equal(student[0].weight, fresh[0].weight)
