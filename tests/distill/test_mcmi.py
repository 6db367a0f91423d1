"""Conditional mutual information: the card's numbers, identities by brute force, the meter, and the loss's gradient."""

import math

import pytest
import torch

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.distill.mcmi import CMIMeter, class_centroids, effective_dimension, empirical_cmi, mcmi_loss
from kullback.divergences import kl

PROBS = torch.tensor(
    [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64
)
LABELS = torch.tensor([0, 0, 1, 1, 2])


def random_case(generator, n=40, classes=5, scale=2.0):
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator)


def entropy(probs):
    return -torch.special.xlogy(probs, probs).sum(-1)


def test_the_worked_example():
    centroids = class_centroids(PROBS, LABELS, 3)
    spread = kl(PROBS.log(), centroids[LABELS].log())
    assert spread.tolist() == pytest.approx([0.0227, 0.0211, 0.0257, 0.0226, 0.0], abs=5e-5)
    assert empirical_cmi(PROBS.log(), LABELS).item() == pytest.approx(0.0184233743, abs=1e-10)
    assert entropy(centroids)[LABELS].mean().item() == pytest.approx(0.8303845393, abs=1e-10)
    assert entropy(PROBS).mean().item() == pytest.approx(0.8119611650, abs=1e-10)
    per_class = empirical_cmi(PROBS.log(), LABELS, per_class=True)
    assert per_class.tolist() == pytest.approx([spread[:2].mean().item(), spread[2:4].mean().item(), 0.0], abs=1e-12)


def test_it_is_the_entropy_of_centroids_less_that_of_outputs(generator):
    logits, labels = random_case(generator)
    probs = logits.softmax(-1)
    wanted = entropy(class_centroids(probs, labels, 5))[labels].mean() - entropy(probs).mean()
    assert empirical_cmi(logits, labels).item() == pytest.approx(wanted.item(), abs=1e-12)
    constant = logits[:5][labels]
    assert empirical_cmi(constant, labels).item() == pytest.approx(0.0, abs=1e-12)
    alone = torch.arange(5)
    assert empirical_cmi(logits[:5], alone).item() == pytest.approx(0.0, abs=1e-12)


def test_it_is_the_mutual_information_of_sample_and_output_in_each_class(generator):
    logits, labels = random_case(generator)
    probs, total = logits.softmax(-1), 0.0
    for label in range(5):
        table = probs[labels == label]
        joint = table / table.sum()
        product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        total += (labels == label).double().mean().item() * (joint * (joint / product).log()).sum().item()
    assert empirical_cmi(logits, labels).item() == pytest.approx(total, abs=1e-12)


def test_bounds_and_the_pair_of_mirrored_samples(generator):
    for scale in (0.1, 1.0, 30.0):
        logits, labels = random_case(generator, scale=scale)
        value = empirical_cmi(logits, labels).item()
        top = entropy(class_centroids(logits.softmax(-1), labels, 5))[labels].mean().item()
        assert 0.0 <= value <= top <= math.log(5)
    for e in (0.1, 0.3, 1e-300):
        pair = torch.tensor([[1 - e, e], [e, 1 - e]], dtype=torch.float64)
        wanted = math.log(2) - entropy(pair[0]).item()
        assert empirical_cmi(pair.log(), torch.tensor([0, 0])).item() == pytest.approx(wanted, abs=1e-12)
    exact = torch.eye(2, dtype=torch.float64).log()
    assert empirical_cmi(exact, torch.tensor([0, 0])).item() == pytest.approx(math.log(2), abs=1e-12)


def test_constant_centroids_have_the_exact_gradient_and_stale_ones_another(generator):
    logits, labels = random_case(generator)
    logits.requires_grad_()
    (through,) = torch.autograd.grad(empirical_cmi(logits, labels), logits)
    exact = class_centroids(logits.detach().softmax(-1), labels, 5)
    (constant,) = torch.autograd.grad(empirical_cmi(logits, labels, centroids=exact), logits)
    assert (through - constant).abs().max().item() < 1e-12
    stale = class_centroids((logits.detach() + torch.randn(1, 5, generator=generator)).softmax(-1), labels, 5)
    (other,) = torch.autograd.grad(empirical_cmi(logits, labels, centroids=stale), logits)
    assert (through - other).abs().max().item() > 1e-4
    assert empirical_cmi(logits, labels, centroids=stale) > empirical_cmi(logits, labels)


