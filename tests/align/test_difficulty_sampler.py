"""The sampler of filtered batches: what it keeps, order and workers, caps, staleness, resumption; a filtered source."""

import threading
import time
import warnings

import pytest
import torch

from kullback.align.difficulty import DifficultyFilter, PassRateTracker, difficulty_filter
from kullback.align.difficulty_sampler import FilteredSource, OnlineDifficultySampler, StarvationWarning
from kullback.align.rollouts import Rollouts, join_rollouts
from kullback.core.errors import ConfigError, DataError
from kullback.core.rng import generator as stream

RATES = torch.rand(60, generator=stream(1)) ** 2


def rollout(prompt, seed, version):
    """Eight 0/1 rewards at the prompt's rate; the group says where it came from."""
    draws = torch.rand(8, generator=torch.Generator().manual_seed(seed % 2**31))
    return (prompt, seed, version), (draws < RATES[prompt]).float()


def sampler(**options):
    given = {"batch_size": 5} | options
    return OnlineDifficultySampler(60, rollout, DifficultyFilter(), **given)


def taken(made, batches):
    with made:
        return [next(made) for _ in range(batches)]


@pytest.mark.parametrize("flight", [1, 7, 64])
def test_batches_are_full_and_of_the_difficulty_asked_for(flight):
    seen: dict[int, list[int]] = {}
    for batch in taken(sampler(max_in_flight=flight, workers=3, max_staleness=100), 12):
        assert batch.rewards.shape == (5, 8)
        assert DifficultyFilter()(batch.rewards).all()
        assert len(set(batch.prompts.tolist())) == 5
        assert batch.draws == len(batch.rates) >= 5
        assert batch.acceptance == 5 / batch.draws
        assert batch.scale == 1.0
        for prompt, (number, seed, _) in zip(batch.prompts.tolist(), batch.groups, strict=True):
            assert prompt == number
            seen.setdefault(prompt, []).append(seed)
    assert all(len(seeds) == len(set(seeds)) for seeds in seen.values()), "a rollout was handed out twice"
    assert max(len(seeds) for seeds in seen.values()) > 1, "a second pass was begun"


def test_no_prompt_twice_in_a_pass():
    asked = []

    def counted(prompt, seed, version):
        asked.append(prompt)
        return rollout(prompt, seed, version)

    with OnlineDifficultySampler(60, counted, DifficultyFilter(), batch_size=5, max_in_flight=1) as made:
        for _ in range(10):
            next(made)
    passes = [asked[start : start + 60] for start in range(0, len(asked) - 60, 60)]
    assert passes
    assert all(sorted(some) == list(range(60)) for some in passes)
    assert passes[0] != sorted(passes[0])


