"""Every loss of the distill room on logits by its name, in the job and in a Trainer, from a live teacher or a cache."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from kullback import cli, distill
from kullback.core.errors import ConfigError
from kullback.core.types import TeacherOutput
from kullback.distill._hf import DistillTrainer, LiveTeacher
from kullback.distill.teachers import CachedTeacher, teacher_logits, write_teacher_cache
from kullback.distill.top_k import keep_top
from kullback.divergences import F_NAMES, NAMES
from kullback.jobs import distill as job
from kullback.jobs import teacher_cache
from kullback.jobs.teacher_cache import TeacherCacheConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "distill"))
from _server import Server

WHOLE = {"sinkd"}  # compares rows with each other: their tails are not the same outcome
OPTIONS = {"alpha_divergence": {"alpha": 1.5}, "generalized_jsd": {"beta": 0.2}, "renyi": {"alpha": 0.5},
           "skew_kl": {"alpha": 0.1}, "skew_reverse_kl": {"alpha": 0.1}}  # fmt: skip
V, T = 30, 8


def objective(name, **values):
    return job.ObjectiveConfig(name=name, options=OPTIONS.get(name, {}), **values)


def truncated(logits, ids, kept):
    log_p = logits.log_softmax(-1)
    top_ids, top, tail = keep_top(log_p, kept)
    following = log_p.gather(-1, ids.roll(-1, -1).unsqueeze(-1)).squeeze(-1)
    return TeacherOutput(top_ids=top_ids, top_log_probs=top, tail_log_prob=tail, label_log_probs=following)


def test_the_names_are_those_of_the_room():
    assert set(NAMES) | set(F_NAMES) <= set(job.objective_names())
    on_logits = {name.removesuffix("_loss") for name in distill.__all__ if name.endswith("_loss")}
    elsewhere = {"bdkd_teacher", "dkd", "kd", "mcmi", "mdcs"}
    assert on_logits - elsewhere == {"bdkd", "sinkd"}, "each has a name, or is elsewhere"
    assert {"bd_kd", "sinkd", "pld"} <= set(job.objective_names())


@pytest.mark.parametrize("name", job.objective_names())
def test_a_loss_with_all_but_one_token_kept_is_that_of_the_live_teacher(name, generator):
    logits, student = torch.randn(2, 3, T, V, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    ids = torch.randint(V, (3, T), generator=generator)
    made = job.objective_of(objective(name))
    live = made.loss(TeacherOutput(logits=logits), student, ids)
    (slope,) = torch.autograd.grad(live, student)
    assert slope.abs().max() > 1e-4
    assert made.needs_whole_teacher == (name in WHOLE)
    if name in WHOLE:
        with pytest.raises(ConfigError, match="whole distributions"):
            made.loss(truncated(logits, ids, V - 1), student, ids)
        return
    found = made.loss(truncated(logits, ids, V - 1), student, ids)
    torch.testing.assert_close(found, live)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], slope)
    fewer, live = made.loss(truncated(logits, ids, 3), student, ids).detach(), live.detach()
    assert math.isfinite(fewer)
    assert abs(fewer - live) > 1e-4 * abs(live), "and three tokens are not all: the check can tell"


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    """Blocks of random tokens and a cache of the teacher about them."""
    model = AutoModelForCausalLM.from_pretrained(world / "teacher")
    draw = torch.Generator().manual_seed(3)
    blocks = [{"input_ids": torch.randint(200, (16,), generator=draw)} for _ in range(4)]
    folder = tmp_path_factory.mktemp("caches") / "cache"
    size = model.get_output_embeddings().weight.shape[0]
    write_teacher_cache(teacher_logits(LiveTeacher(model)), blocks, folder, kept=20, drawn=4, vocabulary=size)
    return blocks, folder


@pytest.mark.parametrize("name", sorted(set(job.objective_names()) - WHOLE))
def test_a_trainer_descends_on_a_cache(name, cache, world, tmp_path):
    blocks, folder = cache
    made = job.objective_of(objective(name, cross_entropy=0.0))
    model, teacher = AutoModelForCausalLM.from_pretrained(world / "student"), CachedTeacher(folder)
    ids = torch.stack([block["input_ids"] for block in blocks])
    items = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=3e-3, lr_scheduler_type="constant",
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = DistillTrainer(model=model, args=arguments, train_dataset=items, teacher=teacher, objective=made)

    def loss():
        with torch.no_grad():
            return float(made.loss(teacher(ids, torch.ones_like(ids)), model(ids).logits, ids))

    before = loss()
    trainer.train()
    assert loss() < before - 1e-3 * abs(before)


OTHERS = ("mcmi", "mdcs", "cs-ib", "didi", "dkd")


@pytest.mark.parametrize("name", [*OTHERS, "skew-lk", "sinkhorn", "kd", "gkd", "listmle"])
def test_what_is_no_objective_says_where_it_is(name):
    with pytest.raises(ConfigError) as caught:
        job.objective_of(objective(name))
    said = str(caught.value)
    assert "\n" not in said
    if name in OTHERS:
        place = said.split("kullback.distill.")[1].split(",")[0]
        assert hasattr(distill, place) or place in distill.__all__
    else:
        known = {"skew-lk": "skew_kl", "kd": "kl here", "gkd": "generalized_jsd here", "listmle": "pld here"}
        assert known.get(name, "sinkd") in said


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_pld_is_distilled_from_a_cache_as_from_the_teacher(config, tmp_path, capsys):
    common = ["--student", config.student, "--data", config.data.train, "--objective", "pld"]
    data = ["--set", "data.length=32", "--set", "data.holdout=0.2", "--set", "data.validation_blocks=8"]
    few = ["--set", "training.steps=4", "--set", "training.batch=4", "--set", "training.learning_rate=0.01"]
    cached, cache = [*common, *data, *few], tmp_path / "cache"
    kept = ["--kept", "20", "--drawn", "40"]
    written = ["teacher-cache", str(cache), "--teacher", config.teacher, "--data", config.data.train, *kept, *data]
    assert cli.execute(written) == 0
    assert cli.execute(["distill", "--teacher", str(cache), *cached, "--out", str(tmp_path / "cached")]) == 0
    said = capsys.readouterr()
    assert "rankings have at most 20 picks" in said.out + said.err
    live = [*cached, "--set", "objective.options.topk=20", "--out", str(tmp_path / "live")]
    assert cli.execute(["distill", "--teacher", config.teacher, *live]) == 0
    rows = [json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("cached", "live")]
    assert rows[0][0]["cross_entropy"] == pytest.approx(rows[1][0]["cross_entropy"], rel=1e-3), "the teacher's own"
    assert rows[0][2]["divergence"] < 0.97 * rows[0][1]["divergence"]
    for key, tolerance in (("cross_entropy", 1e-3), ("divergence", 0.05)):
        assert rows[0][2][key] == pytest.approx(rows[1][2][key], rel=tolerance)
    for name, tensor in weights(tmp_path / "live").items():  # Adam makes a whole step of a sign that rounding changes
        assert (weights(tmp_path / "cached")[name] - tensor).abs().mean() < 5e-4


def test_a_cache_of_the_first_format_is_refused_by_pld_alone(config, tmp_path):
    teacher_cache.run(TeacherCacheConfig(teacher=config.teacher, data=config.data, kept=20), tmp_path / "cache")
    index = tmp_path / "cache" / "teacher-cache.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 1}))
    old = replace(config, teacher=str(tmp_path / "cache"), training=replace(config.training, steps=2))
    with pytest.raises(ConfigError, match="pld asks how probable .* write the cache again with teacher-cache"):
        job.run(replace(old, objective=replace(config.objective, name="pld")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    told = []
    run = job.run(replace(old, objective=replace(config.objective, name="bd-kd")), tmp_path / "run", listen=told.append)
    assert [event for event in told if event["kind"] == "note" and "written again has it exactly" in event["text"]]
    report = json.loads((run.path / "report.json").read_text())
    assert report["divergence"] == "bd_kd"
    assert "cross_entropy" not in report["rows"][0], "this teacher does not say how probable the text is"


@pytest.mark.parametrize("dialect", ["echo", "top alone"])
def test_pld_is_distilled_from_a_server_that_says_how_probable_the_text_is(config, tmp_path, dialect):
    server = Server(AutoModelForCausalLM.from_pretrained(config.teacher), dialect)
    short = replace(config, objective=objective("pld"), training=replace(config.training, steps=2))
    try:
        if dialect == "top alone":
            with pytest.raises(ConfigError, match="nor this kind of server"):
                job.run(replace(short, teacher=server.url), tmp_path / "served")
            assert not (tmp_path / "served").exists()
            return
        served = job.run(replace(short, teacher=server.url), tmp_path / "served")
    finally:
        server.close()
    live = job.run(replace(short, objective=job.ObjectiveConfig(name="pld", options={"topk": 20})), tmp_path / "live")
    for name, tensor in weights(live.path).items():
        torch.testing.assert_close(weights(served.path)[name], tensor, rtol=0, atol=1e-4)
