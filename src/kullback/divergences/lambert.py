"""Lambert's W on its principal branch and Wright's omega, differentiable any number of times; scipy gives the values.

W(x) e^{W(x)} = x for x >= -1/e, and omega(y) + log omega(y) = y, that is omega(y) = W(e^y) without overflow.

Shapes: any, elementwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["lambert_w", "wright_omega"]


class _WrightOmega(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        from scipy.special import wrightomega

        omega = torch.as_tensor(wrightomega(y.detach().cpu().double().numpy())).to(y)
        ctx.save_for_backward(omega)
        return omega

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (omega,) = ctx.saved_tensors
        return grad * (omega / (1.0 + omega))


class _LambertW(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from scipy.special import lambertw

        w = torch.as_tensor(np.real(lambertw(np.asarray(x.detach().cpu().double()), k=0))).to(x)
        ctx.save_for_backward(w)
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return grad * torch.exp(-w) / (1.0 + w)


def wright_omega(y: Tensor) -> Tensor:
    """Wright's omega function of a real y: the positive solution of omega + log omega = y.

    >>> wright_omega(torch.tensor([1.0, 1e4]))
    tensor([1.0000e+00, 9.9908e+03])
    """
    omega: Tensor = _WrightOmega.apply(y)
    return omega


def lambert_w(x: Tensor) -> Tensor:
    """Lambert's W of x >= -1/e on the principal branch: the solution W >= -1 of W e^W = x.

    >>> lambert_w(torch.tensor([0.0, torch.e]))
    tensor([0., 1.])
    """
    w: Tensor = _LambertW.apply(x)
    return w