def test_the_gradient_of_the_loss_and_its_sign(generator):
    logits, labels = random_case(generator)
    probs = logits.softmax(-1)
    centroids = class_centroids(probs, labels, 5)
    spread = kl(probs.log(), centroids[labels].log())
    by_hand = probs * ((probs / centroids[labels]).log() - spread.unsqueeze(-1)) / len(labels)
    hard = (probs - torch.nn.functional.one_hot(labels, 5)) / len(labels)
    logits.requires_grad_()
    for lam in (0.0, 0.25):
        (found,) = torch.autograd.grad(mcmi_loss(logits, labels, centroids, lam=lam).loss, logits)
        assert (found - (hard - lam * by_hand)).abs().max().item() < 1e-12
    assert (found - (hard + lam * by_hand)).abs().max().item() > 1e-4  # the opposite sign collapses the classes
    loss, ce, cmi = mcmi_loss(logits, labels, centroids, lam=0.25, ce_weight=2.0)
    assert loss.item() == pytest.approx((2.0 * ce - 0.25 * cmi).item(), abs=1e-14)
    assert ce.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-12)
    assert cmi.item() == pytest.approx(spread.mean().item(), abs=1e-12)


@pytest.mark.parametrize("lam", [0.25, 30.0])
def test_the_fused_loss_is_the_sum_of_its_parts(generator, lam):
    """Labels and groups that do not count, coarser groups, and outputs that are exactly 0."""
    logits, labels = random_case(generator)
    logits[3, (labels[3] + 1) % 5] = -torch.inf
    groups = labels // 2
    centroids = class_centroids(torch.randn(40, 5, generator=generator, dtype=torch.float64).softmax(-1), groups, 3)
    labels, groups = labels.clone(), groups.clone()
    labels[5], groups[7] = -100, -1
    logits.requires_grad_()
    found = mcmi_loss(logits, labels, centroids, lam=lam, ce_weight=0.7, groups=groups)
    log_probs = logits.log_softmax(-1)
    kept = (labels >= 0) & (groups >= 0)
    ratio = log_probs.clamp(min=-1e30) - centroids[groups.clamp(min=0)].log()
    ce = torch.nn.functional.cross_entropy(logits, labels)
    cmi = (log_probs.exp() * ratio).sum(-1)[kept].mean()
    torch.testing.assert_close(torch.stack(found), torch.stack([0.7 * ce - lam * cmi, ce, cmi]), rtol=1e-12, atol=1e-12)
    keep = torch.arange(40) != 3  # autograd itself has no gradient at an infinite logit
    for one, other in ((found.loss, 0.7 * ce - lam * cmi), (found.ce, ce), (found.cmi, cmi)):
        (mine,) = torch.autograd.grad(one, logits, retain_graph=True)
        (wanted,) = torch.autograd.grad(other, logits, retain_graph=True)
        torch.testing.assert_close(mine[keep], wanted[keep], rtol=1e-10, atol=1e-13)
        assert mine.isfinite().all()
    (plain,) = torch.autograd.grad(0.7 * ce, logits)
    (mine,) = torch.autograd.grad(found.loss, logits)
    assert not torch.allclose(mine[keep], plain[keep], atol=1e-4)


def test_the_centroids_are_left_as_they_were(generator):
    logits, labels = random_case(generator, n=5)
    labels = torch.arange(5)  # each row once, in order: what is gathered could be the centroids themselves
    centroids = class_centroids(logits.softmax(-1).flip(0), labels, 5)
    before = centroids.clone()
    mcmi_loss(logits, labels, centroids, lam=0.2)
    assert torch.equal(centroids, before)


def test_the_meter_counts_ties_as_argmax_does(generator):
    logits = torch.randint(0, 3, (300, 6), generator=generator).double()
    logits[:4] = -torch.inf
    logits[:4, 2] = 0.0
    labels = torch.randint(6, (300,), generator=generator)
    meter = CMIMeter(6).update(logits, labels)
    assert meter.accuracy == pytest.approx((logits.argmax(-1) == labels).double().mean().item(), abs=1e-12)
    assert meter.accuracy < (logits.gather(1, labels.unsqueeze(1)) == logits.amax(1, keepdim=True)).double().mean()
    finite = logits.isfinite().all(-1)
    part = CMIMeter(6).update(logits[finite], labels[finite])
    assert part.cmi == pytest.approx(empirical_cmi(logits[finite], labels[finite]).item(), abs=1e-12)
    assert math.isfinite(meter.cmi)
    warm = CMIMeter(6, temperature=2.0).update(logits[finite], labels[finite])
    assert warm.cmi == pytest.approx(empirical_cmi(logits[finite], labels[finite], temperature=2.0).item(), abs=1e-12)


def test_a_step_on_the_loss_raises_the_information(generator):
    logits, labels = random_case(generator, n=400)
    logits[torch.arange(400), labels] += 4.0
    logits.requires_grad_()
    centroids = class_centroids(logits.detach().softmax(-1), labels, 5)

    def after(lam):
        (slope,) = torch.autograd.grad(mcmi_loss(logits, labels, centroids, lam=lam).loss, logits)
        return empirical_cmi(logits.detach() - 20.0 * slope, labels).item()

    assert after(5.0) > after(0.0)


