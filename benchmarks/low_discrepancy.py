"""Low-discrepancy points and kernels beside qmcpy, scipy and torch in one run. Writes low_discrepancy.json.

One thread, float64, seconds of this process. Generators are made before, so that drawing is what is timed, but for the
rows that say otherwise. Each time is the median of several calls, ours and the peers' in turn; "ratio" is the peer's
time over ours, and "bar" what it should reach. Error: largest difference to the peer's points without randomization;
for transforms and kernels, relative, to a dense product. Memory: peak of a process above what it held before.
An argument sets the rounds (7 by default).
"""

import json
import math
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import qmcpy
import scipy.fft
import torch
from scipy.stats import qmc

from _measure import medians, peak_memory, race, ratio
from kullback.core.environment import environment
from kullback.sample.qmc import (
    DigitalNetB2,
    FastGram,
    Halton,
    KernelDSI,
    KernelSI,
    Lattice,
    fftbr,
    fwht,
    ifftbr,
    integrate,
    normal_quantile,
)

torch.set_num_threads(1)
warnings.simplefilter("ignore")  # peers warn of the origin and of counts that are no powers of the base
ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 7
NETS = ((1 << 10, 4), (1 << 16, 100), (1 << 20, 10))
HALTONS = ((1 << 10, 4), (1 << 16, 4), (1 << 13, 100))
NESTED = ((1 << 8, 4), (1 << 10, 4), (1 << 12, 4))
LENGTHS = (1 << 10, 1 << 16, 1 << 20)
KERNELS = (1 << 10, 1 << 14, 1 << 18)
BARS = {"net": 1.0, "lattice": 10.0, "halton": 4.0, "nested": 100.0, "fwht": 10.0, "fftbr": 1 / 1.3}


