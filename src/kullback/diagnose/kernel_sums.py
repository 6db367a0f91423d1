"""Sums of Gaussian kernels over many points and the nearest of them, in one pass of matrix products.

For queries x and points y of n rows, with l_i = -|x - y_i|^2 / (2 h^2), a pass gives log sum e^(l_i), and on demand
log sum e^(2 l_i) and the k nearest points. x y - |y|^2 / 2 stands for the distance (the centred |x|^2 is added at the
end), a block of products at a time, small enough for the cache; log-sums are gathered in float64. On the way each query
keeps the points above a threshold, which an eighth of the points sets and the k-th largest l_i so far raises; the
distances of the last k are then taken again from differences, where nothing cancels.

Shapes: queries [m, d], points [n, d]; results [m] and [m, k].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kullback.core.errors import ConfigError

__all__ = ["KernelSums", "Points", "nearest_distances"]

_QUERIES = 128
_GROUP = 8
_BYTES = 1 << 19  # of a block of products


class KernelSums(NamedTuple):
    """log sum e^l [m]; on demand log sum e^2l [m], and the squared distances [m, k], ascending, and whose they are."""

    log_sum: Tensor
    log_sum_squares: Tensor | None = None
    squared: Tensor | None = None
    points: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Points:
    """Points [n, d] laid out for passes: centred, with half their squared norms, in their own precision."""

    centre: Tensor
    rows: Tensor
    transposed: Tensor
    half_norms: Tensor

    @classmethod
    def of(cls, points: Tensor, *, single: bool) -> Points:
        """single: products in float32, with an error of about 1e-7 |x| |y| / h^2 in each l."""
        centre = points.double().mean(0)
        exact = points.double() - centre
        rows = exact.float() if single else exact
        return cls(centre, rows, rows.T.contiguous(), 0.5 * exact.square().sum(1))

    def centred(self, queries: Tensor) -> Tensor:
        """Queries [m, d] in the coordinates and the precision of the points."""
        return (queries.double() - self.centre).to(self.rows.dtype)

    def sums(
        self, queries: Tensor, h: float, *, squares: bool = False, nearest: int = 0, exclude: Tensor | None = None
    ) -> KernelSums:
        """A pass over the points for centred queries [m, d]; exclude [m]: the point that each query leaves out.

        Raises ConfigError where more nearest points are asked for than there are.
        """
        available = len(self.rows) - (exclude is not None)
        if nearest > available:
            raise ConfigError(f"{nearest} nearest points are asked for and there are {available}: ask for fewer")
        parts = []
        for start, rows in zip(range(0, len(queries), _QUERIES), queries.split(_QUERIES), strict=True):
            left_out = None if exclude is None else exclude[start : start + _QUERIES]
            parts.append(self._pass(rows, h, squares, nearest, left_out, sampled=len(self.rows) >= 64 * nearest > 0))
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
        return KernelSums(*columns)  # type: ignore[arg-type]

    def _pass(
        self, queries: Tensor, h: float, squares: bool, nearest: int, exclude: Tensor | None, sampled: bool
    ) -> tuple[Tensor | None, ...]:
        scale = 1.0 / (h * h)
        scaled = queries * scale
        bias = (-scale * self.half_norms).to(queries.dtype)
        offset = (-0.5 * scale) * queries.double().square().sum(1)
        block = _BYTES // (_QUERIES * queries.element_size())
        buffer = queries.new_empty(len(queries), block)
        floor = -40.0 if queries.dtype == torch.float32 else -300.0  # denormal numbers are slow, above all once squared
        log_sum = torch.full((len(queries),), -math.inf, dtype=torch.float64)
        log_squares = log_sum.clone()
        best = _Best(len(queries), nearest, block, queries.dtype) if nearest else None
        skipped = _by_block(exclude, block)
        if best is not None and sampled:
            best.threshold = self._threshold(scaled, bias, nearest).numpy()
        for start in range(0, len(self.rows), block):
            stop = min(start + block, len(self.rows))
            logits = buffer[:, : stop - start]
            torch.addmm(bias[start:stop], scaled, self.transposed[:, start:stop], out=logits)
            if start // block in skipped:
                logits[skipped[start // block]] = -math.inf
            if best is None:
                top = logits.amax(1)
            else:
                buffer[:, stop - start :] = -math.inf
                top = best.update(buffer, start)
            top.clamp_(min=torch.finfo(logits.dtype).min)
            logits.sub_(top.unsqueeze(1)).clamp_(min=floor).exp_()
            log_sum = torch.logaddexp(log_sum, logits.sum(1).double().log() + top)
            if squares:
                norms = torch.linalg.vector_norm(logits, dim=1)
                log_squares = torch.logaddexp(log_squares, 2.0 * (norms.double().log() + top))
        if best is not None and sampled and int(best.count.min()) < nearest:  # the sample was not like the rest
            return self._pass(queries, h, squares, nearest, exclude, sampled=False)
        squared, index = (None, None) if best is None else self._refined(queries, best.indices())
        return log_sum + offset, log_squares + 2.0 * offset if squares else None, squared, index

    def _threshold(self, scaled: Tensor, bias: Tensor, nearest: int) -> Tensor:
        """A logit [m, 1] that more than `nearest` points exceed with a likelihood of four standard deviations."""
        share = nearest / _GROUP
        rank = math.ceil(share + 4.0 * math.sqrt(share)) + 1
        logits = torch.addmm(bias[::_GROUP], scaled, self.rows[::_GROUP].T)
        whole = logits.shape[1] // _GROUP
        if whole >= 4 * rank:  # the largest of groups: hardly ever two of the wanted in one, and then it is lower
            logits = logits[:, : whole * _GROUP].unflatten(1, (_GROUP, whole)).amax(1)
        return logits.topk(rank, dim=1).values[:, -1:].contiguous()

    def _refined(self, queries: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances of the points index [m, k] from differences, ascending, and the index in that order."""
        squared = torch.empty(index.shape, dtype=torch.float64)
        step = max(1, (1 << 20) // (index.shape[1] * queries.shape[1]))
        for begin in range(0, len(queries), step):
            these = index[begin : begin + step]
            found = self.rows.index_select(0, these.flatten()).view(*these.shape, -1)
            found.sub_(queries[begin : begin + step].unsqueeze(1))
            squared[begin : begin + step] = found.square_().sum(2)
        squared, order = squared.sort(1)
        return squared, index.gather(1, order)


def _by_block(exclude: Tensor | None, block: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Rows and columns of what is left out, by the number of the block of columns that it is in."""
    if exclude is None:
        return {}
    number = exclude // block
    places = {int(one): (number == one).nonzero().squeeze(1) for one in number.unique()}
    return {one: (rows, exclude[rows] - one * block) for one, rows in places.items()}


class _Best:
    """The k largest entries of every row over blocks of columns that come one after the other."""

    def __init__(self, rows: int, k: int, block: int, dtype: torch.dtype) -> None:
        self.k, self.limit = k, max(2 * k, 128)
        columns = self.limit + block
        self._values = torch.full((rows, columns), -math.inf, dtype=dtype)
        self._index = torch.zeros(rows, columns, dtype=torch.long)
        # the same memory for numpy, which takes a few entries out of many several times faster than torch does
        self._taken, self._columns = self._values.numpy(), self._index.numpy()
        self.count = np.zeros(rows, dtype=np.int64)
        self.threshold = np.full((rows, 1), -np.inf, dtype=self._taken.dtype)

    def update(self, block: Tensor, start: int) -> Tensor:
        """Take what is above the k-th largest so far in block [rows, c] from column `start` on; its maxima [rows].

        Groups of columns are compared by their maxima first, since hardly any of them has an entry to take.
        """
        width = block.shape[1] // _GROUP
        groups = block.view(len(block), _GROUP, width)
        maxima = groups.amax(1)
        row, column = np.divmod(np.flatnonzero(maxima.numpy() > self.threshold), width)
        if len(row):
            members = groups.numpy()[row, :, column]
            found = np.flatnonzero(members > self.threshold[row])
            which, member = np.divmod(found, _GROUP)
            row = row[which]
            counts = np.bincount(row, minlength=len(block))
            place = self.count[row] + np.arange(len(row)) - (counts.cumsum() - counts)[row]
            self._taken[row, place] = members.ravel()[found]
            self._columns[row, place] = column[which] + member * width + start
            self.count += counts
            if int(self.count.max()) > self.limit:
                self._prune()
        return maxima.amax(1)

    def _prune(self) -> None:
        values, order = self._values[:, : int(self.count.max())].topk(self.k, dim=1)
        index = self._index.gather(1, order)
        self._values.fill_(-math.inf)
        self._values[:, : self.k], self._index[:, : self.k] = values, index
        self.count = (values > -math.inf).sum(1).numpy()
        self.threshold = values[:, -1:].contiguous().numpy()

    def indices(self) -> Tensor:
        """The columns of the k largest entries [rows, k], largest first."""
        order = self._values[:, : max(self.k, int(self.count.max()))].topk(self.k, dim=1).indices
        return self._index.gather(1, order)


def nearest_distances(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """The naive twin: the k smallest squared distances [m, k] of queries [m, d] to points [n, d], by differences."""
    return (queries.unsqueeze(1) - points.unsqueeze(0)).square().sum(2).sort(1).values[:, :k]
