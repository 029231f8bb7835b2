"""Where measurements go: a JSON file, tables, and figures of time and memory over length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_lm.data.optional import MissingPackage
from hybrid_lm.eval.plots import draw, label, style
from hybrid_lm.eval.table import NONE, print_table
from hybrid_lm.files import disk, finite, replace_text

Document = Mapping[str, Any]

COLUMNS = {
    "ops": (("fwd_ms", "fwd ms"), ("fwd_bwd_ms", "fwd+bwd ms"), ("peak_mb", "peak MiB")),
    "train": (("step_s", "s/step"), ("tokens_per_s", "tokens/s")),
    "generate": (("token_layer_ms", "ms per token and layer"),),
}
"""The quantities of each benchmark and their names in its table."""
MAIN = {"ops": "fwd_bwd_ms", "train": "step_s", "generate": "token_layer_ms"}
"""The quantity whose ratios are told."""
BESIDE = {"scan": ("attention",)}
"""Cases whose lines are drawn in another's figure."""


def write(path: Path, document: Document) -> None:
    """Writes the JSON file, whole or not at all."""
    with disk(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(finite(document), indent=1) + "\n")


def show(console: Console, document: Document, case: Mapping[str, Any]) -> None:
    """One case as a table, and a line for every candidate that was not timed."""
    columns, main = COLUMNS[document["bench"]], MAIN[document["bench"]]
    rows = case["candidates"]
    header = ["candidate", *(name for _, name in columns), "min - max", "x ours", "error"]
    lines = []
    for name, row in rows.items():
        if main in row:
            low, high = figure(row[main]["min"]), figure(row[main]["max"])
            ratio = row.get("ratio", {}).get(main)
            lines.append(
                [
                    f"{name} (ours)" if row["ours"] else name,
                    *(figure(row.get(key)) for key, _ in columns),
                    f"{low} - {high}",
                    NONE if ratio is None else f"{ratio:.2f}",
                    f"{row['worst_error']:.1e}",
                ]
            )
    # As a line of its own: the title of a narrow table would be broken.
    console.print(title(document, case), markup=False, highlight=False)
    print_table(console, "", header, lines)
    if sizes := case.get("parameters"):
        told = ", ".join(f"{name} {n:,}" for name, n in sizes.items())
        console.print(f"parameters: {told}", markup=False, highlight=False)
    for line in sentences(rows, case.get("yardsticks", {})):
        console.print(line, markup=False, highlight=False)


def sentences(rows: Mapping[str, Any], best: Mapping[str, float]) -> Iterator[str]:
    """What was not measured and why, and what ours reach."""
    for name, row in rows.items():
        if row.get("note"):
            yield f"{name}: {row['status']}: {row['note']}"
        if row["ours"] and "fwd_share_of_matmul" in row:
            yield f"{name}, forward: {row['fwd_share_of_matmul']:.0%} of a matrix product's rate"
        if "threads_speedup" in row:
            machine = f"a matrix product {best['matmul_speedup']:.2f}x, copying {best['copy_speedup']:.2f}x"
            yield f"{name}: {row['threads_speedup']:.2f}x as fast as on one thread ({machine})"
        for peer, times in row.get("over", {}).items():
            mine, theirs = row.get("peak_mb"), rows[peer].get("peak_mb")
            memory = f", with {mine / theirs:.1%} of its memory" if mine and theirs else ""
            yield f"{name} is {times:.2f}x as fast as {peer}{memory}"


def title(document: Document, case: Mapping[str, Any]) -> str:
    """The case, its clock and its threads."""
    threads = document["machine"]["threads"]
    about = f"{threads} thread{'s' * (threads != 1)}, {document['clock']}, medians of {document['repeat']}"
    return f"{case['op']}, {case['tokens']} tokens: {about}"


def figure(value: Any) -> str:
    """Three digits of a number or of a spread's median."""
    number = value["median"] if isinstance(value, Mapping) else value
    if number is None:
        return NONE
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def draw_figures(path: Path, document: Document) -> tuple[list[Path], str | None]:
    """SVG files beside the JSON file `path`, for ops of several lengths; why there are none, if they cannot
    be drawn."""
    made = []
    cases = grouped(document["cases"])
    for op in cases:
        lines = curves(cases[op])
        for other in BESIDE.get(op, ()):
            found = curves(cases.get(other, []))
            lines |= {f"{other}: {name}": points for name, points in found.items()}
        for key, what, unit in (("fwd_bwd_ms", "time", "ms"), ("peak_mb", "memory", "MiB")):
            points = {
                name: [(t, row[key]) for t, row in rows if row.get(key)] for name, rows in lines.items()
            }
            if len(cases[op]) < 2 or not any(points.values()):
                continue
            try:
                svg = over_length(f"{op}: forward + backward, {what}", points, unit)
            except MissingPackage as error:
                return made, str(error)
            made.append(path.with_name(f"{path.stem}-{op}-{what}.svg"))
            replace_text(made[-1], svg)
    return made, None


def grouped(cases: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Cases by op, in the order of their lengths."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for case in sorted(cases, key=lambda case: case["tokens"]):
        found.setdefault(case["op"], []).append(case)
    return found


def curves(cases: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, Any]]]:
    """The (tokens, row) of every candidate of an op."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for case in cases:
        for name, row in case["candidates"].items():
            found.setdefault(f"ours, {name}" if row["ours"] else name, []).append((case["tokens"], row))
    return found


def over_length(heading: str, points: Mapping[str, Sequence[tuple[int, Any]]], unit: str) -> str:
    """An SVG document: one line per candidate, both axes logarithmic."""

    def plot(ax: Any) -> None:
        shown = {name: values for name, values in points.items() if values}
        for i, (name, values) in enumerate(shown.items()):
            y = [v["median"] if isinstance(v, Mapping) else v for _, v in values]
            ax.plot([t for t, _ in values], y, label=name, **style(i, marker=True))
        ticks = sorted({t for values in shown.values() for t, _ in values})
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.minorticks_off()
        label(ax, heading, "tokens", unit)

    return draw(plot)
