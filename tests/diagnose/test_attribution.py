"""TRAK of all logits and of ensembles, beside its authors' package; the scale of predicted shifts."""

import pytest
import torch
from torch import nn

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator
from kullback.diagnose.attribution import (
    TRAKFeatures,
    calibrated_scale,
    ensemble_scores,
    fit_datamodels,
    predict_without,
)
from kullback.models.ensemble import EnsembleMLP, StackedEnsemble, train_ensemble


def classes(points=60, seed=0):
    draw = generator(seed, "classes")
    inputs = torch.randn(points, 4, generator=draw, dtype=torch.float64)
    return inputs, (inputs[:, :3] + 0.5 * torch.randn(points, 3, generator=draw).double()).argmax(1)


@pytest.fixture(scope="module")
def networks():
    ensemble = EnsembleMLP(2, (4, 3, 3), generator=generator(1), dtype=torch.float64)
    return train_ensemble(ensemble, *classes(), steps=60)


def features(network, **options):
    return TRAKFeatures(network, generator=generator(2), **{"dimensions": None, **options})


def test_members_of_ensembles_are_copies_of_single_modules(networks):
    inputs, _ = classes()
    stacked = StackedEnsemble([networks.member(place) for place in (1, 0)])
    for place in (0, 1):
        member = networks.member(place)
        torch.testing.assert_close(member(inputs), networks(inputs)[place], atol=1e-12, rtol=0)
        torch.testing.assert_close(stacked.member(1 - place)(inputs), member(inputs), atol=1e-12, rtol=0)
        nn.init.zeros_(member[0].weight)
    assert networks.weights[0].abs().min() > 0, "a copy"


def test_gradients_of_logits_are_those_of_autograd(networks):
    inputs, _ = classes()
    member = networks.member(0)
    found = features(member, chunk=7).logit_features(inputs)
    logits = member(inputs[11:12])[0]
    by_autograd = torch.autograd.grad(logits[2] - logits.mean(), list(member.parameters()))
    torch.testing.assert_close(found[11, 2], torch.cat([g.flatten() for g in by_autograd]))
    assert found.sum(1).abs().max() < 1e-12, "centred logits"


@pytest.mark.parametrize("options", [{}, {"dimensions": 5}, {"dimensions": 90}, {"penalty": 3.0}])
@pytest.mark.parametrize("weighted", [True, False])
def test_scores_of_the_margin_are_a_mixture_of_those_of_the_logits(networks, options, weighted):
    """The margin z_y - logsumexp_{c != y} z_c has the slope 1 in z_y, and minus a softmax of the others in these."""
    train, (inputs, labels) = classes(), classes(9, seed=3)
    member = networks.member(0)
    trak = features(member, **options)
    beta = trak.logit_scores(train, inputs, weighted=weighted)
    assert beta.shape == (60, 9, 3)
    own = nn.functional.one_hot(labels, 3).bool()
    with torch.no_grad():
        slope = torch.where(own, 1.0, -member(inputs).masked_fill(own, -torch.inf).softmax(-1))
    margins = trak.scores(train, (inputs, labels), weighted=weighted)
    torch.testing.assert_close((beta * slope).sum(-1), margins)
    assert not torch.allclose((beta * own).sum(-1), margins), "the label's logit alone is not the margin"


def test_both_dimensions_are_solved_alike(networks):
    """27 parameters, and 60 points or the first 20 of them: in parameters and in points."""
    inputs, labels = classes()
    test = classes(9, seed=3)
    for count in (20, 60):
        trak = features(networks.member(0), penalty=0.1)
        phi, other = trak.features(inputs[:count], labels[:count]), trak.features(*test)
        right = networks(inputs[:count])[0].softmax(-1)[torch.arange(count), labels[:count]].detach()
        gram = phi.T @ (phi * (right * (1 - right)).unsqueeze(1)) + 0.1 * torch.eye(27).double()
        expected = phi @ torch.linalg.solve(gram, other.T) * (1 - right).unsqueeze(1)
        torch.testing.assert_close(trak.scores((inputs[:count], labels[:count]), test), expected)