def inner(size):
    """Calls in a row for a number of coordinates."""
    return max(1, 40_000 // size)


def seeded():
    return torch.Generator().manual_seed(0)


def repeated(call, times):
    def calls():
        for _ in range(times):
            result = call()
        return result

    return calls


def table(case, contenders, bar=None, error=None, rounds=ROUNDS, bars=None, inner=1):
    """One row a contender, ours first. inner: calls in a row, so that the first one's misses do not decide."""
    times, _ = race({name: repeated(call, inner) for name, call in contenders.items()}, rounds, time.process_time)
    times = {name: [value / inner for value in values] for name, values in times.items()}
    rows = []
    for name, seconds in medians(times).items():
        row = {"case": case, "who": name, "ms": round(1e3 * seconds, 4)}
        row |= {"ratio": round(ratio(times, name, "kullback"), 2), "error": (error or {}).get(name)}
        row["bar"] = None if name == "kullback" else (bars or {}).get(name, bar)
        rows.append(row)
        said = "" if row["bar"] is None else f"{'met' if row['ratio'] >= row['bar'] else 'BELOW'} {row['bar']:.3g}"
        said += "" if row["error"] is None else f"  error {row['error']:.1e}"
        print(f"{case:46} {name:14} {row['ms']:11.3f} ms  x {row['ratio']:8.2f}  {said}", flush=True)
    return rows


def scipys(engine, count):
    def draw():
        engine.reset()
        return engine.random(count)

    return draw


def nets():
    rows = []
    for count, d in NETS:
        ours, theirs = DigitalNetB2(d, generator=seeded()), qmcpy.DigitalNetB2(d, seed=7)
        contenders = {
            "kullback": lambda n=count, p=ours: p.points(n),
            "qmcpy": lambda n=count, p=theirs: p(n),
            "scipy": scipys(qmc.Sobol(d, scramble=True, bits=32), count),
            "torch": lambda n=count, d=d: torch.quasirandom.SobolEngine(d, scramble=True, seed=1).draw(
                n, dtype=torch.float64
            ),
        }
        few = min(count, 1 << 12)
        plain = DigitalNetB2(d, randomize=None).points(few).numpy()
        peer = qmcpy.DigitalNetB2(d, randomize=False)(few, warn=False)
        error = {"qmcpy": float(np.abs(plain - peer).max())}
        rows += table(f"net, lms ds, {count} x {d}", contenders, BARS["net"], error, inner=inner(count * d))
    count, d = 1 << 10, 10
    contenders = {
        "kullback": lambda: DigitalNetB2(d, generator=seeded()).points(count),
        "qmcpy": lambda: qmcpy.DigitalNetB2(d, seed=7)(count),
        "scipy": lambda: qmc.Sobol(d, scramble=True, bits=32, rng=np.random.default_rng(1)).random(count),
    }
    rows += table(f"net, made and drawn, {count} x {d}", contenders, BARS["net"], inner=20)
    count, d = 1 << 14, 10
    ours, theirs = DigitalNetB2(d, alpha=2, generator=seeded()), qmcpy.DigitalNetB2(d, alpha=2, seed=7)
    contenders = {"kullback": lambda: ours.points(count), "qmcpy": lambda: theirs(count)}
    return rows + table(f"net of order 2, lms ds, {count} x {d}", contenders, BARS["net"], inner=20)


def lattices():
    rows = []
    for count, d in NETS:
        ours, theirs = Lattice(d, generator=seeded()), qmcpy.Lattice(d, seed=7)
        contenders = {"kullback": lambda n=count, p=ours: p.points(n), "qmcpy": lambda n=count, p=theirs: p(n)}
        peer, few = qmcpy.Lattice(d, randomize=False), min(count, 1 << 12)
        plain = Lattice(d, randomize=None, vector=peer.gen_vec[0].astype(np.int64)).points(few).numpy()
        error = {"qmcpy": float(np.abs(plain - peer(few, warn=False)).max())}
        rows += table(
            f"lattice, shift, {count} x {d}", contenders, BARS["lattice"], error, min(ROUNDS, 5), inner=inner(count * d)
        )
    return rows


def haltons():
    rows = []
    for count, d in HALTONS:
        for name, peer_name in (("none", "FALSE"), ("dp", "DP"), ("lms dp", "LMS DP")):
            ours = Halton(d, randomize=name, generator=seeded())
            theirs = qmcpy.Halton(d, randomize=peer_name, seed=7, warn=False)
            contenders = {
                "kullback": lambda n=count, p=ours: p.points(n),
                "qmcpy": lambda n=count, p=theirs: p(n, warn=False),
            }
            if name != "lms dp":  # scipy permutes digits
                contenders["scipy"] = scipys(qmc.Halton(d, scramble=name == "dp"), count)
            error = None
            if name == "none":
                error = {"qmcpy": float(np.abs(ours.points(1024).numpy() - theirs(1024, warn=False)).max())}
            case = f"Halton, {name}, {count} x {d}"
            rows += table(case, contenders, BARS["halton"], error, min(ROUNDS, 3), inner=inner(count * d))
    return rows


def nested():
    rows = []
    cases = [("net", DigitalNetB2, qmcpy.DigitalNetB2, {})]
    cases += [("net of order 2", DigitalNetB2, qmcpy.DigitalNetB2, {"alpha": 2}), ("Halton", Halton, qmcpy.Halton, {})]
    for what, make, peer, options in cases:
        for count, d in NESTED:
            ours = make(d, randomize="nus", generator=seeded(), **options)
            theirs = peer(d, randomize="NUS", seed=7, **options)
            contenders = {"kullback": lambda n=count, p=ours: p.points(n), "qmcpy": lambda n=count, p=theirs: p(n)}
            case = f"{what}, nus, {count} x {d}"
            rows += table(case, contenders, BARS["nested"], None, min(ROUNDS, 3), inner=3)
    return rows


def relative(one, other):
    return float(np.abs(one - other).max() / np.abs(other).max())


def transforms():
    rows = []
    for count in LENGTHS:
        x = np.random.default_rng(0).standard_normal(count)
        z = x + 1j * np.random.default_rng(1).standard_normal(count)
        m = count.bit_length() - 1
        order = np.array([int(f"{k:0{m}b}"[::-1], 2) for k in range(count)])
        pairs = {"kullback": lambda x=x: fwht(x), "qmcpy": lambda x=x: qmcpy.fwht(x)}
        error = {"kullback": relative(fwht(fwht(x)), x), "qmcpy": relative(qmcpy.fwht(qmcpy.fwht(x)), x)}
        calls = inner(count // 2)
        rows += table(f"fwht, {count}", pairs, BARS["fwht"], error, inner=calls)
        for name, y in (("real", x), ("complex", z)):
            pairs = {
                "kullback": lambda y=y: fftbr(y),
                "qmcpy": lambda y=y: qmcpy.fftbr(y),
                "scipy, permuted": lambda y=y, order=order: scipy.fft.fft(y[order], norm="ortho"),
            }
            exact = scipy.fft.fft(y[order], norm="ortho")
            error = {"kullback": relative(fftbr(y), exact)}
            rows += table(f"fftbr, {name}, {count}", pairs, BARS["fftbr"], error, inner=calls)
        pairs = {
            "kullback": lambda y=z: ifftbr(y),
            "qmcpy": lambda y=z: qmcpy.ifftbr(y),
            "scipy, permuted": lambda y=z, order=order: scipy.fft.ifft(y, norm="ortho")[order],
        }
        error = {"kullback": relative(ifftbr(fftbr(z)), z)}
        rows += table(f"ifftbr, complex, {count}", pairs, BARS["fftbr"], error, inner=calls)
    return rows


RIDGE = 1e-3


def peer_solve(kind, kernel, points, y):
    x = points(len(y))
    column = kernel(x, x[0])
    column[0] += RIDGE
    if kind == "lattice":
        image = math.sqrt(len(y)) * qmcpy.fftbr(column)
        return qmcpy.ifftbr(qmcpy.fftbr(y) / image).real
    return qmcpy.fwht(qmcpy.fwht(y) / (math.sqrt(len(y)) * qmcpy.fwht(column)))


def dense_solve(kernel, points, y):
    x = points(len(y))
    return np.linalg.solve(kernel(x[:, None], x[None]) + RIDGE * np.eye(len(y)), y)


def kernels():
    """Set up and solve for one right-hand side; and the slope of our time in n."""
    rows, slopes = [], {}
    for kind, make, points_of, peer, peer_points in (
        ("lattice", KernelSI, Lattice, qmcpy.KernelShiftInvar, qmcpy.Lattice),
        ("net", KernelDSI, DigitalNetB2, qmcpy.KernelDigShiftInvar, qmcpy.DigitalNetB2),
    ):
        curve = []
        for count in KERNELS:
            y = np.random.default_rng(0).standard_normal(count)
            side = torch.from_numpy(y)
            kernel, points = make(4, alpha=2, weights=0.3), points_of(4, generator=seeded())
            options = {} if kind == "lattice" else {"t": 53}
            theirs, their_points = peer(4, alpha=2, lengthscales=0.3, **options), peer_points(4, seed=7)

            def ours(k=kernel, p=points, n=count, y=side):
                with torch.no_grad():
                    return FastGram(k, p, n, nugget=RIDGE).solve(y).numpy()

            contenders = {
                "kullback": ours,
                "qmcpy": lambda k=theirs, p=their_points, y=y, kind=kind: peer_solve(kind, k, p, y),
            }
            error = None
            if count <= 1 << 10:
                same = dense_solve(theirs, lambda n, p=points: p.points(n).numpy(), y)
                error = {"kullback": relative(ours(), same)}
            case = f"{kind}, kernel set up and solved, {count}"
            rows += table(case, contenders, 1.0, error, min(ROUNDS, 5), inner=inner(count))
            curve.append((count, rows[-2]["ms"]))
            if count <= 1 << 10:
                dense = lambda k=theirs, p=their_points, y=y: dense_solve(k, p, y)  # noqa: E731
                rows += table(f"{case}, dense", {"kullback": ours, "numpy": dense}, 1.0, None, min(ROUNDS, 3))
        (first, low), (last, high) = curve[1], curve[-1]
        slopes[kind] = round(math.log(high / low) / math.log(last / first), 3)
        expected = math.log(last * math.log(last) / (first * math.log(first))) / math.log(last / first)
        print(f"{kind}: time grows as n^{slopes[kind]} from {first} to {last}; n log n is n^{expected:.3f} there")
    return rows, slopes


def keister(x):
    return math.pi**1.5 * torch.cos(normal_quantile(x).norm(dim=-1) / math.sqrt(2))


def cubatures():
    """Keister's integral in three dimensions to 1e-3; the error is the true one."""
    rows = []
    cases = {
        "net": (DigitalNetB2, "net", qmcpy.DigitalNetB2, qmcpy.CubQMCNetG, {}),
        "lattice": (Lattice, "lattice", qmcpy.Lattice, qmcpy.CubQMCLatticeG, {}),
        "lattice, Bayes": (Lattice, "bayes", qmcpy.Lattice, qmcpy.CubQMCBayesLatticeG, {"n_min": 256}),
    }
    for name, (make, method, peer_points, peer, options) in cases.items():

        def ours(make=make, method=method, options=options):
            return integrate(keister, make(3, generator=seeded()), method, abs_tol=1e-3, **options)

        def theirs(peer_points=peer_points, peer=peer):
            return peer(qmcpy.Keister(peer_points(3, seed=7)), abs_tol=1e-3).integrate()

        error = {"kullback": abs(ours().value.item() - 2.168309102165481)}
        error["qmcpy"] = abs(float(np.squeeze(theirs()[0])) - 2.168309102165481)
        rows += table(f"Keister to 1e-3, {name}", {"kullback": ours, "qmcpy": theirs}, None, error)
        rows[-2]["points"], rows[-1]["points"] = ours().n, int(theirs()[1].n_total)
    return rows


MEMORY = {
    "net, lms ds, 1048576 x 4": (DigitalNetB2, qmcpy.DigitalNetB2, 1 << 20, 4, {}, {}),
    "lattice, shift, 1048576 x 4": (Lattice, qmcpy.Lattice, 1 << 20, 4, {}, {}),
    "Halton, lms dp, 16384 x 20": (Halton, qmcpy.Halton, 1 << 14, 20, {}, {}),
    "net, nus, 4096 x 4": (DigitalNetB2, qmcpy.DigitalNetB2, 1 << 12, 4, {"randomize": "nus"}, {"randomize": "NUS"}),
}


def prepared(case, who):
    """For the process in which memory is measured: kernels are compiled and loaded by a small call before."""
    make, peer, count, d, options, peer_options = MEMORY[case]
    if who == "kullback":
        make(d, generator=seeded(), **options).points(8)
        points = make(d, generator=seeded(), **options)
        return lambda: points.points(count)
    peer(d, seed=7, **peer_options)(8)
    theirs = peer(d, seed=7, **peer_options)
    return lambda: theirs(count)


def memory():
    rows = []
    for case, (_, _, count, d, *_) in MEMORY.items():
        peaks = {who: peak_memory(__file__, "prepared", case, who) / 1e6 for who in ("kullback", "qmcpy")}
        for who, peak in peaks.items():
            row = {"case": case, "who": who, "mb": round(peak, 1), "of_the_points": round(8e-6 * count * d, 1)}
            rows.append(row | {"ratio": round(peak / max(peaks["kullback"], 0.01), 2)})
            print(f"{case:46} {who:14} {peak:11.1f} MB  x {rows[-1]['ratio']:8.2f}", flush=True)
    return rows


def main():
    rows = nets() + lattices() + haltons() + nested() + transforms()
    solved, slopes = kernels()
    content = {
        "environment": environment(),
        "threads": 1,
        "peers": {name: version(name) for name in ("qmcpy", "qmctoolscl", "scipy", "torch", "numba")},
        "bars": BARS,
        "rounds": ROUNDS,
        "rows": rows + solved + cubatures(),
        "slopes": slopes,
        "memory": memory(),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