def test_controls(generator):
    logits, labels = random_case(generator)
    probs = logits.softmax(-1)
    centroids = class_centroids(probs, labels, 5)

    def bonus(name, **options):
        return mcmi_loss(logits, labels, centroids, lam=1.0, bonus=name, **options).cmi.item()

    assert bonus("entropy") == pytest.approx(entropy(probs).mean().item(), abs=1e-12)
    target = torch.full((40, 5), 0.05, dtype=torch.float64).scatter(1, labels.unsqueeze(1), 0.8)
    smoothed = -kl(probs.log(), target.log()).mean().item()
    assert bonus("smoothing", smoothing=0.2) == pytest.approx(smoothed, abs=1e-12)
    pairs = [kl(probs[i].log(), probs[j].log()).item() for i in range(40) for j in range(40) if labels[i] != labels[j]]
    assert bonus("separation") == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_temperature_shifts_and_the_order_of_classes(generator):
    logits, labels = random_case(generator, scale=1.0)
    one, other = (empirical_cmi(logits, labels, temperature=t).item() for t in (400.0, 800.0))
    assert other / one == pytest.approx(0.25, rel=1e-2)
    value = empirical_cmi(logits, labels).item()
    assert empirical_cmi(logits + torch.randn(40, 1, generator=generator), labels).item() == pytest.approx(value)
    order = torch.randperm(5, generator=generator)
    assert empirical_cmi(logits[:, order], torch.argsort(order)[labels]).item() == pytest.approx(value, abs=1e-12)
    single = empirical_cmi(logits.half(), labels)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(value, rel=1e-2)


def test_the_meter_is_the_batch_in_any_order_and_parts(generator):
    logits, labels = random_case(generator, n=90)
    labels[3] = -100
    kept = labels >= 0
    whole = CMIMeter(5, separation=True).update(logits, labels)
    assert whole.cmi == pytest.approx(empirical_cmi(logits, labels).item(), abs=1e-12)
    torch.testing.assert_close(whole.per_class, empirical_cmi(logits, labels, per_class=True), rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.centroids(), class_centroids(logits[kept].softmax(-1), labels[kept], 5))
    order = torch.randperm(90, generator=generator)
    one, other = (CMIMeter(5, separation=True).update(logits[rows], labels[rows]) for rows in order.split(50))
    merged = one.merge(other)
    assert merged.cmi == pytest.approx(whole.cmi, abs=1e-13)
    assert merged.separation == pytest.approx(whole.separation, rel=1e-12)
    probs, labels = logits[kept].softmax(-1), labels[kept]
    cross = -(probs @ probs.log().T)
    apart = labels.unsqueeze(1) != labels
    assert whole.separation == pytest.approx(cross[apart].mean().item(), rel=1e-12)
    assert whole.normalised == pytest.approx(whole.cmi / whole.separation)
    assert whole.accuracy == pytest.approx((probs.argmax(-1) == labels).double().mean().item())
    assert whole.mean_cross_entropy == pytest.approx(
        torch.nn.functional.cross_entropy(logits[kept], labels).item(), abs=1e-12
    )


def test_an_average_of_batches_is_not_the_information(generator):
    """What a meter without sums would report: each batch's own centroids fit it too well."""
    logits, labels = random_case(generator, n=400)
    averaged = sum(empirical_cmi(logits[i : i + 20], labels[i : i + 20]).item() for i in range(0, 400, 20)) / 20
    assert averaged < 0.9 * empirical_cmi(logits, labels).item()


def test_weights_are_repeats_and_groups_may_be_coarser():
    weights = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    repeated = class_centroids(PROBS[[0, 0, 1, 2, 3, 4]], LABELS[[0, 0, 1, 2, 3, 4]], 3)
    torch.testing.assert_close(class_centroids(PROBS, LABELS, 3, weights=weights), repeated)
    groups = torch.tensor([0, 0, 0, 0, 1])
    centroids = class_centroids(PROBS, groups, 2)
    terms = mcmi_loss(PROBS.log(), LABELS, centroids, lam=0.1, groups=groups)
    meter = CMIMeter(3, num_groups=2).update(PROBS.log(), LABELS, groups)
    assert terms.cmi.item() == pytest.approx(meter.cmi, abs=1e-12)
    left_out = LABELS.clone()
    left_out[1] = -100
    part = mcmi_loss(PROBS.log(), left_out, class_centroids(PROBS, LABELS, 3), lam=0.1)
    rows = [0, 2, 3, 4]
    whole = mcmi_loss(PROBS[rows].log(), LABELS[rows], class_centroids(PROBS, LABELS, 3), lam=0.1)
    assert part.loss.item() == pytest.approx(whole.loss.item(), abs=1e-14)


