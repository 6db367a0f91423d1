"""The README's table: what stands in it, and that it is noticed when it is stale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kullback.core.cards import load_paper, papers
from kullback.core.errors import DataError
from kullback.papers import table as module
from kullback.papers.table import main, rewrite, stale, table

sys.path.insert(0, str(Path(__file__).parent))
from _cards import CLAIM, write_paper

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text("# title\n\n<!-- papers -->\nold\n<!-- /papers -->\n\nthe rest, with a \\1 in it\n")
    return path


def test_the_readme_is_not_stale():
    assert not stale(README), "run `python -m kullback.papers.table README.md`"


def test_the_block_alone_is_rewritten(readme):
    assert stale(readme)
    assert rewrite(readme)
    assert not stale(readme)
    assert not rewrite(readme)
    text = readme.read_text()
    assert text.startswith("# title\n\n<!-- papers -->\nOf ")
    assert text.endswith("|\n<!-- /papers -->\n\nthe rest, with a \\1 in it\n")
    assert "old" not in text.split("\n")


def test_one_changed_cell_is_stale(readme):
    rewrite(readme)
    readme.write_text(readme.read_text().replace("| 5/5 |", "| 4/5 |"))
    assert stale(readme)


def test_a_row_for_each_paper():
    lines = [line for line in table().split("\n") if line.startswith("| ")]
    assert len(lines) == len(papers()) + 1
    assert lines[1].startswith("| 1 | [sinkd](https://arxiv.org/abs/2402.17110) | distill | Adds to distillation")
    assert lines[1].endswith(" | 5/5 |")
    assert all(line.count(" | ") == 4 for line in lines[1:])


def test_the_words_of_a_row(tmp_path):
    other = {**CLAIM, "key": "other"}
    summary = "Takes p | q, e.g. of one, to 1.5 bits. Use it\nthere."
    write_paper(tmp_path, "made_up", summary=summary, claims=[CLAIM, other])
    write_paper(tmp_path, "planned", number=71, status="planned", implements=[])
    among = [load_paper(slug, tmp_path) for slug in ("made_up", "planned")]
    lines = table(among, tmp_path).split("\n")
    start = "| 70 | [made-up](https://arxiv.org/abs/2401.00001) | distill | Takes p \\| q, e.g. of one, to 1.5 bits |"
    assert lines[0].startswith("Of 2 methods 1 can be used now")
    assert lines[4] == f"{start} not run |"
    assert lines[5].endswith("| planned |")
    verdicts = [("gains", "met"), ("other", "not met"), ("of another card", "met")]
    claims = [{"key": key, "value": 1, "spread": 0, "verdict": verdict} for key, verdict in verdicts]
    (tmp_path / "made_up.json").write_text(json.dumps({"claims": claims}))
    assert table(among, tmp_path).split("\n")[4] == f"{start} 1/2 |"


@pytest.mark.parametrize(
    "text", ["nothing", "<!-- papers -->", "<!-- /papers --><!-- papers -->", "<!-- papers --><!-- /papers -->" * 2]
)
def test_a_file_without_a_place_is_refused_and_left(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    for function in (stale, rewrite):
        with pytest.raises(DataError, match="no place for the table"):
            function(path)
    assert path.read_text() == text


def test_the_command(readme, tmp_path, capsys):
    assert main([str(readme)]) == 0
    assert not stale(readme)
    assert main([str(tmp_path / "missing.md")]) == 2
    assert main([]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == err.count("\n") == 2


def test_it_imports_no_torch(readme):
    code = f"import sys; from {module.__name__} import main; main({[str(readme)]!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
