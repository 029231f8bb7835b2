"""What `bench gpu` prints: the checks, a table of each case; without running, what it would do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from hybrid_lm.bench.gpu_cases import able, reasons
from hybrid_lm.bench.gpu_device import no_gpu
from hybrid_lm.bench.gpu_models import known
from hybrid_lm.bench.report import figure
from hybrid_lm.eval.table import NONE, print_table

Document = Mapping[str, Any]
WORDS = {
    "fwd_ms": "fwd ms",
    "bwd_ms": "bwd ms",
    "fwd_bwd_ms": "fwd+bwd ms",
    "step_ms": "step ms",
    "token_ms": "token ms",
}


def plan(console: Console, cases: list[str]) -> None:
    """Every case with its floors, and who would run it on a GPU."""
    reason = no_gpu()
    console.print(
        "a GPU is here" if reason is None else f"nothing can be measured here: {reason}", markup=False
    )
    lines = []
    for name in cases:
        case = known()[name]
        floors = case.floors(case.sizes)
        told = ", ".join(f"{WORDS[key]} {figure(v)}{reach(case.reach, key)}" for key, v in floors.items())
        lines.append([name, shape(case.sizes), told, ", ".join(able(case.op, "cuda"))])
    print_table(console, "", ["case", "sizes", "floor (to be reached)", "ours"], lines)
    for op in dict.fromkeys(known()[name].op for name in cases):
        for backend, why in reasons(op, "cuda").items():
            console.print(f"{op}: {backend} does not run on cuda: {why}", markup=False, highlight=False)
    by_peers: dict[str, list[str]] = {}
    for name in cases:
        for peer in known()[name].peers:
            by_peers.setdefault(f"{peer.name}: {peer.missing() or 'installed'}", []).append(name)
    for told, names in by_peers.items():
        console.print(f"{', '.join(names)}: {told}", markup=False, highlight=False)


def reach(goals: Mapping[str, float], key: str) -> str:
    return f" ({figure(goals[key])})" if key in goals else ""


def shape(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}{size}" for axis, size in sizes.items())


def show_checks(console: Console, document: Document) -> None:
    """How many are right, and each that is not."""
    rows = document["checks"]
    right = sum(row["ok"] for row in rows)
    console.print(f"{right} of {len(rows)} checks against float64, memory poisoned, are right", markup=False)
    for row in rows:
        if not row["ok"]:
            what = (
                row.get("note")
                or f"{row['worst']} is off by {row['error']:.1e}, more than {row['limit']:.1e}"
            )
            where = f"{row['op']}, {row['backend']}, {shape(row['sizes'])}, {row['dtype']}"
            console.print(f"WRONG {where}: {what}", markup=False, highlight=False)


def show_case(console: Console, case: Mapping[str, Any]) -> None:
    """One case as a table, and a line for every candidate that was not timed."""
    keys = case["quantities"]
    header = [
        "candidate",
        *(part for key in keys for part in (WORDS[key], "min - max", "x floor")),
        "x ours",
        "error",
    ]
    lines = []
    for name, row in case["candidates"].items():
        if keys[-1] not in row:
            continue
        cells = [f"{name} (ours)" if row["ours"] else name]
        for key in keys:
            cells += [figure(row[key]), f"{figure(row[key]['min'])} - {figure(row[key]['max'])}"]
            cells.append(f"{row[f'{key}_over_floor']:.2f}")
        ratio = row.get("ratio", {}).get(keys[-1])
        lines.append([*cells, NONE if ratio is None else f"{ratio:.2f}", f"{row['worst_error']:.1e}"])
    console.print(f"{case['op']}, {shape(case['sizes'])}", markup=False, highlight=False)
    print_table(console, "", header, lines)
    for line in sentences(case):
        console.print(line, markup=False, highlight=False)


def sentences(case: Mapping[str, Any]) -> Iterator[str]:
    """What was not measured and why, and whether the goals are reached."""
    for name, row in case["candidates"].items():
        if row.get("note"):
            yield f"{name}: {row['status']}: {row['note']}"
        if "graph_breaks" in row:
            yield f"{name}: {row['graph_breaks']} breaks in the graph"
    for backend, why in case["not_run"].items():
        yield f"{backend}: {why}"
    best = case["candidates"].get(case["base"], {})
    for key, goal in case["reach"].items():
        if key in best:
            met = "reached" if best[key]["median"] <= goal else "missed"
            yield f"{case['base']}: {WORDS[key]} {figure(best[key])}, to be reached {figure(goal)}: {met}"