def equal(one, other):
    return all(
        torch.equal(a.prompts, b.prompts) and torch.equal(a.rewards, b.rewards) and a.draws == b.draws
        and torch.equal(a.versions, b.versions)
        for a, b in zip(one, other, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("tracked", [False, True])
def test_the_number_of_workers_changes_nothing(tracked):
    def slow(prompt, seed, version):
        time.sleep((seed % 7) * 2e-4)
        return rollout(prompt, seed, version)

    def made(workers, seed=0):
        tracker = PassRateTracker(60) if tracked else None
        return OnlineDifficultySampler(
            60, slow, DifficultyFilter(), batch_size=4, max_in_flight=8, workers=workers, tracker=tracker, seed=seed
        )

    first = taken(made(1), 8)
    assert equal(first, taken(made(8), 8))
    assert not equal(first, taken(made(1, seed=1), 8))


def test_as_they_come_a_slow_one_holds_up_nobody():
    release = threading.Event()

    def slow(prompt, seed, version):
        if version == 0 and prompt == first:
            release.wait(20)
        return rollout(prompt, seed, version)

    first = int(torch.randperm(60, generator=stream(0, "pass", 0))[0])
    with OnlineDifficultySampler(
        60, slow, DifficultyFilter(), batch_size=4, workers=4, max_in_flight=12, ordered=False, max_staleness=9
    ) as made:
        batches = [next(made) for _ in range(3)]
        release.set()
        assert all(first not in batch.prompts.tolist() for batch in batches)
        assert all(batch.scale == 1.0 for batch in batches)


def test_workers_run_side_by_side():
    together, most, lock = [0], [0], threading.Lock()

    def counted(prompt, seed, version):
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.01)
        with lock:
            together[0] -= 1
        return rollout(prompt, seed, version)

    taken(OnlineDifficultySampler(60, counted, DifficultyFilter(), batch_size=5, workers=4, max_in_flight=16), 2)
    assert 2 <= most[0] <= 4


def test_what_is_too_old_is_dropped():
    fresh = taken(sampler(max_in_flight=30, max_staleness=0), 6)
    for version, batch in enumerate(fresh):
        assert (batch.versions == version).all()
    old = taken(sampler(max_in_flight=30, max_staleness=2), 6)
    age = torch.cat([version - batch.versions for version, batch in enumerate(old)])
    assert age.max() >= 1
    assert age.min() >= 0
    assert age.max() <= 2
    assert sum(batch.draws for batch in fresh) > sum(batch.draws for batch in old), "what is dropped has to be redrawn"


@pytest.mark.parametrize("flight", [1, 64])
def test_nothing_acceptable_comes_to_an_end(flight):
    def hopeless(prompt, seed, version):
        return None, torch.zeros(8)

    def made(**options):
        return OnlineDifficultySampler(
            20, hopeless, DifficultyFilter(), batch_size=4, max_in_flight=flight, workers=2, **options
        )

    batch = taken(made(max_draws=9), 1)[0]
    assert (batch.draws, batch.scale, batch.acceptance) == (9, 0.0, 0.0)
    assert batch.rewards.shape == (0, 8)
    assert taken(made(), 1)[0].draws == 80
    for short in ("repeat", "raise"):
        with pytest.raises(DataError, match="0 of 4"):
            taken(made(max_draws=9, short_batch=short), 1)
    with pytest.warns(StarvationWarning, match="0.0 %"):
        taken(made(max_draws=9), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken(made(max_draws=9), 4)
        taken(sampler(), 6)


def test_short_batches():
    assert taken(sampler(max_draws=5, batch_size=5), 1)[0].scale < 1.0
    repeated = taken(sampler(max_draws=5, batch_size=5, short_batch="repeat"), 1)[0]
    assert repeated.rewards.shape == (5, 8)
    assert 0 < len(set(repeated.prompts.tolist())) < 5
    with pytest.raises(DataError):
        taken(sampler(max_draws=5, batch_size=5, short_batch="raise"), 1)


def test_fresh_answers_are_not_selected():
    """Among prompts of one rate the kept rewards lean to the thresholds' middle; fresh ones have the rate itself."""
    rate = 0.15

    def draw(prompt, seed, version):
        draws = torch.rand(8, generator=torch.Generator().manual_seed(seed % 2**31))
        return None, (draws < rate).float()

    def mean(reuse):
        made = OnlineDifficultySampler(400, draw, DifficultyFilter(), batch_size=50, reuse=reuse, max_staleness=99)
        return torch.cat([batch.rewards for batch in taken(made, 6)]).mean().item()

    error = 6 * (rate * (1 - rate) / 2400) ** 0.5
    assert abs(mean(False) - rate) < error
    assert mean(True) > rate + error


@pytest.mark.parametrize("tracked", [False, True])
def test_it_goes_on_where_it_stood(tracked):
    def made():
        return sampler(max_in_flight=9, workers=2, tracker=PassRateTracker(60, forgetting=0.9) if tracked else None)

    whole = taken(made(), 9)
    first = made()
    before = taken(first, 4)
    state = first.state_dict()
    second = made()
    second.load_state_dict(state)
    assert equal(whole, before + taken(second, 5))
    assert not equal(whole[4:], taken(made(), 5)), "a fresh one begins anew"


def test_a_tracker_saves_rollouts_and_sees_hard_prompts_again():
    rates = torch.where(torch.arange(200) < 180, 0.002, 0.5)
    seen = torch.zeros(200)

    def draw(prompt, seed, version):
        seen[prompt] += 1
        draws = torch.rand(8, generator=torch.Generator().manual_seed(seed % 2**31))
        return None, (draws < rates[prompt]).float()

    def draws(tracker):
        made = OnlineDifficultySampler(200, draw, DifficultyFilter(), batch_size=10, tracker=tracker, max_in_flight=4)
        return sum(batch.draws for batch in taken(made, 30))

    plain = draws(None)
    seen.zero_()
    assert draws(PassRateTracker(200)) < plain / 1.5
    assert (seen[:180] > 1).any()


def test_an_error_in_a_rollout_comes_out():
    def broken(prompt, seed, version):
        raise RuntimeError("the engine is gone")

    with pytest.raises(RuntimeError, match="engine"):
        taken(OnlineDifficultySampler(5, broken, DifficultyFilter(), batch_size=2), 1)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"workers": 0}, {"max_staleness": -1}, {"max_draws": 2}, {"short_batch": "x"}, {"floor": 0.0}],
)
def test_what_is_refused(options):
    with pytest.raises(ConfigError):
        sampler(**options)
    with pytest.raises(ConfigError):
        OnlineDifficultySampler(0, rollout, DifficultyFilter(), batch_size=1)