def test_projections_keep_products_of_gradients(networks):
    """On average over draws, dense or sparse; the sparse one is a matrix with one sign in each row."""
    inputs, labels = classes()
    network = networks.member(0)
    exact = features(network).features(inputs, labels)
    gram = exact @ exact.T
    for projection in ("dense", "sparse"):
        errors, total = [], torch.zeros_like(gram)
        for seed in range(200):
            trak = TRAKFeatures(network, dimensions=16, generator=generator(seed, "sketch"), projection=projection)
            phi = trak.features(inputs, labels)
            total += phi @ phi.T / 200
            errors.append((phi @ phi.T - gram).norm() / gram.norm())
        assert (total - gram).norm() / gram.norm() < 0.25 * torch.stack(errors).mean()
    matrix = torch.zeros(27, 16).scatter(1, trak.places.unsqueeze(1), trak.projection).double()
    torch.testing.assert_close(phi, exact @ matrix)
    assert trak.logit_features(inputs).shape == (60, 3, 16)
    torch.testing.assert_close(trak.logit_features(inputs), features(network).logit_features(inputs) @ matrix)
    with pytest.raises(ConfigError, match="sparse"):
        TRAKFeatures(network, dimensions=16, generator=generator(0), projection="fourier")


def test_logit_scores_predict_retraining_without_points():
    """Softmax regression to its optimum: one point left out moves the logits as the scores say, up to curvature."""
    inputs, labels = classes(80)
    inputs = inputs[:, :3]

    def fitted(kept):
        model = nn.Linear(3, 3, bias=False).double()
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )

        def loss():
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(model(inputs[kept]), labels[kept], reduction="sum")
            value = value + 0.5 * model.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return model

    def seen(model):
        logits = model(inputs).detach()
        return logits - logits.mean(-1, keepdim=True)

    whole = fitted(torch.arange(80))
    beta = features(whole, penalty=1.0).logit_scores((inputs, labels), inputs)
    predicted, true = [], []
    for place in range(6):
        without = seen(fitted(torch.arange(80) != place))
        true.append(without - seen(whole))
        predicted.append(predict_without(beta, seen(whole), [place]) - seen(whole))
    pair = torch.stack([torch.stack(predicted).flatten(), torch.stack(true).flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([pair[0], -pair[1]]))[0, 1] < 0, "the sign is that of leaving out"


def test_ensembles_average_the_pull_and_the_reach_apart(networks):
    train, test = classes(), classes(9, seed=3)
    members = [features(networks.member(place), penalty=0.1) for place in (0, 1)]
    assert torch.equal(ensemble_scores(members[:1], train, test), members[0].scores(train, test))
    torch.testing.assert_close(ensemble_scores(members[:1], train, test[0]), members[0].logit_scores(train, test[0]))
    pulls, reaches = [], []
    for place, member in enumerate(members):
        with torch.no_grad():
            right = networks(train[0])[place].softmax(-1)[torch.arange(60), train[1]]
        pulls.append(1 - right)
        reaches.append(member.logit_scores(train, test[0]) / (1 - right).view(-1, 1, 1))
    expected = ((pulls[0] + pulls[1]) / 2).view(-1, 1, 1) * (reaches[0] + reaches[1]) / 2
    found = ensemble_scores(members, train, test[0])
    torch.testing.assert_close(found, expected)
    plain = sum(member.logit_scores(train, test[0]) for member in members) / 2
    assert not torch.allclose(found, plain)
    with pytest.raises(ConfigError, match="one model"):
        ensemble_scores([], train, test)


def test_scores_are_those_of_the_package_of_trak(networks, tmp_path):
    trak = pytest.importorskip("trak")
    projectors = pytest.importorskip("trak.projectors")
    train, test = [(x.float(), y) for x, y in (classes(), classes(9, seed=3))]
    single = [networks.member(place).float() for place in (0, 1)]
    peer = trak.TRAKer(
        model=networks.member(0).float(), task="image_classification", train_set_size=60, device="cpu",
        save_dir=str(tmp_path / "trak"),
        projector=projectors.NoOpProjector(grad_dim=27, proj_dim=27, device="cpu"), proj_dim=27,
        use_half_precision=False, lambda_reg=0.01 / 27, logging_level=40,
    )  # fmt: skip
    for place, network in enumerate(single):
        peer.load_checkpoint(network.state_dict(), model_id=place)
        peer.featurize(batch=train, num_samples=60)
    peer.finalize_features()
    for place, network in enumerate(single):
        peer.start_scoring_checkpoint("test", network.state_dict(), model_id=place, num_targets=9)
        peer.score(batch=test, num_samples=9)
    alone = [torch.as_tensor(peer.finalize_scores("test", model_ids=[place])).clone() for place in (0, 1)]
    together = torch.as_tensor(peer.finalize_scores("test")).clone()
    members = [features(network, penalty=0.01) for network in single]
    for theirs, member in zip(alone, members, strict=True):  # up to a factor: the package scales its inverse
        ours = member.scores(train, test, weighted=False)
        torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), atol=1e-4, rtol=0)
        assert not torch.allclose(alone[0] / alone[0].norm(), alone[1] / alone[1].norm(), atol=1e-2)
    with torch.no_grad():
        pulls = [1 - n(train[0]).softmax(-1).gather(1, train[1].unsqueeze(1)) for n in single]
    apart = (pulls[0] + pulls[1]) / 2 * (alone[0] / pulls[0] + alone[1] / pulls[1]) / 2
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-4)


