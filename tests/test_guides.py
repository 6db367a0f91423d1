"""The guides' code runs as it stands: the python blocks of a guide, in order, in a namespace of their own."""

import re
from pathlib import Path

import pytest
import torch

GUIDES = sorted((Path(__file__).parents[1] / "docs" / "guides").glob("*.md"))
LOOP = 30  # lines that a training loop has at most


def blocks(text: str) -> list[str]:
    """The python blocks of a guide, each moved down to its own line, so that a traceback points into the guide."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text[: match.start(1)].count("\n") + match.group(1) for match in found]


def run(path: Path) -> dict:
    names = {"__name__": "guide"}
    with torch.random.fork_rng():
        for block in blocks(path.read_text()):
            exec(compile(block, str(path), "exec"), names)
    return names


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_a_guide_runs(path, capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    assert blocks(path.read_text()), "a guide has code"
    run(path)
    if path.stem == "classifiers":
        printed = capsys.readouterr().out
        share = {line[:15].strip(): float(line[15:].strip(" %\n")) for line in printed.splitlines()[:7]}
        assert share["forward KL"] > share["cross-entropy"] + 3.0
        assert min(share.values()) > 80.0


def test_the_loop_over_batches_is_short():
    code = blocks((GUIDES[0].parent / "classifiers.md").read_text())
    loops = [block.strip() for block in code if "def fit" in block]
    assert [loop.count("\n") + 1 <= LOOP for loop in loops] == [True]


def test_a_guide_that_is_wrong_is_seen(tmp_path):
    guide = tmp_path / "wrong.md"
    guide.write_text("# Wrong\n\n```python\nx = 1\n```\n\n```text\nnot code\n```\n\n```python\nx + missing\n```\n")
    with pytest.raises(NameError, match="missing") as error:
        run(guide)
    assert error.traceback[-1].lineno == 11
    guide.write_text("```python\nx = 1\n```\n")
    assert run(guide)["x"] == 1
