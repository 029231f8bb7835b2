"""Triton kernels of the package fla (fla-org/flash-linear-attention) on CUDA: the gated delta rule, SSD as
linear attention with one decay for each head (Dao & Gu 2024, section 7), and the diagonal recurrence of HGRN.

The delta rule and SSD multiply on tensor cores. Given bfloat16, the kernels round to it in the middle, which
costs more than the ops allow; so they are given float32, which is TF32 there: that holds every bfloat16, and
rounds the rest eight times finer. For inputs of any other type it is too coarse: these are PyTorch's, and so
are keys of more than 128 numbers and single tokens. Documents are sequences of their own, side by side: how
many there are is read from the device, so that with `reset` no CUDA graph can hold them. The diagonal
recurrence is float32 for all types but float64, which is PyTorch's.

Decays and their gradients are differences of sums over a chunk in float32: where a step is thousands of times
the usual one, what the others of its chunk have to do with the decay is as much less precise.

The package's functions are called as it shows them to everybody, and keep nothing for the backward pass: that
calls them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.delta_rule_torch import delta_rule_torch
from hybrid_lm.ops.external.packages import Needs, Package, aligned, numbers, refusing
from hybrid_lm.ops.linear_recurrence import linear_recurrence
from hybrid_lm.ops.ssd_torch import ssd_torch

PACKAGE = Package("fla", "flash-linear-attention", (0, 5))


class Kernel(NamedTuple):
    """A function of the package, and which of its tensors are the values and the keys of its state."""

    needs: Needs
    function: str
    values: int
    keys: int | None


KERNELS = {
    "delta_rule": Kernel(Needs(PACKAGE, "fla.ops.gated_delta_rule"), "chunk_gated_delta_rule", 2, 1),
    "ssd": Kernel(Needs(PACKAGE, "fla.ops.simple_gla"), "chunk_simple_gla", 2, 1),
    "linear_recurrence": Kernel(Needs(PACKAGE, "fla.ops.hgrn"), "fused_recurrent_hgrn", 0, None),
}

KEYS = 128
"""Numbers of a key: more of them in float32 are more than a chunk has room for on every GPU."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fits(multiplied: tuple[Tensor, ...], keys: Tensor) -> bool:
    fit = all(v.dtype == torch.bfloat16 for v in multiplied)
    return fit and keys.shape[1] > 1 and keys.shape[3] <= KEYS


