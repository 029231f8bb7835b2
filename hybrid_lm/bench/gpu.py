"""`bench gpu`: our kernels beside their floors and every installed peer, each checked before it is timed.

At full size the float64 truth is that of the last sequence of the batch alone: the output's gradient is zero
elsewhere, so the gradients of what all sequences share are that one's too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybrid_lm.bench.gpu_cases import GpuCase, Sizes, able, reasons
from hybrid_lm.bench.gpu_checks import SIZES, checks
from hybrid_lm.bench.gpu_device import (
    ceilings,
    clocks,
    description,
    graph_times,
    no_gpu,
    poisoned,
    times,
    times_after,
)
from hybrid_lm.bench.gpu_models import ModelCase, known, measure_model
from hybrid_lm.bench.gpu_peers import Inputs, Way
from hybrid_lm.bench.measure import Candidate, Row, add_ratios, attempt, choose, interleaved, spread

Tell = Callable[[str], None]
LIMIT = 4 * torch.finfo(torch.bfloat16).eps
"""Errors in units of the largest value: half an eps for the result, for both factors of a product and for a
state between chunks, and twice that."""
EACH = 5
"""Timed runs of a candidate in each round."""
CACHE = 256 << 20
"""Bytes of state that steps take turns with: several times a GPU's cache."""
PARAMETERS = frozenset({"A", "D", "dt_bias", "weight", "bias"})


@dataclass
class Ready:
    """A candidate with its inputs on the device."""

    way: Way
    inputs: Inputs
    dy: Tensor


