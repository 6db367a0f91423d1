"""Tokens that walk over Ray actors, beside the same walk in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _token_process import NODES, ring_with_chord, values
from test_token_processes import counts_of, in_one_process, paths_of

from kullback.core.errors import ConfigError, MissingExtra
from kullback.optim.srrw import SRRW
from kullback.optim.token_actors import walk_actors


def walked(folder, actors, **options):
    """What a walk found, or how it failed; in a process of its own, for Ray leaves threads and sockets behind."""
    pytest.importorskip("ray")
    script, words = Path(__file__).with_name("_token_actors.py"), json.dumps(options)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(actors), words],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    if (folder / "failed").exists():
        return (folder / "failed").read_text()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_actors_walk_as_one_process_does(tmp_path):
    steps, starts, options = 60, [0, 5, 5], {"alpha": 5.0, "a": 0.8, "seed": 3, "base": "adam"}
    found = walked(tmp_path, 3, starts=starts, steps=steps, **options)
    paths, ends, histories = in_one_process(steps, starts, **options)
    assert paths_of([found], 3, steps) == paths
    torch.testing.assert_close(torch.tensor(found["theta"], dtype=torch.float64), ends, rtol=0, atol=1e-12)
    for token in range(3):
        torch.testing.assert_close(counts_of([found], token), histories[token], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_tokens_that_share_their_counts(tmp_path):
    steps, options = 150, {"alpha": 10.0, "a": 1.0, "seed": 1, "b": 1.0}
    found = walked(tmp_path, 2, starts=[0, 1, 2], steps=steps, shared=True, **options)
    visits = torch.tensor(paths_of([found], 3, steps)).flatten().bincount(minlength=NODES).double()
    assert set(found["log_counts"]) == {"0"}
    torch.testing.assert_close(counts_of([found], 0), (visits + 1.0 / NODES) / (visits.sum() + 1.0))
    assert (visits / visits.sum() - 1 / NODES).abs().max() < 0.02  # a plain walk is off by 0.05 and more
    assert (torch.tensor(found["theta"]).mean(0) - values().mean(0)).abs().max() < 0.05


@pytest.mark.slow
def test_a_broken_gradient_and_a_killed_actor_end_the_walk(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "killed").mkdir()
    said = walked(tmp_path / "broken", 2, starts=[0], steps=500, alpha=1.0, a=0.8, broken=2)
    assert said.startswith("DataError: the gradient at node 2")
    said = walked(tmp_path / "killed", 2, starts=[0], steps=500, alpha=1.0, a=0.8, killed=3)
    assert said.startswith("KullbackError: an actor of the walk is gone")


def test_what_is_refused(monkeypatch):
    call = lambda **options: walk_actors(  # noqa: E731
        SRRW(ring_with_chord(), 1.0), lambda owner: lambda theta, node: theta, torch.ones(3),
        **{"steps": 5, "owners": [0] * NODES, "starts": [0], **options},
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))  # nothing of it is touched before all is checked
    with pytest.raises(ConfigError, match="starts"):
        call(starts=[])
    with pytest.raises(ConfigError, match="base is one of"):
        call(base="lion")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match="ray"):
        call()
