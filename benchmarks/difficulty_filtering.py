"""Online difficulty filtering beside a synchronous refill: is the trainer kept busy? Writes difficulty_filtering.json.

No named peer filters online while it trains and runs without a cluster: the twin here does what dynamic sampling in
trainers does, it rolls out a batch of prompts, waits for all, filters, and repeats until the batch is full. Latencies
are log-normal and slept in 32 threads, an update takes a fixed time: "busy" is the share of the time in which the
trainer updates. Results come in order (the same batches for any number of workers), or as they come. Then: prompts kept
per rollout with the tracker of pass rates and without, for a policy that stands still, and the time of the filter
itself on 1024 groups.
"""

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kullback.align.difficulty import DifficultyFilter, PassRateTracker
from kullback.align.difficulty_sampler import OnlineDifficultySampler
from kullback.core.environment import environment
from kullback.core.rng import generator

torch.set_num_threads(1)
PROMPTS, BATCH, GROUP, WORKERS, UPDATES = 400, 8, 8, 32, 25
UPDATE, MEDIAN = 0.12, 0.03  # seconds
RATES = torch.rand(PROMPTS, generator=generator(0, "rates")) ** 3


def outcome(prompt, seed):
    draws = torch.Generator().manual_seed(seed % 2**31)
    return (torch.rand(GROUP, generator=draws) < RATES[prompt]).float(), float(torch.randn((), generator=draws))


def latent(spread):
    def rollout(prompt, seed, version):
        rewards, z = outcome(prompt, seed)
        time.sleep(MEDIAN * 2.718281828 ** (spread * z))
        return None, rewards

    return rollout


def ahead(spread, ordered):
    """The sampler of kullback: the share of time spent in updates, after the first batch."""
    with OnlineDifficultySampler(
        PROMPTS, latent(spread), DifficultyFilter(), batch_size=BATCH, workers=WORKERS, max_in_flight=96,
        max_staleness=8, ordered=ordered,
    ) as sampler:  # fmt: skip
        next(sampler)
        begin = time.perf_counter()
        for _ in range(UPDATES):
            time.sleep(UPDATE)
            next(sampler)
        return UPDATES * UPDATE / (time.perf_counter() - begin)


def refill(spread):
    """The twin: whole batches of prompts, one after the other, until enough are kept."""
    rollout, keep = latent(spread), DifficultyFilter()
    draws, count = generator(1, "order"), 0
    with ThreadPoolExecutor(WORKERS) as workers:
        begin = time.perf_counter()
        for _ in range(UPDATES):
            kept = 0
            while kept < BATCH:
                prompts = torch.randint(PROMPTS, (WORKERS,), generator=draws).tolist()
                found = list(workers.map(lambda job: rollout(*job, 0), zip(prompts, range(count, count + WORKERS))))
                count += WORKERS
                kept += int(keep(torch.stack([rewards for _, rewards in found])).sum())
            time.sleep(UPDATE)
        return UPDATES * UPDATE / (time.perf_counter() - begin)


def kept_per_rollout(tracker):
    def rollout(prompt, seed, version):
        return None, outcome(prompt, seed)[0]

    with OnlineDifficultySampler(
        PROMPTS, rollout, DifficultyFilter(), batch_size=BATCH, max_in_flight=8, tracker=tracker
    ) as sampler:
        batches = [next(sampler) for _ in range(200)]
    return 200 * BATCH / sum(batch.draws for batch in batches)


def filter_time():
    rewards, keep = (torch.rand(1024, GROUP, generator=generator(2)) < 0.5).float(), DifficultyFilter()
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        keep(rewards)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main():
    rows = []
    for spread in (0.3, 0.8, 1.2):
        triples = [(ahead(spread, True), ahead(spread, False), refill(spread)) for _ in range(3)]
        found = [statistics.median(values) for values in zip(*triples)]
        for who, busy in zip(("kullback, in order", "kullback, as they come", "synchronous refill"), found):
            row = {"case": f"log-normal latency, sigma {spread}", "who": who, "busy": round(busy, 3)}
            rows.append(row | {"ratio": round(busy / found[-1], 2)})
    plain, tracked = kept_per_rollout(None), kept_per_rollout(PassRateTracker(PROMPTS))
    rows.append({"case": "kept per rollout", "who": "tracked", "share": round(tracked, 3),
                 "ratio": round(tracked / plain, 2)})  # fmt: skip
    rows.append({"case": "kept per rollout", "who": "untracked", "share": round(plain, 3), "ratio": 1.0})
    rows.append({"case": "the filter on 1024 groups", "who": "kullback", "ms": round(1e3 * filter_time(), 3)})
    for row in rows:
        print(row)
    content = {"about": " ".join(__doc__.split()), "environment": environment(), "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
