"""The training loop of DiDi-Instruct: what a step does, what its settings do, resuming, and laws brought together."""

import copy
import itertools

import pytest
import torch
from torch import nn

from kullback.core.checkpoint import load_state, save_state
from kullback.core.errors import ConfigError, ShapeError
from kullback.distill.didi_trainer import DiDiSettings, DiDiTrainer
from kullback.models.denoisers import FlatDenoiser, TokenDiscriminator, TransformerDenoiser
from kullback.models.masked_diffusion import mdm_exact_distribution

SYMBOLS, LENGTH, MASK = 2, 2, 2
QUICK = {
    "batch": 64, "learning_rate": 3e-3, "discriminator_rate": 5e-3, "warmup": 0, "iterations": 10_000, "ema": 0.9,
    "kl_beta": 0.0, "entropy": 0.0,
}  # fmt: skip


def parts(seed=0, **settings):
    source = torch.Generator().manual_seed(seed)
    teacher = FlatDenoiser(SYMBOLS, LENGTH, embedding=4, hidden=16, generator=source)
    discriminator = TokenDiscriminator(teacher, generator=source)
    return DiDiTrainer(
        teacher, discriminator, mask_id=MASK, length=LENGTH, settings=DiDiSettings(**{**QUICK, **settings}),
        generator=source,
    )  # fmt: skip


def draws(law, batch, seed=1):
    source = torch.Generator().manual_seed(seed)
    words = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    while True:
        yield words[torch.multinomial(law, batch, replacement=True, generator=source)]


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


class Table(nn.Module):
    """A denoiser or discriminator with a number of its own for each state of three places: nothing limits it."""

    def __init__(self, *outputs):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(27, 3, *outputs))

    def forward(self, z, t=None):
        return self.values[z @ torch.tensor([9, 3, 1])]


def chain_law():
    step = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    return 0.5 * step.unsqueeze(-1) * step


