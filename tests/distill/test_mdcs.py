"""MDCS: the card's numbers, loops over experts, optimal logits of a mixture, edge cases, and the Trainer."""

import math

import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn import functional

from kullback.core.errors import ConfigError, DataError, NotFitted, ShapeError
from kullback.distill import MDCSClassifier, MDCSLoss, combine_experts, diversity_logits, mdcs_loss
from kullback.models.experts import CosineHead, ExpertLinear, MultiExpert

COUNTS = torch.tensor([100.0, 30.0, 8.0, 3.0, 1.0], dtype=torch.float64)


@pytest.fixture
def views(generator):
    """Two views [3, 20, 5] of 20 samples for three experts, and labels."""
    weak = 3 * torch.randn(3, 20, 5, generator=generator, dtype=torch.float64)
    strong = weak + 0.7 * torch.randn(3, 20, 5, generator=generator, dtype=torch.float64)
    return weak, strong, torch.randint(0, 5, (20,), generator=generator)


def loop(weak, strong, labels, lam, alpha=0.6, temperature=1.0):
    """The released loss, written for one expert after the other."""
    total, prior = 0.0, COUNTS.log()
    for k, strength in enumerate(lam):
        first, second = weak[k] + strength * prior, strong[k] + strength * prior
        total = total + functional.cross_entropy(torch.cat([first, second]), torch.cat([labels, labels]))
        right = first.argmax(-1) == labels
        if right.any():
            p, q = first[right] / temperature, second[right] / temperature
            target = p.softmax(-1).detach()
            divergence = functional.kl_div(q.log_softmax(-1), target, reduction="batchmean")
            total = total + alpha * temperature**2 * divergence
    return total


# --- the card's numbers


def test_cross_entropy_of_the_card():
    logits, counts = torch.tensor([[[1.0, 0.5, 0.0]]]).double(), torch.tensor([100, 10, 1])
    wanted = {-0.5: 0.5840015, 0.0: 1.6802697, 1.0: 5.6675174, 2.5: 12.5148453}
    for strength, value in wanted.items():
        terms = mdcs_loss(logits, logits, torch.tensor([2]), counts, lam=[strength], alpha=0.0)
        assert terms["cross_entropy"].item() == pytest.approx(value, abs=2e-6), strength
    shares = diversity_logits(logits, counts, [1.0]).softmax(-1).flatten().tolist()
    assert shares == pytest.approx([0.9395566, 0.0569870, 0.0034564], abs=5e-7)
    wrong = functional.cross_entropy(logits[0] - counts.log(), torch.tensor([2])).item()  # subtracted in training
    assert wrong != pytest.approx(5.6675174, abs=0.1)


def test_plain_and_balanced_softmax_are_special_cases(views):
    weak, strong, labels = views
    both, twice = torch.cat([weak, strong], 1), torch.cat([labels, labels])
    plain = sum(functional.cross_entropy(v, twice) for v in both)
    found = mdcs_loss(weak, strong, labels, COUNTS, lam=(0, 0, 0), alpha=0.0)
    assert found["loss"].item() == pytest.approx(plain.item(), abs=1e-12)
    prior = COUNTS / COUNTS.sum()
    balanced = sum(-(prior * v.exp() / (prior * v.exp()).sum(-1, keepdim=True)).log().gather(-1, twice[:, None]).mean()
                   for v in both)  # fmt: skip
    found = mdcs_loss(weak, strong, labels, COUNTS, lam=(1, 1, 1), alpha=0.0)
    assert found["loss"].item() == pytest.approx(balanced.item(), abs=1e-12)


def test_counts_and_shares_have_the_same_loss_and_gradient(views):
    weak, strong, labels = views
    strong.requires_grad_()
    found = [mdcs_loss(weak, strong, labels, counts)["loss"] for counts in (COUNTS, COUNTS / COUNTS.sum())]
    assert found[0].item() == pytest.approx(found[1].item(), abs=1e-12)
    one, other = (torch.autograd.grad(loss, strong)[0] for loss in found)
    assert torch.allclose(one, other, atol=1e-14)


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5])
def test_equals_a_loop_over_experts(generator, experts):
    weak, strong = 2 * torch.randn(2, experts, 30, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (30,), generator=generator)
    lam = torch.linspace(-0.5, 2.5, experts).tolist()
    weak.requires_grad_()
    strong.requires_grad_()
    for temperature in (1.0, 3.0):
        mine = mdcs_loss(weak, strong, labels, COUNTS, lam=lam, temperature=temperature)["loss"]
        wanted = loop(weak, strong, labels, lam, temperature=temperature)
        assert mine.item() == pytest.approx(wanted.item(), abs=1e-12)
        for one, other in zip(torch.autograd.grad(mine, (weak, strong)), torch.autograd.grad(wanted, (weak, strong))):
            assert torch.allclose(one, other, atol=1e-13)


