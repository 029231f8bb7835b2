"""Cross-entropy of a linear layer's outputs without ever holding all logits.

Options: label smoothing, Szegedy et al. 2015, arXiv:1512.00567, section 7; z-loss, Chowdhery et al. 2022,
arXiv:2204.02311, section 5; softcap, Gemma 2, arXiv:2408.00118.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.precision import full_precision, wide

# Logits held at once: 16 MiB in float32.
_LOGITS = 1 << 22


class TokenLoss(NamedTuple):
    """Per-token losses in nats (m), zeros where the label is ignored."""

    objective: Tensor  # what training minimises: label smoothing and z-loss included
    nll: Tensor  # -log p(label)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore: int = -100,
    chunk: int | None = None,
    backend: str | None = None,
) -> TokenLoss:
    """Losses of the logits cap(scale * (weight x + bias)), cap(l) = softcap * tanh(l / softcap).

    x                (m d);  weight (v d);  bias (v)
    labels           (m) int64 in 0 .. v-1, or `ignore`
    scale            factor on the logits
    label_smoothing  e: the target is (1 - e) on the label plus e / v on every class
    z_loss           coefficient of logsumexp(logits)^2
    chunk            rows whose logits exist at one time; None chooses by v
    Returns TokenLoss(objective (m), nll (m)), float32 (float64 for float64 x). The products run in x's
    dtype, or in autocast's where it is on; softmax and sums run in float32.
    """
    run = _linear_cross_entropy(backend, x)
    return run(
        x, weight, labels,
        bias=bias, scale=scale, softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss,
        ignore=ignore, chunk=chunk,
    )  # fmt: skip


def _linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore: int = -100,
    chunk: int | None = None,
) -> TokenLoss:
    # 1. logits
    logits = torch.nn.functional.linear(x, weight.to(x.dtype)).to(wide(x))
    logits = scale * (logits if bias is None else logits + bias.to(logits.dtype))
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    # 2. -log p of the label, and of a uniform guess at the label
    scored = labels != ignore
    lse = logits.logsumexp(-1)
    nll = lse - logits.gather(-1, labels.where(scored, 0)[:, None])[:, 0]
    smooth = lse - logits.mean(-1)
    # 3. what training minimises
    objective = (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * lse.square()
    return TokenLoss(objective.where(scored, 0), nll.where(scored, 0))


def _linear_cross_entropy_torch(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore: int = -100,
    chunk: int | None = None,
) -> TokenLoss:
    device = x.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    chunk = max(64, _LOGITS // weight.shape[0]) if chunk is None else chunk
    options = (scale, softcap, label_smoothing, z_loss, ignore, chunk, product)
    with torch.autocast(device, enabled=False):
        objective, nll, _ = _loss(x, weight, labels, bias, *options)
    return TokenLoss(objective, nll)


def _logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, dtype: torch.dtype
) -> Tensor:
    logits = (x @ weight.T).to(dtype)
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


@torch.library.custom_op("hybrid_lm::linear_cross_entropy", mutates_args=())
def _loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore: int,
    chunk: int,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """objective, nll and logsumexp, each (m)."""
    objective, nll, lse = (torch.zeros(len(x), dtype=wide(x), device=x.device) for _ in range(3))
    w = weight.to(product)
    for rows in (labels != ignore).nonzero()[:, 0].split(chunk):
        logits = _logits(x[rows].to(product), w, bias, scale, softcap, wide(x))
        total = logits.logsumexp(-1)
        loss = total - logits.gather(-1, labels[rows, None])[:, 0]
        nll[rows], lse[rows] = loss, total
        if label_smoothing:
            loss = torch.lerp(loss, total - logits.mean(-1), label_smoothing)
        objective[rows] = loss + z_loss * total.square()
    return objective, nll, lse


@torch.library.custom_op("hybrid_lm::linear_cross_entropy_backward", mutates_args=())
@full_precision
def _loss_backward(
    gobjective: Tensor,
    gnll: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore: int,
    chunk: int,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the logits are computed again, chunk by chunk."""
    gx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    gweight = torch.zeros(weight.shape, dtype=lse.dtype, device=x.device)
    gbias = torch.zeros(len(weight), dtype=lse.dtype, device=x.device)
    w = weight.to(product)
    for rows in (labels != ignore).nonzero()[:, 0].split(chunk):
        xr = x[rows].to(product)
        logits = _logits(xr, w, bias, scale, softcap, wide(x))
        go, gn, total = (v[rows, None] for v in (gobjective, gnll, lse))
        capped = None if softcap is None else logits.div(softcap).square_()
        # d objective / d logit = p (1 + 2 z lse) - (1 - e) [label] - e / v;  d nll / d logit = p - [label]
        g = logits.sub_(total).exp_().mul_(go * (1 + 2 * z_loss * total) + gn)
        if label_smoothing:
            g -= go * (label_smoothing / len(weight))
        g.scatter_add_(-1, labels[rows, None], -(go * (1 - label_smoothing) + gn))
        if capped is not None:
            g *= capped.neg_().add_(1)
        if scale != 1.0:
            g *= scale
        gbias += g.sum(0)
        g = g.to(product)
        gx[rows] = (g @ w).to(x.dtype)
        if product == lse.dtype:
            gweight.addmm_(g.T, xr)
        else:
            gweight += g.T @ xr
    return gx, gweight.to(weight.dtype), gbias.to(weight.dtype if bias is None else bias.dtype)


@_loss.register_fake
def _(x, weight, labels, bias, scale, softcap, label_smoothing, z_loss, ignore, chunk, product):
    return tuple(x.new_empty(x.shape[:1], dtype=wide(x)) for _ in range(3))


@_loss_backward.register_fake
def _(gobjective, gnll, x, weight, labels, bias, lse, *options):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        (weight if bias is None else bias).new_empty(weight.shape[:1]),
    )


def _setup(ctx, inputs, output):
    x, weight, labels, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight, labels, bias, output[2])


def _gradient(ctx, gobjective, gnll, _):
    x, weight, labels, bias, lse = ctx.saved_tensors
    gx, gweight, gbias = _loss_backward(gobjective, gnll, x, weight, labels, bias, lse, *ctx.options)
    return gx, gweight, None, None if bias is None else gbias, *[None] * len(ctx.options)


_loss.register_autograd(_gradient, setup_context=_setup)
_linear_cross_entropy = define(
    "linear_cross_entropy", reference=_linear_cross_entropy_reference, torch=_linear_cross_entropy_torch
)
