"""Rewards of tokens, a step of RL beside trl's, and the evidence of a far posterior. Writes rl_kl_bayes.json.

One thread, medians of calls in turn. "shaped": token rewards of 64 completions of 512 and 2048 tokens, and the ELBO
of the same, over a bare masked subtraction. "step": RLOO with the KL in the reward, 8 completions of each of 8
prompts, by AlignTrainer and by trl's RLOOTrainer on the same model and optimiser, some steps in turn: processor
seconds of sampling, scoring, the reference, loss, gradient and update. trl computes the policy's log-probabilities in
a pass of its own; ours come with the samples. "evidence": sequences of 16 tokens rewarded for the rarest one, with
about as many calls of the prior for importance sampling and for annealing by moves of one token, whose laws are kept
(one call each): "annealed" 80 samples with 7 moves at 32 temperatures, "recycled" every state of 63 moves of 40 at 8,
"tried" 92 samples with 10 moves at 32, of which the reward has seen 16 tokens before the model is called, and
"suffixes" by suffixes drawn anew; mean squared errors of log Z over 20 runs, and the first over the best of the next
three. Tenfold from a KL of 8 nats on was the aim.
"""

import json
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import torch

import _measure
from kullback.align._hf import AlignTrainer, frozen_reference, index_items
from kullback.align.evidence import PriorSampler, log_evidence, suffix_move, token_move
from kullback.align.grpo import Grpo
from kullback.align.log_probs import sequence_log_probs
from kullback.align.posterior import elbo
from kullback.align.ppo import shaped_rewards
from kullback.align.rollouts import sample_rollouts
from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.data.corpora import corpus
from kullback.data.tokenizer import train_byte_bpe
from kullback.models.small import small_llama

PROMPTS, GROUP, STEPS, ROUNDS, BETA = 8, 8, 4, 2, 0.1
RLOO = Grpo(
    beta=BETA, penalty="k1", scale="none", baseline="leave-one-out", reduction="seq-mean-token-sum",
    level="sequence",
)  # fmt: skip
LAW, LENGTH, RUNS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), 16, 20


def shaped(length):
    draw = generator(0, "tokens")
    policy, reference = (torch.randn(64, length, generator=draw) for _ in range(2))
    mask = torch.rand(64, length, generator=draw) < 0.9
    rewards, nothing = torch.randn(64, generator=draw), torch.zeros(64)
    calls = {
        "kullback": lambda: shaped_rewards(reference, policy, rewards, mask, beta=0.1),
        "bound": lambda: elbo(nothing, sequence_log_probs(policy - reference, mask), rewards, beta=0.1),
        "subtraction": lambda: torch.where(mask, policy - reference, 0.0) * -0.1,
    }  # fmt: skip
    times, _ = _measure.race(calls, rounds=101, clock=time.process_time)
    milliseconds = {name: 1000 * value for name, value in _measure.medians(times).items()}
    ratios = {name: _measure.ratio(times, name, "subtraction") for name in ("kullback", "bound")}
    return {"tokens": 64 * length, "milliseconds": milliseconds, "ratio": ratios}


