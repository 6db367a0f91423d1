"""The rules of the house, read off the syntax trees of src: who imports whom, sizes, names, and what no module does.

A rule takes a `Source` and returns what is wrong with it, a sentence each; below, each is also shown to bite.
"""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "kullback"
OPTIONS = ROOT / "tests" / "cli" / "options.txt"

# Each may import those below it; figures and testing are single modules.
LAYERS = (
    ("core",),
    ("data", "figures"),
    ("divergences",),
    ("models", "compress", "optim", "sample", "stream", "recommend", "programs"),
    ("distill", "align", "decode", "diagnose"),
    ("jobs", "papers", "testing"),
    ("cli", "web"),
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
# Siblings that may import one another all the same: text made on policy, and KDRL, which joins two rooms.
EXCEPTIONS = {("distill", "decode"), ("align", "decode"), ("align.kdrl", "distill")}
EXCEPTIONS |= {("papers.rooms.align", "jobs"), ("papers.rooms.distill", "jobs")}  # they compare what the jobs do
EXCEPTIONS |= {("papers.sums", "jobs")}  # the job, run for the papers' panels with a language model
SHARED = ("comparison", "sums")  # what papers may import of papers
# These save and restore the state of the global generators, which transformers.Trainer draws from.
RESTORES_RANDOM_STATE = {"jobs._checkpoints"}

FILE_LINES, FUNCTION_LINES, HELP_SECONDS = 500, 60, 0.3

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.save", "torch.load"}
STATE = {"random.getstate", "random.setstate", "numpy.random.get_state", "numpy.random.set_state"}
STATE |= {f"torch.{place}{verb}_rng_state" for place in ("", "random.", "cuda.") for verb in ("get", "set")}
STATE |= {f"torch.cuda.{verb}_rng_state_all" for verb in ("get", "set")}
SEEDS = {"torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.random.seed"}
SEEDS |= {f"torch.cuda.{name}" for name in ("manual_seed", "manual_seed_all", "seed", "seed_all")}
SEEDS |= {"transformers.set_seed", "transformers.enable_full_determinism", "accelerate.utils.set_seed"}
OBJECTS = {f"numpy.random.{name}" for name in ("Generator", "BitGenerator", "PCG64", "Philox", "SeedSequence")}
OBJECTS |= {"numpy.random.default_rng", "random.Random", "random.SystemRandom"}
# Without a generator these draw from torch's global one.
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
DRAWS_LIKE = {"rand_like", "randn_like", "randint_like"}
DRAWING_METHODS = {"uniform_", "normal_", "bernoulli_", "exponential_", "random_", "geometric_", "cauchy_"}
DRAWING_METHODS |= {"log_normal_", "multinomial", "bernoulli"}


@dataclass(frozen=True)
class Source:
    """A module: its dotted name below kullback ("" for kullback itself), its text, whether it is a package's."""

    name: str
    text: str
    package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """What the names that are imported anywhere in it stand for."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for entry in node.names:
                    first = entry.name.split(".")[0]
                    found[entry.asname or first] = entry.name if entry.asname else first
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found |= {entry.asname or entry.name: f"{node.module}.{entry.name}" for entry in node.names}
        return found

    def dotted(self, node: ast.AST) -> str:
        """The full name that an expression such as np.random.rand stands for, "" for any other."""
        if isinstance(node, ast.Attribute):
            inner = self.dotted(node.value)
            return f"{inner}.{node.attr}" if inner else ""
        return self.aliases.get(node.id, "") if isinstance(node, ast.Name) else ""

    def imports(self) -> Iterator[tuple[int, str]]:
        """The line and full name of all that it imports, wherever it does."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, entry.name) for entry in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = ["kullback", *filter(None, self.name.split("."))]
                    keep = len(parts) - node.level + (1 if self.package else 0)
                    base = ".".join([*parts[:keep], *filter(None, [node.module])])
                yield from ((node.lineno, f"{base}.{entry.name}") for entry in node.names)


def sources() -> Iterator[Source]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        package = parts[-1] == "__init__"
        yield Source(".".join(parts[:-1] if package else parts), path.read_text(encoding="utf-8"), package)


# --- the rules ---


def import_direction(source: Source) -> list[str]:
    room, *inner = source.name.split(".")
    if room not in RANK:
        return []
    found = []
    for line, target in source.imports():
        parts = target.split(".")
        if parts[0] != "kullback" or len(parts) < 2 or parts[1] not in RANK:
            continue
        other = parts[1]
        if other != room and RANK[other] >= RANK[room]:
            if not {(room, other), (source.name, other)} & EXCEPTIONS:
                found.append(f"line {line}: {room} imports {other}")
        elif room == other == "papers" and len(inner) > 1 and parts[2:] and parts[2] not in (inner[0], *SHARED):
            found.append(f"line {line}: the paper {inner[0]} imports {parts[2]}")
    return found


def file_size(source: Source) -> list[str]:
    lines = source.text.count("\n")
    return [f"{lines} lines, at most {FILE_LINES}"] if lines > FILE_LINES else []


def function_size(source: Source) -> list[str]:
    functions = [node for node in ast.walk(source.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    sizes = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions]
    return [f"{name} has {size} lines, at most {FUNCTION_LINES}" for name, size in sizes if size > FUNCTION_LINES]


def bound(body: list[ast.stmt]) -> Iterator[str]:
    """The names that statements at the top of a module bind."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (entry.asname or entry.name.split(".")[0] for entry in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name for target in targets for name in ast.walk(target)]
            yield from (name.id for name in names if isinstance(name, ast.Name))
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For)):
            yield from bound([*node.body, *getattr(node, "orelse", [])])
            for handler in getattr(node, "handlers", []):
                yield from bound(handler.body)


def public_names(source: Source) -> list[str]:
    names = set(bound(source.tree.body))
    own = {node.name for node in source.tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    if "__all__" not in names:
        public = sorted(name for name in own if not name.startswith("_"))
        return [f"{public[0]} is public but there is no __all__"] if public else []
    listed = []
    for node in source.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            entries = getattr(node.value, "elts", None)  # type: ignore[attr-defined]
            if entries is None:
                return ["__all__ is not a list of names"]
            listed = [entry.value for entry in entries if isinstance(entry, ast.Constant)]
    folder = PACKAGE.joinpath(*source.name.split("."))
    inside = {path.stem for path in folder.glob("*")} if source.package else set()
    return [f"__all__ names {name}, which is not there" for name in listed if name not in names | inside]


def no_assert(source: Source) -> list[str]:
    return [f"line {node.lineno}: assert" for node in ast.walk(source.tree) if isinstance(node, ast.Assert)]


def calls(source: Source) -> Iterator[ast.Call]:
    return (node for node in ast.walk(source.tree) if isinstance(node, ast.Call))


def no_print(source: Source) -> list[str]:
    if source.name.split(".")[0] == "cli":
        return []
    prints = [call for call in calls(source) if isinstance(call.func, ast.Name) and call.func.id == "print"]
    return [f"line {call.lineno}: print" for call in prints]


def no_pickle(source: Source) -> list[str]:
    found = [f"line {line}: {name}" for line, name in source.imports() if PICKLES & {name, name.split(".")[0]}]
    used = [node for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
    return found + [f"line {node.lineno}: {source.dotted(node)}" for node in used if source.dotted(node) in PICKLES]


def global_state(source: Source) -> list[str]:
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            name = source.dotted(node)
            if name in STATE and source.name in RESTORES_RANDOM_STATE:
                continue
            of_module = name.startswith(("numpy.random.", "random.")) and name not in OBJECTS
            if name in STATE | SEEDS or (of_module and not name.startswith("numpy.random.bit_generator")):
                found.append(f"line {node.lineno}: {name}")
    for call in calls(source):
        if any(keyword.arg in ("generator", None) for keyword in call.keywords):
            continue
        name, method = source.dotted(call.func), getattr(call.func, "attr", "")
        if name.removeprefix("torch.") in DRAWS | DRAWS_LIKE and name.startswith("torch."):
            found.append(f"line {call.lineno}: {name} without a generator")
        elif method in DRAWING_METHODS and not name.startswith("torch.distributions"):
            found.append(f"line {call.lineno}: .{method} without a generator")
    return found


RULES: list[Callable[[Source], list[str]]] = [
    import_direction, file_size, function_size, public_names, no_assert, no_print, no_pickle, global_state,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    found = [f"{source.name or 'kullback'}: {problem}" for source in sources() for problem in rule(source)]
    assert not found, "\n".join(found)


def long_function(lines: int) -> str:
    return "def long():\n" + "    pass\n" * (lines - 1)


@pytest.mark.parametrize(
    ("rule", "name", "wrong", "right"),
    [
        (import_direction, "core.x", "from kullback.data import cache", "import torch\nfrom kullback.core import rng"),
        (import_direction, "divergences.x", "def f():\n    import kullback.models.small", "import kullback"),
        (import_direction, "distill.x", "from kullback.align.dpo import loss", "from kullback.decode import greedy"),
        (import_direction, "align.x", "from kullback.distill import sinkd", "from kullback.decode import greedy"),
        (import_direction, "models.x", "from kullback.optim import mkor", "from kullback.divergences import kl"),
        (import_direction, "decode.x", "from kullback.distill import sinkd", "from kullback.compress import codec"),
        (import_direction, "jobs.x", "from kullback import papers", "from kullback import distill"),
        (import_direction, "distill.x", "from ..cli import main", "from .sinkd import sinkd_loss"),
        (import_direction, "papers.one.reproduce", "from kullback.papers.two import x", "from .part import x"),
        (import_direction, "papers.one.reproduce", "from kullback.jobs import x", "from kullback.papers.sums import x"),
        (import_direction, "papers.sums", "from kullback.cli import main", "from kullback.jobs import align"),
        (import_direction, "cli.x", "import kullback.web.app", "from kullback.papers import runner"),
        (file_size, "x", "\n" * 501, "\n" * 500),
        (function_size, "x", long_function(61), long_function(60)),
        (function_size, "x", "class A:\n    async " + long_function(61).replace("\n", "\n    "), ""),
        (public_names, "x", '__all__ = ["gone"]', '__all__ = ["here"]\ntry:\n    here = 1\nexcept OSError:\n    pass'),
        (public_names, "x", "def public(): ...", "def _private(): ...\nCONSTANT = 1"),
        (public_names, "x", "__all__ = list(things)", "from a import things\n__all__ = ['things']"),
        (no_assert, "x", "def f(x):\n    assert x", "def f(x):\n    if not x:\n        raise ValueError"),
        (no_print, "core.x", "print(1)", "class A:\n    def f(self):\n        self.print(1)"),
        (no_pickle, "x", "import pickle", "import safetensors"),
        (no_pickle, "x", "from pickle import dumps", "import json"),
        (no_pickle, "x", "import torch\ntorch.save(1, 2)", "import torch\ntorch.saved = 1"),
        (no_pickle, "x", "from torch import load", "from json import load"),
        (global_state, "x", "import torch\ntorch.manual_seed(0)", "import torch\ntorch.Generator().manual_seed(0)"),
        (global_state, "x", "from torch import manual_seed\nmanual_seed(0)", "manual_seed = 1"),
        (global_state, "x", "import numpy as np\nnp.random.seed(0)", "import numpy as np\nnp.random.default_rng(0)"),
        (global_state, "x", "from numpy.random import normal\nnormal()", "import numpy.random"),
        (global_state, "x", "from numpy import random\nrandom.rand()", "from other import random\nrandom.rand()"),
        (global_state, "x", "import random\nrandom.shuffle(x)", "import random\nrandom.Random(0).shuffle(x)"),
        (global_state, "x", "import torch\ntorch.get_rng_state()", "import torch\ntorch.rand(3, generator=g)"),
        (global_state, "x", "import torch as t\nt.randperm(3)", "import torch as t\nt.randperm(3, **options)"),
        (global_state, "x", "import torch\ntorch.randn_like(x)", "x.randn_like(y)"),
        (global_state, "x", "weight.normal_(0, 1)", "weight.normal_(0, 1, generator=g)"),
    ],
)
def test_the_rule_bites(rule, name, wrong, right):
    assert rule(Source(name, wrong)), wrong
    assert rule(Source(name, right)) == [], right


def test_where_a_rule_has_an_exception():
    joins = Source("align.kdrl", "from kullback.distill import sinkd")
    restores = "import random\nrandom.setstate(random.getstate())"
    assert import_direction(joins) == []
    assert global_state(Source("jobs._checkpoints", restores)) == []
    assert global_state(Source("jobs._checkpoints", "import random\nrandom.seed(1)"))
    assert global_state(Source("jobs.other", restores))
    assert no_print(Source("cli.x", "print(1)")) == []


def test_every_room_has_its_place():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {path.stem for path in PACKAGE.glob("*.py")}
    assert rooms - {"__init__", "__main__"} <= set(RANK)


# --- what is loaded, and the command line ---


def test_cards_core_and_help_import_no_torch():
    light = [path.stem for path in (PACKAGE / "core").glob("*.py") if path.stem in LIGHT]
    assert sorted(light) == sorted(LIGHT)
    code = f"""
import sys
from importlib import import_module
for name in {light}:
    import_module("kullback.core." + name)
from kullback import cli
from kullback.core.cards import papers
papers()
cli.execute(["--help"])
heavy = [name for name in ("torch", "transformers", "matplotlib", "scipy") if name in sys.modules]
sys.exit(", ".join(heavy) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


LIGHT = ("cards", "config", "engine", "environment", "errors", "files", "index", "runs", "types")


def test_help_is_quick():
    """In processor time, the best of five: other work may go on beside the tests."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "kullback", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < HELP_SECONDS


def command_line() -> Iterator[str]:
    """A line for each command, with its arguments and options."""
    import typer

    from kullback import cli

    def walk(words: str, command) -> Iterator[str]:
        for parameter in command.params:
            names = " ".join([*parameter.opts, *parameter.secondary_opts])
            yield f"{words}: {names}" if parameter.param_type_name == "option" else f"{words}: <{parameter.name}>"
        for name, inner in sorted(getattr(command, "commands", {}).items()):
            yield f"{words} {name}"
            yield from walk(f"{words} {name}", inner)

    yield from walk("kullback", typer.main.get_command(cli.application()))


def test_the_options_of_the_command_line_are_those_that_were_agreed():
    frozen = [line for line in OPTIONS.read_text().splitlines() if not line.startswith("#")]
    assert list(command_line()) == frozen, "on purpose? then: python tests/test_structure.py"


if __name__ == "__main__":
    head = ["# The command line as it was agreed: what is renamed or removed here breaks somebody's script.", ""]
    head[1] = "# After a change on purpose: python tests/test_structure.py"
    OPTIONS.write_text("\n".join([*head, *command_line()]) + "\n")
