"""Tokens that walk over real processes, beside the same walk in one process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _token_process import DIMENSION, NODES, ring_with_chord, values

from kullback.core.errors import ConfigError
from kullback.optim.srrw import SRRW, start_walk, walk_by_steps
from kullback.optim.srrw_simulation import step_sizes
from kullback.optim.token_processes import walk_tokens
from kullback.optim.token_walk import token_uniform

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def walked(folder, processes, **options):
    """The results of all processes, or None for those that failed."""
    script, words = Path(__file__).with_name("_token_process.py"), json.dumps(options)
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(processes), str(folder), words],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()
    found = [folder / f"result-{rank}.json" for rank in range(processes)]
    results = [json.loads(path.read_text()) if path.exists() else None for path in found]
    return results, outputs, [child.returncode for child in children]


def in_one_process(steps, starts, *, alpha, a, seed, base="sgd", momentum=0.9, b=0.9):
    """Paths [M, steps], theta [M, d] and histories [M, N] by the naive twin and torch's optimizers."""
    rule, paths, ends, histories = SRRW(ring_with_chord(), alpha, a), [], [], []
    for token, start in enumerate(starts):
        uniforms = torch.tensor([[token_uniform(seed, token, visit + 1) for visit in range(steps)]])
        state, nodes = walk_by_steps(rule, start_walk(rule, start=start), uniforms)
        theta = torch.ones(DIMENSION, dtype=torch.float64, requires_grad=True)
        share = momentum if base == "momentum" else 0.0
        inner = torch.optim.Adam([theta]) if base == "adam" else torch.optim.SGD([theta], momentum=share)
        for node, size in zip(nodes[0].tolist(), step_sizes(0, steps, b).tolist(), strict=True):
            inner.param_groups[0]["lr"] = size
            theta.grad = theta.detach() - values()[node]
            inner.step()
        paths.append(nodes[0].tolist())
        ends.append(theta.detach())
        histories.append(state.history[0])
    return paths, torch.stack(ends), torch.stack(histories)


def paths_of(results, tokens, steps):
    visits = sorted(tuple(visit) for result in results for visit in result["visited"])
    assert [visit[:2] for visit in visits] == [(token, k + 1) for token in range(tokens) for k in range(steps)]
    return [[node for token, _, node in visits if token == one] for one in range(tokens)]


def counts_of(results, token):
    logs = {int(node): value for result in results for node, value in result["log_counts"][str(token)].items()}
    return torch.tensor([logs[node] for node in range(NODES)], dtype=torch.float64).softmax(0)


def check_as_in_one_process(folder, processes, starts, steps, **options):
    results, outputs, codes = walked(folder, processes, starts=starts, steps=steps, **options)
    assert codes == [0] * processes, outputs
    paths, ends, histories = in_one_process(steps, starts, **options)
    assert paths_of(results, len(starts), steps) == paths
    for result in results:
        torch.testing.assert_close(torch.tensor(result["theta"], dtype=torch.float64), ends, rtol=0, atol=1e-12)
    for token in range(len(starts)):
        torch.testing.assert_close(counts_of(results, token), histories[token], rtol=0, atol=1e-12)


def test_two_processes_walk_as_one_does(tmp_path):
    check_as_in_one_process(tmp_path, 2, [0], 60, alpha=5.0, a=0.8, seed=3, base="momentum", momentum=0.5)


@pytest.mark.slow
def test_adam_goes_along_with_its_token(tmp_path):
    check_as_in_one_process(tmp_path, 2, [0, 5], 60, alpha=5.0, a=0.8, seed=3, base="adam")


@pytest.mark.slow
def test_four_processes_and_three_tokens_walk_as_one_does(tmp_path):
    check_as_in_one_process(tmp_path, 4, [0, 3, 3], 400, alpha=10.0, a=1.0, seed=5)


@pytest.mark.slow
def test_tokens_that_share_their_counts_visit_all_nodes_alike(tmp_path):
    steps, starts = 400, [0, 1, 2]
    results, outputs, codes = walked(
        tmp_path, 3, starts=starts, steps=steps, alpha=10.0, a=1.0, seed=1, shared=True, b=1.0
    )
    assert codes == [0] * 3, outputs
    visits = torch.tensor(paths_of(results, 3, steps)).flatten().bincount(minlength=NODES).double()
    assert set(results[0]["log_counts"]) == {"0"}
    expected = (visits + 1.0 / NODES) / (visits.sum() + 1.0)
    torch.testing.assert_close(counts_of(results, 0), expected, rtol=0, atol=1e-12)
    assert (visits / visits.sum() - 1 / NODES).abs().max() < 0.01  # a plain walk is off by 0.03 and more
    theta = torch.tensor(results[0]["theta"], dtype=torch.float64).mean(0)
    assert (theta - values().mean(0)).abs().max() < 0.02


def test_a_broken_gradient_ends_all_processes(tmp_path):
    _, outputs, _ = walked(tmp_path, 2, starts=[0], steps=500, alpha=1.0, a=0.8, broken=2)
    assert "gradient at node 2" in (tmp_path / "failed-0").read_text(), outputs
    assert "process 0 of the walk failed" in (tmp_path / "failed-1").read_text(), outputs


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path):
    begin = time.monotonic()
    results, outputs, codes = walked(tmp_path, 2, starts=[0], steps=5000, alpha=1.0, a=0.8, killed=3)
    assert results == [None, None]
    assert codes[1] == 9
    assert "process 1 of the walk is gone" in (tmp_path / "failed-0").read_text(), outputs
    assert time.monotonic() - begin < 100


def test_without_a_process_group_it_says_so():
    rule = SRRW(ring_with_chord(), 1.0)
    with pytest.raises(ConfigError, match="init_process_group"):
        walk_tokens(rule, lambda theta, node: theta, torch.ones(3), 5, owners=[0] * 8, starts=[0])