# --- a source for the room's trainer ---


class Source:
    """Answers of one token, as long a prompt as its number; rewards from a table of rates in eighths."""

    def __init__(self, solved):
        self.solved, self.calls = solved, []

    def __len__(self):
        return len(self.solved)

    def __call__(self, model, index, *, group, generator):
        self.calls.append(list(index))
        parts, rewards = [], []
        for number in index:
            ids = torch.full((group, number + 2), number + 1)
            parts.append(
                Rollouts(
                    ids=ids, attention_mask=torch.ones_like(ids).bool(), completion_mask=torch.ones(group, 1).bool(),
                    prompt_index=torch.full((group,), number), log_probs=-torch.rand(group, 1, generator=generator),
                    finished=torch.ones(group).bool(),
                )
            )  # fmt: skip
            rewards.append((torch.arange(group) < self.solved[number]).float())
        return join_rollouts(parts), torch.cat(rewards)


def test_a_filtered_source_replaces_what_is_rejected():
    source, told = Source([8, 3, 0, 5, 8, 4, 0, 2]), []
    made = FilteredSource(source=source, keep=difficulty_filter("balanced"), told=lambda *counts: told.append(counts))
    rollouts, rewards = made(None, [0, 1, 2], group=8, generator=stream(0))
    assert len(made) == 8
    assert source.calls[0] == [0, 1, 2]
    assert sorted(number for call in source.calls for number in call)[:3] == [0, 1, 2]
    assert rewards.shape == (24,)
    assert difficulty_filter("balanced")(rewards.reshape(3, 8)).all()
    numbers = rollouts.prompt_index.reshape(3, 8)
    assert (numbers == numbers[:, :1]).all()
    assert numbers[0, 0] == 1
    assert len(set(numbers[:, 0].tolist())) == 3
    assert told == [(sum(map(len, source.calls)), told[0][1])]
    for row in range(24):
        held = rollouts.attention_mask[row, : rollouts.prompt_length]
        assert held.sum() == rollouts.prompt_index[row] + 1, "prompts keep their padding on the left"


def test_a_filtered_source_with_too_few():
    generous = {"keep": difficulty_filter("balanced"), "max_draws": 4}
    rollouts, rewards = FilteredSource(source=Source([8, 3, 0, 8]), **generous)(
        None, [0, 1], group=8, generator=stream(0)
    )
    assert rollouts.prompt_index.tolist() == [1] * 16
    assert rewards.reshape(2, 8).sum(1).tolist() == [3.0, 3.0]
    rollouts, rewards = FilteredSource(source=Source([8, 8, 0, 8]), **generous)(
        None, [2, 1], group=8, generator=stream(0)
    )
    assert rollouts.prompt_index.tolist() == [2] * 8 + [1] * 8
    with pytest.raises(DataError):
        join_rollouts([])


def test_a_filtered_source_with_a_tracker_asks_for_what_will_be_kept():
    solved = [8] * 20 + [4] * 4 + [0] * 20
    drawn = {}
    for tracked in (False, True):
        told = []
        made = FilteredSource(
            source=Source(solved), keep=difficulty_filter("balanced"),
            told=lambda *counts, told=told: told.append(counts),
            tracker=PassRateTracker(len(solved)) if tracked else None,
        )  # fmt: skip
        for step in range(30):
            _, rewards = made(None, [0, 30], group=8, generator=stream(step))
            assert rewards.reshape(2, 8).sum(1).tolist() == [4.0, 4.0]
        drawn[tracked] = sum(counts[0] for counts in told[10:])
    assert drawn[True] < 0.5 * drawn[False]
    again = FilteredSource(source=Source(solved), keep=made.keep, tracker=PassRateTracker(len(solved)))
    again.load_state_dict(made.state_dict())
    numbers = [one(None, [0, 1], group=8, generator=stream(99))[0].prompt_index for one in (again, made)]
    assert torch.equal(*numbers)
