"""The Triton backend of SSD: the operators, their shapes and gradients, and how the kernels are launched.

A first kernel, small, turns dt into steps and decays, which every other one would compute again for every
block of channels. Forward, one program per head (and block of its channels) then walks the sequence with the
state on chip: nothing but x, the steps, B, C and y touches memory. With too few heads for the device, a pass
before that leaves the state at every `span`-th chunk, and the second works on all spans at once. The backward
pass keeps nothing from the forward one: it walks the states forward, their gradients backward, and then takes
all chunks at once; heads that share B and C are summed in order by the program that has them. No sum depends
on timing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_lm.ops.backend import register
from hybrid_lm.ops.causal_conv1d import causal_conv1d
from hybrid_lm.ops.native.operators import may_take, on_one_device, tracked
from hybrid_lm.ops.precision import wide
from hybrid_lm.ops.triton.tuning import Choice, best, interpreted, on_device_of, testable

# Widths of a state that one program takes; wider ones are cut before. Half the channels where the state of
# each is wide.
MAX_P, MAX_N, DEEP = 128, 256, 128
# Channels of a head beyond which the backward pass takes it as two.
HALVED = 64
# What a program has room for where numbers are wider.
ROOM = {torch.float32: (64, 64), torch.float64: (32, 64)}
# Heads whose steps one program takes: the fewest that fill the smallest piece of memory, 32 bytes, in bf16.
BH = 16
# Programs that keep a large GPU busy (132 multiprocessors, two programs each).
ENOUGH = 264


def why_not(device: str) -> str | None:
    """None where the kernels run, else the reason in words."""
    if device == "cpu" and interpreted():
        mended = "Triton's interpreter is for tests, which mend it; unset TRITON_INTERPRET"
        return None if testable() else mended
    if device != "cuda":
        return f"Triton kernels run on NVIDIA GPUs, not on {device}"
    return _gpu()


@cache
def _gpu() -> str | None:
    if torch.version.hip is not None:
        return "untested on AMD GPUs"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"needs compute capability 8.0, and this GPU has {major}.{minor}"


def ssd_triton(
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
    p, n = x.shape[3], B.shape[3]
    tensors = (x, dt, A, B, C, D, dt_bias)
    on_one_device("ssd", *tensors, initial, reset)
    if x.shape[1] == 1 and not tracked(initial, *tensors):
        if donate and may_take(initial, wide(x), *tensors):
            state = initial
        elif initial is None:
            state = x.new_zeros((x.shape[0], x.shape[2], p, n), dtype=wide(x))
        else:
            state = initial.to(wide(x), copy=True).contiguous()
        return _step(*tensors, dt_softplus, *dt_limit, state, reset), state
    most = _most(x, B, C)
    if p > most[0] or n > most[1]:
        return _in_slices(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial, reset, chunk, most)
    return _ssd(*tensors, dt_softplus, *dt_limit, initial, reset, chunk)


def _most(x: Tensor, B: Tensor, C: Tensor) -> tuple[int, int]:
    """Channels of a head and states that one program takes."""
    widest = max((x.dtype, B.dtype, C.dtype), key=lambda kind: kind.itemsize)
    p, n = ROOM.get(widest, (MAX_P, MAX_N))
    p, n = min(p, MAX_P), min(n, MAX_N)
    return (p if B.shape[3] <= DEEP or n <= DEEP else p // 2), n


def _in_slices(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial, reset, chunk, most):
    """States wider than a program's: channels are independent, and y is a sum over the states."""
    # the gradients of these are sums over slices, too: they are rounded after they are added
    dt, A = dt.to(wide(x)), A.to(wide(x))
    D, dt_bias = (None if v is None else v.to(wide(x)) for v in (D, dt_bias))
    wide_p, wide_n = most
    ends = (range(0, x.shape[3], wide_p), range(0, B.shape[3], wide_n))
    ys, states = [], []
    for i in ends[0]:
        parts, row = [], []
        for j in ends[1]:
            start = None if initial is None else initial[:, :, i : i + wide_p, j : j + wide_n]
            y, state = ssd_triton(
                # the parts of y are rounded after they are added
                x[..., i : i + wide_p].to(wide(x) if len(ends[1]) > 1 else x.dtype),
                dt, A, B[..., j : j + wide_n], C[..., j : j + wide_n],
                D=D if j == 0 else None, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
                initial=start, reset=reset, chunk=chunk,
            )  # fmt: skip
            parts.append(y)
            row.append(state)
        ys.append(sum(parts[1:], parts[0]).to(x.dtype))
        states.append(torch.cat(row, 3))
    return torch.cat(ys, 3), torch.cat(states, 2)


