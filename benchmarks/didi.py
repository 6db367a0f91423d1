"""Masked diffusion sampling beside bare calls of the denoiser, draws beside torch.multinomial, a DiDi step beside its
parts. Writes didi.json.

Float32, one thread, processor time; "ratio" is ours over the peer's, the median over rounds. No package ships the
method: the peers are what it cannot do without, and the textbook sampler, which draws every position from the whole
posterior at each step. "no cache" calls the denoiser for every sequence at each step, as bare calls do, and differs
from them by the sampler's own work, and by the last layer, which only positions that get a symbol take; a sequence
that gets none in a step is else not looked at ("calls saved"). A step of training takes besides its calls both
optimizers, the average of the weights, and the draws.
"""

import json
import time
from pathlib import Path

import torch

import _measure
from kullback.core.environment import environment
from kullback.distill.didi_trainer import DiDiSettings, DiDiTrainer
from kullback.models.denoisers import TokenDiscriminator, TransformerDenoiser
from kullback.models.masked_diffusion import LogLinearSchedule, categorical, mdm_posterior
from kullback.models.masked_diffusion_sampling import AncestralSampler

torch.set_num_threads(1)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def raced(case, contenders, peer, rounds=5):
    times, results = _measure.race(contenders, rounds=rounds, clock=time.process_time)
    seconds = _measure.medians(times)
    rows = []
    for name in contenders:
        ratio = _measure.ratio(times, name, peer)
        rows.append({"case": case, "who": name, "ms": round(1e3 * seconds[name], 3), "ratio": round(ratio, 3)})
    return rows, results


def textbook(model, n, length, steps, symbols, generator):
    """Ancestral sampling as in the textbooks: the posterior of all positions, drawn by torch.multinomial."""
    schedule = LogLinearSchedule()
    z = torch.full((n, length), symbols)
    for step in range(steps):
        t, s = 1.0 - step / steps, max(0.0, 1.0 - (step + 1) / steps)
        log_p = mdm_posterior(model(z, torch.full((n,), t)), z, t, s, schedule=schedule, mask_id=symbols)
        z = torch.multinomial(log_p.exp().flatten(0, 1), 1, generator=generator).view(n, length)
    return z


@torch.no_grad()
def sampling(n, length, symbols, steps):
    model = TransformerDenoiser(symbols, length, width=64, layers=2, generator=source()).eval()
    z, t = torch.full((n, length), symbols), torch.ones(n)

    def bare():
        for _ in range(steps):
            model(z, t)

    evaluated = []

    def cached():
        generator, sampler = source(1), AncestralSampler(model, steps=steps, mask_id=symbols)
        state = sampler.init(n, length)
        evaluated.clear()
        for _ in range(steps):
            state, info = sampler.step(state, generator=generator)
            evaluated.append(info.evaluated)
        return state.z

    whole = AncestralSampler(model, steps=steps, mask_id=symbols, cache=False)
    rows, _ = raced(
        f"{steps} steps of {n} x {length}, V = {symbols}",
        {
            "bare calls": bare,
            "kullback, no cache": lambda: whole.run(n, length, generator=source(1)),
            "kullback": cached,
            "textbook, multinomial": lambda: textbook(model, n, length, steps, symbols, source(1)),
        },
        "bare calls",
        rounds=3,
    )
    rows[2]["calls_saved"] = round(1.0 - sum(evaluated) / (n * steps), 3)
    return rows


def draws(rows, symbols):
    log_p = torch.randn(rows, symbols, generator=source()).log_softmax(-1)
    probs, generator = log_p.exp(), source(1)
    table, results = raced(
        f"draws, {rows} x {symbols}",
        {
            "torch.multinomial": lambda: torch.multinomial(probs, 1, generator=generator),
            "kullback categorical": lambda: categorical(log_p, generator=generator),
        },
        "torch.multinomial",
    )
    mean = (probs * torch.arange(symbols)).sum(-1).mean().item()
    for row in table:
        row["error"] = abs(results[row["who"]].float().mean().item() - mean) / symbols
    return table


def training(batch, length, symbols):
    """A step beside the calls that it is made of: three forward passes and two backward."""
    teacher = TransformerDenoiser(symbols, length, width=64, layers=2, generator=source())
    discriminator = TokenDiscriminator(teacher, generator=source(1))
    settings = DiDiSettings(batch=batch, kl_beta=0.0)
    trainer = DiDiTrainer(
        teacher, discriminator, mask_id=symbols, length=length, settings=settings, generator=source(2)
    )
    data = torch.randint(symbols, (batch, length), generator=source(3))
    z, t = torch.full((batch, length), symbols), torch.ones(batch)

    def parts():
        trainer.student(z, t).sum().backward()
        trainer.discriminator(torch.cat([z, z]), torch.cat([t, t])).sum().backward()
        with torch.no_grad():
            trainer.discriminator(z, t)

    rows, _ = raced(
        f"training step, {batch} x {length}, V = {symbols}",
        {"forward and backward": parts, "kullback step": lambda: trainer.step(data)},
        "forward and backward",
        rounds=3,
    )
    return rows


def main():
    table = []
    for n, length, symbols, steps in ((16, 16, 12, 64), (16, 64, 256, 64), (8, 128, 2048, 64)):
        table += sampling(n, length, symbols, steps)
    for rows, symbols in ((4096, 12), (2048, 256), (512, 8192)):
        table += draws(rows, symbols)
    for batch, length, symbols in ((32, 16, 12), (32, 64, 256)):
        table += training(batch, length, symbols)
    for row in table:
        saved = f"calls saved {row['calls_saved']:.0%}" if "calls_saved" in row else ""
        error = f"error {row['error']:.1e}" if "error" in row else ""
        print(f"{row['case']:38} {row['who']:24} {row['ms']:10.3f} ms  x {row['ratio']:6.3f}  {saved}{error}")
    content = {"environment": environment(), "threads": 1, "peers": {"torch": torch.__version__}, "rows": table}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
