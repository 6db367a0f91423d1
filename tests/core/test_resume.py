"""A run that is killed and resumed ends in the same bits as one that was not, and repeats only the last steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kullback.core.checkpoint import load_state
from kullback.core.rng import stream_seed

STEPS, EVERY = 30, 4

TRAINING = """
import os, signal, sys
from pathlib import Path
import torch
from kullback.core.checkpoint import load_state, save_state
from kullback.core.rng import generator
from kullback.core.runs import Run

STEPS, EVERY = 30, 4
path, kill_at = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
run = Run.start(path, {"steps": STEPS, "every": EVERY}, kind="tiny", resume=path.exists())
noise, data = generator(0, "dropout"), generator(0, "data")
weights = torch.zeros(16, 16).requires_grad_()
optimiser = torch.optim.AdamW([weights], lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
first, latest = 0, run.latest_checkpoint()
if latest is not None:
    state = load_state(latest, "state")
    first = state["step"]
    with torch.no_grad():
        weights.copy_(state["weights"])
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    noise.set_state(state["noise"])
    data.set_state(state["data"])
for step in range(first, STEPS):
    rows = torch.randn(8, 16, generator=data)
    kept = torch.rand(8, 16, generator=noise) > 0.2
    loss = ((rows * kept) @ weights - rows.sin()).pow(2).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    schedule.step()
    run.event("step", step=step, loss=loss.item())
    if step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if (step + 1) % EVERY == 0 or step + 1 == STEPS:
        with run.checkpoint(step + 1) as place:
            save_state(place, "state", {
                "step": step + 1, "weights": weights, "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(), "noise": noise.get_state(), "data": data.get_state(),
            })
            if step == -kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        run.prune_checkpoints(2)
run.report({"loss": loss.item()})
"""


def train(path: Path, kill_at: int = 10_000) -> int:
    return subprocess.run([sys.executable, "-c", TRAINING, str(path), str(kill_at)], check=False).returncode


def final(path: Path) -> torch.Tensor:
    weights: torch.Tensor = load_state(path / "ckpt" / f"step-{STEPS:08d}", "state")["weights"]
    return weights


def losses(path: Path) -> list[tuple[int, float]]:
    events = map(json.loads, (path / "events.jsonl").read_text().splitlines())
    return [(event["step"], event["loss"]) for event in events if event["kind"] == "step"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("straight") / "run"
    assert train(path) == 0
    return path


def test_killed_and_resumed_equals_straight_to_the_bit(straight, tmp_path):
    """Killed between checkpoints at a random step, then in the middle of writing one, then let go."""
    path = tmp_path / "run"
    kill_at = EVERY + stream_seed(0, "kill") % (STEPS - 3 * EVERY)
    assert train(path, kill_at) == -9
    writing = 1 - (kill_at // EVERY + 2) * EVERY
    assert train(path, writing) == -9
    assert train(path) == 0
    assert torch.equal(final(path), final(straight))
    assert (path / "report.json").read_text() == (straight / "report.json").read_text()
    # What was done twice came out the same, and it was no more than the steps since a checkpoint.
    expected, found = dict(losses(straight)), losses(path)
    assert all(expected[step] == loss for step, loss in found)
    begun = (kill_at // EVERY) * EVERY
    again = (-writing // EVERY) * EVERY
    assert [step for step, _ in found] == [*range(kill_at + 1), *range(begun, -writing + 1), *range(again, STEPS)]
    assert sorted(entry.name for entry in (path / "ckpt").iterdir()) == [f"step-{28:08d}", f"step-{30:08d}"]


@pytest.mark.parametrize("forgotten", ["noise.set", "data.set", "optimiser.load", "schedule.load"])
def test_the_comparison_notices_what_is_not_restored(straight, tmp_path, monkeypatch, forgotten):
    """The same program less one line, here in this process."""
    path = tmp_path / "run"
    program = "\n".join(line for line in TRAINING.splitlines() if f"{forgotten}_state" not in line)
    monkeypatch.setattr("os.kill", lambda *_: sys.exit("killed"))
    monkeypatch.setattr(sys, "argv", ["", str(path), "9"])
    with pytest.raises(SystemExit):
        exec(program, {})
    sys.argv[2] = "10000"
    exec(program, {})
    assert [step for step, _ in losses(path)] == [*range(10), *range(8, STEPS)]
    assert not torch.equal(final(path), final(straight))
