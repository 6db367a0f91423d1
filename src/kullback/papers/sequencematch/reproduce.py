"""SequenceMatch on characters of real prose: what is left of words when a tenth of the characters goes wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kullback.align._hf_sequencematch import SequenceMatchSettings, layout_logits
from kullback.align.least_squares import SquaredTargets, squared_targets_loss
from kullback.align.sequencematch import sequencematch_loss
from kullback.align.unlikelihood import unlikelihood_loss
from kullback.core.rng import generator
from kullback.core.runs import Run
from kullback.core.types import Report
from kullback.data.corpora import corpus
from kullback.decode.backspace import backspace_layout, generate_with_backspace, inject_noise, visible_text
from kullback.decode.contrastive import contrastive_search
from kullback.figures import figure
from kullback.models.small import small_llama
from kullback.papers.sequencematch.bandit import bandit_optimum

__all__ = ["draw", "reproduce"]

LETTERS = " abcdefghijklmnopqrstuvwxyz"
BEGIN, BACKSPACE = len(LETTERS), len(LETTERS) + 1  # 27 characters, the begin token, the backspace
WINDOW, BATCH, RATE, TUNED_RATE = 40, 32, 2e-3, 1e-3
PRETRAINED, TUNED, SAMPLES, VISIBLE = 500, 200, 150, 48
NOISES = (0.0, 0.05, 0.1, 0.2)
SETTINGS = SequenceMatchSettings(
    noise=0.1, alpha=100.0, gamma=0.95, refresh_every=25, samples=32, kept=96, length=WINDOW
)
TITLES = {
    "mle": "likelihood", "cloning": "cloning with backspace", "sequencematch": "SequenceMatch",
    "least_squares": "squared targets", "unlikelihood": "unlikelihood",
}  # fmt: skip
DRAWN = {**TITLES, "contrastive": "likelihood, contrastive search"}
WITHOUT = ("mle", "unlikelihood")  # the backspace
OPENING, PENALTY, CANDIDATES = 8, 0.6, 4  # characters drawn before contrastive search goes on, and its two options
NGRAM = 6  # characters of a repetition that unlikelihood punishes
SHARES, ALPHAS = (0.7, 0.2, 0.1), (0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0)


def reproduce(run: Run) -> Report:
    """One model by likelihood, then five ways to go on, each written from under noise; the first by contrastive search
    as well; and a bandit, exactly.
    """
    text, starts, words = _text()
    base = _model(run.seed)
    _train(base, text, starts, run.seed, "mle", PRETRAINED, RATE)
    rows: list[dict[str, Any]] = []
    at: dict[tuple[str, float], dict[str, float]] = {}
    for name in TITLES:
        model = deepcopy(base)
        model.without_backspace = name in WITHOUT
        _train(model, text, starts, run.seed, name, TUNED, TUNED_RATE)
        for written in (name, "contrastive") if name == "mle" else (name,):
            for noise in NOISES:
                at[written, noise] = _written(model, words, run.seed, noise, search=written == "contrastive")
                rows.append({"part": "prose", "method": written, "noise": noise, **at[written, noise]})
            run.event("method", name=written, **at[written, 0.1])
    bandit = _bandit()
    rows += bandit
    entropies = [row["entropy"] for row in bandit if row["method"] == "chi2_mixture"]
    metrics = {
        "valid_words_gain": at["sequencematch", 0.1]["valid"] - at["mle", 0.1]["valid"],
        "long_words_gain": at["sequencematch", 0.1]["long"] - at["mle", 0.1]["long"],
        "clean_valid_words_gain": at["sequencematch", 0.0]["valid"] - at["mle", 0.0]["valid"],
        "over_cloning": at["sequencematch", 0.1]["valid"] - at["cloning", 0.1]["valid"],
        "over_squared_targets": at["sequencematch", 0.1]["valid"] - at["least_squares", 0.1]["valid"],
        "over_contrastive_search": at["sequencematch", 0.1]["valid"] - at["contrastive", 0.1]["valid"],
        "over_unlikelihood": at["sequencematch", 0.1]["valid"] - at["unlikelihood", 0.1]["valid"],
        "backspaces": at["sequencematch", 0.1]["backspaces"],
        "bandit_entropy_fall": min(one - other for one, other in pairwise(entropies)),
    }
    return Report(metrics=metrics, rows=rows)


def _bandit() -> list[dict[str, Any]]:
    """Entropy and objective of the optimum over alpha, for both forms of chi-squared."""
    return [
        {"part": "bandit", "method": name, "alpha": alpha, "entropy": found.entropy, "objective": found.objective}
        for name in ("chi2", "chi2_mixture")
        for alpha in ALPHAS
        for found in (bandit_optimum(torch.tensor(SHARES), alpha=alpha, divergence=name),)  # type: ignore[arg-type]
    ]


def _text() -> tuple[Tensor, Tensor, set[str]]:
    """The prose as numbers of letters and spaces, the places where a word begins, and all its words."""
    whole = re.sub(r"[^a-z]+", " ", " ".join(corpus("prose").train).lower())
    ids = torch.tensor([LETTERS.index(letter) for letter in whole])
    starts = (ids[:-1] == 0).nonzero().squeeze(1) + 1
    return ids, starts[starts < len(ids) - WINDOW], set(whole.split())


def _model(seed: int) -> Any:
    return small_llama(
        BACKSPACE + 1, hidden=64, layers=2, heads=4, length=256, generator=generator(seed, "characters")
    )


def _train(model: Any, text: Tensor, starts: Tensor, seed: int, name: str, steps: int, rate: float) -> None:
    """Likelihood of the windows; "unlikelihood" of repetitions in own texts besides; with "cloning" of windows with
    noise that is deleted; "sequencematch" besides, and "least_squares" by its squared targets.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    buffer: list[Tensor] = []
    for step in range(steps):
        source = generator(seed, name, steps, step)
        ids = text[starts[torch.randint(len(starts), (BATCH,), generator=source)].unsqueeze(1) + torch.arange(WINDOW)]
        loss = _plain(model, ids) if name in WITHOUT else _noisy(model, ids, name, step, steps, buffer, source)
        if name == "unlikelihood":
            _refresh(model, buffer, step, source)
            loss = loss + _repeated(model, torch.stack(_picked(buffer, source)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _logits(model: Any, ids: Tensor) -> Tensor:
    inputs = torch.cat([torch.full((len(ids), 1), BEGIN), ids[:, :-1]], 1)
    # Neither the begin token nor the backspace is ever written.
    found: Tensor = model(input_ids=inputs).logits[..., : len(LETTERS)]
    return found


def _plain(model: Any, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(_logits(model, ids).flatten(0, 1), ids.flatten())


def _repeated(model: Any, ids: Tensor) -> Tensor:
    return unlikelihood_loss(_logits(model, ids), ids, candidates="sequences", n=NGRAM)


def _refresh(model: Any, buffer: list[Tensor], step: int, source: torch.Generator) -> None:
    if step % SETTINGS.refresh_every == 0:
        buffer[:] = [*_sample(model, SETTINGS.samples, WINDOW, source), *buffer][: SETTINGS.kept]


def _picked(buffer: list[Tensor], source: torch.Generator) -> list[Tensor]:
    return [buffer[place] for place in torch.randint(len(buffer), (BATCH,), generator=source).tolist()]


def _noisy(
    model: Any, ids: Tensor, name: str, step: int, steps: int, buffer: list[Tensor], source: torch.Generator
) -> Tensor:
    actions, weights = inject_noise(
        ids, share=SETTINGS.noise, vocabulary=len(LETTERS), backspace=BACKSPACE, generator=source
    )
    data = backspace_layout(actions, backspace=BACKSPACE, begin=BEGIN, weights=weights)
    logits = _masked(layout_logits(model, data))
    own, own_logits, share = data, logits, 1.0
    if name != "cloning":
        _refresh(model, buffer, step, source)
        rows = torch.nn.utils.rnn.pad_sequence(_picked(buffer, source), batch_first=True, padding_value=-100)
        own = backspace_layout(rows, backspace=BACKSPACE, begin=BEGIN)
        own_logits, share = _masked(layout_logits(model, own)), SETTINGS.share(step, steps)
    streams = (logits, data, own_logits, own)
    shared: dict[str, Any] = {
        "backspace": BACKSPACE, "alpha": SETTINGS.alpha, "gamma": SETTINGS.gamma, "nll_share": share,
        "terminal": "bootstrap",
    }  # fmt: skip
    if name == "least_squares":
        return squared_targets_loss(*streams, targets=SquaredTargets(), **shared).loss
    return sequencematch_loss(*streams, **shared).loss


def _masked(logits: Tensor) -> Tensor:
    """Logits in which the begin token cannot be written."""
    closed = torch.zeros(logits.shape[-1])
    closed[BEGIN] = -1e4
    return logits + closed


def _sample(
    model: Any, rows: int, length: int, source: torch.Generator, replace: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    return generate_with_backspace(
        _Closed(model), rows, backspace=BACKSPACE, begin=BEGIN, length=length, most_actions=3 * length,
        generator=source, replace=replace,
    )  # fmt: skip


class _Closed(torch.nn.Module):
    """The model without the begin token among its actions; one that never learnt the backspace never takes it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Any) -> Any:
        out = self.model(**given)
        out["logits"] = _masked(out["logits"])
        if getattr(self.model, "without_backspace", False):
            out["logits"][..., BACKSPACE] = -1e4
        return out


def _written(model: Any, words: set[str], seed: int, noise: float, *, search: bool = False) -> dict[str, float]:
    """The share of valid words, of valid ones of more than three letters, and of different ones, in what the model
    writes; with search its opening is drawn and the rest found, as contrastive search draws nothing.
    """
    source = generator(seed, "written", str(noise))

    def replace(tokens: Tensor) -> Tensor:
        wrong = torch.rand(len(tokens), generator=source) < noise
        return torch.where(wrong, torch.randint(len(LETTERS), (len(tokens),), generator=source), tokens)

    actions = _sample(model, SAMPLES, OPENING if search else VISIBLE, source, replace)
    if search:
        begun = torch.nn.functional.pad(actions, (1, 0), value=BEGIN)
        rest = contrastive_search(
            _Closed(model), begun, count=VISIBLE - OPENING, alpha=PENALTY, candidates=CANDIDATES, replace=replace
        )
        actions = torch.cat([actions, rest.tokens], 1)
    found = ["".join(LETTERS[token] for token in row) for row in visible_text(actions, backspace=BACKSPACE)]
    written = [word for row in found for word in row.split()[:-1]]  # the last word of a row is cut
    valid = [word for word in written if word in words]
    return {
        "valid": len(valid) / max(len(written), 1),
        "long": sum(len(word) > 3 for word in valid) / max(len(written), 1),
        "distinct": len(set(written)) / max(len(written), 1),
        "backspaces": ((actions == BACKSPACE).sum() / (actions != -100).sum()).item(),
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Valid words, long ones, and different ones against noise; a line a method, means over seeds with every seed as a
    dot. Then the bandit's entropy over alpha.
    """
    with figure(path, columns=4, size=(3.7, 3.4)) as axes:
        panels = {
            "valid": "share of valid words", "long": "share of valid words of 4 letters or more",
            "distinct": "different words, of all that were written",
        }  # fmt: skip
        for panel, (key, label) in zip(axes[:3], panels.items(), strict=True):
            for place, (name, title) in enumerate(DRAWN.items()):
                found = [(row["noise"], row[key]) for row in rows if row["method"] == name]
                if not found:
                    continue
                noises = sorted({noise for noise, _ in found})
                means = [sum(v for n, v in found if n == noise) / sum(n == noise for n, _ in found) for noise in noises]
                panel.plot(noises, means, color=f"C{place}", label=title)
                panel.plot(*zip(*found, strict=True), ".", color=f"C{place}", markersize=4, alpha=0.6)
            panel.set(xlabel="share of characters replaced at random", ylabel=label)
        axes[0].legend(frameon=False, fontsize=7)
        for name, style in (("chi2", "--"), ("chi2_mixture", "-")):
            found = [(r["alpha"], r["entropy"]) for r in rows if r["method"] == name and r["seed"] == rows[0]["seed"]]
            axes[3].plot([a for a, _ in found], [e for _, e in found], style, color="C0", label=name.replace("_", ", "))
        source = -sum(share * math.log(share) for share in SHARES)
        axes[3].axhline(source, color="0.6", linewidth=0.8, label="demonstrations")
        axes[3].set(xlabel="weight of the divergence, alpha", ylabel="entropy of the policy (nats)", xscale="log")
        axes[3].legend(frameon=False, fontsize=8)
