"""What the language-model panels share: an alignment below a paper's run, read back as a curve."""

import pytest

from kullback.core.runs import Run
from kullback.data.arithmetic import sum_examples
from kullback.data.examples import Example, read_examples
from kullback.models.adder import trained_adder
from kullback.papers.sums import align, write_examples

TINY = {"limit": 3, "copies": 8, "hidden": 32, "layers": 1, "heads": 2, "steps": 60, "batch": 32}


@pytest.fixture
def started(tmp_path, monkeypatch):
    monkeypatch.setenv("KULLBACK_CACHE", str(tmp_path / "cache"))
    return Run.start(tmp_path / "run", {}, kind="reproduce", seed=1), trained_adder(**TINY)


def test_examples_are_written_once_and_read_back(tmp_path):
    path = write_examples(tmp_path / "sums.jsonl", sum_examples(3))
    assert list(read_examples(path, wanted="pair")) == sum_examples(3)
    write_examples(path, [Example(prompt="1+1=", completion="3")])
    assert len(list(read_examples(path, wanted="pair"))) == 9


def test_an_alignment_becomes_a_curve_and_is_not_done_twice(started):
    run, model = started
    examples = write_examples(run.path / "sums.jsonl", sum_examples(3))
    steps = []
    given = {
        "model": model, "examples": examples, "method": "grpo", "filtering": "nonzero", "steps": 4, "batch": 3,
        "group": 4, "every": 2, "samples": 4, "listen": lambda event: steps.append(event["kind"]),
    }  # fmt: skip
    done = align(run, "grpo", **given)
    assert [row["step"] for row in done.curve] == [0, 2, 4]
    assert (done.model / "config.json").exists()
    drawn = [row.get("drawn", 0) for row in done.curve]
    assert drawn[0] == 0
    assert 6 <= drawn[1] < drawn[2] <= 4 * 9, "three groups a step are asked for, of nine sums"
    assert all({"reward", "pass_k", "divergence", "entropy"} <= set(row) for row in done.curve)
    assert done.curve[0]["divergence"] == pytest.approx(0.0, abs=1e-5)
    before = steps.count("progress")
    assert align(run, "grpo", **given).curve == done.curve
    assert steps.count("progress") == before == 4


def test_options_and_a_reference_reach_the_method(started):
    run, model = started
    examples = write_examples(run.path / "sums.jsonl", sum_examples(3))
    given = {"model": model, "examples": examples, "steps": 2, "batch": 9, "samples": 4}
    teacher = align(run, "teacher", method="sft", **given, rate=1e-2, seed=0).model
    done = align(run, "kdrl", method="kdrl", options={"reinforced": False}, reference=[teacher], **given)
    assert done.curve[0]["divergence"] > 0.0, "measured to the teacher, not to the model itself"