def distilled(steps=250, **settings):
    """The distance to a chain's law, in total variation at 8 steps, of a student whose teacher knows nothing."""
    law = chain_law().flatten()
    words = torch.cartesian_prod(*[torch.arange(2)] * 3)
    source = torch.Generator().manual_seed(1)
    quick = {"learning_rate": 2e-2, "discriminator_rate": 5e-2, "iterations": steps, "normalise": "batch"}
    trainer = DiDiTrainer(
        Table(2), Table(), mask_id=MASK, length=3, settings=DiDiSettings(**{**QUICK, **quick, **settings}),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for _ in range(steps):
        trainer.step(words[torch.multinomial(law, 64, replacement=True, generator=source)])
    found = mdm_exact_distribution(lambda z, t: trainer.ema(z).detach(), 2, 3, 8).flatten()
    return 0.5 * (found - law).abs().sum().item()


def test_the_student_comes_to_the_law_of_the_data_which_its_teacher_misses():
    """At first its distance is 0.56; without the intermediate state, or without its score, it stays there."""
    assert distilled() < 0.3
    for kind in ("one_step", "direct_score"):
        assert distilled(120, trajectory=kind) > 0.5


def test_a_step_moves_student_discriminator_and_average_as_told():
    trainer = parts(reference="teacher", reference_steps=4, discriminator_first=1, student_every=2)
    kept = [weights(model) for model in (trainer.student, trainer.discriminator, trainer.ema, trainer.teacher)]
    first = trainer.step()
    assert "loss" not in first  # the discriminator alone
    assert torch.equal(weights(trainer.student), kept[0])
    assert not torch.equal(weights(trainer.discriminator), kept[1])
    second = trainer.step()
    assert {"loss", "reward", "matching_kl", "entropy", "discriminator_accuracy"} <= set(second)
    assert not torch.equal(weights(trainer.student), kept[0])
    torch.testing.assert_close(weights(trainer.ema), torch.lerp(kept[2], weights(trainer.student), 0.1))
    assert torch.equal(weights(trainer.teacher), kept[3])
    assert "loss" not in trainer.step()


def test_the_learning_rate_warms_up_and_falls_to_zero():
    trainer = parts(warmup=2, iterations=6)
    rates = [found["learning_rate"] / 3e-3 for found in (trainer.step(x) for x in first(6, LAW, 64))]
    assert rates == pytest.approx([2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0])


LAW = torch.full((4,), 0.25)


def first(count, law, batch):
    return list(itertools.islice(draws(law, batch), count))


@pytest.mark.parametrize(
    "settings",
    [
        {"normalise": "batch"},
        {"tau_shared": True},
        {"coupled": False},
        {"trajectory": "one_step"},
        {"trajectory": "direct_score"},
        {"remask": 0.3, "beta": (2.0, 2.0), "over_density": True},
        {"kl_beta": 1.0, "kl_mix": 0.5, "entropy": 0.1},
        {"correct_smoothing": True},
    ],
)
def test_every_setting_takes_steps_that_differ_from_the_default(settings):
    plain, other = parts(), parts(**settings)
    for x in first(3, LAW, 64):
        found = [plain.step(x), other.step(x)]
        assert all(value == value for value in found[1].values())
    assert not torch.equal(weights(plain.student), weights(other.student))


def test_the_regularisers_hold_the_student_at_its_teacher():
    free, held = parts(), parts(kl_beta=100.0, kl=(1.0, 1.0))
    for x in first(60, torch.tensor([0.7, 0.1, 0.1, 0.1]), 64):
        free.step(x)
        held.step(x)
    away = [(weights(trainer.student) - weights(trainer.teacher)).norm().item() for trainer in (free, held)]
    assert away[1] < 0.7 * away[0]


def test_resumed_equals_straight(tmp_path):
    batches = first(6, LAW, 64)
    straight, broken, resumed = parts(), parts(), parts(seed=5)
    for x in batches:
        straight.step(x)
    for x in batches[:3]:
        broken.step(x)
    save_state(tmp_path, "didi", broken.state_dict())
    resumed.teacher.load_state_dict(broken.teacher.state_dict())
    resumed.load_state_dict(load_state(tmp_path, "didi"))
    for x in batches[3:]:
        resumed.step(x)
    assert torch.equal(weights(straight.student), weights(resumed.student))
    assert torch.equal(weights(straight.ema), weights(resumed.ema))
    assert torch.equal(weights(straight.discriminator), weights(resumed.discriminator))


def test_prompts_are_kept_and_transformers_are_distilled(generator):
    teacher = TransformerDenoiser(3, 6, width=16, layers=1, heads=2, generator=generator)
    discriminator = TokenDiscriminator(teacher, generator=generator)
    seen = []
    inner = discriminator.forward
    discriminator.forward = lambda z, t: (seen.append(z), inner(z, t))[1]
    trainer = DiDiTrainer(
        teacher, discriminator, mask_id=3, length=6, settings=DiDiSettings(batch=8), generator=generator
    )
    prompt = torch.full((8, 6), 3)
    prompt[:, :2] = torch.randint(3, (8, 2), generator=generator)
    data = torch.randint(3, (8, 6), generator=generator)
    data[:, :2] = prompt[:, :2]
    before = torch.random.get_rng_state()
    trainer.step(data, prompt=prompt)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(seen[0][:, :2], torch.cat([prompt, prompt])[:, :2])
    assert (seen[0][:, 2:] == 3).any()


class Elsewhere(nn.Module):
    """A teacher on a device without data, which passes on what it was asked with, and answers in zeros."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device="meta"))
        self.seen = []

    def at(self, z, t, places):
        self.seen.append({z.device.type, t.device.type, places.device.type})
        return Here(int(z.shape[0] * z.shape[1]))


class Here:
    """What comes back to the device of the input."""

    def __init__(self, rows):
        self.rows = rows

    def to(self, device):
        assert device.type == "cpu"
        return torch.zeros(self.rows, SYMBOLS)


def test_a_teacher_may_rest_on_another_device():
    trainer = parts(reference="teacher", reference_steps=1)
    trainer.teacher = Elsewhere()
    trainer._taught.model = trainer.teacher
    trainer._reference(torch.full((64, LENGTH), MASK))
    assert trainer.teacher.seen
    assert all(devices == {"meta"} for devices in trainer.teacher.seen)


def test_steps_before_the_student_moves_keep_no_graph(monkeypatch):
    kept = []
    from kullback.distill import didi_trainer

    plain = didi_trainer.two_step_trajectory
    monkeypatch.setattr(didi_trainer, "two_step_trajectory", lambda *a, **k: kept.append(plain(*a, **k)) or kept[-1])
    trainer = parts(discriminator_first=2, student_every=2)
    for x in first(4, LAW, 64):
        trainer.step(x)
    assert [way.log_prob.requires_grad for way in kept] == [False, False, False, True]


def test_what_is_refused():
    trainer = parts()
    with pytest.raises(ConfigError, match='reference="data"'):
        trainer.step()
    with pytest.raises(ConfigError, match="reference"):
        parts(reference="teacher").step(torch.zeros(64, 2, dtype=torch.long))
    with pytest.raises(ShapeError, match="whole sequences"):
        trainer.step(torch.zeros(3, 2, dtype=torch.long))
    for wrong in (
        {"batch": 6}, {"learning_rate": 0.0}, {"ema": 1.0}, {"reference": "both"}, {"normalise": "all"},
        {"iterations": 0}, {"remask": 1.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            DiDiSettings(**wrong)


def test_the_student_given_is_copied():
    trainer = parts()
    own = copy.deepcopy(trainer.teacher)
    source = torch.Generator().manual_seed(0)
    other = DiDiTrainer(
        trainer.teacher, trainer.discriminator, mask_id=MASK, length=LENGTH, settings=DiDiSettings(**QUICK),
        generator=source, student=own,
    )  # fmt: skip
    other.step(first(1, LAW, 64)[0])
    assert torch.equal(weights(own), weights(trainer.teacher))