def ssd_conv(
    x: Tensor,
    weight: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    conv_bias: Tensor | None = None,
    conv_initial: Tensor | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssd` of silu(causal_conv1d(x)), which is never in memory: 2 b t h p numbers less to move.

    x             (b t h p)
    weight        (h p w)
    conv_bias     (h p)
    conv_initial  (b w-1 h p) the inputs before the first token; zeros where it is None
    Returns y, the convolution's state (b w-1 h p) and the state of `ssd`; the same bits as the two ops one
    after the other. With gradients, and for one token, it is these two.
    """
    h, p, w = weight.shape
    window = None if conv_initial is None else conv_initial.to(x.dtype)
    taps, bias = weight.flatten(0, 1), None if conv_bias is None else conv_bias.flatten()
    flat = None if window is None else window.flatten(2)
    most = _most(x, B, C)
    apart = x.shape[1] == 1 or p > most[0] or B.shape[3] > most[1]
    if apart or tracked(x, weight, dt, A, B, C, conv_bias, window, D, dt_bias, initial):
        u, conv = causal_conv1d(
            x.flatten(2), taps, bias, activation="silu", initial=flat, reset=reset
        )  # fmt: skip
        y, state = ssd_triton(
            u.unflatten(2, (h, p)), dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus,
            dt_limit=dt_limit, initial=initial, reset=reset, chunk=chunk,
        )  # fmt: skip
        return y, conv.unflatten(2, (h, p)), state
    y, state = _ssd_conv(
        x, weight, conv_bias, window, dt, A, B, C, D, dt_bias, dt_softplus, *dt_limit, initial, reset, chunk
    )
    # of the inputs only the last are left in the state
    end = max(x.shape[1] - max(w - 1, 1), 0)
    tail = None if reset is None else reset[:, end:]
    _, conv = causal_conv1d(x[:, end:].flatten(2), taps, initial=flat, reset=tail)
    return y, conv.unflatten(2, (h, p)), state


def kernels() -> Any:
    """The module of the kernels, which imports triton."""
    return import_module("hybrid_lm.ops.triton.ssd_kernels")


class Shape(NamedTuple):
    """Sizes, and what the kernels are compiled for."""

    b: int
    t: int
    h: int
    p: int
    n: int
    g: int
    Q: int
    BN: int
    BP: int

    @property
    def chunks(self) -> int:
        return -(-self.t // self.Q)

    @property
    def heads(self) -> int:
        """Heads of a group."""
        return self.h // self.g

    def tiles(self, BN: int, BP: int) -> dict[str, Any]:
        """Sizes of tiles as the kernels take them; WHOLE: they end where the tensors do and need no mask."""
        whole = self.t % self.Q == 0 and self.n % BN == 0 and self.p % BP == 0
        return {"Q": self.Q, "BN": BN, "BP": BP, "WHOLE": whole}


def _shape(x: Tensor, B: Tensor, chunk: int, widest: int = 64) -> Shape:
    """The sizes, and tiles for them: chunks are shorter where numbers take more room on chip."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    if t < 1:
        raise ValueError(f"ssd: x has {t} tokens; at least one is needed")
    if h % g:
        raise ValueError(f"ssd: {h} heads are no multiple of {g} groups")
    widest = min(widest, {torch.bfloat16: 64, torch.float64: 16}.get(x.dtype, 32))
    return Shape(b, t, h, p, n, g, _tile(min(chunk, widest)), _tile(n), _tile(p))


def _kind(types: dict[str, Any], s: Shape, *sizes: str) -> str:
    """The name that the choices for these types and, of `sizes`, this state are listed under."""
    if types["PRECISION"] == "ieee" and "_double" in sizes:
        return "_double"
    if not _coarse(types):
        return "_exact" if "_exact" in sizes else ""
    fits = {"_deep": s.n > DEEP, "_wide": s.p > 64}
    return next((name for name in sizes if fits.get(name)), "")


def _tile(size: int) -> int:
    """The smallest power of two from 16 that holds so many."""
    return max(16, 1 << (size - 1).bit_length())


def _types(x: Tensor, B: Tensor, C: Tensor) -> dict[str, Any]:
    """In what type sums are kept, and what the tensor cores multiply.

    bfloat16 only where all is bfloat16. float16 would overflow where a product is wider than its factors:
    TF32 has its precision and the range of float32. float32 is three products of TF32.
    """
    import triton.language as tl

    if x.dtype == torch.float64:
        return {"WIDE": tl.float64, "OPERAND": tl.float64, "PRECISION": "ieee"}
    given = {v.dtype for v in (x, B, C)}
    if given == {torch.bfloat16}:
        return {"WIDE": tl.float32, "OPERAND": tl.bfloat16, "PRECISION": "tf32"}
    precision = "tf32" if given <= {torch.bfloat16, torch.float16} else "tf32x3"
    return {"WIDE": tl.float32, "OPERAND": tl.float32, "PRECISION": precision}


def _rows(v: Tensor) -> Tensor:
    """With the last axis side by side in memory, and tokens near enough for 32-bit offsets in a chunk; the
    other axes may lie as they like."""
    fits = (v.stride(-1) == 1 or v.shape[-1] == 1) and v.stride(1) < 2**24
    return v if fits else v.contiguous()


def _packed(*tensors: Tensor | None) -> Iterator[Any]:
    return (None if v is None else v.contiguous() for v in tensors)


def _options(
    dt_bias: Tensor | None, reset: Tensor | None, softplus: bool, limits: tuple[float, float]
) -> dict[str, Any]:
    # softplus keeps steps above 0 by itself
    free = limits == (0.0, math.inf) and softplus
    return {
        "HAS_BIAS": dt_bias is not None,
        "HAS_RESET": reset is not None,
        "SOFTPLUS": softplus,
        "LIMITS": not free,
        "LOW": limits[0],
        "HIGH": limits[1],
    }


def _flag(reset: Tensor | None, like: Tensor) -> Tensor:
    """A mask as bytes that lie side by side; where there is none, anything that has an address."""
    return like if reset is None else reset.contiguous().view(torch.uint8)


class Steps(NamedTuple):
    """What `steps_kernel` makes of dt: planes (planes b h chunks*Q), and the documents (b chunks*Q)."""

    planes: Tensor
    document: Tensor
    has_reset: bool

    @property
    def plane(self) -> int:
        """Numbers of one plane."""
        return self.planes[0].numel()


def _steps(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, reset: Tensor | None, options: dict[str, Any],
    s: Shape, types: dict[str, Any], kind: torch.dtype, planes: int,
) -> Steps:  # fmt: skip
    """Everything of the steps that every channel of a head would compute again: under 2% of x's bytes."""
    made = A.new_empty((planes, s.b, s.h, s.chunks * s.Q), dtype=kind)
    has_reset = reset is not None
    document = torch.empty((s.b, s.chunks * s.Q), dtype=torch.int32, device=A.device) if has_reset else made
    steps = Steps(made, document, has_reset)
    with on_device_of(A):
        kernels().steps_kernel[(s.chunks, -(-s.h // BH), s.b)](
            dt, A, dt_bias, _flag(reset, A), made, document, s.t, s.h, steps.plane, *dt.stride(),
            **options, PLANES=planes, Q=s.Q, BH=BH, WIDE=types["WIDE"], num_warps=4, num_stages=1,
        )  # fmt: skip
    return steps


# The pointers that the kernels take for a convolution, and what they are compiled for.
Convolution = tuple[tuple[Tensor | None, ...], dict[str, Any]]
NO_CONVOLUTION: Convolution = ((None,) * 4, {"HAS_CBIAS": False, "HAS_WINDOW": False, "W": 0})


def _walk(
    v: Tensor, u: Tensor, steps: Steps, start: Tensor | None, kept: Tensor, span: int, reverse: bool,
    s: Shape, types: dict[str, Any], conv: Convolution = NO_CONVOLUTION,
) -> Tensor:  # fmt: skip
    """The state at the end of a walk (b h p n), and into `kept` (b h spans p n) that at every span."""
    end = v.new_empty((s.b, s.h, s.p, s.n), dtype=wide(v))

    def launch(choice: Choice) -> tuple[Tensor, ...]:
        BN, BP = min(choice.BN, s.BN), min(choice.BP, s.BP)
        kernels().states_kernel[(s.b * s.h, -(-s.p // BP), -(-s.n // BN))](
            v, u, steps.planes, start, kept, end, *conv[0],
            s.t, s.h, s.p, s.n, s.heads, kept.shape[2], span, steps.plane,
            *v.stride()[:3], *u.stride()[:3],
            **types | choice.options | {"HAS_START": start is not None, "HAS_RESET": steps.has_reset}
            | {"REVERSE": reverse} | s.tiles(BN, BP) | conv[1],
        )  # fmt: skip
        return kept, end

    best(
        "ssd_states" + _kind(types, s, "_exact"),
        launch,
        v,
        (s.h * s.b, s.p, s.n, s.Q, types["PRECISION"], reverse),
    )
    return end


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, dt_low: float, dt_high: float, initial: Tensor | None, reset: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (b t h p) and the final state (b h p n)."""
    options = _options(dt_bias, reset, dt_softplus, (dt_low, dt_high))
    return _forward(x, dt, A, B, C, D, dt_bias, initial, reset, chunk, options, NO_CONVOLUTION)


def forward_conv(
    x: Tensor, weight: Tensor, conv_bias: Tensor | None, window: Tensor | None, dt: Tensor, A: Tensor,
    B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, dt_low: float,
    dt_high: float, initial: Tensor | None, reset: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, of silu(conv(x)): weight (h p w), conv_bias (h p), window (b w-1 h p)."""
    options = _options(dt_bias, reset, dt_softplus, (dt_low, dt_high))
    documents = None if reset is None else reset.cumsum(1, dtype=torch.int32)
    # a tap's channels side by side, as the kernels read them
    pointers = (*_packed(weight.permute(2, 0, 1), conv_bias, window), documents)
    settings = {"HAS_CBIAS": conv_bias is not None, "HAS_WINDOW": window is not None, "W": weight.shape[2]}
    conv = (pointers, settings)
    return _forward(x, dt, A, B, C, D, dt_bias, initial, reset, chunk, options, conv)


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial: Tensor | None, reset: Tensor | None, chunk: int, options: dict[str, Any], conv: Convolution,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    s, types = _shape(x, B, chunk), _types(x, B, C)
    x, B, C = _rows(x), _rows(B), _rows(C)
    A, D, dt_bias, initial = _packed(A, D, dt_bias, initial)
    y = x.new_empty(x.shape)
    steps = _steps(dt, A, dt_bias, reset, options, s, types, wide(x), 4 if _coarse(types) else 5)
    spans = _spans(s)
    span = -(-s.chunks // spans)
    if spans > 1:
        kept = x.new_empty((s.b, s.h, -(-s.chunks // span), s.p, s.n), dtype=wide(x))
        start, state = kept, _walk(x, B, steps, initial, kept, span, False, s, types, conv)
    else:
        start, state = initial, x.new_empty((s.b, s.h, s.p, s.n), dtype=wide(x))

    def launch(choice: Choice) -> tuple[Tensor, ...]:
        BP = min(choice.BP, s.BP)
        kernels().outputs_kernel[(s.b * s.h, -(-s.p // BP), -(-s.chunks // span))](
            x, steps.planes, steps.document, B, C, D, start, y, state, *conv[0],
            s.t, s.h, s.p, s.n, s.heads, -(-s.chunks // span), span, steps.plane,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
            **types | choice.options | {"HAS_D": D is not None, "HAS_RESET": steps.has_reset}
            | {"HAS_START": start is not None, "KEPT": spans > 1} | s.tiles(s.BN, BP) | conv[1],
        )  # fmt: skip
        return (y,) if spans > 1 else (y, state)

    kind = _kind(types, s, "_double", "_exact", "_deep", "_wide")
    about = (s.h * s.b, s.p, s.n, s.Q, types["PRECISION"], spans > 1, conv[1]["W"])
    best("ssd_outputs" + kind, launch, x, about)
    return y, state


def _coarse(types: dict[str, Any]) -> bool:
    """Whether the factors of products are bfloat16, so that no decay needs more than float32 has."""
    return str(types["OPERAND"]) == "bf16"


def _spans(s: Shape) -> int:
    """Into how many parts a sequence is cut so that the device is busy: 1 where the heads alone do that."""
    heads = max(1, s.b * s.h)
    return 1 if heads >= ENOUGH // 2 else min(s.chunks, -(-ENOUGH // heads))


def backward(
    gy: Tensor | None, gstate: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, dt_low: float, dt_high: float,
    initial: Tensor | None, reset: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state; empty for what is absent."""
    if x.shape[3] > HALVED and x.shape[3] % 2 == 0:
        return _backward_in_halves(
            gy, gstate, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, initial, reset, chunk
        )
    s, types = _backward_shape(x, B, chunk), _types(x, B, C)
    gy = x.new_zeros(x.shape) if gy is None else gy
    gy, x, B, C = _rows(gy), _rows(x), _rows(B), _rows(C)
    A, D, dt_bias, initial, gstate = _packed(A, D, dt_bias, initial, gstate)
    options = _options(dt_bias, reset, dt_softplus, (dt_low, dt_high))
    steps = _steps(dt, A, dt_bias, reset, options, s, types, wide(x), 7)
    # states and their gradients are only multiplied: in the type of the factors they lose nothing more
    kept = torch.bfloat16 if _coarse(types) else wide(x)
    before, after = (x.new_empty((s.b, s.h, s.chunks, s.p, s.n), dtype=kept) for _ in range(2))
    _walk(x, B, steps, initial, before, 1, False, s, types)
    ginitial = _walk(gy, C, steps, gstate, after, 1, True, s, types)
    share, parts = _shares(s)
    gx, gdt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    gB, gC = (v.new_empty((parts, *v.shape), dtype=v.dtype if parts == 1 else wide(x)) for v in (B, C))
    rows = torch.empty_like(steps.planes[:5])
    inner = x.new_empty((s.b, s.h, s.chunks, s.BP), dtype=wide(x))
    sums = x.new_empty((3, s.b, s.chunks, s.h), dtype=wide(x))

    def launch(choice: Choice) -> tuple[Tensor, ...]:
        kernels().gradients_kernel[(s.chunks, s.g * parts, s.b)](
            gy, x, B, C, D, steps.planes, steps.document, before, after, gx, gB, gC, rows, inner,
            s.t, s.h, s.p, s.n, s.heads, share, steps.plane,
            *gy.stride()[:3], *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
            **types | choice.options | {"HAS_D": D is not None, "HAS_RESET": steps.has_reset}
            | s.tiles(s.BN, s.BP),
        )  # fmt: skip
        return gx, gB, gC, rows, inner

    best(
        "ssd_gradients" + _kind(types, s, "_exact", "_deep"),
        launch,
        x,
        (s.h * s.b, s.p, s.n, s.Q, types["PRECISION"], share),
    )
    with on_device_of(x):
        kernels().finish_kernel[(s.chunks, -(-s.h // BH), s.b)](
            A, _flag(reset, x), steps.planes, rows, inner, gdt, sums, s.t, s.h, steps.plane,
            HAS_RESET=steps.has_reset, Q=s.Q, BH=BH, BP=s.BP, WIDE=types["WIDE"], num_warps=4, num_stages=1,
        )  # fmt: skip
    gA, gD, gbias = sums.sum((1, 2)).unbind(0)
    gB, gC = (v.sum(0).to(like.dtype) if parts > 1 else v[0] for v, like in ((gB, B), (gC, C)))

    def given(grad: Tensor, like: Tensor | None) -> Tensor:
        return x.new_empty(0) if like is None else grad.to(like.dtype, copy=True)

    return (
        gx, gdt, given(gA, A), gB, gC, given(gD, D), given(gbias, dt_bias), given(ginitial, initial),
    )  # fmt: skip


def _backward_in_halves(
    gy: Tensor | None, gstate: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, dt_low: float, dt_high: float,
    initial: Tensor | None, reset: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same for wide heads: as twice as many, two and two with the same steps."""

    def halves(v: Tensor | None, axis: int) -> Tensor | None:
        return None if v is None else v.unflatten(axis, (2, -1)).flatten(axis - 1, axis)

    def twice(v: Tensor, axis: int) -> Tensor:
        # wide, as their gradients are rounded after they are added
        return v.to(wide(x)).repeat_interleave(2, axis)

    def once(grad: Tensor, like: Tensor) -> Tensor:
        return grad.unflatten(-1, (-1, 2)).sum(-1).to(like.dtype)

    D2, bias2 = (None if v is None else twice(v, 0) for v in (D, dt_bias))
    gx, gdt, gA, gB, gC, gD, gbias, ginitial = backward(
        halves(gy, 3), halves(gstate, 2), x.unflatten(3, (2, -1)).flatten(2, 3), twice(dt, 2), twice(A, 0),
        B, C, D2, bias2, dt_softplus, dt_low, dt_high, halves(initial, 2), reset, chunk,
    )  # fmt: skip
    return (
        gx.view(x.shape), once(gdt, dt), once(gA, A), gB, gC, gD if D is None else once(gD, D),
        gbias if dt_bias is None else once(gbias, dt_bias),
        ginitial if initial is None else ginitial.view(initial.shape),
    )  # fmt: skip


def _backward_shape(x: Tensor, B: Tensor, chunk: int) -> Shape:
    """Shorter chunks for wide states, whose gradients would not fit on chip beside them."""
    widest = 64 if B.shape[3] * max(x.shape[3], 64) <= 128 * 64 else 32
    return _shape(x, B, chunk, widest if x.dtype == torch.bfloat16 else 16)


def _shares(s: Shape) -> tuple[int, int]:
    """How many heads of a group one program takes one after the other, and how many shares that makes.

    All of them where the chunks are enough programs; the shares are summed by a second pass.
    """
    wanted = min(s.heads, max(1, ENOUGH // max(1, s.b * s.g * s.chunks)))
    share = -(-s.heads // wanted)
    return share, -(-s.heads // share)


def step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, dt_low: float, dt_high: float, state: Tensor, reset: Tensor | None,
) -> Tensor:  # fmt: skip
    """One token: y (b 1 h p); the state (b h p n) is updated in place."""
    s = _shape(x, B, 1)
    x, B, C = _rows(x), _rows(B), _rows(C)
    A, D, dt_bias = _packed(A, D, dt_bias)
    y = x.new_empty(x.shape)

    def launch(choice: Choice) -> None:
        BP = min(choice.BP, s.BP)
        kernels().step_kernel[(s.b * s.h, -(-s.p // BP))](
            x, dt, A, B, C, D, dt_bias, _flag(reset, x), state, y,
            s.h, s.p, s.n, s.heads,
            *(m for v in (x, dt, B, C) for m in (v.stride(0), v.stride(2))),
            **_options(dt_bias, reset, dt_softplus, (dt_low, dt_high)) | choice.options
            | {"HAS_D": D is not None, "BN": s.BN, "BP": BP, "WIDE": _types(x, B, C)["WIDE"]},
        )  # fmt: skip

    # not tuned: each run changes the state
    with on_device_of(x):
        launch(Choice(BP=max(1, 2048 // s.BN), num_warps=4))
    return y


_ssd = torch.library.custom_op("hybrid_lm_triton::ssd", forward, mutates_args=())
_ssd_conv = torch.library.custom_op("hybrid_lm_triton::ssd_conv", forward_conv, mutates_args=())
_ssd_backward = torch.library.custom_op("hybrid_lm_triton::ssd_backward", backward, mutates_args=())
_step = torch.library.custom_op("hybrid_lm_triton::ssd_step", step, mutates_args=("state",))


@_ssd.register_fake
def _(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, initial, reset, chunk):
    b, _, h, p = x.shape
    return x.new_empty(x.shape), x.new_empty((b, h, p, B.shape[3]), dtype=wide(x))


@_ssd_conv.register_fake
def _(
    x, weight, conv_bias, window, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, initial, reset, chunk
):
    b, _, h, p = x.shape
    return x.new_empty(x.shape), x.new_empty((b, h, p, B.shape[3]), dtype=wide(x))


@_step.register_fake
def _(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, state, reset):
    return x.new_empty(x.shape)


@_ssd_backward.register_fake
def _(gy, gstate, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, initial, reset, chunk):
    given = (x, dt, A, B, C, D, dt_bias, initial)
    return (*(x.new_empty(0) if v is None else v.new_empty(v.shape) for v in given),)


def _setup(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.dt_low, ctx.dt_high, initial, reset, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, initial, reset)
    # an unused output must not cost zeros of its size
    ctx.set_materialize_grads(False)


def _gradient(ctx, gy, gstate):
    *tensors, initial, reset = ctx.saved_tensors
    options = (ctx.dt_softplus, ctx.dt_low, ctx.dt_high)
    *given, ginitial = _ssd_backward(gy, gstate, *tensors, *options, initial, reset, ctx.chunk)
    grads = [None if v is None else g for g, v in zip(given, tensors, strict=True)]
    return *grads, None, None, None, None if initial is None else ginitial, None, None


def _refuse(ctx, *grads):
    raise ValueError("ssd: Triton kernels have no gradients of gradients; backend='reference' has them")


_ssd.register_autograd(_gradient, setup_context=_setup)
_ssd_backward.register_autograd(_refuse)
register("ssd", "triton", run=ssd_triton, why_not=why_not)
