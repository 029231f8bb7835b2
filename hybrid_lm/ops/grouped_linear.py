"""Matrix products by group: each row is multiplied by the matrix of its group, as the experts of a mixture
need it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.precision import full_precision, wide


def grouped_linear(
    x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """y_i = W_e x_i + b_e for the rows i of group e. Without dropping any: Gale et al. 2022,
    arXiv:2211.15841.

    x       (s d_in): the rows of the first group, then those of the second, ...
    weight  (e d_out d_in)
    ends    (e) int64, ascending to s: the rows up to the end of each group; an empty one ends where it begins
    bias    (e d_out)
    Returns (s d_out), in x's dtype unless autocast has its say. The work is that of s rows, however many
    groups there are.
    """
    return _grouped_linear(backend, x)(x, weight, ends, bias)


def group_of(ends: Tensor, rows: int) -> Tensor:
    """The group of each row, (s) int64."""
    return torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True)


def _grouped_linear_reference(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    group = group_of(ends, len(x))
    # one weighted sum of the inputs per output, with the matrix of the row's group
    y = (x[:, None, :].to(wide(x)) * weight.to(wide(x))[group]).sum(-1)
    y = y if bias is None else y + bias.to(y.dtype)[group]
    return y.to(x.dtype)


def _grouped_linear_torch(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    device = x.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # A bias is rounded once with its product, and so it goes along.
    bias = None if bias is None else bias.to(product)
    return _products(x.to(product), weight.to(product), bias, ends)


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and their rows."""
    begin = 0
    for group, end in enumerate(ends.tolist()):
        if end > begin:
            yield group, slice(begin, end)
        begin = end


# A loop over groups whose sizes are in a tensor is no graph: to torch.compile it is one operator, and CUDA
# graphs have to do without it.
@torch.library.custom_op("hybrid_lm::grouped_products", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
@full_precision
def _products(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    y = x.new_empty(len(x), weight.shape[1])
    for group, rows in _groups(ends):
        if bias is None:
            torch.mm(x[rows], weight[group].T, out=y[rows])
        else:
            torch.addmm(bias[group], x[rows], weight[group].T, out=y[rows])
    return y


@torch.library.custom_op(
    "hybrid_lm::grouped_products_backward", mutates_args=(), tags=torch.Tag.cudagraph_unsafe
)
@full_precision
def _products_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    gx, gweight = torch.empty_like(x), torch.zeros_like(weight)
    gbias = weight.new_zeros(weight.shape[:2])
    for group, rows in _groups(ends):
        torch.mm(grad[rows], weight[group], out=gx[rows])
        torch.mm(grad[rows].T, x[rows], out=gweight[group])
        torch.sum(grad[rows], 0, out=gbias[group])
    return gx, gweight, gbias


@_products.register_fake
def _(x, weight, bias, ends):
    return x.new_empty(x.shape[0], weight.shape[1])


@_products_backward.register_fake
def _(grad, x, weight, ends):
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[:2])


def _setup(ctx, inputs, output):
    x, weight, bias, ends = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight, ends)


def _gradient(ctx, grad):
    gx, gweight, gbias = _products_backward(grad, *ctx.saved_tensors)
    return gx, gweight, gbias if ctx.biased else None, None


_products.register_autograd(_gradient, setup_context=_setup)
_grouped_linear = define("grouped_linear", reference=_grouped_linear_reference, torch=_grouped_linear_torch)
