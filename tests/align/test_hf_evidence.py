"""Evidence of a real causal model: all answers of two tokens summed, against each way by samples."""

import math

import pytest
import torch

from kullback.align._hf_evidence import completion_next_laws, completion_prior, prior_log_probs
from kullback.align.evidence import log_evidence, posterior_sample
from kullback.align.posterior import elbo, eubo
from kullback.align.twisted import twisted_smc
from kullback.core.errors import ConfigError
from kullback.core.rng import generator
from kullback.models.small import small_llama

PROMPT, BETA = [3, 1], 0.5
ALL = torch.cartesian_prod(torch.arange(6), torch.arange(6))


def reward(x):
    return (x == 5).sum(1).double() - (x[:, 0] == x[:, 1]).double()


@pytest.fixture(scope="module")
def model():
    found = small_llama(6, hidden=16, layers=1, heads=2, length=16, generator=generator(0, "m")).eval()
    with torch.no_grad():
        found.get_output_embeddings().weight.mul_(20.0)
    return found


@pytest.fixture(scope="module")
def exact(model):
    with torch.no_grad():
        ids = torch.cat([torch.tensor([PROMPT]).expand(36, -1), ALL], 1)
        laws = model(ids).logits.double().log_softmax(-1)[:, 1:3]
    log_prior = laws.gather(2, ALL.unsqueeze(2)).squeeze(2).sum(1)
    return log_prior, log_prior + reward(ALL) / BETA


def test_the_evidence_of_a_prompt(model, exact):
    log_prior, joint = exact
    torch.testing.assert_close(prior_log_probs(model, PROMPT, ALL), log_prior, atol=1e-4, rtol=0)
    truth = joint.logsumexp(0).item()
    problem = completion_prior(model, PROMPT, reward, length=2, batch=300)
    for method, options in (
        ("importance", {}), ("annealed", {"adaptive": 0.8}),
        ("annealed", {"recycle": True, "moves": 4, "temperatures": 4}), ("thermodynamic", {"adaptive": 0.9}),
    ):  # fmt: skip
        found = log_evidence(problem, 800, beta=BETA, generator=generator(1, method), method=method, **options)
        assert abs(found.log_evidence - truth) < 6 * max(found.standard_error, 0.02), method
    other = completion_prior(model, [2], reward, length=2)
    assert abs(log_evidence(other, 800, beta=BETA, generator=generator(1)).log_evidence - truth) > 0.1, "by prompt"


def test_samples_bounds_and_twists(model, exact):
    log_prior, joint = exact
    posterior, truth = joint.softmax(0), joint.logsumexp(0).item()
    problem = completion_prior(model, PROMPT, reward, length=2, batch=1000)
    found = posterior_sample(problem, 2000, beta=BETA, generator=generator(2), method="annealed", temperatures=4)
    shares = (found.x @ torch.tensor([6, 1])).bincount(minlength=36) / 2000
    assert 0.5 * (shares - posterior).abs().sum().item() < 0.1
    policy = torch.full((36,), -math.log(36.0), dtype=torch.float64)
    upper = eubo(prior_log_probs(model, PROMPT, found.x), policy[:1].expand(2000), reward(found.x), beta=BETA)
    places = torch.randint(36, (2000,), generator=generator(3))
    lower = elbo(log_prior[places], policy[places], reward(ALL)[places], beta=BETA)
    assert lower.mean < truth < upper.mean

    def twists(x):
        last = x.shape[1] == 1
        rows = torch.cat([x.repeat_interleave(6, 0), torch.arange(6).repeat(len(x)).unsqueeze(1)], 1)
        return (reward(rows) / BETA if last else 2.0 * (rows[:, 0] == 5).double()).view(len(x), 6)

    swarm = twisted_smc(completion_next_laws(model, PROMPT), twists, 800, 2, generator=generator(4))
    assert abs(swarm.evidence.log_evidence - truth) < 6 * max(swarm.evidence.standard_error, 0.01)


def test_bad_input(model):
    with pytest.raises(ConfigError, match="prompt"):
        completion_prior(model, [], reward, length=2)