def delta_rule_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    if not _fits((q, k, v), k):
        rest: dict[str, Any] = {"scale": scale, "initial": initial, "reset": reset, "chunk": chunk}
        return delta_rule_torch(q, k, v, log_decay, beta, **rest, donate=donate)
    # not every version shares queries and keys among heads
    q, k = (u.float().repeat_interleave(v.shape[2] // u.shape[2], dim=2) for u in (q, k))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    initial = None if initial is None else initial.float()
    tensors = [q, k, v.float(), log_decay.float(), beta.float()]
    y, state = _recurrence("delta_rule", tensors, initial, reset, scale)
    return y.to(v.dtype), state


def ssd_fla(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    if not _fits((x, B, C), B):
        rest: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        rest |= {"initial": initial, "reset": reset, "chunk": chunk, "donate": donate}
        return ssd_torch(x, dt, A, B, C, **rest)
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    B, C = (u.float().repeat_interleave(x.shape[2] // u.shape[2], dim=2) for u in (B, C))
    wide = x.float()
    before = None if initial is None else initial.float().transpose(2, 3)
    tensors = [C, B, wide * step[..., None], step * A.float()]
    y, state = _recurrence("ssd", tensors, before, reset, 1.0)
    y = y if D is None else y + D.float()[:, None] * wide
    return y.to(x.dtype), state.transpose(2, 3)


def linear_recurrence_fla(
    x: Tensor,
    log_a: Tensor,
    *,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    if x.dtype not in TYPES or x.shape[1] == 1:
        return linear_recurrence(x, log_a, initial=initial, reset=reset, donate=donate, backend="torch")
    decay = log_a.float()
    # exp(-inf) = 0: nothing decays into a document's first token
    decay = decay if reset is None else decay.masked_fill(reset[..., None], -torch.inf)
    before = None if initial is None else initial.float()
    h, state = _recurrence("linear_recurrence", [x.float(), decay], before, None, None)
    return h.to(x.dtype), state


class _Documents(NamedTuple):
    """Documents side by side in one sequence, as the package takes them."""

    ends: Tensor
    """Where each ends, from a 0 on."""
    row: Tensor
    """The sequence of the batch that each is of."""
    given: Tensor
    """Whether it goes on from the state that its sequence was given."""
    last: Tensor
    """The last document of every sequence."""

    @staticmethod
    def of(reset: Tensor) -> _Documents:
        t = reset.shape[1]
        starts = reset.clone()
        starts[:, 0] = True
        where = starts.flatten().nonzero().flatten()  # waits for the device: so many documents are there
        ends = torch.cat((where, where.new_tensor([reset.numel()])))
        given = (where % t == 0) & ~reset.flatten()[where]
        return _Documents(ends, where // t, given, starts.sum(1).cumsum(0) - 1)

    def spread(self, states: Tensor) -> Tensor:
        """The state before every document, of those of the batch."""
        return torch.where(self.given.view(-1, *[1] * (states.dim() - 1)), states[self.row], 0)


def _run(
    name: str, tensors: Sequence[Tensor], initial: Tensor | None, scale: float | None, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    kernel = KERNELS[name]
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    options |= {} if ends is None else {"cu_seqlens": ends}
    function = getattr(kernel.needs.load(), kernel.function)
    return function(*tensors, initial_state=initial, output_final_state=True, **options)


@torch.library.custom_op("hybrid_lm_external::fla_recurrence", mutates_args=())
def _recurrence(
    name: str, tensors: Sequence[Tensor], initial: Tensor | None, reset: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """What the values become (b t ...), and the states in float32, as the package has their axes."""
    values = tensors[KERNELS[name].values]
    if reset is None:
        y, state = _run(name, tensors, initial, scale, None)
        return y.contiguous(), state.float().contiguous()
    documents = _Documents.of(reset)
    flat = [v.flatten(0, 1)[None] for v in tensors]
    before = None if initial is None else documents.spread(initial)
    y, states = _run(name, flat, before, scale, documents.ends)
    return y.reshape(values.shape).contiguous(), states[documents.last].float()


@torch.library.custom_op("hybrid_lm_external::fla_recurrence_backward", mutates_args=())
def _recurrence_backward(
    name: str, gy: Tensor, gstate: Tensor | None, tensors: Sequence[Tensor], initial: Tensor | None,
    reset: Tensor | None, scale: float | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the tensors, and of the initial state where there is one."""
    documents = None if reset is None else _Documents.of(reset)
    given = [v if documents is None else v.flatten(0, 1)[None] for v in tensors]
    before = initial if initial is None or documents is None else documents.spread(initial)
    leaves = [v.detach().requires_grad_() for v in (*given, before) if v is not None]
    with torch.enable_grad():
        start = None if before is None else leaves[-1]
        y, states = _run(
            name, leaves[: len(given)], start, scale, None if documents is None else documents.ends
        )
    gstates = torch.zeros_like(states)
    if gstate is not None:
        gstates[slice(None) if documents is None else documents.last] = gstate.to(gstates.dtype)
    grads = torch.autograd.grad((y, states), leaves, (gy.reshape(y.shape).to(y.dtype), gstates))
    results = [g.reshape(v.shape) for g, v in zip(grads, tensors, strict=False)]
    if initial is not None:
        ginitial = grads[-1]
        if documents is not None:
            whose = documents.row[documents.given]
            ginitial = torch.zeros_like(initial).index_add_(0, whose, ginitial[documents.given])
        results.append(ginitial)
    return list(aligned(gy, results, [*tensors, *([] if initial is None else [initial])]))


@_recurrence.register_fake
def _(name, tensors, initial, reset, scale):
    kernel = KERNELS[name]
    values = tensors[kernel.values]
    shape = [values.shape[0], *values.shape[2:]]
    if kernel.keys is not None:
        shape.insert(2, tensors[kernel.keys].shape[3])
    return values.new_empty(values.shape), values.new_empty(shape, dtype=torch.float32)


@_recurrence_backward.register_fake
def _(name, gy, gstate, tensors, initial, reset, scale):
    given = [*tensors, *([] if initial is None else [initial])]
    return [v.new_empty(v.shape) for v in given]


def _setup(ctx, inputs, output):
    ctx.name, tensors, initial, reset, ctx.scale = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, initial, reset)
    ctx.set_materialize_grads(False)


def _gradient(ctx, gy, gstate):
    *tensors, initial, reset = ctx.saved_tensors
    values = tensors[KERNELS[ctx.name].values]
    gy = torch.zeros_like(values) if gy is None else gy
    grads = _recurrence_backward(ctx.name, gy, gstate, tensors, initial, reset, ctx.scale)
    return None, list(grads[: ctx.count]), grads[-1] if initial is not None else None, None, None


_recurrence.register_autograd(_gradient, setup_context=_setup)
_recurrence_backward.register_autograd(refusing("a recurrence", PACKAGE.name))


@cache
def _wrong_here() -> str | None:
    """On GPUs of compute capability 9 Triton before 3.7.1 compiles a product with what was turned around in
    registers to another one (fla's issues 640 and 984): gradients of keys and decays are wrong there."""
    found = version("triton")
    if torch.cuda.get_device_capability()[0] != 9 or not (3, 4) <= numbers(found) < (3, 7, 1):
        return None
    return f"its gradients are wrong on this GPU with triton {found}: triton 3.7.1 or later is needed"


def _why_not(name: str) -> Callable[[str], str | None]:
    kernel = KERNELS[name]

    def reason(device: str) -> str | None:
        products = kernel.keys is not None and device == "cuda"
        return kernel.needs.why_not(device) or (_wrong_here() if products else None)

    return reason


register("delta_rule", "fla", run=delta_rule_fla, why_not=_why_not("delta_rule"))
register("ssd", "fla", run=ssd_fla, why_not=_why_not("ssd"))
register("linear_recurrence", "fla", run=linear_recurrence_fla, why_not=_why_not("linear_recurrence"))
