"""`kullback distill` and `kullback teacher-cache` as they are typed: what they say, leave, and refuse."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kullback import cli
from kullback.core.config import to_toml
from kullback.core.rng import generator
from kullback.data.tokenizer import train_byte_bpe
from kullback.models.small import small_llama

FEW = ["--set", "training.steps=3", "--set", "training.batch=4", "--set", "data.length=32", "--set", "data.holdout=0.2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(world, *more):
    pair = ["--teacher", world / "teacher", "--student", world / "student", "--data", world / "text.txt"]
    return ["distill", *map(str, pair), *FEW, *map(str, more)]


def refused(capsys, arguments):
    """The one sentence with which a command is refused."""
    code = cli.execute(arguments)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in out + err
    return lines[0]


def test_a_job_prints_a_table_and_where_everything_is(world, folder, capsys):
    assert cli.execute(command(world, "--set", "baseline=true", "--set", "seeds=[0,1]")) == 0
    out = capsys.readouterr().out
    assert "distilled from the teacher" in out
    assert "cross-entropy alone" in out
    assert "in 2 seeds" in out.replace("of 2 seeds", "in 2 seeds")
    for name in ("model", "report.json", "samples.jsonl", "curves.csv", "figures/curves.svg"):
        assert str((folder / "runs" / "distill-1" / name).relative_to(folder)) in out
        assert (folder / "runs" / "distill-1" / name).exists()
    again = json.loads(_output(capsys, ["distill", "--resume", "runs/distill-1", "--json"]))
    assert again["run"].endswith("distill-1")
    assert again["rows"][2]["student"] == "distilled from the teacher"


def _output(capsys, arguments):
    assert cli.execute(arguments) == 0
    return capsys.readouterr().out


def test_the_plan_costs_nothing_and_writes_nothing(world, folder, capsys):
    plan = json.loads(_output(capsys, command(world, "--set", "training.steps=1000", "--dry-run", "--json")))
    assert plan["tokens_a_step"] == 4 * 32
    assert plan["tokens_in_all"] == 1000 * 4 * 32
    assert plan["memory_bytes"] > 10_000_000
    assert plan["minutes"] > 0
    assert not list(folder.iterdir())
    assert "minutes" in _output(capsys, command(world, "--dry-run"))


def test_the_same_from_a_file(world, folder, config, capsys):
    (folder / "job.toml").write_text(to_toml(config))
    assert cli.execute(["distill", "--config", "job.toml", "--set", "training.steps=2", "--out", "here"]) == 0
    assert "model" in capsys.readouterr().out
    assert "steps = 2" in (folder / "here" / "run.toml").read_text()


def test_a_cache_stands_in_for_its_teacher(world, folder, capsys):
    asked = ["--teacher", str(world / "teacher"), "--data", str(world / "text.txt"), *FEW[4:]]
    out = _output(capsys, ["teacher-cache", "cache", *asked, "--kept", "40"])
    assert "bytes a token" in out
    assert "nats a token" in out
    pair = ["--teacher", "cache", "--student", str(world / "student"), "--data", str(world / "text.txt")]
    report = json.loads(_output(capsys, ["distill", *pair, *FEW, "--json"]))
    live = json.loads(_output(capsys, [*command(world), "--json"]))
    found, expected = (r["rows"][-1]["cross_entropy"] for r in (report, live))
    assert found == pytest.approx(expected, rel=0.01)
    assert "on-policy" in refused(capsys, ["distill", *pair, *FEW, "--set", "objective.on_policy=0.5"])
    assert "there already" in refused(capsys, ["teacher-cache", "cache", *asked])


def _bad_text(folder, world):
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (folder / "field.jsonl").write_text('{"content": "no field called text"}\n')
    (folder / "torn.jsonl").write_text('{"text": "no end\n')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "short.txt").write_text("a few words")
    (folder / "nothing").mkdir()
    return {
        "empty.txt": "empty", "binary.txt": "text", "field.jsonl": "content", "torn.jsonl": "line 1",
        "picture.png": ".png", "short.txt": "data.length", "nothing": "nothing", "gone": "gone",
    }  # fmt: skip


def test_bad_text_is_one_sentence_and_leaves_nothing(world, folder, capsys):
    for name, word in _bad_text(folder, world).items():
        pair = ["--teacher", str(world / "teacher"), "--student", str(world / "student"), "--data", name]
        assert word in refused(capsys, ["distill", *pair, *FEW])
        assert not list(folder.rglob("run.toml"))
        cache = ["teacher-cache", "cache", "--teacher", str(world / "teacher"), "--data", name, *FEW[4:]]
        assert word in refused(capsys, cache)
        assert not (folder / "cache").exists()


def _bad_models(folder, world):
    for name in ("nan", "torn", "foreign", "bare"):
        shutil.copytree(world / "student", folder / name)
    model = AutoModelForCausalLM.from_pretrained(world / "student")
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    model.save_pretrained(folder / "nan")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    tokenizer = train_byte_bpe(["quite another text, with other pieces"] * 3, 270)
    tokenizer.save_pretrained(folder / "foreign")
    foreign = small_llama(270, hidden=16, layers=1, heads=2, length=32, generator=generator(3))
    foreign.save_pretrained(folder / "foreign")
    (folder / "bare" / "config.json").unlink()
    (folder / "file").write_text("not a directory")
    return {"nan": "not finite", "torn": "could not be loaded", "foreign": "tokens", "bare": "config.json",
            "file": "not a directory", "gone": "not a directory"}  # fmt: skip


def test_a_bad_model_is_one_sentence_and_leaves_nothing(world, folder, capsys):
    for name, word in _bad_models(folder, world).items():
        for teacher, student in ((world / "teacher", folder / name), (folder / name, world / "student")):
            pair = ["--teacher", str(teacher), "--student", str(student), "--data", str(world / "text.txt")]
            message = refused(capsys, ["distill", *pair, *FEW])
            assert word in message, message
        assert not list(folder.rglob("run.toml"))


def test_both_sizes_of_different_vocabularies_are_named(world, folder, capsys):
    _bad_models(folder, world)
    message = refused(capsys, command(world, "--student", folder / "foreign"))
    sizes = [len(AutoTokenizer.from_pretrained(place)) for place in (world / "teacher", folder / "foreign")]
    assert f"teacher has {sizes[0]} tokens, student {sizes[1]}" in message
    assert "give a student with the teacher's tokenizer" in message


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--objective", "reverse-lk"], "did you mean 'reverse_kl'"),
        (["--set", "training.step=4"], "training.steps"),
        (["--set", "training.steps=many"], "training.steps"),
        (["--set", "objective.options={eps=1}", "--objective", "jsd"], "eps"),
        (["--set", "training.learning_rate=-1"], "learning_rate"),
        (["--config", "gone.toml"], "gone.toml"),
        (["--resume", "gone"], "--resume"),
    ],
)
def test_a_wrong_option_is_one_sentence(world, folder, capsys, more, word):
    assert word in refused(capsys, command(world, *more))
    assert not list(folder.iterdir())


def test_where_nothing_can_be_written(world, folder, capsys):
    (folder / "file").touch()
    assert "cannot" in refused(capsys, command(world, "--out", folder / "file" / "run"))
    assert refused(capsys, command(world, "--out", "/sys/kullback/run"))
    shutil.rmtree(folder / "runs", ignore_errors=True)
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_full_disk_is_one_sentence_and_what_was_whole_stays(world, small_disk, capsys):
    assert "disk" in refused(capsys, command(world, "--out", small_disk / "run")).lower()
    assert not list(small_disk.rglob("*.partial*"))
    assert not (small_disk / "run" / "report.json").exists()
    assert "disk" in refused(
        capsys,
        ["teacher-cache", str(small_disk / "cache"), "--teacher", str(world / "teacher"),
         "--data", str(world / "text.txt"), *FEW[4:], "--set", "kept=200"],
    ).lower()  # fmt: skip
    assert not (small_disk / "cache").exists()
