"""The parts of the reproduction of RL as inference, and its world in small."""

import pytest
import torch

from kullback.papers.rl_kl_bayes import reproduce as paper


def test_the_world_and_what_is_measured_of_it():
    target, prior = paper._world(0)
    assert target.reward.max().item() == 2.5
    assert int((target.reward == 2.5).sum()) == 7
    at_prior = paper._measure(prior.all_log_probs().detach(), target)
    exact = target.exact()
    assert at_prior["identity"] < 1e-12
    assert at_prior["elbo"] < exact.log_evidence.item() < at_prior["eubo"]
    best = paper._measure(exact.log_posterior, target)
    assert best["distance"] == pytest.approx(0.0, abs=1e-12)
    assert best["elbo"] == pytest.approx(best["eubo"], abs=1e-12)


def test_resampling_at_the_same_divergence():
    rewards = torch.tensor([[0.0, 1.0] * 32])
    base = {"rewards": rewards, "reward": 0.5}
    at = torch.tensor([0.25, 0.75])
    spent = (at * (2 * at).log()).sum().item()
    assert paper._resampled(base, {"kl": spent, "reward": 0.75}) == pytest.approx(0.0, abs=1e-6)
    assert paper._resampled(base, {"kl": spent, "reward": 0.625}) == pytest.approx(-1.0, abs=1e-5)


@pytest.mark.reproduce
@pytest.mark.parametrize("name", list(paper.METHODS))
def test_a_method_in_small(name, monkeypatch):
    monkeypatch.setattr(paper, "STEPS", 300)
    target, prior = paper._world(0)
    law, points = paper._train(name, prior, target, 0)
    assert len(points) == 4
    if name == "RL":
        assert points[-1]["entropy"] < 0.5 * points[0]["entropy"]
    else:
        assert points[-1]["distance"] < 0.15 * points[0]["distance"]
    assert law.logsumexp(0).item() == pytest.approx(0.0, abs=1e-10)
