"""Inputs for the laws of the ops, by table, and how a result is compared with another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm import ops

Inputs = dict[str, Any]
FAST = ("torch", "native")


@dataclass(frozen=True)
class Case:
    """An op and how to make its float64 inputs; `chain`: the most roundings in a row behind a result."""

    id: str
    op: Callable[..., Any]
    make: Callable[[torch.Generator], Inputs]
    chain: int = 2**12


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def reset_of(g: torch.Generator, kind: bool | str, b: int, t: int) -> Inputs:
    """`reset` (b t) as a case wants it: none, at a fifth of all tokens, or "all", or "first"."""
    if not kind:
        return {}
    if isinstance(kind, str):
        return {"reset": (torch.arange(t) < (t if kind == "all" else 1)).expand(b, t)}
    return {"reset": torch.rand(b, t, generator=g) < 0.2}


def name_of(op: str, sizes: dict[str, int], *words: str | bool) -> str:
    return "-".join([op, *(f"{k}{v}" for k, v in sizes.items()), *(w for w in words if isinstance(w, str))])


def words_of(full: bool, reset: bool | str, without: Sequence[str]) -> list[str | bool]:
    reset = reset if isinstance(reset, str) else reset and "some"
    return [full or "bare", reset and f"reset_{reset}", *(f"no_{w}" for w in without)]


def only(inputs: Inputs, without: Sequence[str]) -> Inputs:
    assert set(without) <= set(inputs), without
    return {k: v for k, v in inputs.items() if k not in without}


def conv(
    t: int, w: int = 4, *, b: int = 2, d: int = 6, full: bool = True, reset: bool | str = True,
    without: Sequence[str] = (),
) -> Case:  # fmt: skip
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {"x": randn(g, b, t, d), "weight": randn(g, d, w)}
        if full:
            inputs |= {"bias": randn(g, d), "activation": "silu", "initial": randn(g, b, w - 1, d)}
        return only(inputs | reset_of(g, reset, b, t), without)

    name = name_of("conv", {"b": b, "t": t, "d": d, "w": w}, *words_of(full, reset, without))
    # the sum of a weight's gradient over all tokens, of which each has w terms
    return Case(name, ops.causal_conv1d, make, chain=16 + b * t + w)


def scan(
    t: int, *, b: int = 2, d: int = 6, n: int = 3, full: bool = True, reset: bool | str = True,
    without: Sequence[str] = (),
) -> Case:  # fmt: skip
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {
            "x": randn(g, b, t, d),
            "dt": randn(g, b, t, d).abs(),
            "A": -randn(g, d, n).abs(),
            "B": randn(g, b, t, n),
            "C": randn(g, b, t, n),
        }
        if full:
            bias = randn(g, d)
            # a step below 0, which softplus would keep away, lets the state grow
            bias = bias.abs() if "dt_softplus" in without else bias
            inputs |= {"D": randn(g, d), "z": randn(g, b, t, d), "dt_bias": bias}
            inputs |= {"dt_softplus": True, "initial": randn(g, b, d, n)}
        return only(inputs | reset_of(g, reset, b, t), without)

    name = name_of("scan", {"b": b, "t": t, "d": d, "n": n}, *words_of(full, reset, without))
    # along the tokens there and back, over states, over channels, and over the batch
    return Case(name, ops.selective_scan, make, chain=16 + 2 * t + b * t + n + d)


def ssd(
    t: int, chunk: int = 8, groups: int = 2, *, b: int = 2, h: int = 4, p: int = 3, n: int = 5,
    full: bool = True, reset: bool | str = True, without: Sequence[str] = (),
) -> Case:  # fmt: skip
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {
            "x": randn(g, b, t, h, p),
            "dt": randn(g, b, t, h).abs(),
            "A": -randn(g, h).abs(),
            "B": randn(g, b, t, groups, n),
            "C": randn(g, b, t, groups, n),
            "chunk": chunk,
        }
        if full:
            inputs |= {"D": randn(g, h), "dt_bias": randn(g, h), "dt_softplus": True, "dt_limit": (0.1, 2.0)}
            inputs |= {"initial": randn(g, b, h, p, n)}
        return only(inputs | reset_of(g, reset, b, t), without)

    sizes = {"b": b, "t": t, "h": h, "p": p, "g": groups, "n": n, "c": chunk}
    # along the tokens there and back, over states, channels and heads, and over the batch
    chain = 16 + 2 * t + b * t + n + p + h
    return Case(name_of("ssd", sizes, *words_of(full, reset, without)), ops.ssd, make, chain=chain)


def delta_rule(
    t: int, chunk: int = 8, groups: int = 2, *, b: int = 2, h: int = 4, k: int = 5, p: int = 3,
    full: bool = True, reset: bool | str = True, without: Sequence[str] = (),
) -> Case:  # fmt: skip
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {
            "q": randn(g, b, t, groups, k),
            # keys of length 1 and betas up to 2: the state stays bounded, as in the layer
            "k": F.normalize(randn(g, b, t, groups, k), dim=-1),
            "v": randn(g, b, t, h, p),
            "log_decay": -randn(g, b, t, h).abs(),
            "beta": 2 * randn(g, b, t, h).sigmoid(),
            "chunk": chunk,
        }
        if full:
            inputs |= {"scale": 0.7, "initial": randn(g, b, h, k, p)}
        return only(inputs | reset_of(g, reset, b, t), without)

    sizes = {"b": b, "t": t, "h": h, "p": p, "g": groups, "k": k, "c": chunk}
    # along the tokens there and back, over keys, values and heads, and over the batch
    chain = 16 + 2 * t + b * t + k + p + h
    name = name_of("delta_rule", sizes, *words_of(full, reset, without))
    return Case(name, ops.delta_rule, make, chain=chain)


def attention(
    t: int,
    s: int,
    *,
    docs: bool = False,
    slopes: bool = False,
    sinks: bool = False,
    heads: int = 4,
    **options: Any,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {
            "q": randn(g, 2, t, heads, 6),
            "k": randn(g, 2, s, 2, 6),
            "v": randn(g, 2, s, 2, 5),
        }
        if docs:
            ids = torch.randint(0, 4, (2, s), generator=g).sort(1).values
            inputs |= {"q_docs": ids[:, s - t :], "k_docs": ids}
        if slopes:
            inputs["alibi_slopes"] = ops.alibi_slopes(heads)
        if sinks:
            inputs["sinks"] = randn(g, heads)
        return inputs | options

    words = [
        *("docs",) * docs,
        *("alibi",) * slopes,
        *("sinks",) * sinks,
        *(f"{k}{v}" for k, v in options.items()),
    ]
    return Case("-".join([f"attention-t{t}-s{s}-h{heads}", *words]), ops.attention, make)


def loss(*, bias: bool = False, **options: Any) -> Case:
    def make(g: torch.Generator) -> Inputs:
        labels = torch.randint(0, 11, (20,), generator=g)
        labels[::3] = -100
        inputs: Inputs = {"x": randn(g, 20, 6), "weight": randn(g, 11, 6), "labels": labels, "chunk": 4}
        return inputs | ({"bias": randn(g, 11)} if bias else {}) | options

    words = [*("bias",) * bias, *(f"{k}{v}" for k, v in options.items())]
    return Case("-".join(["loss", *words]), ops.linear_cross_entropy, make)


def norm(
    *, gate: bool = False, weight: bool = True, rows: tuple[int, ...] = (2, 3), d: int = 8, **options: Any
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {"y" if gate else "x": randn(g, *rows, d)}
        inputs |= {"gate": randn(g, *rows, d)} if gate else {}
        return inputs | ({"weight": randn(g, d)} if weight else {}) | options

    op = ops.gated_rms_norm if gate else ops.rms_norm
    words = [*("bare",) * (not weight), *(f"{k}_{v}" for k, v in options.items())]
    count = torch.Size(rows).numel()
    return Case(name_of(op.__name__, {"r": count, "d": d}, *words), op, make, chain=16 + count + d)


def lru(
    t: int,
    *,
    b: int = 2,
    d: int = 6,
    full: bool = True,
    reset: bool | str = True,
    without: Sequence[str] = (),
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {"x": randn(g, b, t, d), "log_a": -randn(g, b, t, d).abs()}
        return only(
            inputs | ({"initial": randn(g, b, d)} if full else {}) | reset_of(g, reset, b, t), without
        )

    name = name_of("lru", {"b": b, "t": t, "d": d}, *words_of(full, reset, without))
    # along the tokens there and back
    return Case(name, ops.linear_recurrence, make, chain=16 + 2 * t)


def linear(rows: int = 3, d: int = 19, out: int = 7, *, bias: bool = True) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {"x": randn(g, rows, d), "weight": randn(g, out, d)}
        return inputs | ({"bias": randn(g, out)} if bias else {})

    name = name_of("linear", {"r": rows, "d": d, "o": out}, *("bare",) * (not bias))
    return Case(name, ops.linear, make, chain=16 + d)


def grouped(*sizes: int, d: int = 5, out: int = 7, bias: bool = True) -> Case:
    def make(g: torch.Generator) -> Inputs:
        inputs: Inputs = {"x": randn(g, sum(sizes), d), "weight": randn(g, len(sizes), out, d)}
        inputs["ends"] = torch.tensor(sizes).cumsum(0)
        return inputs | ({"bias": randn(g, len(sizes), out)} if bias else {})

    name = name_of("grouped", {"d": d, "o": out}, "_".join(map(str, sizes)), *("bare",) * (not bias))
    # over the inputs, and for a weight's gradient over the rows
    return Case(name, ops.grouped_linear, make, chain=16 + max(d, *sizes))


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Leaves of the given type that want gradients, and everything else as it is."""

    def leaf(v: Any) -> Any:
        wanted = isinstance(v, Tensor) and v.is_floating_point()
        return v.detach().to(dtype, copy=True).requires_grad_() if wanted else v

    return {k: leaf(v) for k, v in inputs.items()}


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that get a gradient."""
    wanted = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    return {k: v for k, v in wanted.items() if k != "alibi_slopes"}


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def run(op: Callable[..., Any], inputs: Inputs, unused: int | None = None, **options: Any) -> list[Tensor]:
    """Outputs, then the gradient of every float input under fixed random weights of the outputs.

    The weights are whole numbers: what an op is given as gradients is the same in every type. The output with
    the number `unused` has no part in it.
    """
    ys = outputs(op(**inputs, **options))
    g = torch.Generator().manual_seed(1)
    weights = [torch.randint(-2, 3, y.shape, generator=g).double() for y in ys]
    total = sum(
        (y.double() * w).sum() for k, (y, w) in enumerate(zip(ys, weights, strict=True)) if k != unused
    )
    leaves = list(leaves_of(inputs).values())
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [y.detach() for y in ys] + [
        torch.zeros_like(v) if g is None else g for g, v in zip(grads, leaves, strict=True)
    ]


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value, or to 1 for small ones."""
    if not expected.numel():
        return 0.0
    a, e = actual.detach().double(), expected.detach().double()
    return float((a - e).abs().max() / e.abs().max().clamp(min=1))