def test_permuting_experts_or_renaming_classes_changes_nothing(views, generator):
    weak, strong, labels = views
    lam = torch.tensor([-0.5, 1.0, 2.5])
    wanted = mdcs_loss(weak, strong, labels, COUNTS, lam=lam.tolist())
    order = torch.tensor([2, 0, 1])
    found = mdcs_loss(weak[order], strong[order], labels, COUNTS, lam=lam[order].tolist())
    assert found["loss"].item() == pytest.approx(wanted["loss"].item(), abs=1e-12)
    assert torch.allclose(found["cross_entropy"], wanted["cross_entropy"][order])
    names = torch.randperm(5, generator=generator)
    place = names.argsort()
    renamed = mdcs_loss(weak[..., names], strong[..., names], place[labels], COUNTS[names])
    assert renamed["loss"].item() == pytest.approx(wanted["loss"].item(), abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 1.0, 2.5, -0.5])
def test_the_optimum_is_the_posterior_less_lam_log_prior(lam):
    """Free logits for a finite x: the minimum over the population is log P(c|x) - lam log pi, up to a constant."""
    prior = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)
    given = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]], dtype=torch.float64)  # P(x|c), rows c
    joint = prior[:, None] * given
    posterior = (joint / joint.sum(0)).T  # [x, c]

    def slope(logits):
        """The gradient of the population's cross-entropy, which is convex, by the logits."""
        logits = logits.clone().requires_grad_()
        value = -(joint.T * diversity_logits(logits[None], prior, [lam])[0].log_softmax(-1)).sum()
        return torch.autograd.grad(value, logits)[0].abs().max().item()

    optimal = posterior.log() - lam * prior.log()
    assert slope(optimal + 3.0) < 1e-15
    assert slope(optimal + 0.1 * torch.eye(3)) > 1e-3
    if lam:
        assert slope(posterior.log() + lam * prior.log()) > 1e-3  # the sign turned round
    if lam == 1.0:  # the rule for equally frequent classes
        assert torch.equal(optimal.argmax(-1), given.T.argmax(-1))


# --- consistency


def test_the_teacher_is_constant_and_only_right_samples_count(views):
    weak, strong, labels = views
    weak.requires_grad_()
    terms = mdcs_loss(weak, strong, labels, COUNTS, alpha=1.0)
    by_hard = mdcs_loss(weak, strong, labels, COUNTS, alpha=0.0)["loss"]
    one, other = (torch.autograd.grad(loss, weak)[0] for loss in (terms["loss"], by_hard))
    assert torch.allclose(one, other, atol=1e-15)  # no gradient of the consistency term
    for k, strength in enumerate((-0.5, 1.0, 2.5)):
        p, q = ((view[k].detach() + strength * COUNTS.log()).softmax(-1) for view in (weak, strong))
        right = p.argmax(-1) == labels
        wanted = scipy.stats.entropy(p[right].numpy(), q[right].numpy(), axis=-1).mean()
        assert terms["consistency"][k].item() == pytest.approx(wanted, abs=1e-12)
        assert terms["kept"][k].item() == right.sum().item()
        everything = scipy.stats.entropy(p.numpy(), q.numpy(), axis=-1).mean()
        assert everything != pytest.approx(wanted, rel=1e-2)  # what a loss without selection would give
    # what a wrong sample holds in its strong view moves no consistency
    wrong = ((weak[0].detach() - 0.5 * COUNTS.log()).argmax(-1) != labels).nonzero()[0]
    moved = strong.clone()
    moved[0, wrong] += torch.arange(5.0)
    assert mdcs_loss(weak, moved, labels, COUNTS)["consistency"][0] == terms["consistency"][0]


