"""Groups for trl's trainer by difficulty: layout, proportions, resumption, recorded rewards, and trl itself."""

import asyncio
import math
from functools import partial

import pytest
import torch

from kullback.align.difficulty import DifficultyFilter, PassRateTracker
from kullback.align.difficulty_trl import GroupSampler, recorded_reward, sample_by_difficulty
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream


def known(rates, answers=400):
    tracker = PassRateTracker(len(rates))
    tracker.update(range(len(rates)), [rate * answers for rate in rates], answers)
    return tracker


def sampler(tracker=None, **options):
    given = {"group": 4, "prompts": 3, "generator": stream(3)} | options
    return GroupSampler(tracker or PassRateTracker(10), **given)


def test_the_layout_is_that_of_the_trainer():
    made = sampler(repeats=2)
    numbers = list(made)
    assert len(numbers) == len(made) == 3 * 3 * 4 * 2  # three batches: the tenth prompt fits in none
    for start in range(0, len(numbers), 24):
        first, again = numbers[start : start + 12], numbers[start + 12 : start + 24]
        assert first == again
        assert first == [prompt for prompt in first[::4] for _ in range(4)]
        assert len(set(first)) == 3
    assert list(made) != numbers, "a pass of its own"
    assert list(sampler(repeats=2)) == numbers


def test_the_layout_against_trl():
    utils = pytest.importorskip("trl.trainer.utils")
    theirs = utils.RepeatSampler(range(10), mini_repeat_count=4, batch_size=3, repeat_count=2, seed=0)
    ours = sampler(repeats=2)
    assert len(ours) == len(theirs)

    def places(numbers):  # where a number is met first, which tells the layout whatever was drawn
        return [batch.index(x) for at in range(0, 72, 24) for batch in [numbers[at : at + 24]] for x in batch]

    assert places(list(ours)) == places(list(theirs))


def drawn_shares(made, draws=6000):
    made.batches = draws
    counts = torch.bincount(torch.tensor(list(made)[:: made.group]), minlength=len(made.tracker.solved))
    return counts / counts.sum()


def test_draws_are_in_proportion_to_the_predicted_acceptance():
    tracker = known([0.0, 0.1, 0.3, 0.5, 0.85, 1.0])
    made = sampler(tracker, prompts=1, group=8, floor=0.05)
    likely = tracker.acceptance(8, keep=DifficultyFilter())
    wanted = (likely / likely.max()).clamp(min=0.05)
    wanted = wanted / wanted.sum()
    found = drawn_shares(made)
    assert (found - wanted).abs().max() < 4 * math.sqrt(0.25 / 6000)
    uniform = torch.full((6,), 1 / 6)
    assert (found - uniform).abs().max() > 0.1, "listed wrong: all prompts alike"
    assert (found - tracker.predict()[0] / tracker.predict()[0].sum()).abs().max() > 0.1, "listed wrong: by pass rate"


def test_several_prompts_a_batch_are_drawn_one_after_the_other_from_those_left():
    tracker = known([0.0, 0.5, 0.5])
    made = sampler(tracker, prompts=2, group=8, floor=0.1)
    a, b = 0.1 / 2.1, 1 / 2.1  # chances 0.1, 1, 1
    first_two = a + 2 * b * 0.1 / 1.1  # the hopeless prompt as first, or second
    assert drawn_shares(made)[0].item() == pytest.approx(first_two / 2, abs=4 * math.sqrt(0.05 / 6000))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_prompts_all_known_as_hopeless_are_drawn_alike(rate):
    made = sampler(known([rate] * 6, answers=10**9), prompts=1, group=8)
    assert made.chances().tolist() == pytest.approx([1.0] * 6, rel=1e-6)
    assert (drawn_shares(made) - 1 / 6).abs().max() < 0.03
    mixed = sampler(known([rate] * 5 + [0.5], answers=10**9), prompts=1, group=8)
    assert mixed.chances().tolist() == pytest.approx([0.1] * 5 + [1.0]), "seen again, at the floor"


def test_nothing_can_be_kept():
    keep = DifficultyFilter(low=0.26, high=0.49)  # no pass rate of four answers lies there
    made = sampler(keep=keep)
    assert made.chances().tolist() == [0.1] * 10
    assert len(list(made)) == len(made)


def test_results_count_from_the_next_batch_on():
    made = sampler(PassRateTracker(40), prompts=4, group=4, batches=50)
    numbers, seen = iter(made), []
    for _ in range(50):
        batch = [next(numbers) for _ in range(16)][::4]
        seen += batch
        made.tracker.update(batch, [2 * 100 if prompt < 4 else 0 for prompt in batch], 2 * 200)
    late = seen[-80:]
    assert sum(prompt < 4 for prompt in late) / len(late) > 0.35, "4 of 40 prompts are those worth drawing"


def stepped(made, numbers, batches):
    """What each batch is, its results told; rates differ by prompt."""
    found = []
    for _ in range(batches):
        batch = [next(numbers) for _ in range(12)]
        made.tracker.update(sorted(set(batch)), [prompt % 5 for prompt in sorted(set(batch))], 4)
        found.append(batch)
    return found


