"""`hybrid-lm bench`: one benchmark, its file, its tables and its figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_lm.bench import gpu_report, report
from hybrid_lm.bench.generate import bench_generate
from hybrid_lm.bench.gpu import bench_gpu
from hybrid_lm.bench.gpu_models import known
from hybrid_lm.bench.measure import choose
from hybrid_lm.bench.ops import bench_ops
from hybrid_lm.bench.train import bench_train
from hybrid_lm.terminal import Terminal


def bench(
    what: str,
    *,
    out: Path | None,
    console: Console,
    ops: Sequence[str] | None,
    lengths: Sequence[int] | None,
    only: Sequence[str] | None,
    threads: int,
    repeat: int,
    compiled: bool,
    memory: bool,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Runs `ops`, `train`, `generate` or `gpu`; the arguments are those of `bench_ops`. Tables go to
    `console`, what is being done to standard error, all numbers to the JSON file `out` after each case.

    dry_run  of gpu: only the list of what would be measured; the document has no cases

    Raises ValueError for a name that is not known and for a choice that the benchmark does not have.
    """
    if what not in ("ops", "gpu") and ops:
        raise ValueError(f"--op {ops[0]}: bench {what} measures whole models; --op is for bench ops and gpu")
    if dry_run and what != "gpu":
        raise ValueError("--dry-run is for bench gpu")
    if what == "gpu" and (lengths or threads != 1):
        raise ValueError(
            "bench gpu has shapes of its own: --length and --threads are for the other benchmarks"
        )
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out {out}: the name must end in .json")
    news = Terminal(stderr=True)

    def tell(text: str) -> None:
        news.print(text, markup=False, highlight=False)

    def done(document: Mapping[str, Any]) -> None:
        report.show(console, document, document["cases"][-1])
        if out is not None:
            report.write(out, document)

    if what == "gpu":
        return _gpu(out, console, tell, ops, dry_run, only=only, repeat=repeat, compiled=compiled)
    common: dict[str, Any] = {"only": only, "threads": threads, "repeat": repeat, "tell": tell, "done": done}
    if what == "ops":
        document = bench_ops(ops=ops, lengths=lengths, compiled=compiled, memory=memory, **common)
    else:
        document = {"train": bench_train, "generate": bench_generate}[what](lengths=lengths, **common)
    if out is not None:
        figures, reason = report.draw_figures(out, document)
        for line in [*map(str, [out, *figures]), *([reason] if reason else [])]:
            console.print(line, markup=False, highlight=False)
    return document


RESULTS = Path("evals/results/gpu")


def _gpu(
    out: Path | None,
    console: Console,
    tell: Callable[[str], None],
    cases: Sequence[str] | None,
    dry_run: bool,
    **how: Any,
) -> dict[str, Any]:
    """Raw numbers go to `out`; in a checkout by default to evals/results/gpu/<the GPU's name>.json."""
    if dry_run:
        gpu_report.plan(console, choose("case", cases, known()))
        return {"bench": "gpu", "checks": [], "cases": []}

    def done(document: Mapping[str, Any]) -> None:
        if document["cases"]:
            gpu_report.show_case(console, document["cases"][-1])
        else:
            gpu_report.show_checks(console, document)
        if (to := place(out, document)) is not None:
            report.write(to, document)

    document = bench_gpu(cases=cases, tell=tell, done=done, **how)
    if (to := place(out, document)) is not None:
        console.print(str(to), markup=False, highlight=False)
    return document


def place(out: Path | None, document: Mapping[str, Any]) -> Path | None:
    """Where a GPU's numbers go; None where nobody said and this is no checkout."""
    if out is not None or not RESULTS.parent.is_dir():
        return out
    name = document["machine"].get("gpu", {}).get("name", "none")
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def ours_are_right(document: Mapping[str, Any]) -> bool:
    """Whether no candidate of ours was found wrong."""
    rows = [row for case in document["cases"] for row in case["candidates"].values()]
    wrong = any(row["ours"] and row["status"] in ("wrong", "failed") for row in rows)
    return not wrong and all(check["ok"] for check in document.get("checks", ()))
