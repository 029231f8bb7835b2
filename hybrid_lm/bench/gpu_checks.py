"""What must be right before anything is timed: small odd shapes on the device against float64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hybrid_lm.bench.gpu_device import poisoned
from hybrid_lm.ops import causal_conv1d, selective_scan, ssd
from hybrid_lm.ops.precision import wide

Sizes = Mapping[str, int]
Given = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Axes: b batch, t tokens, d channels, w taps, n states, h heads, p head dim, g groups.
SIZES: dict[str, tuple[Sizes, ...]] = {
    op: tuple(dict(zip(axes, sizes, strict=True)) for sizes in table)
    for op, axes, table in (
        (
            "causal_conv1d",
            "btdw",
            ((1, 1, 1, 2), (3, 1, 65, 4), (2, 3, 33, 2), (1, 5, 6, 8), (2, 64, 64, 4), (3, 131, 40, 3)),
        ),
        (
            "selective_scan",
            "btdn",
            ((1, 1, 1, 1), (3, 1, 65, 16), (2, 3, 33, 5), (1, 63, 7, 3), (2, 64, 64, 16), (3, 131, 40, 24)),
        ),
        (
            "ssd",
            "bthpgn",
            (
                *((1, 1, 1, 1, 1, 1), (3, 1, 4, 64, 2, 16), (2, 3, 6, 17, 2, 5), (1, 63, 2, 8, 1, 3)),
                *((2, 64, 4, 64, 1, 128), (3, 131, 4, 16, 2, 24)),
            ),
        ),
    )
}
OPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "causal_conv1d": causal_conv1d,
    "selective_scan": selective_scan,
    "ssd": ssd,
}


def inputs(op: str, s: Sizes, full: bool) -> Given:
    """Float64 inputs on the CPU; with everything that is optional, or with nothing of it."""
    g = torch.Generator().manual_seed(0)

    def new(axes: str, **more: int) -> Tensor:
        sizes = [{**s, **more}[axis] for axis in axes]
        return torch.randn(*sizes, generator=g, dtype=torch.float64)

    if op == "causal_conv1d":
        made: Given = {"x": new("btd"), "weight": new("dw")}
        more: Given = {"bias": new("d"), "activation": "silu", "initial": new("bwd", w=s["w"] - 1)}
    elif op == "selective_scan":
        made = {
            "x": new("btd"),
            "dt": new("btd").abs(),
            "A": -new("dn").abs(),
            "B": new("btn"),
            "C": new("btn"),
        }
        more = {
            "D": new("d"),
            "z": new("btd"),
            "dt_bias": new("d"),
            "dt_softplus": True,
            "initial": new("bdn"),
        }
    else:
        made = {"x": new("bthp"), "dt": new("bth").abs(), "A": -new("h").abs()}
        made |= {"B": new("btgn"), "C": new("btgn")}
        more = {"D": new("h"), "dt_bias": new("h"), "dt_softplus": True, "dt_limit": (0.1, 2.0)}
        more["initial"] = new("bhpn")
    if not full:
        return made
    return made | more | {"reset": torch.rand(s["b"], s["t"], generator=g) < 0.2}


def results(
    op: str, given: Given, dtype: torch.dtype, device: torch.device, backend: str
) -> dict[str, Tensor]:
    """Outputs, and the gradients of all inputs under fixed weights of both outputs, which are whole numbers
    and so the same in every type; then the outputs without gradients, the state where it lies."""

    def at(v: Any, leaf: bool = True) -> Any:
        if not isinstance(v, Tensor):
            return v
        return v.to(device, dtype, copy=True).requires_grad_(leaf) if v.is_floating_point() else v.to(device)

    here = {name: at(v) for name, v in given.items()}
    leaves = {name: v for name, v in here.items() if isinstance(v, Tensor) and v.requires_grad}
    outputs = OPS[op](**here, backend=backend)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randint(-2, 3, v.shape, generator=g).to(device, v.dtype) for v in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    with torch.no_grad():
        alone = OPS[op](**{name: at(v, False) for name, v in given.items()}, donate=True, backend=backend)
    found = dict(zip(("y", "state"), outputs, strict=True)) | dict(
        zip(("y alone", "state alone"), alone, strict=True)
    )
    found |= {
        f"d_{name}": torch.zeros_like(v) if grad is None else grad
        for (name, v), grad in zip(leaves.items(), grads, strict=True)
    }
    return {name: v.detach().double().cpu() for name, v in found.items()}


def limit(op: str, s: Sizes, dtype: torch.dtype) -> float:
    """Roundings of the wide type, one for each link of the longest chain (tokens there and back, the batch,
    states and channels), one of the result's."""
    chain = 16 + 2 * s["t"] + s["b"] * s["t"] + sum(s.get(axis, 0) for axis in "dnphw")
    own = wide(torch.empty(0, dtype=dtype))
    return chain * torch.finfo(own).eps + (dtype != own) * torch.finfo(dtype).eps / 2


def error(found: Tensor, true: Tensor) -> float:
    """Over the largest true value, or over 1 where all are smaller; NaN where anything is."""
    return float((found - true).abs().max() / true.abs().max().clamp(min=1)) if true.numel() else 0.0


def checks(
    op: str, backend: str, device: torch.device, matmul_in_bf16: bool = False
) -> Iterator[dict[str, Any]]:
    """One row for every shape and dtype: the largest error, of what, and whether it may be so large.

    matmul_in_bf16  products are made of factors rounded to the input's type: as many roundings of it as a
                    product has factors, and one between chunks
    """
    for s in SIZES[op]:
        for full in (True, False):
            given = inputs(op, s, full)
            for dtype in DTYPES:
                rounded = {
                    name: v.to(dtype).double() if isinstance(v, Tensor) and v.is_floating_point() else v
                    for name, v in given.items()
                }
                true = results(op, rounded, torch.float64, torch.device("cpu"), "reference")
                allowed = limit(op, s, dtype) + matmul_in_bf16 * 3 * torch.finfo(dtype).eps / 2
                row: dict[str, Any] = {"op": op, "backend": backend, "sizes": dict(s), "all_inputs": full}
                row |= {"dtype": str(dtype).removeprefix("torch."), "limit": allowed}
                try:
                    with poisoned():
                        found = results(op, rounded, dtype, device, backend)
                except Exception as problem:  # A kernel that does not start: the others can still be checked.
                    lines = str(problem).strip().splitlines() or [""]
                    yield row | {"ok": False, "note": f"{type(problem).__name__}: {lines[0]}"}
                    continue
                errors = {name: error(found[name], v) for name, v in true.items()}
                worst = max(
                    errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name]
                )
                yield row | {"ok": errors[worst] <= allowed, "worst": worst, "error": errors[worst]}
