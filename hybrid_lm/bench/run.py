"""`hybrid-lm bench`: one benchmark, its file, its tables and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_lm.bench import report
from hybrid_lm.bench.generate import bench_generate
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
) -> dict[str, Any]:
    """Runs `ops`, `train` or `generate`; the arguments are those of `bench_ops`. Tables go to `console`, what
    is being done to standard error, all numbers to the JSON file `out` after each case.

    Raises ValueError for a name that is not known and for a choice that the benchmark does not have.
    """
    if what != "ops" and ops:
        raise ValueError(f"--op {ops[0]}: bench {what} measures whole models; --op is for bench ops")
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out {out}: the name must end in .json")
    news = Terminal(stderr=True)

    def tell(text: str) -> None:
        news.print(text, markup=False, highlight=False)

    def done(document: Mapping[str, Any]) -> None:
        report.show(console, document, document["cases"][-1])
        if out is not None:
            report.write(out, document)

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


def ours_are_right(document: Mapping[str, Any]) -> bool:
    """Whether no candidate of ours was found wrong."""
    rows = [row for case in document["cases"] for row in case["candidates"].values()]
    return not any(row["ours"] and row["status"] == "wrong" for row in rows)
