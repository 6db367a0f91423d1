r"""Data attribution: what a model would say had some of its training examples not been there.

    datamodel     g_x(S) = b_x + sum_j beta_xj [j in S], fitted to the outputs of models trained on random subsets;
                  without F the outputs are f(x) - sum_{j in F} beta_xj
    TRAK          beta_xj = phi(x)^T (Phi^T W Phi + l I)^-1 phi_j (1 - p_j), phi the projected gradient of the margin;
                  phi(x) of each centred logit instead gives what point j adds to all C outputs of x
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

from kullback.core.errors import ConfigError, DataError, MissingExtra, ShapeError

__all__ = [
    "TRAKFeatures",
    "calibrated_scale",
    "ensemble_scores",
    "fit_datamodels",
    "logistic_influence",
    "predict_without",
    "ridge_without",
]


def _check_penalty(penalty: float) -> None:
    if not 0.0 <= penalty < math.inf:
        raise ConfigError(f"the penalty is 0 or more and finite, got {penalty}")


def _check_numbers(**given: Tensor) -> None:
    for name, x in given.items():
        if bool(x.isnan().any()):
            raise DataError(f"{name} have NaN: a model has diverged or a point is broken, leave it out")


def _places(forget: Tensor | Sequence[int], count: int) -> Tensor:
    """Checked numbers of training points [f]."""
    places = torch.as_tensor(forget)
    fine = places.ndim == 1 and not (len(places) and (places.is_floating_point() or places.dtype == torch.bool))
    places = places.long()
    fine = fine and len(places.unique()) == len(places)
    if not fine or (len(places) and not 0 <= places.min() <= places.max() < count):
        raise ShapeError(f"forget has numbers of {count} training points from 0 on, none twice, got {forget}")
    return places


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    try:
        return torch.linalg.solve(matrix, right)
    except torch.linalg.LinAlgError as error:
        raise DataError("the equations have no single solution: raise the penalty, or take more models") from error


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
    if masks.ndim != 2 or outputs.ndim != 3 or len(masks) != len(outputs) or len(masks) < 2 or not masks.shape[1]:
        shapes = f"{tuple(masks.shape)} and {tuple(outputs.shape)}"
        raise ShapeError(f"masks are [M, n] and outputs [M, k, C] of the same models, two at least, got {shapes}")
    _check_penalty(penalty)
    _check_numbers(masks=masks, outputs=outputs)
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
        return x.T @ _solved(gram, y)
    return _solved(x.T @ x + penalty * torch.eye(points, dtype=x.dtype), x.T @ y)


def _lasso(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    try:
        from sklearn.linear_model import Lasso
    except ImportError as error:
        raise MissingExtra("scikit-learn", extra="sklearn") from error
    fitted = Lasso(alpha=penalty, fit_intercept=False, max_iter=10_000).fit(x.numpy(), y.numpy())
    return torch.as_tensor(fitted.coef_, dtype=torch.float64).view(y.shape[1], -1).T.contiguous()


def predict_without(
    beta: Tensor, base_outputs: Tensor, forget: Tensor | Sequence[int], *, scale: float | Tensor = 1.0
) -> Tensor:
    """The outputs [..., k, C] that models with base_outputs would have without the training points `forget` (numbers).

    scale: of the predicted shift, a number or one a point as [k, 1]; calibrate it on held-out sets (`calibrated_scale`)
    where the subsets were far from the whole data. Raises ShapeError, also for numbers out of range or given twice.
    """
    places = _places(forget, len(beta))
    if base_outputs.shape[-2:] != beta.shape[1:]:
        shapes = f"{tuple(base_outputs.shape)} and {tuple(beta.shape)}"
        raise ShapeError(f"outputs are [..., k, C] and beta [n, k, C], got {shapes}")
    _check_numbers(beta=beta[places])
    return base_outputs - scale * beta[places].sum(0).to(base_outputs.dtype)


def calibrated_scale(
    beta: Tensor, masks: Tensor, outputs: Tensor, base_outputs: Tensor, *, where: Tensor | None = None
) -> float:
    """The factor on predicted shifts that fits best those seen in models which beta [n, k, C] was not fitted to.

    masks [M, n] of who was in the data of the held-out models, outputs [M, k, C] of them, base_outputs [k, C] or
    [M, k, C] of models of all data: the least-squares slope of outputs - base_outputs on (masks - 1) beta. where
    [M, k]: the points of each model that count; `masks == 0` for those left out, when the k are the training points.
    Raises ShapeError, DataError where nothing is predicted to move.

    >>> beta, masks = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> calibrated_scale(beta, masks, 5.0 - 1.5 * torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[5.0]]))
    1.5
    """
    models, points = len(masks), beta.shape[1]
    if not models:
        raise DataError("no held-out model was given: retrain some without sets of points, and pass masks and outputs")
    _check_numbers(outputs=outputs, base_outputs=base_outputs)
    if masks.shape != (models, len(beta)) or outputs.shape != (models, *beta.shape[1:]):
        shapes = f"{tuple(beta.shape)}, {tuple(masks.shape)} and {tuple(outputs.shape)}"
        raise ShapeError(f"beta is [n, k, C], masks [M, n] and outputs [M, k, C] of the held-out models, got {shapes}")
    if base_outputs.shape not in (outputs.shape, outputs.shape[1:]):
        raise ShapeError(f"base_outputs are [k, C] or [M, k, C], got {tuple(base_outputs.shape)}")
    if where is not None and where.shape != (models, points):
        raise ShapeError(f"where is [models, points] = {(models, points)}, got {tuple(where.shape)}")
    predicted = ((masks.double() - 1.0) @ beta.double().flatten(1)).view(outputs.shape)
    seen = outputs.double() - base_outputs.double()
    if where is not None:
        predicted, seen = predicted[where.bool()], seen[where.bool()]
    size = predicted.square().sum().item()
    if not size > 0.0:
        raise DataError("no output is predicted to move: leave points out of the held-out models, or count more points")
    return (predicted * seen).sum().item() / size


class TRAKFeatures:
    """Projected gradients of a model's outputs, and the attributions that they give.

    model: a module from [n, ...] to logits [n, C]; dimensions: of the random projection, None for the gradients
    themselves; penalty: l; chunk: points at once. A dense projection is of signs from the generator, over sqrt(k); a
    sparse one adds each entry of a gradient, with a random sign, to one dimension, which costs a pass and no product.
    """

    def __init__(
        self, model: torch.nn.Module, *, dimensions: int | None, generator: torch.Generator, penalty: float = 1e-3,
        chunk: int = 256, projection: Literal["dense", "sparse"] = "dense",
    ) -> None:  # fmt: skip
        self.model, self.penalty, self.chunk = model, penalty, chunk
        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        size = sum(p.numel() for p in self.parameters.values())
        self.projection: Tensor | None = None
        self.places: Tensor | None = None  # of a sparse projection, whose signs are the projection's one column
        self.dimensions = dimensions
        _check_penalty(penalty)
        if chunk < 1 or not size:
            raise ConfigError(f"chunk is 1 or more and the model has parameters, got {chunk} and {size} parameters")
        if dimensions is not None:
            if dimensions < 1:
                raise ConfigError(f"a projection has a dimension at least, got {dimensions}")
            if projection not in ("dense", "sparse"):
                raise ConfigError(f'projection is "dense" or "sparse", not {projection!r}')
            columns = dimensions if projection == "dense" else 1
            signs = 2.0 * torch.randint(2, (size, columns), generator=generator, dtype=torch.int8).float() - 1.0
            self.projection = signs / math.sqrt(columns)
            if projection == "sparse":
                self.places = torch.randint(dimensions, (size,), generator=generator)

    def features(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """phi [n, k]: the gradient of each point's margin. Raises ShapeError, DataError."""
        self._check(inputs)
        if labels.shape != inputs.shape[:1] or labels.is_floating_point():
            shapes = f"{tuple(inputs.shape)} and {tuple(labels.shape)} of {labels.dtype}"
            raise ShapeError(f"inputs are [n, ...] and labels [n] whole numbers, one a point, got {shapes}")
        with torch.no_grad():
            classes = self.model(inputs[:1]).shape[-1]
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise DataError(f"labels are from 0 to {classes - 1}, as the model has outputs, and one is not")
        found = torch.func.vmap(torch.func.grad(self._margin), in_dims=(None, 0, 0))
        parts = []
        for start in range(0, len(inputs), self.chunk):
            rows = slice(start, start + self.chunk)
            gradients = found(self.parameters, inputs[rows], labels[rows])
            parts.append(self._projected(torch.cat([g.flatten(1) for g in gradients.values()], 1)))
        return torch.cat(parts)

    def logit_features(self, inputs: Tensor) -> Tensor:
        """phi [n, C, k]: the gradients of each point's logits less their mean over classes."""
        self._check(inputs)
        found = torch.func.vmap(torch.func.jacrev(self._logits), in_dims=(None, 0))
        parts = []
        for start in range(0, len(inputs), self.chunk):
            slopes = found(self.parameters, inputs[start : start + self.chunk])
            parts.append(self._projected(torch.cat([g.flatten(2) for g in slopes.values()], 2)))
        return torch.cat(parts)

    def _projected(self, flat: Tensor) -> Tensor:
        """Gradients [..., D] to [..., k]."""
        if self.projection is None:
            return flat
        signs = self.projection.to(flat)
        if self.places is None:
            return flat @ signs
        empty = flat.new_zeros(*flat.shape[:-1], self.dimensions or 0)
        return empty.index_add_(-1, self.places.to(flat.device), flat * signs.squeeze(1))

    def _check(self, inputs: Tensor) -> None:
        if not len(inputs):
            raise ShapeError(f"inputs are [n, ...] of one point at least, got {tuple(inputs.shape)}")
        _check_numbers(inputs=inputs)

    def scores(
        self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, weighted: bool = True
    ) -> Tensor:
        """beta [n, k]: what each training point adds to the margin of each test point; inputs and labels of both.

        weighted: rows of Phi^T W Phi by p (1 - p), the curvature of the loss; without it plain TRAK.
        """
        pull, reach = self._parts(train, self.features(*test), weighted)
        return pull.unsqueeze(1) * reach

    def logit_scores(self, train: tuple[Tensor, Tensor], inputs: Tensor, *, weighted: bool = True) -> Tensor:
        """beta [n, k, C]: what each training point adds to every centred logit of the inputs; for `predict_without`."""
        other = self.logit_features(inputs)
        pull, reach = self._parts(train, other.flatten(0, 1), weighted)
        return (pull.unsqueeze(1) * reach).view(-1, *other.shape[:2])

    def _parts(self, train: tuple[Tensor, Tensor], other: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
        """(1 - p_j [n], phi_j^T (Phi^T W Phi + l I)^-1 of the others [n, k]), solved in the smaller dimension."""
        phi = self.features(*train)
        with torch.no_grad():
            right = self.model(train[0]).softmax(-1).gather(1, train[1].unsqueeze(1)).squeeze(1)
        bend = (right * (1.0 - right)).double() if weighted else torch.ones(len(phi), dtype=torch.float64)
        rows, columns = phi.double(), other.double().T
        eye = self.penalty * torch.eye(min(rows.shape), dtype=rows.dtype)
        if len(rows) < rows.shape[1]:  # Phi (Phi^T W Phi + l)^-1 = (Phi Phi^T W + l)^-1 Phi
            reach = _solved((rows @ rows.T) * bend + eye, rows @ columns)
        else:
            reach = rows @ _solved((rows.T * bend) @ rows + eye, columns)
        return 1.0 - right, reach.to(phi.dtype)

    def _logits(self, parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(self.model, parameters, (one.unsqueeze(0),))
        return logits[0] - logits[0].mean()

    def _margin(self, parameters: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        logits: Any = torch.func.functional_call(self.model, parameters, (one.unsqueeze(0),))
        mine = torch.arange(logits.shape[-1], device=logits.device) == label
        own = torch.where(mine, logits[0], 0.0).sum()
        return own - logits[0].masked_fill(mine, -math.inf).logsumexp(0)


def ensemble_scores(
    members: Sequence[TRAKFeatures], train: tuple[Tensor, Tensor], test: Tensor | tuple[Tensor, Tensor], *,
    weighted: bool = True,
) -> Tensor:  # fmt: skip
    """Scores averaged over models of one kind: beta [n, k, C] of test inputs, or [n, k] of test inputs with labels.

    As in TRAK, the mean of 1 - p_j times the mean of the rest: the two are averaged apart. Raises ConfigError.
    """
    if not members:
        raise ConfigError("scores are averaged over one model at least, got none")
    pulls, reaches = [], []
    for member in members:
        if isinstance(test, Tensor):
            other = member.logit_features(test)
        else:
            other = member.features(*test)
        pull, reach = member._parts(train, other.flatten(0, -2), weighted)
        pulls.append(pull)
        reaches.append(reach.view(-1, *other.shape[:-1]))
    reached = torch.stack(reaches).mean(0)
    return torch.stack(pulls).mean(0).view(-1, *[1] * (reached.ndim - 1)) * reached


def logistic_influence(inputs: Tensor, labels: Tensor, coefficients: Tensor, test: Tensor, *, penalty: float) -> Tensor:
    """beta [n, k]: how much each point adds to the log-odds of test inputs [k, D] under logistic regression.

    inputs [n, D], labels [n] in {0, 1}, coefficients [D] at the optimum of the summed loss with penalty / 2 |w|^2: one
    Newton step, without the factor 1 / (1 - leverage). Raises ShapeError, ConfigError, DataError.
    """
    _check_penalty(penalty)
    fits = inputs.ndim == test.ndim == 2 and labels.shape == inputs.shape[:1]
    if not fits or not coefficients.shape == inputs.shape[1:] == test.shape[1:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (inputs, labels, coefficients, test))
        raise ShapeError(f"inputs are [n, D], labels [n], coefficients [D] and test [k, D], got {shapes}")
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise DataError("labels are 0 or 1 in logistic regression, and some are neither")
    odds = inputs @ coefficients
    chance = odds.sigmoid()
    hessian = (inputs * (chance * (1.0 - chance)).unsqueeze(1)).T @ inputs
    hessian = hessian + penalty * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    residual = (labels.to(inputs.dtype) - chance).unsqueeze(1)
    return (inputs * residual) @ _solved(hessian, test.T)


def ridge_without(
    inputs: Tensor, targets: Tensor, forget: Tensor | Sequence[int], *, penalty: float
) -> tuple[Tensor, Tensor]:
    """(coefficients of all data, coefficients without `forget`) of ridge regression, [D] each, the second by Woodbury.

    inputs [n, D], targets [n]; the penalty is on the summed squares. Only a system of the size of the set is solved.
    Raises ShapeError, ConfigError, and DataError for NaN or where all points go and there is no penalty.
    """
    if inputs.ndim != 2 or targets.shape != inputs.shape[:1]:
        raise ShapeError(f"inputs are [n, D] and targets [n], got {tuple(inputs.shape)} and {tuple(targets.shape)}")
    _check_penalty(penalty)
    _check_numbers(inputs=inputs, targets=targets)
    places = _places(forget, len(inputs))
    if len(places) == len(inputs) and penalty == 0.0:
        raise DataError("no point is left and the penalty is 0: leave fewer out, or give a penalty")
    gram = inputs.T @ inputs + penalty * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    whole = _solved(gram, inputs.T @ targets)
    rows = inputs[places]
    spread = _solved(gram, rows.T)
    hat = rows @ spread
    residual = targets[places] - rows @ whole
    step = _solved(torch.eye(len(places), dtype=inputs.dtype) - hat, residual)
    return whole, whole - spread @ step
