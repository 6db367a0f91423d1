"""Two stages in a row: who is the reference of whom, the reduced rate, and what a second run finds done."""

import copy
import math

import pytest
import torch

from kullback.align.f_dpo import FDPOLoss, fdpo_loss, paper_divergence
from kullback.align.implicit import FSFT, matching_divergence
from kullback.align.methods import Preference, Supervised
from kullback.align.pipeline import PostTrainingPipeline, Stage
from kullback.align.worlds import TabularPolicy, World
from kullback.core.errors import CheckpointError, ConfigError
from kullback.divergences import kl

WORLD = World(3, 2)
SHOWN = torch.tensor([[2, 1], [2, 2], [2, 1], [0, 1]])
SHUNNED = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 1]])


class Loop:
    """A loop of one's own, which notes what it was asked for and the first loss of each stage."""

    def __init__(self, stop=None):
        self.asked, self.first, self.stop = [], {}, stop

    def __call__(self, model, reference, stage):
        if stage.name == self.stop:
            raise KeyboardInterrupt
        self.asked.append((stage.name, stage.learning_rate, stage.steps))
        optimizer = torch.optim.Adam(model.parameters(), lr=stage.learning_rate)
        rows = SHOWN if stage.name == "sft" else torch.cat([SHOWN, SHUNNED])
        batch = {"completion_mask": torch.ones(len(rows), 1)}
        with torch.no_grad():
            batch["reference_log_prob"] = reference.log_probs(rows).unsqueeze(1)
        assert not any(parameter.requires_grad for parameter in reference.parameters())
        for _ in range(stage.steps):
            optimizer.zero_grad()
            loss, _ = stage.method.loss(model.log_probs(rows).unsqueeze(1), batch, count=stage.method.count(batch))
            self.first.setdefault(stage.name, loss.item())
            loss.backward()
            optimizer.step()


def pipeline(divisor=5.0, method=None, **changed):
    sft = {"method": method or Supervised(), "learning_rate": 0.1, "steps": 8} | changed
    preference = Preference(options=FDPOLoss(divergence=paper_divergence("forward_kl")))
    return PostTrainingPipeline(
        sft=Stage(name="sft", **sft), lr_divisor=divisor,
        preference=Stage(name="dpo", method=preference, learning_rate=0.05, steps=5),
    )  # fmt: skip


def policy(generator):
    return TabularPolicy(WORLD, generator=generator, scale=1.0)


def measure(base, model):
    with torch.no_grad():
        return {"drift": kl(model.all_log_probs(), base.all_log_probs()).item()}


def test_rates_references_and_reports(generator):
    model = policy(generator)
    start, loop = copy.deepcopy(model), Loop()
    found = pipeline().run(model, loop, measure=measure)
    assert loop.asked == [("sft", pytest.approx(0.02), 8), ("dpo", 0.05, 5)]
    assert loop.first["dpo"] == pytest.approx(math.log(2), abs=1e-12)  # the reference is what SFT has left
    assert found.final is model
    for before, kept in zip(start.parameters(), found.base.parameters(), strict=True):
        assert torch.equal(before, kept)
    with torch.no_grad():
        places = (WORLD.index(SHOWN), WORLD.index(SHUNNED))
        known, moved = found.base.all_log_probs(), found.tuned.all_log_probs()
        wrong = fdpo_loss(*(known[p] for p in places), *(moved[p] for p in places)).loss.mean().item()
    assert abs(wrong - math.log(2)) > 1e-3  # with the base as the reference the same check fails
    assert 0.0 < found.reports["sft"]["drift"] < found.reports["dpo"]["drift"]
    undivided = pipeline(1.0).run(copy.deepcopy(start), Loop(), measure=measure)
    assert undivided.reports["sft"]["drift"] > 3 * found.reports["sft"]["drift"]


def test_a_finished_stage_is_not_trained_again(tmp_path, generator):
    start = policy(generator)
    whole = pipeline().run(copy.deepcopy(start), Loop(), measure=measure)
    with pytest.raises(KeyboardInterrupt):
        pipeline().run(copy.deepcopy(start), Loop(stop="dpo"), folder=tmp_path)
    loop = Loop()
    found = pipeline().run(copy.deepcopy(start), loop, measure=measure, folder=tmp_path)
    assert [name for name, *_ in loop.asked] == ["dpo"]
    assert found.reports == whole.reports
    again = Loop()
    last = pipeline().run(copy.deepcopy(start), again, folder=tmp_path).final
    assert not again.asked
    for one, other in zip(whole.final.parameters(), last.parameters(), strict=True):
        assert torch.equal(one, other)
    for other in (pipeline(2.0), pipeline(steps=9), pipeline(method=FSFT(divergence=matching_divergence("js")))):
        with pytest.raises(CheckpointError, match="other settings"):
            other.run(copy.deepcopy(start), Loop(), folder=tmp_path)


def test_the_description_of_a_stage_outlives_the_process(tmp_path, generator):
    """Divergences are functions, whose addresses are others each time."""
    start = policy(generator)
    methods = [FSFT(divergence=matching_divergence("hellinger"), beta=0.5) for _ in range(2)]
    assert methods[0].divergence != methods[1].divergence
    pipeline(method=methods[0]).run(copy.deepcopy(start), Loop(), folder=tmp_path)
    loop = Loop()
    pipeline(method=methods[1]).run(copy.deepcopy(start), loop, folder=tmp_path)
    assert not loop.asked


def test_what_is_refused():
    with pytest.raises(ConfigError, match="lr_divisor"):
        pipeline(0.5)
    with pytest.raises(ConfigError, match="two names"):
        PostTrainingPipeline(sft=pipeline().sft, preference=pipeline().sft)
    with pytest.raises(ConfigError, match="positive learning rate"):
        pipeline(learning_rate=0.0)
    with pytest.raises(ConfigError, match="positive learning rate"):
        pipeline(steps=0)
    with pytest.raises(ConfigError, match="whole number of steps"):
        pipeline(steps=2.5)
    for name in ("", "../sft", "sft/"):
        with pytest.raises(ConfigError, match="without a slash"):
            Stage(name=name, method=Supervised(), learning_rate=0.1, steps=1)
