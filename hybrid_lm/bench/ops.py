"""`bench ops`: forward and forward + backward of one op after another, ours and the peers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hybrid_lm.bench.cases import CASES, Case, Inputs, Op, gradients
from hybrid_lm.bench.machine import new_document, one_thread, yardsticks
from hybrid_lm.bench.measure import (
    Candidate,
    Row,
    add_ratios,
    choose,
    clock_of,
    compare,
    relative_errors,
)
from hybrid_lm.bench.memory import peak_mb

Tell = Callable[[str], None]


def bench_ops(
    *,
    ops: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    threads: int = 1,
    repeat: int = 5,
    compiled: bool = True,
    memory: bool = True,
    tell: Tell = lambda text: None,
    done: Callable[[Mapping[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measures cases at lengths; returns the document that `report.write` writes.

    ops       names of `CASES`; None for all
    lengths   tokens; None for each case's own
    only      names of candidates; None for all
    compiled  whether candidates under torch.compile take part
    memory    whether peak memory is taken too, in a fresh process for each candidate
    done      called with the document after each case: what is measured is not lost if the next one fails

    Raises ValueError for a name that is not known, and where nothing is left to measure.
    """
    cases = [CASES[name] for name in choose("op", ops, CASES)]
    names = choose("candidate", only, [c.name for case in cases for c in case.candidates()])
    torch.set_num_threads(threads)
    document = new_document("ops", threads, repeat)
    work = [
        (case, [c for c in case.candidates() if c.name in names and (compiled or not c.compiled)])
        for case in cases
    ]
    if not any(chosen for _, chosen in work):
        raise ValueError(
            f"nothing to measure: {', '.join(names)} go through torch.compile, which is left out"
        )
    for case, chosen in work:
        for length in (lengths or [case.length]) if chosen else ():
            label = f"{case.name} {length}"
            found = measure(
                case, chosen, length, threads, repeat, lambda t, label=label: tell(f"{label}: {t}")
            )
            if memory:
                add_memory(found, case.name, length, threads, lambda t, label=label: tell(f"{label}: {t}"))
            found["base"] = add_ratios(found["candidates"], "fwd_bwd_ms")
            document["cases"].append(found)
            done(document)
    return document


def measure(
    case: Case, candidates: Sequence[Candidate], length: int, threads: int, repeat: int, tell: Tell
) -> dict[str, Any]:
    """One case at one length: errors against our torch form in float64, times, what the machine can do."""
    clock = clock_of(threads)[1]
    # A graph that torch.compile made for another length would make it try for all lengths.
    torch.compiler.reset()
    wide = case.inputs(length, torch.float64)
    inputs = case.inputs(length)
    dy = torch.randn(case.output(inputs).shape)
    truth = gradients(lambda v: case.ours(v, "torch"), wide, dy.double())

    def check(run: Op) -> dict[str, float]:
        return relative_errors(gradients(run, inputs, dy), truth)

    rows = compare(
        candidates,
        check=check,
        run=lambda op: timed(op, inputs, dy, clock, threads),
        repeat=repeat,
        length=length,
        tell=tell,
    )
    best = yardsticks(clock, threads)
    if flop := case.flop(inputs):
        for row in rows.values():
            if "fwd_ms" in row:
                reached = flop / row["fwd_ms"]["median"] * 1e-6
                row["fwd_share_of_matmul"] = reached / best["matmul_gflop_s"]
    for row in rows.values():
        if "one_thread_ms" in row:
            row["threads_speedup"] = row["one_thread_ms"]["median"] / row["fwd_bwd_ms"]["median"]
    return {
        "op": case.name,
        "tokens": length,
        "shapes": {name: list(v.shape) for name, v in inputs.items()},
        "yardsticks": best,
        "candidates": rows,
    }


def timed(
    run: Op, inputs: Inputs, dy: torch.Tensor, clock: Callable[[], float], threads: int
) -> dict[str, list[float]]:
    """Milliseconds of the forward pass alone, nothing saved, and of forward + backward; of several threads,
    those of forward + backward on one as well."""
    with torch.no_grad():
        start = clock()
        run(inputs)
        forward = clock() - start
    start = clock()
    gradients(run, inputs, dy)
    times = {"fwd_ms": [forward * 1e3], "fwd_bwd_ms": [(clock() - start) * 1e3]}
    if threads > 1:
        with one_thread(threads):
            start = clock()
            gradients(run, inputs, dy)
            times["one_thread_ms"] = [(clock() - start) * 1e3]
    return times


def add_memory(found: Mapping[str, Any], case: str, length: int, threads: int, tell: Tell) -> None:
    """Gives every candidate that was timed its `peak_mb`."""
    rows: Mapping[str, Row] = found["candidates"]
    for name, row in rows.items():
        if row["status"] == "ok":
            tell(f"memory of {name}")
            row["peak_mb"], note = peak_mb(case, name, length, threads)
            if note:
                row["note"] = note
