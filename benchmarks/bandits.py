"""Bandits beside river and MABWiser in one run: time, regret and memory. Writes bandits.json.

Online: one pull and one update of policy objects on coins, one thread; contenders take turns, each time is the median
over stretches of rounds. "ratio" is the peer's time over ours. Simulator: compiled rounds a second on one core, beside
our own loop over policy objects, its naive twin, and a loop over river. Regret: one formula, the same rewards.

The bar is 10^7 rounds a second with ten arms. All index policies pass it, and of those that draw, Exp3, Exp3-IX,
Exp3.S and Thompson sampling with Gaussian posteriors. Near it are Hedge and Exp3.P, which draw a number or make two
divisions and an exponential for every arm, and Tsallis-INF, which solves an equation in two or three passes with a
division an arm: 10 ns an arm is all that there is. Thompson sampling with Beta posteriors is at half of it: a round
draws twenty Gamma numbers, of some 8 ns each (a normal number of 3.5 ns, a uniform one, a cube, a comparison), and
10^7 rounds leave 5 ns. With more arms each of these passes costs in proportion.
"""

import json
import statistics
import time
import tracemalloc
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import river.bandit
import river.proba
import torch
from mabwiser.mab import MAB, LearningPolicy

from kullback.core.environment import environment
from kullback.stream import bandits
from kullback.stream.bandits.simulate import SCHEDULES, Bernoulli, RewardTable, simulate

torch.set_num_threads(1)
warnings.simplefilter("ignore")
SIZES = (10, 100, 1000)
QUICK = ("ucb1", "ucb_v", "explore_first", "epsilon_greedy", "successive_elimination")
SOURCE = torch.Generator().manual_seed(0)


def coins(arms, rounds):
    """Rewards of every arm in every round, the first one the best."""
    means = np.full(arms, 0.5)
    means[0] = 0.6
    return (np.random.default_rng(0).random((rounds, arms)) < means).astype(float)


def ours(policy):
    def play(rewards):
        for row in rewards:
            arm = policy.pull(None, generator=SOURCE)
            policy.update(arm, row[arm], None)

    return play


def rivers(policy, arms):
    names = list(range(arms))

    def play(rewards):
        for row in rewards:
            arm = policy.pull(names)
            policy.update(arm, row[arm])

    return play


def mabwisers(learning, arms):
    policy = MAB(list(range(arms)), learning)
    policy.fit(np.arange(arms), np.zeros(arms))

    def play(rewards):
        for row in rewards:
            arm = policy.predict()
            policy.partial_fit([arm], [row[arm]])

    return play


def online(arms):
    """Contenders by policy: who and how to make one that has seen nothing."""
    beta = river.proba.Beta
    return {
        "UCB": {
            "kullback": lambda: ours(bandits.UCB1(arms)),
            "river": lambda: rivers(river.bandit.UCB(delta=1.0, seed=0), arms),
            "mabwiser": lambda: mabwisers(LearningPolicy.UCB1(alpha=1.0), arms),
        },
        "Thompson": {
            "kullback": lambda: ours(bandits.ThompsonBeta(arms)),
            "river": lambda: rivers(river.bandit.ThompsonSampling(reward_obj=beta(), seed=0), arms),
            "mabwiser": lambda: mabwisers(LearningPolicy.ThompsonSampling(), arms),
        },
        "epsilon-greedy": {
            "kullback": lambda: ours(bandits.EpsilonGreedy(arms, epsilon=0.1)),
            "river": lambda: rivers(river.bandit.EpsilonGreedy(epsilon=0.1, seed=0), arms),
            "mabwiser": lambda: mabwisers(LearningPolicy.EpsilonGreedy(epsilon=0.1), arms),
        },
        "Exp3": {
            "kullback": lambda: ours(bandits.Exp3(arms, rate=0.01, mixing=0.1)),
            "river": lambda: rivers(river.bandit.Exp3(gamma=0.1, seed=0), arms),
        },
        "Bayes-UCB": {
            "kullback": lambda: ours(bandits.BayesUCB(arms)),
            "river": lambda: rivers(river.bandit.BayesUCB(seed=0), arms),
        },
        "KL-UCB": {"kullback": lambda: ours(bandits.KLUCB(arms))},
        "Tsallis-INF": {"kullback": lambda: ours(bandits.TsallisINF(arms))},
    }