@pytest.mark.parametrize("ahead", [0, 5])
def test_resumption_goes_on_as_if_nothing_had_been(ahead):
    whole = sampler(batches=9)
    numbers = iter(whole)
    expected = stepped(whole, numbers, 4)
    fetched = [next(numbers) for _ in range(ahead)]  # of a batch that the trainer has asked for and not yet had
    state = whole.state_dict()
    rest = fetched + [next(numbers) for _ in range(12 - ahead)]
    whole.tracker.update(sorted(set(rest)), [prompt % 5 for prompt in sorted(set(rest))], 4)
    expected += [rest, *stepped(whole, numbers, 4)]

    again = sampler(batches=9, generator=stream(99))
    again.load_state_dict(state)
    again.set_epoch(0)
    numbers = iter(again)
    assert [[next(numbers) for _ in range(12)] for _ in range(4)] == expected[:4], "which a trainer skips"
    assert stepped(again, numbers, 5) == expected[4:]
    assert next(numbers, None) is None
    assert list(again) == list(whole), "the next pass too"
    unlike = sampler(batches=9, generator=stream(99))
    unlike.load_state_dict({**state, "generator": stream(98).get_state()})
    assert stepped(unlike, iter(unlike), 9)[5:] != expected[5:], "listed wrong: the generator left as it was"


def test_resumption_after_a_whole_pass_begins_a_new_one():
    made = sampler()
    first = list(made)
    state = made.state_dict()
    second = list(made)
    assert second != first
    for epoch in (None, 1):
        again = sampler(generator=stream(99))
        again.load_state_dict(state)
        if epoch is not None:
            again.set_epoch(epoch)
        assert list(again) == second
    again.load_state_dict(state)
    again.set_epoch(0)
    assert list(again) == first, "the trainer has not had all of it"


def equal_four(completions, **columns):
    return [1.0 if text == "4" else None if text == "?" else 0.0 for text in completions]


async def late_four(completions, **columns):
    return equal_four(completions)


class Four:
    def __call__(self, completions, **columns):
        return equal_four(completions)


@pytest.mark.parametrize("reward", [equal_four, late_four, Four(), partial(equal_four), partial(late_four)])
def test_recorded_rewards_are_the_reward_and_tell_the_tracker(reward):
    tracker = PassRateTracker(5)
    told = recorded_reward(reward, tracker)
    assert told.__name__ in ("equal_four", "late_four", "Four")
    given = {"prompts": ["p"] * 8, "completions": list("4414?4?4"), "prompt_number": [3, 0, 3, 3, 1, 1, 2, None]}
    found = told(**given)
    found = asyncio.run(found) if asyncio.iscoroutine(found) else found
    assert found == equal_four(given["completions"])
    assert tracker.solved.tolist() == [1, 1, 0, 2, 0]
    assert tracker.failed.tolist() == [0, 0, 0, 1, 0]


def test_graded_rewards():
    tracker = PassRateTracker(2)

    def graded(prompts, **columns):
        return torch.tensor([3.0, -1.0, 2.0])

    recorded_reward(graded, tracker, correct=2.0)(prompts="abc", prompt_number=[1, 1, 1])
    assert tracker.solved.tolist() == [0, 1]
    recorded_reward(lambda **columns: [0.25, 0.5], tracker)(prompt_number=[0, 0])
    assert tracker.solved.tolist() == [0.75, 1]
    with pytest.raises(DataError, match="got the reward 3: set `correct`"):
        recorded_reward(graded, tracker)(prompts="abc", prompt_number=[1, 1, 1])
    assert tracker.solved.tolist() == [0.75, 1], "nothing of a batch that is wrong"


def test_processes_are_told_the_results_of_all(monkeypatch):
    others = [(1, 1.0), (2, 1.0)]  # the rest of a group that began here, and a group of another process

    def gather(parts, pairs):
        parts[:] = [pairs, others]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    tracker = PassRateTracker(3)
    recorded_reward(equal_four, tracker)(prompts=["p"] * 2, completions=["4", "5"], prompt_number=[0, 1])
    assert (tracker.solved.tolist(), tracker.failed.tolist()) == ([1, 1, 1], [0, 1, 0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": 1}, "a group has 2 answers or more"),
        ({"repeats": 0}, "repeats and batches are 1 or more"),
        ({"batches": 0}, "repeats and batches are 1 or more"),
        ({"prompts": 11}, "from 1 to all 10 prompts, got 11"),
        ({"prompts": 0}, "from 1 to all 10 prompts, got 0"),
        ({"floor": 0.0}, "floor is a share above 0"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words):
        sampler(**options)


def test_bad_input_is_told_in_a_sentence():
    tracker = PassRateTracker(3)
    told = recorded_reward(equal_four, tracker)
    with pytest.raises(DataError, match="no column 'prompt_number': number its prompts"):
        told(prompts=["p"], completions=["4"])
    for wrong in (3, -1):
        with pytest.raises(DataError, match=f"has prompt {wrong} and the tracker 3 prompts"):
            told(prompts=["p"], completions=["4"], prompt_number=[wrong])
    for wrong in ("a model's name", torch.nn.Linear(1, 1), Four):
        with pytest.raises(ConfigError, match="is a function of prompts and completions"):
            recorded_reward(wrong, tracker)
    with pytest.raises(ConfigError, match="as trl.GRPOTrainer, is needed, got int"):
        sample_by_difficulty(3, tracker)
    state = sampler(batches=2).state_dict()
    with pytest.raises(ShapeError, match="of 10 prompts and this tracker of 12"):
        sampler(PassRateTracker(12)).load_state_dict(state)
    made = sampler()
    list(made)
    with pytest.raises(DataError, match="not of 2 batches of 3 prompts"):
        sampler(batches=2).load_state_dict(made.state_dict())