def watch(seconds):
    """A callback that notes the processor seconds from the end of one step to that of the next."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        before = None

        def on_train_begin(self, args, state, control, **_):
            self.before = None

        def on_step_end(self, args, state, control, **_):
            now = time.process_time()
            if self.before is not None:
                seconds.append(now - self.before)
            self.before = now

    return Watch()


def world(width, layers, length, vocabulary):
    """A model directory with its tokenizer, and the prompts as text and as ids."""
    folder = Path(tempfile.mkdtemp(prefix="kullback-rloo-"))
    text = corpus("prose").train
    tokenizer = train_byte_bpe(text, vocabulary)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    sizes = {"hidden": width, "layers": layers, "heads": 4, "length": 32 + length}
    small_llama(len(tokenizer), **sizes, generator=generator(0, "model")).save_pretrained(folder)
    ids = tokenizer(" ".join(text[:20])).input_ids
    prompts = [tokenizer.decode(ids[start : start + 16]) for start in range(0, 16 * PROMPTS, 16)]
    return folder, tokenizer, prompts


def common(folder, name):
    return {
        "output_dir": str(folder / name), "max_steps": STEPS, "learning_rate": 1e-4, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "bf16": False, "seed": 0,
        "optim": "adamw_torch", "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "weight_decay": 0.0,
        "gradient_checkpointing": False,
    }  # fmt: skip


def our_trainer(folder, tokenizer, prompts, length, seconds):
    from transformers import AutoModelForCausalLM, TrainingArguments

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    options = {"per_device_train_batch_size": PROMPTS, "remove_unused_columns": False}
    given = [tokenizer(prompt).input_ids for prompt in prompts]

    def rollouts(model, index, *, group, generator):
        found = sample_rollouts(
            model, [given[i] for i in index], group=group, length=length, generator=generator,
            end=tokenizer.eos_token_id, prompt_index=index, decode=tokenizer.decode,
        )  # fmt: skip
        return found, torch.tensor([reward(text) for text in found.texts])

    return AlignTrainer(
        model=policy, method=RLOO, reference=frozen_reference(reference), rollouts=rollouts, group=GROUP,
        args=TrainingArguments(**common(folder, "ours"), **options), train_dataset=index_items(range(PROMPTS)),
        callbacks=[watch(seconds)],
    )  # fmt: skip


def their_trainer(folder, tokenizer, prompts, length, seconds):
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    options = {"num_generations": GROUP, "max_completion_length": length, "beta": BETA, "temperature": 1.0}
    args = RLOOConfig(**common(folder, "theirs"), per_device_train_batch_size=PROMPTS * GROUP, **options)
    return RLOOTrainer(
        model=str(folder), reward_funcs=lambda completions, **_: [reward(text) for text in completions], args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]), processing_class=tokenizer,
        callbacks=[watch(seconds)],
    )  # fmt: skip


def reward(text):
    return -float(text.lower().count("e"))


def step(width, layers, length, vocabulary):
    folder, tokenizer, prompts = world(width, layers, length, vocabulary)
    times = {"kullback": [], "trl": []}
    makers = {"kullback": our_trainer, "trl": their_trainer}
    trainers = {name: make(folder, tokenizer, prompts, length, times[name]) for name, make in makers.items()}
    for _ in range(ROUNDS):
        for trainer in trainers.values():
            trainer.train()
    shutil.rmtree(folder)
    seconds, ratio = _measure.medians(times), _measure.ratio(times, "kullback", "trl")
    weights = sum(weight.numel() for weight in trainers["kullback"].model.parameters())
    return {"weights": weights, "tokens": length, "seconds": seconds, "ratio": ratio}


def draws(count, draw):
    return torch.multinomial(LAW, count * LENGTH, replacement=True, generator=draw).view(count, LENGTH)


def regenerate(x, kept, draw):
    return torch.cat([x[:, :kept], draws(len(x), draw)[:, kept:]], 1)


def evidence(beta):
    reward = lambda x: (x == 3).sum(1).double()  # noqa: E731
    move = token_move(lambda x: LAW.log().expand(*x.shape, 4))
    problem = PriorSampler(draws, reward, move)
    suffix = PriorSampler(draws, reward, suffix_move(LENGTH, regenerate))
    tilted = LAW * torch.tensor([0.0, 0.0, 0.0, 1.0 / beta], dtype=torch.float64).exp()
    exact = LENGTH * tilted.sum().log().item()
    posterior = tilted / tilted.sum()
    names = ("importance", "annealed", "recycled", "tried", "suffixes")
    errors, calls = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    tried = PriorSampler(draws, reward, token_move(move.log_laws, tries=16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for seed in range(RUNS):
            plain = log_evidence(problem, 20_000, beta=beta, generator=generator(1, "is", seed))
            options = {"method": "annealed", "beta": beta, "swarms": 1}
            carried = log_evidence(
                problem, 80, moves=7, temperatures=32, generator=generator(1, "smc", seed), **options
            )
            recycled = log_evidence(
                problem, 2560, moves=63, temperatures=8, recycle=True, generator=generator(1, "all", seed), **options
            )
            chosen = log_evidence(tried, 92, moves=10, temperatures=32, generator=generator(1, "try", seed), **options)
            poor = log_evidence(
                suffix, 178, moves=7, temperatures=16, generator=generator(1, "suffix", seed), **options
            )
            for name, value in zip(names, (plain, carried, recycled, chosen, poor), strict=True):
                errors[name] += (value.log_evidence - exact) ** 2 / RUNS
                calls[name] += value.calls / RUNS
    far = LENGTH * (posterior * (posterior / LAW).log()).sum().item()
    ratio = errors["importance"] / min(errors[name] for name in names[1:4])
    return {"beta": beta, "kl": far, "squared_error": errors, "calls": calls, "ratio": ratio}


def main():
    torch.set_num_threads(1)
    found = {
        "environment": environment(), "shaped": [shaped(512), shaped(2048)],
        "step": [step(64, 2, 16, 300), step(128, 2, 32, 1000)],
        "evidence": [evidence(beta) for beta in (1.0, 0.45, 0.4, 0.3)],
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
