"""Sampled KL: expectations of values and gradients by enumeration, over outcomes and over whole sequences."""

import pytest
import torch

from kullback.core.errors import ConfigError, ShapeError
from kullback.core.reduce import masked_sum
from kullback.divergences import kl, reverse_kl
from kullback.divergences.estimators import kl_sampled

LOG_P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
REVERSE_KL_GRADIENT = torch.tensor([-0.2686, -0.1612, 0.2102, 0.2196], dtype=torch.float64)
FORWARD_KL_GRADIENT = torch.tensor([-0.2447, -0.1452, 0.2309, 0.1590], dtype=torch.float64)


def logits():
    return torch.tensor([0.3, -0.2, 0.7, 0.1], dtype=torch.float64, requires_grad=True)


def exact_gradient(divergence):
    z = logits()
    return torch.autograd.grad(divergence(LOG_P, torch.log_softmax(z, -1)), z)[0]


def expected_gradient(estimator):
    """E over x ~ q of the gradient of the estimate at x, the sampling itself held fixed."""
    z = logits()
    log_q = torch.log_softmax(z, -1)
    return torch.autograd.grad((log_q.detach().exp() * estimator(LOG_P, log_q)).sum(), z)[0]


def test_the_exact_gradients_are_those_of_the_card():
    torch.testing.assert_close(exact_gradient(reverse_kl), REVERSE_KL_GRADIENT, rtol=0, atol=5e-5)
    torch.testing.assert_close(exact_gradient(kl), FORWARD_KL_GRADIENT, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("value", "mean", "variance"), [("k1", 0.379822, 0.797), ("k2", 0.470692, 0.0894), ("k3", 0.379822, 0.0226)]
)
def test_mean_and_variance_of_the_values(value, mean, variance):
    log_q = torch.log_softmax(logits().detach(), -1)
    estimate = kl_sampled(LOG_P, log_q, value=value, gradient="none")
    expectation = (log_q.exp() * estimate).sum()
    assert expectation.item() == pytest.approx(mean, abs=5e-7)
    assert (log_q.exp() * (estimate - expectation) ** 2).sum().item() == pytest.approx(variance, rel=2e-3)
    if value != "k2":
        torch.testing.assert_close(expectation, reverse_kl(LOG_P, log_q), rtol=0, atol=1e-12)
    if value != "k1":
        assert bool((estimate >= 0).all())


@pytest.mark.parametrize("value", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("gradient", "divergence"), [("reverse", reverse_kl), ("forward", kl)])
def test_expected_gradients(value, gradient, divergence):
    found = expected_gradient(lambda p, q: kl_sampled(p, q, value=value, gradient=gradient))
    torch.testing.assert_close(found, exact_gradient(divergence), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "direction"),
    [
        (lambda p, q: q - p, None),
        (lambda p, q: (q - p) ** 2 / 2, reverse_kl),
        (lambda p, q: (p - q).expm1() - (p - q), kl),
        (lambda p, q: (q - p).detach() * q, reverse_kl),
    ],
    ids=["k1 as a loss", "k2 as a loss", "k3 as a loss", "k1 in the reward"],
)
def test_estimates_used_as_losses_descend_what_the_table_says(estimator, direction):
    """The claim that makes `gradient` an option of its own; k1 and k3 as losses fail the check for KL(q||p)."""
    found = expected_gradient(estimator)
    wanted = exact_gradient(direction) if direction else torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    if direction is not reverse_kl:
        assert (found - exact_gradient(reverse_kl)).abs().max() > 1e-2


@pytest.mark.parametrize("value", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("gradient", "divergence"), [("reverse", reverse_kl), ("forward", kl)])
def test_the_ratio_corrects_samples_of_another_policy(value, gradient, divergence):
    z = logits()
    log_q = torch.log_softmax(z, -1)
    log_mu = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()

    def under_mu(ratio):
        estimate = kl_sampled(LOG_P, log_q, value=value, gradient=gradient, ratio=ratio)
        expectation = (log_mu.exp() * estimate).sum()
        return expectation, torch.autograd.grad(expectation, z, retain_graph=True)[0]

    expectation, found = under_mu((log_q - log_mu).exp())
    on_policy = (log_q.exp() * kl_sampled(LOG_P, log_q, value=value, gradient="none")).sum()
    torch.testing.assert_close(expectation, on_policy, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, exact_gradient(divergence), rtol=0, atol=1e-12)
    assert (under_mu(None)[1] - exact_gradient(divergence)).abs().max() > 1e-2


