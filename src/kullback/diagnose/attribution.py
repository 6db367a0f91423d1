r"""Data attribution: what a model would say had some of its training examples not been there.

    datamodel     g_x(S) = b_x + sum_j beta_xj [j in S], fitted to the outputs of models trained on random subsets;
                  without F the outputs are f(x) - sum_{j in F} beta_xj
    TRAK          beta_xj = phi(x)^T (Phi^T W Phi + l I)^-1 phi_j (1 - p_j), phi the projected gradient of the margin
    influence     the same with the exact gradients of a linear model: a Newton step without the leverage
    ridge         leaving a set out of least squares, exactly, by the identity of Woodbury

Shapes: M models, n training and k evaluation points, C outputs, D parameters. Sources: arXiv 2202.00622 (datamodels),
2303.14186 (TRAK), 2410.23232 (their use for unlearning).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kullback.core.errors import ConfigError, MissingExtra, ShapeError

__all__ = ["TRAKFeatures", "fit_datamodels", "logistic_influence", "predict_without", "ridge_without"]


def fit_datamodels(
    masks: Tensor, outputs: Tensor, *, penalty: float = 1.0, method: Literal["ridge", "lasso"] = "ridge"
) -> tuple[Tensor, Tensor]:
    """(beta [n, k, C], intercept [k, C]) of masks [M, n] of who was in the data and outputs [M, k, C]; float64.

    ridge: one solve for all outputs, penalty as in scikit-learn's Ridge; lasso: by scikit-learn, output by output.
    Raises ShapeError, ConfigError, MissingExtra for lasso without scikit-learn.

    >>> masks = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    >>> fit_datamodels(masks, 3.0 * masks.unsqueeze(-1) + 1.0, penalty=1e-9)[0].round(decimals=6)
    tensor([[[3.]]], dtype=torch.float64)
    """
    if masks.ndim != 2 or outputs.ndim != 3 or len(masks) != len(outputs) or len(masks) < 2:
        shapes = f"{tuple(masks.shape)} and {tuple(outputs.shape)}"
        raise ShapeError(f"masks are [M, n] and outputs [M, k, C] of the same models, two at least, got {shapes}")
    if not penalty >= 0.0:
        raise ConfigError(f"the penalty is 0 or more, got {penalty}")
    x, y = masks.double(), outputs.double().flatten(1)
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred, response = x - mean_x, y - mean_y
    if method == "lasso":
        beta = _lasso(centred, response, penalty)
    elif method == "ridge":
        beta = _ridge(centred, response, penalty)
    else:
        raise ConfigError(f"method is ridge or lasso, not {method!r}")
    intercept = mean_y - mean_x @ beta
    return beta.view(-1, *outputs.shape[1:]), intercept.view(outputs.shape[1:])


def _ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """In the smaller of the two dimensions."""
    models, points = x.shape
    if models < points:
        gram = x @ x.T + penalty * torch.eye(models, dtype=x.dtype)
        return x.T @ torch.linalg.solve(gram, y)
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(points, dtype=x.dtype), x.T @ y)


def _lasso(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    try:
        from sklearn.linear_model import Lasso
    except ImportError as error:
        raise MissingExtra("scikit-learn", extra="sklearn") from error
    fitted = Lasso(alpha=penalty, fit_intercept=False, max_iter=10_000).fit(x.numpy(), y.numpy())
    return torch.as_tensor(fitted.coef_, dtype=torch.float64).view(y.shape[1], -1).T.contiguous()


def predict_without(
    beta: Tensor, base_outputs: Tensor, forget: Tensor | Sequence[int], *, scale: float = 1.0
) -> Tensor:
    """The outputs [..., k, C] that models with base_outputs would have without the training points `forget` (numbers).

    scale: of the predicted shift, to be calibrated on held-out sets where subsets were far from the whole data.
    """
    places = torch.as_tensor(forget, dtype=torch.long)
    if base_outputs.shape[-2:] != beta.shape[1:]:
        shapes = f"{tuple(base_outputs.shape)} and {tuple(beta.shape)}"
        raise ShapeError(f"outputs are [..., k, C] and beta [n, k, C], got {shapes}")
    return base_outputs - scale * beta[places].sum(0).to(base_outputs.dtype)


class TRAKFeatures:
    """Projected gradients of a model's margin, and the attributions that they give.

    model: a module from [n, ...] to logits [n, C]; dimensions: of the random projection, None for the gradients
    themselves; penalty: l; chunk: points at once. Projections are signs from the generator, divided by sqrt(k).
    """

    def __init__(
        self, model: torch.nn.Module, *, dimensions: int | None, generator: torch.Generator, penalty: float = 1e-3,
        chunk: int = 256,
    ) -> None:  # fmt: skip
        self.model, self.penalty, self.chunk = model, penalty, chunk
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        size = sum(p.numel() for p in self.parameters.values())
        self.projection: Tensor | None = None
        if dimensions is not None:
            if dimensions < 1:
                raise ConfigError(f"a projection has a dimension at least, got {dimensions}")
            signs = torch.randint(2, (size, dimensions), generator=generator, dtype=torch.int8)
            self.projection = (2.0 * signs.float() - 1.0) / math.sqrt(dimensions)

    def features(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """phi [n, k]: the gradient of each point's margin."""
        found = torch.func.vmap(torch.func.grad(self._margin), in_dims=(None, 0, 0))
        parts = []
        for start in range(0, len(inputs), self.chunk):
            rows = slice(start, start + self.chunk)
            gradients = found(self.parameters, inputs[rows], labels[rows])
            flat = torch.cat([g.flatten(1) for g in gradients.values()], 1)
            parts.append(flat if self.projection is None else flat @ self.projection.to(flat.dtype))
        return torch.cat(parts)

    def scores(
        self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, weighted: bool = True
    ) -> Tensor:
        """beta [n, k]: what each training point adds to the margin of each test point; inputs and labels of both.

        weighted: rows of Phi^T W Phi by p (1 - p), the curvature of the loss; without it plain TRAK.
        """
        phi, other = self.features(*train), self.features(*test)
        with torch.no_grad():
            right = self.model(train[0]).softmax(-1).gather(1, train[1].unsqueeze(1)).squeeze(1)
        rows = phi * (right * (1.0 - right)).sqrt().unsqueeze(1) if weighted else phi
        gram = rows.T @ rows + self.penalty * torch.eye(rows.shape[1], dtype=rows.dtype)
        return (phi * (1.0 - right).unsqueeze(1)) @ torch.linalg.solve(gram, other.T)

    def _margin(self, parameters: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        logits: Any = torch.func.functional_call(self.model, parameters, (one.unsqueeze(0),))
        mine = torch.arange(logits.shape[-1], device=logits.device) == label
        own = torch.where(mine, logits[0], 0.0).sum()
        return own - logits[0].masked_fill(mine, -math.inf).logsumexp(0)


def logistic_influence(inputs: Tensor, labels: Tensor, coefficients: Tensor, test: Tensor, *, penalty: float) -> Tensor:
    """beta [n, k]: how much each point adds to the log-odds of test inputs [k, D] under logistic regression.

    inputs [n, D], labels [n] in {0, 1}, coefficients [D] at the optimum of the summed loss with penalty / 2 |w|^2: one
    Newton step, without the factor 1 / (1 - leverage).
    """
    odds = inputs @ coefficients
    chance = odds.sigmoid()
    hessian = (inputs * (chance * (1.0 - chance)).unsqueeze(1)).T @ inputs
    hessian = hessian + penalty * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    residual = (labels.to(inputs.dtype) - chance).unsqueeze(1)
    return (inputs * residual) @ torch.linalg.solve(hessian, test.T)


def ridge_without(
    inputs: Tensor, targets: Tensor, forget: Tensor | Sequence[int], *, penalty: float
) -> tuple[Tensor, Tensor]:
    """(coefficients of all data, coefficients without `forget`) of ridge regression, [D] each, the second by Woodbury.

    inputs [n, D], targets [n]; the penalty is on the summed squares. Only a system of the size of the set is solved.
    """
    places = torch.as_tensor(forget, dtype=torch.long)
    gram = inputs.T @ inputs + penalty * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    whole = torch.linalg.solve(gram, inputs.T @ targets)
    rows = inputs[places]
    spread = torch.linalg.solve(gram, rows.T)
    hat = rows @ spread
    residual = targets[places] - rows @ whole
    step = torch.linalg.solve(torch.eye(len(places), dtype=inputs.dtype) - hat, residual)
    return whole, whole - spread @ step
