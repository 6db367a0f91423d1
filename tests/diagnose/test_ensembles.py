"""Variance and disagreement of ensembles: the decomposition, loops over pairs, and errors."""

import pytest
import torch

from kullback.core.errors import ConfigError, ShapeError
from kullback.diagnose.ensembles import disagreement, geometric_mean, mean_pairwise_kl, prediction_variance


@pytest.fixture
def runs(generator):
    return (2 * torch.randn(5, 8, 4, generator=generator, dtype=torch.float64)).log_softmax(-1)


def test_the_decomposition_holds_for_any_target(runs, generator):
    """The mean of KL(y || run) is KL(y || centre) + variance; with the arithmetic mean as centre it is not."""
    y = torch.rand(8, 4, generator=generator, dtype=torch.float64)
    y = y / y.sum(-1, keepdim=True)
    whole = (y * (y.log() - runs)).sum(-1).mean(0)
    centre = geometric_mean(runs)
    bias = (y * (y.log() - centre)).sum(-1)
    assert torch.allclose(whole, bias + prediction_variance(runs), atol=1e-12)
    arithmetic = runs.exp().mean(0).log()
    wrong = (y * (y.log() - arithmetic)).sum(-1) + (arithmetic.exp() * (arithmetic - runs)).sum(-1).mean(0)
    assert not torch.allclose(whole, wrong, atol=1e-2)
    assert torch.allclose(centre.exp().sum(-1), torch.ones(8, dtype=torch.float64))


def test_zero_one_variance_counts_who_leaves_the_commonest(runs):
    found = prediction_variance(runs, "01")
    for sample in range(8):
        votes = runs[:, sample].argmax(-1).tolist()
        commonest = max(set(votes), key=votes.count)
        assert found[sample].item() == pytest.approx(sum(vote != commonest for vote in votes) / 5)


def test_pairs_equal_loops(runs):
    for sample in range(8):
        p, kinds, unlike = runs[:, sample].exp(), [], []
        for i in range(5):
            for j in range(5):
                if i != j:
                    kinds.append((p[i] * (p[i] / p[j]).log()).sum().item())
                    unlike.append(float(p[i].argmax() != p[j].argmax()))
        assert mean_pairwise_kl(runs)[sample].item() == pytest.approx(sum(kinds) / 20)
        assert disagreement(runs)[sample].item() == pytest.approx(sum(unlike) / 20)


def test_equal_and_lone_members_do_not_differ(runs):
    for members in (runs[:1], runs[:1].expand(4, -1, -1)):
        for measure in (prediction_variance, mean_pairwise_kl, disagreement):
            assert measure(members).abs().max() < 1e-14
    with pytest.raises(ConfigError, match="loss is"):
        prediction_variance(runs, "squared")
    with pytest.raises(ShapeError, match="members"):
        disagreement(runs[0, 0])