def test_equal_views_and_samples_that_are_all_wrong_give_zero(views):
    weak, _, labels = views
    assert mdcs_loss(weak, weak.clone(), labels, COUNTS)["consistency"].abs().max().item() == 0.0
    never = torch.full((3, 20, 5), 0.0).double()
    never[..., 0] = 1e3
    labels = torch.ones_like(labels)
    student = torch.zeros_like(never).requires_grad_()
    terms = mdcs_loss(never, student, labels, COUNTS)
    assert terms["consistency"].tolist() == [0.0, 0.0, 0.0] == terms["kept"].tolist()
    (gradient,) = torch.autograd.grad(terms["consistency"].sum(), student)
    assert (gradient == 0).all()
    assert terms["loss"].isfinite()


def test_selection_direction_and_teacher(views):
    weak, strong, labels = views
    adjusted = [diversity_logits(v, COUNTS).log_softmax(-1) for v in (weak, strong)]
    p, q = (v.exp() for v in adjusted)
    divergence = (p * (adjusted[0] - adjusted[1])).sum(-1)
    everything = mdcs_loss(weak, strong, labels, COUNTS, selection="none")
    assert torch.allclose(everything["consistency"], divergence.mean(1), atol=1e-12)
    assert everything["kept"].tolist() == [20.0] * 3
    sure = p.amax(-1) >= 0.9
    confident = mdcs_loss(weak, strong, labels, COUNTS, selection="confident", threshold=0.9)
    assert torch.equal(confident["kept"], sure.sum(1).double())
    wanted = torch.stack([d[s].mean() for d, s in zip(divergence, sure)])
    assert torch.allclose(confident["consistency"], wanted, atol=1e-12)
    back = (q * (adjusted[1] - adjusted[0])).sum(-1)
    both = mdcs_loss(weak, strong, labels, COUNTS, selection="none", direction="symmetric")
    assert torch.allclose(both["consistency"], (divergence + back).mean(1) / 2, atol=1e-12)
    mean = p.mean(0)
    shared = mdcs_loss(weak, strong, labels, COUNTS, selection="none", teacher="mean")
    wanted = (mean * (mean.log() - adjusted[1])).sum(-1).mean(1)
    assert torch.allclose(shared["consistency"], wanted, atol=1e-12)
    outside = mdcs_loss(strong, strong, labels, COUNTS, teacher_logits=weak)
    own = mdcs_loss(weak, strong, labels, COUNTS)
    assert torch.equal(outside["consistency"], own["consistency"])
    assert not torch.equal(outside["cross_entropy"], own["cross_entropy"])


def test_gradcheck_in_the_student(views):
    weak, strong, labels = views
    options = {"temperature": 2.0, "direction": "weak_to_strong", "selection": "none"}
    assert torch.autograd.gradcheck(
        lambda s: mdcs_loss(weak[:, :4], s, labels[:4], COUNTS, **options)["loss"], strong[:, :4].requires_grad_()
    )


def test_any_leading_shape_halves_and_labels_that_do_not_count(views):
    weak, strong, labels = views
    wanted = mdcs_loss(weak, strong, labels, COUNTS)
    shaped = mdcs_loss(weak.view(3, 4, 5, 5), strong.view(3, 4, 5, 5), labels.view(4, 5), COUNTS)
    for name in wanted:
        assert torch.allclose(shaped[name], wanted[name], atol=1e-13)
    kept = torch.arange(20) % 3 > 0
    found = mdcs_loss(weak, strong, labels.masked_fill(~kept, -100), COUNTS)
    sliced = mdcs_loss(weak[:, kept], strong[:, kept], labels[kept], COUNTS)
    for name in wanted:
        assert torch.allclose(found[name], sliced[name], atol=1e-13)
    half = mdcs_loss(weak.bfloat16(), strong.bfloat16(), labels, COUNTS)
    assert half["loss"].dtype == torch.float32
    assert half["loss"].item() == pytest.approx(wanted["loss"].item(), rel=0.05)


def test_the_ramp_of_the_card():
    loss = MDCSLoss(COUNTS)
    for epoch, weight in ((0, 0.0), (10, 0.3), (20, 0.6), (300, 0.6)):
        loss.set_epoch(epoch)
        assert loss.alpha * loss.ramp == pytest.approx(weight, abs=1e-12)
    assert MDCSLoss(COUNTS, warm_epochs=0).ramp == 1.0


