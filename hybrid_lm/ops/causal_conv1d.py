"""Short causal depthwise convolution, the local mixer in front of every selective SSM.

Mamba: Gu & Dao 2023, arXiv:2312.00752, figure 3. The state is the last w - 1 inputs.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.precision import wide

# Values of one block of tokens: 1 MiB in float32, so that the passes over a block stay in a core's cache.
_BLOCK = 1 << 18


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    donate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_k weight[:, k] * x_{t-w+1+k}): the last tap multiplies the current token.

    x        (b t d)
    weight   (d w), w >= 1
    bias     (d)
    initial  (b w-1 d) the inputs before the first token; zeros where it is None
    reset    (b t) bool: nothing that stands before a true token (`initial` included) reaches it or what
             follows it
    donate   `initial` is not used again: without gradients, its memory may become the state's
    Returns y (b t d) and the state (b w-1 d) to hand on as `initial`: the last w - 1 inputs, those before
    the last reset zeroed. Both in x's dtype, the sums in float32 (float64 for float64).
    """
    run = _causal_conv1d(backend, x)
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation is {activation!r}; it is None or 'silu'")
    return run(x, weight, bias, activation=activation, initial=initial, reset=reset, donate=donate)


def _causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    b, t, d = x.shape
    w = weight.shape[1]
    state = x.new_zeros(b, w - 1, d) if initial is None else initial.to(x.dtype)
    ys = []
    for i in range(t):
        # 1. a document starts: forget the inputs before it
        if reset is not None:
            state = torch.where(reset[:, i, None, None], 0, state)
        # 2. the window of w inputs that ends at this token
        window = torch.cat((state, x[:, i : i + 1]), 1)  # (b w d)
        # 3. one weighted sum per channel
        y = (window.to(wide(x)) * weight.to(wide(x)).T).sum(1)  # (b d)
        y = y if bias is None else y + bias.to(y.dtype)
        ys.append(F.silu(y) if activation == "silu" else y)
        # 4. slide by one
        state = window[:, 1:]
    return torch.stack(ys, 1).to(x.dtype), state


def _causal_conv1d_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    t, w = x.shape[1], weight.shape[1]
    initial = x.new_zeros(x.shape[0], w - 1, x.shape[2]) if initial is None else initial.to(x.dtype)
    document = (
        None if reset is None else reset.cumsum(1, dtype=torch.int32)
    )  # (b t), 0 before the first reset
    if t == 1:
        if reset is not None:
            initial = torch.where(reset[..., None], 0, initial)
        window = torch.cat((initial, x), 1)
        y = (window.to(wide(x)) * weight.to(wide(x)).T).sum(1, keepdim=True)
        y = y if bias is None else y + bias.to(y.dtype)
        return (F.silu(y) if activation == "silu" else y).to(x.dtype), window[:, 1:]
    y = _conv(x, weight, bias, initial, document, activation == "silu")
    state = torch.cat((initial[:, t:], x[:, max(t - w + 1, 0) :]), 1)
    if document is not None:
        known = F.pad(document, (w - 1, 0))[:, t:]
        state = torch.where((known == document[:, -1:])[..., None], state, 0)
    return y, state


@torch.library.custom_op("hybrid_lm::causal_conv1d", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor, document: Tensor | None, silu: bool
) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    taps = weight.to(wide(x)).T.contiguous()
    for start, stop in _blocks(x):
        acc, _ = _block(x, taps, bias, initial, document, start, stop)
        y[:, start:stop] = F.silu(acc, inplace=True) if silu else acc
    return y