def bench_gpu(
    *,
    cases: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    repeat: int = 5,
    compiled: bool = True,
    device: torch.device | None = None,
    small: bool = False,
    tell: Tell = lambda text: None,
    done: Callable[[Mapping[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Checks, then measures; returns the document that is written.

    cases    names of what is `known`; None for all
    only     names of candidates; None for all
    compiled whether candidates under torch.compile take part
    device   by default the first GPU; a test gives the CPU
    small    at sizes that only show that everything works
    done     called with the document after the checks and after each case

    Raises ValueError for a name that is not known, and where there is no GPU.
    """
    if device is None and (reason := no_gpu()) is not None:
        raise ValueError(f"{reason}; --dry-run lists what would be measured")
    device = torch.device("cuda", 0) if device is None else device
    chosen = [known()[name] for name in choose("case", cases, known())]
    kind = device.type
    names = choose("candidate", only, [c.name for case in chosen for c in case.candidates(kind)])
    document: dict[str, Any] = {
        "bench": "gpu",
        "machine": description(device),
        "clock": "device events" if kind == "cuda" else "wall time",
        "repeat": repeat,
        "ceilings": {} if small else ceilings(device),
        "checks": [],
        "cases": [],
    }
    wrong = check_ours(document, chosen, names, device, tell)
    done(document)
    for case in chosen:
        candidates = [c for c in case.candidates(kind) if c.name in names and (compiled or not c.compiled)]
        sizes = case.small if small else case.sizes
        said = f"{case.name}: "
        told = partial(_with, said, tell)
        if isinstance(case, ModelCase):
            found = measure_model(case, sizes, [c.name for c in candidates], device, repeat, told)
        else:
            found = measure(case, sizes, candidates, wrong, device, repeat, told)
        document["cases"].append(found | {"clocks": clocks() if kind == "cuda" else None})
        done(document)
    return document


def _with(before: str, tell: Tell, text: str) -> None:
    tell(before + text)


def check_ours(
    document: dict[str, Any],
    cases: Sequence[GpuCase | ModelCase],
    names: Sequence[str],
    device: torch.device,
    tell: Tell,
) -> set[tuple[str, str]]:
    """Writes the rows of all checks into the document; the (op, backend) that fail one."""
    wrong = set()
    for op in dict.fromkeys(case.op for case in cases):
        for backend in able(op, device.type):
            if backend not in names or op not in SIZES:
                continue
            tell(f"{op}: checking {backend} on small shapes")
            # The matrix units of a GPU take factors of the input's type.
            rows = list(checks(op, backend, device, op == "ssd" and backend != "torch"))
            document["checks"] += rows
            if not all(row["ok"] for row in rows):
                wrong.add((op, backend))
    return wrong


def measure(
    case: GpuCase,
    sizes: Sizes,
    candidates: Sequence[Candidate],
    wrong: set[tuple[str, str]],
    device: torch.device,
    repeat: int,
    tell: Tell,
) -> dict[str, Any]:
    """One case: errors against float64, times, floors."""
    torch.compiler.reset()
    inputs = case.inputs(sizes, device)
    dy = torch.randn(inputs["x"].shape, device=device).to(torch.bfloat16)
    truth = outcome(
        case, lambda v: case.ours(v, "torch"), last_sequence(inputs), last_sequence({"dy": dy})["dy"]
    )
    quantities = tuple(case.floors(sizes))
    rows: dict[str, Row] = {}
    ready: dict[str, Ready] = {}
    for candidate in candidates:
        row = rows[candidate.name] = {"ours": candidate.ours, "status": "ok"}
        if (reason := candidate.missing()) is not None:
            row |= {"status": "absent", "note": reason}
        elif candidate.ours and (case.op, candidate.name) in wrong:
            row |= {"status": "wrong", "note": "fails a check on a small shape: not timed"}
        else:
            tell(f"checking {candidate.name}")
            # What does not start is told, ours or not: the rest of the table can still be measured.
            strict = dataclasses.replace(candidate, ours=False, limit=LIMIT)
            way = attempt(strict, row, lambda way: errors(case, way, inputs, dy, truth))
            if row["status"] == "ok":
                one = Ready(way, way.given(inputs), dy)
                if runs(lambda one=one: timings(case, one, quantities, device), row):
                    ready[candidate.name] = one
    timed = [c for c in candidates if c.name in ready]
    found = interleaved(timed, ready, lambda r: timings(case, r, quantities, device), repeat, tell)
    for name, values in found.items():
        rows[name] |= {key: spread(v) for key, v in values.items()}
    floors = case.floors(sizes)
    for row in rows.values():
        row |= {f"{key}_over_floor": row[key]["median"] / floors[key] for key in floors if key in row}
    return {
        "op": case.name,
        "sizes": dict(sizes),
        "floors": floors,
        "reach": case.reach,
        "quantities": list(quantities),
        "not_run": reasons(case.op, device.type),
        "candidates": rows,
        "base": add_ratios(rows, quantities[-1]),
    }


def runs(work: Callable[[], Any], row: Row) -> bool:
    """Whether what is to be timed runs at all (in a CUDA graph, or beside the others in memory); if not,
    `row` says why."""
    try:
        work()
    except Exception as error:  # Of any kind: the others can still be measured.
        lines = str(error).strip().splitlines() or [""]
        row |= {"status": "failed", "note": f"{type(error).__name__}: {lines[0]}"}
        return False
    return True


def last_sequence(inputs: Inputs) -> Inputs:
    """The last of the batch in float64, as leaves where the inputs are."""

    def one(name: str, v: Tensor) -> Tensor:
        part = (v if name in PARAMETERS else v[-1:]).detach()
        return part.double().requires_grad_(v.requires_grad) if part.is_floating_point() else part.clone()

    return {name: one(name, v) for name, v in inputs.items()}


def outcome(case: GpuCase, run: Callable[[Inputs], Tensor], inputs: Inputs, dy: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of all inputs, or the states after the step."""
    if case.states:
        with torch.no_grad():
            y = run(inputs)
        return {"y": y} | {name: inputs[name] for name in case.states}
    y = run(inputs)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    return {"y": y.detach(), **{f"d_{name}": g for name, g in zip(inputs, grads, strict=True)}}


def errors(
    case: GpuCase, way: Way, inputs: Inputs, dy: Tensor, truth: Mapping[str, Tensor]
) -> dict[str, float]:
    """Of every result of the last sequence over its largest value; `elsewhere`: infinite where another
    sequence, whose outputs have no gradient, gets one, or has an output that is no number."""
    one = torch.zeros_like(dy)
    one[-1:] = dy[-1:]
    with poisoned():
        turned = one.transpose(1, 2).contiguous() if way.turned else one
        found = outcome(case, way.run, way.given(inputs), turned)
    worst, elsewhere = {}, 0.0
    for key, true in truth.items():
        name = key.removeprefix("d_")
        v = way.back(name, found[key])
        if name not in PARAMETERS:
            rest = v[:-1] * (0.0 if key in ("y", *case.states) else 1.0)
            # Sums of zeros are zeros: there is no rounding to allow for.
            if not (rest == 0).all():
                elsewhere = math.inf
            v = v[-1:]
        worst[key] = float((v.double() - true).abs().max() / true.abs().max())
    return worst | {"elsewhere": elsewhere}


def timings(
    case: GpuCase, ready: Ready, quantities: Sequence[str], device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of one round, by quantity."""
    run, v = ready.way.run, ready.inputs
    leaves = list(v.values())
    dy = ready.dy.transpose(1, 2).contiguous() if ready.way.turned else ready.dy
    found = {}
    for quantity in quantities:
        if quantity == "step_ms":
            found[quantity] = step_times(case, ready, device)
        elif quantity == "fwd_ms":
            with torch.no_grad():
                found[quantity] = times(lambda: run(v), device, EACH)
        elif quantity == "bwd_ms":
            found[quantity] = times_after(
                lambda: run(v), lambda y: torch.autograd.grad(y, leaves, dy), device, EACH
            )
        else:
            found[quantity] = times(lambda: torch.autograd.grad(run(v), leaves, dy), device, EACH)
    return found


def step_times(case: GpuCase, ready: Ready, device: torch.device) -> list[float]:
    """Of one step inside a CUDA graph of as many as have states that no cache holds together."""
    size = sum(ready.inputs[name].nbytes for name in case.states)
    copies = 1 if device.type != "cuda" else min(128, -(-CACHE // (2 * size)))
    states = [{name: ready.inputs[name].clone() for name in case.states} for _ in range(copies)]

    def steps() -> None:
        with torch.no_grad():
            for one in states:
                ready.way.run({**ready.inputs, **one})

    return [t / copies for t in graph_times(steps, device, EACH)]