def test_empty_classes_and_effective_dimension(generator):
    with pytest.warns(UserWarning, match="1 of 4 classes"):
        assert class_centroids(PROBS, LABELS, 4)[3].isnan().all()
    uniform = class_centroids(PROBS, LABELS, 4, empty="uniform")
    assert uniform[3].tolist() == pytest.approx([1 / 3] * 3)
    assert math.isnan(CMIMeter(3, num_groups=4).update(PROBS.log(), LABELS).per_class[3].item())
    plane = 0.2 + 0.01 * torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    assert effective_dimension(plane, torch.zeros(4000).long()).item() == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_compiled_meter_is_its_twin(generator, temperature):
    pytest.importorskip("numba")
    for n, classes in ((50, 2), (300, 7), (40, 67)):
        logits, labels = random_case(generator, n, classes, scale=4.0)
        logits[3, (labels[3] + 1) % classes], labels[5] = -torch.inf, -100
        groups = labels.clamp(min=0) % 2
        options = {"num_groups": 2, "temperature": temperature}
        found, twin = (
            CMIMeter(classes, **options, compiled=compiled).update(logits.float(), labels, groups)
            for compiled in (True, False)
        )
        exact = CMIMeter(classes, **options).update(logits, labels, groups)
        assert found.accuracy == twin.accuracy == exact.accuracy
        for meter in (found, twin):
            for name in ("cmi", "mean_cross_entropy"):
                assert getattr(meter, name) == pytest.approx(getattr(exact, name), rel=1e-5, abs=1e-7)
            torch.testing.assert_close(meter.centroids(), exact.centroids(), rtol=0, atol=3e-7)
        unlike = CMIMeter(classes, num_groups=2, temperature=2 * temperature).update(logits.float(), labels, groups)
        assert unlike.cmi != pytest.approx(exact.cmi, rel=1e-5, abs=1e-7)
    ties = torch.randint(0, 3, (300, 6), generator=generator).float()
    labels = torch.randint(6, (300,), generator=generator)
    one, other = (CMIMeter(6, separation=True, compiled=c).update(ties, labels) for c in (True, False))
    assert one.accuracy == other.accuracy == (ties.argmax(-1) == labels).double().mean().item()
    assert one.separation == pytest.approx(other.separation, rel=1e-6)


@pytest.mark.parametrize("compiled", [None, False])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_meter_refuses_logits_of_a_diverged_model(compiled, wrong):
    logits = PROBS.log().float()
    logits[2, 1] = wrong
    with pytest.raises(DataError, match="diverged"):
        CMIMeter(3, compiled=compiled).update(logits, LABELS)
    with pytest.raises(DataError, match="diverged"):
        CMIMeter(3, compiled=compiled).update(torch.full((1, 3), -math.inf), LABELS[:1])


def test_what_is_refused():
    logits, centroids = PROBS.log(), class_centroids(PROBS, LABELS, 3)
    with pytest.raises(ConfigError, match="0 or more"):
        mcmi_loss(logits, LABELS, centroids, lam=-0.25)
    with pytest.raises(ConfigError, match="0 or more"):
        mcmi_loss(logits, LABELS, centroids, lam=math.nan)
    with pytest.raises(DataError, match="does not sum to 1"):
        mcmi_loss(logits, LABELS, 1.01 * centroids, lam=0.25)
    with pytest.raises(DataError, match="does not sum to 1"):
        mcmi_loss(logits, LABELS, centroids * torch.tensor([[math.nan], [1.0], [1.0]]), lam=0.25)
    with pytest.raises(ConfigError, match="bonus"):
        mcmi_loss(logits, LABELS, centroids, lam=0.25, bonus="other")
    with pytest.raises(ShapeError, match="one row a sample"):
        mcmi_loss(logits.unsqueeze(0), LABELS, centroids, lam=0.25)
    with pytest.raises(ShapeError, match="one row a class"):
        mcmi_loss(logits, LABELS, centroids[:, :2], lam=0.25)
    with pytest.raises(DataError, match="counted from 0"):
        class_centroids(PROBS, LABELS + 1, 3)
    with pytest.raises(DataError, match="whole numbers"):
        empirical_cmi(logits, LABELS.double())
    with pytest.raises(ConfigError, match="temperature"):
        empirical_cmi(logits, LABELS, temperature=0.0)
    with pytest.raises(DataError, match="no sample"):
        empirical_cmi(logits, torch.full((5,), -1))
    with pytest.raises(DataError, match="seen no sample"):
        _ = CMIMeter(3).cmi
    with pytest.raises(ConfigError, match="separation=True"):
        _ = CMIMeter(3).update(logits, LABELS).separation
    with pytest.raises(ShapeError, match="one kind"):
        CMIMeter(3).merge(CMIMeter(4))
