r"""CS-IB: regression through a bottleneck t = e(x), yhat = h(t), both of whose terms are Cauchy-Schwarz divergences.

    min over e and h:   D_CS(p(y|x); q(yhat|x)) + beta I_CS(x; t),

estimated from the kernels of a batch (`conditional_cs`, `cs_qmi_normalized`): no normal output, hence no squared error,
and no variational bound. Bandwidths are of standardised inputs and targets; where |y - yhat| is many sigma_y the
gradient is small, so standardise. Attacks on the inputs, by which such regressors are judged, are here as well.
`kullback.distill.CSIBRegressor` is the whole in the manners of scikit-learn. Source: arXiv 2404.17951.

Shapes: inputs x [n, d], targets y and predictions yhat [n, o] or [n], representation t [n, k].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.distill.sinkd import gather_rows
from kullback.divergences.cauchy_schwarz_samples import conditional_cs, cs_qmi_normalized, median_bandwidth
from kullback.models.perceptron import perceptron

__all__ = ["Bandwidth", "Bottleneck", "BottleneckOutput", "CSIBLoss", "bandwidth_of", "fgsm", "pgd"]

Bandwidth = float | Literal["sqrt_d", "median"]
RegressionLoss = Callable[[Tensor, Tensor], Tensor]


def bandwidth_of(rows: Tensor, kind: Bandwidth) -> float:
    """The bandwidth for rows [n, d]: a number as it is, "sqrt_d" the root of d, "median" the median distance.

    Raises ConfigError for another word or number, and with "median" what `median_bandwidth` raises.

    >>> bandwidth_of(torch.zeros(5, 9), "sqrt_d"), bandwidth_of(torch.zeros(5, 9), 0.5)
    (3.0, 0.5)
    """
    _check_bandwidth(kind)
    if kind == "sqrt_d":
        return math.sqrt(rows.shape[-1])
    if kind == "median":
        return median_bandwidth(rows.reshape(-1, rows.shape[-1]))
    return float(kind)


def _check_bandwidth(kind: Bandwidth) -> None:
    if kind not in ("sqrt_d", "median") and not (isinstance(kind, int | float) and 0.0 < kind < math.inf):
        raise ConfigError(f'a bandwidth is a finite number above 0, "sqrt_d" or "median", not {kind!r}')


class CSIBLoss(nn.Module):
    """The terms of the objective on a batch and their sum: {"loss", "prediction", "compression"}.

    beta: the weight of compression, which is not computed at 0 (the paper's grid: 1e-4 to 1). sigma_x, sigma_y,
    sigma_t: as in `bandwidth_of`; the paper has 1 for all. symmetric: see `conditional_cs`. gather: over the rows of
    all processes. The quality of both estimates grows with the batch: take 128 rows or more. Raises ConfigError for
    values out of range, and what the estimators raise.

    >>> x, y = torch.eye(4), torch.tensor([0.0, 1.0, 2.0, 3.0])
    >>> terms = CSIBLoss(beta=0.1)(x, y, y + torch.tensor([0.0, 0.5, 0.0, -0.5]), x)
    >>> {name: round(value.item(), 4) for name, value in terms.items()}
    {'loss': 0.1737, 'prediction': 0.0737, 'compression': 1.0}
    """

    def __init__(
        self,
        *,
        beta: float = 1e-2,
        sigma_x: Bandwidth = "sqrt_d",
        sigma_y: Bandwidth = 1.0,
        sigma_t: Bandwidth = "sqrt_d",
        symmetric: bool = True,
        gather: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= beta < math.inf:
            raise ConfigError(f"beta is the weight of compression, 0 or more, and is {beta}")
        for kind in (sigma_x, sigma_y, sigma_t):
            _check_bandwidth(kind)
        self.beta, self.symmetric, self.gather = beta, symmetric, gather
        self.sigma_x, self.sigma_y, self.sigma_t = sigma_x, sigma_y, sigma_t

    def extra_repr(self) -> str:
        widths = f"sigma_x={self.sigma_x}, sigma_y={self.sigma_y}, sigma_t={self.sigma_t}"
        return f"beta={self.beta}, {widths}, symmetric={self.symmetric}"

    def forward(self, x: Tensor, y: Tensor, yhat: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The scalar terms from inputs or features x [n, d], targets, predictions and representation t [n, k]."""
        y, yhat = (value.unsqueeze(-1) if value.ndim == 1 else value for value in (y, yhat))
        if self.gather:
            x, y, yhat, t = (gather_rows(value) for value in (x, y, yhat, t))
        sigma_x = bandwidth_of(x, self.sigma_x)
        sigma_y = bandwidth_of(y, self.sigma_y)
        prediction = conditional_cs(x, y, yhat, sigma_x=sigma_x, sigma_y=sigma_y, symmetric=self.symmetric)
        compression = torch.zeros_like(prediction)
        if self.beta > 0.0:
            compression = cs_qmi_normalized(x, t, sigma_x=sigma_x, sigma_t=bandwidth_of(t, self.sigma_t))
        return {
            "loss": prediction + self.beta * compression,
            "prediction": prediction,
            "compression": compression,
        }


class BottleneckOutput(NamedTuple):
    """Predictions [n, o], the representation t [n, k], its mean [n, k] and, if stochastic, its log-variance [n, k]."""

    prediction: Tensor
    representation: Tensor
    mean: Tensor
    log_variance: Tensor | None


class Bottleneck(nn.Module):
    """An encoder inputs-hidden with linear heads to k, and a decoder k-width-outputs, with ReLU in between.

    hidden: the widths of the encoder, of which the last is the decoder's too (the paper: three of 128, and k = 128).
    stochastic: t = mean + exp(log-variance / 2) noise where forward gets a generator, and the mean where it gets none.
    generator: of the first weights, uniform within 1 / sqrt(fan-in). Raises ConfigError for a width below 1, and
    ShapeError for rows that are not [n, inputs].
    """

    def __init__(
        self,
        inputs: int,
        outputs: int = 1,
        *,
        hidden: Sequence[int] = (128, 128),
        k: int = 16,
        stochastic: bool = False,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if not hidden or min(inputs, outputs, k, *hidden) < 1:
            raise ConfigError(f"widths are at least 1, one of them hidden: {inputs}, {tuple(hidden)}, {k}, {outputs}")
        self.inputs = inputs
        self.encoder = perceptron(inputs, *hidden, generator=generator)
        self.encoder.append(nn.ReLU())
        width = hidden[-1]
        self.mean = perceptron(width, k, generator=generator)
        self.log_variance = perceptron(width, k, generator=generator) if stochastic else None
        self.decoder = perceptron(k, width, outputs, generator=generator)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> BottleneckOutput:
        """All that a loss may want of rows x [n, d]; noise is drawn from the generator."""
        if x.ndim < 2 or x.shape[-1] != self.inputs:
            raise ShapeError(f"the network takes rows [n, {self.inputs}], got {tuple(x.shape)}")
        features = self.encoder(x)
        mean = self.mean(features)
        log_variance = None if self.log_variance is None else self.log_variance(features)
        t = mean
        if log_variance is not None and generator is not None:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=generator.device)
            t = mean + (0.5 * log_variance).exp() * noise.to(mean.device)
        return BottleneckOutput(self.decoder(t), t, mean, log_variance)


# --- attacks


def fgsm(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, eps: float, loss: RegressionLoss | None = None
) -> Tensor:
    """Inputs [n, d] moved by eps in each coordinate, to where the loss of model(x) rises first.

    loss(prediction, target) is a scalar, squared error by default. Raises what `pgd` raises.

    >>> fgsm(lambda x: x.sum(-1), torch.tensor([[1.0, 2.0]]), torch.tensor([0.0]), eps=0.5)
    tensor([[1.5000, 2.5000]])
    """
    return pgd(model, x, y, eps=eps, alpha=eps, steps=1, loss=loss)


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    clamp: tuple[float, float] | None = None,
    loss: RegressionLoss | None = None,
) -> Tensor:
    """`steps` such moves of length alpha, never further than eps from x in a coordinate, nor out of the range clamp.

    Gradients of the model's parameters are left as they are. Raises ConfigError for numbers out of range, DataError for
    inputs that are not finite, and ShapeError where predictions do not match y or a loss of your own is no scalar.

    >>> pgd(lambda x: x.sum(-1), torch.tensor([[1.0, 2.0]]), torch.tensor([0.0]), eps=0.5, alpha=0.3, steps=3)
    tensor([[1.5000, 2.5000]])
    """
    if not (0.0 <= eps < math.inf and 0.0 <= alpha < math.inf and steps >= 1):
        raise ConfigError(f"eps and alpha are lengths and steps a count, got {eps}, {alpha} and {steps}")
    if clamp is not None and not clamp[0] <= clamp[1]:
        raise ConfigError(f"clamp is the range of the inputs, from low to high, got {clamp}")
    if not x.is_floating_point() or not bool(x.detach().isfinite().all()):
        raise DataError("an attack moves finite inputs of a floating type: what it was given is not")
    risk = _squared_error if loss is None else loss
    moved = x.detach()
    for _ in range(steps):
        at = moved.clone().requires_grad_()
        harm = risk(model(at), y)
        if harm.ndim:
            raise ShapeError(f"the loss of an attack is a scalar over all rows, got {tuple(harm.shape)}")
        (slope,) = torch.autograd.grad(harm, at)
        moved = torch.clamp(moved + alpha * slope.sign(), x.detach() - eps, x.detach() + eps)
        moved = moved if clamp is None else moved.clamp(*clamp)
    return moved


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    if prediction.shape != target.shape:
        raise ShapeError(
            f"predictions {tuple(prediction.shape)} and targets {tuple(target.shape)} have one shape: squeeze a column"
        )
    return nn.functional.mse_loss(prediction, target)
