"""MDCS under torch.compile: one graph, that of eager, for every epoch and option."""

import copy

import pytest
import torch
from torch import nn

from kullback.distill import MDCSLoss
from kullback.models.experts import CosineHead, ExpertLinear, MultiExpert

# torch's own, about what its compiler does with an autograd.Function
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

COUNTS = torch.tensor([100, 30, 8, 3, 1])
OPTIONS = ({}, {"temperature": 2.0}, {"selection": "confident", "threshold": 0.5, "direction": "symmetric"},
           {"selection": "none", "teacher": "mean"})  # fmt: skip


class Counter:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def views(generator):
    weak = 3 * torch.randn(3, 20, 5, generator=generator)
    strong = weak + 0.7 * torch.randn(3, 20, 5, generator=generator)
    return weak.requires_grad_(), strong.requires_grad_(), torch.randint(0, 5, (20,), generator=generator)


def network(generator):
    stem = nn.Linear(6, 8)
    for parameter in stem.parameters():
        nn.init.normal_(parameter, generator=generator)
    branches = nn.Sequential(ExpertLinear(3, 8, 7, generator=generator), nn.ReLU())
    return MultiExpert(nn.Sequential(stem, nn.ReLU()), branches, CosineHead(7, 5, experts=3, generator=generator))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_is_one_graph_with_the_gradient_of_eager(views, options):
    loss, backend = MDCSLoss(COUNTS, **options), Counter()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for epoch in (0, 3, 7.5, 11, 12, 13, 14, 15, 20, 300):  # more than dynamo compiles before it gives up
        loss.set_epoch(epoch)
        found, wanted = compiled(*views), loss(*views)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name])
        slopes = [torch.autograd.grad(terms["loss"], views[:2]) for terms in (found, wanted)]
        torch.testing.assert_close(*slopes)
    assert backend.graphs == 1
    loss.weight.zero_()
    assert compiled(*views)["loss"] != wanted["loss"], "the weight is an input of the graph"


def steps(model, loss, data, how):
    """Three steps of SGD on two views, the ramp rising, with terms from `how`(model and loss)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def terms(inputs, labels):
        weak, strong = model(inputs)["logits"].chunk(2, dim=1)
        return loss(weak, strong, labels)

    terms = how(terms)
    for epoch, (inputs, labels) in enumerate(data):
        loss.set_epoch(epoch)
        optimizer.zero_grad()
        terms(inputs, labels)["loss"].backward()
        optimizer.step()
    return dict(model.named_parameters())


def test_training_steps_of_experts_and_loss_are_those_of_eager(generator):
    backend, model = Counter(), network(generator)
    data = [(torch.randn(40, 6, generator=generator), torch.randint(0, 5, (20,), generator=generator)) for _ in "abc"]
    ways = (lambda terms: terms), (lambda terms: torch.compile(terms, backend=backend, fullgraph=True))
    found = [steps(copy.deepcopy(model), MDCSLoss(COUNTS, warm_epochs=2), data, how) for how in ways]
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-6)
    assert all((found[0][name] - start).abs().max() > 1e-4 for name, start in model.named_parameters())
    assert backend.graphs == 1
