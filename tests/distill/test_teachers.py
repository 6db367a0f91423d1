"""Teachers out of memory: a cache on disk and a small server, both against the live model."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kullback.core.errors import ConfigError, DataError
from kullback.core.rng import generator
from kullback.core.types import TeacherOutput
from kullback.distill._hf import LiveTeacher
from kullback.distill.bd_kd_objective import bdkd_objective
from kullback.distill.objective import Objective
from kullback.distill.pld import pld_objective
from kullback.distill.served import ServedTeacher
from kullback.distill.teachers import CachedTeacher, is_teacher_cache, teacher_logits, write_teacher_cache
from kullback.divergences import f_divergence, kl, renyi
from kullback.models.small import small_llama

sys.path.insert(0, str(Path(__file__).parent))
from _server import Server, log_probs

V, T, K = 60, 12, 5


@pytest.fixture(scope="module")
def model():
    return small_llama(V, hidden=16, layers=1, heads=2, length=T, generator=generator(0, "teacher")).eval()


@pytest.fixture
def blocks(generator):
    return [{"input_ids": torch.randint(0, V, (T,), generator=generator)} for _ in range(7)]


def write(model, blocks, folder, **options):
    return write_teacher_cache(
        teacher_logits(LiveTeacher(model)), blocks, folder, kept=K, vocabulary=V, batch=2, shard=3, **options
    )


def test_a_cache_returns_what_the_live_teacher_said(model, blocks, tmp_path):
    summary = write(model, blocks, tmp_path / "cache")
    assert is_teacher_cache(tmp_path / "cache")
    teacher = CachedTeacher(tmp_path / "cache")
    ids = torch.stack([blocks[index]["input_ids"] for index in (6, 0, 3)])
    said, expected = teacher(ids, torch.ones_like(ids)), log_probs(model, ids)
    torch.testing.assert_close(said.top_log_probs, expected.gather(-1, said.top_ids), atol=4e-3, rtol=0)
    assert torch.equal(said.top_ids, expected.topk(K, -1).indices)
    following = expected[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(said.label_log_probs[:, :-1], following, atol=4e-3, rtol=0)
    mass = said.top_log_probs.exp().sum(-1) + said.tail_log_prob.exp()
    torch.testing.assert_close(mass, torch.ones(3, T), atol=4e-3, rtol=0)
    stored = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert summary.bytes_per_token == stored / (7 * T)
    assert 0 < summary.tail_mass < 1
    assert 0 < summary.kl_bound < summary.kl_bound_1000


def test_drawn_tokens_are_stored_and_cost_what_they_take(model, blocks, tmp_path):
    plain = write(model, blocks, tmp_path / "plain")
    summary = write(model, blocks, tmp_path / "drawn", drawn=3)
    assert summary.drawn == 3
    assert summary.bytes_per_token - plain.bytes_per_token == pytest.approx(3 * 4, abs=6)
    ids = torch.stack([block["input_ids"] for block in blocks])
    said, expected = CachedTeacher(tmp_path / "drawn")(ids, torch.ones_like(ids)), log_probs(model, ids)
    assert said.tail_ids.shape == (7, T, 3)
    torch.testing.assert_close(said.tail_log_probs, expected.gather(-1, said.tail_ids), atol=4e-3, rtol=0)
    objective = Objective(divergence=f_divergence("kl"))
    student = torch.zeros(7, T, V)
    whole = objective.loss(TeacherOutput(logits=expected), student, ids)
    assert objective.loss(said, student, ids) == pytest.approx(whole.item(), rel=0.2)
    assert abs(objective.loss(said._replace(tail_ids=None), student, ids) - whole) > 0.5 * whole


def test_bd_kd_and_renyi_from_a_cache_come_close_to_those_of_the_live_teacher(model, blocks, tmp_path, generator):
    write(model, blocks, tmp_path / "cache", drawn=40, temperature=2.0)
    ids = torch.stack([block["input_ids"] for block in blocks])
    said = CachedTeacher(tmp_path / "cache", temperature=2.0)(ids, torch.ones_like(ids))
    states, head = torch.randn(7, T, 4, generator=generator), torch.randn(V, 4, generator=generator)
    live = TeacherOutput(logits=log_probs(model, ids))
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    made = bdkd_objective(temperature=2.0), Objective(divergence=partial(renyi, alpha=2.0), temperature=2.0)
    for objective in made:
        whole, found, coarse = (
            objective.loss(target, states, labels, weight=head).item()
            for target in (live, said, said._replace(tail_ids=None, tail_log_probs=None))
        )
        assert found == pytest.approx(whole, rel=0.05)
        assert coarse < 0.8 * whole, "one bin for the tail is seen"


def test_a_cache_is_asked_only_about_what_it_holds(model, blocks, tmp_path):
    write(model, blocks, tmp_path / "cache", temperature=2.0)
    with pytest.raises(ConfigError, match=r"temperature 2.0 and the objective asks for 1.0"):
        CachedTeacher(tmp_path / "cache")
    teacher = CachedTeacher(tmp_path / "cache", temperature=2.0)
    other = torch.zeros(1, T, dtype=torch.long)
    with pytest.raises(DataError, match="not in the teacher cache"):
        teacher(other, other)


def test_a_temperature_is_applied_before_truncation(model, blocks, tmp_path):
    write(model, blocks, tmp_path / "cache", temperature=2.0)
    ids = blocks[0]["input_ids"][None]
    said = CachedTeacher(tmp_path / "cache", temperature=2.0)(ids, ids)
    with torch.no_grad():
        expected = (model(ids).logits / 2).log_softmax(-1).topk(K, -1).values
    torch.testing.assert_close(said.top_log_probs, expected, atol=4e-3, rtol=0)


def test_damage_and_emptiness_are_said(model, blocks, tmp_path):
    with pytest.raises(DataError, match="no block"):
        write(model, [], tmp_path / "empty")
    write(model, blocks, tmp_path / "cache")
    (tmp_path / "cache" / "shard-00000.safetensors").write_bytes(b"\x00" * 40)
    ids = blocks[0]["input_ids"][None]
    with pytest.raises(DataError, match="shard 0 .* damaged"):
        CachedTeacher(tmp_path / "cache")(ids, ids)
    (tmp_path / "cache" / "teacher-cache.json").write_text("{")
    with pytest.raises(DataError, match="not a readable teacher cache"):
        CachedTeacher(tmp_path / "cache")


def test_older_formats_are_read_with_what_they_have(model, blocks, tmp_path):
    write(model, blocks, tmp_path / "cache", drawn=2)
    index = tmp_path / "cache" / "teacher-cache.json"
    written = json.loads(index.read_text())
    ids = torch.stack([block["input_ids"] for block in blocks])
    for version, without in (2, "entropy"), (1, "label_log_probs"):
        for path in (tmp_path / "cache").glob("*.safetensors"):
            save_file({name: x for name, x in load_file(path).items() if name != without}, path)
        index.write_text(json.dumps({**written, "format": version + 1}))
        with pytest.raises(DataError, match="damaged"):
            CachedTeacher(tmp_path / "cache")(ids, ids)
        index.write_text(json.dumps({**written, "format": version}))
        teacher = CachedTeacher(tmp_path / "cache")
        assert (teacher.has_labels, teacher.has_entropy) == (version == 2, False)
        said = teacher(ids, ids)
        assert (said.label_log_probs is None, said.entropy is None) == (version == 1, True)
        assert math.isfinite(bdkd_objective().loss(said, torch.zeros(7, T, V), ids))
    assert math.isfinite(Objective(divergence=kl, cross_entropy=0.2).loss(said, torch.zeros(7, T, V), ids))
    with pytest.raises(ConfigError, match="how probable the teacher finds the label"):
        pld_objective().loss(said, torch.zeros(7, T, V), ids)
    with pytest.raises(ConfigError, match="how probable the teacher finds the next token"):
        bdkd_objective(gate="label").loss(said, torch.zeros(7, T, V), ids)
    index.write_text(json.dumps({**written, "format": 4}))
    with pytest.raises(DataError, match="of format 4, and this version reads up to 3"):
        CachedTeacher(tmp_path / "cache")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_entropy_is_that_of_the_whole_distribution_at_temperature_one(model, blocks, tmp_path, temperature):
    write(model, blocks, tmp_path / "cache", temperature=temperature)
    ids = torch.stack([block["input_ids"] for block in blocks])
    said, log_p = CachedTeacher(tmp_path / "cache", temperature=temperature)(ids, ids), log_probs(model, ids)
    torch.testing.assert_close(said.entropy, -(log_p.exp() * log_p).sum(-1), atol=2e-6, rtol=0)


def test_pld_from_a_cache_is_that_of_the_live_teacher(model, blocks, tmp_path, generator):
    write(model, blocks, tmp_path / "cache", temperature=2.0)
    ids = torch.stack([block["input_ids"] for block in blocks])
    said = CachedTeacher(tmp_path / "cache", temperature=2.0)(ids, torch.ones_like(ids))
    student = torch.randn(7, T, V, generator=generator)
    objective = pld_objective(topk=K, temperature=2.0)
    live = objective.loss(LiveTeacher(model)(ids, torch.ones_like(ids)), student, ids)
    assert objective.loss(said, student, ids).item() == pytest.approx(live.item(), rel=2e-3)
    other = pld_objective(topk=K).loss(LiveTeacher(model)(ids, torch.ones_like(ids)), student, ids)
    assert abs(other - live) > 0.05 * live, "another temperature is seen"


def test_a_cache_that_fails_half_way_leaves_nothing(model, blocks, tmp_path):
    def fails(ids):
        raise DataError("the teacher went away")

    with pytest.raises(DataError, match="went away"):
        write_teacher_cache(fails, blocks, tmp_path / "cache", kept=K, vocabulary=V)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def server(model):
    made = []

    def make(dialect="prompt_logprobs"):
        made.append(Server(model, dialect))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("dialect", ["prompt_logprobs", "echo"])
def test_a_served_teacher_says_what_the_live_one_says(model, blocks, server, dialect):
    ids = torch.stack([block["input_ids"] for block in blocks[:3]])
    said = ServedTeacher(server(dialect).url, vocabulary=V, kept=K)(ids, torch.ones_like(ids))
    expected = log_probs(model, ids)[:, :-1]
    torch.testing.assert_close(said.top_log_probs[:, :-1], expected.topk(K, -1).values, atol=1e-5, rtol=0)
    assert torch.equal(said.top_ids[:, :-1], expected.topk(K, -1).indices)
    following = expected.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(said.label_log_probs[:, :-1], following, atol=1e-5, rtol=0)
    rest = (1 - expected.topk(K, -1).values.exp().sum(-1)).log()
    torch.testing.assert_close(said.tail_log_prob[:, :-1], rest, atol=1e-4, rtol=0)


def test_a_server_that_gives_its_top_alone_has_no_labels(model, blocks, server):
    ids = torch.stack([block["input_ids"] for block in blocks[:3]])
    teacher = ServedTeacher(server("top alone").url, vocabulary=V, kept=K)
    assert not teacher.has_labels
    assert ServedTeacher(server("echo").url, vocabulary=V, kept=K).has_labels
    said = teacher(ids, torch.ones_like(ids))
    assert said.label_log_probs is None
    with pytest.raises(ConfigError, match="how probable the teacher finds the label"):
        pld_objective().loss(said, torch.zeros(3, T, V), ids)


def test_a_busy_server_is_asked_again(model, blocks, server):
    one = server()
    teacher = ServedTeacher(one.url, vocabulary=V, kept=K)
    one.failures = 2
    ids = blocks[0]["input_ids"][None]
    assert torch.isfinite(teacher(ids, ids).top_log_probs).all()
    assert one.requests == 3


@pytest.mark.parametrize(("dialect", "message"), [("none", "prompt_logprobs=5"), ("text", "token ids")])
def test_answers_without_what_is_needed(blocks, server, dialect, message):
    teacher = ServedTeacher(server(dialect).url, vocabulary=V, kept=K)
    ids = blocks[0]["input_ids"][None]
    with pytest.raises(DataError, match=message):
        teacher(ids, ids)


def test_no_server_at_all():
    with pytest.raises(DataError, match="is it running"):
        ServedTeacher("http://127.0.0.1:9/v1", vocabulary=V, retries=0)


def test_log_probability_of_minus_infinity_stays_usable(blocks):
    teacher = ServedTeacher.__new__(ServedTeacher)
    teacher.url, teacher.kept = "here", 2
    entry = {"1": {"logprob": 0.0}, "2": {"logprob": -math.inf}}
    ids, values = teacher._row({"prompt_logprobs": [None, entry, entry]}, 3)
    assert ids[0] == [1, 2]
    assert values[0] == [0.0, -1e4]