def memory(make, rewards):
    """Peak bytes of making the policy and playing these rounds."""
    tracemalloc.start()
    make()(rewards)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def rounds_per_policy(arms):
    """Microseconds a round, after a start in which every arm was played."""
    rows = []
    stretch = max(200, 20_000 // arms // 4)
    rewards = coins(arms, arms + 3 * stretch)
    for name, contenders in online(arms).items():
        slow = {"mabwiser"} if arms > 10 else set()  # a tenth of a second a round and more
        players = {who: make() for who, make in contenders.items() if who not in slow}
        times = {who: [] for who in players}
        for player in players.values():
            player(rewards[:arms])
        for begin in range(arms, len(rewards) - stretch + 1, stretch):
            for who, player in players.items():
                start = time.process_time()
                player(rewards[begin : begin + stretch])
                times[who].append((time.process_time() - start) / stretch * 1e6)
        middle = {who: statistics.median(values) for who, values in times.items()}
        for who in players:
            bytes_ = memory(contenders[who], rewards[: arms + 20])
            ratio = round(middle[who] / middle["kullback"], 2)
            case = f"online, {name}, {arms} arms"
            kept = {"us": round(middle[who], 2), "ratio": ratio, "kB": round(bytes_ / 1e3, 1)}
            rows.append({"case": case, "who": who, **kept})
    return rows


def linear(dimension, arms=10, rounds=300):
    """LinUCB, one round; and in batches of 64 contexts."""
    contexts = torch.randn(rounds, dimension, dtype=torch.float64, generator=SOURCE)
    rewards = coins(arms, rounds)
    named = [{str(i): x for i, x in enumerate(row.tolist())} for row in contexts]
    policy, batched = bandits.LinUCB(arms, dimension, alpha=1.0), bandits.LinUCB(arms, dimension, alpha=1.0)
    peer = river.bandit.LinUCBDisjoint(alpha=1.0, seed=0)

    def one():
        for x, row in zip(contexts, rewards, strict=True):
            arm = policy.pull(x, generator=SOURCE)
            policy.update(arm, row[arm], x)

    def many():
        for begin in range(0, rounds, 64):
            x = contexts[begin : begin + 64]
            chosen = batched.pull_many(x, generator=SOURCE)
            batched.update_many(chosen, rewards[np.arange(begin, begin + len(x)), chosen.numpy()], x)

    def theirs():
        for x, row in zip(named, rewards, strict=True):
            arm = peer.pull(list(range(arms)), context=x)
            peer.update(arm, x, row[arm])

    times = {"kullback": [], "kullback, batches of 64": [], "river": []}
    for _ in range(3):
        for who, play in zip(times, (one, many, theirs), strict=True):
            start = time.process_time()
            play()
            times[who].append((time.process_time() - start) / rounds * 1e6)
    middle = {who: statistics.median(values) for who, values in times.items()}
    case = f"online, LinUCB, {arms} arms, {dimension} features"
    return [
        {"case": case, "who": who, "us": round(value, 2), "ratio": round(value / middle["kullback"], 2)}
        for who, value in middle.items()
    ]


def simulator(arms):
    """Millions of rounds a second."""
    world = Bernoulli([0.6] + (arms - 1) * [0.5])
    rows = []
    for name in SCHEDULES:
        simulate(name, world, 10, generator=SOURCE)
        horizon = (200_000 if name in QUICK else 20_000) // (10 if arms == 1000 else 1)
        times = []
        for _ in range(3):
            start = time.process_time()
            simulate(name, world, horizon, runs=5, generator=SOURCE)
            times.append(time.process_time() - start)
        rate = 5 * horizon / statistics.median(times)
        rows.append({"case": f"simulator, {arms} arms", "who": name, "million_rounds_per_s": round(rate / 1e6, 3)})
    start = time.process_time()
    simulate(lambda: bandits.UCB1(arms, horizon=5000), world, 5000, generator=SOURCE)
    rate = 5000 / (time.process_time() - start) / 1e6
    rows.append({"case": f"simulator, {arms} arms", "who": "ucb1, naive twin", "million_rounds_per_s": round(rate, 4)})
    player, rewards = rivers(river.bandit.UCB(delta=1.0, seed=0), arms), coins(arms, 2000)
    start = time.process_time()
    player(rewards)
    rate = 2000 / (time.process_time() - start) / 1e6
    rows.append({"case": f"simulator, {arms} arms", "who": "ucb1, river", "million_rounds_per_s": round(rate, 4)})
    return rows


def regret(runs=30, rounds=2000):
    """Regret of UCB with the same formula on the same tables of rewards, of which no two are equal, so without ties."""
    totals = {"kullback": [], "river": []}
    for run in range(runs):
        table = np.random.default_rng(run).random((rounds, 10))
        table[:, 0] = 0.3 + 0.7 * table[:, 0]
        result = simulate("ucb1", RewardTable(table), rounds, generator=SOURCE, anytime=True, exploration=2.0)
        totals["kullback"].append(result.mean)
        policy, earned = river.bandit.UCB(delta=1.0, seed=0), 0.0
        for row in table:
            arm = policy.pull(list(range(10)))
            policy.update(arm, row[arm])
            earned += row[arm]
        totals["river"].append(float(table.sum(0).max() - earned))
    means = {who: float(np.mean(values)) for who, values in totals.items()}
    return [
        {"case": f"regret of UCB, {runs} tables of {rounds} x 10", "who": who, "regret": round(value, 2),
         "error": round(value / means["kullback"] - 1, 4)}
        for who, value in means.items()
    ]  # fmt: skip


def main():
    table = []
    for arms in SIZES:
        table += rounds_per_policy(arms) + simulator(arms)
    for dimension in (5, 20, 80):
        table += linear(dimension)
    table += regret()
    for row in table:
        rest = "  ".join(f"{name} {value}" for name, value in row.items() if name not in ("case", "who"))
        print(f"{row['case']:45} {row['who']:25} {rest}")
    peers = {name: version(name) for name in ("river", "mabwiser", "numba")}
    content = {"environment": environment(), "threads": 1, "peers": peers, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