def test_the_module_is_the_function(views):
    weak, strong, labels = views
    loss = MDCSLoss(COUNTS, lam=[0.0, 1.0, 2.0], alpha=0.5, selection="none")
    loss.set_epoch(5)
    wanted = mdcs_loss(weak, strong, labels, COUNTS, lam=[0.0, 1.0, 2.0], alpha=0.5, selection="none", ramp=0.25)
    found = loss(weak, strong, labels)
    for name in wanted:
        assert torch.equal(found[name], wanted[name])
    assert "ramp=0.25" in repr(loss)
    assert list(loss.state_dict()) == ["log_prior"]
    other = MDCSLoss(COUNTS.flip(0), lam=[0.0, 1.0, 2.0], alpha=0.5, selection="none")
    other.set_epoch(5)
    assert not torch.allclose(other(weak, strong, labels)["loss"], wanted["loss"])
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(weak, strong, labels)["loss"], wanted["loss"])


def test_combining_experts(views):
    weak = views[0]
    assert torch.allclose(combine_experts(weak), weak.mean(0))
    one = weak.clone()
    one[0] *= 100.0  # far surer than the others
    weights = combine_experts(one, "confidence")
    assert torch.equal(weights.argmax(-1), one[0].argmax(-1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lam": (1.0, 2.0)}, ShapeError, "2 entries of lam"),
        ({"strong": torch.zeros(3, 20, 4)}, ShapeError, "strong"),
        ({"labels": torch.zeros(19).long()}, ShapeError, "labels"),
        ({"labels": torch.full((20,), 5)}, DataError, "from 0 to 4"),
        (dict.fromkeys(("weak", "strong"), torch.zeros(3, 0, 5)) | {"labels": torch.zeros(0)}, DataError, "empty"),
        ({"counts": torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0])}, DataError, "min_count"),
        ({"counts": torch.ones(4)}, ShapeError, "4 classes"),
        ({"counts": torch.ones(5, 1)}, ShapeError, "one number for each class"),
        ({"selection": "all"}, ConfigError, "selection is one of"),
        ({"selection": "confident"}, ConfigError, "go together"),
        ({"selection": "confident", "threshold": 2.0}, ConfigError, "probability"),
        ({"threshold": 0.5}, ConfigError, "go together"),
        ({"direction": "strong_to_weak"}, ConfigError, "direction is one of"),
        ({"teacher": "best"}, ConfigError, "teacher is one of"),
        ({"alpha": -1.0}, ConfigError, "alpha"),
        ({"temperature": 0.0}, ConfigError, "temperature"),
        ({"ramp": 1.5}, ConfigError, "ramp"),
        ({"lam": (1.0, 2.0, math.nan)}, ConfigError, "finite"),
        ({"teacher_logits": torch.zeros(1, 20, 5)}, ShapeError, "teacher"),
    ],
)
def test_errors_say_what_to_do(views, change, error, message):
    given = dict(zip(("weak", "strong", "labels"), views)) | {"counts": COUNTS} | change
    arguments = [given.pop(name) for name in ("weak", "strong", "labels", "counts")]
    with pytest.raises(error, match=message):
        mdcs_loss(*arguments, **given)


def test_unseen_classes_get_a_count_only_when_asked(views):
    weak, strong, labels = views
    counts = torch.tensor([100, 30, 8, 3, 0])
    assert torch.allclose(
        mdcs_loss(weak, strong, labels, counts, min_count=1)["loss"], mdcs_loss(weak, strong, labels, COUNTS)["loss"]
    )
    with pytest.raises(ConfigError, match="no option 'gamma'"):
        MDCSLoss(COUNTS, gamma=2.0)
    with pytest.raises(ConfigError, match="warm_epochs"):
        MDCSLoss(COUNTS, warm_epochs=-1)
    with pytest.raises(ConfigError, match="counted from 0"):
        MDCSLoss(COUNTS).set_epoch(-1)
    with pytest.raises(ConfigError, match="how is"):
        combine_experts(weak, "vote")


# --- the classifier


def tail(generator, counts=(150, 40, 12), shift=1.6):
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    centres = torch.eye(3, 6) * 2 * shift
    return centres[labels] + torch.randn(len(labels), 6, generator=generator), labels


