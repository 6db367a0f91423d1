"""The main job from the inside: what it leaves, that it resumes in the same bits, and that batches do not matter."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kullback.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    KullbackError,
    MissingExtra,
    ShapeError,
)
from kullback.core.rng import generator
from kullback.jobs import distill as job
from kullback.jobs import teacher_cache
from kullback.jobs.teacher_cache import TeacherCacheConfig
from kullback.models.small import small_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "distill"))
from _server import Server


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def losses(run: Path, part: str = "distilled-0") -> dict[int, float]:
    lines = (run / "parts" / part / "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {event["step"]: event["cross_entropy"] for event in found if event["kind"] == "evaluation"}


def with_training(config, **values):
    return replace(config, training=replace(config.training, **values))


def with_objective(config, **values):
    return replace(config, objective=replace(config.objective, **values))


def test_a_job_leaves_a_model_a_report_curves_and_samples(config, tmp_path):
    run = job.run(replace(config, baseline=True, seeds=(0, 1)), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    assert model(**tokenizer("the", return_tensors="pt")).logits.shape[-1] >= len(tokenizer)
    report = json.loads((run.path / "report.json").read_text())
    names = [row["student"] for row in report["rows"]]
    assert names == ["teacher", "student before", "distilled from the teacher", "cross-entropy alone"]
    before, after = report["rows"][1], report["rows"][2]
    assert after["cross_entropy"] < before["cross_entropy"]
    assert after["divergence"] < before["divergence"]
    assert after["perplexity"] == pytest.approx(math.exp(after["cross_entropy"]), rel=0.05)
    assert report["gain"]["of"] == 2
    for name in report["written"]:
        assert (run.path / name).exists(), name
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "before", "after", "teacher"} <= samples[0].keys()
    assert not [path for path in run.path.rglob("*") if path.suffix in (".pt", ".pth", ".pkl")], "nothing is pickled"


def test_accumulation_changes_nothing(config, tmp_path):
    whole = job.run(config, tmp_path / "whole")
    split = job.run(with_training(config, accumulate=4), tmp_path / "split")
    for name, tensor in weights(whole.path).items():
        torch.testing.assert_close(tensor, weights(split.path)[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_interrupted_job_resumes_in_the_same_bits(config, tmp_path, rank):
    config = replace(with_objective(config, on_policy=0.5, prompt=4), lora=job.LoraSettings(rank=rank))
    straight = job.run(config, tmp_path / "straight")

    class Stop(Exception):
        pass

    def killer(event):
        if event["kind"] == "progress" and event["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        job.run(config, tmp_path / "killed", listen=killer)
    steps = []
    resumed = job.resume(
        tmp_path / "killed",
        listen=lambda event: steps.append(event.get("step")) if event["kind"] == "progress" else None,
    )
    assert steps == [5, 6], "only the steps after the checkpoint at step 4 are repeated"
    for name, tensor in weights(straight.path).items():
        assert torch.equal(tensor, weights(resumed.path)[name]), name
    assert losses(straight.path) == losses(resumed.path)


def test_a_resumed_job_refuses_another_configuration(config, tmp_path):
    job.run(config, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"learning_rate.*0\.01.*0\.5"):
        job.run(with_training(config, learning_rate=0.5), tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="resume"):
        job.run(config, tmp_path / "run")


def test_a_signal_saves_and_says_how_far_it_came(config, tmp_path):
    import os
    import signal

    def interrupt(event):
        if event["kind"] == "progress" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 3 of 6"):
        job.run(config, tmp_path / "run", listen=interrupt)
    resumed = job.resume(tmp_path / "run")
    straight = job.run(config, tmp_path / "straight")
    for name, tensor in weights(straight.path).items():
        assert torch.equal(tensor, weights(resumed.path)[name]), name


@pytest.mark.parametrize("name", ["reverse-kl", "jsd", "total-variation", "cauchy-schwarz", "sinkd", "pld"])
def test_every_kind_of_objective_trains(config, tmp_path, name):
    run = job.run(with_training(with_objective(config, name=name), steps=3), tmp_path / "run")
    values = losses(run.path)
    assert math.isfinite(values[3])
    assert values[3] < values[0]


def test_an_objective_has_the_share_of_cross_entropy_that_suits_it():
    shares = {name: job.objective_of(job.ObjectiveConfig(name=name)).cross_entropy for name in ("kl", "sinkd", "pld")}
    assert shares == {"kl": 0.2, "sinkd": 0.2, "pld": 0.0}
    assert job.objective_of(job.ObjectiveConfig(name="pld", cross_entropy=0.3)).cross_entropy == 0.3


def test_options_are_numbers_of_the_kind_that_an_objective_takes():
    def made(**values):
        return job.objective_of(job.ObjectiveConfig(**values))

    assert made(name="sinkd", options={"rows": 64.0, "eps": 1}).batch_rows == 64
    for values, message in (
        ({"name": "pld", "options": {"tau": 2.0}}, "takes no option 'tau': it takes topk, weights"),
        ({"name": "pld", "options": {"topk": 2.5}}, "topk is like 64, got 2.5"),
        ({"name": "pld", "options": {"topk": "many"}}, "topk is like 64, got 'many'"),
        ({"name": "pld", "options": {"topk": 0}}, "topk counts the picks"),
        ({"name": "pld", "options": {"weights": "rising"}}, "not 'rising'"),
        ({"name": "pld", "temperature": -1.0}, "temperature must be positive"),
        ({"name": "pld", "squared_temperature": True}, "squared_temperature would do nothing to pld"),
        ({"name": "sinkd", "options": {"reduction": "sum"}}, "takes no option 'reduction'"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(**values)


def test_what_an_objective_cannot_do_is_said_before_the_run(config, tmp_path):
    settings = TeacherCacheConfig(teacher=config.teacher, data=config.data, kept=20)
    teacher_cache.run(settings, tmp_path / "cache")
    cached = replace(config, teacher=str(tmp_path / "cache"))
    for bad, message in (
        (with_objective(cached, name="sinkd"), "sinkd compares whole distributions"),
        (with_objective(cached, name="pld", options={"topk": 21}), "topk is 21 and the teacher gives 20 tokens"),
        (with_objective(cached, name="pld", temperature=2.0), "written at temperature 1.0"),
        (with_objective(config, name="pld", on_policy=0.5, prompt=4), "no labels but the student's own samples"),
    ):
        with pytest.raises(ConfigError, match=message):
            job.run(bad, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_head_padded_further_is_compared_on_the_common_part(config, world, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(world / "teacher")
    padded = small_llama(len(tokenizer) + 20, hidden=16, layers=1, heads=2, length=32, generator=generator(2, "padded"))
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    notes = []
    run = job.run(
        replace(config, student=str(tmp_path / "padded")), tmp_path / "run",
        listen=lambda event: notes.append(event["text"]) if event["kind"] == "note" else None,
    )  # fmt: skip
    assert (run.path / "model").exists()
    assert any(str(len(tokenizer) + 20) in note for note in notes)


def test_lora_students_are_saved_whole(config, tmp_path):
    run = job.run(replace(config, lora=job.LoraSettings(rank=2)), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    before = AutoModelForCausalLM.from_pretrained(config.student)
    changed = [
        name for (name, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True)
        if not torch.equal(a, b)
    ]  # fmt: skip
    assert changed
    assert all("proj" in name for name in changed), "only the adapted maps differ from the student they were added to"


def test_bfloat16_and_gradient_checkpointing_train(config, tmp_path):
    run = job.run(with_training(config, precision="bfloat16", gradient_checkpointing=True), tmp_path / "run")
    assert losses(run.path)[6] < losses(run.path)[0]


def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    plain = job.run(config, tmp_path / "plain")
    saved = job.run(with_training(config, gradient_checkpointing=True), tmp_path / "saved")
    for name, tensor in weights(plain.path).items():
        torch.testing.assert_close(tensor, weights(saved.path)[name], rtol=1e-4, atol=1e-6)


def test_a_fresh_student_from_a_config_alone(config, world, tmp_path):
    student = tmp_path / "fresh"
    student.mkdir()
    for path in (world / "student").iterdir():
        if path.suffix != ".safetensors":
            (student / path.name).write_bytes(path.read_bytes())
    run = job.run(replace(config, student=str(student)), tmp_path / "run")
    assert (run.path / "model" / "model.safetensors").exists()


@pytest.fixture
def other_tokenizer(tmp_path, world):
    from kullback.data.tokenizer import train_byte_bpe

    place = tmp_path / "other"
    tokenizer = train_byte_bpe(["quite another text, with other pieces"] * 3, 270)
    small_llama(len(tokenizer), hidden=16, layers=1, heads=2, length=32, generator=generator(3)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def _damaged(world, tmp_path):
    place = tmp_path / "nan"
    model = AutoModelForCausalLM.from_pretrained(world / "student")
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = math.nan
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(world / "student").save_pretrained(place)
    return place


def test_bad_models_are_named_before_anything_is_written(config, world, tmp_path, other_tokenizer):
    cases = [
        (replace(config, teacher=str(tmp_path / "nowhere")), DataError, "not a directory"),
        (replace(config, student=str(_damaged(world, tmp_path))), DataError, "not finite"),
        (replace(config, student=str(other_tokenizer)), ShapeError, "teacher has .* tokens, student 270"),
        (replace(config, student=""), ConfigError, "no student"),
        (with_objective(config, name="kll"), ConfigError, "kl"),
        (with_objective(config, name="kl", options={"beta": 0.1}), ConfigError, "beta"),
        (with_objective(config, on_policy=1.5), ConfigError, "on_policy"),
        (with_training(config, batch=5, accumulate=2), ConfigError, "multiple of 2"),
        (with_training(config, report_to=("wandb",)), (ConfigError, MissingExtra), "tensorboard"),
    ]
    for number, (bad, error, message) in enumerate(cases):
        out = tmp_path / f"run-{number}"
        with pytest.raises(error, match=message) as caught:
            job.run(bad, out)
        assert isinstance(caught.value, KullbackError)
        assert "\n" not in str(caught.value)
        assert not (out / "model").exists()


def test_bad_text_leaves_no_run_behind(config, tmp_path):
    empty, binary, short = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "short.txt"
    empty.write_text("")
    binary.write_bytes(bytes(range(256)) * 10)
    short.write_text("a few words")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"content": "no field called text"}\n')
    for path, message in (
        (empty, "empty"),
        (binary, "text"),
        (short, "block"),
        (lines, "content"),
        (tmp_path / "no", "no"),
    ):
        bad = replace(config, data=replace(config.data, train=str(path)))
        with pytest.raises(DataError, match=message):
            job.run(bad, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_divergent_training_is_said_and_the_checkpoint_kept(config, tmp_path):
    wild = with_training(config, learning_rate=1e30, clip=0.0, steps=20, warmup=0.0)
    with pytest.raises(ConfigError, match="lower training.learning_rate"):
        job.run(wild, tmp_path / "run")
    for weights_file in tmp_path.rglob("ckpt/*/model.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(weights_file).values())


def test_a_served_teacher_trains_the_student_that_the_live_one_does(config, tmp_path):
    server = Server(AutoModelForCausalLM.from_pretrained(config.teacher))
    try:
        objective = replace(config.objective, on_policy=0.5, prompt=4)
        served = job.run(replace(config, teacher=server.url, objective=objective), tmp_path / "served")
        with pytest.raises(ConfigError, match="a server answers at temperature 1"):
            job.run(with_objective(replace(config, teacher=server.url), temperature=2.0), tmp_path / "hot")
        with pytest.raises(ConfigError, match="sinkd compares whole distributions"):
            job.run(with_objective(replace(config, teacher=server.url), name="sinkd"), tmp_path / "whole")
    finally:
        server.close()
    assert not (tmp_path / "hot").exists()
    assert not (tmp_path / "whole").exists()
    live = job.run(replace(config, objective=objective), tmp_path / "live")
    assert losses(served.path)[6] == pytest.approx(losses(live.path)[6], rel=0.01)


def test_a_divergence_is_measured_at_the_temperature_of_the_objective(config, tmp_path):
    hot = with_objective(config, temperature=3.0)
    settings = TeacherCacheConfig(teacher=config.teacher, data=config.data, kept=200, drawn=50, temperature=3.0)
    teacher_cache.run(settings, tmp_path / "cache")
    live = job.run(hot, tmp_path / "live")
    cached = job.run(replace(hot, teacher=str(tmp_path / "cache")), tmp_path / "cached")
    reports = [json.loads((run.path / "report.json").read_text())["parts"]["distilled-0"] for run in (live, cached)]
    for when in ("before", "after"):
        assert reports[1][when]["divergence"] == pytest.approx(reports[0][when]["divergence"], rel=0.05)
    cold = job.run(config, tmp_path / "cold")
    before = json.loads((cold.path / "report.json").read_text())["parts"]["distilled-0"]["before"]["divergence"]
    assert abs(before - reports[0]["before"]["divergence"]) > 0.2 * before, "another temperature, another number"


def test_tensorboard_is_written_inside_the_run(config, tmp_path):
    pytest.importorskip("tensorboard")
    run = job.run(with_training(config, report_to=("tensorboard",)), tmp_path / "run")
    assert list(run.path.rglob("events.out.tfevents.*"))
