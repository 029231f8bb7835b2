"""A diagonal linear recurrence: one decay and one input per token and channel.

The core of the RG-LRU: De et al. 2024, arXiv:2402.19427, eq. 4 of section 2.4, whose gates are the caller's.

The torch form cuts t tokens into about sqrt(t) chunks of as many tokens. All chunks run side by side from a
state of zero, then the state is carried from chunk to chunk, then what was carried is added: 2 sqrt(t) steps
instead of t, and memory linear in t. The backward pass is the same recurrence from the end to the start.
"""

import math

import torch
from torch import Tensor

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.precision import full_precision, wide


def linear_recurrence(
    x: Tensor,
    log_a: Tensor,
    *,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    donate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_a_t) h_{t-1} + x_t.

    x        (b t d)
    log_a    (b t d) at most 0: the natural logarithm of the decay into each token
    initial  (b d) state before the first token; zeros where it is None
    reset    (b t) bool: the decay into a true token is 0, so nothing that stands before it reaches it
    donate   `initial` is not used again: without gradients, its memory may become the final state's
    Returns h (b t d) in x's dtype and the final state (b d) in float32 (float64 for float64 x), in which all
    is computed.
    """
    run = _linear_recurrence(backend, x)
    return run(x, log_a, initial=initial, reset=reset, donate=donate)


@full_precision
def _linear_recurrence_reference(
    x: Tensor,
    log_a: Tensor,
    *,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    dtype, wide_dtype = x.dtype, wide(x)
    x, log_a = x.to(wide_dtype), log_a.to(wide_dtype)
    h = torch.zeros_like(x[:, 0]) if initial is None else initial.to(wide_dtype)  # (b d)
    hs = []
    for t in range(x.shape[1]):
        # 1. the decay; where a document starts, nothing decays into it
        a = log_a[:, t].exp()
        if reset is not None:
            a = torch.where(reset[:, t, None], 0, a)
        # 2. recur
        h = a * h + x[:, t]
        hs.append(h)
    return torch.stack(hs, 1).to(dtype), h


@full_precision
def _linear_recurrence_torch(
    x: Tensor,
    log_a: Tensor,
    *,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    log_a = log_a.to(wide(x))
    initial = torch.zeros_like(log_a[:, 0]) if initial is None else initial.to(log_a.dtype)
    if x.shape[1] == 1:
        h = torch.addcmul(x.to(log_a.dtype), _decay(log_a, reset), initial[:, None])
    else:
        h = _recur(x.to(log_a.dtype), log_a, initial, reset)
    # A copy: a state that is kept must not hold all the tokens.
    return h.to(x.dtype), h[:, -1].clone()


def _decay(log_a: Tensor, reset: Tensor | None) -> Tensor:
    """The decay into each token (b t d), 0 at the start of a document."""
    decay = log_a.exp()
    return decay if reset is None else decay.masked_fill(reset[..., None], 0)


def _run(x: Tensor, decay: Tensor, initial: Tensor) -> Tensor:
    """The states (b t d) of the inputs (b t d) with their decays, from `initial` (b d)."""
    b, t, d = x.shape
    size = math.isqrt(t - 1) + 1  # the root of t, rounded up: tokens in a chunk
    k = -(-t // size)
    # Tokens of zeros fill the last chunk.
    h, past = x.new_zeros(b, k * size, d), x.new_zeros(b, k * size, d)
    h[:, :t], past[:, :t] = x, decay
    h, past = h.view(b, k, size, d), past.view(b, k, size, d)
    # 1. every chunk from zero, and in `past` the decay from its start up to each token
    hs, pasts = h.unbind(2), past.unbind(2)  # (b k d) each
    for i in range(1, size):
        hs[i].addcmul_(pasts[i], hs[i - 1])
        pasts[i].mul_(pasts[i - 1])
    # 2. the state before each chunk
    before = torch.empty_like(hs[0])
    state = initial
    for j in range(k):
        before[:, j] = state
        state = torch.addcmul(hs[-1][:, j], pasts[-1][:, j], state)
    # 3. what it leaves at each token
    h.addcmul_(past, before[:, :, None])
    return h.view(b, k * size, d)[:, :t].contiguous()


@torch.library.custom_op("hybrid_lm::linear_recurrence", mutates_args=())
def _recur(x: Tensor, log_a: Tensor, initial: Tensor, reset: Tensor | None) -> Tensor:
    """The states (b t d) of at least two tokens."""
    return _run(x, _decay(log_a, reset), initial)


@torch.library.custom_op("hybrid_lm::linear_recurrence_backward", mutates_args=())
def _recur_backward(
    gh: Tensor, h: Tensor, log_a: Tensor, initial: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, log_a and the initial state."""
    decay = _decay(log_a, reset)
    # g_t = gh_t + a_{t+1} g_{t+1}: the recurrence itself, read from the end, each decay one token earlier
    later = torch.cat((decay[:, :1], decay[:, 1:].flip(1)), 1)
    g = _run(gh.flip(1), later, torch.zeros_like(initial)).flip(1)
    into = decay.mul_(g)
    ginitial = into[:, 0].clone()
    into[:, 0] *= initial
    into[:, 1:] *= h[:, :-1]
    return g, into, ginitial


@_recur.register_fake
def _(x, log_a, initial, reset):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_recur_backward.register_fake
def _(gh, h, log_a, initial, reset):
    return torch.empty_like(h), h.new_empty(h.shape), initial.new_empty(initial.shape)


def _setup(ctx, inputs, output):
    _, *given = inputs
    ctx.save_for_backward(output, *given)


def _gradient(ctx, gh):
    return *_recur_backward(gh, *ctx.saved_tensors), None


_recur.register_autograd(_gradient, setup_context=_setup)


_linear_recurrence = define(
    "linear_recurrence", reference=_linear_recurrence_reference, torch=_linear_recurrence_torch
)
