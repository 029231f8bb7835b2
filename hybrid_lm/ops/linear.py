"""The matrix product of a layer. For training it is a BLAS's; decoding reads every weight for a single row,
and then the speed of memory decides."""

import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.precision import wide


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = x W^T + b.

    x       (... d_in)
    weight  (d_out d_in)
    bias    (d_out)
    Returns (... d_out), in x's dtype unless autocast has its say.
    """
    return _linear(backend, x)(x, weight, bias)


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # one weighted sum of the inputs per output
    y = (x[..., None, :].to(wide(x)) * weight.to(wide(x))).sum(-1)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype)


def _linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


_linear = define("linear", reference=_linear_reference, torch=_linear_torch)