def _blocks(x: Tensor) -> list[tuple[int, int]]:
    b, t, d = x.shape
    size = max(16, _BLOCK // (b * d))
    return [(i, min(i + size, t)) for i in range(0, t, size)]


def _block(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    initial: Tensor,
    document: Tensor | None,
    start: int,
    stop: int,
) -> tuple[Tensor, list[Tensor]]:
    """The sums of tokens start:stop before the activation, and the w inputs, each (b len d), in them."""
    w = taps.shape[0]
    first = start - w + 1
    window = x[:, max(first, 0) : stop]
    if first < 0:
        window = torch.cat((initial[:, start:], window), 1)
    window = window.to(taps.dtype)
    inputs = [window[:, k : k + stop - start] for k in range(w)]
    if document is not None:
        known = F.pad(document, (w - 1, 0))[:, start : stop + w - 1]
        here = document[:, start:stop]
        same = [(known[:, k : k + stop - start] == here)[..., None] for k in range(w)]
        inputs = [torch.where(s, v, 0) for s, v in zip(same, inputs, strict=True)]
    acc = inputs[-1] * taps[-1]
    if bias is not None:
        acc += bias
    for v, tap in zip(inputs[:-1], taps[:-1], strict=True):
        acc.addcmul_(v, tap)
    return acc, inputs


@torch.library.custom_op("hybrid_lm::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor,
    document: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of [initial; x] in one tensor (b w-1+t d), of weight and of bias."""
    w = weight.shape[1]
    t, d = x.shape[1:]
    taps = weight.to(wide(x)).T.contiguous()
    gx = torch.zeros(len(x), w - 1 + t, d, dtype=x.dtype, device=x.device)
    gtaps, gbias = torch.zeros_like(taps), torch.zeros(d, dtype=taps.dtype, device=x.device)
    carry = torch.zeros(len(x), w - 1, d, dtype=taps.dtype, device=x.device)
    for start, stop in reversed(_blocks(x)):
        acc, inputs = _block(x, taps, bias, initial, document, start, stop)
        g = gy[:, start:stop].to(taps.dtype)
        if silu:
            g = torch.ops.aten.silu_backward(g, acc)
        if bias is not None:
            gbias += g.sum((0, 1))
        gwindow = torch.zeros(len(x), w - 1 + stop - start, d, dtype=taps.dtype, device=x.device)
        gwindow[:, stop - start :] = carry
        for k, v in enumerate(inputs):
            gtaps[k] += torch.mul(g, v, out=acc).sum((0, 1))
            gv = g if document is None else _same_document(g, document, k - w + 1, start, stop)
            gwindow[:, k : k + stop - start].addcmul_(gv, taps[k])
        gx[:, start + w - 1 : stop + w - 1] = gwindow[:, w - 1 :]
        carry = gwindow[:, : w - 1].clone()
    gx[:, : w - 1] = carry
    return gx, gtaps.T.contiguous().to(weight.dtype), gbias.to(weight.dtype if bias is None else bias.dtype)


def _same_document(g: Tensor, document: Tensor, lag: int, start: int, stop: int) -> Tensor:
    """g where the input that tap `lag` (<= 0) reads is in the token's document, else 0; `initial` is in 0."""
    before = F.pad(document, (-lag, 0))[:, start:stop]
    return torch.where((before == document[:, start:stop])[..., None], g, 0)


@_conv.register_fake
def _(x, weight, bias, initial, document, silu):
    return x.new_empty(x.shape)


@_conv_backward.register_fake
def _(gy, x, weight, bias, initial, document, silu):
    extended = x.new_empty(x.shape[0], weight.shape[1] - 1 + x.shape[1], x.shape[2])
    return extended, torch.empty_like(weight), torch.empty_like(weight[:, 0] if bias is None else bias)


def _setup(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, gy):
    x, weight, bias, initial, document = ctx.saved_tensors
    gx, gweight, gbias = _conv_backward(gy, x, weight, bias, initial, document, ctx.silu)
    before = weight.shape[1] - 1
    return gx[:, before:], gweight, None if bias is None else gbias, gx[:, :before], None, None


_conv.register_autograd(_gradient, setup_context=_setup)


_causal_conv1d = define("causal_conv1d", reference=_causal_conv1d_reference, torch=_causal_conv1d_torch)