def test_the_scale_is_found_again():
    draw = generator(5, "scale")
    beta = torch.randn(12, 12, 3, generator=draw, dtype=torch.float64)
    masks = (torch.rand(40, 12, generator=draw) < 0.8).float()
    base = torch.randn(12, 3, generator=draw, dtype=torch.float64)
    shift = torch.einsum("mn,nkc->mkc", masks.double() - 1.0, beta)
    noise = 0.1 * torch.randn(40, 12, 3, generator=draw, dtype=torch.float64)
    assert calibrated_scale(beta, masks, base + 1.4 * shift + noise, base) == pytest.approx(1.4, abs=0.02)
    out = masks == 0
    mixed = base + torch.where(out.unsqueeze(-1), 1.7, 0.6) * shift
    assert calibrated_scale(beta, masks, mixed, base, where=out) == pytest.approx(1.7)
    assert calibrated_scale(beta, masks, mixed, base, where=~out) == pytest.approx(0.6)
    assert 0.6 < calibrated_scale(beta, masks, mixed, base.expand(40, -1, -1)) < 1.7
    factors = torch.full((12, 1), 0.6)
    factors[[1, 4]] = 1.7
    found = predict_without(beta, base, [1, 4], scale=factors)
    torch.testing.assert_close(found, base - factors * (beta[1] + beta[4]))


def test_shrunk_datamodels_are_stretched_again():
    """Ridge shrinks by a known factor where masks are many: the calibration on held-out masks undoes it."""
    draw = generator(6, "ridge")
    beta = torch.randn(5, 2, 2, generator=draw, dtype=torch.float64)
    masks = (torch.rand(4000, 5, generator=draw) < 0.5).double()
    fitted, _ = fit_datamodels(masks, torch.einsum("mn,nkc->mkc", masks, beta), penalty=1000.0)
    held = (torch.rand(200, 5, generator=draw) < 0.5).double()
    outputs = torch.einsum("mn,nkc->mkc", held, beta)
    found = calibrated_scale(fitted, held, outputs, beta.sum(0))
    assert found == pytest.approx(1.0 + 1000.0 / (4000 / 4), rel=0.05)


def test_bad_input():
    beta, masks, outputs, base = torch.ones(3, 2, 2), torch.zeros(4, 3), torch.zeros(4, 2, 2), torch.zeros(2, 2)
    with pytest.raises(ShapeError, match="held-out"):
        calibrated_scale(beta, masks[:, :2], outputs, base)
    with pytest.raises(ShapeError, match="where"):
        calibrated_scale(beta, masks, outputs, base, where=torch.ones(4, 3))
    with pytest.raises(DataError, match="move"):
        calibrated_scale(beta, torch.ones(4, 3), outputs, base)
