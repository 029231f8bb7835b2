"""Which implementation of an op runs: decided once, said aloud, never changed in the middle of a run.

An op has one signature and several backends. `reference` (the numbered steps) and `torch` (fast, chunked)
always exist; a kernel joins with one `register` call that brings a function and an availability check:

    register("ssd", "mamba_ssm", run=ssd_mamba_ssm, why_not=lambda d: None if d == "cuda" else "CUDA only")

Nothing here falls back: a backend that is asked for and cannot run is a ValueError that says why and what
would work.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_lm.registry import unknown

# The packages of others that `ops/external` calls.
EXTERNAL = ("mamba_ssm", "causal_conv1d", "fla")
# Best first; `auto` takes the first one that can run: ours, those of others, PyTorch.
BACKENDS = ("native", "triton", *EXTERNAL, "torch", "reference")


@dataclass(frozen=True)
class Implementation:
    """One backend of one op. `why_not(device_type)` is None where it can run, else the reason in words."""

    run: Callable[..., Any]
    why_not: Callable[[str], str | None]


class Row(NamedTuple):
    """One line of `report`."""

    op: str
    backend: str
    chosen: bool
    why_not: str | None


_OPS: dict[str, dict[str, Implementation]] = {}
# What an available backend has to pass on a device, entered by `proof.py`. In an export there is nothing to.
CHECKS: list[Callable[[str, str, str, Callable[..., Any], Callable[..., Any]], str | None]] = []
_PARTS: dict[str, tuple[str, ...]] = {}


def _everywhere(device: str) -> str | None:
    return None


def register(
    op: str, backend: str, *, run: Callable[..., Any], why_not: Callable[[str], str | None] = _everywhere
) -> None:
    """Add one backend to an op. A signature unlike that of the others is a TypeError that shows both.

    Of ours that are available (`why_not` is None), those for GPUs must also agree with the PyTorch form
    there: `proof.py`.
    """
    assert backend in BACKENDS, backend
    table = _OPS.setdefault(op, {})
    for other in table.values():
        if _shape_of(other.run) != _shape_of(run):
            raise TypeError(
                f"{op}: the backends drifted apart:\n"
                f"  {other.run.__qualname__}{_shape_of(other.run)}\n"
                f"  {run.__qualname__}{_shape_of(run)}\ngive both the same parameters, kinds and defaults"
            )

    def reason(device: str) -> str | None:
        missing = why_not(device)
        if missing is not None or "torch" not in table:
            return missing
        plain = table["torch"].run
        return next((word for check in CHECKS if (word := check(op, backend, device, run, plain))), None)

    table[backend] = Implementation(run, reason)


def _shape_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature without annotations: names, kinds and defaults are what a caller depends on."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)


def define(
    op: str,
    *,
    reference: Callable[..., Any],
    torch: Callable[..., Any],
    parts: tuple[str, ...] = (),
) -> Callable[[str | None, Tensor], Callable[..., Any]]:
    """Enter an op in the table.

    Returns `pick(backend, tensor)`, which the public function calls to get the implementation;
    `backend=None` means the best available one for the tensor's device. `parts`: the ops that this one is
    made of. Its `torch` form runs each on its own backend; its kernels stand for them.
    """
    register(op, "reference", run=reference)
    register(op, "torch", run=torch)
    _PARTS[op] = parts

    def pick(backend: str | None, tensor: Tensor) -> Callable[..., Any]:
        device = tensor.device.type
        if backend is None:
            return _OPS[op][default_backend(op, device)].run
        reason = _why_not(op, backend, device)
        if reason is not None:
            raise ValueError(f"{op}: backend {backend!r} cannot run on {device}: {reason}")
        return _OPS[op][backend].run

    return pick


# The answer depends on what is installed, not on tensors: a compiled graph takes it as a constant.
@torch.compiler.assume_constant_result
def default_backend(op: str, device: str) -> str:
    """The backend that `auto` means for this op on this device type."""
    return next(b for b in BACKENDS if b in _OPS[op] and _OPS[op][b].why_not(device) is None)


@torch.compiler.assume_constant_result
def _why_not(op: str, backend: str, device: str) -> str | None:
    if backend not in BACKENDS:
        return unknown("backend", backend, ("auto", *BACKENDS))
    if backend not in _OPS[op]:
        return f"this version has no {backend} kernel for it; it has: {', '.join(_OPS[op])}"
    return _OPS[op][backend].why_not(device)


def select(requested: str | Mapping[str, str] = "auto", device: str = "cpu") -> dict[str, str]:
    """Choose a backend for every op, once, when a model is built.

    requested  one name for all ops, or {op: name} (ops that are not listed are `auto`)
    device     a device type: "cpu", "cuda", "mps"
    Returns {op: backend}. Raises ValueError for an unknown op, an unknown backend, and a backend that cannot
    run here.
    """
    wanted = dict.fromkeys(_OPS, "auto")
    wanted |= dict.fromkeys(_OPS, requested) if isinstance(requested, str) else requested
    problems: dict[str, list[str]] = {}
    for op, backend in wanted.items():
        if op not in _OPS:
            raise ValueError(unknown("op", op, _OPS))
        if backend != "auto" and (reason := _why_not(op, backend, device)) is not None:
            problems.setdefault(f"backend {backend!r} cannot run on {device}: {reason}", []).append(op)
    if problems:
        said = "; ".join(f"{', '.join(ops)}: {reason}" for reason, ops in problems.items())
        hint = ". For some ops alone, name them: {ssd: torch}" if isinstance(requested, str) else ""
        raise ValueError(said + hint)
    return {op: _whole(op, wanted, device) if b == "auto" else b for op, b in wanted.items()}


def _whole(op: str, wanted: Mapping[str, str], device: str) -> str:
    """What `auto` means for an op: where some of its parts were asked for by name, a kernel of that name, or
    the parts as they were asked for."""
    asked = {wanted[part] for part in _PARTS.get(op, ())} - {"auto"}
    if not asked:
        return default_backend(op, device)
    kernels = asked - {"torch", "reference"}
    name = next(iter(asked)) if len(asked) == 1 and kernels else "torch"
    return name if name in _OPS[op] and _OPS[op][name].why_not(device) is None else "torch"


def report(
    device: str = "cpu",
    chosen: Mapping[str, str] | None = None,
    *,
    op: str | None = None,
    without: Collection[str] = (),
) -> list[Row]:
    """Every (op, backend), whether it is chosen (`chosen`: select's answer), and why it cannot run.

    op       this op alone
    without  backends that are not asked: to know whether it can run, a package may have to be imported
    """
    names = sorted(_OPS) if op is None else [op]
    chosen = {name: default_backend(name, device) for name in names} if chosen is None else chosen
    return [
        Row(name, backend, backend == chosen.get(name), _OPS[name][backend].why_not(device))
        for name in names
        for backend in BACKENDS
        if backend in _OPS[name] and backend not in without
    ]
