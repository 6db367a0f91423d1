"""Cards: what is refused and with which sentence, how claims are judged, and how papers are found."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kullback.core import cards
from kullback.core.cards import Budget, Claim, Paper, find, load_paper, papers, resolve, verdict
from kullback.core.config import to_toml
from kullback.core.errors import ConfigError

CLAIM: dict[str, Any] = {
    "key": "closer", "paper": "It is closer by 3%.", "ours": "It is closer by 1%.", "metric": "gain", "op": ">=",
    "threshold": 1.0, "statistic": "mean", "seeds": [0, 1, 2], "threshold_from": "card", "deviation": "Small models.",
}  # fmt: skip
CARD: dict[str, Any] = {
    "number": 70, "slug": "made_up", "title": "Made Up: A Method", "arxiv": "2401.00001", "date": "2024-01",
    "authors": 2, "room": "distill", "status": "planned", "implements": [], "summary": "It does this. Use it there.",
    "scale": "One process.", "budget": {"seconds": 10, "threads": 1}, "needs": [], "claims": [CLAIM],
}  # fmt: skip


def write(folder: Path, **changed: Any) -> Path:
    """A card with changed values; None leaves a key out."""
    content = {key: value for key, value in {**CARD, **changed}.items() if value is not None}
    place = folder / "made_up"
    place.mkdir(exist_ok=True)
    (place / "card.toml").write_text(to_toml(content))
    return folder


def claim(**changed: Any) -> dict[str, Any]:
    return {key: value for key, value in {**CLAIM, **changed}.items() if value is not None}


def test_a_card_is_read(tmp_path):
    paper = load_paper("made-up", write(tmp_path))
    assert paper == load_paper("made_up", tmp_path)
    assert (paper.number, paper.name, paper.url) == (70, "made-up", "https://arxiv.org/abs/2401.00001")
    assert paper.budget == Budget(seconds=10.0, threads=1)
    assert paper.claims == (Claim(**{**CLAIM, "seeds": (0, 1, 2)}),)
    assert paper.seeds == (0, 1, 2)
    assert papers(tmp_path) == (paper,)


def test_the_seeds_of_a_card_are_those_of_all_its_claims(tmp_path):
    two = [claim(seeds=[3, 1]), claim(key="other", seeds=[0, 1])]
    assert load_paper("made_up", write(tmp_path, claims=two)).seeds == (0, 1, 3)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"autors": 2}, "unknown key autors: did you mean authors?"),
        ({"title": None}, "title is required"),
        ({"room": "kitchen"}, "room: expected"),
        ({"status": "done"}, "status: expected"),
        ({"number": "70"}, "number: expected"),
        ({"number": 0}, "positive"),
        ({"budget": {"seconds": 0}}, "positive"),
        ({"budget": {"second": 3}}, "unknown key budget.second: did you mean budget.seconds?"),
        ({"slug": "other"}, "slug is 'other', but its folder is 'made_up'"),
        ({"slug": "Made-Up"}, "lower-case"),
        ({"arxiv": "arXiv:2401.00001"}, "arxiv is like 2402.17110"),
        ({"date": "2024-13"}, "date like 2024-02"),
        ({"summary": "  "}, "summary is empty"),
        ({"claims": []}, "at least one claim"),
        ({"claims": [CLAIM, CLAIM]}, "no two with the same key"),
        ({"claims": [claim(deviation=None)]}, "claims[0].deviation is required"),
        ({"claims": [claim(deviation=" ")]}, "empty deviation"),
        ({"claims": [claim(op="=>")]}, "claims[0].op: expected"),
        ({"claims": [claim(statistic="average")]}, "claims[0].statistic: expected"),
        ({"claims": [claim(treshold=1.0)]}, "unknown key claims[0].treshold: did you mean claims[0].threshold?"),
        ({"claims": [claim(threshold=None)]}, "the claim closer has no threshold"),
        ({"claims": [claim(threshold_from="open")]}, "is open: settle which"),
        ({"claims": [claim(threshold=math.inf)]}, "needs a finite one"),
        ({"claims": [claim(seeds=[])]}, "different seeds"),
        ({"claims": [claim(seeds=[1, 1])]}, "different seeds"),
        ({"status": "ready"}, "implements is empty"),
        ({"status": "ready", "implements": ["kullback.core"]}, "no reproduce.py beside the card"),
    ],
)
def test_a_card_that_is_not_as_it_should_be_is_one_sentence(tmp_path, changed, sentence):
    with pytest.raises(ConfigError) as caught:
        load_paper("made_up", write(tmp_path, **changed))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("made_up/card.toml: ")


def test_what_is_not_toml_is_one_sentence(tmp_path):
    (write(tmp_path) / "made_up" / "card.toml").write_text("number =")
    with pytest.raises(ConfigError, match=r"made_up/card\.toml: is not TOML"):
        papers(tmp_path)


def test_an_open_claim_needs_no_threshold(tmp_path):
    folder = write(tmp_path, claims=[claim(threshold=None, threshold_from="open")])
    assert load_paper("made_up", folder).claims[0].threshold is None


def test_ready_is_taken_with_code_and_reproduction(tmp_path):
    folder = write(tmp_path, status="ready", implements=["kullback.core"])
    (folder / "made_up" / "reproduce.py").touch()
    assert load_paper("made_up", folder).status == "ready"


@pytest.mark.parametrize(
    ("slug", "near"), [("sinkdd", "sinkd"), ("sink", "sinkd"), ("zzzzzz", "see `kullback papers`")]
)
def test_an_unknown_slug_is_answered_with_the_nearest(slug, near):
    with pytest.raises(ConfigError, match=near):
        load_paper(slug)


@pytest.mark.parametrize("slug", ["", "..", "../papers/sinkd", "a/b"])
def test_a_slug_is_no_path(slug):
    with pytest.raises(ConfigError, match="no paper is called"):
        load_paper(slug)


def judged(per_seed: dict[int, float], **changed: Any) -> tuple[float, float, str]:
    return tuple(verdict(Claim(**{**CLAIM, "seeds": (0, 1, 2), **changed}), per_seed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("statistic", "op", "value", "word"),
    [
        ("mean", ">=", 2.0, "met"),
        ("median", "<", 1.0, "not met"),
        ("min", ">", 0.0, "not met"),
        ("max", ">=", 5.0, "met"),
        ("every", ">=", 0.0, "not met"),
        ("every", "<=", 5.0, "not met"),
    ],
)
def test_statistics(statistic, op, value, word):
    found = judged({0: 0.0, 1: 1.0, 2: 5.0}, statistic=statistic, op=op)
    assert found == (value, pytest.approx(math.sqrt(7.0)), word)


@pytest.mark.parametrize(
    ("op", "at", "above"),
    [
        (">=", "met", "met"),
        ("<=", "met", "not met"),
        (">", "not met", "met"),
        ("<", "not met", "not met"),
    ],
)
def test_comparisons_at_the_threshold_and_above(op, at, above):
    assert judged({0: 1.0}, op=op) == (1.0, 0.0, at)
    assert judged({0: 1.5}, op=op) == (1.5, 0.0, above)


@pytest.mark.parametrize("statistic", ["mean", "median", "min", "max", "every"])
@pytest.mark.parametrize("op", [">=", "<="])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_seed_that_is_not_a_number_meets_nothing(statistic, op, seed):
    value, spread, word = judged({0: 1.0, 1: 1.0, 2: 1.0, seed: math.nan}, statistic=statistic, op=op)
    assert (math.isnan(value), math.isnan(spread), word) == (True, True, "not met")


def test_infinite_values_are_judged():
    assert judged({0: math.inf, 1: 1.0})[2] == "met"
    assert judged({0: math.inf, 1: -math.inf})[2] == "not met"


def test_no_value_and_no_threshold():
    value, _, word = judged({})
    assert (math.isnan(value), word) == (True, "not attempted")
    assert judged({7: 3.0})[2] == "not attempted"  # a seed that the claim does not name
    assert judged({0: 3.0}, threshold=None, threshold_from="open") == (3.0, 0.0, "open")


def test_seeds_that_are_not_the_claims_are_left_out():
    assert judged({0: 1.0, 1: 1.0, 9: -100.0}) == (1.0, 0.0, "met")


def test_find_wants_every_word_and_puts_titles_first(tmp_path):
    base = load_paper("made_up", write(tmp_path))

    def paper(**changed: Any) -> Paper:
        return Paper(**{**{name: getattr(base, name) for name in Paper.__dataclass_fields__}, **changed})

    titled = paper(number=3, slug="a", title="Calibration of Trees")
    told = paper(number=1, slug="b", summary="Something about calibration and trees.")
    named = paper(number=2, slug="calibration", summary="For trees.")
    among = (told, named, titled, base)
    assert find("calibration trees", among) == (named, titled, told)
    assert [entry.number for entry in find("CALIBRATION", among)] == [2, 3, 1]
    assert find("calibration nothing-of-the-kind", among) == ()
    assert find("2401.00001 distill", among) == (told, named, titled, base)
    assert find("", among) == tuple(sorted(among, key=lambda entry: entry.number))


def test_resolve():
    assert resolve("kullback.core.cards.resolve") is resolve
    assert resolve("kullback.core.cards") is cards
    assert resolve("kullback.core.cards.Paper.seeds") is Paper.seeds
    for path, sentence in [
        ("kullback.core.cards.nothing", "kullback.core.cards has no nothing"),
        ("kullback.core.nothing.deep", "has no nothing"),
        ("no_such_package.thing", "there is no module no_such_package"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            resolve(path)


def test_resolve_does_not_hide_what_a_module_lacks(tmp_path, monkeypatch):
    (tmp_path / "lacking_module.py").write_text("import no_such_package_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        resolve("lacking_module.thing")


def test_reading_all_cards_imports_no_torch():
    code = "import sys; from kullback.core.cards import papers; papers(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