def test_the_classifier_learns_and_its_experts_lean_as_lam_says(generator):
    x, y = tail(generator)
    test_x, test_y = tail(generator, (200, 200, 200))
    model = MDCSClassifier(epochs=25, hidden=32, width=16, batch=32, warm_epochs=5).fit(x, y.numpy())
    assert model.score(test_x, test_y) > 0.8
    right = (model.expert_logits(test_x).argmax(-1) == test_y).double()
    often, rare = right[:, :200].mean(1), right[:, 400:].mean(1)
    assert (often.diff() < 0).all()
    assert (rare.diff() > 0).all()
    probabilities = model.predict_proba(test_x)
    assert probabilities.shape == (600, 3)
    assert probabilities.sum(1) == pytest.approx(1.0, abs=1e-5)
    assert model.history_[0]["kept"][0] <= len(x)
    assert len(model.history_) == 25
    assert model.counts_.tolist() == [150, 40, 12]


def test_the_classifier_keeps_names_repeats_itself_and_says_what_is_wrong(generator):
    x, y = tail(generator)
    names = [("a", "b", "c")[i] for i in y]
    before = torch.random.get_rng_state()
    one, other = (MDCSClassifier(epochs=2, seed=5).fit(x.numpy(), names) for _ in range(2))
    assert torch.equal(one.expert_logits(x), other.expert_logits(x))
    assert not torch.equal(one.expert_logits(x), MDCSClassifier(epochs=2, seed=6).fit(x, names).expert_logits(x))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set(one.predict(x)) <= {"a", "b", "c"}
    for call, error, message in (
        (lambda: MDCSClassifier().predict(x), NotFitted, "fit first"),
        (lambda: one.predict(x[:, :3]), ShapeError, "features"),
        (lambda: MDCSClassifier().fit(x, y[:-1]), ShapeError, "one label"),
        (lambda: MDCSClassifier().fit(x, torch.zeros_like(y)), DataError, "two classes"),
        (lambda: MDCSClassifier().fit(x * math.nan, y), DataError, "not finite"),
        (lambda: MDCSClassifier().fit(x[0], y), ShapeError, "rows"),
        (lambda: MDCSClassifier(epochs=0).fit(x, y), ConfigError, "at least 1"),
        (lambda: MDCSClassifier().set_params(depth=2), ConfigError, "depth"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_scikit_learn_takes_the_classifier(generator):
    sklearn = pytest.importorskip("sklearn.model_selection")
    from sklearn.base import clone, is_classifier

    x, y = tail(generator, (40, 40, 40))
    model = MDCSClassifier(epochs=3, hidden=8, width=8)
    assert is_classifier(model)
    assert clone(model).get_params() == model.get_params()
    scores = sklearn.cross_val_score(model, x.numpy(), y.numpy(), cv=3)
    assert scores.shape == (3,)
    assert scores.mean() > 0.5


# --- inside the Trainer


def test_the_trainer_trains_on_two_views_and_evaluates_on_one(tmp_path, generator):
    from transformers import TrainingArguments

    from kullback.distill import MDCSTrainer, TwoViews

    x, y = tail(generator, (60, 20, 8))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            branches = nn.Sequential(ExpertLinear(3, 6, 8, generator=generator), nn.ReLU())
            self.experts = MultiExpert(nn.Identity(), branches, CosineHead(8, 3, experts=3, generator=generator))

        def forward(self, x):
            return self.experts(x)

    data = [{"x": row, "label": int(label)} for row, label in zip(x, y)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=4, per_device_train_batch_size=22, learning_rate=0.02, seed=0,
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, optim="adamw_torch",
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    views = TwoViews(lambda row: row, lambda row: row + 0.1 * torch.ones(6), field="x")
    assert views(data[:5])["x"].shape == (10, 6)
    loss, model = MDCSLoss(torch.bincount(y), warm_epochs=2), Model()
    trainer = MDCSTrainer(model=model, args=arguments, train_dataset=data, data_collator=views, loss=loss)
    batch = views(data[:5])
    logits = model(batch["x"])["logits"]
    wanted = loss(logits[:, :5], logits[:, 5:], batch["labels"])["loss"]
    value, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert value.item() == pytest.approx(wanted.item())
    assert outputs["logits"].shape == (5, 3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert 0.0 < loss.ramp <= 1.0
    single = {"x": x[:7], "labels": y[:7]}
    trainer.compute_loss(model, single, return_outputs=True)
    assert trainer.compute_loss(model, single, return_outputs=True)[1]["logits"].shape == (7, 3)
    with pytest.raises(DataError, match="pixel_values"):
        TwoViews(views.weak, views.strong)(data[:2])
