"""What self-repellent walks do in the limit: covariances of visits and of an optimizer that a walking token drives.

With the spectrum P = sum lambda_i v_i u_i', u_i = diag(mu) v_i, v_i' diag(mu) v_j = 1{i = j}, lambda_N = 1 left out:

    gamma_n^-1/2 (x_n - mu) -> N(0, V),  V = sum_i 1 / (2 alpha (1 + lambda_i) + 2 - 1{a = 1})
                                             (1 + lambda_i) / (1 - lambda_i) u_i u_i'
    beta_n^-1/2 (theta_n - theta*) -> N(0, V),  (J + 1{b = 1} I / 2) V + V (J + 1{b = 1} I / 2)' + U = 0

with U = sum_i c_i (1 + lambda_i) / (1 - lambda_i) (H' u_i)(H' u_i)'; c_i = 1 / (alpha (1 + lambda_i) + 1)^2 where the
optimizer's step decays faster than the history's (a < b), 1 where it decays more slowly (a > b), and for a = b the
equation of the pair (theta, x), whose drift is [[J, H' dpi], [0, dpi - I]]. lambda = -1 contributes nothing.

Shapes: N nodes, d parameters. Source: Hu, Doshi and Eun 2024, arXiv 2401.09665, Theorems 3.2 and 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kullback.core.errors import DataError, ShapeError
from kullback.optim.chains import Chain
from kullback.optim.srrw import check_alpha, check_exponent

__all__ = ["chain_spectrum", "optimization_covariance", "sampling_covariance"]


def chain_spectrum(chain: Chain) -> tuple[Tensor, Tensor]:
    """The eigenvalues of P without the largest, [N - 1] and rising, and the left eigenvectors u as columns.

    >>> chain_spectrum(Chain.of(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.ones(2)))[0]
    tensor([0.5000], dtype=torch.float64)
    """
    root = chain.target.sqrt()
    symmetric = root.unsqueeze(1) * chain.matrix() / root
    values, vectors = torch.linalg.eigh(0.5 * (symmetric + symmetric.T))
    return values[:-1], root.unsqueeze(1) * vectors[:, :-1]


def _noise(values: Tensor) -> Tensor:
    """(1 + lambda) / (1 - lambda): the variance of a sum along the walk over that of independent terms."""
    return (1.0 + values).clamp(min=0.0) / (1.0 - values)


def sampling_covariance(chain: Chain, alpha: float, a: float = 0.8, weight_power: float | None = None) -> Tensor:
    """The limit covariance V of gamma_n^-1/2 (x_n - mu): [N, N]; of order 1 / alpha.

    weight_power p stands for gamma_n = (p + 1) / n, the history of visits weighted by n^p.
    """
    check_alpha(alpha)
    check_exponent("a", a)
    shrinkage = 1.0 / (weight_power + 1.0) if weight_power is not None else float(a == 1.0)
    values, vectors = chain_spectrum(chain)
    weights = _noise(values) / (2.0 * alpha * (1.0 + values) + 2.0 - shrinkage)
    return (vectors * weights) @ vectors.T


def optimization_covariance(chain: Chain, field: Tensor, jacobian: Tensor, alpha: float, a: float, b: float) -> Tensor:
    """The limit covariance V of beta_n^-1/2 (theta_n - theta*): [d, d]; of order 1 / alpha^2, 1 / alpha or 1.

    field [N, d]: H(theta*, i) of every node, minus the gradient of its loss, times the rate; jacobian [d, d]: J, the
    derivative of the mean field at theta*. Raises DataError where J, or J + I / 2 for b = 1, has an eigenvalue with a
    real part that is not negative, and where the mean field at theta* is not zero.
    """
    check_alpha(alpha)
    check_exponent("a", a)
    check_exponent("b", b)
    force, drift = (torch.as_tensor(x).detach().to("cpu", torch.float64) for x in (field, jacobian))
    if force.ndim != 2 or len(force) != chain.nodes or drift.shape != (force.shape[1],) * 2:
        raise ShapeError(
            f"field is [{chain.nodes}, d] and jacobian [d, d], not {tuple(force.shape)} and {tuple(drift.shape)}"
        )
    mean = (chain.target @ force).abs().max().item()
    if mean > 1e-6 * max(1.0, force.abs().max().item()):
        raise DataError(f"the mean field at theta* is zero, and here it is {mean:.3g}: give H at the optimum")
    values, vectors = chain_spectrum(chain)
    noise, projected = _noise(values), force.T @ vectors
    drift = drift + 0.5 * float(b == 1.0) * torch.eye(len(drift), dtype=torch.float64)
    if a != b:
        factor = (alpha * (1.0 + values) + 1.0) ** -2 if a < b else torch.ones_like(values)
        return _lyapunov(drift, (projected * (factor * noise)) @ projected.T)
    # In the coordinates z of x = mu + sum z_i u_i, dpi is -alpha (lambda_i + 1).
    size, slope = len(drift), -alpha * (1.0 + values)
    whole = torch.zeros(size + len(values), size + len(values), dtype=torch.float64)
    whole[:size, :size] = drift
    whole[:size, size:] = projected * slope
    whole[size:, size:] = torch.diag(slope - 1.0 + 0.5 * float(b == 1.0))
    both = torch.cat([projected, torch.eye(len(values), dtype=torch.float64)])
    return _lyapunov(whole, (both * noise) @ both.T)[:size, :size]


def _lyapunov(drift: Tensor, noise: Tensor) -> Tensor:
    """V with drift V + V drift' + noise = 0."""
    from scipy.linalg import solve_continuous_lyapunov

    worst = torch.linalg.eigvals(drift).real.max().item()
    if not worst < 0.0:
        raise DataError(
            f"the drift at theta* has an eigenvalue of real part {worst:.3g}, and all must be negative: add a ridge, "
            "or for b = 1 a larger rate"
        )
    solved = torch.from_numpy(solve_continuous_lyapunov(drift.numpy(), -noise.numpy()))
    return 0.5 * (solved + solved.T)
