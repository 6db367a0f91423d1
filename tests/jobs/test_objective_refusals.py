"""What `kullback distill` says to options of an objective that cannot be: before a run begins, in one sentence."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kullback.core.errors import ConfigError, DataError
from kullback.jobs import distill as job
from kullback.jobs import teacher_cache
from kullback.jobs.teacher_cache import TeacherCacheConfig

OPTIONS = {"alpha_divergence": {"alpha": 1.5}, "generalized_jsd": {"beta": 0.2}, "renyi": {"alpha": 0.5},
           "skew_kl": {"alpha": 0.1}, "skew_reverse_kl": {"alpha": 0.1}}  # fmt: skip
WRONG = [
    ("alpha_divergence", {"alpha": math.inf}, "finite alpha"),
    ("generalized_jsd", {"beta": -1.0}, r"beta in \[0, 1\]"),
    ("renyi", {"alpha": -1.0}, r"alpha in \(0, inf\)"),
    ("skew_kl", {"alpha": -1.0}, r"alpha in \[0, 1\)"),
    ("skew_reverse_kl", {"alpha": 5.0}, r"alpha in \[0, 1\)"),
    ("bd_kd", {"delta": 0.5}, "at least 1"),
    ("bd_kd", {"gate": "labels"}, "gate is one of"),
    ("pld", {"topk": 0}, "at least 1"),
    ("sinkd", {"weight": -1.0}, "a weight of at least 0"),
    ("sinkd", {"rows": 0}, "one row or more"),
    ("sinkd", {"tau": 0.0}, "tau must be positive"),
    ("sinkd", {"eps": -1.0}, "eps must be positive"),
    ("sinkd", {"n_iters": 0}, "n_iters"),
    ("sinkd", {"estimator": "dull"}, "sharp"),
    ("sinkd", {"cost": "l3"}, "no cost"),
    ("sinkd", {"gather": 3}, "gather is 0 or 1"),
]


def refuse(message, name, **values):
    with pytest.raises(ConfigError, match=message) as caught:
        job.objective_of(job.ObjectiveConfig(name=name, **values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", job.objective_names())
def test_values_that_no_objective_takes(name):
    options = OPTIONS.get(name, {})
    for wrong in (2.0, -0.1, math.nan):
        refuse("cross.entropy", name, options=options, cross_entropy=wrong)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        refuse("temperature", name, options=options, temperature=wrong)
    refuse("no option 'gamma'", name, options={**options, "gamma": 1.0})
    assert job.objective_of(job.ObjectiveConfig(name=name, options=options)).divergence is not None


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_an_option_that_a_divergence_needs(name):
    option = next(iter(OPTIONS[name]))
    refuse(f"{name} needs objective.options.{option}, a number", name)
    for wrong in ("much", math.nan):
        refuse(f"objective.options.{option} is a number", name, options={option: wrong})


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_options_out_of_range(name, options, message):
    refuse(message, name, options=options)


@pytest.mark.parametrize(("name", "option"), [("bd_kd", "delta"), ("sinkd", "rows"), ("pld", "topk")])
@pytest.mark.parametrize("value", ["much", math.nan])
def test_options_of_another_kind(name, option, value):
    refuse(f"objective.options.{option} is like", name, options={option: value})


def test_blocks_and_seeds_that_cannot_be(config, tmp_path):
    for wrong, message in (
        (replace(config, seeds=(0, 1, 0)), "seeds has one twice"),
        (replace(config, data=replace(config.data, validation_blocks=0)), "validation_blocks must be at least 1"),
        (replace(config, data=replace(config.data, length=64)), "64 tokens and the teacher was made for 32 at most"),
    ):
        with pytest.raises(ConfigError, match=message):
            job.run(wrong, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_cache_of_other_texts_or_without_a_tokenizer_leaves_no_run(config, tmp_path):
    cache = tmp_path / "cache"
    teacher_cache.run(TeacherCacheConfig(teacher=config.teacher, data=config.data, kept=8, drawn=0), cache)
    cached, other = replace(config, teacher=str(cache)), tmp_path / "other.txt"
    other.write_text(Path(config.data.train).read_text()[::-1])
    with pytest.raises(DataError, match="not in the teacher cache"):
        job.run(replace(cached, data=replace(config.data, train=str(other))), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    told = []
    short = replace(cached, training=replace(config.training, steps=1))
    job.run(short, tmp_path / "run", listen=told.append)
    assert any("all but the 8 kept are one outcome" in event.get("text", "") for event in told)
    shutil.rmtree(cache / "tokenizer")
    with pytest.raises(DataError, match="holds no tokenizer: write it again with teacher-cache"):
        job.run(cached, tmp_path / "again")
    long, short = replace(config.data, length=64), replace(config.data, length=1)
    for wrong, message in (
        ({"temperature": math.inf}, "positive and finite"),
        ({"batch": 0}, "batch is a number"),
        ({"data": long}, "the teacher was made for 32 at most"),
        ({"data": short}, "at least 2 tokens"),
    ):
        made = TeacherCacheConfig(**{"teacher": config.teacher, "data": config.data, **wrong})
        with pytest.raises(ConfigError, match=message):
            teacher_cache.run(made, tmp_path / "new")