class Tree:
    """Two models over all 3^3 sequences of three tokens, each next token depending on the whole prefix."""

    def __init__(self, generator):
        self.tokens = torch.cartesian_prod(*[torch.arange(3)] * 3)
        shapes = [(3,), (3, 3), (3, 3, 3)]
        self.p, self.q, self.mu = (
            [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(3)
        )
        for table in self.q:
            table.requires_grad_()

    def log_probs(self, tables):
        """[27, 3]: the log-probability of each token of each sequence given its prefix."""
        a, b, c = (torch.log_softmax(table, -1) for table in tables)
        x, y, z = self.tokens.unbind(-1)
        return torch.stack([a[x], b[x, y], c[x, y, z]], -1)

    def gradient(self, loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.q, retain_graph=True)])


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_sequence_gradient_by_enumeration(generator, off_policy):
    tree = Tree(generator)
    log_p, log_q = tree.log_probs(tree.p), tree.log_probs(tree.q)
    exact = (log_q.sum(-1).exp() * (log_q - log_p).sum(-1)).sum()
    drawn_from = tree.log_probs(tree.mu) if off_policy else log_q.detach()
    ratio = (log_q - drawn_from).cumsum(-1).exp() if off_policy else None

    def expectation(gradient):
        estimate = kl_sampled(log_p, log_q, value="k1", gradient=gradient, ratio=ratio).sum(-1)
        return (drawn_from.sum(-1).exp() * estimate).sum()

    whole = expectation("reverse_sequence")
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(tree.gradient(whole), tree.gradient(exact), rtol=0, atol=1e-12)
    for wrong in ("reverse", "forward"):  # each token's own term only
        assert (tree.gradient(expectation(wrong)) - tree.gradient(exact)).abs().max() > 1e-2


def test_a_mask_ends_the_sequence(generator):
    log_p, log_q = -torch.rand(2, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [4], [1], [0]])
    junk = log_p.masked_fill(~mask, -50.0)

    def gradient(p, q, m):
        q = q.clone().requires_grad_()
        estimate = kl_sampled(p, q, gradient="reverse_sequence", mask=m)
        return torch.autograd.grad(masked_sum(estimate, m), q)[0]

    found = gradient(junk, log_q, mask)
    for row, length in enumerate((6, 4, 1)):
        alone = gradient(log_p[row, :length], log_q[row, :length], None)
        torch.testing.assert_close(found[row, :length], alone)
    assert not found[~mask].any()


def test_types_and_constants():
    log_p, log_q = torch.tensor([-1.0, -2.0]).bfloat16(), torch.tensor([-1.5, -1.0]).bfloat16()
    assert kl_sampled(log_p, log_q).dtype == torch.float32
    log_p = log_p.double().requires_grad_()
    estimate = kl_sampled(log_p, log_q.double().requires_grad_())
    assert estimate.dtype == torch.float64
    estimate.sum().backward()
    assert log_p.grad is None
    assert not kl_sampled(log_p, log_q.double().requires_grad_(), gradient="none").requires_grad


def test_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(ConfigError, match="k1, k2, k3"):
        kl_sampled(x, x, value="k4")
    with pytest.raises(ConfigError, match="gradient is one of"):
        kl_sampled(x, x, gradient="backward")
    with pytest.raises(ConfigError, match="mask does nothing"):
        kl_sampled(x, x, mask=x > 0)
    with pytest.raises(ShapeError, match=r"log_p_x has shape \(3,\)"):
        kl_sampled(x[0], x)
    with pytest.raises(ShapeError, match="ratio has shape"):
        kl_sampled(x, x, ratio=x[:1])
    with pytest.raises(ShapeError, match="got a scalar"):
        kl_sampled(x[0, 0], x[0, 0], gradient="reverse_sequence")
