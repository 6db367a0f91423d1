"""Layouts, steps and generation with a backspace, beside plain ones. Writes sequencematch.json.

One thread, medians of calls in turn. "layout": 64 rows of some 500 actions, that with its dense mask, and a stack
machine on Python lists, which makes neither mask nor stream. "step": loss and gradients on data and own trajectories,
two forwards, over a step of likelihood on the same stream; "loss": of that what is no forward or backward of the model.
"generation": 8 texts of 256 visible tokens with the key-value cache, over feeding every visible prefix again.
"search": contrastive search of 128 tokens after 8 prompts of 16, four candidates, over reading every text anew at each
step (in batch as well), and over as many tokens drawn.
"""

import json
import time
from pathlib import Path

import torch

import _measure
from kullback.align._hf_sequencematch import layout_logits
from kullback.align.sequencematch import sequencematch_loss
from kullback.core.environment import environment
from kullback.core.rng import generator
from kullback.decode.ancestral import draw_tokens
from kullback.decode.backspace import backspace_layout, generate_with_backspace, inject_noise
from kullback.decode.contrastive import contrastive_search
from kullback.models.small import small_llama

BACKSPACE, BEGIN = 99, 0


def noisy(rows, length):
    ids = torch.randint(1, 99, (rows, length), generator=generator(0, "ids"))
    options = {"vocabulary": 99, "backspace": BACKSPACE, "generator": generator(0, "noise")}
    return inject_noise(ids, share=0.1, **options)[0]


def on_lists(actions):
    found = []
    for row in actions.tolist():
        stack, places = [0], []
        for place, action in enumerate(row):
            if action == BACKSPACE:
                stack.pop()
            elif action >= 0:
                stack.append(place + 1)
            places.append(stack[-1])
        found.append(places)
    return found


def model(hidden=64):
    return small_llama(100, hidden=hidden, layers=2, heads=4, length=2048, generator=generator(0, "model"))


def layouts():
    actions = noisy(64, 430)
    calls = {
        "kullback": lambda: backspace_layout(actions, backspace=BACKSPACE, begin=BEGIN),
        "with mask": lambda: backspace_layout(actions, backspace=BACKSPACE, begin=BEGIN).attention,
        "lists": lambda: on_lists(actions),
    }  # fmt: skip
    times, _ = _measure.race(calls, rounds=31, clock=time.process_time)
    milliseconds = {name: 1000 * value for name, value in _measure.medians(times).items()}
    return {"actions": actions.shape[1], "milliseconds": milliseconds}


def steps():
    network = model()
    data = backspace_layout(noisy(16, 106), backspace=BACKSPACE, begin=BEGIN)

    def plain():
        loss = network(input_ids=data.input_ids, labels=data.input_ids).loss
        loss.backward()

    def matched():
        logits, own = layout_logits(network, data), layout_logits(network, data)
        sequencematch_loss(logits, data, own, data, backspace=BACKSPACE).loss.backward()

    held = layout_logits(network, data).detach().requires_grad_()

    def lost():
        sequencematch_loss(held, data, held, data, backspace=BACKSPACE).loss.backward()

    calls = {"kullback": matched, "likelihood": plain, "loss": lost}
    times, _ = _measure.race(calls, rounds=31, clock=time.process_time)
    size, ratio = list(data.input_ids.shape), _measure.ratio(times, "kullback", "likelihood")
    return {"tokens": size, "seconds": _measure.medians(times), "ratio": ratio}


@torch.no_grad()
def again(network, rows, length, draw):
    stacks, done = [[] for _ in range(rows)], [False] * rows
    while not all(done):
        for row, stack in enumerate(stacks):
            if done[row]:
                continue
            logits = network(input_ids=torch.tensor([[BEGIN, *stack]]), logits_to_keep=1).logits[0, -1]
            if not stack:
                logits[BACKSPACE] = -torch.inf
            action = int(torch.multinomial(logits.softmax(-1), 1, generator=draw))
            stack.pop() if action == BACKSPACE else stack.append(action)
            done[row] = len(stack) >= length


def generation():
    network, options = model().eval(), {"backspace": BACKSPACE, "begin": BEGIN, "length": 256, "most_actions": 1000}
    calls = {
        "kullback": lambda: generate_with_backspace(network, 8, generator=generator(2, "g"), **options),
        "again": lambda: again(network, 8, 256, generator(2, "g")),
    }  # fmt: skip
    times, _ = _measure.race(calls, rounds=3)
    return {"visible": 256, "seconds": _measure.medians(times), "ratio": _measure.ratio(times, "kullback", "again")}


@torch.no_grad()
def anew(network, text, count, alpha=0.6, candidates=4):
    for _ in range(count):
        out = network(input_ids=text, output_hidden_states=True, use_cache=False)
        top = out.logits[:, -1].softmax(-1).topk(candidates)
        longer = torch.cat([text.repeat_interleave(candidates, 0), top.indices.reshape(-1, 1)], 1)
        states = network(input_ids=longer, output_hidden_states=True, use_cache=False).hidden_states[-1]
        states = torch.nn.functional.normalize(states, dim=-1)
        penalty = (states[:, :-1] @ states[:, -1:].mT).amax((1, 2)).view(-1, candidates)
        best = ((1 - alpha) * top.values - alpha * penalty).argmax(1)
        text = torch.cat([text, top.indices.gather(1, best.unsqueeze(1))], 1)
    return text


def search():
    network = model().eval()
    prompts = torch.randint(1, 99, (8, 16), generator=generator(3, "prompts"))
    calls = {
        "kullback": lambda: contrastive_search(network, prompts, count=128).tokens,
        "anew": lambda: anew(network, prompts, 128)[:, 16:],
        "drawn": lambda: draw_tokens(network, prompts, count=128, generator=generator(4, "drawn")),
    }  # fmt: skip
    times, results = _measure.race(calls, rounds=3, clock=time.process_time)
    return {
        "tokens": 128, "seconds": _measure.medians(times), "ratio": _measure.ratio(times, "kullback", "anew"),
        "over drawing": _measure.ratio(times, "kullback", "drawn"),
        "equal": (results["kullback"] == results["anew"]).double().mean().item(),
    }  # fmt: skip


def main():
    torch.set_num_threads(1)
    found = {
        "environment": environment(), "layout": layouts(), "step": steps(), "generation": generation(),
        "search": search(),
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
