"""Configurations: TOML there and back, overrides, strict types, and errors that name the key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kullback.core.config import changes, digest, flat, load, to_dict, to_toml
from kullback.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    shape: Literal["cosine", "linear"] = "cosine"
    warmup: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"training.schedule.warmup is a share in [0, 1), got {self.warmup}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    steps: int = 10
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Schedule = field(default_factory=Schedule)
    resume: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    data: str
    out: Path = Path("runs")
    limit: int | None = None
    training: Training | None = field(default_factory=Training)
    options: dict[str, float] = field(default_factory=dict)
    stages: tuple[Training, ...] = ()
    tables: dict[str, Schedule] = field(default_factory=dict)


WHOLE = Job(
    data='a "quoted"\nname',
    out=Path("a/b"),
    limit=3,
    training=Training(betas=(0.0, 1.0), schedule=Schedule(shape="linear"), resume=True),
    options={"alpha": 0.5, "with.dot": float("inf")},
    stages=(Training(steps=1), Training(steps=2)),
    tables={"a": Schedule(warmup=0.5)},
)


@pytest.mark.parametrize("job", [Job(data=""), WHOLE], ids=["defaults", "everything"])
def test_toml_there_and_back(tmp_path, job):
    file = tmp_path / "job.toml"
    file.write_text(to_toml(job), encoding="utf-8")
    assert load(Job, file) == job
    assert load(Job, to_dict(job)) == job


def test_none_is_left_out_of_toml():
    assert "limit" not in to_toml(Job(data="x"))
    assert to_dict(Job(data="x"))["limit"] is None


@pytest.mark.parametrize(
    ("override", "reached", "value"),
    [
        ("training.steps=7", "training.steps", 7),
        ("training.learning_rate=1e-2", "training.learning_rate", 0.01),
        ("training.learning_rate=1", "training.learning_rate", 1.0),
        ("training.schedule.shape=linear", "training.schedule.shape", "linear"),
        ('training.schedule.shape="linear"', "training.schedule.shape", "linear"),
        ("training.betas=[0.5, 0.6]", "training.betas", [0.5, 0.6]),
        ("training.resume=true", "training.resume", True),
        ("data=a=b", "data", "a=b"),
        ("data=2024", "data", "2024"),
        ("data=true", "data", "true"),
        ("data=none", "data", "none"),
        ("out=2024", "out", "2024"),
        ("options.beta=3", "options.beta", 3.0),
        ("options={gamma = 1.5}", "options.gamma", 1.5),
        ("tables.new.warmup=0.25", "tables.new.warmup", 0.25),
        (" limit = 5 ", "limit", 5),
    ],
)
def test_overrides(override, reached, value):
    assert flat(load(Job, {"data": "x"}, [override]))[reached] == value


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path):
    (tmp_path / "job.toml").write_text('data = "x"\ntraining.steps = 1\nlimit = 2\n')
    job = load(Job, tmp_path / "job.toml", ["training.steps=2", "training.steps=3", "limit=none"])
    assert (job.training.steps, job.limit) == (3, None)


def test_the_mapping_given_is_not_changed():
    given = {"data": "x", "training": {"steps": 1}}
    load(Job, given, ["training.steps=2"])
    assert given == {"data": "x", "training": {"steps": 1}}


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ({"data": "x", "limits": 1}, [], "unknown key limits: did you mean limit?"),
        ({"data": "x", "training": {"stepz": 1}}, [], "unknown key training.stepz: did you mean training.steps?"),
        (
            {"data": "x", "training": {"schedule": {"warm_up": 0.1}}}, [],
            "unknown key training.schedule.warm_up: did you mean training.schedule.warmup?",
        ),
        ({"data": "x", "stages": [{}, {"step": 1}]}, [], "unknown key stages[1].step: did you mean stages[1].steps?"),
        ({"data": "x", "tables": {"a": {"warm": 1}}}, [], "unknown key tables.a.warm: did you mean tables.a.warmup?"),
        ({"data": "x", "learning_rate": 1}, [], "unknown key learning_rate: did you mean training.learning_rate?"),
        ({"data": "x"}, ["lerning_rate=1"], "unknown key lerning_rate: did you mean training.learning_rate?"),
        ({"data": "x"}, ["trainin.steps=1"], "unknown key trainin: did you mean training?"),
        ({"data": "x"}, ["training.schedule.zzz=1"], "unknown key training.schedule.zzz: the keys of "
         "training.schedule are shape, warmup"),
        ({}, [], "data is required and was not given"),
        ({"data": 3}, [], "data: expected a valid string, got 3"),
        ({"data": "x", "training": {"steps": 1.5}}, [], "training.steps: expected "),
        ({"data": "x", "training": {"steps": "7"}}, [], 'training.steps: expected a valid integer, got "7"'),
        ({"data": "x", "training": {"steps": True}}, [], "training.steps: expected a valid integer, got true"),
        ({"data": "x", "training": {"learning_rate": "a"}}, [],
         'training.learning_rate: expected a valid number, got "a"'),
        ({"data": "x", "training": {"betas": [0.1, "b"]}}, [], 'training.betas[1]: expected a valid number, got "b"'),
        ({"data": "x", "training": 5}, [], "training: expected "),
        ({"data": "x", "training": {"schedule": {"shape": "round"}}}, [],
         "training.schedule.shape: expected 'cosine' or 'linear', got \"round\""),
        ({"data": "x", "training": {"schedule": {"warmup": 2.0}}}, [],
         "training.schedule.warmup is a share in [0, 1), got 2.0"),
        ({"data": "x", "training": {"steps": "a", "resume": "b"}}, [], "(and 1 more)"),
        ({"data": "x"}, ["training.steps"], "an override is written key=value"),
        ({"data": "x"}, ["training..steps=1"], "an override is written key=value"),
        ({"data": "x"}, ["data.deep=1"], "data is a value, not a table: data.deep cannot be set"),
        ({"data": object()}, [], "data holds a object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_key(source, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(Job, source, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.toml", None, "does not exist"),
        ("bad.toml", b"a = = 1", "is not TOML"),
        ("bin.toml", b"\xff\xfe\0", "TOML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(Job, tmp_path / name)
    assert name in str(caught.value)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load(Job, tmp_path)


@pytest.mark.parametrize("config", [[1], None, Job, 5])
def test_only_dataclasses_and_mappings_are_configurations(config):
    with pytest.raises(ConfigError, match="a dataclass or a mapping"):
        to_dict(config)


def test_none_in_a_list_cannot_be_kept():
    with pytest.raises(ConfigError, match="None"):
        to_toml({"a": [1, None]})


def test_changes_and_digest_agree():
    one, two = Training(), Training(steps=11, schedule=Schedule(shape="linear"))
    assert changes(to_dict(one), to_dict(one)) == []
    assert changes(to_dict(one), to_dict(two)) == ['schedule.shape: "cosine" -> "linear"', "steps: 10 -> 11"]
    assert digest(one) == digest(to_dict(one)) != digest(two)
    # What differs for a computation differs here, what does not does not.
    assert changes({"a": True}, {"a": 1}) == ["a: true -> 1"]
    assert digest({"a": True}) != digest({"a": 1})
    assert changes({"a": 1.0, "b": None}, {"a": 1}) == []
    assert changes({"a": [1, 2]}, {"a": (1, 3)}) == ["a: [1, 2] -> [1, 3]"]
    assert changes({"a": float("nan")}, {"a": float("nan")}) == []
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


finite = st.floats(allow_nan=False)
trainings = st.builds(
    Training,
    steps=st.integers(min_value=-(2**62), max_value=2**62),
    learning_rate=finite,
    betas=st.tuples(finite, finite),
    schedule=st.builds(Schedule, warmup=st.floats(min_value=0, max_value=1, exclude_max=True)),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
jobs = st.builds(
    Job,
    data=texts,
    limit=st.none() | st.integers(min_value=-(2**62), max_value=2**62),
    training=trainings,
    options=st.dictionaries(texts, finite, max_size=3),
    stages=st.lists(trainings, max_size=2).map(tuple),
)


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(job=jobs)
def test_every_configuration_survives_toml(job):
    import tomllib

    content = tomllib.loads(to_toml(job))
    back = load(Job, content)
    assert back == job
    assert repr(back) == repr(job)  # -0.0 too
    assert changes(content, to_dict(job)) == []
    assert digest(content) == digest(job)
